"""One replay for the capacities of many cards."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, update_wrapper
from math import inf
from typing import Generic, TypeVar

from memplan.core.records import NamedTuple

_Replay = TypeVar("_Replay", bound=Hashable)


class ReservedPeak(NamedTuple):
    """The most bytes that a replay reserved, None if it ran out of memory, and whether it ever filled the card."""

    bytes: int | None
    was_full: bool


OUT_OF_MEMORY = ReservedPeak(None, was_full=True)


class by_capacity(Generic[_Replay]):  # noqa: N801 (a decorator)
    """Decorate a replay, given its inputs and a capacity: it returns the peak's bytes, None if it ran out of memory.

    The allocator looks at the capacity only when it would reserve more. So a replay that never fills its card is one
    with room to spare, and a peak is that of every capacity between itself and the one that was replayed. The peaks of
    the last 1,024 replays are kept.
    """

    def __init__(self, peak_of: Callable[[_Replay, int | None], ReservedPeak]) -> None:
        self.__wrapped__ = peak_of
        update_wrapper(self, peak_of)
        self._peaks = lru_cache(maxsize=1024)(_no_peaks)

    def __call__(self, replay: _Replay, capacity: int | None = None) -> int | None:
        return self._peak(self._peaks(replay), replay, capacity)

    def _peak(self, known: list[tuple[float, int | None]], replay: _Replay, capacity: int | None) -> int | None:
        most = inf if capacity is None else capacity
        for replayed, peak in known:
            if replayed == most or (peak is not None and peak <= most < replayed):
                return peak
        found = self.__wrapped__(replay, capacity)
        known.append((most if found.was_full else inf, found.bytes))
        return found.bytes

    def within(self, replay: _Replay, most: int) -> int | None:
        """Return the peak with room to spare, or None if it is more than `most`, after one replay at most."""
        known = self._peaks(replay)
        if not any(replayed >= most for replayed, _ in known):
            self._peak(known, replay, most)
        return next((peak for replayed, peak in known if replayed == inf and peak is not None and peak <= most), None)

    def cache_clear(self) -> None:
        """Forget all peaks."""
        self._peaks.cache_clear()


def _no_peaks(_: object) -> list[tuple[float, int | None]]:
    return []
