"""Tensors as lines of a ledger: those held throughout, and those alive at a moment of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core.ir import Stack, operations
from memplan.engine.lowered import Lowered
from memplan.engine.moments import Moment
from memplan.engine.walk import alive, shared, size
from memplan.estimate.answer import Line
from memplan.program.graph import TensorGroup, operations_of
from memplan.program.inference.passes import SizedPass

UPDATE = "update of "  # the engine's prefix for the scratch of an update in backward


def alive_lines(
    stack: Stack,
    axes: Mapping[str, int],
    low: Lowered,
    moment: Moment,
    update: tuple[str, str] = ("", ""),
) -> Iterator[Line]:
    """Yield the tensors alive at a moment of a pass of the `stack`, which was lowered with names.

    axes    a number for every axis
    update  source and basis of an optimizer's scratch in backward
    """
    keepers = _kept_because(stack)
    for key, count in sorted(alive(moment, low.runs, axes).items()):
        if count:
            shape, dtype, kind, block, op, name, source = low.sizes[key]
            where = f"{block}.{op}" if block else op
            variable, bytes_ = size(shape, dtype, axes)
            assert not variable.axes
            yield Line(
                name,
                kind,
                where,
                in_letters(shape),
                in_numbers(shape, axes),
                dtype,
                count,
                bytes_ * count,
                _why(kind, name, op, keepers),
                *(update if name.startswith(UPDATE) else _source_and_basis(source)),
            )


def pass_lines(each: SizedPass, moment: Moment | None = None) -> Iterator[Line]:
    """Yield the tensors alive at a moment of a pass, or those that it leaves for the next one."""
    low = each.low(labelled=True)
    return alive_lines(operations_of(each.step.graph)[0], each.axes, low, moment or low.left)


def weight_line(held: TensorGroup, axes: Mapping[str, int], why: str = "the model's weights") -> Line:
    """Return the line of a weight or a buffer of the model."""
    return held_line(held, axes, "a buffer of the model" if held.kind == "buffer" else why)


def workspace_line(gpu: GPU | None, handles: int = 1) -> Line:
    """Return the line of cuBLAS's workspaces, of one handle or more."""
    row = cublas_workspace(gpu.compute_capability if gpu else None)
    why, bytes_ = "one for each thread that multiplies matrices", handles * row.usual
    return Line(row.what, "other", "torch", "", (), "uint8", handles, bytes_, why, row.source, row.basis)


def held_line(held: TensorGroup, axes: Mapping[str, int], why: str) -> Line:
    """Return the line of a tensor that is held throughout."""
    return Line(
        held.what,
        held.kind,
        held.where,
        in_letters(held.shape),
        in_numbers(held.shape, axes),
        held.dtype,
        held.copies,
        held.bytes * held.copies,
        why,
        held.source,
    )


def in_letters(shape: str) -> str:
    """Return a shape as ledgers write it."""
    return "·".join(_tokens(shape))


def in_numbers(shape: str, axes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a shape in numbers."""
    return tuple(int(t) if t.isdigit() else shared(t, axes) if "/" in t else axes[t] for t in _tokens(shape))


def _tokens(shape: str) -> Iterator[str]:
    """Yield the axes of a shape, without its device (`memplan.catalogue.parallelism.device_maps`)."""
    return (token for token in shape.split() if not token.startswith("@"))


def _source_and_basis(source: str) -> tuple[str, str]:
    """Return an operation's source and basis. A source that begins with "assumed" is assumed."""
    return source or "autograd", "assumed" if source.startswith("assumed") else "derived"


def _kept_because(stack: Stack) -> dict[str, str]:
    """Return why each tensor stays alive: which operation keeps it, for whose gradient, or that it is cached.

    If several operations keep a tensor, the first in the model releases it last, and is named.
    """
    reasons: dict[str, str] = {}
    for op in operations(stack):
        for keep in () if op.only_dtype else op.keeps:  # it may not run
            reasons.setdefault(keep.what, f"kept by {op.name} for the gradient of {keep.of}")
        if op.holds == "cache":
            reasons.update((t.name, "cached for later tokens") for t in op.writes)
        reasons.update((t.name, "cached from earlier tokens, until the new one is appended") for t in op.past)
    for op in operations(stack):
        if op.cast and op.gradient == "none" and op.needs_recording:  # if it is dropped, its input is what is kept
            reasons.setdefault(op.reads[0], reasons[op.writes[0].name])
    return reasons


def _why(kind: str, name: str, op: str, keepers: Mapping[str, str]) -> str:
    if name.startswith(UPDATE):
        return "the optimizer steps as soon as the gradient is ready"
    if kind == "temp":
        return f"inside {op}" if not name.startswith("gradient of") else f"made by {op}, not yet used up"
    if kind == "gradient":
        return "needed by the optimizer"
    return keepers.get(name, "read by a later operation")
