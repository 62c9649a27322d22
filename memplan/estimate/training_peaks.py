"""The peaks of a training program at the sizes of a run: of every phase, and of the side tasks after the steps."""

from __future__ import annotations

from operator import mul

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import InternalError
from memplan.core.records import NamedTuple
from memplan.engine.walk import largest, values
from memplan.estimate.answer import Phase
from memplan.estimate.side_task import SideTask
from memplan.program.axes import run_axes
from memplan.program.run import ResolvedRun
from memplan.program.training.passes import PHASES
from memplan.program.training.program import Program, phase_peaks, program, step_where


class ProgramValues(NamedTuple):
    """The values of a program's variables and of its products for one run."""

    values: list[int]
    products: list[int]


class TrainingPeaks(NamedTuple):
    """The peaks of a run by phase, and which is the largest. The last phases are its side tasks.

    axes       the run's axes
    workspace  bytes of one cuBLAS workspace
    moments    per phase, whether it peaks in a later micro-batch, and the moment's index (-1: none)
    peak       index of the phase with the peak
    """

    program: Program
    axes: dict[str, int]
    numbers: ProgramValues
    workspace: int
    phases: list[Phase]
    moments: list[tuple[bool, int]]
    peak: int
    side_tasks: tuple[SideTask, ...] = ()

    def followed_by(self, side_tasks: tuple[SideTask, ...]) -> TrainingPeaks:
        """Return the peaks with those of the run's side tasks appended."""
        phases = [*self.phases, *(Phase(task.phase, None, task.peak, task.where) for task in side_tasks)]
        moments = [*self.moments, *((False, -1) for _ in side_tasks)]
        peak = max(range(len(phases)), key=lambda i: (phases[i].peak, i))
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
    p = program(decided.structure)
    b, lengths = decided.batch, (decided.pictures, decided.batch.target_sequence)
    axes = run_axes(p, b.micro, b.sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
    numbers = ProgramValues(values(p.moments.variables, axes), values(p.moments.products, axes))
    workspace = workspace_of(decided)
    best = [(False, *_phase_peak(p, False, phase, numbers)) for phase in PHASES]
    if p.structure.accumulates:
        later = [(True, *_phase_peak(p, True, phase, numbers)) for phase in PHASES]
        more = [(b[0], b[1] + p.accumulated[phase], b[2]) for b, phase in zip(later, PHASES, strict=True)]
        best = [max(a, b, key=_peak_bytes) if b[2] >= 0 else a for a, b in zip(best, more, strict=True)]
    peaks = [size for _, size, _ in best]
    held = sum(map(mul, p.moments.held, numbers.values))
    phases = [Phase("load", None, p.loading, "")]
    moments = [(False, -1)]
    for phase, step, bytes_ in phase_peaks(p, workspace, peaks, held):
        if bytes_ < p.parameters:
            raise InternalError(f"{phase} takes {bytes_} bytes, less than the {p.parameters} of the weights")
        if phase == "step":
            phases.append(Phase(phase, step, bytes_, step_where(p, step)))
            moments.append((False, -1))
        elif best[PHASES.index(phase)][2] >= 0:
            micro, _, index = best[PHASES.index(phase)]
            phases.append(Phase(phase, step, bytes_, p.moments.where[micro][index]))
            moments.append((micro, index))
    peak = 0
    for i, phase in enumerate(phases):
        peak = i if phase.peak >= phases[peak].peak else peak
    return TrainingPeaks(p, axes, numbers, workspace, phases, moments, peak)


def workspace_of(decided: ResolvedRun) -> int:
    """Return the bytes of one cuBLAS workspace on the run's card."""
    return cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual


def _phase_peak(p: Program, later: bool, phase: str, numbers: ProgramValues) -> tuple[int, int]:
    """Return the most bytes of a phase, and the moment's index: -1 if the rank does not have the phase."""
    terms = (p.moments.later if later else p.moments.first)[phase]
    return largest(terms, *numbers) if terms else (0, -1)


def _peak_bytes(peak: tuple[bool, int, int]) -> int:
    return peak[1]
