"""Fused kernels in place of the operations they do at once: what they keep, and what they write over.

A unit of operations (`Op.unit`) becomes one operation. Unsloth's, fms-acceleration's and Liger's kernels keep the same
tensors; where they differ a docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite_lists
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, outside

_LIGER = "liger-kernel 0.5.2 ops"
_MULTIPROCESSORS = 108  # an A100's: Liger sums the weight's gradient in a row for each


def _rms_norm(unit: tuple[Op, ...]) -> Op:
    """Keeps its input and a number a row. The gradient of the input is written over that of the output.

    Unsloth's makes no gradient of the weight.
    """
    first, weigh = unit[0], unit[-2]
    (x,), y, w = first.reads, weigh.writes[0], weigh.weights[0]
    rstd = Tensor(f"{y.name}.rstd", y.shape.rpartition(" ")[0], "fp32")
    return Op(
        weigh.name.removesuffix(".weight"),
        (x,),
        (y._replace(dtype=f"={x}"), rstd),
        (w,),
        (*(Keep(what, of) for of in (x, w.name) for what in (x, rstd.name)), Keep(w.name, x)),
        scratch_back=(Scratch(Tensor("partial sums", f"{_MULTIPROCESSORS} {w.shape}", "fp32"), w.name),),
        gradient="same",
        source=f"{_LIGER}/rms_norm.py",
    )


def _rope(unit: tuple[Op, ...]) -> Op:
    """Written over its input, and backward over the gradient."""
    first, last = unit[0], unit[-1]
    x, y = first.reads[0], last.writes[0]
    keeps = (Keep("cos", x), Keep("sin", x))
    return ops.view(last.name.removesuffix(".add"), x, y.name, y.shape)._replace(
        reads=(x, *(k.what for k in keeps)), keeps=keeps, source=f"{_LIGER}/rope.py"
    )


def _swiglu(unit: tuple[Op, ...]) -> Op:
    """Keeps the gate before its activation and what it multiplies; their gradients are written over them."""
    activation, product = unit
    gate, y = activation.reads[0], product.writes[0]
    up = next(r for r in product.reads if r != activation.writes[0].name)
    return Op(
        product.name,
        (gate, up),
        (y,),
        (),
        (Keep(gate, gate, True), Keep(up, gate), Keep(up, up, True), Keep(gate, up)),
        source=f"{_LIGER}/swiglu.py",
    )


class Kernel(NamedTuple):
    """What makes one operation of a unit of `size`; a family that writes it otherwise has units of another size."""

    size: int
    make: Callable[[tuple[Op, ...]], Op]


KERNELS = {"rms_norm": Kernel(9, _rms_norm), "rope": Kernel(4, _rope), "swiglu": Kernel(2, _swiglu)}


def fuse(stack: Stack, kernels: Iterable[str]) -> Stack:
    """The stack with those kernels wherever a unit is written as they expect it."""
    wanted = frozenset(KERNELS).intersection(kernels)
    return rewrite_lists(stack, lambda operations: _fused(operations, wanted)) if wanted else stack


def fusible(stack: Stack) -> set[str]:
    """The kernels that find something to do in the stack."""
    lists = (*outside(stack), *(block.ops for run in stack.runs for block in run.blocks))
    return {_kernel(unit) for operations in lists for unit in _whole(operations, frozenset(KERNELS))}


def _kernel(unit: str) -> str:
    return unit.partition(" ")[0]


def _whole(operations: Iterable[Op], wanted: frozenset[str]) -> dict[str, tuple[Op, ...]]:
    """The units those kernels may do at once, by name."""
    units: dict[str, tuple[Op, ...]] = {}
    for op in operations:
        if _kernel(op.unit) in wanted:
            units[op.unit] = (*units.get(op.unit, ()), op)
    return {name: unit for name, unit in units.items() if len(unit) == KERNELS[_kernel(name)].size}


def _fused(operations: tuple[Op, ...], wanted: frozenset[str]) -> tuple[Op, ...]:
    """A unit is done where its last operation was."""
    units = _whole(operations, wanted)
    out: list[Op] = []
    for op in operations:
        unit = units.get(op.unit)
        if unit is None:
            out.append(op)
        elif op is unit[-1]:
            out.append(KERNELS[_kernel(op.unit)].make(unit)._replace(unit=op.unit))
    return tuple(out)
