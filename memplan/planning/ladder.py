"""The ladder: from the plain run, one lever after another, and what each brings."""

from __future__ import annotations

from typing import Any, NamedTuple

from memplan.core.errors import MemplanError
from memplan.estimate.answer import Estimate
from memplan.estimate.calibration import Calibration
from memplan.estimate.estimate import estimate
from memplan.planning.levers import Lever, levers_of, pull
from memplan.planning.plan import Effect
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.training import Method

# What a script without a thought for memory has: fp32 weights under autocast, a list-wise AdamW, nothing recomputed.
PLAIN: dict[str, Any] = {
    "precision": "amp",
    "optimizer": "adamw_torch",
    "method": Method(),
    "parallelism": Parallelism(),
}
PLAIN_KERNELS: dict[str, Any] = {"attention": "eager", "checkpointing": "none", "loss": "hf", "fused": ()}

# The rungs by the rows of their costs: what leaves the result as it is comes first.
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
    """The plain run's answer, and what each lever brings to the run with all those before it."""

    plain: Estimate
    rungs: tuple[Effect, ...]


def ladder(run: RunSpec, calibration: Calibration | None = None) -> Ladder:
    """From the plain run of the same model, batch, sequence and GPU.

    A lever that the run cannot have is left out. Raises what `estimate` raises for the plain run.
    """
    kernels = {**dict(run.kernels), **PLAIN_KERNELS}
    plain = estimate(RunSpec.model_validate({**dict(run), **PLAIN, "kernels": kernels}), calibration)
    rungs: list[Effect] = []
    below = plain
    for key in RUNGS:
        lever = _rung(below, key)
        if lever is None:
            continue
        try:
            above = estimate(pull(below.asked, (lever,)), calibration)
        except MemplanError:
            continue
        rungs.append(Effect(lever, below, above))
        below = above
    return Ladder(plain, tuple(rungs))


def _rung(answer: Estimate, key: str) -> Lever | None:
    """The mildest lever with that row alone; the smallest of micro-batches."""
    found = [lever for lever in levers_of(answer.run) if lever.keys == (key,)]
    if not found:
        return None
    return found[-1] if key == "micro_batch" else found[0]
