"""Recording: a pass as the sequence of its allocations and frees, for the allocator's model. Structure only.

Of a run of equal blocks three copies are run: those at its ends and one between them. All others are like that one, so
its events stand for theirs, too. In the same way one iteration stands for a loop over experts that keep nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from memplan.core.ir import Division, Op, SavedTensors, Stack, Tensor
from memplan.engine.gather import Gatherer
from memplan.engine.lower import COMPUTING, Frame, Moment, Storage, Tape, Way
from memplan.engine.step import run_pass

FREED = -1
RUN = 3  # copies of a run that are run: its first, its last, and the one between that all others are like
_STEP = 1 << 32  # between the numbers of a storage and of its namesake in the next copy that is left out

Event = tuple[int, int]


class Stretch(NamedTuple):
    """Consecutive events: the number of a storage, and the index of its size or FREED.

    shift  added to every number: equal copies have the same events, and storages of their own
    times  how often the events are repeated: only events that free all they allocate are
    """

    events: tuple[Event, ...]
    shift: int = 0
    times: int = 1


class Recorded(NamedTuple):
    """The allocations and frees of a pass.

    forward   the forward pass, with the loss
    loss      the backward of the loss
    backward  the backward pass, from the head on
    end       frees of what the script and the graph's nodes held
    sizes     shape and dtype
    streams   the stream that each of the sizes is allocated on
    """

    forward: tuple[Stretch, ...]
    loss: tuple[Stretch, ...]
    backward: tuple[Stretch, ...]
    end: tuple[Stretch, ...]
    sizes: tuple[tuple[str, ...], ...]
    streams: tuple[int, ...]

    @property
    def events(self) -> Iterator[Event]:
        """Every event, in order."""
        return unrolled((*self.forward, *self.loss, *self.backward, *self.end))

    @property
    def length(self) -> int:
        """How many events it has; those that are repeated count once, as a replay seldom takes them twice."""
        return sum(len(s.events) for s in (*self.forward, *self.loss, *self.backward, *self.end))


def unrolled(stretches: Iterable[Stretch]) -> Iterator[Event]:
    """Every event of the stretches, in order."""
    for events, shift, times in stretches:
        for _ in range(times):
            yield from ((number + shift, key) for number, key in events)


class _Copy(NamedTuple):
    """A copy's part of a pass: the events from `start` to `end`. `skipped` equal copies after it are left out."""

    number: int
    way: Way
    skipped: int
    start: int
    end: int


