"""The ledger: the tensors alive at the peak, by name. Sums to the byte to what the walk found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from memplan.answer import Line, Phase
from memplan.catalogue.overhead import cublas_workspace
from memplan.catalogue.states import State
from memplan.engine.walk import alive, moment_bytes, shared, size, values
from memplan.graph import Held, built
from memplan.ir import Stack, operations
from memplan.program import (
    PHASES,
    accumulated_of,
    converting_of,
    gradients_of,
    pass_of,
    passing_of,
    reducing_of,
    resident_of,
)

if TYPE_CHECKING:
    from memplan.estimator import Walked
    from memplan.resolve import Decided

_UPDATE = "update of "  # what the engine calls the scratch of an update in backward


def lines(walked: Walked, decided: Decided) -> list[Line]:
    """Every tensor alive at the peak, largest first."""
    structure = decided.structure
    stack, axes = built(structure.graph)
    axes = {**axes, **walked.axes}
    optimizer = walked.program.optimizer
    out = [*_resident(walked, decided, axes)]
    later, index = walked.moments[walked.peak]
    holds = walked.phases[walked.peak].phase == "step" and bool(walked.program.held)
    if index >= 0 or holds:
        low = pass_of(structure, structure.accumulates if holds else later, labelled=True)
        keepers = _keepers(stack)
        counts = alive(low.held if holds else low.moments[index], low.runs, axes)
        for key, count in sorted(counts.items()):
            if count:
                shape, dtype, kind, block, op, name, source = low.sizes[key]
                where = f"{block}.{op}" if block else op
                variable, bytes_ = size(shape, dtype, axes)
                assert not variable.axes
                out.append(
                    Line(
                        name,
                        kind,
                        where,
                        _letters(shape),
                        _dims(shape, axes),
                        dtype,
                        count,
                        bytes_ * count,
                        _why(kind, name, op, keepers),
                        *((optimizer.source, optimizer.basis) if name.startswith(_UPDATE) else _sourced(source)),
                    )
                )
    return sorted(out, key=lambda line: (-line.bytes, line.where, line.what))


def timeline(walked: Walked) -> Iterator[Phase]:
    """What is allocated whenever memory is about to fall, in order, in the later steps (or the only kind of step)."""
    p = walked.program
    later = any(m for m, _ in walked.moments)
    low = pass_of(p.structure, later)
    _, axes = built(p.structure.graph)
    sizes = [size(key[0], key[1], axes) for key in low.sizes]
    numbers = dict(zip(p.variables, walked.numbers.values, strict=True))
    base = p.parameters + p.buffered + p.reducing + p.scaler + p.states + 2 * walked.workspace
    for moment in low.moments:
        combination = moment_bytes(alive(moment, low.runs, axes), sizes)
        live = sum(n * (numbers[v] if v in numbers else values([v], walked.axes)[0]) for v, n in combination.items())
        beside = p.passing[moment.phase] + (p.accumulated[moment.phase] if later else 0)
        yield Phase(moment.phase, None, base + beside + live, moment.where)
    yield walked.phases[-1]


def _resident(walked: Walked, decided: Decided, axes: Mapping[str, int]) -> Iterator[Line]:
    """Parameters, states, gradients, workspaces: what is there beside the tensors of a moment."""
    p, structure = walked.program, decided.structure
    phase = walked.phases[walked.peak]
    later, _ = walked.moments[walked.peak]
    for held in resident_of(structure):
        yield _held(held, axes, "a buffer of the model" if held.kind == "buffer" else "the model's weights")
    if phase.phase == "load":
        if p.loading > p.parameters:
            yield _scratch(
                "weights before they are converted, less what comes after",
                p.loading - p.parameters,
                "loading",
                "derived",
            )
        return
    workspace = cublas_workspace(decided.gpu.compute_capability if decided.gpu else None)
    handles = 2 if phase.phase in ("backward", "step") or phase.step != 1 else 1
    yield Line(
        workspace.what,
        "other",
        "torch",
        "",
        (),
        "uint8",
        handles,
        handles * workspace.usual,
        "one for each thread that multiplies matrices",
        workspace.source,
        workspace.basis,
    )
    stepping = phase.phase == "step" and phase.where == "optimizer"
    if phase.step == 2 or stepping or p.optimizer.at_once:
        counts: Counter[State] = Counter()  # the first of equal layers has a state of its own, before the others'
        for state in p.optimizer.states:
            if not state.host:
                counts[state._replace(count=1)] += state.count
        for state, count in counts.items():
            yield Line(
                f"{state.parameter} {state.what}".strip(),
                "optstate",
                "optimizer",
                "",
                state.shape,
                state.dtype,
                count,
                state.bytes * count,
                "state of the optimizer",
                p.optimizer.source,
                p.optimizer.basis,
            )
    if p.scaler:
        yield Line(
            "GradScaler", "other", "torch", "", (), "fp32", 3, p.scaler, "scale of fp16 losses", "torch 2.13 amp"
        )
    for held in reducing_of(structure):
        yield _held(held, axes, "where gradients are summed over ranks")
    listed = p.gradients if phase.phase == "step" else later and p.accumulated[phase.phase]
    if p.buffered or listed:
        for held in accumulated_of(structure) if later else gradients_of(structure):
            yield _held(held, axes, "needed by the optimizer")
    if phase.phase == "step":
        scratch = p.optimizer.first if phase.step == 1 else p.optimizer.later
        if stepping and scratch:
            yield _scratch(p.optimizer.scratch, scratch, "inside the optimizer's step", p.optimizer.basis)
        if not stepping:
            made = converting_of(structure)
            yield from (_held(held, axes, "made into the fp32 gradient of the partition") for held in made)
            if not made:
                yield _scratch("norms of gradients", p.clipping, "inside clip_grad_norm_", "derived")
    for held in passing_of(structure, phase.phase) if phase.phase in PHASES else ():
        yield _held(held, axes, "between ranks")


def _held(held: Held, axes: Mapping[str, int], why: str) -> Line:
    return Line(
        held.what,
        held.kind,
        held.where,
        _letters(held.shape),
        _dims(held.shape, axes),
        held.dtype,
        held.copies,
        held.bytes * held.copies,
        why,
        held.source,
    )


def _scratch(what: str, bytes_: int, why: str, basis: str) -> Line:
    return Line(what, "temp", "", "", (), "", 1, bytes_, why, "", basis)


def _sourced(source: str) -> tuple[str, str]:
    """An operation's source, and its basis: a source that begins with "assumed" says that it is."""
    return source or "autograd", "assumed" if source.startswith("assumed") else "derived"


def _letters(shape: str) -> str:
    return "·".join(shape.split())


def _dims(shape: str, axes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(int(t) if t.isdigit() else shared(t, axes) if "/" in t else axes[t] for t in shape.split())


def _keepers(stack: Stack) -> dict[str, str]:
    """Which operation keeps a tensor for whose gradient: of several, the first in the model, which lets go last."""
    found: dict[str, str] = {}
    for op in operations(stack):
        for keep in op.keeps:
            found.setdefault(keep.what, f"kept by {op.name} for the gradient of {keep.of}")
    return found


def _why(kind: str, name: str, op: str, keepers: Mapping[str, str]) -> str:
    if name.startswith(_UPDATE):
        return "the optimizer's, as soon as the gradient is there"
    if kind == "temp":
        return f"inside {op}" if not name.startswith("gradient of") else f"made by {op}, not yet used up"
    if kind == "gradient":
        return "needed by the optimizer"
    return keepers.get(name, "read by a later operation")
