"""Pipeline parallelism: the layers of each stage, the tensors it receives and sends, and the order of its microbatches.

Each stage is a stack: its layers, plus the embeddings on the first stage, and the final norm, head and loss on the
last. Between stages, hidden states go forward and their gradients come back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from memplan.core.records import NamedTuple


class PipelineEngine(NamedTuple):
    """How a library runs a pipeline.

    name                 name of the engine
    title                the library, as shown
    schedules            its schedules: `1f1b`, `gpipe`, or `device_map` (each microbatch forward and back before the
                         next)
    source               where the facts come from
    interleaves          a rank can have several chunks of layers
    needs_equal_stages   stages must have equal numbers of layers, except for a given first or last one. Otherwise
                         embeddings and head count as a layer each, and earlier stages take the remainder
    needs_full_pipeline  1F1B needs at least as many microbatches as stages
    keeps                a stage's output stays until its backward, as do the last stage's logits; otherwise it is freed
                         once sent
    buffers              receive buffers exist for every microbatch throughout
    moves_tensors        one process has all stages, copies tensors from GPU to GPU and the model's output to the first,
                         and places layers by their bytes
    """

    name: str
    title: str
    schedules: tuple[str, ...]
    source: str
    interleaves: bool = False
    needs_equal_stages: bool = False
    needs_full_pipeline: bool = False
    keeps: bool = False
    buffers: bool = False
    moves_tensors: bool = False


_ENGINES = (
    PipelineEngine(
        "megatron",
        "megatron-core's schedules",
        ("1f1b",),
        "megatron-core 0.12.0 pipeline_parallel/schedules.py; Megatron-LM training/arguments.py "
        "deallocate_pipeline_outputs",
        interleaves=True,
        needs_equal_stages=True,
    ),
    PipelineEngine(
        "torch",
        "torch.distributed.pipelining",
        ("1f1b", "gpipe"),
        "torch 2.13 distributed/pipelining/stage.py, schedules.py; torchtitan 0.3.0 distributed/pipeline_parallel.py",
        interleaves=True,
        needs_full_pipeline=True,
        keeps=True,
        buffers=True,
    ),
    PipelineEngine(
        "device_map",
        "transformers' device_map",
        ("device_map",),
        "transformers 5.24 integrations/accelerate.py; accelerate 1.15 hooks.py AlignDevicesHook",
        moves_tensors=True,
    ),
)
ENGINES = {engine.name: engine for engine in _ENGINES}


# The order of microbatches.


class PipelineMoment(NamedTuple):
    """A pass of one microbatch through one of the rank's chunks, and the state of the others at that time.

    backward      whether it is a backward pass
    chunk         number of the chunk
    others        number of other microbatches in flight in each chunk
    has_gradient  whether each chunk's gradients exist already
    done          whether each chunk's last pass is over
    first         no gradient has been sent back yet
    """

    backward: bool
    chunk: int
    others: tuple[int, ...]
    has_gradient: tuple[bool, ...]
    done: tuple[bool, ...]
    first: bool


@lru_cache(maxsize=1024)
def moments(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> tuple[PipelineMoment, ...]:
    """Return the passes of a rank that may need most memory: those not dominated by a similar pass."""
    candidates = dict.fromkeys(distinct_passes(schedule, stages, stage, chunks, microbatches))
    kept: list[PipelineMoment] = []
    for moment in sorted(candidates, key=lambda m: (m.has_gradient, m.others), reverse=True):
        if not any(_dominates(other, moment) for other in kept):
            kept.append(moment)
    return tuple(kept)


def passes(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> Iterator[PipelineMoment]:
    """Yield every pass of a rank's step, in order."""
    in_flight, graded, remaining = [0] * chunks, [False] * chunks, [microbatches] * chunks
    for backward, chunk in order(schedule, stages, stage, chunks, microbatches):
        if backward:
            in_flight[chunk] -= 1
        done = tuple(not n for n in remaining)
        yield PipelineMoment(backward, chunk, tuple(in_flight), tuple(graded), done, not any(graded))
        if backward:
            graded[chunk] = True
            remaining[chunk] -= 1
        else:
            in_flight[chunk] += 1


