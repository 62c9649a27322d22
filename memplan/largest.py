"""How far a run can go: the largest batch and sequence that fit, one change that makes it fit, the GPUs that hold it.

Answers are found by asking `estimate` again, with the machine's own profile where there is one. What is allocated only
grows with batch and sequence, so bisection finds where it ends; what torch reserves beyond may jump by a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from memplan.answer import Estimate
from memplan.errors import MemplanError, SpecError
from memplan.estimator import estimate
from memplan.gpus import GPU, all_gpus
from memplan.spec import Method, RunSpec, changed

if TYPE_CHECKING:
    from memplan.calibration import Calibration

FITS = ("fits",)
MAY_FIT = ("fits", "tight")
_MOST = 2**32  # no batch or sequence beyond is looked for: without it a run that takes no memory would have no end


def largest_batch(run: RunSpec, accepted: tuple[str, ...] = FITS, calibration: Calibration | None = None) -> int:
    """The largest `batch.micro` that the run's GPU holds, all else as it is; 0 where none does."""
    return _largest(run, "micro", accepted, calibration)


def largest_sequence(run: RunSpec, accepted: tuple[str, ...] = FITS, calibration: Calibration | None = None) -> int:
    """The largest `batch.sequence` that the run's GPU holds, all else as it is; 0 where none does."""
    return _largest(run, "sequence", accepted, calibration)


def _largest(run: RunSpec, field: str, accepted: tuple[str, ...], calibration: Calibration | None) -> int:
    if run.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")

    def holds(n: int) -> bool:
        return _verdict(changed(run, "batch", **{field: n}), calibration) in accepted

    low, high = 0, 1
    while holds(high):
        if high >= _MOST:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _verdict(run: RunSpec, calibration: Calibration | None) -> str | None:
    """The run's verdict; None where it cannot run at all (more tokens than learned positions, say)."""
    try:
        return estimate(run, calibration).verdict.answer
    except MemplanError:
        return None


class Lever(NamedTuple):
    """One change, as the option that makes it, and the answer of the run with it."""

    option: str
    answer: Estimate


def levers(run: RunSpec, calibration: Calibration | None = None) -> Iterator[Lever]:
    """What lowers the peak without changing batch or sequence, cheapest in what it costs first. Asked as needed."""
    for option, other in _changes(run):
        try:
            yield Lever(option, estimate(other, calibration))
        except MemplanError:  # not for this model, or not together with what else the run asks for
            continue


def _changes(run: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    decided = estimate(run).run
    if decided.kernels.checkpointing == "none":
        yield "--gradient-checkpointing", changed(run, "kernels", checkpointing="full")
    if decided.kernels.loss == "hf":
        yield "--loss fused", changed(run, "kernels", loss="fused")
    for name in ("adamw_8bit", "paged_adamw_8bit"):
        if str(decided.optimizer.name).startswith("adamw_torch"):
            yield f"--optimizer {name}", changed(run, "optimizer", name=name, foreach=None, state_dtype=None)
    kind = {"dora": "qdora", "qdora": None, "qlora": None}.get(run.method.kind, "qlora")
    if kind is not None:
        method = {**dict(run.method), "kind": kind, "trainable_layers": Method().trainable_layers}
        yield f"--method {kind}", RunSpec.model_validate({**dict(run), "method": method})


def first_lever(run: RunSpec, accepted: tuple[str, ...] = FITS, calibration: Calibration | None = None) -> Lever | None:
    """The first of `levers` that alone makes the run fit."""
    return next((lever for lever in levers(run, calibration) if lever.answer.verdict.answer in accepted), None)


class Holding(NamedTuple):
    """A GPU that holds the run, and how: fits or tight."""

    gpu: GPU
    answer: str


def holding(run: RunSpec, vendor: str = "", calibration: Calibration | None = None) -> Iterator[Holding]:
    """Every catalogued GPU that holds the run, or of one vendor every one, least memory first. Asked as needed."""
    weights = estimate(run.model_copy(update={"gpu": None})).phases[0].peak  # loaded on any card
    for gpu in sorted(all_gpus(), key=lambda gpu: (gpu.usable, gpu.name)):
        if gpu.usable >= weights and vendor in ("", gpu.vendor):
            answer = _verdict(run.model_copy(update={"gpu": gpu.name}), calibration)
            if answer in MAY_FIT:
                yield Holding(gpu, answer)
