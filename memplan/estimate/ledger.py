"""The ledger: the tensors alive at the peak, by name. It sums to the peak to the byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from memplan.catalogue.optimizers.states import State
from memplan.catalogue.parallelism.pipeline import ENGINES, PipelineMoment
from memplan.catalogue.parallelism.sharding import MEGATRON
from memplan.core.records import NamedTuple
from memplan.engine.lowered import Lowered
from memplan.engine.moments import Moment as LoweredMoment
from memplan.engine.walk import bytes_at_each, kinds_at_each, size, values
from memplan.estimate.answer import Line, Phase, bytes_by_kind, largest_first
from memplan.estimate.lines import (
    alive_lines,
    held_line,
    in_letters,
    in_numbers,
    pass_lines,
    weight_line,
    workspace_line,
)
from memplan.estimate.side_task import SideTask
from memplan.estimate.training_peaks import TrainingPeaks
from memplan.program.graph import TensorGroup, bytes_of_kinds, operations_of, parameters_of
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.passes import GATHERED, PHASES, REDUCED, RETURNED, ScheduleMoment, pass_of
from memplan.program.training.pipeline_moments import returned, schedule_positions, stage_buffers


def lines(walked: TrainingPeaks, decided: ResolvedRun) -> list[Line]:
    """Return every tensor alive at the peak, largest first."""
    structure = decided.structure
    axes = {**operations_of(structure.graph)[1], **walked.axes}
    if walked.side_task is not None:
        out = [*_side_task_lines(walked, walked.side_task, decided, axes)]
        return largest_first(out)
    out = [*_resident(walked, decided, axes)]
    later, index = walked.moments[walked.peak]
    holds = walked.phases[walked.peak].phase == "step" and bool(walked.program.moments.held)
    if structure.pipe.engine:
        if index >= 0:
            in_pipeline = walked.program.moments.schedule_moments[later][index]
            out += _pipeline_lines(walked, in_pipeline)
            out += _hidden_state_lines(structure, in_pipeline.schedule_position, axes, in_pipeline.moment == REDUCED)
            out += _returned(structure, axes) if in_pipeline.moment == RETURNED else ()
        elif holds:
            out += _hidden_state_lines(structure, None, axes)
    elif index >= 0 or holds:
        low = pass_of(structure, structure.accumulates if holds else later)
        out += _alive(structure, low, low.held if holds else low.moments[index], walked)
    return largest_first(out)


def _side_task_lines(
    walked: TrainingPeaks, aside: SideTask, decided: ResolvedRun, axes: Mapping[str, int]
) -> Iterator[Line]:
    """Yield the tensors alive at the peak of a side task: what persists between steps, and its own."""
    sharding, p = sharding_of(decided.structure), walked.program
    if aside.own_process_graph is None:
        for held in sharding.weights() if "parameters" not in aside.moved else decided.structure.engine:
            yield weight_line(held, axes)
        yield workspace_line(decided.gpu, 2)
        yield from _between_steps(walked, states="optimizer" not in aside.moved)
        for held in sharding.gradients() if p.buffered else ():
            yield held_line(held, axes, "in gradient buffers")
        for held in sharding.held_in("forward") if any(each.phase == "eval" for each in aside.passes) else ():
            yield held_line(held, axes, "between ranks")
    else:
        numbers = operations_of(aside.own_process_graph)[1]
        for held in parameters_of(aside.own_process_graph):
            yield weight_line(held, numbers, "loaded to be merged")
        if aside.loads == aside.peak:
            yield _scratch("weights before conversion", aside.loads - aside.persistent_bytes, "loading", "derived")
            yield workspace_line(decided.gpu, 1)
            return
        yield workspace_line(decided.gpu, 1)
    numbers = {**axes, **aside.passes[0].axes} if aside.passes else axes
    for held in aside.held:
        yield held_line(
            held,
            numbers if aside.own_process_graph is None else operations_of(aside.own_process_graph)[1],
            _WHY_HELD[aside.phase],
        )
    i, moment = aside.top
    if i >= 0:
        each = aside.passes[i]
        yield from pass_lines(each, each.low(labelled=True).moments[moment])


# Why a side task holds its tensors.
_WHY_HELD = {
    "eval": "the evaluation's predictions are concatenated on the GPU",
    "generate": "kept by the evaluation",
    **dict.fromkeys(("reward", "rollout", "critic"), "kept by the step"),
    "save": "gathered to be written",
    "merge": "while a layer's adapter is added to its weight",
}


def _pipeline_lines(walked: TrainingPeaks, scheduled: ScheduleMoment) -> Iterator[Line]:
    """Yield what is alive at a moment of a pipeline rank: the pass's own tensors, and what passes in flight keep."""
    position = scheduled.schedule_position
    total = sum(position.others) + 1
    for i, structure in enumerate(chunks_of(walked.program.structure)):
        low = pass_of(structure, i == position.chunk and position.has_gradient[i])
        if scheduled.opens:
            low = pass_of(structure, opens=True)
        if i == position.chunk and scheduled.moment not in (REDUCED, GATHERED):
            yield from _alive(
                structure, low, low.moments[scheduled.moment] if scheduled.moment >= 0 else low.kept, walked
            )
        if position.others[i]:
            passes = f"{position.others[i]} of {total} microbatches in flight"
            if len(position.others) > 1:
                passes = f"{position.others[i]} of {total} passes in flight, through chunk {i}"
            for line in _alive(structure, low, low.kept, walked):
                count, bytes_ = line.count * position.others[i], line.bytes * position.others[i]
                yield line._replace(count=count, bytes=bytes_, why=f"{passes}: {line.why}")


