"""Memory that torch's allocator reserves for a run, from replaying its allocations through a model of the allocator.

A run loads its weights, then makes steps: a recorded forward and backward pass, gradient clipping, and the optimizer's
update, which creates its states in the first step. The first two steps are replayed; a third would find the same
segments as the second. If optimizer states are small compared to the weights, as with adapters, only the second step
is replayed, as the first would hardly change its segments.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import islice

from memplan.catalogue.hardware.overhead import EXTRA_LOSS_COPIES
from memplan.catalogue.parallelism.pipeline import distinct_microbatches, passes
from memplan.core.ir import Tensor
from memplan.core.units import ITEMSIZE
from memplan.engine.allocator import FREED, RELEASED, Allocator, Block, Event, LiveBlocks
from memplan.engine.native import new_allocator
from memplan.engine.record import AllocationTrace, EventSpan
from memplan.engine.storages import COMPUTING, GATHERING, LENT, REDUCING
from memplan.engine.walk import size
from memplan.program.graph import operations_of, record_training
from memplan.program.loading import EMPTIED
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.sharding import Sharding
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.passes import recorded_options
from memplan.program.training.pipeline_moments import stage_buffers
from memplan.program.training.program import Program

STREAMS = 4  # each has a memory pool of its own
IN_FLIGHT = 2  # FSDP1's _max_num_inflight_all_gathers
FEW_RANKS = 64  # with more ranks a weight's parts are replayed as one tensor: there are thousands, all freed at once
FEW = 16  # optimizer states are small if 16 times their bytes are less than the weights
GPIPE_EVENTS = 500_000  # most allocations and frees replayed for a step of GPipe, over all stages
LONG_PASS = 100_000  # events, which take half a second to replay; dense models have a tenth of that
MICROBATCHES = 32_768  # most microbatches replayed for a step of other schedules, where they only add buffers


def pass_of(structure: Structure, later: bool) -> AllocationTrace:
    """Return the recording of a step's first pass, or of a `later` micro-batch's."""
    late = sharding_of(structure).late_gradients()
    return record_training(structure.graph, recorded_options(structure, later), late)


def replay_steps(
    program: Program,
    axes: Mapping[str, int],
    workspace: int,
    expandable: bool = False,
    capacity: int | None = None,
    replay_side_tasks: Iterable[Callable[[Allocator], None]] = (),
) -> int:
    """Return the peak bytes that torch reserves for a run.

    axes        sizes of the run's axes
    workspace   cuBLAS's workspace for one handle; forward has one, backward another
    expandable  expandable segments are on
    capacity    bytes of the GPU that torch may reserve, None for no limit
    side_tasks  tasks after the steps, such as evaluation or saving

    Raises OutOfMemoryError if `capacity` is exceeded.
    """
    structure, sharding = program.structure, sharding_of(program.structure)
    _, model_axes = operations_of(structure.graph)
    numbers = {**model_axes, **axes}
    allocator = new_allocator(expandable, capacity, STREAMS)
    _load(sharding, allocator)
    has_small_states = program.states * FEW < program.parameters
    if program.optimizer.at_once or has_small_states:
        _make_states(program, allocator)
    handles = iter((workspace, workspace))
    waiting: list[Block] = []  # outputs of the previous pass that the training loop still references
    for step in (2,) if has_small_states else (1, 2):
        gradients: list[Block] = []
        if structure.pipe.engine:
            gradients += _pipeline_step(structure, axes, allocator, handles)
        for later in (False, True)[: 0 if structure.pipe.engine else 1 + structure.accumulates]:
            gathering, gathered = sharding.gathering(), dict[int, Block]()
            # how the gathered weights interleave with the pass's own tensors only matters on a full GPU
            _gather(gathering.events[: gathering.most], gathering.stream, allocator, gathered)
            between: list[Block] = []
            if later and not sharding.accumulates_in("backward"):  # accumulated gradients are whole until reduced
                between = [allocator.alloc(h.bytes) for h in sharding.accumulated() for _ in range(h.copies)]
            recording, reducing = pass_of(structure, later), sharding.reduction_streams()
            new_gradients, held, buffers = _pass(recording, numbers, allocator, handles, waiting, reducing)
            gradients += new_gradients
            if structure.graph.holds_previous_outputs or (structure.holds_outputs and later == structure.accumulates):
                waiting = held
            else:
                _free(held, allocator)
            _free(between, allocator)
            _free(buffers, allocator)
            _gather(gathering.events[gathering.most :], gathering.stream, allocator, gathered)
        if sharding.replaces_gradients:
            _free(gradients, allocator)
            gradients = [allocator.alloc(program.gradients)]
        _update(program, step, allocator)
        if not structure.graph.holds_previous_outputs:
            _free(waiting, allocator)
        _free(gradients, allocator)  # zero_grad
    for aside in replay_side_tasks:
        aside(allocator)
    return allocator.peak_reserved


def _gather(events: Iterable[tuple[int, int]], stream: int, allocator: Allocator, blocks: dict[int, Block]) -> None:
    """Replay allocations and frees of weights that a pass gathers apart from its own operations."""
    for number, bytes_ in events:
        if bytes_:
            blocks[number] = allocator.alloc(bytes_, stream)
        else:
            allocator.free(blocks.pop(number))


class _MicrobatchInFlight:
    """The blocks of one microbatch between its forward and its backward pass through a chunk of layers."""

    def __init__(self, structure: Structure, axes: Mapping[str, int], allocator: Allocator) -> None:
        self._structure, self._allocator = structure, allocator
        self._axes = {**operations_of(structure.graph)[1], **axes}
        self._blocks = allocator.live_blocks()

    def forward(self, handles: Iterator[int]) -> None:
        recording = pass_of(self._structure, later=False)
        for handle in islice(handles, 1):
            self._allocator.alloc(handle)
        self._replay(recording.forward, recording)

    def backward(self, later: bool, handles: Iterator[int]) -> list[Block]:
        """Replay the backward pass and return the gradients it leaves."""
        recording = pass_of(self._structure, later)
        self._replay(recording.loss, recording)
        for handle in islice(handles, 1):
            self._allocator.alloc(handle)
        self._replay((*recording.backward, *recording.end), recording)
        return list(self._blocks.values())

    def _replay(self, part: Sequence[EventSpan], recording: AllocationTrace) -> None:
        bytes_ = [_bytes(key[0], key[1], self._axes) for key in recording.sizes]
        replay_stretches(part, bytes_, [stream % LENT for stream in recording.streams], self._allocator, self._blocks)


def _pipeline_step(
    structure: Structure, axes: Mapping[str, int], allocator: Allocator, handles: Iterator[int]
) -> list[Block]:
    """Replay a step of a pipeline rank, and return the gradients it leaves.

    Weights gathered for the step come first. They and the whole gradients are freed when the gradients have been
    reduced, which is replayed as a single collective.
    """
    sharding = sharding_of(structure)
    d, pipe = structure.graph.degrees, structure.pipe
    few = distinct_microbatches(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)
    moments = [*passes(pipe.schedule, d.pp, d.stage, d.virtual_stages, few)]
    numbers = {**operations_of(structure.graph)[1], **axes}
    buffers_at = {m: Counter({t: n for t, _, n in stage_buffers(structure, m)}) for m in dict.fromkeys(moments)}
    throughout = reduce(lambda a, b: a & b, buffers_at.values())

    def allocated(tensors: Counter[Tensor]) -> list[Block]:
        sizes = {t: _bytes(t.shape, t.dtype, numbers) for t in tensors}
        return [allocator.alloc(sizes[t]) for t in tensors.elements()]

    # an all-gather's output stays until the next one's has been copied
    gathers, reductions = sharding.step_messages()
    messages = [_bytes(t.shape, t.dtype, {}) for t in gathers]
    _free([allocator.alloc(bytes_, GATHERING) for bytes_ in messages * 2], allocator)
    whole = [allocator.alloc(h.bytes) for h in sharding.held_in("forward") for _ in range(h.copies)]
    buffers = allocated(throughout)
    chunks = chunks_of(structure)
    in_flight: list[deque[_MicrobatchInFlight]] = [deque() for _ in chunks]
    gradients: list[Block] = []
    for moment in moments:
        temporary = allocated(buffers_at[moment] - throughout)
        if moment.backward:
            gradients += in_flight[moment.chunk].popleft().backward(moment.has_gradient[moment.chunk], handles)
        else:
            in_flight[moment.chunk].append(_MicrobatchInFlight(chunks[moment.chunk], axes, allocator))
            in_flight[moment.chunk][-1].forward(handles)
        _free(temporary, allocator)
    _free(buffers, allocator)
    if not sharding.gathers_for_step:
        _free(whole, allocator)
        return gradients
    joined = [allocator.alloc(_bytes(t.shape, t.dtype, {})) for t in reductions]
    _free(whole, allocator)
    _free(gradients, allocator)
    parts = [allocator.alloc(h.bytes, REDUCING) for h in sharding.gradients() for _ in range(h.copies)]
    _free(joined, allocator)
    return parts


def replayed_microbatches(structure: Structure) -> int:
    """Return the most microbatches of a pipeline step to replay, an even number of rounds through the stages.

    For GPipe, whose microbatches are all in flight at once, it depends on how many allocations each one makes.
    """
    d, pipe = structure.graph.degrees, structure.pipe
    if pipe.schedule == "gpipe":
        events = pass_of(chunks_of(structure)[0], later=False).length
        return max(2, GPIPE_EVENTS // (d.pp * events))
    if d.virtual_stages > 1 and pipe.microbatches % d.pp:  # they are fewer than pp x pp
        return pipe.microbatches
    rounds = MICROBATCHES // (d.pp * d.virtual_stages) // d.pp
    return max(6, rounds // 2 * 2) * d.pp


def replay_loading(events: Iterable[tuple[int, int]], allocator: Allocator) -> None:
    """Replay the events of `memplan.program.loading.loading` through a model of torch's allocator."""
    keys: dict[int, int] = {}  # size -> its index
    live: set[int] = set()
    indexed: list[Event] = []
    for number, bytes_ in events:
        if bytes_:
            live.add(number)
            indexed.append((number, keys.setdefault(bytes_, len(keys))))
        elif number == EMPTIED:
            indexed.append((number, RELEASED))
        elif number in live:  # an empty tensor has no block
            live.remove(number)
            indexed.append((number, FREED))
    allocator.replay(indexed, list(keys), [COMPUTING] * len(keys), allocator.live_blocks())


