"""Events with their sizes: recorded once per structure, and replayed at any sizes of a run's axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memplan.core.cached_property import cached_property
from memplan.engine.allocator import Allocator
from memplan.engine.events import FREED, RELEASED, Events
from memplan.engine.record import AllocationTrace
from memplan.engine.storages import COMPUTING, LENT
from memplan.engine.walk import ONE, Variable, size, values

SizeInRun = tuple[Variable, int]  # as `memplan.engine.walk.size` returns it


class KeySizes:
    """The sizes of keys, as multiples of variables that depend on the run."""

    def __init__(self, sizes: Sequence[SizeInRun]) -> None:
        self._variables = sorted({variable for variable, _ in sizes})
        self._places = [(self._variables.index(variable), multiple) for variable, multiple in sizes]

    def in_run(self, axes: Mapping[str, int]) -> list[int]:
        """Return the bytes of every key."""
        numbers = values(self._variables, axes)
        return [numbers[i] * multiple for i, multiple in self._places]


class SizedEvents(Events):
    """Events whose sizes may depend on the run. None are appended once they have been replayed.

    phases  where each phase begins: the index of its first span, its name, and the step
    passes  the first of each recorded pass's numbers, and its recording
    """

    def __init__(self) -> None:
        super().__init__()
        self.phases: list[tuple[int, str, int]] = []
        self.passes: dict[int, AllocationTrace] = {}
        self._keys: dict[tuple[int | SizeInRun, int], int] = {}  # by size and stream
        self._stored: dict[AllocationTrace, int] = {}  # index of its first event

    def enter(self, phase: str, step: int = 0) -> None:
        """Begin a phase: events appended from here on are its own."""
        self.phases.append((len(self.spans) // 4, phase, step))
        self._is_open = False

    def alloc(self, size: int | SizeInRun, stream: int = COMPUTING) -> int:
        """Append an allocation, and return the number of its storage."""
        number = self.take_numbers(1)
        self.append(number, self.key(size, stream))
        return number

    def alloc_copies(self, size: int | SizeInRun, copies: int, stream: int = COMPUTING) -> range:
        """Append allocations of equal storages, and return their numbers."""
        first = self.take_numbers(copies)
        numbers = range(first, first + copies)
        self.extend(numbers, [self.key(size, stream)] * copies)
        return numbers

    def free(self, numbers: list[int]) -> None:
        """Append the frees of these storages, from the last to the first, and empty the list."""
        self.extend(numbers[::-1], [FREED] * len(numbers))
        numbers.clear()

    def append_part(self, trace: AllocationTrace, part: range, numbers: int, axes: Mapping[str, int]) -> None:
        """Append a part of a trace.

        numbers  the first of its storages' numbers here
        axes     sizes of the model's axes
        """
        self.passes[numbers] = trace
        if trace not in self._stored:
            keys = self.keys_of(trace, axes)
            self._stored[trace] = self.store(trace.numbers, [keys[key] for key in trace.keys])
        start = self._stored[trace]
        spans = trace.spans[4 * part.start : 4 * part.stop]
        for i in range(0, len(spans), 4):
            spans[i] += start
            spans[i + 2] += numbers
        self.append_span(spans)

    def keys_of(self, trace: AllocationTrace, axes: Mapping[str, int]) -> list[int]:
        """Return the keys that a trace's keys have here, then RELEASED and FREED, which are indices from the end."""
        sizes = [size(shape, dtype, axes) for shape, dtype, *_ in trace.sizes]
        return [*map(self.key, sizes, [stream % LENT for stream in trace.streams]), RELEASED, FREED]

    def replay(self, allocator: Allocator, axes: Mapping[str, int]) -> None:
        """Replay the events, none of whose storages is live yet."""
        allocator.replay(self, self.bytes_of_keys(axes), allocator.live_blocks(self.storages))

    def bytes_of_keys(self, axes: Mapping[str, int]) -> list[int]:
        """Return the bytes of every key."""
        return self._sizes.in_run(axes)

    @cached_property
    def _sizes(self) -> KeySizes:
        return KeySizes([(ONE, size) if isinstance(size, int) else size for size, _ in self._keys])

    def key(self, size: int | SizeInRun, stream: int = COMPUTING) -> int:
        """Return the key of a size and stream."""
        key = self._keys.setdefault((size, stream), len(self._keys))
        if key == len(self.streams):
            self.streams.append(stream)
        return key
