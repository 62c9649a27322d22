"""What a rank of several GPUs holds: the graph's weights divided, and the units they are gathered in.

Bytes are those of the rank that holds most, which is the first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import groupby
from math import prod
from typing import NamedTuple

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import OptimizerMemory
from memplan.catalogue.parallelism.sharding import STEMS, STRATEGIES, Knobs, Strategy, aligned, part, rows_of
from memplan.core.ir import Division, Op, Tensor, Unit, Weight, operations, outside
from memplan.core.units import ITEMSIZE
from memplan.engine.gather import AFTER, BEFORE, OUTSIDE, REST, ROOT, TIED, unit_of
from memplan.engine.walk import size
from memplan.program.graph import Graph, Held, built, dims_of, elements, optimized, parameters_of, shape_of


class Ranks(NamedTuple):
    """How many ranks there are, and how they divide a run: see `memplan.catalogue.parallelism.sharding`.

    trained   the dtype of a rank's part of the weights that train, where it is not the one they are gathered in;
              `frozen` of the others
    storage   the dtype that 4-bit weights are stored in
    there     a quantised model is whole on every GPU before it is divided
    efficient one process of a node loads the model and sends the others their parts
    delayed   gradients are reduced in the last micro-batch of a step only, and are whole until then
    experts   how many of them have the same experts, where that is not all; Megatron's alone
    alone     under FSDP2 as many have the same experts, and divide these among them; 0 where all do
    inside    a block is checkpointed with its gathering, which is so done again in backward
    keeps     weights stay whole from forward to backward
    whole     nothing is divided: FSDP1's NO_SHARD, whose flat parameters every rank has
    ahead, asks  whether the next unit is asked for in forward, and when in backward: `pre`, `post` or `none`
    wraps     every block is a unit of its own; else all but the embeddings and the head are one
    views     gradients lie in DDP's buckets
    replicated  there are several such groups of ranks, which sum what each has reduced
    offloads    the rank's parts of weights, gradients and states are in host memory, and the optimizer steps there
    reduces   the dtype that FSDP2 reduces gradients in, where it is not the one weights are gathered in
    knobs     how DeepSpeed is configured
    """

    strategy: str = "none"
    world: int = 1
    trained: str = ""
    frozen: str = ""
    storage: str = "uint8"
    there: bool = True
    efficient: bool = False
    delayed: bool = False
    inside: bool = False
    experts: int = 0
    alone: int = 0
    keeps: bool = False
    ahead: bool = False
    asks: str = "pre"
    whole: bool = False
    wraps: bool = True
    views: bool = False
    replicated: bool = False
    offloads: bool = False
    reduces: str = ""
    knobs: Knobs = Knobs()

    @property
    def row(self) -> Strategy:
        return STRATEGIES[self.strategy]

    @property
    def among(self) -> int:
        """How many ranks divide the weights."""
        return 1 if self.whole else self.world


ONE = Ranks()


class Piece(NamedTuple):
    """Weights that are divided as one: a single one, or all of a unit that FSDP1 lays one after the other.

    unit, where, copies  the unit they are gathered in, the block that is (empty outside of blocks), how many such
    shape, dtype         of the rank's part
    whole, sent          how many numbers they are gathered, and their dtype then; `own` of those are no padding
    made                 how many numbers autograd makes of their gradients
    pads                 the gradients, laid together, are copied to be padded
    alone                a unit of its own within that, gathered for the operation that uses it
    module               the path of the module that is a unit of its own within that: of experts, which ranks divide
    slices               names and numbers of what the optimizer is given of it, where that is each weight by itself,
                         and whether that is an embedding
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
    """Everything that is divided, in the model's order.

    Under FSDP1 adapters are units of their own, each gathered in its turn.
    Source: peft 0.21 utils/other.py fsdp_auto_wrap_policy, which transformers' Trainer uses.
    """
    found: list[Piece] = []
    for unit, where, copies, weights in units_of(graph, ranks):
        together = [w for w in weights if graph.joined or w.group != "adapter"] if ranks.row.flat else []
        if together:
            found.append(_piece(graph, ranks, unit, where, copies, "flat parameter", together))
        alone = [w for w in weights if w not in together]
        nested = ranks.row.flat
        lent = _lent(graph) if ranks.alone else ()
        for w in alone:
            module = w.name.rpartition(".")[0]
            if module in lent:
                whole = _piece(graph, ranks._replace(world=ranks.alone), unit, where, copies, w.name, [w])
                found.append(whole._replace(module=module))
            else:
                found.append(_piece(graph, ranks, unit, where, copies, w.name, [w])._replace(alone=nested))
    return tuple(found)


