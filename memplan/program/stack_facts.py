"""Facts about a model's stack: its linear layers, adapter targets, dtypes and fusible kernels."""

from __future__ import annotations

from functools import lru_cache

from memplan.catalogue import build
from memplan.catalogue.kernels.fused import fusible
from memplan.catalogue.kernels.rewriting import matrix
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.methods import Recipe, apply
from memplan.core.ir import Block, Stack, Weight, operations, outside
from memplan.engine.copies import read_dtype
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph, operations_of, weights_of
from memplan.program.weight_sizes import matrix_shape


@lru_cache(maxsize=256)
def attention_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """Return the dtype of the queries passed to attention, before attention casts them. For a model without attention,
    the dtype of the delta rule's inputs."""
    return _read_dtype(model, recipe, Wiring("flash_2", "flash_2"), (".lse", "beta"))


@lru_cache(maxsize=256)
def tower_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """Return the dtype of the queries passed to attention in the vision tower."""
    return _read_dtype(model, recipe, Wiring("flash", "flash", images=True), (("v.o.parts.lse", "v.o.lse"),))


def _read_dtype(model: ModelSpec, recipe: Recipe, wiring: Wiring, outputs: tuple[str | tuple[str, ...], ...]) -> str:
    """Return the dtype that the operation with the first of the outputs reads, in the last run of blocks with one: the
    runs after it, such as the language model after a tower, need not be rewritten."""
    axes, stack = model.axes(), build(model, wiring)
    autocast = recipe.compute if recipe.autocast else None
    for end in outputs:
        having = [i for i, run in enumerate(stack.runs, 1) if any(_writes(block, end) for block in run.blocks)]
        if having:
            part = apply(stack._replace(runs=stack.runs[: having[-1]]), recipe, axes)
            return read_dtype(part, end, autocast, {run.times: axes[run.times] for run in part.runs}) or recipe.weights
    return recipe.weights


def _writes(block: Block, end: str | tuple[str, ...]) -> bool:
    return any(t.name.endswith(end) for op in block.ops for t in op.writes)


@lru_cache(maxsize=32)
def default_stack(model: ModelSpec, code: str = "transformers") -> Stack:
    """Return the model's operations with the attention kernels of most runs, which then need not build them again, for
    facts that do not depend on the kernel."""
    keys, values = model.head_widths
    return build(model, Wiring("flash" if keys == values <= 256 else "efficient", "efficient", tower=""), code)


