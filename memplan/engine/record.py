"""Recording the allocations and frees of a pass in order, for the model of the allocator. Structure only: no sizes.

Of a run of equal blocks three copies are run: the first, the last, and one in between whose events stand for all the
others. Likewise one iteration stands for a loop over experts that keep nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from memplan.core.ir import Division, Op, Stack, Tensor
from memplan.engine.allocator import FREED, Event
from memplan.engine.gather import Gatherer
from memplan.engine.moments import Moment
from memplan.engine.step import PLAIN, ExecutionOptions, run_pass
from memplan.engine.storages import COMPUTING, Storage, Way
from memplan.engine.tape import Frame, Tape

RUN = 3  # copies of a run that are run: the first, the last, and one that stands for the others
_STEP = 1 << 32  # difference between the numbers of corresponding storages in consecutive skipped copies


class EventSpan(NamedTuple):
    """Consecutive events, each the number of a storage and the index of its size, or FREED.

    shift  added to every number, because equal copies have the same events with other storages
    times  number of repetitions; above 1 only for events that free everything they allocate
    """

    events: tuple[Event, ...]
    shift: int = 0
    times: int = 1


class AllocationTrace(NamedTuple):
    """The allocations and frees of a pass.

    forward   the forward pass, with the loss
    loss      the backward of the loss
    backward  the backward pass, from the head on
    end       frees of what the script and the graph's nodes held
    sizes     shape and dtype
    streams   for each size, the stream of its allocations
    """

    forward: tuple[EventSpan, ...]
    loss: tuple[EventSpan, ...]
    backward: tuple[EventSpan, ...]
    end: tuple[EventSpan, ...]
    sizes: tuple[tuple[str, ...], ...]
    streams: tuple[int, ...]

    @property
    def events(self) -> Iterator[Event]:
        """Every event, in order."""
        return unrolled((*self.forward, *self.loss, *self.backward, *self.end))

    @property
    def length(self) -> int:
        """The number of events. Repeated ones count once, because a replay rarely runs them twice."""
        return sum(len(s.events) for s in (*self.forward, *self.loss, *self.backward, *self.end))


def unrolled(stretches: Iterable[EventSpan]) -> Iterator[Event]:
    """Yield every event of the stretches, in order."""
    for events, shift, times in stretches:
        for _ in range(times):
            yield from ((number + shift, key) for number, key in events)


class _Copy(NamedTuple):
    """The events of one copy, from `start` to `end`. It is followed by `skipped` equal copies that were not run."""

    number: int
    way: Way
    skipped: int
    start: int
    end: int


class Recorder(Tape):
    """A tape that records every allocation and free, and no moments.

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
        self._kinds: dict[tuple[int, int], int] = {}  # (size, stream) -> index
        self._entered = _Copy(0, "forward", 0, 0, 0)

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        storage = super().alloc(tensor, kind, fresh, of)
        storage.number = self._storages
        self._storages += 1
        key = self._kinds.setdefault((storage.size, self.stream), len(self._kinds))
        self.events.append((storage.number, key))
        return storage

    def recorded(self, *parts: Sequence[EventSpan]) -> AllocationTrace:
        """Return the pass from its four parts, see `AllocationTrace`."""
        keys = list(self.sizes)
        sizes, streams = zip(*((keys[size], stream) for size, stream in self._kinds), strict=True)
        forward, loss, backward, end = map(tuple, parts)
        return AllocationTrace(forward, loss, backward, end, sizes, streams)

    def computes(self, events: Iterable[Event]) -> bool:
        """Whether the events allocate only on the compute stream."""
        streams = [stream for _, stream in self._kinds]
        return all(size == FREED or streams[size] == COMPUTING for _, size in events)

    def drop(self, storage: Storage) -> None:
        super().drop(storage)
        if not storage.refs:
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

    def end_step(self, *gradients: Storage) -> tuple[Moment, Moment]:
        while self._late_gradients:
            self.drop(self._late_gradients.pop())
        self.over = len(self.events)
        return super().end_step(*gradients)

    def enter_copy(self, number: int, way: Way, skipped: int) -> None:
        self._entered = _Copy(number, way, skipped, len(self.events), 0)

    def leave_copy(self) -> None:
        self.copies.append(self._entered._replace(end=len(self.events)))


def record(
    stack: Stack,
    depth: Mapping[str, int],
    options: ExecutionOptions = PLAIN,
    *,
    grads_exist: bool = False,
    updates: Mapping[str, int] = MappingProxyType({}),
    copies: int = RUN,
    division: Division | None = None,
    late: frozenset[str] = frozenset(),
) -> AllocationTrace:
    """Return the allocations and frees of one forward and backward pass.

    The arguments are those of `lower`; `copies` is the number of copies to run of each block, `late` as in `Recorder`.
    """
    tape = Recorder(grads_exist, updates, late)
    gatherer = Gatherer(tape, division._replace(sums=False) if division else None, grads_exist)
    run_pass(tape, gatherer, stack, depth, options, one_by_one=copies)
    return tape.recorded(*_Expansion(tape, tape.turn, tape.outside[1], tape.over).parts)


