"""What torch's allocator reserves for a run: its allocations, in order, replayed through the allocator's model.

A run loads its weights, then makes steps: each a recorded forward and backward pass, the clipping of gradients and
the optimizer's update, which makes its states in the first step. The first and the second are replayed: a third finds
segments as the second did. Where the states are few beside the weights, as with adapters, the second alone is: the
first would hardly leave it other segments.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial, reduce
from itertools import islice
from typing import Literal

from memplan.catalogue.hardware.overhead import COPIES_AGAIN
from memplan.catalogue.parallelism.pipeline import enough, passes
from memplan.core.ir import Tensor
from memplan.core.units import ITEMSIZE
from memplan.engine.allocator import Allocator, Block
from memplan.engine.lower import COMPUTING, GATHERING, LENT, REDUCING
from memplan.engine.record import FREED, Event, Recorded, Stretch
from memplan.engine.walk import size
from memplan.program.graph import built, recorded
from memplan.program.loading import EMPTIED
from memplan.program.sharding import zero
from memplan.program.sharding.zero3_prefetch import Gathering
from memplan.program.training.program import (
    Program,
    Structure,
    accumulated_of,
    beside_of,
    chunks_of,
    division_in_pass,
    division_of,
    gradients_of,
    loading_of,
    passing_of,
    reducing_of,
    spends_gradients,
    stay_throughout,
    stays_whole,
    updates_of,
)

STREAMS = 4  # that have pools of their own
NOTHING = Gathering((), 0, 0)
IN_FLIGHT = 2  # _max_num_inflight_all_gathers
FEW_RANKS = 64  # of more the parts of a weight are replayed as one tensor: they are thousands, and gone at once
FEW = 16  # states are few where so many times their bytes are fewer than the weights'
GPIPE_EVENTS = 500_000  # allocations and frees of a step of GPipe that are replayed, on all stages together
LONG_PASS = 100_000  # events, of which a replay takes half a second; dense models have a tenth of that
MICROBATCHES = 32_768  # of a step of another schedule, whose microbatches add buffers alone, on all stages together


def pass_of(structure: Structure, later: bool) -> Recorded:
    """A pass of the structure: the first of a step, or a `later` micro-batch's."""
    grads_exist = later or spends_gradients(structure)
    late = zero.late(structure.graph, structure.ranks)
    return recorded(structure.graph, grads_exist, updates_of(structure), division_in_pass(structure, later), late)


def segments(
    program: Program,
    axes: Mapping[str, int],
    workspace: int,
    expandable: bool = False,
    capacity: int | None = None,
    asides: Iterable[Callable[[Allocator], None]] = (),
) -> int:
    """The most bytes torch reserves for a run, on a card with `capacity` for it.

    `axes` are the run's; `workspace` is cuBLAS's for one handle: the forward pass has one, backward another. `asides`
    are what comes after the steps. Raises OutOfMemoryError where the capacity does not suffice.
    """
    structure = program.structure
    _, own = built(structure.graph)
    numbers = {**own, **axes}
    allocator = Allocator(expandable, capacity, STREAMS)
    _load(structure, allocator)
    alike = program.states * FEW < program.parameters
    if program.optimizer.at_once or alike:
        _make_states(program, allocator)
    handles = iter((workspace, workspace))
    waiting: list[Block] = []  # what the loop's names keep of the pass before
    for step in (2,) if alike else (1, 2):
        gradients: list[Block] = []
        if structure.pipe.engine:
            gradients += _fly(structure, axes, allocator, handles)
        for later in (False, True)[: 0 if structure.pipe.engine else 1 + structure.accumulates]:
            weights, reducing = _Gathered(structure, allocator), list[Block]()
            between: list[Block] = []
            if not zero.stage(structure.ranks):
                between = [allocator.alloc(held.bytes) for held in passing_of(structure, "backward")]
            if later and not stay_throughout(structure, "backward"):  # whole until then
                between += [allocator.alloc(h.bytes) for h in accumulated_of(structure) for _ in range(h.copies)]
            recording = pass_of(structure, later)
            start = partial(_reduce, structure, allocator, reducing)
            made, held = _pass(recording, numbers, allocator, handles, waiting, start)
            gradients += made
            if structure.graph.lingers or (structure.holds_outputs and later == structure.accumulates):
                waiting = held
            else:
                _free(held, allocator)
            _free(between, allocator)
            _free(reducing, allocator)
            weights.end()
        if zero.stage(structure.ranks):  # the update's gradients are made of these
            _free(gradients, allocator)
            gradients = [allocator.alloc(program.gradients)]
        _update(program, step, allocator)
        if not structure.graph.lingers:
            _free(waiting, allocator)
        _free(gradients, allocator)  # zero_grad
    for aside in asides:
        aside(allocator)
    return allocator.peak_reserved


