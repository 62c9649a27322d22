"""Axes and names of a model that runs inside the step of another one, and both models in sequence."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed, rewrite, rewrite_blocks, rewrite_lists
from memplan.core.ir import Op, Run, Stack, Tensor, Weight, operations, outside

# Axes that the batch alone decides, which are equal in every model of a step.
_OF_BATCH = frozenset(("b", "s", "s1", "s8", "s32", "s128", "completion", "completion_rows", "kept", "generated"))


def own_shape(shape: str, role: str) -> str:
    """Return a shape with its axes named after the role, as in `teacher.h`, unless the batch alone decides an axis.

    >>> own_shape("b s a*d/128 3", "teacher")
    'b s teacher.a*teacher.d/128 3'
    """

    def named(token: str) -> str:
        axes, slash, per = token.partition("/")
        return "*".join(_own(axis, role) for axis in axes.split("*")) + slash + per

    return " ".join(map(named, shape.split()))


def _own(axis: str, role: str) -> str:
    return axis if axis in _OF_BATCH or axis.isdigit() else f"{role}.{axis}"


def with_own_axes(stack: Stack, role: str) -> Stack:
    """Return the stack of another model of a step, with its axes and blocks named after its role."""

    def axes(shape: str) -> str:
        return own_shape(shape, role)

    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=axes(t.shape))

    def weight(w: Weight) -> Weight:
        return w._replace(shape=axes(w.shape), stored=tuple(map(tensor, w.stored)), gradient=axes(w.gradient))

    def change(op: Op) -> tuple[Op, ...]:
        keeps = tuple(k._replace(seen=axes(k.seen)) for k in op.keeps)
        return (ops.with_shapes(op, axes)._replace(weights=tuple(map(weight, op.weights)), keeps=keeps),)

    stack = rewrite_blocks(rewrite(stack, change), lambda block: block._replace(name=f"{role}.{block.name}"))
    return stack._replace(runs=tuple(run._replace(times=_own(run.times, role)) for run in stack.runs))


def own_sizes(sizes: Mapping[str, int], role: str) -> dict[str, int]:
    """Return the sizes of a model's axes by the names that `own_shape` gives them."""
    return {_own(axis, role): n for axis, n in sizes.items() if axis not in _OF_BATCH}


def with_own_names(stack: Stack, role: str, common: Collection[str] = ()) -> Stack:
    """Return the stack with its tensors, and its weights outside of blocks, named after its role.

    common  names that both models use
    """
    weights = {w.name for op in operations(stack) for w in op.weights}.union(("x", "y", "embeds"), common)
    lone = {w.name: f"{role}.{w.name}" for ops_ in outside(stack) for op in ops_ for w in op.weights}
    lone = {name: own for name, own in lone.items() if name not in common}

    def new(name: str) -> str:
        return lone.get(name, name) if name in weights else f"{role}.{name}"

    def changed(operations_: tuple[Op, ...]) -> tuple[Op, ...]:
        return tuple(
            ops.renamed(op, new)._replace(weights=tuple(w._replace(name=lone.get(w.name, w.name)) for w in op.weights))
            for op in operations_
        )

    stack = rewrite_lists(stack, changed)
    lists = ("shares", "replaces", "passed")
    return rewrite_blocks(stack, lambda b: b._replace(**{name: tuple(map(new, getattr(b, name))) for name in lists}))


def joined(first: Stack, second: Stack) -> Stack:
    """Return both models in sequence: what precedes the second one's blocks comes between the two."""
    second = rewrite_lists(second, lambda operations_: renamed(operations_, {"embeds": "stream"}))
    begins, *others = second.runs
    begins = Run(begins.blocks, begins.times, (*first.after, *second.before, *begins.before))
    return second._replace(before=first.before, runs=(*first.runs, begins, *others))
