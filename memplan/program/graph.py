"""A run's graph: the operations of one model, method and set of kernels, lowered to moments. No batch, no optimizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from memplan.catalogue import build, with_trainer
from memplan.catalogue.attention.old_rotary_tables import own_tables
from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.catalogue.families import megatron
from memplan.catalogue.inference.decoding import evaluation, inference
from memplan.catalogue.inference.offloaded_caches import offloaded
from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels import losses
from memplan.catalogue.kernels.checkpointing import checkpoint_every
from memplan.catalogue.kernels.fused import fuse
from memplan.catalogue.kernels.own_axes import own_sizes, with_own_axes
from memplan.catalogue.kernels.rewriting import (
    by_name,
    checked,
    rewrite_blocks,
    with_all_gradients,
    with_held_outputs,
    with_last_input,
)
from memplan.catalogue.kernels.wiring import TRAINERS, Trainer, Wiring
from memplan.catalogue.methods.freezing import freeze
from memplan.catalogue.methods.methods import ADAPTERS, Recipe, apply
from memplan.catalogue.methods.own_losses import with_own_loss
from memplan.catalogue.methods.shadow import with_shadow
from memplan.catalogue.parallelism import context_parallel, expert_parallel, pipeline_stages, tensor_parallel
from memplan.catalogue.parallelism.device_maps import ModulePlacement, axes_of, axis_of, place_operations
from memplan.catalogue.quantization.inference_formats import bytes_at_once, chunk_of
from memplan.catalogue.quantization.packed_kernels import unpacked, with_buffers
from memplan.catalogue.quantization.quantization import BNB, codes_of_scales, fp8_chunk, fp8_experts_at_once, storage_of
from memplan.core.collection import without_collection
from memplan.core.errors import refused
from memplan.core.ir import Division, Op, SavedTensors, Stack, Tensor, Weight, operations
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.copies import made_by, stream_of
from memplan.engine.lowered import Lowered
from memplan.engine.record import AllocationTrace, record, record_inference
from memplan.engine.step import ExecutionOptions, infer, lower
from memplan.engine.walk import size
from memplan.engine.work import Call, work
from memplan.models.model import ModelSpec, without_dropout
from memplan.program.weight_sizes import elements


class Graph(NamedTuple):
    """Everything that decides which operations a forward and a backward pass run, and which tensors they keep.

    It is one flat record, though long, because it is the key of every cached lowering.

    model                   the model's config
    recipe                  the method: dtypes, adapters, quantisation
    wiring                  attention kernels, masks and caches
    checkpoint              blocks are checkpointed
    every_n_layers          only the first of every n layers is checkpointed; the last if `checkpoints_last`
    saves_products          what checkpoints keep, as in `memplan.engine.operation_facts.saved_operations`
    loss                    the kind of loss (see `memplan.catalogue.kernels.losses.attach`)
    hold_outputs            a variable of the script holds the model's outputs through backward
    adds_in_place           the fused loss accumulates its weight gradient in place
    rank                    rank of the adapters
    trainable_layers        last layers that train with method `freeze`; 0 for other methods
    reentrant               checkpointing is reentrant
    logits                  version of transformers' loss (see `memplan.catalogue.kernels.losses.cross_entropy`)
    has_one_sequence        the batch is one sequence, if the loss treats that case differently
    loss_chunks             chunks of a loss computed in chunks (see `memplan.catalogue.kernels.losses`)
    fused                   names of the fused kernels
    casts_outputs           the model's output is cast to fp32
    code                    library that implements the model: transformers, litgpt, torchtitan
    holds_previous_outputs  the parts of one pass that the next still references: its `outputs`, until it has its
                            own, or its outputs and loss with their `graph`
    input_requires_grad     the embeddings' output requires grad, as checkpointing makes it
    to_host                 the inputs of checkpointed blocks are kept in host memory
    saves                   how the tensors that autograd saves are kept in host memory, if they are
    degrees                 the part of the model and of the sequence that one rank computes
    keeps_sent              a pipeline stage's output stays alive until its backward
    moves_sent              a pipeline stage's output is copied to another GPU of the same process
    inference               the kind of pass if nothing trains, else None
    flattens_frozen         frozen weights share a flat parameter with adapters, so autograd computes their gradients
                            too
    placed                  device of each module, if one process spreads them over several GPUs or the host
    trainer                 the trainer of TRL that computes the loss, with its reference; None for the model's own loss
    roles                   other models by role, not made of this one; a `value` model trains with it
    """

    model: ModelSpec
    recipe: Recipe
    wiring: Wiring
    checkpoint: bool
    loss: str
    hold_outputs: bool
    adds_in_place: bool
    rank: int
    trainable_layers: int
    reentrant: bool = False
    logits: str = "padded"
    has_one_sequence: bool = False
    loss_chunks: int = 0
    fused: tuple[str, ...] = ()
    casts_outputs: bool = False
    code: str = "transformers"
    holds_previous_outputs: Literal["", "outputs", "returned", "graph"] = ""
    input_requires_grad: bool = False
    to_host: bool = False
    saves: SavedTensors | None = None
    degrees: Degrees = WHOLE
    keeps_sent: bool = False
    moves_sent: bool = False
    inference: Pass | None = None
    flattens_frozen: bool = False
    placed: ModulePlacement | None = None
    trainer: Trainer | None = None
    roles: tuple[tuple[str, Graph], ...] = ()
    every_n_layers: int = 1
    checkpoints_last: bool = False
    saves_products: str = ""


class TensorGroup(NamedTuple):
    """Tensors of one kind that stay allocated between operations: parameters, buffers, gradients, optimizer states.

    kind    parameter, buffer, gradient, optstate, activation, temp or other
    what    name of the tensor
    where   block it belongs to, empty outside of blocks
    shape   axes or numbers, separated by spaces
    dtype   memplan's name of the dtype
    copies  how many there are
    bytes   bytes of one copy
    source  where the facts come from
    """

    kind: str
    what: str
    where: str
    shape: str
    dtype: str
    copies: int
    bytes: int
    source: str


NO_AXES: Mapping[str, int] = MappingProxyType({})


def tensor_group(
    kind: str,
    what: str,
    shape: str | int,
    dtype: str,
    source: str,
    where: str = "",
    copies: int = 1,
    axes: Mapping[str, int] = NO_AXES,
) -> TensorGroup:
    """Return a group of tensors of a shape, or of a number of elements. `axes` are the sizes of the shape's axes."""
    shape = str(shape)
    return TensorGroup(kind, what, where, shape, dtype, copies, size(shape, dtype, axes)[1], source)


