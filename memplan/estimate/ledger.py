"""The ledger: the tensors alive at the peak, by name. Sums to the byte to what the walk found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.catalogue.optimizers.states import State
from memplan.catalogue.parallelism.pipeline import ENGINES, Moment
from memplan.catalogue.parallelism.sharding import MEGATRON
from memplan.engine.lower import Moment as LoweredMoment
from memplan.engine.step import Lowered
from memplan.engine.walk import alive, moment_bytes, size, values
from memplan.estimate.answer import Line, Phase
from memplan.estimate.lines import alive_lines, held_line, in_letters, in_numbers
from memplan.estimate.side_task import Aside
from memplan.estimate.walk import Walked
from memplan.program.graph import Held, built, parameters_of
from memplan.program.inference.passes import bytes_of, live
from memplan.program.run import Decided
from memplan.program.training.program import (
    GATHERED,
    PHASES,
    REDUCED,
    RETURNED,
    Flown,
    Structure,
    accumulated_bytes,
    accumulated_of,
    beside_of,
    chunks_of,
    converting_of,
    flying,
    gathered_of,
    gone_bytes,
    gradients_of,
    pass_of,
    passing_of,
    reduced_of,
    reducing_of,
    resident_of,
    returned,
    stays_whole,
    whole_of,
)


def lines(walked: Walked, decided: Decided) -> list[Line]:
    """Every tensor alive at the peak, largest first."""
    structure = decided.structure
    axes = {**built(structure.graph)[1], **walked.axes}
    if walked.aside is not None:
        out = [*_of_aside(walked, walked.aside, decided, axes)]
        return sorted(out, key=lambda line: (-line.bytes, line.where, line.what))
    out = [*_resident(walked, decided, axes)]
    later, index = walked.moments[walked.peak]
    holds = walked.phases[walked.peak].phase == "step" and bool(walked.program.held)
    if structure.pipe.engine:
        if index >= 0:
            flown = walked.program.flown[later][index]
            out += _flown(walked, flown)
            out += _between(structure, flown.beside, axes, flown.moment == REDUCED)
            out += _returned(structure, axes) if flown.moment == RETURNED else ()
        elif holds:
            out += _between(structure, None, axes)
    elif index >= 0 or holds:
        low = pass_of(structure, structure.accumulates if holds else later)
        out += _alive(structure, low, low.held if holds else low.moments[index], walked)
    return sorted(out, key=lambda line: (-line.bytes, line.where, line.what))


def _of_aside(walked: Walked, aside: Aside, decided: Decided, axes: Mapping[str, int]) -> Iterator[Line]:
    """The tensors alive at the peak of what a run does beside its steps: what stands between two, and its own."""
    structure, p = decided.structure, walked.program
    if aside.alone is None:
        for held in resident_of(structure):
            yield held_line(held, axes, "a buffer of the model" if held.kind == "buffer" else "the model's weights")
        yield _workspaces(walked, decided, 2)
        yield from _between_steps(walked, states=True)
        for held in gradients_of(structure) if p.buffered else ():
            yield held_line(held, axes, "in buffers of their own")
        for held in passing_of(structure, "forward") if aside.phase == "eval" else ():
            yield held_line(held, axes, "between ranks")
    else:
        numbers = built(aside.alone)[1]
        for held in parameters_of(aside.alone):
            yield held_line(held, numbers, "a buffer of the model" if held.kind == "buffer" else "loaded to be merged")
        if aside.loads == aside.peak:
            yield _scratch("weights before they are converted", aside.loads - aside.standing, "loading", "derived")
            yield _workspaces(walked, decided, 1)
            return
        yield _workspaces(walked, decided, 1)
    numbers = axes if not aside.passes else {**axes, **dict(aside.passes[0][1])}
    for held in aside.held:
        yield held_line(held, numbers if aside.alone is None else built(aside.alone)[1], _KEPT[aside.phase])
    i, moment = aside.top
    if i >= 0:
        step, own = aside.passes[i]
        low = aside.low(i, labelled=True)
        stack, fixed = built(step.graph)
        yield from alive_lines(stack, {**fixed, **dict(own)}, low, low.moments[moment])


# Why what an aside holds is there.
_KEPT = {
    "eval": "predictions of the evaluation's batches are joined on the GPU",
    "generate": "kept by the evaluation",
    "save": "gathered whole to be written",
    "merge": "while a layer's adapter is added to its weight",
}


def _flown(walked: Walked, flown: Flown) -> Iterator[Line]:
    """What is alive at a moment of a pipeline's rank: the pass's own tensors, and what those in flight keep."""
    beside = flown.beside
    total = sum(beside.others) + 1
    for i, structure in enumerate(chunks_of(walked.program.structure)):
        low = pass_of(structure, i == beside.chunk and beside.graded[i])
        if flown.opens:
            low = pass_of(structure, opens=True)
        if i == beside.chunk and flown.moment not in (REDUCED, GATHERED):
            yield from _alive(structure, low, low.moments[flown.moment] if flown.moment >= 0 else low.kept, walked)
        if beside.others[i]:
            passes = f"{beside.others[i]} of {total} microbatches in flight"
            if len(beside.others) > 1:
                passes = f"{beside.others[i]} of {total} passes in flight, through chunk {i}"
            for line in _alive(structure, low, low.kept, walked):
                count, bytes_ = line.count * beside.others[i], line.bytes * beside.others[i]
                yield line._replace(count=count, bytes=bytes_, why=f"{passes}: {line.why}")


def _returned(structure: Structure, axes: Mapping[str, int]) -> Iterator[Line]:
    """The logits on the first GPU, which a model's outputs are moved to."""
    logits = returned(structure)
    if logits is not None:
        bytes_ = size(logits.shape, logits.dtype, axes)[1]
        shape, dims, source = (
            in_letters(logits.shape),
            in_numbers(logits.shape, axes),
            ENGINES[structure.pipe.engine].source,
        )
        why = "what the model returns is moved to where its inputs are"
        yield Line("logits", "activation", "return", shape, dims, logits.dtype, 1, bytes_, why, source)


