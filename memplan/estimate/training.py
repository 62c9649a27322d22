"""The hinge: a run becomes a program, a program and a batch become an answer.

Pure: no network, no printing, no state but caches; the same run gives the same answer on any thread."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from memplan.estimate.answer import Bytes, Line, Peak, Phase, Rank, Verdict
from memplan.estimate.calibration import Calibration
from memplan.estimate.usage import Replay, Usage, around_of, resident
from memplan.estimate.walk import Walked, walk
from memplan.program.run import Decided
from memplan.program.training.pipeline import every_stage, in_flight, layers_of, parameters_of
from memplan.spec.run import RunSpec


def usage_of(run: RunSpec, decided: Decided, walked: Walked, calibration: Calibration | None) -> Usage:
    """What a rank takes of its card."""
    axes, expandable = tuple(walked.axes.items()), run.loop.expandable_segments
    replay = Replay(decided.structure, axes, walked.workspace, expandable, walked.asides)
    beside = around_of(decided.gpu, decided.communicators, calibration)
    there = min((resident(walked.program), *(a.standing for a in walked.asides)))
    load = max((walked.phases[0].peak, *(a.loads for a in walked.asides)))
    return Usage(replay, there, load, walked.top.peak, decided.gpu, beside)


def staged(run: RunSpec, decided: Decided) -> dict[str, object]:
    """What of a run's parallelism was decided: the schedule of a pipeline, and the stage that the answer is of."""
    structure = decided.structure
    if not structure.pipe.engine:
        return {}
    found = {"stage": structure.graph.degrees.stage, "schedule": structure.pipe.schedule}
    return {"parallelism": run.parallelism.model_copy(update=found)}


class Engine(NamedTuple):
    """Where an answer's ledger and timeline come from: a walk of the run's program."""

    run: RunSpec
    walked: Walked
    decided: Decided
    calibration: Calibration | None

    def lines(self) -> Iterable[Line]:
        from memplan.estimate.ledger import lines

        return lines(self.walked, self.decided)

    def moments(self) -> Iterable[Phase]:
        from memplan.estimate.ledger import timeline

        return timeline(self.walked)

    def ranks(self) -> Iterable[Rank]:
        if self.decided.structure.graph.degrees.pp == 1:
            return
        for structure in every_stage(self.decided.structure):
            decided = self.decided._replace(structure=structure)
            walked = walk(self.run, decided)
            usage = usage_of(self.run, decided, walked, self.calibration)
            yield Rank(
                structure.graph.degrees.stage,
                layers_of(structure),
                parameters_of(structure),
                in_flight(structure),
                Bytes(usage),
                Peak(walked.top.phase, walked.top.where),
                Verdict(usage, decided.gpu.usable if decided.gpu else None),
            )