def total_bytes(groups: Iterable[TensorGroup]) -> int:
    """Return the bytes of all tensors of the groups."""
    return sum(group.bytes * group.copies for group in groups)


def bytes_of_kinds(groups: Iterable[TensorGroup]) -> Counter[str]:
    """Return the bytes of each kind of tensor."""
    out: Counter[str] = Counter()
    for group in groups:
        out[group.kind] += group.bytes * group.copies
    return out


_ANY_RANK = 0  # adapters of every rank run the same operations, so all ranks share one lowering


@lru_cache(maxsize=128)
@without_collection
def operations_of(graph: Graph) -> tuple[Stack, dict[str, int]]:
    """Return the model's operations as the method trains them, with the loss, and the sizes of the model's axes.

    Raises InternalError if an operation reads a tensor that no earlier one writes, a mistake in the catalogue.
    """
    if graph.placed is not None and graph.placed.card:  # every GPU has the same operations; only the axes differ
        stack, axes = operations_of(_on_first_gpu(graph))
        return stack, {**axes, **axes_of(graph.placed)}
    alike = _with_equal_operations(graph)
    if alike != graph:
        stack, axes = operations_of(alike)
        return by_name(stack) if graph.wiring.by_name else stack, {**axes, "r": graph.rank}
    stack, axes = _built(graph)
    return checked(stack, graph.model.model_type), axes