_BETWEEN = {
    "received": ("hidden states received, or their gradient sent", "receive"),
    "sent": ("hidden states sent, or their gradient received", "send"),
    "logits": ("logits of the microbatch before", "loss"),
    "buffer": ("", ""),
}


def _between(
    structure: Structure, moment: Moment | None, axes: Mapping[str, int], reduces: bool = False
) -> Iterator[Line]:
    """What a pipeline's rank has of hidden states beside those of passes."""
    engine = ENGINES[structure.pipe.engine]
    for tensor, which, count in beside_of(structure, moment, reduces):
        bytes_ = size(tensor.shape, tensor.dtype, axes)[1] * count
        why = "a buffer for every microbatch" if engine.buffers else "the loop's names have no other yet"
        what, where = _BETWEEN[which]
        if which == "buffer":
            what, why = tensor.name, "one buffer for all microbatches"
        shape, dims = in_letters(tensor.shape), in_numbers(tensor.shape, axes)
        yield Line(what, "activation", where, shape, dims, tensor.dtype, count, bytes_, why, engine.source)


def _alive(structure: Structure, low: Lowered, moment: LoweredMoment, walked: Walked) -> Iterator[Line]:
    """The tensors alive at a moment of a pass."""
    stack, own = built(structure.graph)
    axes = {**own, **walked.axes}
    optimizer = walked.program.optimizer
    yield from alive_lines(stack, axes, low, moment, (optimizer.source, optimizer.basis))


