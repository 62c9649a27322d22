"""A run's graph: one model, method and set of kernels as operations, and lowered to moments. No batch, no optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, TypedDict, cast

from memplan.catalogue import build
from memplan.catalogue.attention.old_rotary_tables import own_tables
from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.catalogue.families import megatron
from memplan.catalogue.inference.decoding import evaluation, inference
from memplan.catalogue.inference.offloaded_caches import offloaded
from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels import losses
from memplan.catalogue.kernels.fused import fuse
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.methods import Recipe, apply, freeze
from memplan.catalogue.parallelism import context_parallel, expert_parallel, pipeline, tensor_parallel
from memplan.catalogue.parallelism.device_maps import Placed, axes_of, axis_of, placed
from memplan.catalogue.quantization.inference_formats import bytes_at_once, chunk_of
from memplan.catalogue.quantization.packed_kernels import unpacked, with_buffers
from memplan.catalogue.quantization.quantization import fp8_chunk, fp8_experts_at_once, storage_of
from memplan.core.errors import InternalError, SpecError
from memplan.core.ir import Block, Division, Op, SavedTensors, Stack, Tensor, Weight, operations, unwritten
from memplan.core.units import ITEMSIZE
from memplan.engine.record import Recorded, Stretch, record, record_inference
from memplan.engine.step import Lowered, infer, lower, made_by, stream_of
from memplan.engine.walk import shared, size
from memplan.engine.work import Call, work
from memplan.models.model import ModelSpec


class Graph(NamedTuple):
    """What decides which operations a forward and a backward pass run, and what they keep.

    `reentrant` is how blocks are checkpointed; `logits` how transformers' loss was written, and `single` whether it is
    of a single sequence, where that matters (see `memplan.catalogue.kernels.losses.cross_entropy`); `short`: a loss in
    chunks of tokens has one chunk only; `fused` the kernels that stand in for several; `converts`: what the model
    returns is cast to fp32; `code` whose model it is; `lingers`: what a pass held stays into the next one; `leaf`: the
    embeddings' output asks for a gradient, as checkpointing has it; `to_host`: a checkpointed block's input is kept in
    host memory, `saves`: whatever autograd saves; `degrees` the part of it that one rank computes; `keeps_sent`: what a
    stage hands on stays until its backward, `moves_sent`: it is copied to another GPU of the process; `inference`: the
    pass it is, where nothing trains; `placed`: where its modules are, on several GPUs of one process or on the host;
    `joined`: gradients are made of what is frozen beside adapters in a block, as they lie in one flat parameter.
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
    single: bool = False
    short: bool = False
    fused: tuple[str, ...] = ()
    converts: bool = False
    code: str = "transformers"
    lingers: bool = False
    leaf: bool = False
    to_host: bool = False
    saves: SavedTensors | None = None
    degrees: Degrees = WHOLE
    keeps_sent: bool = False
    moves_sent: bool = False
    inference: Pass | None = None
    joined: bool = False
    placed: Placed | None = None


class Held(NamedTuple):
    """Tensors that are there throughout: parameters, buffers, gradients, optimizer states, by what they are."""

    kind: str
    what: str
    where: str
    shape: str
    dtype: str
    copies: int
    bytes: int
    source: str


_ANY_RANK = 0  # of a graph whose structure is asked for: adapters of every rank run the same operations


@lru_cache(maxsize=128)
def built(graph: Graph) -> tuple[Stack, dict[str, int]]:
    """The model's operations as the method trains them, with the loss; and the axes with the model's numbers.

    Raises InternalError if an operation uses a tensor that nothing before it writes, a mistake in the catalogue.
    """
    stack, axes = _built(graph)
    missing = next(unwritten(stack), None)
    if missing is not None:
        where, operation, name = missing
        raise InternalError(f"in {graph.model.model_type} {where}, {operation} uses {name}, which nothing writes")
    return stack, axes