def _load(sharding: Sharding, allocator: Allocator) -> None:
    """Replay loading the model, and allocate gradient and reduction buffers, which exist before the first step."""
    replay_loading(sharding.loading_events(together=sharding.ranks.world > FEW_RANKS), allocator)
    for held in (*(sharding.gradients() if sharding.run.grads else ()), *sharding.reduction_buffers()):
        for _ in range(held.copies):
            allocator.alloc(held.bytes)


def cached_logits(structure: Structure, axes: Mapping[str, int]) -> int:
    """Return measured bytes that no replay explains: see `memplan.catalogue.hardware.overhead.EXTRA_LOSS_COPIES`."""
    stack, model_axes = operations_of(structure.graph)
    heads = [op for op in stack.after if any("v" in t.shape.split() for t in op.writes)]
    if "cross_entropy" not in structure.graph.fused or len(heads) != 1:
        return 0
    shifted = [key[1] for key in pass_of(structure, later=False).sizes if key[0] == "shifted_rows v"]
    dtype = max(shifted, key=lambda name: ITEMSIZE[name], default="fp32")
    return EXTRA_LOSS_COPIES * _bytes("shifted_rows v" if shifted else "b s v", dtype, {**model_axes, **axes})


def _bytes(shape: str, dtype: str, axes: Mapping[str, int]) -> int:
    return size(shape, dtype, axes)[1]


