"""The ladder: levers applied one after another to a plain run, with what each saves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.planning.levers import Lever, levers_of, pull
from memplan.planning.plan import Effect
from memplan.planning.trials import attempt
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.training import Method

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

# A script that does nothing about memory: fp32 weights under autocast, foreach AdamW, nothing recomputed.
PLAIN: dict[str, Any] = {
    "precision": "amp",
    "optimizer": "adamw_torch",
    "method": Method(),
    "parallelism": Parallelism(),
}
PLAIN_KERNELS: dict[str, Any] = {"attention": "eager", "checkpointing": "none", "loss": "hf", "fused": ()}

# The rungs, as keys of cost rows; those that leave the result unchanged come first.
RUNGS = (
    "attention_flash",
    "checkpointing",
    "fused_loss",
    "micro_batch",
    "precision_pure",
    "optimizer_fused",
    "optimizer_8bit",
    "method_lora",
    "method_qlora",
)


class Ladder(NamedTuple):
    """The plain run's answer, and the effect of each lever on top of the previous ones."""

    plain: Estimate
    rungs: tuple[Effect, ...]


def ladder(run: RunSpec, calibration: Calibration | None = None) -> Ladder:
    """Return the ladder from the plain run of the same model, batch, sequence and GPU.

    Levers that do not apply to the run are skipped. Raises whatever `estimate` raises for the plain run.
    """
    kernels = {**dict(run.kernels), **PLAIN_KERNELS}
    plain = estimate(RunSpec.model_validate({**dict(run), **PLAIN, "kernels": kernels}), calibration)
    rungs: list[Effect] = []
    below = plain
    for key in RUNGS:
        lever = _rung(below, key)
        above = attempt(partial(pull, below.asked, (lever,)), calibration) if lever else None
        if lever and above:
            rungs.append(Effect(lever, below, above))
            below = above
    return Ladder(plain, tuple(rungs))


def _rung(answer: Estimate, key: str) -> Lever | None:
    """Return the mildest lever with that key only; for micro-batches the smallest."""
    levers = [lever for lever in levers_of(answer.run) if lever.keys == (key,)]
    if not levers:
        return None
    return levers[-1] if key == "micro_batch" else levers[0]