def _built(graph: Graph) -> tuple[Stack, dict[str, int]]:
    if graph.degrees.pp > 1:
        return _stage(graph)
    if graph.placed is not None and graph.placed.card:  # the same operations, of another GPU's tensors
        stack, axes = built(_of_any_card(graph))
        return stack, {**axes, **axes_of(graph.placed)}
    recipe, model, degrees = graph.recipe, graph.model, graph.degrees
    if graph.inference is not None:
        model = undropped(model)
    part: dict[str, int] = {}
    if degrees.tp > 1:
        part = tensor_parallel.axes_of_part(model, degrees)
        model = tensor_parallel.part_of(model, degrees)
    if megatron.has_experts(model) and max(degrees.ep, degrees.etp, degrees.tp) > 1:
        model = megatron.part_of_experts(model, degrees)
    axes = {**model.axes(), **part, "r": graph.rank}
    stack = fuse(build(model, graph.wiring, graph.code), graph.fused)
    if graph.wiring.tables:
        stack = own_tables(stack, model.max_position_embeddings or 2048, recipe.weights, graph.wiring.tables)
    if graph.wiring.by_name:
        named = (r._replace(blocks=tuple(b._replace(by_name=True) for b in r.blocks)) for r in stack.runs)
        stack = stack._replace(runs=tuple(named))
    if graph.trainable_layers:
        stack, axes = freeze(stack, axes, graph.trainable_layers)
    stack = apply(stack, recipe)
    if graph.joined:
        stack = stack._replace(runs=tuple(r._replace(blocks=tuple(map(_joined, r.blocks))) for r in stack.runs))
    if degrees.tp > 1:
        stack = tensor_parallel.divide(stack, model.model_type, degrees, records=graph.inference is None)
    own = model.model_type == megatron.KIND
    if degrees.ep > 1 and not own:
        stack = expert_parallel.divide(stack, degrees)
    if degrees.cp > 1:
        heads = (graph.model.num_attention_heads, graph.model.num_key_value_heads)
        stack = megatron.around(stack, degrees) if own else context_parallel.around(stack, degrees, heads)
    axes |= {
        fp8_chunk(w): fp8_experts_at_once(elements(w, axes), axes["E"], ITEMSIZE[recipe.compute])
        for op in operations(stack)
        for w in op.weights
        if w.stacked and w.stored
    }
    axes |= {chunk_of(w): bytes_at_once(elements(w, axes)) for op in operations(stack) for w in op.weights if w.kernel}
    if graph.hold_outputs:
        stack = rewrite(stack, lambda op: (op._replace(holds="step") if op.holds == "forward" else op,))
    autocast = recipe.compute if recipe.autocast else None
    if graph.inference is not None and not graph.inference.evaluates:
        backend = graph.inference.loaded.backend
        if backend:
            stack = with_buffers(stack, backend, (w for op in operations(stack) for w in op.weights), axes)
        if graph.inference.unpacks:
            stack = unpacked(stack, backend)
        stack = inference(stack, graph.inference)
        if graph.inference.cache.startswith("offloaded"):
            return offloaded(stack, axes, recipe.compute)
        return (stack, axes) if graph.placed is None else placed(stack, axes, graph.placed)
    stack = losses.attach(
        stack,
        graph.loss,
        graph.hold_outputs or graph.keeps_sent,
        autocast,
        graph.adds_in_place,
        graph.logits,
        graph.single,
        "cross_entropy" in graph.fused,
        graph.converts,
        graph.short,
    )
    return (stack if graph.inference is None else evaluation(stack, graph.inference)), axes


@lru_cache(maxsize=128)
def undropped(model: ModelSpec) -> ModelSpec:
    """The model as it is where nothing is dropped: in evaluation."""

    def zeroed(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: zeroed(cast(Mapping[str, Any], value))
            if isinstance(value, Mapping)
            else 0.0
            if isinstance(value, (int, float)) and value and ("dropout" in key or "pdrop" in key)
            else value
            for key, value in config.items()
        }

    config = zeroed(model.config)
    return model if config == model.config else ModelSpec(config, model.name, model.card, model.checkpoint)


def _joined(block: Block) -> Block:
    """A block that autograd makes the gradients of all weights of."""

    def trains(op: Op) -> Op:
        return op._replace(weights=tuple(w if w.group == "buffer" else w._replace(trains=True) for w in op.weights))

    return block._replace(ops=tuple(map(trains, block.ops)))


def optimized(w: Weight, graph: Graph) -> bool:
    """Whether the optimizer is given a weight."""
    return w.trains and (w.group == "adapter" or not graph.joined)


def _unstaged(graph: Graph) -> Graph:
    """The graph with all layers, which a pipeline's stages divide."""
    return graph._replace(degrees=graph.degrees.of_all_layers)


def _stage(graph: Graph) -> tuple[Stack, dict[str, int]]:
    """The stack of one rank of a pipeline."""
    stack, axes = built(_unstaged(graph))
    layers, stages = graph.degrees.layers, tuple(chunk.stage for chunk in graph.degrees.chunks)
    if pipeline.unstageable(stack) or sum(layers) != pipeline.depth_of(stack, axes):
        field = "parallelism.pp"
        raise SpecError(f"{field}: stages of {graph.model.model_type} models are not supported yet", field)

    return pipeline.staged(stack, axes, layers, stages, *handed_on(graph), graph.keeps_sent, graph.moves_sent)


