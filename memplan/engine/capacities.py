"""One replay for the capacities of many cards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, update_wrapper
from math import inf
from typing import Generic, TypeVar

_Replay = TypeVar("_Replay", bound=Hashable)


class by_capacity(Generic[_Replay]):  # noqa: N801 (a decorator)
    """Decorate a function that returns the peak that a replay reserves at a capacity, None if it exceeds that.

    A peak is that of every capacity between itself and the one that was replayed: the allocator only looks at the
    capacity when it would reserve more, and reaches the lower one at the same events. The peaks of the last 1,024
    replays are kept.
    """

    def __init__(self, peak_of: Callable[[_Replay, int | None], int | None]) -> None:
        self.__wrapped__ = peak_of
        update_wrapper(self, peak_of)
        self._peaks = lru_cache(maxsize=1024)(_no_peaks)

    def __call__(self, replay: _Replay, capacity: int | None = None) -> int | None:
        known, most = self._peaks(replay), inf if capacity is None else capacity
        for replayed, peak in known:
            if replayed == most or (peak is not None and peak <= most < replayed):
                return peak
        peak = self.__wrapped__(replay, capacity)
        known.append((most, peak))
        return peak

    def cache_clear(self) -> None:
        """Forget all peaks."""
        self._peaks.cache_clear()


def _no_peaks(_: object) -> list[tuple[float, int | None]]:
    return []