def distinct_passes(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> Iterator[PipelineMoment]:
    """Yield the passes of a step in order, without repetitions, so their number stays bounded.

    1F1B repeats itself once the pipeline is full. In GPipe every forward pass adds one microbatch in flight: the first,
    the last and the one next to it stand for all.
    """
    if schedule != "gpipe":
        few = distinct_microbatches(schedule, stages, stage, chunks, microbatches)
        yield from passes(schedule, stages, stage, chunks, few)
        return
    few = min(3, microbatches)
    for moment in passes(schedule, stages, stage, chunks, few):
        (others,) = moment.others
        full = others == 2 or (moment.backward and others == 1)
        yield moment._replace(others=(others + microbatches - few,)) if full else moment


def _dominates(a: PipelineMoment, b: PipelineMoment) -> bool:
    """Whether `a` has at least the tensors of `b` alive, in a pass of the same kind.

    `graded` must be equal: the first backward pass creates gradients, so a pass that finds them cannot stand for it.
    """
    same_kind = (a.backward, a.chunk, a.has_gradient, a.first) == (b.backward, b.chunk, b.has_gradient, b.first)
    return (
        same_kind
        and all(m >= n for m, n in zip(a.others, b.others, strict=True))
        and all(m <= n for m, n in zip(a.done, b.done, strict=True))
    )


def order(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """Yield a rank's forward (False) and backward (True) passes in order, each with its chunk.

    Source: torch 2.13 distributed/pipelining/schedules.py ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B;
    megatron-core 0.12.0 pipeline_parallel/schedules.py get_pp_rank_microbatches, get_schedule_table.
    """
    if schedule == "device_map":
        for _ in range(microbatches):
            yield from ((False, 0), (True, 0))
        return
    total = microbatches * chunks
    warm = total if schedule == "gpipe" else warm_up(stages, stage, chunks, microbatches)
    table = _chunk_table(stages, chunks, microbatches)
    for chunk in table[:warm]:
        yield False, chunk
    for i in range(warm, total):
        yield False, table[i]
        yield True, chunks - 1 - table[i - warm]
    for i in range(total - warm, total):
        yield True, chunks - 1 - table[i]


def warm_up(stages: int, stage: int, chunks: int, microbatches: int) -> int:
    """Number of forward passes before forward and backward passes alternate."""
    hops = stages - 1 - stage
    return min(
        hops if chunks == 1 else 2 * hops + (chunks - 1) * group_size(stages, microbatches), microbatches * chunks
    )


def group_size(stages: int, microbatches: int) -> int:
    """Number of consecutive microbatches through one chunk before the next chunk's turn."""
    rounds = max(1, microbatches // stages)
    return microbatches // rounds if microbatches % rounds == 0 else stages


def _chunk_table(stages: int, chunks: int, microbatches: int) -> list[int]:
    """The chunk of each forward pass, in order."""
    if chunks == 1:
        return [0] * microbatches
    at_once = group_size(stages, microbatches)
    out: list[int] = []
    for done in range(0, microbatches, at_once):
        size = min(at_once, microbatches - done)
        out += [chunk for chunk in range(chunks) for _ in range(size)]
    return out


def distinct_microbatches(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> int:
    """The number of microbatches beyond which a step's memory no longer changes: 1F1B only repeats itself by then."""
    if schedule == "device_map":
        return min(2, microbatches)
    if schedule == "gpipe":
        return microbatches
    few = warm_up(stages, stage, chunks, microbatches) + 3 if chunks == 1 else 3 * stages
    return min(few, microbatches) if chunks == 1 or microbatches % stages == 0 else microbatches


def most_in_flight(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> int:
    """The most microbatches (counted per chunk) whose saved activations a rank holds at once."""
    return max(sum(m.others) + 1 for m in moments(schedule, stages, stage, chunks, microbatches))


def extra_tensors(
    engine: PipelineEngine, schedule: str, moment: PipelineMoment, stages: int, stage: int, microbatches: int
) -> Counter[tuple[str, int]]:
    """Return how many tensors a pass has alive in addition to its saved activations.

    Keys are (`received`, `sent` or `logits`, chunk); a gradient counts as the tensor it belongs to.

    torch has buffers for everything that microbatches receive: activations, and gradients of what they sent. Variables
    of its 1F1B loop hold the gradient sent last and the last outputs until they are reassigned. Megatron's do too, and
    hold the gradient received last. With several chunks Megatron receives ahead of use, and sends an output during the
    backward pass after it; groups of more microbatches than stages arrive early at the ends of the pipeline.
    """
    chunks = len(moment.others)
    counts: Counter[tuple[str, int]] = Counter()
    for chunk in range(chunks):
        first, last = _ends(stages, stage, chunk, chunks)
        is_running = chunk == moment.chunk
        if engine.buffers:
            if not first:
                counts["received", chunk] += microbatches - moment.others[chunk] - is_running
            if not last:
                counts["sent", chunk] += microbatches - (is_running and moment.backward)
        if (
            not is_running
            or moment.first
            or engine.moves_tensors
            or (engine.buffers and (schedule != "1f1b" or chunks > 1))
        ):
            continue
        counts["received", chunk] += not first
        if engine.buffers:
            counts["logits", chunk] += last and not moment.backward
        elif chunks == 1:
            counts["sent", chunk] += not last and not moment.backward
        else:
            counts["sent", chunk] += not last
            counts["received", chunk] += not first and moment.backward
    if chunks > 1 and not (engine.buffers or engine.moves_tensors or moment.first):
        ahead = group_size(stages, microbatches) - stages
        counts["received", 1] += ahead * (stage == 0)
        counts["sent", 0] += ahead * (stage == stages - 1)
    return counts


class GradientReduction(NamedTuple):
    """The reduction of a chunk's gradients once its last backward pass is over.

    chunk  number of the chunk
    after  the moment it follows, whose `others` are the passes in flight then
    """

    chunk: int
    after: PipelineMoment


@lru_cache(maxsize=1024)
def reductions(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> tuple[GradientReduction, ...]:
    """Return the reductions of the gradients of a rank's chunks, in order.

    Source: torch 2.13 distributed/pipelining/schedules.py _add_reduce_grad, Schedule1F1B._step_microbatches.
    """
    out: list[GradientReduction] = []
    step = [*distinct_passes(schedule, stages, stage, chunks, microbatches)]
    remaining = Counter(moment.chunk for moment in step if moment.backward)
    for moment in step:
        remaining[moment.chunk] -= moment.backward
        if moment.backward and not remaining[moment.chunk]:
            graded = tuple(has_gradient or i == moment.chunk for i, has_gradient in enumerate(moment.has_gradient))
            out.append(GradientReduction(moment.chunk, moment._replace(has_gradient=graded, first=False)))
    return tuple(out)


def extra_tensors_in_reduction(
    engine: PipelineEngine, moment: PipelineMoment, stages: int, stage: int, microbatches: int
) -> Counter[tuple[str, int]]:
    """Return the counts of `extra_tensors` while gradients are reduced after a moment.

    With one chunk, variables of the loop hold the last outputs and the gradient sent last.
    """
    chunks = len(moment.others)
    counts = step_buffers(engine, stages, stage, chunks, microbatches)
    for chunk, others in enumerate(moment.others):
        first, last = _ends(stages, stage, chunk, chunks)
        if not first:
            counts["received", chunk] += (chunks == 1) - others
        if chunks == 1:
            counts["logits" if last else "sent", chunk] += 1
    return counts


def step_buffers(
    engine: PipelineEngine, stages: int, stage: int, chunks: int, microbatches: int
) -> Counter[tuple[str, int]]:
    """Return the counts of `extra_tensors` during the optimizer's step: the buffers."""
    counts: Counter[tuple[str, int]] = Counter()
    if engine.buffers:
        for chunk in range(chunks):
            first, last = _ends(stages, stage, chunk, chunks)
            counts["received", chunk] += 0 if first else microbatches
            counts["sent", chunk] += 0 if last else microbatches
    return counts


def _ends(stages: int, stage: int, chunk: int, chunks: int) -> tuple[bool, bool]:
    """Whether a rank's chunk is the model's first, and whether it is the last."""
    return stage == chunk == 0, stage == stages - 1 and chunk == chunks - 1
