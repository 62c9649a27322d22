"""Recording the allocations and frees of a pass in order, for the model of the allocator. Structure only: no sizes.

Of a run of equal blocks only a few copies are run: the first, the last, and one in between whose events stand for all
the others. Likewise one iteration stands for a loop over experts that keep nothing.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from copy import copy as copied
from functools import lru_cache
from itertools import accumulate
from types import MappingProxyType

from memplan.core.cached_property import cached_property
from memplan.core.ir import Division, Op, Stack, Tensor
from memplan.core.records import NamedTuple
from memplan.engine.events import FREED, Event, Events, EventSpan
from memplan.engine.frames import Frame
from memplan.engine.gather import Gatherer
from memplan.engine.moments import Moment
from memplan.engine.step import PLAIN, ExecutionOptions, run_pass
from memplan.engine.storages import COMPUTING, Storage, Way
from memplan.engine.tape import Tape

# How many copies at either end of a run are run, and how far from it a copy frees storages. If forward prefetches, the
# last copies in backward do so with a delay.
REACH, REACH_OF_PREFETCHED = 1, 3


class AllocationTrace(Events):
    """The allocations and frees of a pass.

    sizes     shape and dtype of each key
    forward   the spans of the forward pass, with the loss
    loss      those of the backward of the loss
    backward  those of the backward pass, from the head on
    end       frees of what the script and the graph's nodes held
    labels    shape, dtype, kind, block, operation and name of each storage that was recorded, if asked for; a number,
              modulo their number, is an index
    """

    labels: tuple[tuple[str, ...], ...] = ()

    def __init__(
        self,
        sizes: tuple[tuple[str, ...], ...],
        streams: Iterable[int],
        storages: int,
        events: Iterable[Event] = (),
    ) -> None:
        super().__init__(events, streams, storages)
        self.sizes = sizes
        self.cut()

    def cut(self, *spans: int) -> None:
        """Divide the trace into its parts, given the numbers of spans before each but the first."""
        ends = [*spans, *(len(self.every),) * (4 - len(spans))]
        self.forward, self.loss, self.backward, self.end = map(range, (0, *ends), ends)

    def with_sizes(self, sizes: tuple[tuple[str, ...], ...]) -> AllocationTrace:
        """Return the same events with other shapes and dtypes."""
        other = copied(self)
        other.sizes = sizes
        return other

    @property
    def length(self) -> int:
        """The number of events. Repeated ones count once, because a replay rarely runs them twice."""
        return sum(self.spans[1::4])

    @cached_property
    def left(self) -> tuple[Event, ...]:
        """The allocations that the pass does not free, in order."""
        alive: dict[int, int] = {}
        changes: dict[tuple[int, int], tuple[list[Event], list[int]]] = {}
        for first, length, shift, times in self.spans_of(self.every):
            if times > 1:
                continue
            if (first, length) not in changes:
                changes[first, length] = _changes(self.of(EventSpan(first, length)))
            allocated, freed = changes[first, length]
            alive.update((number + shift, key) for number, key in allocated)
            for number in freed:
                del alive[number + shift]
        return tuple(alive.items())


def _changes(events: Iterable[Event]) -> tuple[list[Event], list[int]]:
    """Return the allocations that the events do not free, and the storages of earlier events that they free."""
    alive: dict[int, int] = {}
    freed: list[int] = []
    for number, key in events:
        if key != FREED:
            alive[number] = key
        elif alive.pop(number, None) is None:
            freed.append(number)
    return [*alive.items()], freed


class _Copy(NamedTuple):
    """The events of one copy, from `start` to `end`. It is followed by `skipped` equal copies that were not run.

    `times` is the axis of the number of all.
    """

    number: int
    way: Way
    skipped: int
    times: str
    start: int
    end: int


class Recorder(Tape):
    """A tape that records every allocation and free, and no moments. No copy stands for a run of them.

    `late` are names of weights outside of blocks whose gradients are freed only when the next weight's gradient is
    there.
    """

    def __init__(
        self,
        grads_exist: bool = False,
        updates: Mapping[str, int] = MappingProxyType({}),
        late: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(grads_exist, updates=updates)
        self._late = late
        self._late_gradients: list[Storage] = []
        self.events: list[tuple[int, int]] = []
        self.copies: list[_Copy] = []
        # Positions in `events`:
        self.outside: list[int] = []  # backward reaches the loss, the head, and the operations before the blocks
        self.recalled = 0  # everything that the previous pass left is allocated
        self.turn = 0  # end of forward
        self.over = 0  # end of the pass
        self._storages = 0
        self._keys: dict[tuple[str, str, int], int] = {}  # shape, dtype and stream -> index, a storage's size here
        self._entered = _Copy(0, "forward", 0, "", 0, 0)

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        key = (tensor.shape, tensor.dtype, self.stream)
        storage = Storage(self._keys.setdefault(key, len(self._keys)), fresh)
        number = storage.number = self._storages
        self._storages = number + 1
        self.events.append((number, storage.size))
        return storage

    @property
    def keys(self) -> list[tuple[tuple[str, ...], int]]:
        """The shape and dtype, and the stream, of each key."""
        return [((shape, dtype), stream) for shape, dtype, stream in self._keys]

    @property
    def storages(self) -> int:
        """The number of storages so far."""
        return self._storages

    def drop(self, storage: Storage) -> None:
        refs = storage.refs = storage.refs - 1
        if refs < 0:
            raise self._freed_twice([*self._keys][storage.size][:2])
        if not refs:
            self.events.append((storage.number, FREED))

    def recall(self, blocks: Iterable[tuple[str, Iterable[Op]]], run: int | None = None) -> list[dict[str, Storage]]:
        pasts = super().recall(blocks, run)
        self.recalled = len(self.events)
        return pasts

    def _weight_gradient(self, frame: Frame, name: str, storage: Storage) -> None:
        previous, self._late_gradients = self._late_gradients, []
        if not frame.block and name in self._late:
            storage.refs += 1
            self._late_gradients = [storage]
        super()._weight_gradient(frame, name, storage)
        for gradient in previous:
            self.drop(gradient)

    def note(self) -> None:
        """Record no moments."""

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        if not frame.block:
            self.outside.append(len(self.events))
        super().backward(frame, grads)

    def end_forward(self) -> None:
        super().end_forward()
        self.turn = len(self.events)

    def end_step(self, *gradients: Storage, behind: Iterable[Storage] = ()) -> tuple[Moment, Moment]:
        while self._late_gradients:
            self.drop(self._late_gradients.pop())
        self.over = len(self.events)
        return super().end_step(*gradients, behind=behind)

    def enter_copy(self, number: int, way: Way, skipped: int, times: str) -> None:
        self._entered = _Copy(number, way, skipped, times, len(self.events), 0)

    def leave_copy(self) -> None:
        self.copies.append(self._entered._replace(end=len(self.events)))


class _LabellingRecorder(Recorder):
    """A recorder that also notes each storage's kind, block, operation and name."""

    def __init__(self, grads_exist: bool, updates: Mapping[str, int], late: frozenset[str]) -> None:
        super().__init__(grads_exist, updates, late)
        self.labels: list[tuple[str, ...]] = []

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        self.labels.append((tensor.shape, tensor.dtype, kind, self._block, self._op.name, of + tensor.name))
        return super().alloc(tensor, kind, fresh, of)


