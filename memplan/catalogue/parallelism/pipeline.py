"""Pipelines: which layers a stage has, what it is given and hands on, and in what order its microbatches run.

A stage is a stack of its own: its layers, the embeddings on the first, the last norm, the head and the loss on the
last. The others are given hidden states, and are handed back the gradient of what they made of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from memplan.catalogue.parallelism.device_map_packing import place, shares
from memplan.core.errors import SpecError
from memplan.core.ir import Op, Run, Stack, Tensor, operations


class Engine(NamedTuple):
    """How a library runs a pipeline.

    schedules   that it has: 1f1b, gpipe, or device_map: each microbatch all the way and back before the next
    interleaves several chunks of layers on a rank
    even        layers divide by stages, or it is said how many the first or the last has. Otherwise embeddings count as
                a layer, and the head as one, and the earlier stages have those left over
    fills       1F1B needs as many microbatches as there are stages
    keeps       what a stage hands on stays until its backward, and a last stage's logits; otherwise it goes once sent
    buffers     what is received has storage for every microbatch, throughout
    moves       one process has all stages and moves tensors from one GPU to the next, and what the model returns to the
                first; layers are dealt by their bytes
    """

    name: str
    title: str
    schedules: tuple[str, ...]
    interleaves: bool
    even: bool
    fills: bool
    keeps: bool
    buffers: bool
    moves: bool
    source: str


ENGINES = {
    row.name: row
    for row in (
        Engine(
            "megatron",
            "megatron-core's schedules",
            ("1f1b",),
            True,
            True,
            False,
            False,
            False,
            False,
            "megatron-core 0.12.0 pipeline_parallel/schedules.py; Megatron-LM training/arguments.py "
            "deallocate_pipeline_outputs",
        ),
        Engine(
            "torch",
            "torch.distributed.pipelining",
            ("1f1b", "gpipe"),
            True,
            False,
            True,
            True,
            True,
            False,
            "torch 2.13 distributed/pipelining/stage.py, schedules.py; torchtitan 0.3.0 "
            "distributed/pipeline_parallel.py",
        ),
        Engine(
            "device_map",
            "transformers' device_map",
            ("device_map",),
            False,
            False,
            False,
            False,
            False,
            True,
            "transformers 5.24 integrations/accelerate.py; accelerate 1.15 hooks.py AlignDevicesHook",
        ),
    )
}


# Which layers a stage has.


def split(
    engine: Engine, layers: int, stages: int, chunks: int, first: int | None, last: int | None, ends: bool | None = None
) -> tuple[int, ...]:
    """How many layers each stage has, in the order of layers; of a rank with several `chunks` each is a stage here.

    `first` and `last` are those of the first and last rank, where they are said. `ends`: embeddings count as a layer,
    and the head as one; None as the engine has it. Raises SpecError.
    """
    if stages * chunks > layers:
        raise _unsplit(layers, stages, chunks, f"are more than its {layers} layers")
    if first is None and last is None:
        return _shared_out(layers, stages, chunks, not engine.even if ends is None else ends, engine.even)
    if ends:
        raise SpecError(
            "parallelism.ends_as_layers: is for stages of equal size, not with first_stage_layers or last_stage_layers",
            "parallelism.ends_as_layers",
        )
    rest, left = layers - (first or 0) - (last or 0), stages - (first is not None) - (last is not None)
    if left and (rest <= 0 or rest % (left * chunks)):
        beside = "".join(f", {n} of them the {end}'s" for n, end in ((first, "first"), (last, "last")) if n is not None)
        raise _unsplit(layers, stages, chunks, f"do not divide {layers} layers{beside}")
    of_rank = [rest // left if left else 0] * stages
    if first is not None:
        of_rank[0] = first
    if last is not None:
        of_rank[-1] = last
    if sum(of_rank) != layers or any(n % chunks for n in of_rank):
        raise _unsplit(layers, stages, chunks, f"do not divide {layers} layers as {' + '.join(map(str, of_rank))}")
    return tuple(of_rank[i % stages] // chunks for i in range(stages * chunks))


def _shared_out(layers: int, stages: int, chunks: int, ends: bool, even: bool) -> tuple[int, ...]:
    """As many layers on each stage, or, where they need not be `even`, one more on the earlier ones; with `ends`
    embeddings and head count as one each.

    Source: megatron-core 0.12.0 transformer/transformer_block.py get_num_layers_to_build,
    account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split; torchtitan 0.3.0
    distributed/pipeline_parallel.py _generate_llm_fqn_per_model_part with
    pipeline_parallel_first_stage_less_layers and pipeline_parallel_last_stage_less_layers 1, or 0.
    """
    parts = stages * chunks
    each, more = divmod(layers + 2 * ends, parts)
    if even and more:
        other = not ends and (layers + 2) % parts == 0
        hint = "--ends-as-layers does" if other else "--first-stage-layers or --last-stage-layers say otherwise"
        counted = ", embeddings and head counted as one each" if ends else ""
        raise _unsplit(layers, stages, chunks, f"do not divide {layers} layers{counted}; {hint}")
    found = [each + (i < more) for i in range(parts)]
    found[0] -= ends
    found[-1] -= ends
    if not all(found):
        raise _unsplit(layers, stages, chunks, f"leave one without any of {layers} layers, which is not supported yet")
    return tuple(found)


class Dealt(NamedTuple):
    """How a device_map deals a model: layers on each GPU that has any, whether embeddings are on the first of those,
    and whether all that comes after the layers is on the last."""

    layers: tuple[int, ...]
    embeds_first: bool
    ends_last: bool


def dealt(embeddings: int, layers: Sequence[int], after: Sequence[int], leaf: int, gpus: int, quantised: bool) -> Dealt:
    """How a device_map deals the modules of a model that trains, each of so many bytes; the last GPU takes the rest.
    `leaf`: a module without modules, the largest; `quantised`: by bitsandbytes."""
    modules = [embeddings, *layers, *after]
    room = shares(modules, slice(1, 1 + len(layers)), leaf, gpus, "balanced", None, quantised)
    on = place(modules, room, offloads=False)
    of_layers = on[1 : 1 + len(layers)]
    there = sorted(set(of_layers))
    counts = tuple(of_layers.count(gpu) for gpu in there)
    return Dealt(counts, on[0] == there[0], set(on[1 + len(layers) :]) == {there[-1]})


def _unsplit(layers: int, stages: int, chunks: int, why: str) -> SpecError:
    of_chunks = f" x virtual_stages {chunks} = {stages * chunks} stages" if chunks > 1 else " stages"
    return SpecError(f"parallelism.pp: pp {stages}{of_chunks} {why}", "parallelism.pp")


def staged(
    stack: Stack,
    axes: Mapping[str, int],
    layers: tuple[int, ...],
    stages: tuple[int, ...],
    received: Tensor | None,
    sent: Tensor | None,
    keeps: bool,
    moves: bool,
) -> tuple[Stack, dict[str, int]]:
    """The stack of a rank that has these `stages`, of which each has so many `layers`; and the axes with its numbers.

    `received`: what the first of them is given, None of the very first; `sent`: what the last of them hands on, None of
    the very last. `keeps`: that stays until its backward. `moves`: it is copied to another GPU of the process.
    """
    out = dict(axes)
    runs: list[Run] = []
    for stage in stages:
        start = sum(layers[:stage])
        runs += between(stack, out, start, start + layers[stage])
    made = _written(stack.before)
    stack = stack._replace(before=tuple(op for op in stack.before if op not in lasting_buffers(stack)))
    before = stack.before if received is None else _without_embeddings(stack, received, moves)
    gone = made - _written(before)
    runs = [r._replace(blocks=tuple(b._replace(ops=_without(b.ops, gone)) for b in r.blocks)) for r in runs]
    stack = stack._replace(before=before, runs=tuple(runs), after=_without(stack.after, gone))
    if sent is not None:
        stack = stack._replace(**_handing_on(stack, sent, keeps, moves))
    return stack, out


def _written(some: tuple[Op, ...]) -> set[str]:
    """The names of what operations write."""
    return {t.name for op in some for t in op.writes}


def lasting_buffers(stack: Stack) -> tuple[Op, ...]:
    """What makes a buffer that nothing is said to read, held for its own sake: all passes share it."""
    inside = [op for run in stack.runs for block in run.blocks for op in block.ops]
    read = {r for op in (*stack.before, *inside, *stack.after, *stack.loss) if not _leaves(op) for r in op.reads}
    held = (op for op in stack.before if op.holds == "step" and op.name != "inputs")
    return tuple(op for op in held if read.isdisjoint(t.name for t in op.writes))


def depth_of(stack: Stack, axes: Mapping[str, int]) -> int:
    """How many layers a stack has."""
    return sum(len(run.blocks) * axes[run.times] for run in stack.runs)


def until(stack: Stack, axes: Mapping[str, int], layers: int) -> tuple[Stack, dict[str, int]]:
    """The stack's first layers, with what comes before them."""
    out = dict(axes)
    return stack._replace(runs=tuple(between(stack, out, 0, layers)), after=(), loss=()), out


