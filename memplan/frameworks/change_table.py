"""What a table of a framework's keys is made of, and how a change of a run is read off it.

A key says what a run's fields are in the framework's words. What must be written for a change are the keys that say
something else of the changed run than of the asked one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from memplan.spec.base import Part
from memplan.spec.formats import Quantization
from memplan.spec.run import RunSpec

Value: TypeAlias = "bool | int | float | str | Sequence[Value] | Mapping[str, Value] | None"


class Key(NamedTuple):
    """`key` is `value` of a run, None where nothing is to be written; `fields` are those of a run that it speaks for.

    Without a `value` it is the first field's. Of another place than the YAML file, `value` is the whole line, and
    `key` what the line is called.
    """

    key: str
    fields: tuple[str, ...]
    value: Callable[[RunSpec], Value] | None = None
    place: Literal["yaml", "Python", "shell"] = "yaml"


class Remark(NamedTuple):
    """What must be known where one of `fields` changes; an empty text where the changed run needs none."""

    fields: tuple[str, ...]
    says: Callable[[RunSpec], str]


class Framework(NamedTuple):
    """A framework's keys at the version they were read from."""

    name: str
    title: str
    source: str
    keys: tuple[Key, ...]
    remarks: tuple[Remark, ...]


class Lines(NamedTuple):
    """A change as what a user of one framework writes: lines of YAML, in which what goes elsewhere is a comment.

    note    what the framework has no key for, and what else must be known; may be empty
    """

    framework: str
    title: str
    lines: tuple[str, ...]
    note: str


def read_off(framework: Framework, asked: RunSpec, changed: RunSpec) -> Lines:
    """What turns `asked` into `changed` in the framework's words. Every field that differs has a line or is noted."""
    unsaid = dict.fromkeys(differing(asked, changed))
    differ = frozenset(unsaid)
    written: list[str] = []
    removed: list[str] = []
    notes: list[str] = []
    for key in framework.keys:
        value = key.value or field(key.fields[0])
        new = value(changed)
        if new == value(asked):
            continue
        for name in key.fields:
            unsaid.pop(name, None)
        if new is None:
            removed.append(key.key)
        elif key.place == "yaml":
            written.append(f"{key.key}: {yaml(new)}")
        else:
            written.append(f"# {key.place}: {new}")
    if removed:
        written.append(f"# remove: {', '.join(removed)}")
    for remark in framework.remarks:
        text = remark.says(changed) if differ.intersection(remark.fields) else ""
        if text:
            notes.append(text)
            for name in remark.fields:
                unsaid.pop(name, None)
    if unsaid:
        notes.append(f"{framework.title} has no key for {', '.join(f'{f} ({_shown(changed, f)})' for f in unsaid)}")
    return Lines(framework.name, framework.title, tuple(written), "; ".join(notes))


def differing(asked: RunSpec, changed: RunSpec) -> Iterator[str]:
    """The paths of the fields in which two runs differ. Where one quantises, the other has the usual quantisation."""
    for name in RunSpec.model_fields:
        old, new = getattr(asked, name), getattr(changed, name)
        if isinstance(old, Part) and isinstance(new, Part) and name != "model":
            yield from _within(old, new, name)
        elif old != new:
            yield name


def _within(old: Part, new: Part, path: str) -> Iterator[str]:
    for name in type(new).model_fields:
        inner, was, now = f"{path}.{name}", getattr(old, name), getattr(new, name)
        if name == "quantization" and was != now:
            found = dict.fromkeys(_within(was or Quantization(), now or Quantization(), inner))
            yield from found if was and now else {f"{inner}.format": None, **found}
        elif isinstance(was, Part) and isinstance(now, Part):
            yield from _within(was, now, inner)
        elif was != now:
            yield inner


def value_of(run: RunSpec, field: str) -> Any:
    """What the run has at a path; None where a part of the path is not there."""
    value: Any = run
    for name in field.split("."):
        value = getattr(value, name, None)
    return value


def field(path: str) -> Callable[[RunSpec], Value]:
    """What a run has at a path, as a key's value."""
    return lambda run: value_of(run, path)


def is_(path: str, value: Value) -> Callable[[RunSpec], bool]:
    """Whether a run has the value at a path."""
    return lambda run: value_of(run, path) == value


def _shown(run: RunSpec, field: str) -> str:
    """A field's value as JSON has it, without quotes around a word."""
    value = value_of(run, field)
    text = json.dumps(value.model_dump(mode="json") if isinstance(value, Part) else value)
    return text.strip('"') if isinstance(value, str) else text


_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_WORDS = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))


def yaml(value: Value) -> str:
    """A value as YAML, in one line.

    >>> yaml({"stage": 3, "devices": ("cpu", "no"), "on": True, "rate": 1e-05})
    '{stage: 3, devices: [cpu, "no"], "on": true, rate: 1.0e-05}'
    """
    match value:
        case str():
            plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
            return value if plain else json.dumps(value, ensure_ascii=False)
        case float():
            text = repr(value)
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
        case Mapping():
            return f"{{{', '.join(f'{yaml(name)}: {yaml(inner)}' for name, inner in value.items())}}}"
        case Sequence():
            return f"[{', '.join(yaml(inner) for inner in value)}]"
        case _:
            return json.dumps(value)
