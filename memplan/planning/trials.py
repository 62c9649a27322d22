"""Estimates of runs that memplan may refuse, and the last value of a search that holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.doing import note
from memplan.core.errors import MemplanError, refused
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate, estimate_stages, needs_more_than_its_gpus
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

FIELDS = {"batch": ("batch", "micro"), "sequence": ("batch", "sequence"), "rank": ("method", "rank")}
_Result = TypeVar("_Result")
MAX_VALUE = 2**32  # ends a search for a run that takes no memory


def attempt(
    run: RunSpec | Callable[[], RunSpec], calibration: Calibration | None = None, if_fits: bool = False
) -> Estimate | None:
    """Return the estimate of a run, or of the run that a function builds; None if memplan refuses it.

    With `if_fits` also None if the GPUs of its device map do not hold it without the host.
    """
    return unless_refused(lambda: _estimate(_built(run), calibration, if_fits), None)


def _estimate(run: RunSpec, calibration: Calibration | None, if_fits: bool) -> Estimate | None:
    is_too_large = if_fits and calibration is None and needs_more_than_its_gpus(run)
    return None if is_too_large else estimate(run, calibration)


def attempt_stages(run: Callable[[], RunSpec], calibration: Calibration | None) -> list[Estimate]:
    """Return the estimates of the stages of a run that may have the most; empty if memplan refuses it."""
    return unless_refused(lambda: estimate_stages(_built(run), calibration), [])


def unless_refused(compute: Callable[[], _Result], otherwise: _Result) -> _Result:
    """Return what the function returns, or `otherwise` if memplan refuses the run that it computes."""
    try:
        return compute()
    except MemplanError:
        return otherwise


def _built(run: RunSpec | Callable[[], RunSpec]) -> RunSpec:
    run = run if isinstance(run, RunSpec) else run()
    note(f"estimating {run.model if isinstance(run.model, str) else 'a config'} under {run.profile}")
    return run


def needed_gpu(run: RunSpec) -> GPU:
    """Return the run's GPU. Raises SpecError if it names none."""
    if run.gpu is None:
        raise refused("gpu", "needed to tell what fits; name one")
    return find_gpu(run.gpu)


def last(holds: Callable[[int], bool | None], low: int, high: int = 0) -> int:
    """Return the last value before one that does not hold, by doubling and bisection; `low` holds or is 0.

    The first value tried is `high`, by default twice `low`.
    """
    high = high or 2 * low or 1
    while holds(high):
        if high >= MAX_VALUE:
            return high
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