def between(stack: Stack, axes: dict[str, int], start: int, end: int) -> Iterator[Run]:
    """The runs of the layers from `start` to `end`. How often each repeats is a new axis, which is put into `axes`."""
    at = 0
    for run in stack.runs:
        period = len(run.blocks)
        here = at, at + period * axes[run.times]
        first, last = max(start, here[0]) - at, min(end, here[1]) - at
        at = here[1]
        pieces: list[tuple[int, int, int]] = []  # of the pattern, from where to where, and how often
        while first < last:
            begin = first % period
            whole = (last - first) // period if not begin else 0
            upto = period if whole else min(period, begin + last - first)
            pieces.append((begin, upto, max(1, whole)))
            first += (upto - begin) * max(1, whole)
        for begin, upto, times in pieces:
            name = f"{run.times}@{len(axes)}"
            axes[name] = times
            yield Run(run.blocks[begin:upto], name)


def _embedded(stack: Stack) -> set[str]:
    """The names of what embeddings made on the way to `embeds`, with that."""
    made: set[str] = set()
    for op in stack.before:
        if any(w.group == "embedding" for w in op.weights) or not made.isdisjoint(op.reads):
            made.update(t.name for t in op.writes)
    wanted = {"embeds"}
    for op in reversed(stack.before):
        if not wanted.isdisjoint(t.name for t in op.writes):
            wanted.update(op.reads)
    return (made & wanted) | {"embeds"}


