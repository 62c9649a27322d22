"""`memplan.guard`: a training script next to its estimate, which is warned of a step that would run out of memory.

with memplan.guard(run, snapshot="oom.pickle"):
    trainer.train()
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from memplan.core.errors import MemplanError
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.explain.explanation import explain
from memplan.explain.findings import QUESTIONS
from memplan.probe.run.training_device import TrainingDevice, current_device
from memplan.spec.run import RunSpec

_WATCHED = 2  # steps; a third finds what the second left


class StepReading(NamedTuple):
    """The most bytes until the end of a step, next to the estimate's."""

    step: int
    allocated: int
    reserved: int
    predicted: int

    @property
    def line(self) -> str:
        error = 100 * (self.allocated / self.predicted - 1) if self.predicted else 0.0
        return f"step {self.step}: {gib(self.allocated)} allocated, predicted {gib(self.predicted)} ({error:+.1f} %)"


class StepWouldFailError(MemplanError):
    """The next step would run out of memory, by what the steps so far took; a guard with `stop` raises it."""


class TrainingGuard:
    """The context manager that `guard` returns, around a training script.

    answer    the estimate of the run
    readings  the first two steps next to the estimate
    warnings  what was said
    """

    def __init__(
        self,
        run: RunSpec,
        *,
        stop: bool = False,
        snapshot: str = "",
        say: Callable[[str], None] | None = None,
        device: TrainingDevice | None = None,
    ) -> None:
        self.run, self.answer = run, estimate(run)
        self.readings: list[StepReading] = []
        self.warnings: list[str] = []
        self._stop, self._snapshot = stop, snapshot
        self._say = say or _on_stderr
        self._device = device
        self._steps = 0
        self._unhook: Callable[[], None] | None = None

    def __enter__(self) -> TrainingGuard:
        self._device = self._device or current_device()
        if self._device is None:
            self._warn("no GPU is here, so there is nothing to guard")
            return self
        if self._snapshot:
            self._device.record_history()
        self._unhook = self._device.on_step(self.step)
        return self

    def step(self) -> None:
        """Take the end of an optimizer step: called by torch's optimizers themselves, and by hand for others.

        Raises StepWouldFailError with `stop`, if the next step would run out of memory.
        """
        self._steps += 1
        if self._device is None or self._steps > _WATCHED:
            return
        allocated, reserved = self._device.peaks()
        reading = StepReading(self._steps, allocated, reserved, predicted_until(self.answer, self._steps))
        self.readings.append(reading)
        self._tell(reading.line)
        coming = max(predicted_until(self.answer, _WATCHED), self.answer.bytes.allocated)
        # what the run takes beyond its estimate so far, it will also take at its peak
        needed = coming + max(0, allocated - reading.predicted)
        room = self._device.room()
        if needed > room:
            longest = self.run.batch.sequence
            batch = f"{self.run.batch.micro} x {longest:,} tokens"
            more = f"would allocate {gib(needed)}, and torch can have {gib(room)}"
            self._warn(f"a step with {batch} {more}: it will run out of memory")
            if self._stop:
                raise StepWouldFailError(f"memory: {self.warnings[-1]}", "memory")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._unhook is not None:
            self._unhook()
        if error is None or self._device is None or not self._device.is_out_of_memory(error):
            return
        with suppress(Exception):  # the script's own error is the one that counts
            self._explain("".join(traceback.format_exception(error)))
        if self._snapshot:
            with suppress(Exception):
                self._device.write_snapshot(self._snapshot)
                self._say(f"memplan: {self._snapshot} has every allocation: memplan explain {self._snapshot}")

    def _explain(self, text: str) -> None:
        found = explain(text, self.run)
        for question in QUESTIONS:
            for finding in found.of(question):
                self._say(f"memplan: {question.lower()}: {finding.text} ({finding.certainty}: {finding.why})")

    def _tell(self, line: str) -> None:
        if os.environ.get("RANK", "0") == "0":
            self._say(f"memplan: {line}")

    def _warn(self, line: str) -> None:
        self.warnings.append(line)
        self._tell(line)


def predicted_until(answer: Estimate, step: int) -> int:
    """Return the estimate's largest peak until the end of a step."""
    return max(phase.peak for phase in answer.phases if phase.step is None or phase.step <= step)


def _on_stderr(line: str) -> None:
    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


def guard(run: RunSpec, *, stop: bool = False, snapshot: str = "") -> TrainingGuard:
    """Return a context manager that watches a training script on this GPU.

    After the first two optimizer steps it says what they took next to the estimate, and warns if the run's longest
    batch would run out of memory. If it does run out, the failure is explained, and the error goes on.

    run       the run, with the longest sequence that a batch may have
    stop      raise StepWouldFailError instead of only warning
    snapshot  a file that gets every allocation if memory runs out, for `memplan explain`

    Raises ProbeError if torch is not installed, and whatever `estimate` raises for the run.
    """
    return TrainingGuard(run, stop=stop, snapshot=snapshot)
