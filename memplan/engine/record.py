"""Recording the allocations and frees of a pass in order, for the model of the allocator. Structure only: no sizes.

Of a run of equal blocks only a few copies are run: the first, the last, and one in between whose events stand for all
the others. Likewise one iteration stands for a loop over experts that keep nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from copy import copy as copied
from functools import lru_cache
from itertools import accumulate, compress, count, pairwise
from operator import add, itemgetter
from types import MappingProxyType

from memplan.core.cached_property import cached_property
from memplan.core.ir import Division, Op, Stack, Tensor
from memplan.core.records import NamedTuple
from memplan.engine.events import FREED, Event, Events, EventSpan
from memplan.engine.frames import Frame
from memplan.engine.gather import Gatherer
from memplan.engine.moments import Counts, Moment
from memplan.engine.repeats import BlockRepeat, RepeatingTape
from memplan.engine.step import PLAIN, ExecutionOptions, run_pass
from memplan.engine.storages import COMPUTING, Storage, Way

# How many copies at either end of a run are run, and how far from it a copy frees storages. If forward prefetches, the
# last copies in backward do so with a delay.
REACH, REACH_OF_PREFETCHED = 1, 3

_NAMES_OF_STREAMS = "01234"  # in the sizes of a recorder


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

    times  the axis of the number of all
    made   the numbers of the storages that it allocates
    """

    number: int
    way: Way
    skipped: int
    times: str
    made: range
    start: int
    end: int


