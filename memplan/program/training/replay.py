"""Memory that torch's allocator reserves for a run, from replaying its allocations through a model of the allocator.

A run loads its weights, then makes steps: a recorded forward and backward pass, gradient clipping, and the optimizer's
update, which creates its states in the first step. The first two steps are replayed; a third would find the same
segments as the second. If optimizer states are small compared to the weights, as with adapters, only the second step
is replayed, as the first would hardly change its segments.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, reduce
from itertools import islice

from memplan.catalogue.hardware.overhead import EXTRA_LOSS_COPIES
from memplan.catalogue.parallelism.pipeline import distinct_microbatches, passes
from memplan.core.collection import without_collection
from memplan.core.ir import Tensor
from memplan.core.once import once
from memplan.core.units import ITEMSIZE
from memplan.engine.allocator import Allocator
from memplan.engine.events import FREED, RELEASED
from memplan.engine.record import AllocationTrace
from memplan.engine.sized_events import SizedEvents, SizeInRun
from memplan.engine.storages import GATHERING, LENT, REDUCING
from memplan.engine.walk import size
from memplan.program.graph import operations_of, record_training
from memplan.program.loading import EMPTIED
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.sharding import Sharding
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.passes import recorded_options
from memplan.program.training.pipeline_moments import stage_buffers
from memplan.program.training.program import Program
from memplan.program.training.program import program as program_of

STREAMS = 4  # each has a memory pool of its own
IN_FLIGHT = 2  # FSDP1's _max_num_inflight_all_gathers
FEW_RANKS = 64  # with more ranks a weight's parts are replayed as one tensor: there are thousands, all freed at once
FEW = 16  # optimizer states are small if 16 times their bytes are less than the weights
GPIPE_EVENTS = 500_000  # most allocations and frees replayed for a step of GPipe, over all stages
LONG_PASS = 100_000  # events, which take half a second to replay; dense models have a tenth of that
_WORKSPACE = "workspace"
MICROBATCHES = 32_768  # most microbatches replayed for a step of other schedules, where they only add buffers


def pass_of(structure: Structure, later: bool, labelled: bool = False) -> AllocationTrace:
    """Return the recording of a step's first pass, or of a `later` micro-batch's. `labelled` as of `record`."""
    late = sharding_of(structure).late_gradients()
    return record_training(structure.graph, recorded_options(structure, later), late, labelled)


def replay_steps(
    program: Program,
    axes: Mapping[str, int],
    workspace: int,
    allocator: Allocator,
    replay_side_tasks: Iterable[Callable[[Allocator], None]] = (),
) -> None:
    """Replay a run.

    axes        sizes of the run's axes
    workspace   cuBLAS's workspace for one handle; forward has one, backward another
    allocator   a new one with `STREAMS` streams
    side_tasks  tasks after the steps, such as evaluation or saving

    Raises OutOfMemoryError if the allocator's capacity is exceeded.
    """
    steps_of(program.structure).replay(allocator, {**axes, _WORKSPACE: workspace})
    for aside in replay_side_tasks:
        aside(allocator)


@lru_cache(maxsize=160)  # a scheduler's 50 models by three methods, and some
@once
@without_collection
def steps_of(structure: Structure) -> SizedEvents:
    """Return what a run allocates and frees while it loads the model and in its steps, at any sizes of its axes, one of
    which is cuBLAS's workspace: cards differ in it, and share the events."""
    program, sharding = program_of(structure), sharding_of(structure)
    model_axes = operations_of(structure.graph)[1]
    events = SizedEvents()
    events.enter("load")
    _load(sharding, events)
    has_small_states = program.states * FEW < program.parameters
    if program.optimizer.at_once or has_small_states:
        _make_states(program, events)
    handles = iter([size(_WORKSPACE, "uint8", {})] * 2)
    waiting: list[int] = []  # outputs of the previous pass that the training loop still references
    for step in (2,) if has_small_states else (1, 2):
        gradients: list[int] = []
        events.enter("forward", step)
        if structure.pipe.engine:
            gradients += _pipeline_step(structure, events, handles)
        for later in (False, True)[: 0 if structure.pipe.engine else 1 + structure.accumulates]:
            gathering, gathered = sharding.gathering(), dict[int, int]()
            # how the gathered weights interleave with the pass's own tensors only matters on a full GPU
            _gather(gathering.events[: gathering.most], gathering.stream, events, gathered)
            between: list[int] = []
            if later and not sharding.accumulates_in("backward"):  # accumulated gradients are whole until reduced
                between = [events.alloc(h.bytes) for h in sharding.accumulated() for _ in range(h.copies)]
            recording, reducing = pass_of(structure, later), sharding.reduction_streams()
            new_gradients, held, buffers = _pass(recording, model_axes, events, handles, waiting, reducing, step)
            gradients += new_gradients
            if structure.graph.holds_previous_outputs or (structure.holds_outputs and later == structure.accumulates):
                waiting = held
            else:
                events.free(held)
            events.free(between)
            events.free(buffers)
            _gather(gathering.events[gathering.most :], gathering.stream, events, gathered)
        if sharding.replaces_gradients:
            events.free(gradients)
            gradients = [events.alloc(program.gradients)]
        _update(program, step, events)
        if structure.graph.holds_previous_outputs != "graph":
            events.free(waiting)
        events.free(gradients)  # zero_grad
    return events