def record(
    stack: Stack,
    depth: Mapping[str, int],
    options: ExecutionOptions = PLAIN,
    *,
    grads_exist: bool = False,
    updates: Mapping[str, int] = MappingProxyType({}),
    division: Division | None = None,
    late: frozenset[str] = frozenset(),
    reach: int | None = None,
    labelled: bool = False,
) -> AllocationTrace:
    """Return the allocations and frees of one forward and backward pass.

    The arguments are those of `lower`; `late` is as in `Recorder`, and `reach` how many copies are run at either end.
    """
    reach = reach or (REACH_OF_PREFETCHED if division and division.prefetches_forward else REACH)
    division = division._replace(sums=False) if division else None
    flags = _Flags(grads_exist, tuple(updates.items()), division, late, labelled=labelled)
    return _expanded(stack, depth, reach, options, flags).trace


def record_inference(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    division: Division | None = None,
    casts: str = "",
    reach: int = REACH,
) -> AllocationTrace:
    """Return the allocations and frees of a forward pass without autograd, all on the compute stream.

    They begin with the allocations of what the previous pass left, and what this pass leaves is not freed. `division`
    and `casts` are those of `infer`.
    """
    flags = _Flags(False, (), division, frozenset(), records=False, casts=casts)
    trace = _expanded(stack, depth, reach, ExecutionOptions(autocast), flags).trace
    trace.streams = array("i", (COMPUTING,)) * len(trace.sizes)
    return trace


class _Flags(NamedTuple):
    """How a pass is recorded: arguments of `record` and of `record_inference`; `records` if autograd does."""

    grads_exist: bool
    updates: tuple[tuple[str, int], ...]
    division: Division | None
    late: frozenset[str]
    records: bool = True
    casts: str = ""
    labelled: bool = False


