"""The fields of a run, looked up by path: their type, choices and default."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from memplan.core.records import NamedTuple
from memplan.spec.base import Part
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


def part_of(annotation: Any) -> type[Part] | None:
    """Return the part of a run that a field holds, if it holds one."""
    return next((a for a in _alternatives(annotation) if isinstance(a, type) and issubclass(a, Part)), None)


def field_of(path: str) -> Field:
    """Return the field of a run at a dotted path."""
    part: type[Part] = RunSpec
    *parts, name = path.split(".")
    for outer in parts:
        inner = part_of(part.model_fields[outer].annotation)
        assert inner is not None, path
        part = inner
    field = part.model_fields[name]
    alternatives = list(_alternatives(field.annotation))
    first = alternatives[0] if isinstance(alternatives[0], type) else type(alternatives[0])
    choices = tuple(_typed(choice) for choice in alternatives if not isinstance(choice, type))
    return Field(first if first in (int, float, bool) else str, choices, _shown_default(field.default))


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types and literal values that an annotation, or each item of a tuple, consists of."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from inner
    elif origin is Annotated:
        yield from _alternatives(inner[0])
    elif origin in (Union, UnionType, tuple):
        for alternative in inner:
            if alternative not in (NoneType, ...):
                yield from _alternatives(alternative)
    else:
        yield annotation


def _typed(choice: object) -> str:
    return str(choice).lower() if isinstance(choice, bool) else str(choice)


def _shown_default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == ():
        return "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