def _with_equal_operations(graph: Graph) -> Graph:
    """Return the graph of all whose operations differ in the rank of adapters, an axis, or in how blocks are called."""
    wiring = graph.wiring._replace(by_name=graph.wiring.by_name and graph.trainer is not None)
    return graph._replace(
        wiring=wiring,
        recipe=graph.recipe._replace(decomposition=""),
        rank=_ANY_RANK,
        checkpoint=graph.checkpoint and graph.every_n_layers > 1,  # which makes blocks of several kinds
        reentrant=False,
        input_requires_grad=False,
        to_host=False,
        saves=None,
        saves_products="",
        holds_previous_outputs="",
    )


def _built(graph: Graph) -> tuple[Stack, dict[str, int]]:  # noqa: PLR0912 (a branch for each rewrite)
    if graph.degrees.pp > 1:
        return _stage(graph)
    recipe, model, degrees = graph.recipe, graph.model, graph.degrees
    if graph.inference is not None:
        model, recipe = without_dropout(model), recipe.by_rows() if graph.inference.few_rows else recipe
    part: dict[str, int] = {}
    if degrees.tp > 1:
        part = tensor_parallel.local_expert_axes(model, degrees)
        model = tensor_parallel.local_model(model, degrees)
    if max(degrees.ep, degrees.etp, degrees.tp) > 1 and megatron.has_experts(model):
        model = megatron.with_divided_experts(model, degrees)
    axes = {**model.axes(), **part, "r": graph.rank}
    if graph.trainer is not None and graph.trainer.name == "reward":
        axes["c"] = 1  # a score
    stack = fuse(build(model, graph.wiring, graph.code), graph.fused)
    if graph.wiring.tables:
        stack = own_tables(stack, model.max_position_embeddings or 2048, recipe.weights, graph.wiring.tables)
    stack = by_name(stack) if graph.wiring.by_name else stack
    if graph.trainable_layers:
        stack, axes = freeze(stack, axes, graph.trainable_layers)
    if recipe.selection is not None:
        stack, axes = recipe.selection.marked(stack, axes)
    if graph.every_n_layers > 1 and graph.checkpoint:
        stack, axes = checkpoint_every(stack, axes, graph.every_n_layers, graph.checkpoints_last)
    stack = apply(stack, recipe, axes, graph.inference is not None and graph.inference.keeps_skipped_casts)
    stack, axes = with_shadow(stack, axes, model, graph.wiring, recipe, graph.inference is None)
    if graph.flattens_frozen:
        stack = rewrite_blocks(stack, with_all_gradients)
    if degrees.tp > 1:
        stack = tensor_parallel.divide(stack, model, degrees, records=graph.inference is None)
    if degrees.ep > 1 and not model.is_megatron:
        stack = expert_parallel.divide(stack, degrees)
    if degrees.cp > 1:
        heads = (graph.model.num_attention_heads, graph.model.num_key_value_heads)
        stack = (
            (megatron.exchanged_heads if degrees.context == "ulysses" else megatron.ring_attention)(stack, degrees)
            if model.is_megatron
            else context_parallel.with_context_parallelism(stack, degrees, heads)
        )
    weights = [w for op in operations(stack) for w in op.weights]
    axes |= {
        fp8_chunk(w): fp8_experts_at_once(elements(w, axes), axes["E"], ITEMSIZE[recipe.compute])
        for w in weights
        if w.stacked and w.stored and not recipe.experts
    }
    axes |= {chunk_of(w): bytes_at_once(elements(w, axes)) for w in weights if w.kernel}
    stack = with_held_outputs(stack) if graph.hold_outputs else stack
    autocast = recipe.compute if recipe.autocast else None
    if graph.trainer is not None:
        others, numbers = _models_inside(graph)
        stack, axes = with_trainer(stack, graph.trainer, others, autocast), axes | numbers
        return (stack if graph.inference is None else evaluation(stack, graph.inference, returns=False)), axes
    if graph.inference is not None and not graph.inference.evaluates:
        backend = graph.inference.loaded.backend
        if backend:
            stack = with_buffers(stack, backend, (w for op in operations(stack) for w in op.weights), axes)
        if graph.inference.unpacks:
            stack = unpacked(stack, backend)
        stack = inference(stack, graph.inference)
        if graph.inference.cache.startswith("offloaded"):
            return offloaded(stack, axes, recipe.compute)
        return (stack, axes) if graph.placed is None else place_operations(stack, axes, graph.placed)
    stack = losses.attach(
        stack,
        graph.loss,
        graph.hold_outputs or graph.keeps_sent,
        autocast,
        graph.adds_in_place,
        graph.logits,
        graph.has_one_sequence,
        "cross_entropy" in graph.fused,
        graph.casts_outputs,
        graph.loss_chunks,
    )
    if graph.wiring.keeps_last and stack.after:
        stack = stack._replace(after=with_last_input(stack.after))
    if graph.loss == "hf":
        stack = with_own_loss(stack, recipe.kind, graph.has_one_sequence, graph.inference is None)
    return (stack if graph.inference is None else evaluation(stack, graph.inference)), axes