def _without_embeddings(stack: Stack, received: Tensor, moves: bool) -> tuple[Op, ...]:
    """What a stage but the first does before its layers: it receives hidden states, and makes for itself what all
    layers read besides them (masks, positions, rotary tables). The script gives it no token ids.

    One process that `moves` tensors between GPUs also has there what its layers are given and do not read, such as the
    positions of a model whose embeddings alone look them up.
    """
    embedded = _embedded(stack)

    def renamed(name: str) -> str:
        return "embeds" if name in embedded else name

    def given(op: Op) -> Op:
        writes = tuple(
            t._replace(dtype=f"={renamed(t.dtype[1:])}") if t.dtype.startswith("=") else t for t in op.writes
        )
        return op._replace(reads=tuple(map(renamed, op.reads)), writes=writes)

    inside = [op for run in stack.runs for block in run.blocks for op in block.ops]
    wanted = {renamed(r) for op in (*inside, *stack.after, *stack.loss) if not _leaves(op) for r in op.reads}
    wanted.update(r for op in inside if moves and _leaves(op) for r in op.reads)
    read = {r for op in operations(stack) for r in op.reads}
    kept: list[Op] = []
    for op in reversed(stack.before):
        made = {t.name for t in op.writes}
        buffer = op.holds == "step" and read.isdisjoint(made)  # that layers write into, throughout
        if made & embedded or (wanted.isdisjoint(made) and not buffer):
            continue
        if buffer:
            kept.insert(0, given(op))
            continue
        writes = tuple(t for t in op.writes if t.name in wanted) if op.holds == "step" else op.writes
        kept.insert(0, given(op._replace(writes=writes)))
        wanted.update(kept[0].reads)
    recv = Op(
        "receive",
        (),
        (received._replace(name="embeds"),),
        gradient="none",
        asks=True,
        source="the hidden states of the stage before",
    )
    return (recv, *kept)