def _pass(
    recording: AllocationTrace,
    axes: Mapping[str, int],
    allocator: Allocator,
    handles: Iterator[int],
    waiting: list[Block],
    reducing: Iterable[tuple[int, int]],
) -> tuple[list[Block], list[Block], list[Block]]:
    """Replay a pass. Return the gradients it leaves, the tensors that the script still holds, and the buffers for
    reducing gradients.

    handles   workspaces not allocated yet: one comes with the first forward product, one with the first backward
              product, the head's
    waiting   blocks of the previous pass, freed when this pass replaces them
    reducing  stream and bytes of the buffers for reducing gradients, which exist from the head's backward on
    """
    sizes = [_bytes(key[0], key[1], axes) for key in recording.sizes]
    blocks = allocator.live_blocks()
    streams = _StreamReplay(allocator, recording, sizes, blocks) if any(recording.streams) else None
    buffers: list[Block] = []
    for part, is_backward in (((*recording.forward, *recording.loss), False), (recording.backward, True)):
        if is_backward:
            buffers = [allocator.alloc(bytes_, stream) for stream, bytes_ in reducing]
        for handle in islice(handles, 1):
            allocator.alloc(handle)
        if streams is not None:
            streams.replay(part)
        else:  # a single stream
            replay_stretches(part, sizes, recording.streams, allocator, blocks)
        _free(waiting, allocator)
    if streams is not None:
        streams.end()
    held = [blocks.pop(number + shift) for events, shift, _ in recording.end for number, _ in events]
    return list(blocks.values()), held, buffers