def _reduce(structure: Structure, allocator: Allocator, made: list[Block]) -> None:
    """What DeepSpeed reduces gradients by, from the head's backward on."""
    if zero.stage(structure.ranks):
        held = zero.on_streams(structure.graph, structure.ranks)
        made += [allocator.alloc(bytes_, stream) for stream, bytes_ in held]


class _Gathered:
    """The weights that ZeRO's stage 3 gathers in a pass, up to the moment when they are most; the `end` is what comes
    after that. When they come and go beside the pass's own tensors matters on a full card alone."""

    def __init__(self, structure: Structure, allocator: Allocator) -> None:
        self._allocator = allocator
        self._blocks: dict[int, Block] = {}
        self._stream, found = zero.gathering(structure.graph, structure.ranks) or (COMPUTING, NOTHING)
        self._rest = found.events[found.most :]
        self._replay(found.events[: found.most])

    def _replay(self, events: Iterable[tuple[int, int]]) -> None:
        for number, bytes_ in events:
            if bytes_:
                self._blocks[number] = self._allocator.alloc(bytes_, self._stream)
            else:
                self._allocator.free(self._blocks.pop(number))

    def end(self) -> None:
        self._replay(self._rest)


class _Flight:
    """A microbatch's pass through a chunk: its blocks, and how they go on."""

    def __init__(self, structure: Structure, axes: Mapping[str, int], allocator: Allocator) -> None:
        self._structure, self._allocator = structure, allocator
        self._axes = {**built(structure.graph)[1], **axes}
        self._blocks: dict[int, Block] = {}

    def forward(self, handles: Iterator[int]) -> None:
        recording = pass_of(self._structure, later=False)
        for handle in islice(handles, 1):
            self._allocator.alloc(handle)
        self._replay(recording.forward, recording)

    def backward(self, later: bool, handles: Iterator[int]) -> list[Block]:
        """Returns the gradients it leaves."""
        recording = pass_of(self._structure, later)
        self._replay(recording.loss, recording)
        for handle in islice(handles, 1):
            self._allocator.alloc(handle)
        self._replay((*recording.backward, *recording.end), recording)
        return list(self._blocks.values())

    def _replay(self, part: Sequence[Stretch], recording: Recorded) -> None:
        bytes_ = [_bytes(key[0], key[1], self._axes) for key in recording.sizes]
        replay_stretches(part, bytes_, [stream % LENT for stream in recording.streams], self._allocator, self._blocks)