def _leaves(op: Op) -> bool:
    """Whether it only lets go of names."""
    return not op.writes and not op.weights


def _without(some: tuple[Op, ...], gone: set[str]) -> tuple[Op, ...]:
    """The operations, of which those that let go of names leave out what this stage does not make."""
    return tuple(op._replace(reads=tuple(r for r in op.reads if r not in gone)) if _leaves(op) else op for op in some)


def _handing_on(stack: Stack, sent: Tensor, keeps: bool, moves: bool) -> dict[str, tuple[Op, ...]]:
    """What a stage but the last does after its layers. What it made is named as the loss is: its gradient comes
    from the next stage, and stays until the backward pass is over, unless autograd itself moves it."""
    read = {r for op in stack.after if _leaves(op) for r in op.reads} & _written(stack.before)
    send = Op(
        "send",
        ("x",),
        (Tensor("loss", "", sent.dtype) if moves else sent._replace(name="loss"),),
        gradient="new" if moves else "same",
        view=not moves,
        holds="step" if keeps else "",
        source="what the next stage is given",
    )
    leave = (Op("return", tuple(sorted(read))),) if read else ()
    return {"after": (*leave, send), "loss": ()}


def unstageable(stack: Stack) -> bool:
    """Whether layers share more than hidden states, or several streams run through them: no stages are known of it."""
    embedded = _embedded(stack) - {"embeds"}
    inside = [op for run in stack.runs for block in run.blocks for op in block.ops]
    reads = {r for op in (*inside, *stack.after, *stack.loss) if not _leaves(op) for r in op.reads}
    several = any(run.before or any(block.shares for block in run.blocks) for run in stack.runs)
    states = any(op.holds == "states" for op in operations(stack))
    return several or states or not embedded.isdisjoint(reads)


# In what order a rank runs its microbatches.


class Moment(NamedTuple):
    """A pass of one microbatch through one chunk of a rank's layers, and what is there beside it.

    backward   whether it is the way back
    chunk      which one; `others`: how many other microbatches are in flight in each
    graded     whose gradients exist already
    done       whose last pass is over
    first      nothing has been sent back yet
    """

    backward: bool
    chunk: int
    others: tuple[int, ...]
    graded: tuple[bool, ...]
    done: tuple[bool, ...]
    first: bool