def replay_stretches(
    part: Iterable[EventSpan],
    bytes_: Sequence[int],
    streams: Sequence[int],
    allocator: Allocator,
    blocks: LiveBlocks,
) -> None:
    """Replay a part of a pass. `bytes_` and `streams` are indexed by size; `blocks` maps live storages to blocks."""
    for events, shift in _iterations(part, allocator):
        allocator.replay(events, bytes_, streams, blocks, shift)


def _iterations(part: Iterable[EventSpan], allocator: Allocator) -> Iterator[tuple[tuple[Event, ...], int]]:
    """Yield the events to replay, with the offset of their storage numbers.

    Repeated events free all they allocate. Once a repetition asks the driver for nothing, it leaves the allocator
    unchanged, and the remaining repetitions are skipped.
    """
    for events, shift, times in part:
        for _ in range(times):
            requests = allocator.requests
            yield events, shift
            if allocator.requests == requests:
                break


class _StreamReplay:
    """Replay of a pass on several streams, by a process that runs ahead of its GPU.

    FSDP1 frees a unit's weights while the GPU still has to compute with them, and a unit's gradients before they are
    reduced. torch's allocator reuses such blocks only once the other stream is done with them. The process waits for
    that when it asks for weights while two freed units are still in use: it waits for the earlier unit, and so for the
    gradients of the unit before that. FSDP2 has its streams wait for each other, so nothing is freed early.

    Source: torch 2.13 distributed/fsdp/_runtime_utils.py _unshard, _post_backward_hook, _limiter_utils.py
    _FreeEventQueue; c10/cuda/CUDACachingAllocator.cpp recordStream.
    """

    def __init__(self, allocator: Allocator, recording: AllocationTrace, bytes_: list[int], blocks: LiveBlocks) -> None:
        self._allocator, self._bytes, self._blocks, self._streams = allocator, bytes_, blocks, recording.streams
        self._frees_early = LENT in recording.streams
        self._kinds: dict[int, int] = {}
        self._weights: deque[tuple[Block, list[Block]]] = deque()  # each with the gradients freed before it
        self._gradients: list[Block] = []

    def replay(self, part: Iterable[EventSpan]) -> None:
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
                if stream and self._frees_early:
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
        """Free everything: the process waits for all streams before the optimizer step."""
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
    listed = program.optimizer.foreach_lists
    total = sum(bytes_ * count for bytes_, count in listed)
    blocks = [allocator.alloc(bytes_) for bytes_, count in listed for _ in range(count)] if scratch >= total else []
    if scratch > total or (scratch and not blocks):
        blocks.append(allocator.alloc(scratch - total if blocks else scratch))
    for block in blocks:
        allocator.free(block)


def _make_states(program: Program, allocator: Allocator) -> None:
    for state in program.optimizer.states:
        if not state.host:
            for _ in range(state.count):
                allocator.alloc(state.bytes)