def timeline(walked: Walked) -> Iterator[Phase]:
    """What is allocated whenever memory is about to fall, in order, in the later steps (or the only kind of step)."""
    p = walked.program
    base = p.parameters + p.buffered + p.reducing + p.scaler + p.states + 2 * walked.workspace
    if p.structure.pipe.engine:
        passes = [*_round(walked)]
    else:
        later = any(m for m, _ in walked.moments)
        found: dict[str, int] = p.accumulated if later else dict.fromkeys(PHASES, 0)
        passes = [(p.structure, pass_of(p.structure, later), PHASES, found)]
    for structure, low, phases, beside in passes:
        for moment in low.moments:
            if moment.phase in phases:
                live = beside[moment.phase] + _live(structure, low, moment, walked)
                yield Phase(moment.phase, None, base + p.passing[moment.phase] + live, moment.where)
    yield walked.phases[len(walked.phases) - len(walked.asides) - 1]
    for aside in walked.asides:
        yield from _moments_of(aside)


def _moments_of(aside: Aside) -> Iterator[Phase]:
    """The moments of what a run does beside its steps; of the passes it generates by, the first and the last."""
    for i, (_, axes) in enumerate(aside.passes):
        low, numbers = aside.low(i), dict(axes)
        sizes = bytes_of(low, numbers)
        for moment in low.moments if aside.top != (-1, -1) else ():
            bytes_ = aside.standing + aside.beside + live(low, moment, numbers, sizes)
            yield Phase(aside.phase, None, bytes_, moment.where)
    if aside.top == (-1, -1):
        yield Phase(aside.phase, None, aside.peak, aside.where)


def _live(structure: Structure, low: Lowered, moment: LoweredMoment, walked: Walked) -> int:
    """Bytes alive at a moment of a pass."""
    _, axes = built(structure.graph)
    combination = moment_bytes(alive(moment, low.runs, axes), [size(key[0], key[1], axes) for key in low.sizes])
    numbers = dict(zip(walked.program.variables, walked.numbers.values, strict=True))
    return sum(n * (numbers[v] if v in numbers else values([v], walked.axes)[0]) for v, n in combination.items())


def _round(walked: Walked) -> Iterator[tuple[Structure, Lowered, tuple[str, ...], dict[str, int]]]:
    """The passes through each chunk that have most in flight, forward and then backward."""
    structure = walked.program.structure
    chunks, moments = chunks_of(structure), flying(structure)
    axes = {**built(structure.graph)[1], **walked.axes}
    for backward in (False, True):
        for i, chunk in enumerate(chunks):
            most = max(
                (m for m in moments if m.backward == backward and m.chunk == i),
                key=lambda m: (sum(m.graded), sum(m.others)),
            )
            low = pass_of(chunk, most.graded[i])
            beside = sum(size(t.shape, t.dtype, axes)[1] * n for t, _, n in beside_of(structure, most))
            for j, other in enumerate(chunks):
                kept = pass_of(other)
                beside += most.others[j] * _live(other, kept, kept.kept, walked)
                beside += accumulated_bytes(other) if most.graded[j] else 0
                beside -= gone_bytes(other) if most.done[j] and stays_whole(structure) else 0
            phases = ("backward",) if backward else ("forward", "loss")
            yield chunk, low, phases, dict.fromkeys(phases, beside)