@lru_cache(maxsize=1024)
def moments(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> tuple[Moment, ...]:
    """Every pass of a rank that differs from others in what is there beside it, but for those with less."""
    found = dict.fromkeys(distinct_passes(schedule, stages, stage, chunks, microbatches))
    kept: list[Moment] = []
    for one in sorted(found, key=lambda m: (m.graded, m.others), reverse=True):
        if not any(_covers(other, one) for other in kept):
            kept.append(one)
    return tuple(kept)


def passes(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> Iterator[Moment]:
    """Every pass of a step of a rank, in order."""
    flying, graded, left = [0] * chunks, [False] * chunks, [microbatches] * chunks
    for backward, chunk in order(schedule, stages, stage, chunks, microbatches):
        if backward:
            flying[chunk] -= 1
        done = tuple(not n for n in left)
        yield Moment(backward, chunk, tuple(flying), tuple(graded), done, not any(graded))
        if backward:
            graded[chunk] = True
            left[chunk] -= 1
        else:
            flying[chunk] += 1


def distinct_passes(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> Iterator[Moment]:
    """The passes of a step, in order, without those that only repeat others, however many microbatches there are.

    1F1B repeats itself once the pipeline is full. In GPipe every microbatch adds one in flight until the first backward
    pass: the first, the last and the one next to it stand for all.
    """
    if schedule != "gpipe":
        few = enough(schedule, stages, stage, chunks, microbatches)
        yield from passes(schedule, stages, stage, chunks, few)
        return
    few = min(3, microbatches)
    for one in passes(schedule, stages, stage, chunks, few):
        (others,) = one.others
        full = others == 2 or (one.backward and others == 1)
        yield one._replace(others=(others + microbatches - few,)) if full else one


def _covers(more: Moment, one: Moment) -> bool:
    """Whether all that is there beside one moment is beside another like it. The first pass back makes gradients, so
    that one where they are there already does not stand for it."""
    alike = (more.backward, more.chunk, more.graded, more.first) == (one.backward, one.chunk, one.graded, one.first)
    return (
        alike
        and all(a >= b for a, b in zip(more.others, one.others, strict=True))
        and all(a <= b for a, b in zip(more.done, one.done, strict=True))
    )


def order(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """Forward (False) and backward passes in the order a rank runs them, each with its chunk of layers.

    Source: torch 2.13 distributed/pipelining/schedules.py ScheduleGPipe, Schedule1F1B, ScheduleInterleaved1F1B;
    megatron-core 0.12.0 pipeline_parallel/schedules.py get_pp_rank_microbatches, get_schedule_table.
    """
    if schedule == "device_map":
        for _ in range(microbatches):
            yield from ((False, 0), (True, 0))
        return
    every = microbatches * chunks
    warm = every if schedule == "gpipe" else warm_up(stages, stage, chunks, microbatches)
    table = _table(stages, chunks, microbatches)
    for chunk in table[:warm]:
        yield False, chunk
    for i in range(warm, every):
        yield False, table[i]
        yield True, chunks - 1 - table[i - warm]
    for i in range(every - warm, every):
        yield True, chunks - 1 - table[i]


def warm_up(stages: int, stage: int, chunks: int, microbatches: int) -> int:
    """How many forward passes come before those that a backward pass follows."""
    hops = stages - 1 - stage
    return min(hops if chunks == 1 else 2 * hops + (chunks - 1) * group(stages, microbatches), microbatches * chunks)


def group(stages: int, microbatches: int) -> int:
    """How many microbatches pass through a chunk before the next chunk's turn comes."""
    rounds = max(1, microbatches // stages)
    return microbatches // rounds if microbatches % rounds == 0 else stages


def _table(stages: int, chunks: int, microbatches: int) -> list[int]:
    """The chunks of forward passes in order."""
    if chunks == 1:
        return [0] * microbatches
    at_once = group(stages, microbatches)
    out: list[int] = []
    for done in range(0, microbatches, at_once):
        here = min(at_once, microbatches - done)
        out += [chunk for chunk in range(chunks) for _ in range(here)]
    return out


def enough(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> int:
    """So many microbatches that with more nothing is there that was not: a step of 1F1B goes on as it does by then."""
    if schedule == "device_map":
        return min(2, microbatches)
    if schedule == "gpipe":
        return microbatches
    few = warm_up(stages, stage, chunks, microbatches) + 3 if chunks == 1 else 3 * stages
    return min(few, microbatches) if chunks == 1 or microbatches % stages == 0 else microbatches


def most_in_flight(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> int:
    """How many microbatches, or passes of one through a chunk, a rank keeps what backward needs of, at most."""
    return max(sum(m.others) + 1 for m in moments(schedule, stages, stage, chunks, microbatches))


def beside(
    engine: Engine, schedule: str, moment: Moment, stages: int, stage: int, microbatches: int
) -> Counter[tuple[str, int]]:
    """What is there beside what the passes themselves keep: how many tensors `received` or `sent`, or a pass's
    `logits`, of each chunk.

    torch has buffers for all that every microbatch receives: activations, and gradients of what it sent. The names of
    its loop of 1F1B keep the gradient that was sent last, and the last outputs, until there are others. So do
    Megatron's, and the gradient that was received last. With several chunks Megatron receives ahead of use, and an
    output is sent while the backward pass runs that comes after it.
    """
    chunks = len(moment.others)
    found: Counter[tuple[str, int]] = Counter()
    for chunk in range(chunks):
        first, last = _ends(stages, stage, chunk, chunks)
        own = chunk == moment.chunk
        if engine.buffers:
            if not first:
                found["received", chunk] += microbatches - moment.others[chunk] - own
            if not last:
                found["sent", chunk] += microbatches - (own and moment.backward)
        if not own or moment.first or engine.moves or (engine.buffers and (schedule != "1f1b" or chunks > 1)):
            continue
        found["received", chunk] += not first
        if engine.buffers:
            found["logits", chunk] += last and not moment.backward
        elif chunks == 1:
            found["sent", chunk] += not last and not moment.backward
        else:
            found["sent", chunk] += not last
            found["received", chunk] += not first and moment.backward
    return found


class Reduced(NamedTuple):
    """When a chunk's last backward pass is over, and its gradients are reduced: `after` which moment, with the passes
    in flight then as its `others`."""

    chunk: int
    after: Moment


@lru_cache(maxsize=1024)
def reductions(schedule: str, stages: int, stage: int, chunks: int, microbatches: int) -> tuple[Reduced, ...]:
    """When the gradients of each of a rank's chunks are reduced, in order.

    Source: torch 2.13 distributed/pipelining/schedules.py _add_reduce_grad, Schedule1F1B._step_microbatches.
    """
    found: list[Reduced] = []
    every = [*distinct_passes(schedule, stages, stage, chunks, microbatches)]
    left = Counter(one.chunk for one in every if one.backward)
    for one in every:
        left[one.chunk] -= one.backward
        if one.backward and not left[one.chunk]:
            graded = tuple(there or i == one.chunk for i, there in enumerate(one.graded))
            found.append(Reduced(one.chunk, one._replace(graded=graded, first=False)))
    return tuple(found)


def reducing(engine: Engine, moment: Moment, stages: int, stage: int, microbatches: int) -> Counter[tuple[str, int]]:
    """What of it is there when gradients are reduced after a moment. Of one chunk the loop's names have the last
    outputs and the gradient sent last."""
    chunks = len(moment.others)
    found = lasting(engine, stages, stage, chunks, microbatches)
    for chunk, others in enumerate(moment.others):
        first, last = _ends(stages, stage, chunk, chunks)
        if not first:
            found["received", chunk] += (chunks == 1) - others
        if chunks == 1:
            found["logits" if last else "sent", chunk] += 1
    return found


def lasting(engine: Engine, stages: int, stage: int, chunks: int, microbatches: int) -> Counter[tuple[str, int]]:
    """What of it is there in the optimizer's step too."""
    found: Counter[tuple[str, int]] = Counter()
    if engine.buffers:
        for chunk in range(chunks):
            first, last = _ends(stages, stage, chunk, chunks)
            found["received", chunk] += 0 if first else microbatches
            found["sent", chunk] += 0 if last else microbatches
    return found


def _ends(stages: int, stage: int, chunk: int, chunks: int) -> tuple[bool, bool]:
    """Whether a rank's chunk is the model's first, and whether its last."""
    return stage == chunk == 0, stage == stages - 1 and chunk == chunks - 1