@lru_cache(maxsize=512)
def handed_on(graph: Graph) -> tuple[Tensor | None, Tensor | None]:
    """What a pipeline's stage is given, and what it hands on."""
    stack, axes = built(_unstaged(graph))
    layers, stages = graph.degrees.layers, [chunk.stage for chunk in graph.degrees.chunks]

    def stream(until: int) -> Tensor:
        upto, numbers = pipeline.until(stack, axes, until)
        return stream_of(upto, _ways(graph)["autocast"], {run.times: numbers[run.times] for run in upto.runs})

    received = stream(sum(layers[: stages[0]])) if stages[0] else None
    sent = stream(sum(layers[: stages[-1] + 1])) if stages[-1] < len(layers) - 1 else None
    return received, sent


@lru_cache(maxsize=512)
def shared_buffers(graph: Graph) -> tuple[Tensor, ...]:
    """The buffers that all passes of a pipeline's rank share; where every layer has one, those of the rank's layers."""
    stack, _ = built(_unstaged(graph))
    autocast, d = _ways(graph)["autocast"], graph.degrees
    own = str(sum(d.layers[d.stage :: d.pp]))
    made = (t for op in pipeline.lasting_buffers(stack) for t in made_by(op, stack, autocast))
    return tuple(t._replace(shape=" ".join(own if a == "L" else a for a in t.shape.split())) for t in made)


@lru_cache(maxsize=512)
def first_alike(graph: Graph) -> Graph:
    """The graph of the pipeline's first stage that is as this one's, so that equal stages are lowered once."""
    degrees = graph.degrees
    layers = degrees.layers
    if degrees.pp == 1 or degrees.virtual_stages > 1 or degrees.stage in (0, degrees.pp - 1):
        return graph
    whole, axes = built(_unstaged(graph))
    kinds = [id(block) for run in whole.runs for _ in range(axes[run.times]) for block in run.blocks]

    def of(stage: int) -> list[int]:
        start = sum(layers[:stage])
        return kinds[start - 1 : start + layers[stage]]  # with the layer before, which decides what is received

    alike = next(stage for stage in range(1, degrees.stage + 1) if of(stage) == of(degrees.stage))
    return graph._replace(degrees=degrees._replace(stage=alike))


def lowered(
    graph: Graph,
    grads_exist: bool = False,
    updates: tuple[tuple[str, int], ...] = (),
    follows: bool = False,
    division: Division | None = None,
) -> Lowered:
    """The graph's moments, with every tensor counted by its name. `grads_exist`: no gradient is left behind that was
    not there, because all are there already, or each is used up as it comes, by an update that takes `updates` bytes
    beside it. `follows`: another pass has been before, and the loop may still have names for it. `division`: the
    weights are divided among ranks."""
    return _lowered(
        first_alike(graph)._replace(rank=_ANY_RANK), grads_exist, updates, graph.lingers and follows, division
    )


@lru_cache(maxsize=128)
def _lowered(
    graph: Graph,
    grads_exist: bool,
    updates: tuple[tuple[str, int], ...],
    lingers: bool,
    division: Division | None,
) -> Lowered:
    stack, depth = _stack(graph)
    return lower(
        stack,
        depth,
        **_ways(graph),
        grads_exist=grads_exist,
        labelled=True,
        updates=dict(updates),
        lingers=lingers,
        division=division,
    )


def recorded(
    graph: Graph,
    grads_exist: bool = False,
    updates: tuple[tuple[str, int], ...] = (),
    division: Division | None = None,
    late: frozenset[str] = frozenset(),
) -> Recorded:
    """The graph's allocations and frees in order. The arguments are those of `lowered`, and `late` of `record`."""
    return _recorded(first_alike(graph)._replace(rank=_ANY_RANK), grads_exist, updates, division, late)


@lru_cache(maxsize=64)
def _recorded(
    graph: Graph,
    grads_exist: bool,
    updates: tuple[tuple[str, int], ...],
    division: Division | None,
    late: frozenset[str],
) -> Recorded:
    stack, depth = _stack(graph)
    ways, exist = _ways(graph), grads_exist
    return record(stack, depth, **ways, grads_exist=exist, updates=dict(updates), division=division, late=late)


def inferred(graph: Graph, labelled: bool = False, division: Division | None = None) -> Lowered:
    """The moments of a pass of inference; `division`: the weights are divided among ranks."""
    return _inferred(_of_any_card(graph), labelled, division)


def _of_any_card(graph: Graph) -> Graph:
    """The graph as it is lowered for all GPUs that its modules are on."""
    return graph if graph.placed is None else graph._replace(placed=graph.placed._replace(card=0))


@lru_cache(maxsize=128)
def _inferred(graph: Graph, labelled: bool, division: Division | None) -> Lowered:
    stack, depth = _stack(graph)
    phase = graph.inference.phase if graph.inference else ""
    return infer(stack, depth, _ways(graph)["autocast"], phase, labelled, division, _casts(graph))


def recorded_inference(graph: Graph, division: Division | None = None) -> Recorded:
    """The allocations and frees of a pass of inference, in order."""
    return _recorded_inference(graph, division) if graph.placed is None else _recorded_on_card(graph, division)


