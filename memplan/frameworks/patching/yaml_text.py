"""Set and remove keys of a YAML text; comments, order and quotes of everything else stay as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from yaml import SafeLoader

from memplan.core.errors import SpecError
from memplan.frameworks.change_table import Value, yaml

Path = tuple[str, ...]


def edited_yaml(text: str, edits: Mapping[Path, Value]) -> str:
    """Return the text with each key, by its path, set to a value, or removed if the value is None.

    Raises SpecError for a key that cannot be changed in place, as one whose value is an alias.
    """
    before: Path = ()
    for path, value in edits.items():
        text = _edited(text, path, value, before)
        before = path
    return text


def _edited(text: str, path: Path, value: Value, before: Path) -> str:
    """Return the text with one key changed. A new key is put after the key `before` if that is in the same section."""
    section = _composed(text)
    for depth, name in enumerate(path[:-1]):
        pair = _pair(section, name)
        if pair is None or _is_null(pair[1]):
            if value is None:
                return text
            inner = cast(Value, value)
            for parent in reversed(path[depth + 1 :]):
                inner = {parent: inner}
            return _set(text, section, name, inner, "")
        section = pair[1]
        _refuse_alias(pair, name)
    name = path[-1]
    if not isinstance(section.value, list) or section.id != "mapping":
        raise SpecError(f"{'.'.join(path[:-1])} is not a section")
    if value is None:
        return _removed(text, section, name)
    return _set(text, section, name, value, before[-1] if before and before[:-1] == path[:-1] else "")


def _composed(text: str) -> Any:
    loader: Any = SafeLoader(text)  # whose marks count characters
    node = loader.get_single_node()
    if node is None or node.id != "mapping":
        raise SpecError("the file has no keys")
    return node


def _pair(section: Any, name: str) -> Any:
    """Return the nodes of a key and its value; None if the section does not have the key."""
    return next((pair for pair in section.value if pair[0].value == name), None)


def _is_null(node: Any) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _refuse_alias(pair: Any, name: str) -> None:
    """Raise SpecError for an alias, whose node is that of its anchor."""
    if pair[1].start_mark.index < pair[0].end_mark.index:
        raise SpecError(f"{name} is an alias of another value")


def _set(text: str, section: Any, name: str, value: Value, before: str) -> str:
    pair = _pair(section, name)
    if pair is None:
        return _inserted(text, section, f"{yaml(name)}: {yaml(value)}", before)
    _refuse_alias(pair, name)
    node = pair[1]
    start, end = node.start_mark.index, end_of(node, text)
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if node.id == "sequence" and is_list and node.value:
        return _with_items(text, node, cast("Sequence[Value]", value))
    if node.id == "scalar" and not is_list and not isinstance(value, Mapping):
        written = _quoted(node.style, value)
        return f"{text[:start]}{' ' if start == end else ''}{written}{text[end:]}"
    colon = text.index(":", pair[0].end_mark.index) + 1
    return f"{text[:colon]} {yaml(value)}{text[end:]}"


def _quoted(style: str | None, value: Value) -> str:
    """Return a scalar in the quotes that the old one had."""
    if isinstance(value, str) and style == "'":
        return f"'{value.replace(chr(39), 2 * chr(39))}'"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and style == '"' else yaml(value)


def _with_items(text: str, node: Any, items: Sequence[Value]) -> str:
    """Return the text with the items of a list replaced; if it only grows, the old ones stay as they are."""
    start, end = node.start_mark.index, end_of(node, text)
    old = [item.value for item in node.value]
    grows = old == [*items[: len(old)]]
    new = [yaml(item) for item in (items[len(old) :] if grows else items)]
    if node.flow_style:
        return (
            f"{text[: end - 1]}, {', '.join(new)}]{text[end:]}" if grows else f"{text[:start]}{yaml(items)}{text[end:]}"
        )
    dash = f"{newline_of(text)}{' ' * node.start_mark.column}- "
    if grows:
        return text[:end] + "".join(f"{dash}{item}" for item in new) + text[end:]
    return f"{text[:start]}- {dash.join(new)}{text[end:]}"


def _inserted(text: str, section: Any, written: str, before: str) -> str:
    """Return the text with a key added to a section: after the key `before`, or else as the last."""
    if section.flow_style:
        end = section.end_mark.index - 1
        head = text[:end].rstrip()
        comma = "" if not section.value or head.endswith(",") else ","
        return f"{head}{comma}{' ' if section.value else ''}{written}{text[len(head) : end]}{text[end:]}"
    pair = _pair(section, before) or section.value[-1]
    end = text.find("\n", max(pair[0].end_mark.index, end_of(pair[1], text)))
    line = f"{' ' * section.start_mark.column}{written}"
    return (
        f"{text}{newline_of(text)}{line}" if end < 0 else f"{text[: end + 1]}{line}{newline_of(text)}{text[end + 1 :]}"
    )


def _removed(text: str, section: Any, name: str) -> str:
    pair = _pair(section, name)
    if pair is None:
        return text
    start, end = pair[0].start_mark.index, max(pair[0].end_mark.index + 1, end_of(pair[1], text))
    if section.flow_style:
        after = text[end:].lstrip()
        head = text[:start].rstrip()
        if after.startswith(","):
            return text[:start] + after[1:].lstrip()
        return f"{head.removesuffix(',')}{text[end:]}"
    _refuse_alias(pair, name)
    start = text.rfind("\n", 0, start) + 1
    stop = text.find("\n", end)
    return text[:start] + (text[stop + 1 :] if stop >= 0 else "")


def end_of(node: Any, text: str) -> int:
    """Return the position after the last character of a value; a block's own end is that of the space below it."""
    if node.id != "scalar" and not node.flow_style and node.value:
        last = node.value[-1]
        return max(last[0].end_mark.index, end_of(last[1], text)) if node.id == "mapping" else end_of(last, text)
    start, end = node.start_mark.index, node.end_mark.index
    return start + len(text[start:end].rstrip()) if node.id == "scalar" and node.style in ("|", ">") else end


def newline_of(text: str) -> str:
    """The end of the text's lines."""
    return "\r\n" if "\r\n" in text else "\n"
