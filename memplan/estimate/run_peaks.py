"""The peaks of training runs that differ in lengths alone, of their steps and of the side tasks that lengths decide."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

from memplan.core.errors import MemplanError
from memplan.core.expression import Argument
from memplan.engine.walk import values
from memplan.estimate.answer import Phase
from memplan.estimate.peak_function import Lengths, MomentRows, PeakFunction
from memplan.estimate.side_task import BetweenSteps, SideTask
from memplan.estimate.training_peaks import StepProgram, lengths_of
from memplan.program.inference.passes import Contenders
from memplan.program.run import ResolvedRun
from memplan.spec.run import RunSpec

Tasks = Callable[[RunSpec, BetweenSteps, ResolvedRun], Iterable[Sequence[SideTask]]]


class RunPeaks:
    """The peaks of runs of a program that differ in lengths alone.

    A function is written for them after `BEFORE` answers, as that takes as long, and at most `MOST`, as lengths may
    decide what a task does.
    """

    BEFORE, MOST = 8, 8

    def __init__(self, step: StepProgram) -> None:
        self._step, self._before, self._left = step, self.BEFORE, self.MOST
        self._written: list[tuple[PeakFunction, int]] = []

    def peak(self, run: RunSpec, decided: ResolvedRun, tasks: Tasks) -> tuple[Phase, int] | None:
        """Return the phase of the peak of a run, and the least bytes that it holds throughout; None if it takes what
        `tasks` returns for the run."""
        b = decided.batch
        lengths = b.micro, b.sequence, b.target_sequence
        for function, resident in self._written:
            top = function.largest(lengths)
            if top is not None:
                return top, resident
        self._before = max(0, self._before - 1)
        if self._before or not self._left:
            return None
        self._left -= 1
        try:
            function, resident = self._write(run, decided, lengths, tasks)
        except (TypeError, MemplanError):  # of what cannot be written down, which may be these lengths'
            self._left //= 2
            return None
        top = function.largest(lengths)
        if top is None:  # without the compiled library
            self._left = 0
            return None
        self._written.append((function, resident))
        return top, resident

    def _write(self, run: RunSpec, decided: ResolvedRun, at: Lengths, tasks: Tasks) -> tuple[PeakFunction, int]:
        """Return the moments of the runs for which lengths decide the same as `at` some, and the least that they hold.

        Raises TypeError if lengths decide what is not written down, and as `tasks` does.
        """
        names = "micro", "sequence", "target_sequence"
        lengths = [Argument(name, value) for name, value in zip(names, at, strict=True)]
        batch = decided.batch.model_copy(update={each.source: each for each in lengths if each.value is not None})
        written = decided._replace(batch=batch, parts={**decided.parts, "batch": batch})
        sizes, workspace = lengths_of(written)
        steps, between = self._step.moments(sizes, workspace), BetweenSteps(self._step.program, workspace)
        each = [*tasks(run.model_copy(update={"batch": batch}), between, written)]
        held = [{moment.persistent_bytes for moment in task} for task in each]
        if steps is None or any(len(of_task) > 1 for of_task in held):
            raise TypeError("lengths decide the least bytes that are held")
        moments = [_moments_of(moment) for task in reversed(each) for moment in task]
        least = min((self._step.resident, *(bytes_ for of_task in held for bytes_ in of_task)))
        return PeakFunction([*moments, steps], lengths), least


def _moments_of(task: SideTask) -> MomentRows:
    """Return the moments of a task, or of the pass that its peak may be in."""
    own = task.persistent_bytes + task.held_bytes
    if task.at < 0:
        return MomentRows([own], [(1,)], [(task.phase, None, task.name)])
    sized = task.passes[task.at]
    moments = sized.contenders
    rows = [(1, *term.coefficients) for term in moments.terms]
    phases = [(task.phase, None, partial(_where, task.name, moments, term.moment)) for term in moments.terms]
    return MomentRows([own, *values(moments.variables, sized.sizes)], rows, phases)


def _where(name: str, moments: Contenders, moment: int) -> str:
    return name + moments.where(moment)


@lru_cache(maxsize=512)
def run_peaks(alike: object, step: StepProgram) -> RunPeaks:
    """Return the peaks of runs that are `alike` but for their lengths."""
    del alike
    return RunPeaks(step)