@lru_cache(maxsize=512)
def adaptable(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Map each linear layer and embedding, by its path in a layer, to the rows and columns of its matrix."""
    stack, axes = default_stack(model), model.axes()
    return {
        op.name: matrix_shape(w, axes)
        for op in operations(stack)
        for w in op.weights
        if w.rows and (w.matrix or w.group == "embedding")
    }


@lru_cache(maxsize=512)
def router_and_mixer_paths(model: ModelSpec) -> frozenset[str]:
    """Return the paths of linear layers in routers and in attention-free mixers, some of which have only a few rows."""
    stack = default_stack(model)
    return frozenset(op.name for op in operations(stack) for w in op.weights if w.group in ("mixer", "router"))


@lru_cache(maxsize=512)
def parameter_targets(model: ModelSpec) -> tuple[tuple[str, ...], ...]:
    """Return, for each expert or router parameter that peft adapts directly, the linear layer names it stands for."""
    stack = default_stack(model)
    targets = {w.stands_for for op in operations(stack) for w in op.weights if w.stands_for and not w.matrix}
    return tuple(sorted(targets))


@lru_cache(maxsize=512)
def multi_output_linears(model: ModelSpec) -> frozenset[str]:
    """Return the names of linear layers whose modules return more than the matrix product."""
    stack = default_stack(model)
    return frozenset(
        op.name.rpartition(".")[2] for op in operations(stack) for w in op.weights if w.matrix and w.returns_more
    )


@lru_cache(maxsize=512)
def stacks(model: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Map each stack of expert matrices, by name, to the linear layer names it stands for in peft."""
    stack = default_stack(model)
    return {w.name: w.stands_for for op in operations(stack) for w in op.weights if w.stacked}


@lru_cache(maxsize=512)
def linears(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """Map each linear layer, by its path in a layer, to the rows and columns of its matrix."""
    stack, axes = default_stack(model), model.axes()
    return {op.name: matrix_shape(w, axes) for op in operations(stack) if (w := matrix(op)) is not None}


@lru_cache(maxsize=512)
def has_conv1d(model: ModelSpec) -> bool:
    """Whether linear layers are transformers' `Conv1D`."""
    return any(w.transposed for op in operations(default_stack(model)) for w in op.weights)


def has_one_table(model: ModelSpec) -> bool:
    """Whether the model is a decoder whose tokens are only looked up, in one table before its layers."""
    stack = default_stack(model)
    readers = [op for op in operations(stack) if "ids" in op.reads and (op.weights or op.writes)]
    tables = [op for op in stack.before if op.reads == ("ids",) and any(w.group == "embedding" for w in op.weights)]
    is_decoder = model.objective == "causal_lm" and not model.is_encoder_decoder and not model.has_tower
    return is_decoder and len(tables) == 1 and readers == tables


def tied_modules(model: ModelSpec) -> frozenset[str]:
    """Return the names of the embeddings and of a head that multiplies by their table; empty without such a head."""
    stack = default_stack(model)
    tables = {w.name for op in stack.before for w in op.weights if w.group == "embedding"}
    heads = [op for op in operations(stack) if op.product and any(w.name in tables for w in op.weights)]
    paths = (path for op in heads for path in (op.name, *(w.name.rpartition(".")[0] for w in op.weights)))
    return frozenset(path.rpartition(".")[2] for path in paths)


def takes_prefix(model: ModelSpec) -> bool:
    """Whether every layer of a decoder with one table caches keys and values, and all of them alike."""
    runs = build(model, Wiring("flash", "efficient", caching=True)).runs
    for block in (block for run in runs for block in run.blocks):
        shapes = {t.name: t.shape for op in block.ops for t in op.writes}
        cached = [[shapes[name] for name in op.reads] for op in block.ops if op.caches and not op.view]
        if len(cached) != 1 or not {"b s k d", "b s a d"}.issuperset(cached[0]):
            return False
    return has_one_table(model)


def leads_through_blocks(model: ModelSpec) -> bool:
    """Whether a decoder's layers, which are alike, pass on one tensor of hidden states, and peft finds their list.

    Source: peft 0.21.2 tuners/shadow/model.py _get_backbone, _get_decoder_layers.
    """
    stack = default_stack(model)
    blocks = [block for run in stack.runs for block in run.blocks]
    lists = {tuple(block.name.split(".")[1:]) for block in blocks}
    passed = {t.shape for block in blocks for op in block.ops for t in op.writes if t.name == "y"}
    last = {t.shape for op in stack.after for t in op.writes if t.name == "n"}
    found = lists <= {("layers",), ("h",), ("decoder", "layers")} and not any(block.shares for block in blocks)
    return found and passed == last == {"b s h"} and takes_prefix(model)


@lru_cache(maxsize=512)
def fusible_kernels(model: ModelSpec, code: str) -> frozenset[str]:
    """Return the fused kernels that can replace operations of the model."""
    return frozenset(fusible(default_stack(model, code)))


@lru_cache(maxsize=512)
def modules_with_weights(model: ModelSpec) -> frozenset[str]:
    """Return the last parts of the names of modules that have weights of their own."""
    owners = (w.name.rpartition(".")[0] for op in operations(default_stack(model)) for w in op.weights)
    return frozenset(owner.rpartition(".")[2] for owner in owners)


def modules(model: ModelSpec) -> set[str]:
    """Return the names of all modules that have weights, and of their parent modules."""
    stack = default_stack(model)
    paths = {w.name.rpartition(".")[0] for op in operations(stack) for w in op.weights if w.group != "buffer"}
    return {name for path in paths for name in path.split(".")} | {
        op.name.rpartition(".")[2] for op in stack.after if matrix(op)
    }


def input_table(graph: Graph) -> frozenset[str]:
    """Return the names of the input embeddings' weights: the token table, or the patch projection."""
    embeddings = [
        op.weights
        for ops in outside(operations_of(graph)[0])[:-1]
        for op in ops
        if any(w.group == "embedding" for w in op.weights)
    ]
    tables = [weights for weights in embeddings if weights[0].shape.startswith("v ")]
    return frozenset(w.name for weights in (tables or embeddings)[:1] for w in weights)


def ties_head(graph: Graph) -> bool:
    """Whether the head's weight is the embeddings' table."""
    stack, table = operations_of(graph)[0], input_table(graph)
    return any(w.name in table for op in (*stack.after, *stack.loss) for w in op.weights)


def shared_tables(graph: Graph) -> list[Weight]:
    """Return the embedding tables that encoder and decoder share."""
    before, *between = outside(operations_of(graph)[0])[:-1]
    tables = {w.name: w for op in before for w in op.weights if w.group == "embedding"}
    return [w for name, w in tables.items() if any(name == v.name for ops in between for op in ops for v in op.weights)]


@lru_cache(maxsize=128)
def looked_up_weights(graph: Graph) -> frozenset[str]:
    """Return the names of nn.Embedding's weights, and of their copies that peft's `modules_to_save` trains."""
    tables = {w.name for w, _, _ in weights_of(graph) if w.group == "embedding" and not w.matrix}
    return frozenset(tables | {f"{name}.saved" for name in tables})


def trained_tables(graph: Graph) -> list[tuple[int, bool]]:
    """Return which of `weights_of` are nn.Embedding's weights that train, and whether several layers have one each."""
    tables = looked_up_weights(graph)
    return [(i, count > 1) for i, (w, count, _) in enumerate(weights_of(graph)) if w.trains and w.name in tables]