@lru_cache(maxsize=64)
def _recorded_on_card(graph: Graph, division: Division | None) -> Recorded:
    """What of a pass is allocated and freed on the GPU that is asked about."""
    assert graph.placed is not None
    recording = _recorded_inference(_of_any_card(graph), division)
    here = axis_of(graph.placed.card)
    there = {key for key, size_ in enumerate(recording.sizes) if size_[0].split()[:1] != [here]}
    events = tuple(recording.events)
    gone = {number for number, key in events if key in there}
    return recording._replace(forward=(Stretch(tuple(event for event in events if event[0] not in gone)),))


@lru_cache(maxsize=64)
def _recorded_inference(graph: Graph, division: Division | None) -> Recorded:
    stack, depth = _stack(graph)
    return record_inference(stack, depth, _ways(graph)["autocast"], division, _casts(graph))


def _casts(graph: Graph) -> str:
    """Where autocast stands around all passes of a generation, it keeps its casts of weights from the prompt's on."""
    now = graph.inference
    return "" if now is None or not now.around else "there" if now.decodes else "made"


@lru_cache(maxsize=64)
def worked(graph: Graph) -> tuple[Call, ...]:
    """What one forward and backward pass of the graph computes, in order."""
    stack, depth = _stack(graph)
    return work(stack, depth, **_ways(graph))


class _Ways(TypedDict):
    """How a graph's passes are run, in the engine's words."""

    autocast: str | None
    checkpoint: bool
    reentrant: bool
    input_grad: bool
    to_host: bool
    saves: SavedTensors | None


def _ways(graph: Graph) -> _Ways:
    return {
        "autocast": graph.recipe.compute if graph.recipe.autocast else None,
        "checkpoint": graph.checkpoint,
        "reentrant": graph.reentrant,
        "input_grad": graph.leaf,
        "to_host": graph.to_host,
        "saves": graph.saves,
    }


def _stack(graph: Graph) -> tuple[Stack, dict[str, int]]:
    """The graph's operations, and how many copies each run of blocks has."""
    stack, axes = built(graph)
    return stack, {run.times: axes[run.times] for run in stack.runs}


def dims_of(w: Weight, axes: Mapping[str, int]) -> list[int]:
    return [int(t) if t.isdigit() else shared(t, axes) if "/" in t else axes[t] for t in w.shape.split()]


def elements(w: Weight, axes: Mapping[str, int]) -> int:
    """How many numbers a weight has."""
    return prod(dims_of(w, axes))


def active(w: Weight, axes: Mapping[str, int]) -> int:
    """How many of a weight's numbers a token uses."""
    if not w.chosen:
        return elements(w, axes)
    every, *rest = dims_of(w, axes)
    return min(every, axes[w.chosen]) * prod(rest)


def matrix_shape(w: Weight, axes: Mapping[str, int]) -> tuple[int, int]:
    """Rows and columns of a two-dimensional weight."""
    dims = dims_of(w, axes)
    return prod(dims[: w.rows]), prod(dims[w.rows :])


def shape_of(w: Weight, axes: Mapping[str, int]) -> tuple[int, ...]:
    """A weight's shape as torch has it."""
    dims = dims_of(w, axes)
    if w.stacked:
        return dims[0], prod(dims[1 : w.rows]), prod(dims[w.rows :])
    return matrix_shape(w, axes) if w.rows else (prod(dims),)


def weights_of(graph: Graph) -> Iterator[tuple[Weight, int, str]]:
    """Every weight once, with how many layers have one like it, and the block it is in."""
    stack, axes = built(graph)
    groups: list[tuple[tuple[Op, ...], int, str]] = [(stack.before, 1, "")]
    for run in stack.runs:
        groups.append((run.before, 1, ""))
        groups += [(b.ops, axes[run.times], f"{b.name}.") for b in run.blocks]
    groups.append(((*stack.after, *stack.loss), 1, ""))
    outside: set[str] = set()
    for some, count, where in groups:
        seen = outside if not where else set[str]()
        for op in some:
            for w in op.weights:
                if w.name not in seen:
                    seen.add(w.name)
                    yield w, count, where


def parameters_of(graph: Graph) -> Iterator[Held]:
    """The stored tensors of every weight, and the buffers of the model."""
    _, axes = built(graph)
    for w, count, where in weights_of(graph):
        for t in w.stored or (Tensor("", w.shape, w.dtype),):
            what = f"{w.name} ({t.name})" if t.name else w.name
            source = storage_of(w) if w.stored else "the model's config"
            if w.kernel and graph.recipe.running is not None:
                source = graph.recipe.running.of(w).source
            kind = "buffer" if w.group == "buffer" else "parameter"
            yield Held(kind, what, where.rstrip("."), t.shape, t.dtype, count, size(t.shape, t.dtype, axes)[1], source)
