"""Tables of a framework's config keys, and the keys to write for a change of a run.

A key computes its value from a run. A change is written as the keys whose value differs between the two runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from memplan.core.records import NamedTuple
from memplan.spec.base import Part
from memplan.spec.formats import Quantization
from memplan.spec.run import RunSpec

Value: TypeAlias = "bool | int | float | str | Sequence[Value] | Mapping[str, Value] | None"


class Key(NamedTuple):
    """A config key.

    key     its name; outside of the YAML file, a name for the line
    fields  the fields of a run that it covers
    value   its value for a run, None if nothing is written; by default the first field's. Outside of the YAML file,
            the entire line
    place   where it is written
    same    whether the first field has the value that a file gives the key, so that the row also reads it; always if
            `value` is not given
    """

    key: str
    fields: tuple[str, ...]
    value: Callable[[RunSpec], Value] | None = None
    place: Literal["yaml", "Python", "shell"] = "yaml"
    same: bool = False

    @property
    def is_same(self) -> bool:
        return self.same or (self.value is None and self.place == "yaml")


class Remark(NamedTuple):
    """A remark on the changed run, if the change is one of these `fields`."""

    fields: tuple[str, ...]
    text: str


def no_remarks(_: RunSpec) -> Iterable[Remark]:
    return ()


class Framework(NamedTuple):
    """A framework's table of keys.

    name     short name
    title    name as shown
    source   version and files the table was read from
    keys     its keys
    remarks  its remarks on a changed run
    """

    name: str
    title: str
    source: str
    keys: tuple[Key, ...]
    remarks: Callable[[RunSpec], Iterable[Remark]] = no_remarks


class Lines(NamedTuple):
    """A change of a run as a user of one framework writes it.

    framework  short name of the framework
    title      its name as shown
    lines      lines of YAML; changes outside of the YAML file are comments
    note       remarks, and fields that the framework has no key for; may be empty
    """

    framework: str
    title: str
    lines: tuple[str, ...]
    note: str


def change_lines(framework: Framework, asked: RunSpec, changed: RunSpec) -> Lines:
    """Return the lines that turn `asked` into `changed`. Every field that differs has a line or is in the note."""
    uncovered = dict.fromkeys(differing(asked, changed))
    differ = frozenset(uncovered)
    written: list[str] = []
    removed: list[str] = []
    notes: list[str] = []
    for key in framework.keys:
        value = key.value or field(key.fields[0])
        new = value(changed)
        if new == value(asked):
            continue
        for name in key.fields:
            uncovered.pop(name, None)
        if new is None:
            removed.append(key.key)
        elif key.place == "yaml":
            written.append(f"{key.key}: {yaml(new)}")
        else:
            written.append(f"# {key.place}: {new}")
    if removed:
        written.append(f"# remove: {', '.join(removed)}")
    for remark in framework.remarks(changed):
        if differ.intersection(remark.fields):
            notes.append(remark.text)
            for name in remark.fields:
                uncovered.pop(name, None)
    if uncovered:
        fields = ", ".join(f"{name} ({_shown(changed, name)})" for name in uncovered)
        notes.append(f"{framework.title} has no key for {fields}")
    return Lines(framework.name, framework.title, tuple(written), "; ".join(notes))


def differing(asked: RunSpec, changed: RunSpec) -> Iterator[str]:
    """Yield the paths of the fields in which two runs differ.

    If only one of them quantises, it is compared with the default quantisation.
    """
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
            paths = dict.fromkeys(_within(was or Quantization(), now or Quantization(), inner))
            yield from paths if was and now else {f"{inner}.format": None, **paths}
        elif isinstance(was, Part) and isinstance(now, Part):
            yield from _within(was, now, inner)
        elif was != now:
            yield inner


def value_of(run: RunSpec, field: str) -> Any:
    """Return the run's value at a path; None if a part of the path is missing."""
    value: Any = run
    for name in field.split("."):
        value = getattr(value, name, None)
    return value


def pairs(words: str) -> dict[str, str]:
    """Return names and what they stand for, of words such as `name=other`, or `name` of one that stands for itself."""
    return {name: other or name for name, _, other in (word.partition("=") for word in words.split())}


def field(path: str) -> Callable[[RunSpec], Value]:
    """Return a function that gives a run's value at a path."""
    return lambda run: value_of(run, path)


def is_(path: str, *values: Value) -> Callable[[RunSpec], bool]:
    """Return a function that tells whether a run has one of the values at a path."""
    return lambda run: value_of(run, path) in values


def _shown(run: RunSpec, field: str) -> str:
    """A field's value as JSON, without quotes around a string."""
    value = value_of(run, field)
    text = json.dumps(value.model_dump(mode="json") if isinstance(value, Part) else value)
    return text.strip('"') if isinstance(value, str) else text


_PLAIN = re.compile(r"[A-Za-z_][\w./-]*")
_RESERVED = frozenset(("true", "false", "yes", "no", "on", "off", "null", "y", "n"))


def yaml(value: Value) -> str:
    """Return a value as YAML in one line.

    >>> yaml({"stage": 3, "devices": ("cpu", "no"), "on": True, "rate": 1e-05})
    '{stage: 3, devices: [cpu, "no"], "on": true, rate: 1.0e-05}'
    """
    match value:
        case str():
            is_plain = _PLAIN.fullmatch(value) and value.lower() not in _RESERVED
            return value if is_plain else json.dumps(value, ensure_ascii=False)
        case float():
            text = repr(value)
            return text.replace("e", ".0e") if "e" in text and "." not in text else text
        case Mapping():
            return f"{{{', '.join(f'{yaml(name)}: {yaml(inner)}' for name, inner in value.items())}}}"
        case Sequence():
            return f"[{', '.join(yaml(inner) for inner in value)}]"
        case _:
            return json.dumps(value)