class _Recorded(NamedTuple):
    """A pass of a stack in which a few copies of each run were run.

    copies    the copies that were run
    events    the allocations and frees, in one span
    cuts      positions in `events` at which its parts end
    keys      shape and dtype, and stream, of each key
    storages  number of storages
    labels    of each storage, if they were asked for
    """

    copies: tuple[_Copy, ...]
    events: Events
    cuts: tuple[int, ...]
    keys: list[tuple[tuple[str, ...], int]]
    storages: int
    labels: tuple[tuple[str, ...], ...]


@lru_cache(maxsize=16)
def _recorded(
    stack: Stack, depth: tuple[tuple[str, int], ...], one_by_one: int, options: ExecutionOptions, flags: _Flags
) -> _Recorded:
    kind = _LabellingRecorder if flags.labelled else Recorder
    tape = kind(flags.grads_exist, dict(flags.updates), flags.late)
    gatherer = Gatherer(tape, flags.division, flags.grads_exist)
    records, casts = flags.records, flags.casts
    run_pass(tape, gatherer, stack, dict(depth), options, one_by_one=one_by_one, records=records, casts=casts)
    cuts = (tape.turn, tape.outside[1], tape.over) if records else ()
    labels = tuple(tape.labels) if isinstance(tape, _LabellingRecorder) else ()
    return _Recorded(tuple(tape.copies), Events(tape.events), cuts, tape.keys, tape.storages, labels)


_DIFFERENT = 8  # more copies of a run than differ from the others


def _expanded(
    stack: Stack, depth: Mapping[str, int], reach: int, options: ExecutionOptions, flags: _Flags
) -> _Expansion:
    """Return the events of a pass, whose recording models share that differ only in the number of layers."""
    one_by_one = 2 * reach + 1
    few = {axis: min(n, one_by_one + _DIFFERENT) for axis, n in depth.items()}
    recorded = _recorded(stack, tuple(few.items()), one_by_one, options, flags)
    deeper = {axis: n - few[axis] for axis, n in depth.items() if n > few[axis]}
    if not deeper.keys() <= {copy.times for copy in recorded.copies if copy.skipped}:
        recorded, deeper = _recorded(stack, tuple(depth.items()), one_by_one, options, flags), {}
    copies = (c._replace(skipped=c.skipped + deeper.get(c.times, 0)) if c.skipped else c for c in recorded.copies)
    return _Expansion(recorded._replace(copies=tuple(copies)), reach)