def _fly(structure: Structure, axes: Mapping[str, int], allocator: Allocator, handles: Iterator[int]) -> list[Block]:
    """Replay a step of a pipeline's rank, and return the gradients it leaves.

    Weights that are gathered for the step come first; they and whole gradients go when these have been reduced, which
    is replayed as if it were one collective for all.
    """
    d, pipe = structure.graph.degrees, structure.pipe
    few = enough(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)
    moments = [*passes(pipe.schedule, d.pp, d.stage, d.virtual_stages, few)]
    numbers = {**built(structure.graph)[1], **axes}
    between = {m: Counter({t: n for t, _, n in beside_of(structure, m)}) for m in dict.fromkeys(moments)}
    throughout = reduce(lambda a, b: a & b, between.values())

    def made(tensors: Counter[Tensor]) -> list[Block]:
        sizes = {t: _bytes(t.shape, t.dtype, numbers) for t in tensors}
        return [allocator.alloc(sizes[t]) for t in tensors.elements()]

    if stays_whole(structure):  # what an all-gather wrote is there until the next one's has been copied
        found = division_of(structure)
        messages = [unit.message for _, unit in found.units] if found else []
        sent = max(messages, key=lambda some: sum(_bytes(t.shape, t.dtype, {}) for t in some), default=())
        _free([allocator.alloc(_bytes(t.shape, t.dtype, {}), GATHERING) for t in (*sent, *sent)], allocator)
    whole = [allocator.alloc(h.bytes) for h in passing_of(structure, "forward") for _ in range(h.copies)]
    buffers = made(throughout)
    chunks = chunks_of(structure)
    flights: list[deque[_Flight]] = [deque() for _ in chunks]
    gradients: list[Block] = []
    for moment in moments:
        beside = made(between[moment] - throughout)
        if moment.backward:
            gradients += flights[moment.chunk].popleft().backward(moment.graded[moment.chunk], handles)
        else:
            flights[moment.chunk].append(_Flight(chunks[moment.chunk], axes, allocator))
            flights[moment.chunk][-1].forward(handles)
        _free(beside, allocator)
    _free(buffers, allocator)
    if not stays_whole(structure):
        _free(whole, allocator)
        return gradients
    joined = [allocator.alloc(_bytes(t.shape, t.dtype, {})) for t in largest_message(structure)]
    _free(whole, allocator)
    _free(gradients, allocator)
    parts = [allocator.alloc(h.bytes, REDUCING) for h in gradients_of(structure) for _ in range(h.copies)]
    _free(joined, allocator)
    return parts


