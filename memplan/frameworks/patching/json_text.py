"""Set and remove keys of a JSON text; order and spaces of everything else stay as they are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from memplan.core.errors import SpecError
from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import Value

_SPACE = re.compile(r"\s*")


class _Member(NamedTuple):
    """The positions of a key, and of its value's start and end; `inner` if the value is a mapping."""

    key: int
    start: int
    end: int
    inner: dict[str, _Member] | None


def edited_json(text: str, edits: Mapping[tuple[str, ...], Value]) -> str:
    """Return the text with each key, by its path, set to a value, or removed if the value is None."""
    for path, value in edits.items():
        text = _edited(text, path, value)
    return text


def _edited(text: str, path: tuple[str, ...], value: Value) -> str:
    start = _SPACE.match(text).end()  # pyright: ignore[reportOptionalMemberAccess] (it always matches)
    members, end = _members(text, start)
    name, *rest = path
    while rest and name in members and members[name].inner is not None:
        start, end = members[name].start, members[name].end
        members = members[name].inner or {}
        name, *rest = rest
    if rest and value is None:
        return text
    if rest and name in members and json.loads(text[members[name].start : members[name].end]) is not None:
        raise SpecError(f"{name} is not a section")
    for parent in reversed(rest):
        value = {parent: value}
    written = json.dumps(value, ensure_ascii=False)
    if value is None:
        return _removed(text, members, name)
    if name in members:
        return f"{text[: members[name].start]}{written}{text[members[name].end :]}"
    member = f"{json.dumps(name)}: {written}"
    if not members:
        return f"{text[: start + 1]}{member}{text[end - 1 :]}"
    *_, last = members.values()
    gap = text[text.rfind(",", 0, last.key) + 1 : last.key] if len(members) > 1 else text[start + 1 : last.key]
    return f"{text[: last.end]},{gap or ' '}{member}{text[last.end :]}"


def _removed(text: str, members: Mapping[str, _Member], name: str) -> str:
    names = list(members)
    if name not in members:
        return text
    index = names.index(name)
    if index:
        return text[: members[names[index - 1]].end] + text[members[name].end :]
    following = members[names[1]].key if len(names) > 1 else members[name].end
    return text[: members[name].key] + text[following:]


def _members(text: str, position: int) -> tuple[dict[str, _Member], int]:
    """Return the members of the mapping that begins at a position, and where it ends."""
    decoder = json.JSONDecoder()
    out: dict[str, _Member] = {}
    position = _after(text, position + 1)
    while text[position] != "}":
        key = position
        name, position = decoder.raw_decode(text, position)
        start = _after(text, _after(text, position) + 1)
        inner = None
        if text[start] == "{":
            inner, end = _members(text, start)
        else:
            _, end = decoder.raw_decode(text, start)
        out[name] = _Member(key, start, end, inner)
        position = _after(text, end)
        if text[position] == ",":
            position = _after(text, position + 1)
    return out, position + 1


def _after(text: str, position: int) -> int:
    """Return the first position that is not a space."""
    return _SPACE.match(text, position).end()  # pyright: ignore[reportOptionalMemberAccess] (it always matches)