def record_inference(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    division: Division | None = None,
    casts: str = "",
    copies: int = RUN,
) -> AllocationTrace:
    """Return the allocations and frees of a forward pass without autograd.

    They begin with the allocations of what the previous pass left, and what this pass leaves is not freed. `division`
    and `casts` are those of `infer`.
    """
    tape = Recorder()
    gatherer = Gatherer(tape, division, grads_exist=False)
    run_pass(tape, gatherer, stack, depth, ExecutionOptions(autocast), one_by_one=copies, records=False, casts=casts)
    recalled, others = _Expansion(tape, tape.recalled).parts
    return tape.recorded((*recalled, *others), (), (), ())


class _Expansion:
    """The events of all copies, including those that were not run, in parts that begin at the `cuts`.

    A storage is identified by its copy and its index there, so every equal copy has a storage corresponding to it. A
    skipped copy has the events of the copy that stands for it, with the corresponding storages.
    """

    def __init__(self, tape: Recorder, *cuts: int) -> None:
        self.parts: list[list[EventSpan]] = [[]]
        self._tape = tape
        self._cuts = deque(cuts)
        self._allocated: dict[tuple[int, Way], list[int]] = {}
        self._origin: dict[int, tuple[_Copy, int]] = {}  # storage -> its copy, and its index there
        for copy in tape.copies:
            allocated = [number for number, size in tape.events[copy.start : copy.end] if size != FREED]
            self._allocated[copy.number, copy.way] = allocated
            self._origin.update((number, (copy, index)) for index, number in enumerate(allocated))
        at = 0
        for copy in tape.copies:
            self._add_recorded(at, copy.start, None)
            if copy.way == "backward":  # in backward the skipped copies come first
                self._add_skipped(copy, range(copy.skipped, 0, -1))
            self._add_recorded(copy.start, copy.end, copy)
            if copy.way != "backward":
                self._add_skipped(copy, range(1, copy.skipped + 1))
            at = copy.end
        self._add_recorded(at, len(tape.events), None)
        self.parts += ([] for _ in self._cuts)

    def _add_recorded(self, start: int, end: int, copy: _Copy | None) -> None:
        """Add the events of a copy that was run, or of the operations between copies."""
        events: list[Event] = []
        for at in range(start, end):
            while self._cuts and at == self._cuts[0]:
                self.parts[-1] += stretches(events, self._tape)
                self.parts.append([])
                self._cuts.popleft()
                events = []
            number, size = self._tape.events[at]
            if size != FREED or number not in self._origin:
                events.append((number, size))
            elif copy is None:  # every copy's storage is freed
                origin, _ = self._origin[number]
                events += [(number + i * _STEP, FREED) for i in range(origin.skipped + 1)]
            else:
                events.append((self._freed_by(copy, number), FREED))
        self.parts[-1] += stretches(events, self._tape)

    def _freed_by(self, copy: _Copy, number: int) -> int:
        """Return the number of the storage that a copy frees, which may belong to a skipped copy next to it."""
        origin, index = self._origin[number]
        if origin.way == "forward" and origin.number == copy.number - 1:
            return number + origin.skipped * _STEP
        if origin.way == "backward" and origin.number == copy.number + 1 and copy.skipped:
            return self._allocated[copy.number, copy.way][index] + _STEP
        return number

    def _add_skipped(self, copy: _Copy, order: Iterable[int]) -> None:
        """Add the events of the skipped copies that this one stands for; `order` has their distances from it."""
        if not copy.skipped:
            return
        events: list[Event] = []
        farthest: list[Event] = []  # of the last skipped copy, whose other neighbour was run
        for number, size in self._tape.events[copy.start : copy.end]:
            origin, index = self._origin.get(number, (None, 0))
            if size != FREED or (origin and origin.number == copy.number):
                usual_number = farthest_number = number
            elif origin and origin.way == "forward" and origin.number == copy.number - 1:
                usual_number = farthest_number = self._allocated[copy.number, "forward"][index] - _STEP
            elif origin and origin.way == "backward" and origin.number == copy.number + 1:
                usual_number = self._allocated[copy.number, copy.way][index] + _STEP
                farthest_number = number - copy.skipped * _STEP
            else:
                continue
            events.append((usual_number, size))
            farthest.append((farthest_number, size))
        usual, last = stretches(events, self._tape), stretches(farthest, self._tape)
        for distance in order:
            shift = distance * _STEP
            self.parts[-1] += (s._replace(shift=shift) for s in (last if distance == copy.skipped else usual))


def stretches(events: Sequence[Event], tape: Recorder) -> list[EventSpan]:
    """Return the events as stretches. Equal iterations that free everything they allocate become one stretch."""
    out: list[EventSpan] = []
    following = _next_with_same_live_set(events)
    at = start = 0
    while at < len(events):
        length, times = following[at] - at, 1
        while length and _repeats(events, following, at + (times - 1) * length, length):
            times += 1
        body = tuple(events[at : at + length]) if times > 1 else ()
        if body and tape.computes(body) and _frees_what_it_allocates(body):
            out += [EventSpan(tuple(events[start:at])), EventSpan(body, times=times)]
            start = at = at + times * length
        else:
            at += 1
    return [stretch for stretch in (*out, EventSpan(tuple(events[start:]))) if stretch.events]


def _next_with_same_live_set(events: Sequence[Event]) -> list[int]:
    """Return, for each position between events, the next one with the same live storages; itself if there is none.

    The XOR of their hashes identifies the live storages: every event adds or removes one.
    """
    alive: list[int] = [0]
    for number, _ in events:
        alive.append(alive[-1] ^ hash((number,)))
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