def replayed_microbatches(structure: Structure) -> int:
    """How many microbatches of a pipeline's step are replayed at most, an even number of rounds through the stages; of
    GPipe, whose microbatches are all in flight at once, by how many allocations each makes."""
    d, pipe = structure.graph.degrees, structure.pipe
    if pipe.schedule == "gpipe":
        events = pass_of(chunks_of(structure)[0], later=False).length
        return max(2, GPIPE_EVENTS // (d.pp * events))
    if d.virtual_stages > 1 and pipe.microbatches % d.pp:  # they are fewer than pp x pp
        return pipe.microbatches
    rounds = MICROBATCHES // (d.pp * d.virtual_stages) // d.pp
    return max(6, rounds // 2 * 2) * d.pp


def largest_message(structure: Structure) -> tuple[Tensor, ...]:
    """What the largest reduce-scatter of a rank's units reads."""
    found = division_of(structure)
    every = ((*unit.joined, *unit.padded) for _, unit in found.units) if found else ()
    return max(every, key=lambda some: sum(_bytes(t.shape, t.dtype, {}) for t in some), default=())


def replay_loading(events: Iterable[tuple[int, int]], allocator: Allocator) -> None:
    """What loading allocates and frees, see `memplan.program.loading.loading`, through a model of torch's allocator."""
    blocks: dict[int, Block] = {}
    for number, bytes_ in events:
        if bytes_:
            blocks[number] = allocator.alloc(bytes_)
        elif number == EMPTIED:
            allocator.release()
        elif number in blocks:  # a tensor without elements has no block
            allocator.free(blocks.pop(number))


def _load(structure: Structure, allocator: Allocator) -> None:
    """Load the model; gradients that have buffers of their own come with the optimizer."""
    replay_loading(loading_of(structure, together=structure.ranks.world > FEW_RANKS), allocator)
    for held in (*(gradients_of(structure) if structure.grads else ()), *reducing_of(structure)):
        for _ in range(held.copies):
            allocator.alloc(held.bytes)


def cached_logits(structure: Structure, axes: Mapping[str, int]) -> int:
    """What no replay explains, in bytes: see `memplan.catalogue.hardware.overhead.COPIES_AGAIN`."""
    stack, own = built(structure.graph)
    heads = [op for op in stack.after if any("v" in t.shape.split() for t in op.writes)]
    if "cross_entropy" not in structure.graph.fused or len(heads) != 1:
        return 0
    shifted = [key[1] for key in pass_of(structure, later=False).sizes if key[0] == "shifted_rows v"]
    dtype = max(shifted, key=lambda name: ITEMSIZE[name], default="fp32")
    return COPIES_AGAIN * _bytes("shifted_rows v" if shifted else "b s v", dtype, {**own, **axes})


def streams_apart(structure: Structure) -> int:
    """The most bytes that lie free in pools of other streams while the one that computes could do with them.

    What is gathered, and reduced: under FSDP at most two units and one at once. A replay has those pools; a bound that
    does without one has to leave room for them.
    """
    graph, ranks = structure.graph, structure.ranks
    if zero.stage(ranks):
        stream, gathered = zero.gathering(graph, ranks) or (COMPUTING, NOTHING)
        apart = zero.on_streams(graph, ranks)
        return (gathered.bytes if stream else 0) + sum(bytes_ for where, bytes_ in apart if where)
    return _of_streams(structure) if ranks.world > 1 else 0


@lru_cache(maxsize=1024)
def _of_streams(structure: Structure) -> int:
    found = division_of(structure)
    units = [u for _, unit in found.units for u in (unit, *(inner for _, inner in unit.modules))] if found else []

    def most(name: Literal["whole", "message", "joined"]) -> int:
        return max((sum(_bytes(t.shape, t.dtype, {}) for t in getattr(unit, name)) for unit in units), default=0)

    return 2 * max(most("whole"), most("message")) + most("joined")


def _bytes(shape: str, dtype: str, axes: Mapping[str, int]) -> int:
    return size(shape, dtype, axes)[1]


def _pass(
    recording: Recorded,
    axes: Mapping[str, int],
    allocator: Allocator,
    handles: Iterator[int],
    waiting: list[Block],
    reduce_by: Callable[[], None],
) -> tuple[list[Block], list[Block]]:
    """Replay a pass; what it leaves are gradients, and what the script holds of it.

    `handles` are the workspaces not there yet: one comes with the first product forward, one with the first backward,
    which is the head's. `waiting` goes when backward comes to it, and what a rank is to `reduce_by` comes.
    """
    bytes_ = [_bytes(key[0], key[1], axes) for key in recording.sizes]
    blocks: dict[int, Block] = {}
    ahead = _Ahead(allocator, recording, bytes_, blocks) if any(recording.streams) else None
    for part, is_backward in (((*recording.forward, *recording.loss), False), (recording.backward, True)):
        if is_backward:
            reduce_by()
        for handle in islice(handles, 1):
            allocator.alloc(handle)
        if ahead is not None:
            ahead.replay(part)
        else:  # the same, of one stream
            replay_stretches(part, bytes_, recording.streams, allocator, blocks)
        _free(waiting, allocator)
    if ahead is not None:
        ahead.end()
    held = [blocks.pop(number + shift) for events, shift, _ in recording.end for number, _ in events]
    return list(blocks.values()), held


def replay_stretches(
    part: Iterable[Stretch],
    bytes_: Sequence[int],
    streams: Sequence[int],
    allocator: Allocator,
    blocks: dict[int, Block],
) -> None:
    """Replay a part of a pass. `bytes_` and `streams` have an entry for each of its sizes; `blocks` are those alive."""
    alloc, free = allocator.alloc, allocator.free
    for events, shift in _iterations(part, allocator):
        for number, key in events:
            if key == FREED:
                free(blocks.pop(number + shift))
            else:
                blocks[number + shift] = alloc(bytes_[key], streams[key])


def _iterations(part: Iterable[Stretch], allocator: Allocator) -> Iterator[tuple[tuple[Event, ...], int]]:
    """The events to replay, and the shift of their numbers.

    Events that are repeated free all they allocate. Once they ask the driver for nothing, they leave the allocator as
    they found it, and repeating them would change nothing.
    """
    for events, shift, times in part:
        for _ in range(times):
            requests = allocator.requests
            yield events, shift
            if allocator.requests == requests:
                break


class _Ahead:
    """A pass on several streams, of a process that runs ahead of its GPU.

    FSDP1 lets go of a unit's weights while the GPU still has to compute with them, and of a unit's gradients while they
    are to be reduced: torch's allocator hands such blocks out again once the other stream is done with them. The
    process waits for that where it asks for weights and two it let go of are still used: for the earlier of them, and
    so for the gradients of the unit before that one. FSDP2 has its streams wait for each other, and nothing is late.

    Source: torch 2.13 distributed/fsdp/_runtime_utils.py _unshard, _post_backward_hook, _limiter_utils.py
    _FreeEventQueue; c10/cuda/CUDACachingAllocator.cpp recordStream.
    """

    def __init__(self, allocator: Allocator, recording: Recorded, bytes_: list[int], blocks: dict[int, Block]) -> None:
        self._allocator, self._bytes, self._blocks, self._streams = allocator, bytes_, blocks, recording.streams
        self._late = LENT in recording.streams
        self._kinds: dict[int, int] = {}
        self._weights: deque[tuple[Block, list[Block]]] = deque()  # each with the gradients let go of before it
        self._gradients: list[Block] = []

    def replay(self, part: Iterable[Stretch]) -> None:
        for events, shift in _iterations(part, self._allocator):
            self._replay((number + shift, key) for number, key in events)

    def _replay(self, events: Iterable[Event]) -> None:
        alloc, free = self._allocator.alloc, self._allocator.free
        streams, bytes_, blocks = self._streams, self._bytes, self._blocks
        for number, key in events:
            if key != FREED:
                stream = streams[key]
                if stream == GATHERING and len(self._weights) >= IN_FLIGHT:
                    self._wait()
                blocks[number] = alloc(bytes_[key], COMPUTING if stream == LENT else stream)
                if stream and self._late:
                    self._kinds[number] = stream
                continue
            block, stream = blocks.pop(number), self._kinds.pop(number, COMPUTING)
            if stream == GATHERING:
                self._weights.append((block, self._gradients))
                self._gradients = []
            elif stream == LENT:
                self._gradients.append(block)
            else:
                free(block)

    def _wait(self) -> None:
        weights, gradients = self._weights.popleft()
        self._allocator.free(weights)
        _free(gradients, self._allocator)

    def end(self) -> None:
        """The process waits for all before the optimizer's step."""
        while self._weights:
            self._wait()
        _free(self._gradients, self._allocator)


def _free(blocks: list[Block], allocator: Allocator) -> None:
    while blocks:
        allocator.free(blocks.pop())


def _update(program: Program, step: int, allocator: Allocator) -> None:
    if program.clipping:
        allocator.free(allocator.alloc(program.clipping))
    if step == 1 and not program.optimizer.at_once:
        _make_states(program, allocator)
    scratch = program.optimizer.first if step == 1 else program.optimizer.later
    listed = program.optimizer.listed
    together = sum(bytes_ * count for bytes_, count in listed)
    made = [allocator.alloc(bytes_) for bytes_, count in listed for _ in range(count)] if scratch >= together else []
    if scratch > together or (scratch and not made):
        made.append(allocator.alloc(scratch - together if made else scratch))
    for block in made:
        allocator.free(block)


def _make_states(program: Program, allocator: Allocator) -> None:
    for state in program.optimizer.states:
        if not state.host:
            for _ in range(state.count):
                allocator.alloc(state.bytes)