class Recorder(RepeatingTape):
    """A tape that records every allocation and free, and no moments. No copy stands for a run of them.

    Of an allocation it notes the key, which is the storage's size here, and of a free `~number` of the storage.
    `late` are names of weights outside of blocks whose gradients are freed only when the next weight's gradient is
    there.
    """

    def __init__(
        self,
        grads_exist: bool = False,
        updates: Mapping[str, int] = MappingProxyType({}),
        late: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(grads_exist, labelled=False, updates=updates)
        self._late = late
        self._late_gradients: list[Storage] = []
        self.copies: list[_Copy] = []
        # Positions among the events:
        self.outside: list[int] = []  # backward reaches the loss, the head, and the operations before the blocks
        self.recalled = 0  # everything that the previous pass left is allocated
        self.turn = 0  # end of forward
        self.over = 0  # end of the pass
        self.storages = 0  # their number so far
        self._entered = _Copy(0, "forward", 0, "", range(0), 0, 0)

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        key = (tensor.shape, tensor.dtype, _NAMES_OF_STREAMS[self.stream])
        storage = Storage(self.sizes.setdefault(key, len(self.sizes)), fresh)
        number = storage.number = self.storages
        self.storages = number + 1
        self._changes.append(storage.size)
        self.made.append(storage)
        return storage

    @property
    def keys(self) -> list[tuple[tuple[str, ...], int]]:
        """The shape and dtype, and the stream, of each key."""
        return [((shape, dtype), int(stream)) for shape, dtype, stream in self.sizes]

    @property
    def events(self) -> list[Event]:
        """The allocations and frees."""
        numbers = count()
        return [(next(numbers), change) if change >= 0 else (~change, FREED) for change in self._changes]

    def drop(self, storage: Storage) -> None:
        refs = storage.refs = storage.refs - 1
        storage.at = len(self._changes)
        if refs < 0:
            raise self._freed_twice([*self.sizes][storage.size][:2])
        if not refs:
            self._changes.append(~storage.number)

    @property
    def _counts(self) -> Counts:
        """None: what is alive is not counted."""
        return {}

    def _runs_alike(self, frame: Frame) -> bool:
        return not self._late_gradients and super()._runs_alike(frame)

    def _run_again(self, repeat: BlockRepeat, earlier: list[Storage], layer: str) -> list[Storage]:
        first, further = self.storages, self.storages - repeat.allocated.start
        self.storages += len(repeat.allocated)
        events = [change if change >= 0 else change - further for change in repeat.events]
        self._changes += repeat.with_frees(events, repeat.frees(earlier, self._free))
        made: list[Storage] = []
        for index, size, fresh, refs in repeat.made:
            made.append(Storage(size, fresh, refs))
            made[-1].number = first + index
        return made

    def _free(self, storage: Storage) -> int:
        return ~storage.number

    def _in_sizes(self, events: list[int], own: Mapping[int, int]) -> list[int]:
        return [*map(own.get, events, events)]

    def recall(self, blocks: Iterable[tuple[str, Iterable[Op]]], run: int | None = None) -> list[dict[str, Storage]]:
        pasts = super().recall(blocks, run)
        self.recalled = len(self._changes)
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

    def _offload(self, tensor: Tensor) -> None:
        """Count no copies in host memory."""

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        if not frame.block:
            self.outside.append(len(self._changes))
        super().backward(frame, grads)

    def end_forward(self) -> None:
        super().end_forward()
        self.turn = len(self._changes)

    def end_step(self, *gradients: Storage, behind: Iterable[Storage] = ()) -> tuple[Moment, Moment]:
        while self._late_gradients:
            self.drop(self._late_gradients.pop())
        self.over = len(self._changes)
        return super().end_step(*gradients, behind=behind)

    def enter_copy(self, number: int, way: Way, skipped: int, times: str) -> None:
        made = range(self.storages, self.storages)
        self._entered = _Copy(number, way, skipped, times, made, len(self._changes), 0)

    def leave_copy(self) -> None:
        made = range(self._entered.made.start, self.storages)
        self.copies.append(self._entered._replace(made=made, end=len(self._changes)))


class _LabellingRecorder(Recorder):
    """A recorder that also notes each storage's kind, block, operation and name."""

    def __init__(self, grads_exist: bool, updates: Mapping[str, int], late: frozenset[str]) -> None:
        super().__init__(grads_exist, updates, late)
        self.labels: list[tuple[str, ...]] = []

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        self.labels.append((tensor.shape, tensor.dtype, kind, self._block, self._op.name, of + tensor.name))
        return super().alloc(tensor, kind, fresh, of)

    def _runs_alike(self, frame: Frame) -> bool:
        return False  # each storage is labelled by itself


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


class _Loop(NamedTuple):
    """Equal iterations, of `length` events each, that free everything they allocate."""

    start: int
    length: int
    times: int


class _Recorded(NamedTuple):
    """A pass of a stack in which a few copies of each run were run.

    copies    the copies that were run
    events    the allocations and frees, in one span
    cuts      positions in `events` at which its parts end
    loops     those among the events, in order
    keys      shape and dtype, and stream, of each key
    storages  number of storages
    labels    of each storage, if they were asked for
    """

    copies: tuple[_Copy, ...]
    events: Events
    cuts: tuple[int, ...]
    loops: tuple[_Loop, ...]
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
    events, copies, computing = tape.events, tuple(tape.copies), {FREED}
    computing.update(key for key, (_, stream) in enumerate(tape.keys) if stream == COMPUTING)
    ends = {0, *cuts, *[end for copy in copies for end in (copy.start, copy.end)], len(events)}
    loops = (loop for start, end in pairwise(sorted(ends)) for loop in _loops(events, start, end, computing))
    return _Recorded(copies, Events(events), cuts, tuple(loops), tape.keys, tape.storages, labels)


_DIFFERENT = 8  # more copies of a run than differ from the others
_OUTSIDE = -1  # stands for the copy that allocates a storage if none does


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
        self._of_copy = {(copy.number, copy.way): copy for copy in tape.copies}
        self._makers = [_OUTSIDE] * tape.storages  # of each storage, the index of the copy that allocates it
        for i, copy in enumerate(tape.copies):
            self._makers[copy.made.start : copy.made.stop] = [i] * len(copy.made)
        self._skipped = [*[copy.skipped for copy in tape.copies], 0]  # of each maker
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

    def _add_recorded(self, start: int, end: int, copy: _Copy | None) -> None:
        """Add the events of a copy that was run, or of the operations between copies."""
        while self._cuts and self._cuts[0] < end:
            self._add(start, self._cuts[0], copy)
            start = self._cuts.popleft()
            self._ends.append(len(self.trace.every))
        self._add(start, end, copy)

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
            added = self._add(copy.start, copy.end, copy, distance)
            if self._reach <= distance <= last:
                spans, known = added, distance

    def _add(self, start: int, end: int, copy: _Copy | None, distance: int = 0) -> list[EventSpan]:
        """Add the events between two positions, which are those of a copy or, at a `distance` from it, of one that it
        stands for. Return their spans; the iterations of a loop become one."""
        spans: list[EventSpan] = []
        for first, last, times in self._segments(start, end):
            numbers, keys = self._events_of(first, last, copy, distance)
            if keys:
                spans.append(EventSpan(self.trace.store(numbers, keys), len(keys), 0, times))
                self.trace.append_span(spans[-1])
        return spans

    def _segments(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Yield segments of the events between two positions: where each begins and ends, and its repetitions."""
        loops = self._tape.loops
        for at, length, times in loops[bisect_left(loops, start, key=itemgetter(0)) :]:
            if at >= end:
                break
            yield start, at, 1
            yield at, at + length, times
            start = at + times * length
        yield start, end, 1

    def _events_of(
        self, start: int, end: int, copy: _Copy | None, distance: int
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Return the numbers and keys of these events, at a `distance` from their copy."""
        events, step = self._tape.events, self._tape.storages
        numbers, keys = events.numbers[start:end], events.keys[start:end]
        if not self._skips:
            return numbers, keys
        makers = [*map(self._makers.__getitem__, numbers)]
        if copy is None:  # every copy's storage is freed
            more = [self._skipped[maker] if key == FREED else 0 for maker, key in zip(makers, keys, strict=True)]
            each = [(i, distance) for i, skipped in enumerate(more) for distance in range(1 + skipped)]
            return [numbers[i] + distance * step for i, distance in each], [keys[i] for i, _ in each]
        found = set(makers)
        shifts = {maker: shift for maker in found if (shift := self._shift(maker, copy, distance)) is not None}
        if len(shifts) < len(found):
            known = [*map(shifts.__contains__, makers)]
            numbers, keys, makers = ([*compress(column, known)] for column in (numbers, keys, makers))
        return [*map(add, numbers, map(shifts.__getitem__, makers))], keys

    def _shift(self, maker: int, copy: _Copy, distance: int) -> int | None:
        """Return what is added to the numbers of a copy's storages in events at a `distance` from their copy; None if
        they are not those of a copy near it, and the events of another distance leave them out."""
        if maker != _OUTSIDE and abs(away := self._tape.copies[maker].number - copy.number) <= self._reach:
            other, step = self._tape.copies[maker], self._tape.storages
            if not away:
                return distance * step
            number, further = self._run[self._position[copy.number] + distance + away]
            return self._of_copy[number, other.way].made.start + further * step - other.made.start
        return None if distance else 0


def _loops(events: Sequence[Event], start: int, end: int, computing: Container[int]) -> Iterator[_Loop]:
    """Yield the loops between two positions. `computing` are FREED and the keys of the compute stream."""
    part = events[start:end]
    following = _next_with_same_live_set(part)
    at = 0
    while at < len(part):
        length, times = following[at] - at, 1
        while length and _repeats(part, following, at + (times - 1) * length, length):
            times += 1
        body = part[at : at + length] if times > 1 else ()
        if body and all(key in computing for _, key in body) and _frees_what_it_allocates(body):
            yield _Loop(start + at, length, times)
            at += times * length
        else:
            at += 1


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
