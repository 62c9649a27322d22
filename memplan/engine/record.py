"""Recording: a pass as the sequence of its allocations and frees, for the allocator's model. Structure only.

Of a run of equal blocks three copies are run: those at its ends and one between them. All others are like that one, so
its events are repeated for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from memplan.engine.gather import Gatherer
from memplan.engine.lower import Frame, Moment, Storage, Tape
from memplan.engine.step import run_pass
from memplan.ir import Division, SavedTensors, Stack, Tensor

FREED = -1
_LEFT_OUT = 1 << 40  # storages of copies left out: the same in passes that differ in what they make on the way back
RUN = 3  # copies of a run that are run: its first, its last, and the one between that all others are like


class Recorded(NamedTuple):
    """A pass: `events` are a storage's number, and its size's index in `sizes` or FREED; `streams` are those that each
    of the `sizes` is allocated on. Forward is done at the event `turn`, backward comes to the head at `head`; from
    `over` on, what the script and the graph's nodes held goes."""

    events: tuple[tuple[int, int], ...]
    sizes: tuple[tuple[str, ...], ...]
    streams: tuple[int, ...]
    turn: int
    head: int
    over: int


class _Copy(NamedTuple):
    """One copy's part of a pass: the events from `start` to `end`."""

    start: int
    end: int
    skipped: int


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
        self.turn = 0  # where forward is done
        self.over = 0  # where the pass is over
        self._numbers: dict[Storage, int] = {}
        self._kinds: dict[tuple[int, int], int] = {}  # a size and a stream
        self._entered = (0, 0)

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        storage = super().alloc(tensor, kind, fresh, of)
        self._numbers[storage] = len(self._numbers)
        key = self._kinds.setdefault((storage.size, self.stream), len(self._kinds))
        self.events.append((self._numbers[storage], key))
        return storage

    def recorded(self, events: list[tuple[int, int]], turn: int, head: int, over: int) -> Recorded:
        """The pass with those events."""
        keys = list(self.sizes)
        sizes, streams = zip(*((keys[size], stream) for size, stream in self._kinds), strict=True)
        return Recorded(tuple(events), sizes, streams, turn, head, over)

    def drop(self, storage: Storage) -> None:
        super().drop(storage)
        if not storage.refs:
            self.events.append((self._numbers[storage], FREED))

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

    def enter_copy(self, skipped: int) -> None:
        self._entered = (len(self.events), skipped)

    def leave_copy(self) -> None:
        start, skipped = self._entered
        self.copies.append(_Copy(start, len(self.events), skipped))


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
    every = _Expansion(tape)
    return tape.recorded(every.events, every.turn, every.head, every.over)


EVERY = 2**20  # copies of a run, of which none is left out


def record_inference(
    stack: Stack,
    depth: Mapping[str, int],
    autocast: str | None = None,
    division: Division | None = None,
    casts: str = "",
) -> Recorded:
    """The allocations and frees of a forward pass of which autograd records nothing. It begins with those of what the
    pass before left, and what it leaves is not freed. `division` and `casts` are as `infer` has them."""
    tape = Recorder()
    gatherer = Gatherer(tape, division, grads_exist=False)
    run_pass(tape, gatherer, stack, depth, autocast, False, False, False, one_by_one=EVERY, records=False, casts=casts)
    return tape.recorded(tape.events, tape.turn, len(tape.events), tape.over)


class _Expansion:
    """The events with those of the copies that were left out.

    A storage is known by the part it was made in and its place there, so that it has a namesake in every equal part. A
    copy left out makes and frees what the copy it is like does, with namesakes of its neighbours' storages.
    """

    def __init__(self, tape: Recorder) -> None:
        self.events: list[tuple[int, int]] = []
        self.turn = self.head = self.over = 0
        self._turn = tape.turn
        self._over = tape.over
        self._recorded = tape.events
        self._head = tape.outside[1]
        self._parts = tape.copies
        self._made: list[list[int]] = []
        self._born: dict[int, tuple[int, int]] = {}  # a storage's part and place
        for i, part in enumerate(tape.copies):
            within = tape.events[part.start : part.end]
            self._made.append([n for n, size in within if size != FREED])
            self._born.update((n, (i, place)) for place, n in enumerate(self._made[i]))
        self._instances: dict[tuple[int, int], int] = {}
        self._fresh = _LEFT_OUT
        last = len(tape.copies) - 1
        self._like = {i: part.skipped for i, part in enumerate(tape.copies) if part.skipped}
        at = 0
        for i, part in enumerate(tape.copies):
            self._whole(at, part.start, None)
            if 2 * i > last and part.skipped:  # on the way back they come first
                for j in range(part.skipped, 0, -1):
                    self._left_out(i, last - i, j)
            self._whole(part.start, part.end, i)
            if 2 * i < last and part.skipped:
                for j in range(1, part.skipped + 1):
                    self._left_out(i, i, j)
            at = part.end
        self._whole(at, len(tape.events), None)
        self.over = self.over or len(self.events)

    def _instance(self, number: int, copy: int) -> int:
        """The storage of the `copy`th copy left out that is like `number`, which is that of copy 0."""
        if not copy:
            return number
        if (number, copy) not in self._instances:
            self._instances[number, copy] = self._fresh
            self._fresh += 1
        return self._instances[number, copy]

    def _whole(self, start: int, end: int, part: int | None) -> None:
        """Events of a part that is run, or between parts."""
        for at in range(start, end):
            number, size = self._recorded[at]
            if at == self._turn:
                self.turn = len(self.events)
            if at == self._head:
                self.head = len(self.events)
            if at == self._over:
                self.over = len(self.events)
            if size != FREED:
                self.events.append((number, size))
                continue
            born, place = self._born.get(number, (None, 0))
            if born is None or born == part or not (self._like.get(born) or (part and self._like.get(part))):
                self.events.append((number, FREED))
            elif part is None:  # each copy's goes
                every = range(self._like.get(born, 0) + 1)
                self.events += [(self._instance(number, j), FREED) for j in every]
            else:
                self.events.append((self._neighbours(number, born, place, part), FREED))

    def _neighbours(self, number: int, born: int, place: int, part: int) -> int:
        """What a part calls a storage that another one made: between neighbours lie the copies left out."""
        last = len(self._parts) - 1
        if self._like.get(born) and part in (born + 1, last - born - 1) and 2 * born < last:
            return self._instance(number, self._like[born])
        if self._like.get(part) and born == part - 1 and 2 * born > last:
            return self._instance(self._made[part][place], 1)
        return number

    def _left_out(self, part: int, forward: int, copy: int) -> None:
        """The `copy`th copy left out in a part: copy 0 is run, and `forward` is its part of the forward pass."""
        start, end, skipped = self._parts[part]
        for number, size in self._recorded[start:end]:
            born, place = self._born.get(number, (None, 0))
            if size != FREED or born in (part, forward):
                self.events.append((self._instance(number, copy), size))
            elif born is not None and born == forward - 1:
                self.events.append((self._instance(self._made[forward][place], copy - 1), FREED))
            elif born is not None and born == part - 1:  # a gradient, of the copy after
                after = number if copy == skipped else self._instance(self._made[part][place], copy + 1)
                self.events.append((after, FREED))
