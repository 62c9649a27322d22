"""The FSDP units that weights are gathered in, and the shards of them that one rank holds.

Bytes are of the rank that holds most, which is the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from math import prod

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.parallelism.sharding import aligned, part, rows_of
from memplan.core.ir import Division, Op, Tensor, Unit, Weight, operations, outside
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.gather import AFTER, BEFORE, OUTSIDE, REST, ROOT, TIED, left_whole, unit_of
from memplan.program.graph import Graph, is_optimized, operations_of, reference_copy
from memplan.program.sharding.ranks import Ranks, kept_dtype, sent_dtype, shape_in
from memplan.program.stack_facts import input_table, looked_up_weights, shared_tables, ties_head
from memplan.program.weight_sizes import elements


class Piece(NamedTuple):
    """Weights that are sharded together: a single weight, or for FSDP1 a flat parameter of several.

    name    name of the weight, or `flat parameter`
    unit    FSDP unit that the weights are gathered in
    where   block of the unit, empty outside of blocks
    copies  number of blocks like it
    shape   shape of the rank's part
    dtype   dtype of the rank's part
    whole   elements of the gathered weights, with padding
    own     elements of the gathered weights, without padding
    made    elements of the gradients that autograd computes
    sent    dtype that the weights are gathered in
    trains  the weights train
    pads    the flattened gradients are copied to be padded
    slices  FSDP1: name, elements and whether it is an embedding, of each weight's part that the optimizer sees
    alone   a nested unit, gathered for the operation that uses it
    module  path of a module of experts, which is a nested unit of its own
    """

    name: str
    unit: str
    where: str
    copies: int
    shape: tuple[int, ...]
    dtype: str
    whole: int
    own: int
    made: int
    sent: str
    trains: bool
    pads: bool
    slices: tuple[tuple[str, int, bool], ...] = ()
    alone: bool = False
    module: str = ""


@lru_cache(maxsize=256)
def pieces(graph: Graph, ranks: Ranks) -> tuple[Piece, ...]:
    """Return everything that is sharded, in the model's order.

    Under FSDP1 each adapter is a unit of its own.
    Source: peft 0.21 utils/other.py fsdp_auto_wrap_policy, which transformers' Trainer uses.
    """
    out: list[Piece] = []
    for unit, where, copies, weights in units_of(graph, ranks):
        flat = [w for w in weights if graph.flattens_frozen or w.group != "adapter"] if ranks.row.flat else []
        if flat:
            out.append(_piece(graph, ranks, unit, where, copies, "flat parameter", flat))
        separate = [w for w in weights if w not in flat]
        nested = ranks.row.flat
        expert_modules = _expert_modules(graph) if ranks.expert_replicas else ()
        for w in separate:
            module = w.name.rpartition(".")[0]
            if module in expert_modules:
                piece = _piece(graph, ranks._replace(world=ranks.expert_replicas), unit, where, copies, w.name, [w])
                out.append(piece._replace(module=module))
            else:
                out.append(_piece(graph, ranks, unit, where, copies, w.name, [w])._replace(alone=nested))
    return tuple(out)


@lru_cache(maxsize=256)
def _expert_modules(graph: Graph) -> tuple[str, ...]:
    """Return the paths of modules of experts, which lend their weights to other operations."""
    return tuple(dict.fromkeys(op.lends for op in operations(operations_of(graph)[0]) if op.lends))


def units_of(graph: Graph, ranks: Ranks) -> Iterator[tuple[str, str, int, list[Weight]]]:
    """Yield every FSDP unit: its name, the name of its block, the number of blocks like it, and its weights.

    FSDP1 puts all weights outside of blocks into one unit, but for a tower's stem that it wraps. FSDP2 makes one unit
    of the embedding table and one of the last norm and the head, or a single unit of all three if they are tied, unless
    its root has them. Other weights belong to the root.
    Source: accelerate 1.15 utils/fsdp_utils.py fsdp2_prepare_model, torchtitan 0.3 models/llama3/parallelize.py.
    """
    stack, axes = operations_of(graph)
    outer = _weights((*(op for ops in outside(stack) for op in ops), *stack.loss))
    units: dict[str, list[Weight]] = {unit: [] for unit in OUTSIDE}
    unit_of_weight = _outside_root(graph, ranks)
    for name, w in outer.items():
        units[unit_of_weight.get(name, ROOT)].append(w)
    for unit in (BEFORE, TIED, ROOT):
        if units[unit]:
            yield unit if ranks.wraps or unit != ROOT else REST, "", 1, units[unit]
    for i, run in enumerate(stack.runs):
        for j, block in enumerate(run.blocks):
            if axes[run.times]:
                unit = unit_of(i, j) if ranks.wraps else REST
                yield unit, block.name, axes[run.times], [*_weights(block.ops).values()]
    if units[AFTER]:
        yield AFTER, "", 1, units[AFTER]


def _finds_norm(graph: Graph) -> bool:
    """Whether accelerate finds the last norm and puts it in the head's unit.

    It looks among the children of the base model, and finds none next to a vision tower, inside an encoder or decoder,
    or with peft, which has another module named `model`.
    Source: accelerate 1.15 utils/fsdp_utils.py _find_final_norm; torchtitan wraps it by name.
    """
    stack, _ = operations_of(graph)
    norms = [w.name for op in stack.after for w in op.weights if w.group == "norm"]
    groups = {w.group for ops in outside(stack) for op in ops for w in op.weights}
    hidden = graph.recipe.kind in ADAPTERS and any(name.startswith("model.") for name in norms)
    within = any(name.count(".") != 2 for name in norms) or not groups.isdisjoint(("vision", "projector", "audio"))
    return graph.code == "torchtitan" or not (hidden or within)


def _outside_root(graph: Graph, ranks: Ranks) -> dict[str, str]:
    """Map weights outside of blocks, by name, to their unit, if it is not the root."""
    stack, _ = operations_of(graph)
    table, tied = input_table(graph), ties_head(graph)
    groups = ("norm", "lm_head") if ranks.expert_replicas or _finds_norm(graph) else ("lm_head",)
    tail = [w.name for op in (*stack.after, *stack.loss) for w in op.weights if w.group in groups]
    stem = graph.model.family.parallel.wrapped_stem if ranks.wraps else ""
    before = (w.name for ops in outside(stack)[:-1] for op in ops for w in op.weights)
    stems = {name: BEFORE for name in before if stem and name.startswith(stem)}
    if ranks.row.flat or ranks.root_has_ends:
        return stems
    if ranks.ends_apart:
        ends = [
            w for op in (*outside(stack)[0], *stack.after, *stack.loss) for w in op.weights if w.trains and not tied
        ]
        heads = {w.name: AFTER for w in ends if w.group == "lm_head"}
        return {**stems, **heads, **{w.name: BEFORE for w in ends if w.name in table}}
    tail_unit, table_unit = TIED if tied else AFTER, TIED if tied or shared_tables(graph) else BEFORE
    return {**stems, **dict.fromkeys(tail, tail_unit), **dict.fromkeys(table, table_unit)}


def _weights(ops: tuple[Op, ...]) -> dict[str, Weight]:
    """Map weights by name, without buffers. A weight used by several operations is trained if any of them trains it."""
    by_name: dict[str, Weight] = {}
    for w in (w for op in ops for w in op.weights if w.group != "buffer"):
        if w.name not in by_name or w.trains:
            by_name[w.name] = w
    return by_name


def _piece(graph: Graph, ranks: Ranks, unit: str, where: str, copies: int, name: str, weights: list[Weight]) -> Piece:
    _, axes = operations_of(graph)
    first = weights[0]
    sent = sent_dtype(first, ranks.storage)
    shapes = [shape_in(w, axes, ranks.storage) for w in weights]
    unpadded = flat = sum(map(prod, shapes))
    if ranks.row.flat:
        flat = sum(aligned(prod(shape), sent) for shape in shapes)
        shape = (part(flat, ranks.shard_count),)
    else:
        shape = rows_of(shapes[0], ranks.world)
    kept = kept_dtype(first, ranks)
    whole = prod(shape) * ranks.shard_count
    slices = tuple(_slices(graph, weights, shapes, sent, prod(shape))) if ranks.row.flat else ()
    gradients = max(unpadded, sum(elements(w._replace(shape=w.gradient), axes) for w in weights if w.gradient))
    trains, pads = any(w.trains for w in weights), whole != flat
    return Piece(name, unit, where, copies, shape, kept, whole, unpadded, gradients, sent, trains, pads, slices)


def _slices(
    graph: Graph, weights: list[Weight], shapes: list[tuple[int, ...]], dtype: str, mine: int
) -> Iterator[tuple[str, int, bool]]:
    """Yield the first rank's part of each weight of a flat parameter, as the optimizer sees it under use_orig_params:
    name, elements, and whether it is an embedding."""
    start = 0
    for w, shape in zip(weights, shapes, strict=True):
        numbers = prod(shape)
        if start < mine and (w.idle or is_optimized(w, graph)):
            yield w.name, min(numbers, mine - start), w.name in looked_up_weights(graph)
        start += aligned(numbers, dtype)


def copied_model(graph: Graph, ranks: Ranks) -> tuple[Graph, Ranks] | None:
    """Return the graph of a trainer's copy of the model and how FSDP shards it, or None if there is no copy.

    Its weights keep the dtype they are loaded in. TRL wraps the model alone for FSDP2, none of its blocks.

    Source: trl 1.16.0 models/utils.py prepare_fsdp.
    """
    copy = reference_copy(graph)
    if copy is None:
        return None
    wraps = ranks.row.flat or (copy.trainer is not None and copy.trainer.shards_copy == "blocks")
    root = ranks.root_has_ends if wraps else "stays"
    return copy, ranks._replace(trained=ranks.frozen, wraps=wraps, root_has_ends=root)


def stays_gathered(unit: str, ranks: Ranks) -> bool:
    """Return whether a unit of a copy stays gathered once it has run: the root, and FSDP2's last norm and head.

    Source: torch 2.13 distributed/fsdp/_runtime_utils.py _post_forward_reshard; accelerate 1.15 utils/fsdp_utils.py
    fsdp2_prepare_model, whose reshard_after_forward is false for them.
    """
    return (unit == ROOT and ranks.root_has_ends != "freed") or (unit in (AFTER, TIED) and not ranks.row.flat)


def division(graph: Graph, ranks: Ranks) -> Division:
    """Return the FSDP units that a pass gathers.

    In backward FSDP1 prefetches the unit that ran before; in a unit with nested units, the first nested one prefetches
    the block before. If recomputation gathers weights again, the prefetch comes only when a unit's backward is over.
    """
    by_unit = groupby(pieces(graph, ranks), key=lambda piece: piece.unit)
    units = tuple((name, _unit(list(group), ranks)) for name, group in by_unit)
    flat, keeps = ranks.row.flat, ranks.keeps
    asks = "last" if flat and ranks.regathers else _ASKS[ranks.prefetches_at if flat or ranks.world > 1 else "none"]
    waits = ranks.replicated and not flat  # each unit's AllReduceState keeps the reduced gradients
    leaves = ranks.offloads and not flat  # FSDP1 keeps reduced gradients on the GPU until backward is over
    generates = graph.trainer is not None and graph.trainer.generates and not graph.trainer.is_reference
    names = tuple(units_of(graph, ranks))
    called = {unit for unit, *_, weights in names if any(w.group != "lm_head" for w in weights)}
    if graph.loss == "tiled_lm_head" and not (flat or generates or AFTER in called):
        # the head's module is not called, and no other of its unit: `full_tensor` gathers it, in every pass
        units = tuple((name, unit._replace(message=()) if name == AFTER else unit) for name, unit in units)
    at_loss = flat or ranks.root_has_ends != "" or graph.loss == "tiled_lm_head"
    shared = Division(
        units,
        tuple((w.name, unit) for unit, where, _, weights in names if not where for w in weights),
        not flat,
        asks,
        ranks.row.source,
        at_loss=at_loss or (ties_head(graph) and bool(shared_tables(graph))),
        prefetches_forward=ranks.ahead,
        keeps="all" if keeps else "last" if ranks.ends_apart else "",
        root_has_ends="stays" if ranks.root_has_ends and keeps else ranks.root_has_ends,
        waits=waits,
        offloads_gradients=leaves,
        alone=ranks.ends_apart,
        returns=ranks.ends_apart or graph.code == "torchtitan",
        hooks=flat and ranks.regathers and hooks_frozen_inputs(graph),
        models=tuple(_models(graph, ranks)),
    )
    return shared._replace(whole=left_whole(shared)) if generates else shared


def _models(graph: Graph, ranks: Ranks) -> Iterator[tuple[str, Division | None]]:
    """Yield the division of the reference model, if it is a copy, and the models that no rank divides. Units of a copy
    that stay gathered are among the weights."""
    copied = copied_model(graph, ranks)
    if copied is not None:
        units, of_copy = division(*copied), copied[1]
        yield "reference", units._replace(units=tuple(u for u in units.units if not stays_gathered(u[0], of_copy)))
    yield from ((role, None) for role, _ in graph.roles)


def hooks_frozen_inputs(graph: Graph) -> bool:
    """Whether FSDP1's hooks keep the inputs of frozen blocks, and their gradients, until backward is over.

    To free weights without gradients FSDP1 hooks the block's input. In the recomputation of a reentrant checkpoint that
    input is a leaf of the inner graph: the hook's node references it, and its gradient accumulates in it. Published
    runs of Llama and Mistral show both; those of Granite and GPT-BigCode, which scale or add to the embeddings, show
    neither.
    Source: torch 2.4 distributed/fsdp/_runtime_utils.py _register_post_backward_reshard_only_hook, autograd/graph.py
    register_multi_grad_hook.
    """
    before = operations_of(graph)[0].before
    unscaled = any(w.group == "embedding" for op in before for w in op.weights if op.writes[0].name == "embeds")
    return graph.reentrant and graph.input_requires_grad and unscaled


# FSDP1's BackwardPrefetch in the words of `memplan.core.ir.Division.asks`.
_ASKS = {"pre": "first", "post": "gone", "none": "never"}


def _unit(group: list[Piece], ranks: Ranks) -> Unit:
    modules = dict.fromkeys(p.module for p in group if p.module)
    if modules:
        outer = _merged([p for p in group if not p.module], ranks)
        return outer._replace(modules=tuple((m, _module([p for p in group if p.module == m], ranks)) for m in modules))
    alone = [p for p in group if p.alone and p.trains]  # others are never called
    nested = tuple((p.name, _merged([p], ranks)) for p in alone)
    unit = _merged([p for p in group if not p.alone], ranks)
    if not ranks.keeps:
        return unit._replace(nested=nested)
    inner = _merged(alone, ranks)  # nested units stay gathered as long as the block
    nested = tuple((name, u._replace(whole=(), cast=())) for name, u in nested)
    return unit._replace(whole=unit.whole + inner.whole, cast=unit.cast + inner.cast, nested=nested)


def _module(group: list[Piece], ranks: Ranks) -> Unit:
    """Return the unit of a module of experts.

    FSDP2 copies weights and gradients even if one rank has them whole. A further copy of the gradients is divided by
    the number of batches.

    Source: torch 2.13 distributed/fsdp/_fully_shard/_fsdp_param_group.py wait_for_unshard, _fsdp_collectives.py
    foreach_reduce; transformers 5.24 distributed/fsdp.py, which sets gradient_divide_factor.
    """
    unit = _merged(group, ranks)
    divided = tuple(t._replace(name="gradients by the number of batches") for t in unit.joined)
    return unit._replace(message=(), divided=divided)


def _merged(group: list[Piece], ranks: Ranks) -> Unit:
    if not ranks.wraps:  # one unit has the pieces of all blocks
        group = [p for p in group for _ in range(p.copies if p.unit == REST else 1)]
    trained = [p for p in group if p.trains]
    whole = tuple(Tensor(f"gathered {p.name}", str(p.whole), p.sent) for p in group)
    if ranks.is_unsharded:
        return _undivided(group, ranks)
    converted = [p for p in group if p.dtype != p.sent or (ranks.offloads and not ranks.row.flat)]
    cast = tuple(Tensor(f"{p.name} as sent", str(prod(p.shape)), p.sent) for p in converted)
    if ranks.row.flat and ranks.offloads:
        # the parameters are views of the copy from the host until they become views of host memory again
        same = [p for p in group if p.dtype == p.sent]
        whole = (*whole, *(Tensor(f"{p.name} as sent", str(prod(p.shape)), p.sent) for p in same))
    if ranks.row.flat:
        joined = tuple(Tensor(f"gradient of {p.name}", str(p.whole), p.sent) for p in trained)
        padded = tuple(Tensor(f"padded gradient of {p.name}", str(p.whole), p.sent) for p in trained if p.pads)
        parts = tuple(Tensor(f"{p.name}.grad", str(prod(p.shape)), p.dtype) for p in trained)
        received = tuple(t._replace(dtype=p.sent) for t, p in zip(parts, trained, strict=True) if p.dtype != p.sent)
        return Unit(whole, (), cast, joined, padded, received, parts, unreduced_gradients(trained, ranks))
    sent = sum(p.whole * ITEMSIZE[p.sent] for p in group)
    message = (Tensor("all-gather's output", str(sent), "uint8"),) if ranks.world > 1 else ()
    if not trained:
        return Unit(whole, message, cast)
    reduces = ranks.reduces or trained[0].sent
    joined = (Tensor("reduce-scatter's input", str(sum(p.whole for p in trained)), reduces),)
    parts = (Tensor("gradients", str(sum(prod(p.shape) for p in trained)), trained[0].dtype),)
    received = tuple(t._replace(dtype=reduces) for t in parts if trained[0].dtype != reduces)
    return Unit(whole, message, cast, joined, (), received, parts, unreduced_gradients(trained, ranks))


def _undivided(group: list[Piece], ranks: Ranks) -> Unit:
    """Return a unit that every rank has whole (NO_SHARD). Weights are copied if they are computed in another dtype; the
    flattened gradients are kept, or cast to the kept dtype."""
    copies = tuple(Tensor(f"{p.name} as computed in", str(p.whole), p.sent) for p in group if p.dtype != p.sent)
    trained = [p for p in group if p.trains]
    joined = tuple(Tensor(f"gradient of {p.name}", str(p.whole), p.sent) for p in trained)
    cast = any(p.dtype != p.sent for p in trained)
    parts = tuple(Tensor(f"{p.name}.grad", str(p.whole), p.dtype) for p in trained)
    return Unit(
        copies, joined=joined if cast else (), parts=parts, summed=unreduced_gradients(trained, ranks), laid=not cast
    )


def unreduced_gradients(trained: list[Piece], ranks: Ranks) -> tuple[Tensor, ...]:
    """Return the whole gradients of a unit that earlier passes left, which FSDP2 keeps in the dtype it reduces in.

    Source: torch 2.13 distributed/fsdp/_fully_shard/_fsdp_param.py to_accumulated_grad_if_needed.
    """
    return tuple(Tensor(f"{p.name}.grad, whole", str(p.whole), ranks.reduces or p.sent) for p in trained)
