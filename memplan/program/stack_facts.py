"""Facts about a model's stack: its linear layers, adapter targets, dtypes and fusible kernels."""

from __future__ import annotations

from functools import lru_cache

from memplan.catalogue import build
from memplan.catalogue.kernels.fused import fusible
from memplan.catalogue.kernels.rewriting import matrix
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods.methods import Recipe, apply
from memplan.core.ir import Stack, operations
from memplan.engine.step import read_dtype
from memplan.models.model import ModelSpec
from memplan.program.graph import matrix_shape


@lru_cache(maxsize=256)
def attention_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """The dtype of the queries that attention is given, before any cast of its own; in a model that has none, of what
    the delta rule is given."""
    axes = model.axes()
    stack = apply(build(model, Wiring("flash_2", "flash_2")), recipe)
    autocast = recipe.compute if recipe.autocast else None
    depth = {run.times: axes[run.times] for run in stack.runs}
    found = (read_dtype(stack, of, autocast, depth) for of in (".lse", "beta"))
    return next(filter(None, found), recipe.weights)


@lru_cache(maxsize=256)
def tower_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """The dtype of the queries that attention in the tower is given."""
    axes = model.axes()
    stack = apply(build(model, Wiring("flash", "flash", images=True)), recipe)
    autocast = recipe.compute if recipe.autocast else None
    depth = {run.times: axes[run.times] for run in stack.runs}
    return read_dtype(stack, ("v.o.parts.lse", "v.o.lse"), autocast, depth) or recipe.weights


@lru_cache(maxsize=32)
def _plain(model: ModelSpec, code: str = "transformers") -> Stack:
    """The model's operations for questions that no kernel of attention changes: several are asked of each model."""
    return build(model, Wiring("flash", "efficient"), code)


@lru_cache(maxsize=512)
def adaptable(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """The linear layers and embeddings by their path in a layer, with the rows and columns of their matrices."""
    stack, axes = _plain(model), model.axes()
    return {
        op.name: matrix_shape(w, axes)
        for op in operations(stack)
        for w in op.weights
        if w.rows and (w.matrix or w.group == "embedding")
    }


@lru_cache(maxsize=512)
def gates(model: ModelSpec) -> frozenset[str]:
    """The paths of linear layers of routers and of what mixes tokens without attention: some have a few rows only."""
    stack = _plain(model)
    return frozenset(op.name for op in operations(stack) for w in op.weights if w.group in ("mixer", "router"))


@lru_cache(maxsize=512)
def parameter_targets(model: ModelSpec) -> tuple[tuple[str, ...], ...]:
    """The names of linear layers that peft takes a parameter for, parameter by parameter: of experts and routers."""
    stack = _plain(model)
    found = {w.stands_for for op in operations(stack) for w in op.weights if w.stands_for and not w.matrix}
    return tuple(sorted(found))


@lru_cache(maxsize=512)
def several(model: ModelSpec) -> frozenset[str]:
    """The names of linear layers whose modules return more than the product."""
    stack = _plain(model)
    return frozenset(
        op.name.rpartition(".")[2] for op in operations(stack) for w in op.weights if w.matrix and w.several
    )


@lru_cache(maxsize=512)
def stacks(model: ModelSpec) -> dict[str, tuple[str, ...]]:
    """The experts' stacks of matrices by name, with the linear layers that each stands for to peft."""
    stack = _plain(model)
    return {w.name: w.stands_for for op in operations(stack) for w in op.weights if w.stacked}


@lru_cache(maxsize=512)
def linears(model: ModelSpec) -> dict[str, tuple[int, int]]:
    """The linear layers by their path in a layer, as `adaptable` has them."""
    stack, axes = _plain(model), model.axes()
    return {op.name: matrix_shape(w, axes) for op in operations(stack) if (w := matrix(op)) is not None}


@lru_cache(maxsize=512)
def fusible_kernels(model: ModelSpec, code: str) -> frozenset[str]:
    """The fused kernels that find operations of the model to stand in for."""
    return frozenset(fusible(_plain(model, code)))


def modules(model: ModelSpec) -> set[str]:
    """The names of the model's modules that have weights, and of those that they are parts of."""
    stack = _plain(model)
    paths = {w.name.rpartition(".")[0] for op in operations(stack) for w in op.weights if w.group != "buffer"}
    return {name for path in paths for name in path.split(".")} | {
        op.name.rpartition(".")[2] for op in stack.after if matrix(op)
    }
