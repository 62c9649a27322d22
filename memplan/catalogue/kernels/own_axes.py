"""Axes of a model that runs inside the step of another one, of another size."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite, rewrite_blocks
from memplan.core.ir import Op, Stack, Tensor, Weight

# Axes that the batch alone decides, which are equal in every model of a step.
_OF_BATCH = frozenset(("b", "s", "s1", "s8", "s32", "s128", "completion", "completion_rows", "kept", "generated"))


def with_own_axes(stack: Stack, sizes: Mapping[str, int], role: str) -> tuple[Stack, dict[str, int]]:
    """Return the stack of another model of a step with the sizes of its axes. Axes and blocks are named after its role,
    as in `teacher.h`, unless the batch alone decides an axis."""

    def name(axis: str) -> str:
        return axis if axis in _OF_BATCH or axis.isdigit() else f"{role}.{axis}"

    def axes(shape: str) -> str:
        return " ".join(
            "*".join(map(name, token.partition("/")[0].split("*"))) + "".join(token.partition("/")[1:])
            for token in shape.split()
        )

    def tensor(t: Tensor) -> Tensor:
        return t._replace(shape=axes(t.shape))

    def weight(w: Weight) -> Weight:
        return w._replace(shape=axes(w.shape), stored=tuple(map(tensor, w.stored)), gradient=axes(w.gradient))

    def change(op: Op) -> tuple[Op, ...]:
        keeps = tuple(k._replace(seen=axes(k.seen)) for k in op.keeps)
        return (ops.with_shapes(op, axes)._replace(weights=tuple(map(weight, op.weights)), keeps=keeps),)

    stack = rewrite_blocks(rewrite(stack, change), lambda block: block._replace(name=f"{role}.{block.name}"))
    stack = stack._replace(runs=tuple(run._replace(times=name(run.times)) for run in stack.runs))
    return stack, {name(axis): n for axis, n in sizes.items() if axis not in _OF_BATCH}
