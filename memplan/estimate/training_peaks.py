"""The peaks of a training program at the sizes of a run: of every phase, and of the side tasks after the steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from operator import mul
from typing import Any

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core.arithmetic import ONE_RUN, Arithmetic
from memplan.core.cached_property import cached_property
from memplan.core.errors import InternalError
from memplan.core.expression import WRITTEN, Argument
from memplan.core.records import NamedTuple
from memplan.engine.largest import PhaseTerms
from memplan.engine.walk import values
from memplan.estimate.answer import Phase
from memplan.estimate.peak_function import MomentRows, PeakFunction
from memplan.estimate.side_task import SideTask
from memplan.program.axes import run_axes
from memplan.program.run import ResolvedRun
from memplan.program.structure import Structure
from memplan.program.training.passes import PHASES
from memplan.program.training.program import PhaseOffset, Program, phase_offsets, program


class TrainingPeaks(NamedTuple):
    """The peaks of a run by phase, and which is the largest. The last phases are its side tasks.

    axes       the run's axes
    numbers    values of the program's variables
    workspace  bytes of one cuBLAS workspace
    moments    per phase, whether it peaks in a later micro-batch, and the moment's index (-1: none)
    peak       index of the phase with the peak
    """

    program: Program
    axes: dict[str, int]
    numbers: list[int]
    workspace: int
    phases: list[Phase]
    moments: list[tuple[bool, int]]
    peak: int
    side_tasks: tuple[SideTask, ...] = ()

    def followed_by(self, side_tasks: tuple[SideTask, ...]) -> TrainingPeaks:
        """Return the peaks with those of the run's side tasks appended."""
        phases = [*self.phases, *(Phase(task.phase, None, task.peak, task.where) for task in side_tasks)]
        moments = [*self.moments, *[(False, -1)] * len(side_tasks)]
        last = max(range(len(self.phases), len(phases)), key=lambda i: (phases[i].peak, i))
        peak = last if phases[last].peak >= self.top.peak else self.peak
        return self._replace(phases=phases, moments=moments, peak=peak, side_tasks=side_tasks)

    def at(self, phase: Phase) -> TrainingPeaks:
        """Return the peaks as if the run's peak were in the phase."""
        return self._replace(peak=self.phases.index(phase))

    @property
    def side_task(self) -> SideTask | None:
        """The side task at the peak, or None if the peak is in a step."""
        at = self.peak - len(self.phases) + len(self.side_tasks)
        return self.side_tasks[at] if at >= 0 else None

    @property
    def top(self) -> Phase:
        """The phase of the peak."""
        return self.phases[self.peak]


def training_peaks(decided: ResolvedRun) -> TrainingPeaks:
    """Return the peak of every phase, of the first and of later steps, for the run's batch and sequence."""
    return step_program(decided.structure).peaks(*lengths_of(decided))


def lengths_of(decided: ResolvedRun) -> tuple[_Sizes, int]:
    """Return what a run's batch and GPU decide of its peaks, apart from its structure."""
    b = decided.batch
    sizes = b.micro, b.sequence, decided.half, decided.large_tiles, decided.pictures, b.target_sequence
    return sizes, workspace_of(decided)


def workspace_of(decided: ResolvedRun) -> int:
    """Return the bytes of one cuBLAS workspace on the run's card."""
    return cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual


class _Moments(NamedTuple):
    """The largest moments at the sizes of a run, whatever its GPU.

    axes, numbers  as of `TrainingPeaks`
    largest        per phase, whether it peaks in a later micro-batch, its most bytes, and the moment's index
    names          by the moment, the operation, in the first pass and in a later one
    peaks          the peaks by the bytes of a workspace, as one run is asked for on many GPUs
    """

    axes: dict[str, int]
    numbers: list[int]
    largest: dict[str, tuple[bool, int, int]]
    names: Sequence[Mapping[int, str]]
    peaks: dict[int, TrainingPeaks]