@lru_cache(maxsize=256)
def _lent(graph: Graph) -> tuple[str, ...]:
    """The modules whose weights are lent to their operations: those of experts."""
    return tuple(dict.fromkeys(op.lends for op in operations(built(graph)[0]) if op.lends))


def units_of(graph: Graph, ranks: Ranks) -> Iterator[tuple[str, str, int, list[Weight]]]:
    """Yield every unit's name, the name of its block, how many such blocks there are, and its weights.

    FSDP1 lays all weights outside of blocks together. FSDP2 makes units of the embeddings' table, and of the last norm
    and the head, or one of all three if they are tied; what else there is belongs to the root.
    Source: accelerate 1.15 utils/fsdp_utils.py fsdp2_prepare_model, torchtitan 0.3 models/llama3/parallelize.py.
    """
    stack, axes = built(graph)
    found = _weights((*(op for ops in outside(stack) for op in ops), *stack.loss))
    units: dict[str, list[Weight]] = {unit: [] for unit in OUTSIDE}
    own = {} if ranks.row.flat else _outside_root(graph, ranks)
    for name, w in found.items():
        units[own.get(name, ROOT)].append(w)
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
    """Whether the last norm is in the head's unit: accelerate looks for it among the children of the base model, where
    there is none next to a tower or within an encoder or decoder, and peft has another module by the name `model`.

    Source: accelerate 1.15 utils/fsdp_utils.py _find_final_norm; torchtitan wraps it by name.
    """
    stack, _ = built(graph)
    norms = [w.name for op in stack.after for w in op.weights if w.group == "norm"]
    groups = {w.group for ops in outside(stack) for op in ops for w in op.weights}
    hidden = graph.recipe.kind in ADAPTERS and any(name.startswith("model.") for name in norms)
    within = any(name.count(".") != 2 for name in norms) or not groups.isdisjoint(("vision", "projector", "audio"))
    return graph.code == "torchtitan" or not (hidden or within)


def _outside_root(graph: Graph, ranks: Ranks) -> dict[str, str]:
    """The units of weights outside of blocks that are not the root's, by the weight's name."""
    stack, _ = built(graph)
    table, tied = _table(graph), ties_head(graph)
    groups = ("norm", "lm_head") if ranks.alone or _finds_norm(graph) else ("lm_head",)
    tail = [w.name for op in (*stack.after, *stack.loss) for w in op.weights if w.group in groups]
    stem = STEMS.get(graph.model.model_type) if ranks.wraps else None
    before = (w.name for ops in outside(stack)[:-1] for op in ops for w in op.weights)
    return {
        **{name: BEFORE for name in before if stem and name.startswith(stem)},
        **dict.fromkeys(tail, TIED if tied else AFTER),
        **dict.fromkeys(table, TIED if tied or shared_tables(graph) else BEFORE),
    }


def _table(graph: Graph) -> frozenset[str]:
    """The weights of the input embeddings: the table that tokens are looked up in, or the projection of patches."""
    embeddings = [
        op.weights
        for ops in outside(built(graph)[0])[:-1]
        for op in ops
        if any(w.group == "embedding" for w in op.weights)
    ]
    tables = [weights for weights in embeddings if weights[0].shape.startswith("v ")]
    return frozenset(w.name for weights in (tables or embeddings)[:1] for w in weights)


def ties_head(graph: Graph) -> bool:
    """Whether the head's weight is the embeddings' table."""
    stack, table = built(graph)[0], _table(graph)
    return any(w.name in table for op in (*stack.after, *stack.loss) for w in op.weights)


