"""The fields of a run, looked up by path: their type, choices and default."""

from __future__ import annotations

from typing import Any

from memplan.core.records import NamedTuple
from memplan.spec.checks import alternatives, part_of
from memplan.spec.run import RunSpec


class Field(NamedTuple):
    """A field of a run as text gives it.

    type     int, float or bool; str for any other
    choices  words that it accepts, if it has such words
    default  its default value in words
    """

    type: type
    choices: tuple[str, ...]
    default: str


def field_of(path: str) -> Field:
    """Return the field of a run at a dotted path."""
    part: Any = RunSpec
    *parts, name = path.split(".")
    for outer in parts:
        inner = part_of(part.model_fields[outer].annotation)
        assert inner is not None, path
        part = inner
    field = part.model_fields[name]
    accepted = list(alternatives(field.annotation))
    first = accepted[0] if isinstance(accepted[0], type) else type(accepted[0])
    choices = tuple(_typed(choice) for choice in accepted if not isinstance(choice, type))
    return Field(first if first in (int, float, bool) else str, choices, _shown_default(field.default))


def _typed(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _shown_default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
