"""Fused kernels that replace several operations with one: what they keep, and what they overwrite.

A unit of operations (`Op.unit`) becomes one operation. Unsloth's, fms-acceleration's and Liger's kernels keep the same
tensors; docstrings note the differences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite_lists
from memplan.core.ir import Keep, Op, Scratch, Stack, Tensor, outside
from memplan.core.records import NamedTuple

_LIGER = "liger-kernel 0.5.2 ops"
_MULTIPROCESSORS = 108  # of an A100: Liger sums the weight's gradient in one row per multiprocessor


def _rms_norm(unit: tuple[Op, ...]) -> Op:
    """Keeps its input and one number per row. The input's gradient overwrites the output's gradient.

    Unsloth's kernel computes no gradient of the weight.
    """
    first, weigh = unit[0], unit[-2]
    (x,), y, w = first.reads, weigh.writes[0], weigh.weights[0]
    rstd = Tensor(f"{y.name}.rstd", y.shape.rpartition(" ")[0], "fp32")
    return Op(
        weigh.name.removesuffix(".weight"),
        (x,),
        (y._replace(dtype=f"={x}"), rstd),
        (w,),
        (*(Keep(what, target) for target in (x, w.name) for what in (x, rstd.name)), Keep(w.name, x)),
        scratch_back=(Scratch(Tensor("partial sums", f"{_MULTIPROCESSORS} {w.shape}", "fp32"), w.name),),
        gradient="same",
        source=f"{_LIGER}/rms_norm.py",
    )


def _rope(unit: tuple[Op, ...]) -> Op:
    """Overwrites its input, and its gradient in backward."""
    first, last = unit[0], unit[-1]
    x, y = first.reads[0], last.writes[0]
    keeps = (Keep("cos", x), Keep("sin", x))
    return ops.view(last.name.removesuffix(".add"), x, y.name, y.shape)._replace(
        reads=(x, *(k.what for k in keeps)), keeps=keeps, source=f"{_LIGER}/rope.py"
    )


def _swiglu(unit: tuple[Op, ...]) -> Op:
    """Keeps the gate before its activation and the factor it multiplies. Their gradients overwrite them."""
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


class FusedKernel(NamedTuple):
    """A function that fuses a unit of `size` operations into one. Units of another size are left as they are."""

    size: int
    make: Callable[[tuple[Op, ...]], Op]


KERNELS = {"rms_norm": FusedKernel(9, _rms_norm), "rope": FusedKernel(4, _rope), "swiglu": FusedKernel(2, _swiglu)}


def fuse(stack: Stack, kernels: Iterable[str]) -> Stack:
    """Return the stack with these kernels fused wherever a unit is written as they expect."""
    wanted = frozenset(KERNELS).intersection(kernels)
    return rewrite_lists(stack, lambda operations: _fused(operations, wanted)) if wanted else stack


def fusible(stack: Stack) -> set[str]:
    """Return the kernels that can fuse at least one unit of the stack."""
    lists = (*outside(stack), *(block.ops for run in stack.runs for block in run.blocks))
    return {_kernel(unit) for operations in lists for unit in _complete_units(operations, frozenset(KERNELS))}


def _kernel(unit: str) -> str:
    return unit.partition(" ")[0]


def _complete_units(operations: Iterable[Op], wanted: frozenset[str]) -> dict[str, tuple[Op, ...]]:
    """Return the units, by name, that the `wanted` kernels can replace."""
    units_by_name: dict[str, tuple[Op, ...]] = {}
    for op in operations:
        if _kernel(op.unit) in wanted:
            units_by_name[op.unit] = (*units_by_name.get(op.unit, ()), op)
    return {name: unit for name, unit in units_by_name.items() if len(unit) == KERNELS[_kernel(name)].size}


def _fused(operations: tuple[Op, ...], wanted: frozenset[str]) -> tuple[Op, ...]:
    """Return the operations with each unit replaced by one operation at the place of the unit's last."""
    units = _complete_units(operations, wanted)
    out: list[Op] = []
    for op in operations:
        unit = units.get(op.unit)
        if unit is None:
            out.append(op)
        elif op is unit[-1]:
            out.append(KERNELS[_kernel(op.unit)].make(unit)._replace(unit=op.unit))
    return tuple(out)
