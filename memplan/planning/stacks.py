"""The same run under other training stacks: what each of their own defaults takes."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.planning.levers import stacks_of, with_fields
from memplan.planning.trials import attempt


class StackAnswer(NamedTuple):
    """The answer for a run under the newest profile of a stack; None if that refuses the run."""

    profile: str
    answer: Estimate | None


def other_stacks(answer: Estimate) -> Iterator[StackAnswer]:
    """Yield a training run on one GPU under each stack but its own, as each sets what the run leaves open."""
    if answer.run.task != "train" or answer.via == "trace":
        return
    for lever in stacks_of(answer.run, newest=True):
        yield StackAnswer(lever.title, attempt(with_fields(answer.asked, lever.fields), answer.calibration))