def _returned(structure: Structure, axes: Mapping[str, int]) -> Iterator[Line]:
    """Yield the logits on the first GPU, where a model's outputs are moved."""
    logits = returned(structure)
    if logits is not None:
        bytes_ = size(logits.shape, logits.dtype, axes)[1]
        shape, dims, source = (
            in_letters(logits.shape),
            in_numbers(logits.shape, axes),
            ENGINES[structure.pipe.engine].source,
        )
        why = "outputs are moved to the GPU of the inputs"
        yield Line("logits", "activation", "return", shape, dims, logits.dtype, 1, bytes_, why, source)


_HIDDEN_STATES = {
    "received": ("hidden states received, or their gradient sent", "receive"),
    "sent": ("hidden states sent, or their gradient received", "send"),
    "logits": ("logits of the previous microbatch", "loss"),
    "buffer": ("", ""),
}


def _hidden_state_lines(
    structure: Structure, moment: PipelineMoment | None, axes: Mapping[str, int], reduces: bool = False
) -> Iterator[Line]:
    """Yield the hidden states that a pipeline rank holds outside its passes."""
    engine = ENGINES[structure.pipe.engine]
    for tensor, which, count in stage_buffers(structure, moment, reduces):
        bytes_ = size(tensor.shape, tensor.dtype, axes)[1] * count
        why = "a buffer for every microbatch" if engine.buffers else "the loop still references it"
        what, where = _HIDDEN_STATES[which]
        if which == "buffer":
            what, why = tensor.name, "one buffer for all microbatches"
        shape, dims = in_letters(tensor.shape), in_numbers(tensor.shape, axes)
        yield Line(what, "activation", where, shape, dims, tensor.dtype, count, bytes_, why, engine.source)


def _alive(structure: Structure, low: Lowered, moment: LoweredMoment, walked: TrainingPeaks) -> Iterator[Line]:
    """Yield the tensors alive at a moment of a pass."""
    stack, fixed = operations_of(structure.graph)
    axes = {**fixed, **walked.axes}
    optimizer = walked.program.optimizer
    yield from alive_lines(stack, axes, low, moment, (optimizer.source, optimizer.basis))


class _TimelinePass(NamedTuple):
    """The moments of a pass on the timeline, and the bytes by kind that other passes hold meanwhile, by phase."""

    structure: Structure
    low: Lowered
    moments: list[LoweredMoment]
    extra: dict[str, Counter[str]]


def timeline(walked: TrainingPeaks) -> Iterator[Phase]:
    """Yield the bytes allocated whenever memory is about to fall, in order, in the later steps (or the only kind)."""
    p = walked.program
    base = p.parameters + p.buffered + p.reducing + p.scaler + p.states + 2 * walked.workspace
    for structure, low, moments, extra in _timeline_passes(walked):
        held = {phase: base + p.passing[phase] + counter.total() for phase, counter in extra.items()}
        for moment, live in zip(moments, _live(structure, low, moments, walked), strict=True):
            yield Phase(moment.phase, None, held[moment.phase] + live, moment.where)
    yield walked.phases[len(walked.phases) - len(walked.side_tasks) - 1]
    for aside in walked.side_tasks:
        yield from _side_task_moments(aside)


