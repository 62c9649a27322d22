"""One replay for the capacities of many cards."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache, update_wrapper
from math import inf
from typing import Generic, TypeVar

from memplan.core.records import NamedTuple
from memplan.engine.allocator import Allocator

_Replay = TypeVar("_Replay", bound=Hashable)


class ReservedPeak(NamedTuple):
    """The most bytes that a replay reserved, None if it ran out of memory, on every capacity from `least` to `below`.

    The allocator looks at the capacity only when it would reserve more. So a replay goes alike on all capacities
    that hold what it reserved, and not the least of what it was refused.
    """

    bytes: int | None
    least: int
    below: float

    @classmethod
    def of(cls, allocators: Sequence[Allocator], survived: bool) -> ReservedPeak:
        """Return the peak of a replay on these allocators, one for each process, of which the last may have failed."""
        least = max(a.peak_reserved for a in allocators)
        return cls(least if survived else None, least, min(a.refused or inf for a in allocators))

    def plus(self, more: int) -> ReservedPeak:
        """Return the peak with `more` bytes in addition to what was replayed."""
        return ReservedPeak(None if self.bytes is None else self.bytes + more, self.least + more, self.below + more)


class by_capacity(Generic[_Replay]):  # noqa: N801 (a decorator)
    """Decorate a replay, given its inputs and a capacity, so that one with another capacity is answered by an earlier
    one that went alike. The peaks of the last 1,024 replays are kept."""

    def __init__(self, peak_of: Callable[[_Replay, int | None], ReservedPeak]) -> None:
        self.__wrapped__ = peak_of
        update_wrapper(self, peak_of)
        self._peaks = lru_cache(maxsize=1024)(_no_peaks)

    def __call__(self, replay: _Replay, capacity: int | None = None) -> int | None:
        """Return the peak's bytes, or None if the replay runs out of memory."""
        return self.peak(replay, capacity).bytes

    def peak(self, replay: _Replay, capacity: int | None) -> ReservedPeak:
        """Return the peak, and the capacities that have it."""
        known, most = self._peaks(replay), inf if capacity is None else capacity
        for peak in known:
            if peak.least <= most < peak.below or peak.below == most == inf:
                return peak
        known.append(self.__wrapped__(replay, capacity))
        return known[-1]

    def within(self, replay: _Replay, most: int) -> int | None:
        """Return the peak with room to spare, or None if it is more than `most`, after one replay at most."""
        known = self._peaks(replay)
        found = next((peak for peak in known if peak.below > most), None) or self.peak(replay, most)
        return found.bytes if found.below == inf and found.least <= most else None

    def cache_clear(self) -> None:
        """Forget all peaks."""
        self._peaks.cache_clear()


def _no_peaks(_: object) -> list[ReservedPeak]:
    return []