def _gather(weights: Iterable[tuple[int, int]], stream: int, events: SizedEvents, numbers: dict[int, int]) -> None:
    """Append allocations and frees of weights that a pass gathers apart from its own operations."""
    for number, bytes_ in weights:
        if bytes_:
            numbers[number] = events.alloc(bytes_, stream)
        else:
            events.free([numbers.pop(number)])


def _pipeline_step(structure: Structure, events: SizedEvents, handles: Iterator[SizeInRun]) -> list[int]:
    """Append a step of a pipeline rank, and return the gradients it leaves.

    Weights gathered for the step come first. They and the whole gradients are freed when the gradients have been
    reduced, which is replayed as a single collective.
    """
    sharding = sharding_of(structure)
    d, pipe = structure.graph.degrees, structure.pipe
    few = distinct_microbatches(pipe.schedule, d.pp, d.stage, d.virtual_stages, pipe.microbatches)
    moments = [*passes(pipe.schedule, d.pp, d.stage, d.virtual_stages, few)]
    model_axes = operations_of(structure.graph)[1]
    buffers_at = {m: Counter({t: n for t, _, n in stage_buffers(structure, m)}) for m in dict.fromkeys(moments)}
    throughout = reduce(lambda a, b: a & b, buffers_at.values())

    def allocated(tensors: Counter[Tensor]) -> list[int]:
        return [events.alloc(size(t.shape, t.dtype, model_axes)) for t in tensors.elements()]

    # an all-gather's output stays until the next one's has been copied
    gathers, reductions = sharding.step_messages()
    messages = [_bytes(t.shape, t.dtype, {}) for t in gathers]
    events.free([events.alloc(bytes_, GATHERING) for bytes_ in messages * 2])
    whole = [events.alloc(h.bytes) for h in sharding.held_in("forward") for _ in range(h.copies)]
    buffers = allocated(throughout)
    chunks = [_Microbatches(chunk, events) for chunk in chunks_of(structure)]
    gradients: list[int] = []
    for moment in moments:
        temporary = allocated(buffers_at[moment] - throughout)
        if moment.backward:
            gradients += chunks[moment.chunk].backward(handles)
        else:
            chunks[moment.chunk].forward(handles)
        events.free(temporary)
    events.free(buffers)
    if not sharding.gathers_for_step:
        events.free(whole)
        return gradients
    joined = [events.alloc(_bytes(t.shape, t.dtype, {})) for t in reductions]
    events.free(whole)
    events.free(gradients)
    parts = [events.alloc(h.bytes, REDUCING) for h in sharding.gradients() for _ in range(h.copies)]
    events.free(joined)
    return parts