def shared_tables(graph: Graph) -> list[Weight]:
    """The tables that both an encoder and a decoder look tokens up in."""
    before, *between = outside(built(graph)[0])[:-1]
    tables = {w.name: w for op in before for w in op.weights if w.group == "embedding"}
    return [w for name, w in tables.items() if any(name == v.name for ops in between for op in ops for v in op.weights)]


def _weights(ops: tuple[Op, ...]) -> dict[str, Weight]:
    """By name; of a weight that several operations use, as the one sees it for which it trains."""
    found: dict[str, Weight] = {}
    for w in (w for op in ops for w in op.weights if w.group != "buffer"):
        if w.name not in found or w.trains:
            found[w.name] = w
    return found


def _piece(graph: Graph, ranks: Ranks, unit: str, where: str, copies: int, name: str, weights: list[Weight]) -> Piece:
    _, axes = built(graph)
    first = weights[0]
    sent = ranks.storage if first.stored else first.dtype
    shapes = [shape_in(w, axes, ranks.storage) for w in weights]
    own = laid = sum(map(prod, shapes))
    if ranks.row.flat:
        laid = sum(aligned(prod(shape), sent) for shape in shapes)
        shape = (part(laid, ranks.among),)
    else:
        shape = rows_of(shapes[0], ranks.world)
    kept = kept_dtype(first, ranks)
    whole = prod(shape) * ranks.among
    slices = tuple(_slices(graph, weights, shapes, sent, prod(shape))) if ranks.row.flat else ()
    made = max(own, sum(elements(w._replace(shape=w.gradient), axes) for w in weights if w.gradient))
    return Piece(name, unit, where, copies, shape, kept, whole, own, made, sent, first.trains, whole != laid, slices)


def _slices(
    graph: Graph, weights: list[Weight], shapes: list[tuple[int, ...]], dtype: str, mine: int
) -> Iterator[tuple[str, int, bool]]:
    """What the first rank has of each weight that the optimizer is given, in numbers, of those laid one after the
    other: use_orig_params. With each, whether that is an embedding."""
    start = 0
    for w, shape in zip(weights, shapes, strict=True):
        numbers = prod(shape)
        if start < mine and (optimized(w, graph) or not w.trains):
            yield w.name, min(numbers, mine - start), w.group == "embedding" and not w.matrix
        start += aligned(numbers, dtype)


def numbers_of(w: Weight, axes: Mapping[str, int], storage: str) -> tuple[int, str]:
    """How many numbers a weight's parameter has, and their dtype: of a 4-bit one, of what it is packed into."""
    return prod(shape_in(w, axes, storage)), storage if w.stored else w.dtype


def kept_dtype(w: Weight, ranks: Ranks) -> str:
    """The dtype of a rank's part of a weight, or of what a 4-bit one is packed into."""
    sent = ranks.storage if w.stored else w.dtype
    return sent if w.stored else (ranks.trained if w.trains else ranks.frozen) or sent


