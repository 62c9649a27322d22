"""How far a run can go: the largest batch and sequence that fit, one change that makes it fit, the GPUs that hold it.

Answers are found by asking `estimate` again; memory only grows with batch and sequence, so bisection is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from memplan.answer import Estimate
from memplan.errors import MemplanError, SpecError
from memplan.estimator import estimate
from memplan.gpus import GPU, all_gpus
from memplan.spec import Method, Part, RunSpec

FITS = ("fits",)
MAY_FIT = ("fits", "tight")
_MOST = 2**32  # no batch or sequence beyond is looked for: without it a run that takes no memory would have no end


def largest_batch(run: RunSpec, accepted: tuple[str, ...] = FITS) -> int:
    """The largest `batch.micro` that the run's GPU holds, all else as it is; 0 where none does."""
    return _largest(run, "micro", accepted)


def largest_sequence(run: RunSpec, accepted: tuple[str, ...] = FITS) -> int:
    """The largest `batch.sequence` that the run's GPU holds, all else as it is; 0 where none does."""
    return _largest(run, "sequence", accepted)


def _largest(run: RunSpec, field: str, accepted: tuple[str, ...]) -> int:
    if run.gpu is None:
        raise SpecError("gpu: what fits depends on it; name one", "gpu")

    def holds(n: int) -> bool:
        return _verdict(changed(run, "batch", **{field: n})) in accepted

    low, high = 0, 1
    while holds(high):
        if high >= _MOST:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _verdict(run: RunSpec) -> str | None:
    """The run's verdict; None where it cannot run at all (more tokens than learned positions, say)."""
    try:
        return estimate(run).verdict.answer
    except MemplanError:
        return None


def changed(run: RunSpec, part: str, **values: Any) -> RunSpec:
    """The run with some values of one part changed."""
    old: Part = getattr(run, part)
    return RunSpec.model_validate({**dict(run), part: old.model_copy(update=values)})


class Lever(NamedTuple):
    """One change, as the option that makes it, and the answer of the run with it."""

    option: str
    answer: Estimate


def levers(run: RunSpec) -> Iterator[Lever]:
    """What lowers the peak without changing batch or sequence, cheapest in what it costs first. Asked as needed."""
    for option, other in _changes(run):
        try:
            yield Lever(option, estimate(other))
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


def first_lever(run: RunSpec, accepted: tuple[str, ...] = FITS) -> Lever | None:
    """The first of `levers` that alone makes the run fit."""
    return next((lever for lever in levers(run) if lever.answer.verdict.answer in accepted), None)


class Holding(NamedTuple):
    """A GPU that holds the run, and how: fits or tight."""

    gpu: GPU
    answer: str


def holding(run: RunSpec, vendor: str = "") -> Iterator[Holding]:
    """Every catalogued GPU that holds the run, or of one vendor every one, least memory first. Asked as needed."""
    weights = estimate(run.model_copy(update={"gpu": None})).phases[0].peak  # loaded on any card
    for gpu in sorted(all_gpus(), key=lambda gpu: (gpu.usable, gpu.name)):
        if gpu.usable >= weights and vendor in ("", gpu.vendor):
            answer = _verdict(run.model_copy(update={"gpu": gpu.name}))
            if answer in MAY_FIT:
                yield Holding(gpu, answer)