class _Microbatches:
    """The microbatches between their forward and their backward pass through a chunk of layers."""

    def __init__(self, chunk: Structure, events: SizedEvents) -> None:
        self._chunk, self._events = chunk, events
        self._axes = operations_of(chunk.graph)[1]
        self._in_flight: deque[tuple[AllocationTrace, int]] = deque()  # each with the first of its numbers
        self._vacant: list[int] = []  # the first numbers of those that left nothing
        self._later = False  # all but the first find gradients

    def forward(self, handles: Iterator[SizeInRun]) -> None:
        """Append the forward pass of the next microbatch."""
        recording, self._later = pass_of(self._chunk, self._later), True
        for handle in islice(handles, 1):
            self._events.alloc(handle)
        numbers = self._vacant.pop() if self._vacant else self._events.take_numbers(recording.storages)
        self._in_flight.append((recording, numbers))
        self._events.append_part(recording, recording.forward, numbers, self._axes)

    def backward(self, handles: Iterator[SizeInRun]) -> list[int]:
        """Append the backward pass of the first microbatch and return the gradients it leaves."""
        recording, numbers = self._in_flight.popleft()
        self._events.append_part(recording, recording.loss, numbers, self._axes)
        for handle in islice(handles, 1):
            self._events.alloc(handle)
        for part in (recording.backward, recording.end):
            self._events.append_part(recording, part, numbers, self._axes)
        if self._vacates(recording):
            self._vacant.append(numbers)
        return [numbers + number for number, _ in recording.left]

    def _vacates(self, recording: AllocationTrace) -> bool:
        """Whether another microbatch can have the numbers: nothing is left, and it is recorded alike."""
        return not recording.left and recording is pass_of(self._chunk, later=True)


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


def append_loading(loading: Iterable[tuple[int, int]], events: SizedEvents) -> None:
    """Append the events of `memplan.program.loading.loading`."""
    live: dict[int, int] = {}
    known: dict[int, int] = {}  # bytes -> key
    numbers, keys, following = list[int](), list[int](), events.storages
    for number, bytes_ in loading:
        if bytes_:
            live[number] = following
            numbers.append(following)
            keys.append(known[bytes_] if bytes_ in known else known.setdefault(bytes_, events.key(bytes_)))
            following += 1
        elif number == EMPTIED:
            numbers.append(0)
            keys.append(RELEASED)
        elif number in live:  # an empty tensor has no block
            numbers.append(live.pop(number))
            keys.append(FREED)
    events.take_numbers(following - events.storages)
    events.extend(numbers, keys)


def _load(sharding: Sharding, events: SizedEvents) -> None:
    """Append loading the model, and allocations of gradient and reduction buffers, which exist before the first
    step."""
    append_loading(sharding.loading_events(together=sharding.ranks.world > FEW_RANKS), events)
    events.free([events.alloc(bytes_) for bytes_ in sharding.broadcast_buffers()])
    buffers = sharding.gradients() if sharding.run.grads else ()
    for held in (*buffers, *sharding.reduction_buffers(), *sharding.run.engine):
        events.alloc_copies(held.bytes, held.copies)


def cached_logits(structure: Structure, axes: Mapping[str, int]) -> int:
    """Return measured bytes that no replay explains: see `memplan.catalogue.hardware.overhead.EXTRA_LOSS_COPIES`."""
    logits = _shape_of_logits(structure)
    return 0 if logits is None else EXTRA_LOSS_COPIES * _bytes(*logits, {**operations_of(structure.graph)[1], **axes})


@lru_cache(maxsize=1024)
def _shape_of_logits(structure: Structure) -> tuple[str, str] | None:
    """Return the shape and dtype of the logits that a fused loss of one head reads; None for other losses."""
    heads = [op for op in operations_of(structure.graph)[0].after if any("v" in t.shape.split() for t in op.writes)]
    if "cross_entropy" not in structure.graph.fused or len(heads) != 1:
        return None
    shifted = [key[1] for key in pass_of(structure, later=False).sizes if key[0] == "shifted_rows v"]
    return "shifted_rows v" if shifted else "b s v", max(shifted, key=lambda name: ITEMSIZE[name], default="fp32")


def _bytes(shape: str, dtype: str, axes: Mapping[str, int]) -> int:
    return size(shape, dtype, axes)[1]