def timeline_kinds(walked: TrainingPeaks, decided: ResolvedRun) -> Iterator[Counter[str]]:
    """Yield the bytes of each kind at every moment of the timeline."""
    p, sharding = walked.program, sharding_of(decided.structure)
    base = bytes_of_kinds((*sharding.weights(), *sharding.reduction_buffers()))
    base.update(gradient=p.buffered, optstate=p.states, other=p.scaler + 2 * walked.workspace)
    for structure, low, moments, extra in _timeline_passes(walked):
        held = {phase: base + bytes_of_kinds(sharding.held_in(phase)) for phase in extra}
        for phase, counter in extra.items():
            held[phase].update(counter)
        for moment, live in zip(moments, _live_kinds(structure, low, moments, walked), strict=True):
            yield held[moment.phase] + live
    at = len(walked.phases) - len(walked.side_tasks) - 1
    yield bytes_by_kind(lines(walked._replace(peak=at), decided))
    axes = {**operations_of(decided.structure.graph)[1], **walked.axes}
    for aside in walked.side_tasks:
        held_aside = bytes_by_kind(_side_task_lines(walked, aside, decided, axes))
        i, moment = aside.top
        if i < 0:
            yield held_aside
            continue
        low = aside.passes[i].low(labelled=True)
        held_aside.subtract(next(aside.passes[i].kinds((low.moments[moment],))))
        for each in aside.passes:
            yield from (held_aside + live for live in each.kinds())


def _timeline_passes(walked: TrainingPeaks) -> Iterator[_TimelinePass]:
    p = walked.program
    if p.structure.pipe.engine:
        yield from _fullest_passes(walked)
        return
    later = any(m for m, _ in walked.moments)
    extra = {phase: Counter(gradient=bytes_ if later else 0) for phase, bytes_ in p.accumulated.items()}
    low = pass_of(p.structure, later)
    yield _TimelinePass(p.structure, low, [*low.moments], extra)


def _side_task_moments(aside: SideTask) -> Iterator[Phase]:
    """Yield the moments of a side task; of the passes that generate, the first and the last."""
    if aside.top == (-1, -1):
        yield Phase(aside.phase, None, aside.peak, aside.where)
        return
    for each in aside.passes:
        held = aside.persistent_bytes + aside.held_bytes
        yield from (Phase(aside.phase, None, held + bytes_, where) for where, bytes_ in each.moments())


def _sizes(structure: Structure, low: Lowered, walked: TrainingPeaks) -> list[int]:
    """Return the bytes of one storage of each size of a pass."""
    _, axes = operations_of(structure.graph)
    numbers = dict(zip(walked.program.moments.variables, walked.numbers, strict=True))
    sizes = [size(key[0], key[1], axes) for key in low.sizes]
    return [n * (numbers[v] if v in numbers else values([v], walked.axes)[0]) for v, n in sizes]


def _live(structure: Structure, low: Lowered, moments: Iterable[LoweredMoment], walked: TrainingPeaks) -> Iterator[int]:
    """Yield the bytes alive at every moment of a pass."""
    return bytes_at_each(moments, low.runs, operations_of(structure.graph)[1], _sizes(structure, low, walked))


def _live_kinds(
    structure: Structure, low: Lowered, moments: Iterable[LoweredMoment], walked: TrainingPeaks
) -> Iterator[Counter[str]]:
    """Yield the bytes of each kind alive at every moment of a pass."""
    axes = operations_of(structure.graph)[1]
    return kinds_at_each(moments, low.runs, axes, _sizes(structure, low, walked), low.kinds)


def _fullest_passes(walked: TrainingPeaks) -> Iterator[_TimelinePass]:
    """Yield the pass through each chunk with the most in flight, forward and then backward."""
    structure = walked.program.structure
    chunks, moments = chunks_of(structure), schedule_positions(structure)
    axes = {**operations_of(structure.graph)[1], **walked.axes}
    for backward in (False, True):
        for i, chunk in enumerate(chunks):
            fullest = max(
                (m for m in moments if m.backward == backward and m.chunk == i),
                key=lambda m: (sum(m.has_gradient), sum(m.others)),
            )
            low = pass_of(chunk, fullest.has_gradient[i])
            buffered = sum(size(t.shape, t.dtype, axes)[1] * n for t, _, n in stage_buffers(structure, fullest))
            extra = Counter(activation=buffered)
            for j, other in enumerate(chunks):
                kept = pass_of(other)
                live = next(_live_kinds(other, kept, (kept.kept,), walked))
                extra.update({kind: fullest.others[j] * n for kind, n in live.items()})
                extra["gradient"] += sharding_of(other).accumulated_bytes() if fullest.has_gradient[j] else 0
                if fullest.done[j]:
                    extra.subtract(sharding_of(other).released())
            phases = ("backward",) if backward else ("forward", "loss")
            at = [moment for moment in low.moments if moment.phase in phases]
            yield _TimelinePass(chunk, low, at, dict.fromkeys(phases, extra))


