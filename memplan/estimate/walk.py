"""A training run's program walked: the peak of every phase, on the rank with the highest."""

from __future__ import annotations

from operator import mul
from typing import NamedTuple

from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import InternalError
from memplan.engine.walk import largest, values
from memplan.estimate.answer import Phase
from memplan.estimate.side_task import Aside
from memplan.program.axes import run_axes
from memplan.program.run import Decided
from memplan.program.training.pipeline import may_be_worst
from memplan.program.training.program import PHASES, Program, phase_peaks, program, step_where
from memplan.spec.run import RunSpec


class Numbers(NamedTuple):
    """The values of a program's variables and of its chain of products for one run."""

    values: list[int]
    products: list[int]


class Walked(NamedTuple):
    """A run's peaks, phase by phase, and which is the largest. The last phases are what it does beside its steps."""

    program: Program
    axes: dict[str, int]
    numbers: Numbers
    workspace: int
    phases: list[Phase]
    moments: list[tuple[bool, int]]  # per phase: whether in a later micro-batch, and the moment's index (-1: none)
    peak: int
    asides: tuple[Aside, ...] = ()

    def followed_by(self, asides: tuple[Aside, ...]) -> Walked:
        """The same with what the run does beside its steps."""
        phases = [*self.phases, *(Phase(aside.phase, None, aside.peak, aside.where) for aside in asides)]
        moments = [*self.moments, *((False, -1) for _ in asides)]
        peak = max(range(len(phases)), key=lambda i: (phases[i].peak, i))
        return self._replace(phases=phases, moments=moments, peak=peak, asides=asides)

    @property
    def aside(self) -> Aside | None:
        """What the run does at its peak, where that is not a step."""
        at = self.peak - len(self.phases) + len(self.asides)
        return self.asides[at] if at >= 0 else None

    @property
    def top(self) -> Phase:
        """The phase of the peak."""
        return self.phases[self.peak]


def walk(run: RunSpec, decided: Decided) -> Walked:
    """Put batch and sequence into the run's program: the peak of every phase of the first and of later steps."""
    p = program(decided.structure)
    b, lengths = decided.batch, (decided.pictures, decided.batch.target_sequence)
    axes = run_axes(p, b.micro, b.sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
    numbers = Numbers(values(p.variables, axes), values(p.products, axes))
    workspace = workspace_of(decided)
    found = [(False, *_best(p, False, phase, numbers)) for phase in PHASES]
    if p.structure.accumulates:
        later = [(True, *_best(p, True, phase, numbers)) for phase in PHASES]
        more = [(b[0], b[1] + p.accumulated[phase], b[2]) for b, phase in zip(later, PHASES, strict=True)]
        found = [max(a, b, key=_bytes) if b[2] >= 0 else a for a, b in zip(found, more, strict=True)]
    moving = [size for _, size, _ in found]
    held = sum(map(mul, p.held, numbers.values))
    phases = [Phase("load", None, p.loading, "")]
    moments = [(False, -1)]
    for phase, step, bytes_ in phase_peaks(p, workspace, moving, held):
        if bytes_ < p.parameters:
            raise InternalError(f"{phase} takes {bytes_} bytes, less than the {p.parameters} of the weights")
        if phase == "step":
            phases.append(Phase(phase, step, bytes_, step_where(p, step)))
            moments.append((False, -1))
        elif found[PHASES.index(phase)][2] >= 0:
            micro, _, index = found[PHASES.index(phase)]
            phases.append(Phase(phase, step, bytes_, p.where[micro][index]))
            moments.append((micro, index))
    peak = max(range(len(phases)), key=lambda i: (phases[i].peak, i))
    return Walked(p, axes, numbers, workspace, phases, moments, peak)


def worst(run: RunSpec, decided: Decided) -> tuple[Decided, Walked]:
    """The run on the rank that holds most, or on the stage of a pipeline that was asked for, and its walk."""
    if decided.structure.graph.degrees.pp == 1 or run.parallelism.stage is not None:
        return decided, walk(run, decided)
    each = (decided._replace(structure=one) for one in may_be_worst(decided.structure))
    return max(((one, walk(run, one)) for one in each), key=lambda found: found[1].top.peak)


def workspace_of(decided: Decided) -> int:
    """Bytes of one of cuBLAS's workspaces on the run's card."""
    return cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual


def _best(p: Program, later: bool, phase: str, numbers: Numbers) -> tuple[int, int]:
    """The most bytes of a phase, and the moment's index: -1 where the rank has no such phase."""
    terms = (p.later if later else p.first)[phase]
    return largest(terms, *numbers) if terms else (0, -1)


def _bytes(found: tuple[bool, int, int]) -> int:
    return found[1]
