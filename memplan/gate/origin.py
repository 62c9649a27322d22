"""Where a run's value is said: the file, the line and the key, told by a field's origin."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from memplan.core.records import NamedTuple
from memplan.frameworks.reading.config import FieldOrigin
from memplan.frameworks.reading.run_file import RunFile

_PLACE = re.compile(r"(?:^|, |: )([^,:]+):(\d+) (?:--)?([^\s,]+)")


class Place(NamedTuple):
    """A key in a line of a file; `key` is empty for the line alone."""

    file: str
    line: int
    key: str = ""


def places(why: str, run: str) -> list[Place]:
    """Return the keys that an origin names. Files have no folder there: they are taken to be in that of the run."""
    found = [Place(name, int(line), key) for name, line, key in _PLACE.findall(why)]
    folder, name = posixpath.split(run)
    return [place._replace(file=run if place.file == name else posixpath.join(folder, place.file)) for place in found]


def line_in(text: str, run: str) -> int | None:
    """Return the line of the run's file that an error names."""
    match = re.search(rf"{re.escape(posixpath.basename(run))}(?::| is not \w+ \(line )(\d+)", text)
    return int(match[1]) if match else None


class KeyValue(NamedTuple):
    """A key of a run's file, or of one that it names, its value there, and its line."""

    key: str
    value: Any
    file: str
    line: int


def keys_of(file: RunFile, origins: Iterable[FieldOrigin], run: str) -> tuple[KeyValue, ...]:
    """Return the keys that the origins name, with the values that the file has, or else the field."""
    said: Mapping[str, Any] = file.source.keys if file.source is not None else {}
    found: dict[str, KeyValue] = {}
    for origin in origins:
        for place in places(origin.why, run):
            value = said.get(place.key, origin.value)
            found.setdefault(place.key, KeyValue(place.key, value, place.file, place.line))
    return tuple(found.values())
