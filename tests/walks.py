"""Walks of inference runs, and what their passes leave, for tests of several rooms."""

from __future__ import annotations

from memplan.engine.walk import alive, size
from memplan.estimate.answer import Line
from memplan.estimate.inference import InferenceWalk
from memplan.program.inference.passes import SizedPass
from memplan.program.run import ResolvedRun
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec


def walk(run: RunSpec, decided: ResolvedRun | None = None) -> InferenceWalk:
    """Return the walk of a run that does not train."""
    return InferenceWalk(run, decided or decide(run))


def lines_at(run: RunSpec, phase: str) -> list[Line]:
    """Return every tensor alive at the peak of a phase, largest first."""
    walked = walk(run)
    return walked.lines(next(p for p in walked.phases if p.phase == phase))


def left(each: SizedPass) -> list[tuple[str, int]]:
    """Return what a pass leaves for the next one, as names with the bytes of all tensors of that name."""
    low = each.low(labelled=True)
    keys = ((low.sizes[number], count) for number, count in alive(low.left, low.runs, each.axes).items() if count)
    return [(key[5], size(key[0], key[1], each.axes)[1] * count) for key, count in keys]
