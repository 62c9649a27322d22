"""A size of one run, or of many runs at once: a whole number, or an array of them. The same arithmetic serves both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Size = TypeVar("Size", int, "NDArray[np.int64]")


class Arithmetic(NamedTuple, Generic[Size]):
    """What is written otherwise for a number and for an array; the operators are the same."""

    least: Callable[[Size | int, Size | int], Size]
    most: Callable[[Size | int, Size | int], Size]
    choose: Callable[[Any, Size | int, Size | int], Size]
    """Where the first is true the second, else the third."""
    power_of_two: Callable[[Size], Size]
    """The next power of two, or the number itself where it is one."""


def _choose(true: bool, this: int, that: int) -> int:
    return this if true else that


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


ONE_RUN: Arithmetic[int] = Arithmetic(min, max, _choose, _power_of_two)
