"""Immutable, hashable values: tuples for lists, `FrozenDict` for mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast


def frozen(value: Any) -> Any:
    """Return a copy in which lists are tuples and mappings are FrozenDicts, recursively."""
    if value is None or isinstance(value, (str, int, float)):  # first, because isinstance(value, Mapping) is slow
        return value
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value)
        return FrozenDict({str(k): frozen(v) for k, v in items.items()})
    if isinstance(value, (list, tuple)):
        return tuple(frozen(v) for v in cast(tuple[Any, ...], value))
    return value


class FrozenDict(dict[str, Any]):
    """An immutable, hashable mapping, for the free-form JSON in a spec.

    Equal only to mappings whose values also have the same types: answers are cached by equality, and a size of 2 is
    valid where 2.0 and True are errors.
    """

    __slots__ = ("_hash",)  # computed once: a model's config and a pass's axes are parts of many cache keys

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        try:
            return self._hash
        except AttributeError:
            self._hash = hash(frozenset(self.items()))
            return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, dict) or not super().__eq__(cast(dict[str, Any], other)):
            return False
        for a, b in zip(self.values(), map(cast(dict[str, Any], other).__getitem__, self), strict=True):
            if a is not b and (type(a) is not type(b) or (type(a) is tuple and not _same_types(a, b))):
                return False
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    def _refuse(self, *_: object, **__: object) -> Any:
        raise TypeError("a FrozenDict cannot be changed")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse  # pyright: ignore[reportAssignmentType]

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: object) -> FrozenDict:
        return self

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return FrozenDict, (dict(self),)


def _same_types(a: Any, b: Any) -> bool:
    """Whether equal values have the same types, recursively. Nested mappings have compared theirs already."""
    return type(a) is type(b) and (not isinstance(a, tuple) or all(map(_same_types, cast(tuple[Any, ...], a), b)))
