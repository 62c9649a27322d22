"""Allocations and frees in order, of storages with numbers, to be replayed with any sizes.

Equal copies of a layer allocate and free alike, so their events are stored once, for several spans that differ in the
numbers of their storages.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from struct import pack

from memplan.core.records import NamedTuple

FREED, RELEASED = -1, -2  # in place of an event's key: the storage is freed; free segments go back to the driver
Event = tuple[int, int]  # the number of a storage, and the key of its size, or FREED or RELEASED


def packed(numbers: Sequence[int]) -> array[int]:
    """Return the numbers as an array, in a quarter of the time that its constructor and methods take."""
    if isinstance(numbers, array):
        return numbers
    out = array("i")
    out.frombytes(pack(f"{len(numbers)}i", *numbers))
    return out


class EventSpan(NamedTuple):
    """Consecutive events.

    first   index of the first of them
    length  number of events
    shift   added to the numbers of their storages
    times   number of repetitions; above 1 only for events that free everything they allocate
    """

    first: int
    length: int
    shift: int = 0
    times: int = 1


class Events:
    """Allocations and frees in order. The key of a size is its index in the list of sizes that a replay is given.

    numbers   of each stored event, its storage
    keys      of each stored event, the key of its size, or FREED or RELEASED
    spans     the four numbers of each `EventSpan` of stored events, in the order in which they are replayed
    streams   of each key, the stream of its allocations
    storages  the highest number of a storage, plus one
    """

    def __init__(self, events: Iterable[Event] = (), streams: Iterable[int] = (), storages: int = 0) -> None:
        self.numbers, self.keys, self.spans = array("i"), array("i"), array("q")
        self.streams, self.storages = array("i", streams), storages
        self._is_open = False  # the last span ends with an event that was appended by itself
        pairs = list(events)
        self.extend([number for number, _ in pairs], [key for _, key in pairs])

    def equals(self, other: Events) -> bool:
        """Return whether the other events are the same."""
        mine, others = ((e.storages, e.spans, e.numbers, e.keys) for e in (self, other))
        return mine == others

    def append(self, number: int, key: int) -> None:
        """Append one event."""
        if self._is_open:
            self.spans[-3] += 1
        else:
            self.append_span(EventSpan(len(self.numbers), 1))
            self._is_open = True
        self.numbers.append(number)
        self.keys.append(key)

    def extend(self, numbers: Sequence[int], keys: Sequence[int]) -> None:
        """Append several events."""
        if not numbers:
            return
        if not self._is_open:
            self.append_span(EventSpan(len(self.numbers), 0))
            self._is_open = True
        self.spans[-3] += len(numbers)
        self.store(numbers, keys)

    def store(self, numbers: Sequence[int], keys: Sequence[int]) -> int:
        """Store events for spans, and return the index of the first."""
        first = len(self.numbers)
        self.numbers.extend(packed(numbers))
        self.keys.extend(packed(keys))
        return first

    def append_span(self, span: Iterable[int]) -> None:
        """Append a span of stored events, or the numbers of several."""
        self.spans.extend(span)
        self._is_open = False

    def take_numbers(self, count: int) -> int:
        """Return the first of `count` consecutive numbers, which no other storage gets."""
        self.storages += count
        return self.storages - count

    @property
    def every(self) -> range:
        """The indices of all spans."""
        return range(len(self.spans) // 4)

    def spans_of(self, part: range) -> Iterator[EventSpan]:
        """Yield the spans with these indices."""
        return (EventSpan(*self.spans[4 * i : 4 * i + 4]) for i in part)

    def of(self, span: EventSpan) -> list[Event]:
        """Return the events of one repetition of a span."""
        first, length, shift, _ = span
        numbers: Iterable[int] = self.numbers[first : first + length]
        if shift:
            numbers = [number + shift for number in numbers]
        return [*zip(numbers, self.keys[first : first + length], strict=True)]

    def unrolled(self, part: range | None = None) -> Iterator[Event]:
        """Yield every event, or every event of the spans with these indices."""
        for span in self.spans_of(self.every if part is None else part):
            for _ in range(span.times):
                yield from self.of(span)
