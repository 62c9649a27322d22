"""Checks of values by their fields' types, without pydantic.

A value that already has the field's type is taken as it is. Any other (a set for a list, a wrong word, a number out of
range) raises NotPlainError, and pydantic converts it or explains the error, by the same types. Importing pydantic takes
as long as an answer, so only such runs wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import isfinite
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, cast, get_args, get_origin

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

Check = Callable[[Any], Any]  # returns the field's value, or raises NotPlainError


class NotPlainError(ValueError):
    """A value that pydantic must convert or refuse."""


class Strict:
    """Annotation of a number or flag that nothing else, such as a string, is converted to; with the number's bounds."""

    __slots__ = ("bounds",)
    __is_annotated_types_grouped_metadata__ = True  # pydantic reads the items of such an annotation

    def __init__(self, **bounds: float) -> None:
        self.bounds = bounds

    def __iter__(self) -> Iterator[Any]:
        import annotated_types
        import pydantic

        yield pydantic.Strict()
        for name, bound in self.bounds.items():
            yield getattr(annotated_types, name.capitalize())(bound)

    def check(self, inner: Check) -> Check:
        bounds = self.bounds
        low, high = bounds.get("ge", float("-inf")), bounds.get("le", float("inf"))
        above, below = bounds.get("gt", float("-inf")), bounds.get("lt", float("inf"))

        def in_bounds(value: Any) -> Any:
            value = inner(value)
            if low <= value <= high and above < value < below:
                return value
            raise NotPlainError

        return in_bounds


class Before:
    """Annotation of a field whose value a function changes before it is checked."""

    __slots__ = ("function",)

    def __init__(self, function: Check) -> None:
        self.function = function

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_before_validator_function(self.function, handler(source))

    def check(self, inner: Check) -> Check:
        function = self.function
        return lambda value: inner(function(value))


class After:
    """Annotation of a field whose value a function changes after it was checked; a ValueError refuses it."""

    __slots__ = ("function",)

    def __init__(self, function: Check) -> None:
        self.function = function

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.function, handler(source))

    def check(self, inner: Check) -> Check:
        function = self.function
        return lambda value: function(inner(value))


def check_of(annotation: Any) -> Check:
    """Return the check of values by an annotation: its types are those that parts of a run have."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _one_of(inner)
    if origin is Annotated:
        check = check_of(inner[0])
        for metadata in inner[1:]:
            check = metadata.check(check)
        return check
    if origin in (Union, UnionType):
        return _any_of([check_of(member) for member in inner])
    if origin is tuple:
        return _tuple_of([check_of(member) for member in inner if member is not ...], inner[-1] is ...)
    if origin is dict:  # with keys that are strings, and values that an annotation of its own checks
        return _mapping
    if annotation is float:
        return _finite
    if annotation in (str, int, bool, NoneType):
        return _exactly(annotation)
    return annotation.plain


def alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types and literal values that an annotation, or each item of a tuple, consists of."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        yield from inner
    elif origin is Annotated:
        yield from alternatives(inner[0])
    elif origin in (Union, UnionType, tuple):
        for alternative in inner:
            if alternative not in (NoneType, ...):
                yield from alternatives(alternative)
    else:
        yield annotation


def part_of(annotation: Any) -> Any:
    """Return the class of the part of a run that a field holds, if it holds one."""
    return next((a for a in alternatives(annotation) if isinstance(a, type) and hasattr(a, "model_fields")), None)


def _exactly(type_: type) -> Check:
    def exactly(value: Any) -> Any:
        if type(value) is type_:
            return value
        raise NotPlainError

    return exactly


def _finite(value: Any) -> float:
    if type(value) is float and isfinite(value):
        return value
    if type(value) is int and abs(value) < _EXACT_FLOATS:
        return float(value)
    raise NotPlainError


_EXACT_FLOATS = 2**53


def _one_of(words: tuple[Any, ...]) -> Check:
    known: set[tuple[type, Any]] = {(type(word), word) for word in words}

    def one_of(value: Any) -> Any:
        if type(value) in (str, int, bool) and (type(value), value) in known:
            return value
        raise NotPlainError

    return one_of


def _any_of(members: list[Check]) -> Check:
    def any_of(value: Any) -> Any:
        for member in members:
            try:
                return member(value)
            except ValueError:
                continue
        raise NotPlainError

    return any_of


def _tuple_of(members: list[Check], is_any_length: bool) -> Check:
    def tuple_of(value: Any) -> tuple[Any, ...]:
        if type(value) not in (list, tuple):
            raise NotPlainError
        items = cast(list[Any], value)
        checks = members * len(items) if is_any_length else members
        if len(items) != len(checks):
            raise NotPlainError
        return tuple(check(item) for check, item in zip(checks, items, strict=True))

    return tuple_of


def _mapping(value: Any) -> Any:
    if isinstance(value, dict) and all(type(key) is str for key in cast(dict[Any, Any], value)):
        return cast(dict[str, Any], value)
    raise NotPlainError
