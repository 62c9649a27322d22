"""A run's allocations one by one: which of them asks the driver for memory, what it is, and what is held by then.

The allocator's model replays the run's events as `memplan.estimate.training` does, in Python and with names.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from memplan.core.records import NamedTuple
from memplan.engine.allocator import (
    LARGE_SEGMENT,
    OWN_SEGMENT,
    OWN_SEGMENT_STEP,
    SMALL_REQUEST,
    SMALL_SEGMENT,
    PythonAllocator,
)
from memplan.engine.allocator import OutOfMemoryError as ReplayOutOfMemory
from memplan.engine.events import FREED, RELEASED
from memplan.engine.record import AllocationTrace
from memplan.engine.sized_events import SizedEvents
from memplan.estimate.training import TrainingWalk, shorten_replay
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.replay import STREAMS, pass_of, steps_of

MOST_EVENTS = 3_000_000  # of a replay with names, which runs in Python


class TensorRequest(NamedTuple):
    """One allocation of a run.

    phase      load, forward, loss, backward, states or step
    step       1 or 2; 0 while loading, and if steps do not differ
    where      block and operation, empty outside of passes
    name       name of the tensor, empty outside of passes
    kind       as in a ledger
    shape      in letters; empty outside of passes
    dtype      memplan's name
    bytes      of the tensor
    repeat     how many like it came before it in this pass
    allocated  bytes of tensors before it
    reserved   bytes of segments before it
    kinds      bytes of tensors before it, by kind
    failed     the driver has no room for it
    """

    phase: str
    step: int
    where: str
    name: str
    kind: str
    shape: str
    dtype: str
    bytes: int
    repeat: int
    allocated: int
    reserved: int
    kinds: Mapping[str, int]
    failed: bool = False

    @property
    def segment(self) -> int:
        """The bytes that torch asks the driver for, which its message names."""
        return segment_of(self.bytes)


def segment_of(bytes_: int) -> int:
    """Return the size of a new segment for a tensor, which an out-of-memory message names.

    Source: torch 2.13 c10/cuda/CUDACachingAllocator.cpp get_allocation_size
    """
    if bytes_ <= SMALL_REQUEST:
        return SMALL_SEGMENT
    return LARGE_SEGMENT if bytes_ < OWN_SEGMENT else -(-bytes_ // OWN_SEGMENT_STEP) * OWN_SEGMENT_STEP


_KINDS_OUTSIDE = {"load": "parameter", "states": "optstate", "step": "temp"}


class _Names:
    """The tensor in each storage of a replay."""

    def __init__(self, structure: Structure, events: SizedEvents) -> None:
        self._starts = sorted(events.passes)
        self._passes = events.passes
        chunks = chunks_of(structure) if structure.pipe.engine else (structure,)
        known = [(pass_of(chunk, later), chunk, later) for chunk in chunks for later in (False, True)]
        self._labelled: dict[int, AllocationTrace] = {}
        for trace in {id(each): each for each in events.passes.values()}.values():
            found = next((each for each in known if each[0].equals(trace)), None)  # it may have been recorded again
            if found is not None:
                self._labelled[id(trace)] = pass_of(*found[1:], labelled=True)

    def of(self, number: int) -> tuple[str, ...] | None:
        """Return a storage's shape, dtype, kind, block, operation and name; None outside of passes."""
        i = bisect_right(self._starts, number) - 1
        if i < 0:
            return None
        trace = self._passes[self._starts[i]]
        labelled = self._labelled.get(id(trace))
        if labelled is None or number >= self._starts[i] + trace.storages:
            return None
        return labelled.labels[(number - self._starts[i]) % len(labelled.labels)]


def requests(walk: TrainingWalk, capacity: int | None = None) -> Iterator[TensorRequest]:
    """Yield every allocation for which torch asks the driver for memory, until one fails for a capacity.

    Yields nothing for a run with more events than `MOST_EVENTS`.
    """
    replay, _ = shorten_replay(walk.replay)
    structure, axes = replay.structure, {**dict(replay.axes), "workspace": replay.workspace}
    events = steps_of(structure)
    if sum(events.spans[1::4]) > MOST_EVENTS:
        return
    names, sizes = _Names(structure, events), events.bytes_of_keys(axes)
    allocator = PythonAllocator(replay.expandable, capacity, STREAMS)
    live: dict[int, tuple[object, str, int]] = {}
    kinds: Counter[str] = Counter()
    repeats: Counter[tuple[str, str]] = Counter()
    starts = [first for first, _, _ in events.phases]
    only_one = len({step for _, _, step in events.phases if step}) == 1  # the steps do not differ
    phase, step = "load", 0
    for index, span in enumerate(events.spans_of(events.every)):
        at = bisect_right(starts, index) - 1
        if at >= 0 and (events.phases[at][1], events.phases[at][2] or step) != (phase, step):
            phase, step = events.phases[at][1], events.phases[at][2] or step
            repeats.clear()
        now = 0 if only_one else step
        for _ in range(min(span.times, 2)):
            for number, key in events.of(span):
                if key == RELEASED:
                    allocator.release()
                elif key == FREED:
                    block, kind, bytes_ = live.pop(number)
                    allocator.free(block)  # pyright: ignore[reportArgumentType]
                    kinds[kind] -= bytes_
                elif number not in live:
                    label = names.of(number)
                    kind = label[2] if label else _KINDS_OUTSIDE.get(phase, "other")
                    before = allocator.requests, allocator.allocated, allocator.reserved
                    try:
                        block = allocator.alloc(sizes[key], events.streams[key])
                    except ReplayOutOfMemory:
                        yield _request(phase, now, label, kind, sizes[key], repeats, before, kinds, True)
                        return
                    if allocator.requests > before[0]:
                        yield _request(phase, now, label, kind, sizes[key], repeats, before, kinds, False)
                    if label:
                        repeats[label[3] + label[4], label[5]] += 1
                    taken = allocator.allocated - before[1]
                    live[number] = block, kind, taken
                    kinds[kind] += taken


def _request(
    phase: str,
    step: int,
    label: tuple[str, ...] | None,
    kind: str,
    bytes_: int,
    repeats: Mapping[tuple[str, str], int],
    before: Sequence[int],
    kinds: Mapping[str, int],
    failed: bool,
) -> TensorRequest:
    shape, dtype, _, block, op, name = label or ("",) * 6
    where = f"{block}.{op}" if block else op
    if phase == "forward" and op.startswith("loss"):
        phase = "loss"
    held = {kind: n for kind, n in kinds.items() if n}
    repeat = repeats.get((block + op, name), 0)
    return TensorRequest(
        phase, step, where, name, kind, shape, dtype, bytes_, repeat, before[1], before[2], held, failed
    )