class StepProgram:
    """A program, its phases, and the moments of the first pass's phases and, if there is one, a later pass's."""

    def __init__(self, structure: Structure) -> None:
        self.program = program(structure)
        self.resident = resident_bytes(self.program)
        self._offsets: dict[int, tuple[PhaseOffset, ...]] = {}  # by the bytes of a workspace
        self._last: tuple[_Sizes, _Moments] | None = None
        self._contenders = lru_cache(maxsize=8)(partial(_contenders, self.program))

    def top(self, sizes: _Sizes, workspace: int) -> Phase:
        """Return the phase of the peak: without the other phases, if the program was asked for other lengths before."""
        last, (micro, sequence, half, large_tiles, pictures, target) = self._last, sizes
        if last is not None and last[0][:2] != (micro, sequence):
            of_lengths = self._contenders(workspace, half, large_tiles, pictures, target is None)
            top = of_lengths and of_lengths.largest((micro, sequence, target))
            if top:
                return top
        return self.peaks(sizes, workspace).top

    def moments(self, sizes: _Sizes, workspace: int) -> MomentRows | None:
        """Return the moments of the steps that can be the peak at any lengths, which are expressions among the sizes.
        None if a phase may take less than the weights."""
        return _moments_at(self.program, workspace, sizes)

    @cached_property
    def _terms(self) -> PhaseTerms:
        moments, structure = self.program.moments, self.program.structure
        if structure.engine:
            return step_program(structure._replace(engine=()))._terms
        passes = (moments.terms.first, moments.terms.later)[: 1 + structure.accumulates]
        return PhaseTerms([of_pass[phase] for of_pass in passes for phase in PHASES])

    def peaks(self, sizes: _Sizes, workspace: int) -> TrainingPeaks:
        """Return the peaks of all phases. Those of the last sizes are kept."""
        last = self._last
        if last is None or last[0] != sizes:
            last = self._last = sizes, self._moments(sizes)
        by_workspace = last[1].peaks
        return by_workspace.get(workspace) or by_workspace.setdefault(workspace, self._peaks(last[1], workspace))

    def axes(self, sizes: _Sizes) -> dict[str, int]:
        """Return the axes of a run."""
        return _axes_at(self.program, sizes, ONE_RUN)

    def _moments(self, sizes: _Sizes) -> _Moments:
        p, axes = self.program, self.axes(sizes)
        numbers = values(p.moments.variables, axes)
        largest, names = p.moments.largest(numbers) or (self._terms.largest(numbers), p.moments.terms.where)
        best = {phase: (False, *at) for phase, at in zip(PHASES, largest, strict=False)}
        for phase, (bytes_, index) in zip(PHASES, largest[len(PHASES) :], strict=False):  # in a later micro-batch
            if index >= 0 and bytes_ + p.accumulated[phase] > best[phase][1]:
                best[phase] = True, bytes_ + p.accumulated[phase], index
        best["step"] = False, sum(map(mul, p.moments.held, numbers)), -1
        return _Moments(axes, numbers, best, names, {})

    def _peaks(self, at: _Moments, workspace: int) -> TrainingPeaks:
        p = self.program
        phases = [Phase("load", None, p.loading, "")]
        moments = [(False, -1)]
        peak, most = 0, p.loading
        if workspace not in self._offsets:
            self._offsets[workspace] = phase_offsets(p.structure, workspace)
        for phase, step, offset, where in self._offsets[workspace]:
            later, moving, index = at.largest[phase]
            bytes_ = offset + moving
            if bytes_ < p.parameters:
                raise InternalError(f"{phase} takes {bytes_} bytes, less than the {p.parameters} of the weights")
            if index < 0 and not where:  # the rank does not have the phase
                continue
            if bytes_ >= most:
                peak, most = len(phases), bytes_
            phases.append(Phase(phase, step, bytes_, where or at.names[later][index]))
            moments.append((later, index))
        return TrainingPeaks(p, at.axes, at.numbers, workspace, phases, moments, peak)


_Sizes = tuple[int, int, bool, bool, tuple[tuple[str, int], ...], int | None]  # as of `run_axes`


def resident_bytes(p: Program) -> int:
    """Return the bytes held throughout, once the optimizer has created its states.

    Gradient buckets are not among them, because they may end up anywhere.
    """
    return p.parameters + p.buffered + p.scaler + p.states


def _contenders(
    p: Program, workspace: int, half: bool, large_tiles: bool, pictures: tuple[tuple[str, int], ...], is_alone: bool
) -> PeakFunction | None:
    """Return the moments that can be the peak of a run with these settings; None if a phase may take less than weights.

    Other arguments as of `run_axes`; `is_alone`: there is no decoder with a length of its own.
    """
    micro, sequence, target = lengths = [*map(Argument, ("micro", "sequence", "target"))]
    sizes = micro, sequence, half, large_tiles, pictures, None if is_alone else target
    moments = _moments_at(p, workspace, sizes)
    return moments and PeakFunction([moments], lengths)


def _moments_at(p: Program, workspace: int, sizes: tuple[Any, ...]) -> MomentRows | None:
    """Return the moments of the steps that can be the peak, if the lengths among the sizes are expressions."""
    terms, width = p.moments.terms, len(p.moments.variables)
    passes = [(terms.first, terms.where[0], dict.fromkeys(p.accumulated, 0))]
    passes += [(terms.later, terms.where[1], p.accumulated)] if p.structure.accumulates else []
    most: dict[tuple[int, ...], int] = {}  # what lengths decide of a moment -> the most that they do not
    rows: list[tuple[int, ...]] = []
    phases: list[tuple[str, int | None, str]] = []
    offsets = reversed(phase_offsets(p.structure, workspace))  # of equals, the last is the peak
    for phase, step, offset, where in offsets:
        moments = [(p.moments.held or (0,) * width, offset, where)]
        if not where:
            each = ((term, names, offset + more[phase]) for of, names, more in passes for term in of[phase])
            moments = [(term.coefficients, bytes_, names[term.moment]) for term, names, bytes_ in each]
        if moments and not any(min(row) >= 0 and bytes_ >= p.parameters for row, bytes_, _ in moments):
            return None
        for row, bytes_, name in moments:
            constant, others = row[0] + bytes_, row[1:]
            if others not in most or constant > most[others]:
                most[others] = constant
                rows.append((constant, *others))
                phases.append((phase, step, name))
    rows.append((p.loading, *(0,) * (width - 1)))
    phases.append(("load", None, ""))
    return MomentRows(values(p.moments.variables, _axes_at(p, sizes, WRITTEN)), rows, phases)


def _axes_at(p: Program, sizes: tuple[Any, ...], by: Arithmetic[Any]) -> dict[str, Any]:
    micro, sequence, half, large_tiles, pictures, target = sizes
    return run_axes(p, micro, sequence, half, large_tiles, by, pictures, target)


@lru_cache(maxsize=512)
def step_program(structure: Structure) -> StepProgram:
    return StepProgram(structure)
