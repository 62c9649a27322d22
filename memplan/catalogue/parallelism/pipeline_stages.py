"""Pipeline stages: which layers each holds, and the operations of one stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memplan.catalogue.parallelism.device_map_packing import gpu_shares, place_modules
from memplan.catalogue.parallelism.pipeline import PipelineEngine
from memplan.core.errors import SpecError, refused
from memplan.core.ir import Op, Run, Stack, Tensor, operations
from memplan.core.records import NamedTuple


def split(
    engine: PipelineEngine,
    layers: int,
    stages: int,
    chunks: int,
    first: int | None,
    last: int | None,
    ends: bool | None = None,
) -> tuple[int, ...]:
    """Return the number of layers of each stage, in the order of layers.

    engine  the library
    layers  number of the model's layers
    stages  number of ranks of the pipeline
    chunks  chunks per rank, each of which counts as a stage in the result
    first   layers on the first rank, if given
    last    layers on the last rank, if given
    ends    whether embeddings and head count as a layer each; None for the engine's way

    Raises SpecError.
    """
    if stages * chunks > layers:
        raise _unsplit(stages, chunks, f"are more than its {layers} layers")
    if first is None and last is None:
        return _equal_stages(
            layers, stages, chunks, not engine.needs_equal_stages if ends is None else ends, engine.needs_equal_stages
        )
    if ends:
        raise refused("parallelism.ends_as_layers", "cannot be combined with first_stage_layers or last_stage_layers")
    rest, open_ranks = layers - (first or 0) - (last or 0), stages - (first is not None) - (last is not None)
    if open_ranks and (rest <= 0 or rest % (open_ranks * chunks)):
        ends_given = ((n, end) for n, end in ((first, "first"), (last, "last")) if n is not None)
        given = "".join(f", {n} of them on the {end} stage" for n, end in ends_given)
        raise _unsplit(stages, chunks, f"do not divide {layers} layers{given}")
    per_rank = [rest // open_ranks if open_ranks else 0] * stages
    if first is not None:
        per_rank[0] = first
    if last is not None:
        per_rank[-1] = last
    if sum(per_rank) != layers or any(n % chunks for n in per_rank):
        raise _unsplit(stages, chunks, f"do not divide {layers} layers as {' + '.join(map(str, per_rank))}")
    return tuple(per_rank[i % stages] // chunks for i in range(stages * chunks))


def _equal_stages(layers: int, stages: int, chunks: int, ends: bool, even: bool) -> tuple[int, ...]:
    """Equal numbers of layers per stage; unless `even`, earlier stages take the remainder.

    `ends`: embeddings and head count as a layer each.

    Source: megatron-core 0.12.0 transformer/transformer_block.py get_num_layers_to_build,
    account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split; torchtitan 0.3.0
    distributed/pipeline_parallel.py _generate_llm_fqn_per_model_part with
    pipeline_parallel_first_stage_less_layers and pipeline_parallel_last_stage_less_layers 1, or 0.
    """
    parts = stages * chunks
    each, remainder = divmod(layers + 2 * ends, parts)
    if even and remainder:
        ends_would_fit = not ends and (layers + 2) % parts == 0
        unequal = "set --first-stage-layers or --last-stage-layers for unequal stages"
        hint = "--ends-as-layers does" if ends_would_fit else unequal
        counted = ", embeddings and head counted as one each" if ends else ""
        raise _unsplit(stages, chunks, f"do not divide {layers} layers{counted}; {hint}")
    counts = [each + (i < remainder) for i in range(parts)]
    counts[0] -= ends
    counts[-1] -= ends
    if not all(counts):
        raise _unsplit(stages, chunks, f"leave one without any of {layers} layers, which is not supported yet")
    return tuple(counts)


class LayerDivision(NamedTuple):
    """How a device_map places a model.

    layers        number of layers on each GPU that has any
    embeds_first  the embeddings are on the first of those GPUs
    ends_last     all modules after the layers are on the last of those GPUs
    """

    layers: tuple[int, ...]
    embeds_first: bool
    ends_last: bool


def divide_by_device_map(
    embeddings: int, layers: Sequence[int], after: Sequence[int], leaf: int, gpus: int, quantised: bool
) -> LayerDivision:
    """Return how a device_map places the modules of a training run; the last GPU takes the rest.

    embeddings  bytes of the embeddings
    layers      bytes of each layer
    after       bytes of each module after the layers
    leaf        bytes of the largest module without submodules
    gpus        number of GPUs
    quantised   whether bitsandbytes quantises the model
    """
    modules = [embeddings, *layers, *after]
    room = gpu_shares(modules, slice(1, 1 + len(layers)), leaf, gpus, "balanced", None, quantised)
    placement = place_modules(modules, room, offloads=False)
    layer_gpus = placement[1 : 1 + len(layers)]
    used = sorted(set(layer_gpus))
    counts = tuple(layer_gpus.count(gpu) for gpu in used)
    return LayerDivision(counts, placement[0] == used[0], set(placement[1 + len(layers) :]) == {used[-1]})


def _unsplit(stages: int, chunks: int, why: str) -> SpecError:
    of_chunks = f" x virtual_stages {chunks} = {stages * chunks} stages" if chunks > 1 else " stages"
    return refused("parallelism.pp", f"pp {stages}{of_chunks} {why}")


def stage_stack(
    stack: Stack,
    axes: Mapping[str, int],
    layers: tuple[int, ...],
    stages: tuple[int, ...],
    received: Tensor | None,
    sent: Tensor | None,
    keeps: bool,
    moves: bool,
) -> tuple[Stack, dict[str, int]]:
    """Return the stack of one rank of a pipeline, and the axes with its numbers of layers.

    layers    number of layers of every stage of the pipeline
    stages    the rank's stages
    received  the tensor it receives; None on the pipeline's first stage
    sent      the tensor it sends; None on the pipeline's last stage
    keeps     the sent tensor stays until its backward
    moves     the sent tensor is copied to another GPU of the same process
    """
    out = dict(axes)
    runs: list[Run] = []
    for stage in stages:
        start = sum(layers[:stage])
        runs += layer_runs(stack, out, start, start + layers[stage])
    all_written = _written(stack.before)
    stack = stack._replace(before=tuple(op for op in stack.before if op not in lasting_buffers(stack)))
    before = stack.before if received is None else _without_embeddings(stack, received, moves)
    missing = all_written - _written(before)
    runs = [r._replace(blocks=tuple(b._replace(ops=_without_missing(b.ops, missing)) for b in r.blocks)) for r in runs]
    stack = stack._replace(before=before, runs=tuple(runs), after=_without_missing(stack.after, missing))
    if sent is not None:
        stack = stack._replace(**_with_send(stack, sent, keeps, moves))
    return stack, out


def _written(ops: tuple[Op, ...]) -> set[str]:
    """Names of the tensors that the operations write."""
    return {t.name for op in ops for t in op.writes}


def lasting_buffers(stack: Stack) -> tuple[Op, ...]:
    """The operations that write a buffer which no operation reads and which all passes share, held to the end."""
    inside = [op for run in stack.runs for block in run.blocks for op in block.ops]
    read = {r for op in (*stack.before, *inside, *stack.after, *stack.loss) if not _only_frees(op) for r in op.reads}
    held = (op for op in stack.before if op.holds == "step" and op.name != "inputs")
    return tuple(op for op in held if read.isdisjoint(t.name for t in op.writes))


def depth_of(stack: Stack, axes: Mapping[str, int]) -> int:
    """Number of layers of a stack."""
    return sum(len(run.blocks) * axes[run.times] for run in stack.runs)


def first_layers(stack: Stack, axes: Mapping[str, int], layers: int) -> tuple[Stack, dict[str, int]]:
    """Return the stack cut off after its first `layers` layers, and its axes."""
    out = dict(axes)
    return stack._replace(runs=tuple(layer_runs(stack, out, 0, layers)), after=(), loss=()), out


def layer_runs(stack: Stack, axes: dict[str, int], start: int, end: int) -> Iterator[Run]:
    """Yield the runs of the layers from `start` to `end`. The repeats of each are a new axis, added to `axes`."""
    offset = 0
    for run in stack.runs:
        period = len(run.blocks)
        run_end = offset + period * axes[run.times]
        first, last = max(start, offset) - offset, min(end, run_end) - offset
        offset = run_end
        pieces: list[tuple[int, int, int]] = []  # start and end within the pattern of blocks, repeats
        while first < last:
            begin = first % period
            periods = (last - first) // period if not begin else 0
            upto = period if periods else min(period, begin + last - first)
            pieces.append((begin, upto, max(1, periods)))
            first += (upto - begin) * max(1, periods)
        for begin, upto, times in pieces:
            name = f"{run.times}@{len(axes)}"
            axes[name] = times
            yield Run(run.blocks[begin:upto], name)


def _embedding_tensors(stack: Stack) -> set[str]:
    """Names of the tensors from the embedding lookups to `embeds`, inclusive."""
    after_lookup: set[str] = set()
    for op in stack.before:
        if any(w.group == "embedding" for w in op.weights) or not after_lookup.isdisjoint(op.reads):
            after_lookup.update(t.name for t in op.writes)
    before_embeds = {"embeds"}
    for op in reversed(stack.before):
        if not before_embeds.isdisjoint(t.name for t in op.writes):
            before_embeds.update(op.reads)
    return (after_lookup & before_embeds) | {"embeds"}


def _without_embeddings(stack: Stack, received: Tensor, moves: bool) -> tuple[Op, ...]:
    """The operations before the layers of any stage but the first.

    It receives hidden states and makes its own masks, positions and rotary tables. The script gives it no token ids.
    A process that `moves` tensors between GPUs also copies inputs that its layers never read, such as the positions of
    a model that uses them only in its embeddings.
    """
    embedding_tensors = _embedding_tensors(stack)

    def renamed(name: str) -> str:
        return "embeds" if name in embedding_tensors else name

    def with_names(op: Op) -> Op:
        writes = tuple(
            t._replace(dtype=f"={renamed(t.dtype[1:])}") if t.dtype.startswith("=") else t for t in op.writes
        )
        return op._replace(reads=tuple(map(renamed, op.reads)), writes=writes)

    inside = [op for run in stack.runs for block in run.blocks for op in block.ops]
    wanted = {renamed(r) for op in (*inside, *stack.after, *stack.loss) if not _only_frees(op) for r in op.reads}
    wanted.update(r for op in inside if moves and _only_frees(op) for r in op.reads)
    read = {r for op in operations(stack) for r in op.reads}
    kept: list[Op] = []
    for op in reversed(stack.before):
        written = {t.name for t in op.writes}
        is_buffer = op.holds == "step" and read.isdisjoint(written)  # layers write into it throughout
        if written & embedding_tensors or (wanted.isdisjoint(written) and not is_buffer):
            continue
        if is_buffer:
            kept.insert(0, with_names(op))
            continue
        writes = tuple(t for t in op.writes if t.name in wanted) if op.holds == "step" else op.writes
        kept.insert(0, with_names(op._replace(writes=writes)))
        wanted.update(kept[0].reads)
    recv = Op(
        "receive",
        (),
        (received._replace(name="embeds"),),
        gradient="none",
        requires_gradient=True,
        source="hidden states from the previous stage",
    )
    return (recv, *kept)


def _only_frees(op: Op) -> bool:
    """Whether an operation does nothing but drop references."""
    return not op.writes and not op.weights


def _without_missing(ops: tuple[Op, ...], missing: set[str]) -> tuple[Op, ...]:
    """The operations, where those that drop references skip tensors that this stage does not make."""

    def existing(op: Op) -> Op:
        return op._replace(reads=tuple(r for r in op.reads if r not in missing))

    return tuple(existing(op) if _only_frees(op) else op for op in ops)


def _with_send(stack: Stack, sent: Tensor, keeps: bool, moves: bool) -> dict[str, tuple[Op, ...]]:
    """The fields of a stack that sends its output to the next stage.

    The output takes the name `loss`: its gradient comes from the next stage and stays until the backward pass is over,
    unless autograd itself moves it.
    """
    read = {r for op in stack.after if _only_frees(op) for r in op.reads} & _written(stack.before)
    send = Op(
        "send",
        ("x",),
        (Tensor("loss", "", sent.dtype) if moves else sent._replace(name="loss"),),
        gradient="new" if moves else "same",
        view=not moves,
        holds="step" if keeps else "",
        source="hidden states for the next stage",
    )
    leave = (Op("return", tuple(sorted(read))),) if read else ()
    return {"after": (*leave, send), "loss": ()}


def cannot_be_staged(stack: Stack) -> bool:
    """Whether the stack cannot be cut into stages: its layers share more than one stream of hidden states."""
    embedding_tensors = _embedding_tensors(stack) - {"embeds"}
    inside = [op for run in stack.runs for block in run.blocks for op in block.ops]
    reads = {r for op in (*inside, *stack.after, *stack.loss) if not _only_frees(op) for r in op.reads}
    shares = any(run.before or any(block.shares for block in run.blocks) for run in stack.runs)
    has_states = any(op.holds == "states" for op in operations(stack))
    return shares or has_states or not embedding_tensors.isdisjoint(reads)