def _models_inside(graph: Graph) -> tuple[dict[str, Stack], dict[str, int]]:
    """Return the operations of the models that run inside a trainer's step, by phase, and the axes of other models."""
    loops = graph.trainer is not None and TRAINERS[graph.trainer.name].own_loop  # its reference runs before the step
    own = () if loops else (("reference", reference_of(graph)), ("forward", first_pass_of(graph)))
    stacks = {phase: operations_of(other)[0] for phase, other in own if other is not None}
    found = {role: operations_of(other) for role, other in graph.roles}
    stacks |= {role: with_own_axes(found[role][0], role) for role, other in graph.roles if other.trainer}
    return stacks, {axis: n for role, (_, sizes) in found.items() for axis, n in own_sizes(sizes, role).items()}


@lru_cache(maxsize=128)
def reference_of(graph: Graph) -> Graph | None:
    """Return the graph of the reference in a trainer's step, if there is one: a copy, or the model without adapters."""
    trainer = graph.trainer
    if trainer is None or not trainer.has_reference_pass:
        return None
    recipe, is_copy = graph.recipe, trainer.reference == "copy"
    if ((has_adapters := recipe.kind in ADAPTERS) or not trainer.trains_copy) and not trainer.copies_adapters:
        recipe = recipe._replace(kind=recipe.kind if has_adapters else "lora", targets=(), saved=(), selection=None)
        recipe = recipe._replace(bias="none", tokens=0, fused="")
    if is_copy:
        dtype = recipe.compute if trainer.copy_dtype == "compute" else recipe.weights
        recipe = recipe._replace(autocast=recipe.autocast and not trainer.shards_copy, preparation="", weights=dtype)
    graph = without_gradients(graph._replace(recipe=recipe))
    one_pass, wiring = Pass("reference", "dynamic", last_only=False), graph.wiring._replace(caching=True)
    return graph._replace(wiring=wiring, inference=one_pass) if trainer.caches_copy else graph


@lru_cache(maxsize=128)
def first_pass_of(graph: Graph) -> Graph | None:
    """Return the graph of the model's own first pass without gradients, if a trainer's step has one."""
    return without_gradients(graph) if graph.trainer is not None and graph.trainer.has_first_pass else None


def without_gradients(graph: Graph) -> Graph:
    """Return the graph of a trainer's model as it runs without gradients."""
    assert graph.trainer is not None
    return graph._replace(
        recipe=graph.recipe._replace(dropout=False, **graph.trainer.scoring),
        wiring=graph.wiring._replace(records=False, caches=False, checkpoints=False),
        checkpoint=False,
        input_requires_grad=False,
        hold_outputs=False,
        trainer=graph.trainer._replace(is_reference=True),
        roles=(),
    )


def reference_copy(graph: Graph) -> Graph | None:
    """Return the graph of the reference model if it is a copy, with weights of its own."""
    return reference_of(graph) if graph.trainer is not None and graph.trainer.reference == "copy" else None