def _pass(
    recording: AllocationTrace,
    model_axes: Mapping[str, int],
    events: SizedEvents,
    handles: Iterator[SizeInRun],
    waiting: list[int],
    reducing: Iterable[tuple[int, int]],
    step: int,
) -> tuple[list[int], list[int], list[int]]:
    """Append a pass. Return the gradients it leaves, the tensors that the script still holds, and the buffers for
    reducing gradients.

    handles   workspaces not allocated yet: one comes with the first forward product, one with the first backward
              product, the head's
    waiting   tensors of the previous pass, freed when this pass replaces them
    reducing  stream and bytes of the buffers for reducing gradients, which exist from the head's backward on
    """
    numbers = events.take_numbers(recording.storages)
    ahead = _RunsAhead(events, recording, numbers, model_axes) if LENT in recording.streams else None
    buffers: list[int] = []
    for parts in ((recording.forward, recording.loss), (recording.backward,)):
        events.enter("backward" if recording.backward in parts else "forward", step)
        if recording.backward in parts:
            buffers = [events.alloc(bytes_, stream) for stream, bytes_ in reducing]
        for handle in islice(handles, 1):
            events.alloc(handle)
        for part in parts:
            if part is recording.loss:
                events.enter("backward", step)
            if ahead is not None:
                ahead.append_part(part)
            else:
                events.append_part(recording, part, numbers, model_axes)
        events.free(waiting)
    if ahead is not None:
        ahead.end()
    held = [numbers + number for number, _ in recording.unrolled(recording.end)]
    return [numbers + number for number, _ in recording.left], held, buffers


class _RunsAhead:
    """The events of a pass on several streams, by a process that runs ahead of its GPU.

    FSDP1 frees a unit's weights while the GPU still has to compute with them, and a unit's gradients before they are
    reduced. torch's allocator reuses such blocks only once the other stream is done with them. The process waits for
    that when it asks for weights while two freed units are still in use: it waits for the earlier unit, and so for the
    gradients of the unit before that. FSDP2 has its streams wait for each other, so nothing is freed early.

    Source: torch 2.13 distributed/fsdp/_runtime_utils.py _unshard, _post_backward_hook, _limiter_utils.py
    _FreeEventQueue; c10/cuda/CUDACachingAllocator.cpp recordStream.
    """

    def __init__(
        self, events: SizedEvents, recording: AllocationTrace, numbers: int, model_axes: Mapping[str, int]
    ) -> None:
        self._events, self._recording, self._numbers, self._axes = events, recording, numbers, model_axes
        self._streams: dict[int, int] = {}  # of live storages
        events.passes[numbers] = recording
        self._weights: deque[tuple[int, list[int]]] = deque()  # each with the gradients freed before it
        self._gradients: list[int] = []

    def append_part(self, part: range) -> None:
        keys = self._events.keys_of(self._recording, self._axes)
        for i in part:
            (span,) = self._recording.spans_of(range(i, i + 1))
            if span.times > 1:  # only allocates for computing
                self._events.append_part(self._recording, range(i, i + 1), self._numbers, self._axes)
                continue
            for number, key in self._recording.of(span):
                self._append(number + self._numbers, key, keys)

    def _append(self, number: int, key: int, keys: list[int]) -> None:
        if key != FREED:
            self._streams[number] = self._recording.streams[key]
            if self._streams[number] == GATHERING and len(self._weights) >= IN_FLIGHT:
                self._wait()
            self._events.append(number, keys[key])
            return
        stream = self._streams.pop(number)
        if stream == GATHERING:
            self._weights.append((number, self._gradients))
            self._gradients = []
        elif stream == LENT:
            self._gradients.append(number)
        else:
            self._events.free([number])

    def _wait(self) -> None:
        weights, gradients = self._weights.popleft()
        self._events.free([weights, *gradients])

    def end(self) -> None:
        """Free everything: the process waits for all streams before the optimizer step."""
        while self._weights:
            self._wait()
        self._events.free(self._gradients)


def _update(program: Program, step: int, events: SizedEvents) -> None:
    events.enter("step", step)
    if program.clipping:
        events.free([events.alloc(program.clipping)])
    if step == 1 and not program.optimizer.at_once:
        _make_states(program, events)
    scratch = program.optimizer.first if step == 1 else program.optimizer.later
    listed = program.optimizer.foreach_lists
    total = sum(bytes_ * count for bytes_, count in listed)
    blocks = [n for bytes_, count in listed for n in events.alloc_copies(bytes_, count)] if scratch >= total else []
    if scratch > total or (scratch and not blocks):
        blocks.append(events.alloc(scratch - total if blocks else scratch))
    events.free(blocks)


def _make_states(program: Program, events: SizedEvents) -> None:
    events.enter("states")
    for state in sharding_of(program.structure).optimizer().states:
        if not state.host:
            events.alloc_copies(state.bytes, state.count)
