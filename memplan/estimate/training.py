"""The answer for a training run: what a rank takes of its card, and the ledger, timeline and ranks.

Pure: no network, no printing, no state but caches; the same run gives the same answer on any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from memplan.estimate.answer import Bytes, Line, Peak, Phase, Rank, Verdict
from memplan.estimate.usage import TrainingReplay, Usage, resident, run_overhead
from memplan.estimate.walk import TrainingWalk, walk
from memplan.program.run import ResolvedRun
from memplan.program.training.pipeline import every_stage, in_flight, layers_of, parameters_of
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


def usage_of(run: RunSpec, decided: ResolvedRun, walked: TrainingWalk, calibration: Calibration | None) -> Usage:
    """Return what a rank takes of its card."""
    axes, expandable = tuple(walked.axes.items()), run.loop.expandable_segments
    replay = TrainingReplay(decided.structure, axes, walked.workspace, expandable, walked.side_tasks)
    overhead = run_overhead(decided.gpu, decided.communicators, calibration)
    held = min((resident(walked.program), *(a.persistent_bytes for a in walked.side_tasks)))
    load = max((walked.phases[0].peak, *(a.loads for a in walked.side_tasks)))
    return Usage(replay, held, load, walked.top.peak, decided.gpu, overhead)


def decided_parallelism(run: RunSpec, decided: ResolvedRun) -> dict[str, object]:
    """Return the decided parallelism: the pipeline's schedule, and the stage that the answer is for."""
    structure = decided.structure
    if not structure.pipe.engine:
        return {}
    update = {"stage": structure.graph.degrees.stage, "schedule": structure.pipe.schedule}
    return {"parallelism": run.parallelism.model_copy(update=update)}


class TrainingDetails(NamedTuple):
    """The ledger, timeline and ranks of a training answer, from a walk of the run's program."""

    run: RunSpec
    walked: TrainingWalk
    decided: ResolvedRun
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