def other_models(graph: Graph) -> tuple[tuple[str, Graph], ...]:
    """Return the models that are on the GPU in addition to the run's, by role, with weights of their own."""
    copy, others = reference_copy(graph), tuple(role for role in graph.roles if role[0] != "value")
    return others if copy is None else (("reference", copy), *others)


def is_optimized(w: Weight, graph: Graph) -> bool:
    """Whether the weight is passed to the optimizer."""
    return w.trains and (w.group == "adapter" or not graph.flattens_frozen)


def _whole_model(graph: Graph) -> Graph:
    """Return the graph of the whole model, before it is split into pipeline stages."""
    return graph._replace(degrees=graph.degrees.without_pipeline)


def _stage(graph: Graph) -> tuple[Stack, dict[str, int]]:
    """Return the operations and axes of one rank of a pipeline."""
    stack, axes = operations_of(_whole_model(graph))
    layers, stages = graph.degrees.layers, tuple(chunk.stage for chunk in graph.degrees.chunks)
    if pipeline_stages.cannot_be_staged(stack) or sum(layers) != pipeline_stages.depth_of(stack, axes):
        raise refused("parallelism.pp", f"stages of {graph.model.model_type} models are not supported yet")
    return pipeline_stages.stage_stack(
        stack, axes, layers, stages, *stage_boundaries(graph), graph.keeps_sent, graph.moves_sent
    )


@lru_cache(maxsize=512)
def stage_boundaries(graph: Graph) -> tuple[Tensor | None, Tensor | None]:
    """Return the hidden states that a pipeline stage receives and sends; None at the ends of the pipeline."""
    stack, axes = operations_of(_whole_model(graph))
    layers, stages = graph.degrees.layers, [chunk.stage for chunk in graph.degrees.chunks]

    def stream(until: int) -> Tensor:
        upto, numbers = pipeline_stages.first_layers(stack, axes, until)
        return stream_of(upto, _options(graph).autocast, {run.times: numbers[run.times] for run in upto.runs})

    received = stream(sum(layers[: stages[0]])) if stages[0] else None
    sent = stream(sum(layers[: stages[-1] + 1])) if stages[-1] < len(layers) - 1 else None
    return received, sent


@lru_cache(maxsize=512)
def shared_buffers(graph: Graph) -> tuple[Tensor, ...]:
    """Return the buffers that all passes of a pipeline rank share, with the axis of layers cut to the rank's own."""
    stack, _ = operations_of(_whole_model(graph))
    autocast, d = _options(graph).autocast, graph.degrees
    layers = str(sum(d.layers[d.stage :: d.pp]))
    buffers = (t for op in pipeline_stages.lasting_buffers(stack) for t in made_by(op, stack, autocast))
    return tuple(t._replace(shape=" ".join(layers if a == "L" else a for a in t.shape.split())) for t in buffers)


@lru_cache(maxsize=128)
def first_equal_stage(graph: Graph) -> Graph:
    """Return the graph of the first pipeline stage with the same layers, so that equal stages share one lowering."""
    degrees = graph.degrees
    layers = degrees.layers
    if degrees.pp == 1 or degrees.virtual_stages > 1 or degrees.stage in (0, degrees.pp - 1):
        return graph
    whole, axes = operations_of(_whole_model(graph))
    kinds = [id(block) for run in whole.runs for _ in range(axes[run.times]) for block in run.blocks]

    def kinds_of(stage: int) -> list[int]:
        start = sum(layers[:stage])
        return kinds[start - 1 : start + layers[stage]]  # the layer before decides which tensor the stage receives

    first = next(stage for stage in range(1, degrees.stage + 1) if kinds_of(stage) == kinds_of(degrees.stage))
    return graph._replace(degrees=degrees._replace(stage=first))


