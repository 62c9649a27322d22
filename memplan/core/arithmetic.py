"""Sizes of one run (an int) or of many runs at once (an array), with one set of operations for both."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Size = TypeVar("Size", int, "NDArray[np.int64]")


class Arithmetic(Generic[Size]):
    """Functions that differ between an int and an array; operators do not.

    choose        like numpy.where: the second argument if the first is true, else the third
    power_of_two  the smallest power of two that is at least this number
    """

    def __init__(
        self,
        least: Callable[[Size | int, Size | int], Size],
        most: Callable[[Size | int, Size | int], Size],
        choose: Callable[[Any, Size | int, Size | int], Size],
        power_of_two: Callable[[Size], Size],
    ) -> None:
        self.least, self.most = least, most
        self.choose, self.power_of_two = choose, power_of_two


def _choose(true: bool, this: int, that: int) -> int:
    return this if true else that


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


ONE_RUN: Arithmetic[int] = Arithmetic(min, max, _choose, _power_of_two)