class Recorder(Tape):
    """A tape that notes every allocation and free, and no moments. The gradients of weights outside of blocks that are
    `late`, by name, are let go of when the next weight's is there."""

    def __init__(
        self,
        grads_exist: bool = False,
        updates: Mapping[str, int] = MappingProxyType({}),
        late: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(grads_exist, updates=updates)
        self._late = late
        self._lasting: list[Storage] = []
        self.events: list[tuple[int, int]] = []
        self.copies: list[_Copy] = []
        self.outside: list[int] = []  # where backward comes to the loss, the head, and what is before the blocks
        self.recalled = 0  # where all that the pass before left is there
        self.turn = 0  # where forward is done
        self.over = 0  # where the pass is over
        self._storages = 0
        self._kinds: dict[tuple[int, int], int] = {}  # a size and a stream
        self._entered = _Copy(0, "forward", 0, 0, 0)

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        storage = super().alloc(tensor, kind, fresh, of)
        storage.number = self._storages
        self._storages += 1
        key = self._kinds.setdefault((storage.size, self.stream), len(self._kinds))
        self.events.append((storage.number, key))
        return storage

    def recorded(self, *parts: Sequence[Stretch]) -> Recorded:
        """The pass as its four parts, see `Recorded`."""
        keys = list(self.sizes)
        sizes, streams = zip(*((keys[size], stream) for size, stream in self._kinds), strict=True)
        forward, loss, backward, end = map(tuple, parts)
        return Recorded(forward, loss, backward, end, sizes, streams)

    def computes(self, events: Iterable[Event]) -> bool:
        """Whether all that the events allocate is on the stream that computes."""
        streams = [stream for _, stream in self._kinds]
        return all(size == FREED or streams[size] == COMPUTING for _, size in events)

    def drop(self, storage: Storage) -> None:
        super().drop(storage)
        if not storage.refs:
            self.events.append((storage.number, FREED))

    def recall(self, blocks: Iterable[tuple[str, Iterable[Op]]], run: int | None = None) -> list[dict[str, Storage]]:
        found = super().recall(blocks, run)
        self.recalled = len(self.events)
        return found

    def _weight_gradient(self, frame: Frame, name: str, storage: Storage) -> None:
        before, self._lasting = self._lasting, []
        if not frame.block and name in self._late:
            storage.refs += 1
            self._lasting = [storage]
        super()._weight_gradient(frame, name, storage)
        for last in before:
            self.drop(last)

    def note(self) -> None:
        """Moments are not asked for."""

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        if not frame.block:
            self.outside.append(len(self.events))
        super().backward(frame, grads)

    def end_forward(self) -> None:
        super().end_forward()
        self.turn = len(self.events)

    def end_step(self, *gradients: Storage) -> tuple[Moment, Moment]:
        while self._lasting:
            self.drop(self._lasting.pop())
        self.over = len(self.events)
        return super().end_step(*gradients)

    def enter_copy(self, number: int, way: Way, skipped: int) -> None:
        self._entered = _Copy(number, way, skipped, len(self.events), 0)

    def leave_copy(self) -> None:
        self.copies.append(self._entered._replace(end=len(self.events)))


def record(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    checkpoint: bool = False,
    reentrant: bool = False,
    grads_exist: bool = False,
    input_grad: bool = False,
    updates: Mapping[str, int] = MappingProxyType({}),
    to_host: bool = False,
    copies: int = RUN,
    division: Division | None = None,
    saves: SavedTensors | None = None,
    late: frozenset[str] = frozenset(),
) -> Recorded:
    """The allocations and frees of one forward and backward pass, in order. The arguments are those of `lower`, and
    `late` that of `Recorder`."""
    tape = Recorder(grads_exist, updates, late)
    tape.saves = saves
    gatherer = Gatherer(tape, division._replace(sums=False) if division else None, grads_exist)
    run_pass(tape, gatherer, stack, depth, autocast, checkpoint, reentrant, input_grad, to_host, copies)
    return tape.recorded(*_Expansion(tape, tape.turn, tape.outside[1], tape.over).parts)


def record_inference(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    division: Division | None = None,
    casts: str = "",
    copies: int = RUN,
) -> Recorded:
    """The allocations and frees of a forward pass of which autograd records nothing. It begins with those of what the
    pass before left, and what it leaves is not freed. `division` and `casts` are as `infer` has them."""
    tape = Recorder()
    gatherer = Gatherer(tape, division, grads_exist=False)
    run_pass(tape, gatherer, stack, depth, autocast, False, False, False, one_by_one=copies, records=False, casts=casts)
    recalled, others = _Expansion(tape, tape.recalled).parts
    return tape.recorded((*recalled, *others), (), (), ())


class _Expansion:
    """The events of all copies, also of those that were left out, in parts that begin at the `cuts`.

    A storage is known by the copy it was made in and its place there, so that it has a namesake in every equal copy. A
    copy left out makes and frees what the copy it is like does, with namesakes of its neighbours' storages.
    """

    def __init__(self, tape: Recorder, *cuts: int) -> None:
        self.parts: list[list[Stretch]] = [[]]
        self._tape = tape
        self._cuts = deque(cuts)
        self._made: dict[tuple[int, Way], list[int]] = {}
        self._born: dict[int, tuple[_Copy, int]] = {}  # a storage's copy and place
        for copy in tape.copies:
            made = [number for number, size in tape.events[copy.start : copy.end] if size != FREED]
            self._made[copy.number, copy.way] = made
            self._born.update((number, (copy, place)) for place, number in enumerate(made))
        at = 0
        for copy in tape.copies:
            self._add_run(at, copy.start, None)
            if copy.way == "backward":  # those left out come first
                self._add_left_out(copy, range(copy.skipped, 0, -1))
            self._add_run(copy.start, copy.end, copy)
            if copy.way != "backward":
                self._add_left_out(copy, range(1, copy.skipped + 1))
            at = copy.end
        self._add_run(at, len(tape.events), None)
        self.parts += ([] for _ in self._cuts)

    def _add_run(self, start: int, end: int, copy: _Copy | None) -> None:
        """Add the events of a copy that was run, or those between copies."""
        events: list[Event] = []
        for at in range(start, end):
            while self._cuts and at == self._cuts[0]:
                self.parts[-1] += stretches(events, self._tape)
                self.parts.append([])
                self._cuts.popleft()
                events = []
            number, size = self._tape.events[at]
            if size != FREED or number not in self._born:
                events.append((number, size))
            elif copy is None:  # each copy's goes
                born, _ = self._born[number]
                events += [(number + i * _STEP, FREED) for i in range(born.skipped + 1)]
            else:
                events.append((self._freed_by(copy, number), FREED))
        self.parts[-1] += stretches(events, self._tape)

    def _freed_by(self, copy: _Copy, number: int) -> int:
        """The number of a storage that a copy frees. Its neighbour may be a copy that was left out."""
        born, place = self._born[number]
        if born.way == "forward" and born.number == copy.number - 1:
            return number + born.skipped * _STEP
        if born.way == "backward" and born.number == copy.number + 1 and copy.skipped:
            return self._made[copy.number, copy.way][place] + _STEP
        return number

    def _add_left_out(self, copy: _Copy, order: Iterable[int]) -> None:
        """Add the copies left out that are like this one; the `order` has their distances from it."""
        if not copy.skipped:
            return
        events: list[Event] = []
        farthest: list[Event] = []  # of the copy whose other neighbour was run
        for number, size in self._tape.events[copy.start : copy.end]:
            born, place = self._born.get(number, (None, 0))
            if size != FREED or (born and born.number == copy.number):
                like = at_end = number
            elif born and born.way == "forward" and born.number == copy.number - 1:
                like = at_end = self._made[copy.number, "forward"][place] - _STEP
            elif born and born.way == "backward" and born.number == copy.number + 1:
                like, at_end = self._made[copy.number, copy.way][place] + _STEP, number - copy.skipped * _STEP
            else:
                continue
            events.append((like, size))
            farthest.append((at_end, size))
        usual, last = stretches(events, self._tape), stretches(farthest, self._tape)
        for distance in order:
            shift = distance * _STEP
            self.parts[-1] += (s._replace(shift=shift) for s in (last if distance == copy.skipped else usual))


def stretches(events: Sequence[Event], tape: Recorder) -> list[Stretch]:
    """The events as stretches. Iterations that free all they allocate, such as those over experts, become one."""
    out: list[Stretch] = []
    following = _next_with_the_same_alive(events)
    at = start = 0
    while at < len(events):
        length, times = following[at] - at, 1
        while length and _repeats(events, following, at + (times - 1) * length, length):
            times += 1
        body = tuple(events[at : at + length]) if times > 1 else ()
        if body and tape.computes(body) and _frees_what_it_allocates(body):
            out += [Stretch(tuple(events[start:at])), Stretch(body, times=times)]
            start = at = at + times * length
        else:
            at += 1
    return [stretch for stretch in (*out, Stretch(tuple(events[start:]))) if stretch.events]


def _next_with_the_same_alive(events: Sequence[Event]) -> list[int]:
    """For each place between events, the next one at which the same storages are alive; itself if there is none.

    The exclusive or of their hashes stands for the storages alive: every event adds or removes its own.
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
    """Whether the `length` events are followed by the same ones, of other storages."""
    end = at + length
    if following[end] - end != length:
        return False
    later = events[end][0] - events[at][0]
    return all(
        number + later == other and size == its
        for (number, size), (other, its) in zip(events[at:end], events[end : end + length], strict=True)
    )


def _frees_what_it_allocates(events: Iterable[Event]) -> bool:
    freed = {number for number, size in events if size == FREED}
    return freed == {number for number, size in events if size != FREED}