class _Expansion:
    """The events of all copies, including those that were not run, in parts that begin at the `cuts`.

    A storage is identified by its copy and its index there, so every equal copy has a storage corresponding to it. A
    skipped copy has the events of the copy that stands for it, with the corresponding storages: if that one frees a
    storage of the copy before it, so do the skipped ones.
    """

    def __init__(self, tape: _Recorded, reach: int) -> None:
        self._tape, self._reach = tape, reach
        self._cuts = deque(tape.cuts)
        self._allocated: dict[tuple[int, Way], list[int]] = {}
        self._origin: dict[int, tuple[_Copy, int]] = {}  # storage -> its copy, and its index there
        for copy in tape.copies:
            allocated = [number for number, key in self._between(copy.start, copy.end) if key != FREED]
            self._allocated[copy.number, copy.way] = allocated
            self._origin.update((number, (copy, index)) for index, number in enumerate(allocated))
        skipped = {copy.number: copy.skipped for copy in tape.copies}
        self._skips = any(skipped.values())
        positions = accumulate((1 + skipped[number] for number in range(len(skipped))), initial=0)
        self._run = [(number, i) for number in range(len(skipped)) for i in range(1 + skipped[number])]
        self._position = [*positions]  # of each copy that was run, among all copies
        sizes, streams = zip(*tape.keys, strict=True)
        self.trace = AllocationTrace(sizes, streams, tape.storages * (1 + max(skipped.values(), default=0)))
        self.trace.labels = tape.labels
        self._ends: list[int] = []  # spans before each cut
        at = 0
        for copy in tape.copies:
            self._add_recorded(at, copy.start, None)
            if copy.way == "backward":  # in backward the skipped copies come first
                self._add_skipped(copy, range(copy.skipped, 0, -1))
            self._add_recorded(copy.start, copy.end, copy)
            if copy.way != "backward":
                self._add_skipped(copy, range(1, copy.skipped + 1))
            at = copy.end
        self._add_recorded(at, len(tape.events.keys), None)
        self.trace.cut(*self._ends, *(len(self.trace.every) for _ in self._cuts))

    def _between(self, start: int, end: int) -> list[Event]:
        return self._tape.events.of(EventSpan(start, end - start))

    def _add_recorded(self, start: int, end: int, copy: _Copy | None) -> None:
        """Add the events of a copy that was run, or of the operations between copies."""
        while self._cuts and self._cuts[0] < end:
            self._add_part(start, self._cuts[0], copy)
            start = self._cuts.popleft()
            self._ends.append(len(self.trace.every))
        self._add_part(start, end, copy)

    def _add_part(self, start: int, end: int, copy: _Copy | None) -> None:
        if copy is not None:
            events = self._events_of(copy, start, end)
        else:  # every copy's storage is freed
            step = self._tape.storages
            events = [
                (number + i * step, key)
                for number, key in self._between(start, end)
                for i in range(1 + (self._origin[number][0].skipped if number in self._origin and key == FREED else 0))
            ]
        self._store(events)

    def _events_of(self, copy: _Copy, start: int, end: int, distance: int = 0) -> list[Event]:
        """Return the events of a copy or, at a `distance` from it, of one that it stands for."""
        if not self._skips:
            return self._between(start, end)
        shift = distance * self._tape.storages
        events: list[Event] = []
        for number, key in self._between(start, end):
            origin, index = self._origin.get(number, (None, 0))
            if origin is not None and origin.number == copy.number:
                events.append((number + shift, key))
            elif origin is not None and abs(origin.number - copy.number) <= self._reach:
                position = self._position[copy.number] + distance + origin.number - copy.number
                other, further = self._run[position]
                allocated = self._allocated[other, origin.way]
                events.append((allocated[index] + further * self._tape.storages, key))
            elif not distance:
                events.append((number, key))
        return events

    def _add_skipped(self, copy: _Copy, distances: range) -> None:
        """Add the events of the skipped copies that this one stands for, given their distances from it."""
        step = self._tape.storages
        last = copy.skipped - (self._reach if copy.way == "backward" else 0)
        spans: list[EventSpan] = []  # of the first whose neighbours are all skipped, too
        known = 0  # its distance
        for distance in distances:
            if spans and self._reach <= distance <= last:
                for span in spans:
                    self.trace.append_span(span._replace(shift=(distance - known) * step))
                continue
            stored = self._store(self._events_of(copy, copy.start, copy.end, distance))
            if self._reach <= distance <= last:
                spans, known = stored, distance

    def _store(self, events: Sequence[Event]) -> list[EventSpan]:
        """Append events, and return their spans. Equal iterations that free everything they allocate become one."""
        spans: list[EventSpan] = []
        following = _next_with_same_live_set(events)
        at = start = 0
        while at < len(events):
            length, times = following[at] - at, 1
            while length and _repeats(events, following, at + (times - 1) * length, length):
                times += 1
            body = events[at : at + length] if times > 1 else ()
            if body and self._computes(body) and _frees_what_it_allocates(body):
                spans += [self._append(events[start:at]), self._append(body, times)]
                start = at = at + times * length
            else:
                at += 1
        return [*spans, self._append(events[start:])]

    def _append(self, events: Sequence[Event], times: int = 1) -> EventSpan:
        first = self.trace.store([number for number, _ in events], [key for _, key in events])
        span = EventSpan(first, len(events), 0, times)
        self.trace.append_span(span)
        return span

    def _computes(self, events: Iterable[Event]) -> bool:
        """Whether the events allocate only on the compute stream."""
        return all(key == FREED or self.trace.streams[key] == COMPUTING for _, key in events)


def _next_with_same_live_set(events: Sequence[Event]) -> list[int]:
    """Return, for each position between events, the next one with the same live storages; itself if there is none.

    The XOR of their hashes identifies the live storages: every event adds or removes one.
    """
    alive = [*accumulate([hash((number,)) for number, _ in events], int.__xor__, initial=0)]
    following = list(range(len(alive)))
    seen: dict[int, int] = {}
    for at in reversed(range(len(alive))):
        following[at] = seen.get(alive[at], at)
        seen[alive[at]] = at
    return following


def _repeats(events: Sequence[Event], following: Sequence[int], at: int, length: int) -> bool:
    """Whether the `length` events from `at` on are followed by the same events with other storages."""
    end = at + length
    if following[end] - end != length:
        return False
    later = events[end][0] - events[at][0]
    return all(
        number + later == other_number and size == other_size
        for (number, size), (other_number, other_size) in zip(events[at:end], events[end : end + length], strict=True)
    )


def _frees_what_it_allocates(events: Iterable[Event]) -> bool:
    freed = {number for number, size in events if size == FREED}
    return freed == {number for number, size in events if size != FREED}