def shape_in(w: Weight, axes: Mapping[str, int], storage: str) -> tuple[int, ...]:
    """A weight's shape as the library sees it; of a 4-bit one, the shape of the column it is packed into."""
    if w.stored:
        return (-(-elements(w, axes) // (2 * ITEMSIZE[storage])), 1)
    is_vector = w.name.endswith(("bias", "norms.weight")) and not w.name.endswith("position_bias")
    return shape_of(w, axes) if w.rows or is_vector else tuple(dims_of(w, axes))  # of a convolution and a table all


def mixed(graph: Graph, ranks: Ranks) -> tuple[str, ...]:
    """The dtypes of a unit's weights that FSDP1 would lay together, where they are several: it cannot."""
    for _, _, _, weights in units_of(graph, ranks):
        found = {ranks.storage if w.stored else w.dtype for w in weights if w.group != "adapter"}
        if len(found) > 1:
            return tuple(sorted(found))
    return ()


def uneven(graph: Graph, ranks: Ranks) -> tuple[str, ...]:
    """The dtypes that a rank's parts of a unit's weights that train have, where they are several: FSDP2 reduces a
    unit's gradients in one. Source: torch 2.13 distributed/fsdp/_fully_shard/_fsdp_param_group.py _init_mp_dtypes."""
    for _, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit):
        found = {p.dtype for p in group if p.trains}
        if len(found) > 1:
            return tuple(sorted(found))
    return ()


def division(graph: Graph, ranks: Ranks) -> Division | None:
    """The units that a pass gathers; None where weights are not divided.

    FSDP1 asks for the unit that returned before: of one with others nested in it, the first of those asks for the block
    before. Gathering again within a recomputation has it ask as late as when a unit's backward is over.
    """
    if ranks.world == 1 or not ranks.row.gathers:
        return None
    by_unit = groupby(pieces(graph, ranks), key=lambda piece: piece.unit)
    units = tuple((name, _unit(list(group), ranks)) for name, group in by_unit)
    asks = "last" if ranks.row.flat and ranks.inside else _ASKS[ranks.asks]
    flat, keeps = ranks.row.flat, ranks.keeps
    waits = ranks.replicated and not flat  # in an AllReduceState of each unit
    leaves = ranks.offloads and not flat  # FSDP1 has them on the GPU too until backward is over
    names = units_of(graph, ranks)
    return Division(
        units,
        tuple((w.name, unit) for unit, where, _, weights in names if not where for w in weights),
        not flat,
        asks,
        ranks.row.source,
        at_loss=flat or (ties_head(graph) and bool(shared_tables(graph))),
        ahead=ranks.ahead,
        keeps=keeps,
        waits=waits,
        leaves=leaves,
        returns=graph.code == "torchtitan",
        hooks=flat and ranks.inside and hooked(graph),
    )


def hooked(graph: Graph) -> bool:
    """Whether FSDP1's hooks on what frozen blocks were given keep that, and its gradient, until backward is over.

    To let go of weights that get no gradient FSDP1 hooks the block's input. Where it is called within the recomputation
    of a reentrant checkpoint that is a leaf of the inner graph, which the hook's node refers to, and whose gradient is
    written to it. Published runs of Llama and Mistral show both; those of Granite and GPT-BigCode, whose embeddings are
    scaled or added to, neither.
    Source: torch 2.4 distributed/fsdp/_runtime_utils.py _register_post_backward_reshard_only_hook, autograd/graph.py
    register_multi_grad_hook.
    """
    before = built(graph)[0].before
    bare = any(w.group == "embedding" for op in before for w in op.weights if op.writes[0].name == "embeds")
    return graph.reentrant and graph.leaf and bare


# When FSDP1's BackwardPrefetch asks for the next unit, see `memplan.core.ir.Division`.
_ASKS = {"pre": "first", "post": "gone", "none": "never"}


def _unit(group: list[Piece], ranks: Ranks) -> Unit:
    modules = dict.fromkeys(p.module for p in group if p.module)
    if modules:
        own = _together([p for p in group if not p.module], ranks)
        return own._replace(modules=tuple((m, _module([p for p in group if p.module == m], ranks)) for m in modules))
    alone = [p for p in group if p.alone]
    nested = tuple((p.name, _together([p], ranks)) for p in alone)
    if not ranks.keeps:
        return _together([p for p in group if not p.alone], ranks)._replace(nested=nested)
    unit, inner = _together([p for p in group if not p.alone], ranks), _together(alone, ranks)  # whole with the block
    nested = tuple((name, u._replace(whole=(), cast=())) for name, u in nested)
    return unit._replace(whole=unit.whole + inner.whole, cast=unit.cast + inner.cast, nested=nested)


def _module(group: list[Piece], ranks: Ranks) -> Unit:
    """Weights that one rank has whole are copied all the same, and so are their gradients, which are divided by the
    number of batches in another copy.

    Source: torch 2.13 distributed/fsdp/_fully_shard/_fsdp_param_group.py wait_for_unshard, _fsdp_collectives.py
    foreach_reduce; transformers 5.24 distributed/fsdp.py, which sets gradient_divide_factor.
    """
    unit = _together(group, ranks)
    divided = tuple(t._replace(name="gradients by the number of batches") for t in unit.joined)
    return unit._replace(message=(), divided=divided)


def _together(group: list[Piece], ranks: Ranks) -> Unit:
    if not ranks.wraps:  # the pieces of all blocks, one after the other
        group = [p for p in group for _ in range(p.copies if p.unit == REST else 1)]
    trained = [p for p in group if p.trains]
    whole = tuple(Tensor(f"gathered {p.name}", str(p.whole), p.sent) for p in group)
    if ranks.whole:
        return _undivided(group)
    brought = [p for p in group if p.dtype != p.sent or (ranks.offloads and not ranks.row.flat)]
    cast = tuple(Tensor(f"{p.name} as sent", str(prod(p.shape)), p.sent) for p in brought)
    if ranks.row.flat and ranks.offloads:
        # the parameters' own views are of what was brought from the host, until they are of the host's again
        same = [p for p in group if p.dtype == p.sent]
        whole = (*whole, *(Tensor(f"{p.name} as sent", str(prod(p.shape)), p.sent) for p in same))
    if ranks.row.flat:
        joined = tuple(Tensor(f"gradient of {p.name}", str(p.whole), p.sent) for p in trained)
        padded = tuple(Tensor(f"padded gradient of {p.name}", str(p.whole), p.sent) for p in trained if p.pads)
        parts = tuple(Tensor(f"{p.name}.grad", str(prod(p.shape)), p.dtype) for p in trained)
        received = tuple(t._replace(dtype=p.sent) for t, p in zip(parts, trained, strict=True) if p.dtype != p.sent)
        return Unit(whole, (), cast, joined, padded, received, parts, _summed(trained))
    sent = sum(p.whole * ITEMSIZE[p.sent] for p in group)
    message = (Tensor("all-gather's output", str(sent), "uint8"),)
    if not trained:
        return Unit(whole, message, cast)
    reduces = ranks.reduces or trained[0].sent
    joined = (Tensor("reduce-scatter's input", str(sum(p.whole for p in trained)), reduces),)
    parts = (Tensor("gradients", str(sum(prod(p.shape) for p in trained)), trained[0].dtype),)
    received = tuple(t._replace(dtype=reduces) for t in parts if trained[0].dtype != reduces)
    return Unit(whole, message, cast, joined, (), received, parts, _summed(trained))


def _undivided(group: list[Piece]) -> Unit:
    """A unit of which every rank has all: what is computed in is a copy where its dtype is another, and the gradients
    laid together are what is kept, or cast to it."""
    copies = tuple(Tensor(f"{p.name} as computed in", str(p.whole), p.sent) for p in group if p.dtype != p.sent)
    trained = [p for p in group if p.trains]
    joined = tuple(Tensor(f"gradient of {p.name}", str(p.whole), p.sent) for p in trained)
    cast = any(p.dtype != p.sent for p in trained)
    parts = tuple(Tensor(f"{p.name}.grad", str(p.whole), p.dtype) for p in trained)
    return Unit(copies, joined=joined if cast else (), parts=parts, summed=_summed(trained), laid=not cast)


def _summed(trained: list[Piece]) -> tuple[Tensor, ...]:
    """The gradients of a unit that passes before left whole."""
    return tuple(Tensor(f"{p.name}.grad, whole", str(p.whole), p.sent) for p in trained)


def parameters_held(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The stored tensors of a rank: its parts, and what is not divided."""
    if ranks.world == 1 or not ranks.row.parameters:
        yield from parameters_of(graph)
        return
    for p in pieces(graph, ranks) if not ranks.offloads else ():
        parts = ranks.alone if p.module else ranks.among
        what = f"{p.name}, one of {parts} parts" if parts > 1 else p.name
        yield _held("parameter", what, p.where, p.shape, p.dtype, p.copies, ranks.row.source)
    for held in parameters_of(graph):
        if held.kind == "buffer" or beside(held):
            yield held


def beside(held: Held) -> bool:
    """What a 4-bit weight has beside its numbers, the scales of its blocks: no parameters, so never divided."""
    return "(" in held.what and not held.what.endswith("(packed)")


def gradients_held(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """What a rank keeps of the gradients after backward, where they are divided."""
    if ranks.offloads:
        return
    of = {p.unit: p for p in pieces(graph, ranks)}
    found = division(graph, ranks)
    for name, unit in found.units if found else ():
        inner = (t for _, unit in (*unit.nested, *unit.modules) for t in unit.parts)
        for t in (*unit.parts, *inner):
            where, copies = (of[name].where, of[name].copies) if name != REST else ("", 1)
            yield _held("gradient", t.name, where, (int(t.shape),), t.dtype, copies, ranks.row.source)


def whole_gradients(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The gradients as a micro-batch leaves them that reduces none: whole."""
    for p in pieces(graph, ranks):
        if p.trains:
            yield _held("gradient", f"{p.name}.grad, whole", p.where, (p.whole,), p.sent, p.copies, ranks.row.source)


def _held(kind: str, what: str, where: str, shape: tuple[int, ...], dtype: str, copies: int, source: str) -> Held:
    words = " ".join(map(str, shape))
    return Held(kind, what, where, words, dtype, copies, size(words, dtype, {})[1], source)


def pinned(bytes_: int) -> int:
    """What so many bytes take in pinned memory. Source: torch 2.13 ATen/core/CachingHostAllocator.h."""
    return 1 << (bytes_ - 1).bit_length() if bytes_ else 0


def offloaded(graph: Graph, ranks: Ranks, optimizer: OptimizerMemory, adds: bool) -> Iterator[Held]:
    """What a rank has in host memory under FSDP that offloads: its parts of weights and gradients, pinned, and states.

    FSDP1 has a gradient of every flat parameter there, of frozen ones too. Where a later micro-batch `adds` to FSDP2's
    gradients, one at a time comes beside them. Of the step, the scratch of one parameter's update: torch has lists on
    GPUs only.
    Source: torch 2.13 distributed/fsdp/_flat_param.py init_flat_param_attributes, _fully_shard/_fsdp_param.py,
    _fsdp_collectives.py; aten/src/ATen/native/TensorConversions.cpp, by which what is copied without waiting is pinned.
    """
    source = ranks.row.source
    largest = 0
    for p in pieces(graph, ranks):
        numbers = prod(p.shape)
        bytes_ = pinned(numbers * ITEMSIZE[p.dtype])
        part = f"{p.name}, one of {ranks.world} parts, pinned"
        yield Held("parameter", part, p.where, str(numbers), p.dtype, p.copies, bytes_, source)
        if p.trains or ranks.row.flat:
            gradient = f"gradient of {part}"
            yield Held("gradient", gradient, p.where, str(numbers), p.dtype, p.copies, bytes_, source)
            largest = max(largest, numbers * ITEMSIZE[p.dtype])
    if adds and not ranks.row.flat:
        yield Held("temp", "gradient of a later micro-batch", "", str(largest), "uint8", 1, largest, source)
    for state in optimizer.states:
        bytes_ = ITEMSIZE[state.dtype] * prod(state.shape)
        shape = " ".join(map(str, state.shape))
        what = f"{state.parameter} {state.what}".strip()
        yield Held("optstate", what, "", shape, state.dtype, state.count, bytes_, optimizer.source)
    if optimizer.later:
        what, bytes_ = optimizer.scratch, optimizer.later
        yield Held("temp", what, "", str(bytes_), "uint8", 1, bytes_, optimizer.source)


def trained_parts(graph: Graph, ranks: Ranks, trainer: bool = False) -> list[Parameter]:
    """A rank's parts of the parameters that train, as the optimizer is given them; a `trainer` says which are
    embeddings."""
    out: list[Parameter] = []
    for _, group in groupby(pieces(graph, ranks), key=lambda piece: piece.unit):
        own = [p for p in group if p.trains]
        found = [
            (Parameter(f"{p.where}.{name}".lstrip("."), shape, p.dtype, embedding=trainer and embedding), p.copies)
            for p in own
            for name, shape, embedding in (
                [(n, (count,), e) for n, count, e in p.slices] or [(p.name, p.shape, False)][: not graph.joined]
            )
        ]
        out += [p for p, _ in found]
        out += [p._replace(copies=n - 1) for p, n in found if n > 1]
    return out
