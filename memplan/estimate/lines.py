"""Tensors as lines of a ledger: what is there throughout, and what is alive at a moment of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.core.ir import Stack, operations
from memplan.engine.lower import Moment
from memplan.engine.step import Lowered
from memplan.engine.walk import alive, shared, size
from memplan.estimate.answer import Line
from memplan.program.graph import Held

UPDATE = "update of "  # what the engine calls the scratch of an update in backward


def alive_lines(
    stack: Stack,
    axes: Mapping[str, int],
    low: Lowered,
    moment: Moment,
    update: tuple[str, str] = ("", ""),
) -> Iterator[Line]:
    """The tensors alive at a moment of a pass of the `stack`, lowered with names; `axes` have a number for every axis.
    `update`: the source and basis of an optimizer's scratch in backward."""
    keepers = _keepers(stack)
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
                *(update if name.startswith(UPDATE) else _sourced(source)),
            )


def held_line(held: Held, axes: Mapping[str, int], why: str) -> Line:
    """A tensor that is there throughout."""
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
    """A shape as ledgers write it."""
    return "·".join(_tokens(shape))


def in_numbers(shape: str, axes: Mapping[str, int]) -> tuple[int, ...]:
    """A shape in numbers."""
    return tuple(int(t) if t.isdigit() else shared(t, axes) if "/" in t else axes[t] for t in _tokens(shape))


def _tokens(shape: str) -> Iterator[str]:
    """The axes of a shape, without the place where it is (`memplan.catalogue.parallelism.device_maps`)."""
    return (token for token in shape.split() if not token.startswith("@"))


def _sourced(source: str) -> tuple[str, str]:
    """An operation's source, and its basis: a source that begins with "assumed" says that it is."""
    return source or "autograd", "assumed" if source.startswith("assumed") else "derived"


def _keepers(stack: Stack) -> dict[str, str]:
    """Why a tensor stays: which operation keeps it for whose gradient, of several the first in the model, which lets go
    last; or that later tokens are to find it."""
    found: dict[str, str] = {}
    for op in operations(stack):
        for keep in op.keeps:
            found.setdefault(keep.what, f"kept by {op.name} for the gradient of {keep.of}")
        if op.holds == "cache":
            found.update((t.name, "for the tokens to come") for t in op.writes)
        found.update((t.name, "from the tokens before, until it is joined with the new one") for t in op.past)
    return found


def _why(kind: str, name: str, op: str, keepers: Mapping[str, str]) -> str:
    if name.startswith(UPDATE):
        return "the optimizer's, as soon as the gradient is there"
    if kind == "temp":
        return f"inside {op}" if not name.startswith("gradient of") else f"made by {op}, not yet used up"
    if kind == "gradient":
        return "needed by the optimizer"
    return keepers.get(name, "read by a later operation")
