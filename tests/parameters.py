"""The parameters of a training run as its answer has them, without its step; tests ask for those of many runs."""

from __future__ import annotations

from memplan import RunSpec
from memplan.program.training.program import ParameterCounts, parameter_counts
from memplan.resolve.decide import decide


def counted(run: RunSpec) -> ParameterCounts:
    return parameter_counts(decide(run).structure)