def _resident(walked: TrainingPeaks, decided: ResolvedRun, axes: Mapping[str, int]) -> Iterator[Line]:
    """Yield parameters, states, gradients and workspaces: what is held around the tensors of a moment."""
    p, structure = walked.program, decided.structure
    phase = walked.phases[walked.peak]
    later, _ = walked.moments[walked.peak]
    sharding = sharding_of(structure)
    for held in sharding.weights():
        yield weight_line(held, axes)
    if phase.phase == "load":
        if p.loading > p.parameters:
            what = _LOADING_EXTRA.get(structure.ranks.strategy, "weights before conversion")
            bytes_ = p.loading - p.parameters
            yield _scratch(f"{what}, beyond those kept", bytes_, "loading", "derived")
        return
    yield workspace_line(decided.gpu, 2 if phase.phase in ("backward", "step") or phase.step != 1 else 1)
    stepping = phase.phase == "step" and phase.where == "optimizer"
    yield from _between_steps(walked, phase.step == 2 or stepping or p.optimizer.at_once)
    in_pipeline = _pipeline_state(walked)
    if in_pipeline is not None and sharding.gathers_for_step:
        for held in _unsharded(structure, in_pipeline, later):
            yield held_line(held, axes, _WHY_UNSHARDED[held.kind])
        return
    has_gradients = p.gradients if phase.phase == "step" else later and p.accumulated[phase.phase]
    if p.buffered or has_gradients:
        for held in _gradients(walked):
            yield held_line(held, axes, "needed by the optimizer")
    if phase.phase == "step":
        scratch = p.optimizer.first if phase.step == 1 else p.optimizer.later
        if stepping and scratch:
            yield _scratch(p.optimizer.scratch, scratch, "inside the optimizer's step", p.optimizer.basis)
        if not stepping:
            converting = tuple(sharding.gradient_conversion())
            yield from (held_line(held, axes, "between backward and the update") for held in converting)
            if not converting:
                yield _scratch("norms of gradients", p.clipping, "inside clip_grad_norm_", "derived")
    for held in sharding.held_in(phase.phase) if phase.phase in PHASES else ():
        yield held_line(held, axes, "between ranks")


# What a rank holds while it loads, in addition to what it keeps.
_LOADING_EXTRA = {
    "ddp": "weights as DDP broadcasts them",
    **dict.fromkeys(("fsdp", "fsdp2", "zero1", "zero2", "zero3", MEGATRON), "weights before sharding"),
}


def _between_steps(walked: TrainingPeaks, states: bool) -> Iterator[Line]:
    """Yield what persists between steps besides weights: optimizer states, if `states`, and reduction buffers."""
    p, structure = walked.program, walked.program.structure
    axes = {**operations_of(structure.graph)[1], **walked.axes}
    if states:
        counts: Counter[State] = Counter()  # equal layers are one line, though the first has its own entry
        for state in sharding_of(structure).optimizer().states:
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
    for held in sharding_of(structure).reduction_buffers():
        yield held_line(held, axes, "gradients are summed over ranks in it")


# Why FSDP2 holds its tensors with pipeline stages.
_WHY_UNSHARDED = {
    "parameter": "gathered for all microbatches",
    "gradient": "accumulated unsharded over microbatches, or reduced already",
    "temp": "what a collective reads or writes",
}


def _unsharded(structure: Structure, scheduled: ScheduleMoment, later: bool) -> Iterator[TensorGroup]:
    """Yield the unsharded weights and gradients that a rank holds at a moment of its pipeline, and the reduced ones."""
    sharding, position = sharding_of(structure), scheduled.schedule_position
    if scheduled.moment == REDUCED:
        yield from sharding.reduced(position)
        return
    if scheduled.moment == GATHERED:
        yield from sharding.gathered(position)
    if not later:
        position = position._replace(has_gradient=(False,) * len(position.has_gradient))
    for chunk in range(len(position.others) if not scheduled.opens else 0):
        yield from sharding.held_at(position, chunk)


def _pipeline_state(walked: TrainingPeaks) -> ScheduleMoment | None:
    """Return the pipeline rank's state at its peak, if the peak is in a pass."""
    later, index = walked.moments[walked.peak]
    return (
        walked.program.moments.schedule_moments[later][index]
        if walked.program.structure.pipe.engine and index >= 0
        else None
    )


def _gradients(walked: TrainingPeaks) -> Iterator[TensorGroup]:
    """Yield the gradients held around a moment."""
    p, structure = walked.program, walked.program.structure
    later, index = walked.moments[walked.peak]
    if not later:
        yield from sharding_of(structure).gradients()
    elif not structure.pipe.engine or p.buffered:
        yield from sharding_of(structure).accumulated()
    else:
        for chunk, is_accumulated in zip(
            chunks_of(structure), p.moments.schedule_moments[later][index].schedule_position.has_gradient, strict=True
        ):
            yield from sharding_of(chunk).accumulated() if is_accumulated else ()


def _scratch(what: str, bytes_: int, why: str, basis: str) -> Line:
    return Line(what, "temp", "", "", (), "", 1, bytes_, why, "", basis)