class TrainingPass(NamedTuple):
    """The facts that decide the moments of a training pass, in addition to its graph.

    grads_exist  the pass leaves no new gradients: they exist already, or each is consumed as soon as it is computed
    updates      bytes that an update inside backward takes in addition to the gradient, by the weight's path
    follows      what the training loop still references of the pass before it, as in `Graph.holds_previous_outputs`
    division     how weights are divided among ranks
    """

    grads_exist: bool = False
    updates: tuple[tuple[str, int], ...] = ()
    follows: Literal["", "outputs", "returned", "graph"] = ""
    division: Division | None = None


def lower_training(graph: Graph, options: TrainingPass = TrainingPass()) -> Lowered:  # noqa: B008 (immutable)
    """Return the graph's moments, with tensors counted by name."""
    return _lowered(first_equal_stage(graph)._replace(rank=_ANY_RANK), options)


@lru_cache(maxsize=128)
def _lowered(graph: Graph, options: TrainingPass) -> Lowered:
    if options.division is not None:
        division, numbers = options.division.with_axes()
        if numbers:  # one lowering serves any number of ranks
            low = _lowered(graph, options._replace(division=division))
            return low._replace(sizes=_in_numbers(low.sizes, numbers))
    stack, depth = _stack(graph)
    return lower(
        stack,
        depth,
        _options(graph),
        grads_exist=options.grads_exist,
        labelled=True,
        updates=dict(options.updates),
        holds_previous=options.follows,
        division=options.division,
    )


def record_training(graph: Graph, options: TrainingPass, late: frozenset[str], labels: bool = False) -> AllocationTrace:
    """Return the graph's allocations and frees in order. `late`, and `labels` (`labelled`), as of `record`."""
    return _recorded(first_equal_stage(graph)._replace(rank=_ANY_RANK), options._replace(follows=""), late, labels)


@lru_cache(maxsize=16)  # what is replayed is kept by `steps_of`
@without_collection
def _recorded(graph: Graph, options: TrainingPass, late: frozenset[str], labelled: bool) -> AllocationTrace:
    if options.division is not None:
        division, numbers = options.division.with_axes()
        if numbers:
            recording = _recorded(graph, options._replace(division=division), late, labelled)
            return recording.with_sizes(_in_numbers(recording.sizes, numbers))
    stack, depth = _stack(graph)
    exist, updates, parts = options.grads_exist, dict(options.updates), options.division
    return record(
        stack, depth, _options(graph), grads_exist=exist, updates=updates, division=parts, late=late, labelled=labelled
    )


def _in_numbers(sizes: Iterable[tuple[str, ...]], numbers: Mapping[str, str]) -> tuple[tuple[str, ...], ...]:
    """Return the sizes of a lowering or a recording with the axes of its division in numbers."""
    return tuple((numbers.get(shape, shape), *rest) for shape, *rest in sizes)


def lower_inference(graph: Graph, labelled: bool = False, division: Division | None = None) -> Lowered:
    """Return the moments of an inference pass. `division` says how weights are divided among ranks."""
    return _inferred(_on_first_gpu(graph), labelled, division)


def _on_first_gpu(graph: Graph) -> Graph:
    """Return the graph with its GPU number cleared, so that all GPUs share one lowering."""
    return graph if graph.placed is None else graph._replace(placed=graph.placed._replace(card=0))


@lru_cache(maxsize=128)
def _inferred(graph: Graph, labelled: bool, division: Division | None) -> Lowered:
    stack, depth = _stack(graph)
    phase = graph.inference.phase if graph.inference else ""
    return infer(stack, depth, _options(graph).autocast, phase, labelled, division, _casts(graph))


def recorded_inference(graph: Graph, division: Division | None = None) -> AllocationTrace:
    """Return the allocations and frees of an inference pass, in order."""
    return _recorded_inference(graph, division) if graph.placed is None else _recorded_on_gpu(graph, division)