def _resident(walked: Walked, decided: Decided, axes: Mapping[str, int]) -> Iterator[Line]:
    """Parameters, states, gradients, workspaces: what is there beside the tensors of a moment."""
    p, structure = walked.program, decided.structure
    phase = walked.phases[walked.peak]
    later, _ = walked.moments[walked.peak]
    for held in resident_of(structure):
        yield held_line(held, axes, "a buffer of the model" if held.kind == "buffer" else "the model's weights")
    if phase.phase == "load":
        if p.loading > p.parameters:
            what = _LOADED.get(structure.ranks.strategy, "weights before they are converted")
            bytes_ = p.loading - p.parameters
            yield _scratch(f"{what}, less what comes after", bytes_, "loading", "derived")
        return
    yield _workspaces(walked, decided, 2 if phase.phase in ("backward", "step") or phase.step != 1 else 1)
    stepping = phase.phase == "step" and phase.where == "optimizer"
    yield from _between_steps(walked, phase.step == 2 or stepping or p.optimizer.at_once)
    flown = _flown_at(walked)
    if flown is not None and stays_whole(structure):
        for held in _whole(structure, flown, later):
            yield held_line(held, axes, _IN_STAGES[held.kind])
        return
    listed = p.gradients if phase.phase == "step" else later and p.accumulated[phase.phase]
    if p.buffered or listed:
        for held in _gradients(walked):
            yield held_line(held, axes, "needed by the optimizer")
    if phase.phase == "step":
        scratch = p.optimizer.first if phase.step == 1 else p.optimizer.later
        if stepping and scratch:
            yield _scratch(p.optimizer.scratch, scratch, "inside the optimizer's step", p.optimizer.basis)
        if not stepping:
            made = converting_of(structure)
            yield from (held_line(held, axes, "made into the fp32 gradient of the partition") for held in made)
            if not made:
                yield _scratch("norms of gradients", p.clipping, "inside clip_grad_norm_", "derived")
    for held in passing_of(structure, phase.phase) if phase.phase in PHASES else ():
        yield held_line(held, axes, "between ranks")


# What a rank has while it loads, in addition to what it keeps.
_LOADED = {
    "ddp": "weights as DDP broadcasts them",
    **dict.fromkeys(("fsdp", "fsdp2", "zero1", "zero2", "zero3", MEGATRON), "weights before they are divided"),
}


def _workspaces(walked: Walked, decided: Decided, handles: int) -> Line:
    """cuBLAS's workspaces."""
    workspace = cublas_workspace(decided.gpu.compute_capability if decided.gpu else None)
    return Line(
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


def _between_steps(walked: Walked, states: bool) -> Iterator[Line]:
    """What stays from step to step beside weights: the optimizer's states where they are there, and what reduces."""
    p, structure = walked.program, walked.program.structure
    axes = {**built(structure.graph)[1], **walked.axes}
    if states:
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
        yield held_line(held, axes, "where gradients are summed over ranks")


# Why FSDP2 has what it has in the stages of a pipeline.
_IN_STAGES = {
    "parameter": "whole for all microbatches",
    "gradient": "summed whole over microbatches, or reduced already",
    "temp": "what a collective reads or writes",
}


def _whole(structure: Structure, flown: Flown, later: bool) -> Iterator[Held]:
    """The weights and gradients that a rank has whole at a moment of its pipeline, and those reduced already."""
    if flown.moment == REDUCED:
        yield from reduced_of(structure, flown)
        return
    if flown.moment == GATHERED:
        yield from gathered_of(structure, flown)
    for i, chunk in enumerate(chunks_of(structure) if not flown.opens else ()):
        beside = flown.beside if later else flown.beside._replace(graded=(False,) * len(flown.beside.graded))
        yield from whole_of(chunk, beside, i)


def _flown_at(walked: Walked) -> Flown | None:
    """What a pipeline's rank is at when most is there, in a pass."""
    later, index = walked.moments[walked.peak]
    return walked.program.flown[later][index] if walked.program.structure.pipe.engine and index >= 0 else None


def _gradients(walked: Walked) -> Iterator[Held]:
    """The gradients there are beside a moment."""
    p, structure = walked.program, walked.program.structure
    later, index = walked.moments[walked.peak]
    if not later:
        yield from gradients_of(structure)
    elif not structure.pipe.engine or p.buffered:
        yield from accumulated_of(structure)
    else:
        for chunk, there in zip(chunks_of(structure), p.flown[later][index].beside.graded, strict=True):
            yield from accumulated_of(chunk) if there else ()


def _scratch(what: str, bytes_: int, why: str, basis: str) -> Line:
    return Line(what, "temp", "", "", (), "", 1, bytes_, why, "", basis)