@lru_cache(maxsize=64)
@without_collection
def _recorded_on_gpu(graph: Graph, division: Division | None) -> AllocationTrace:
    """Return the allocations and frees of one pass that fall on the graph's GPU."""
    assert graph.placed is not None
    recording = _recorded_inference(_on_first_gpu(graph), division)
    axis = axis_of(graph.placed.card)
    other_keys = {key for key, size_ in enumerate(recording.sizes) if size_[0].split()[:1] != [axis]}
    events = [*recording.unrolled()]
    elsewhere = {number for number, key in events if key in other_keys}
    here = (event for event in events if event[0] not in elsewhere)
    return AllocationTrace(recording.sizes, recording.streams, recording.storages, here)


@lru_cache(maxsize=64)
@without_collection
def _recorded_inference(graph: Graph, division: Division | None) -> AllocationTrace:
    stack, depth = _stack(graph)
    return record_inference(stack, depth, _options(graph).autocast, division, _casts(graph))


def _casts(graph: Graph) -> str:
    """Return the state of autocast's weight casts, which one context around all passes keeps from the first on:
    `made` in the first, `there` in later ones, empty without such a context."""
    now = graph.inference
    return "" if now is None or not now.spans_autocast else "there" if now.extends else "made"


@lru_cache(maxsize=64)
def work_of_pass(graph: Graph) -> tuple[Call, ...]:
    """Return the matrix products and other work of one forward and backward pass, in order."""
    stack, depth = _stack(graph)
    return work(stack, depth, _options(graph))


def _options(graph: Graph) -> ExecutionOptions:
    return ExecutionOptions(
        autocast=graph.recipe.compute if graph.recipe.autocast else None,
        checkpoint=graph.checkpoint,
        reentrant=graph.reentrant,
        input_grad=graph.input_requires_grad,
        to_host=graph.to_host,
        saves=graph.saves,
        saves_products=graph.saves_products,
    )


def _stack(graph: Graph) -> tuple[Stack, dict[str, int]]:
    """Return the graph's operations, and the number of copies of each run of blocks."""
    stack, axes = operations_of(graph)
    inside = [op.model for op in operations(stack) if op.model is not None] if graph.trainer else ()
    return stack, {run.times: axes[run.times] for each in (stack, *inside) for run in each.runs}


@lru_cache(maxsize=128)
def weights_of(graph: Graph) -> tuple[tuple[Weight, int, str], ...]:
    """Return every distinct weight, the number of layers that have one like it, and the prefix of its block."""
    stack, axes = operations_of(graph)
    groups: list[tuple[tuple[Op, ...], int, str]] = [(stack.before, 1, "")]
    for run in stack.runs:
        groups.append((run.before, 1, ""))
        groups += [(b.ops, axes[run.times], f"{b.name}.") for b in run.blocks]
    groups.append(((*stack.after, *stack.loss), 1, ""))
    outside: set[str] = set()
    weights: list[tuple[Weight, int, str]] = []
    for ops, count, where in groups:
        seen = outside if not where else set[str]()
        for op in ops:
            for w in op.weights:
                if w.name not in seen:
                    seen.add(w.name)
                    weights.append((w, count, where))
    return tuple(weights)


@lru_cache(maxsize=128)
def parameters_of(graph: Graph) -> tuple[TensorGroup, ...]:
    """Return the stored tensors of every weight, the model's buffers, and what quantising them leaves."""
    (_, axes), running = operations_of(graph), graph.recipe.running
    codes = () if graph.recipe.packed else codes_of_scales(w for w, _, _ in weights_of(graph))
    source = f"{BNB} quantize_blockwise"
    groups = [tensor_group("buffer", "codes of scales", t.shape, t.dtype, source, axes=axes) for t in codes]
    for w, count, block in weights_of(graph):
        source = running.of(w).source if running and w.kernel else storage_of(w) if w.stored else "the model's config"
        kind, where = "buffer" if w.group == "buffer" else "parameter", block.rstrip(".")
        for t in w.stored or (Tensor("", w.shape, w.dtype),):
            what = f"{w.name} ({t.name})" if t.name else w.name
            groups.append(tensor_group(kind, what, t.shape, t.dtype, source, where, count, axes))
    return tuple(groups)
