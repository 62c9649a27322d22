"""Which of many GPUs hold a run, from one walk of it for all GPUs that run the same kernels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.profiles.engines import find_engine
from memplan.core.errors import MemplanError, errors_about
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.estimate.usage import Answer
from memplan.resolve.parallelism import ZERO
from memplan.resolve.refusals.vendors import not_on
from memplan.spec.pool import listed
from memplan.spec.run import RunSpec


class Fit(NamedTuple):
    """Whether a GPU holds a run.

    answer   fits, tight, does not fit or does not start; None if memplan refuses the run on this GPU
    refusal  why it is refused, in a line
    """

    gpu: GPU
    answer: Answer | None
    refusal: str = ""

    @property
    def fits(self) -> bool:
        """Whether the run surely fits, with the upper end of its band."""
        return self.answer == "fits"


class CardAnswers:
    """The answers of one run on any GPU, each walked once.

    GPUs of one compute capability run the same kernels, so they share a walk, unless the run divides its GPU's memory:
    a serving engine's, also next to training, DeepSpeed's, and a device map.
    """

    def __init__(self, run: RunSpec) -> None:
        self.run = run
        p = run.parallelism
        divides = find_engine(run.profile) is not None or run.rollout == "colocate" or p.strategy in ZERO
        self._is_shared = not divides and p.device_map is None
        self._on: dict[object, Estimate | MemplanError] = {}
        self._refused: dict[str, MemplanError | None] = {}  # by vendor
        self._fits: dict[str, Fit] = {}

    def on(self, gpu: GPU) -> Estimate | MemplanError:
        """Return the estimate on this GPU, or one that runs the same kernels; or the error that refuses it."""
        if gpu.vendor not in self._refused:
            self._refused[gpu.vendor] = next(not_on(gpu, self.run), None)
        refusal = self._refused[gpu.vendor]
        if refusal is not None:
            return refusal
        key = gpu.compute_capability if self._is_shared else gpu.name
        if key not in self._on:
            try:
                self._on[key] = estimate(self.run.model_copy(update={"gpu": gpu.name}))
            except MemplanError as error:
                self._on[key] = error
        return self._on[key]

    def fit(self, gpu: GPU) -> Fit:
        """Return the answer on this GPU."""
        fit = self._fits.get(gpu.name)
        if fit is None:
            found = self.on(gpu)
            fit = Fit(gpu, None, str(found)) if isinstance(found, MemplanError) else Fit(gpu, self._answer(found, gpu))
            self._fits[gpu.name] = fit
        return fit

    def _answer(self, found: Estimate, gpu: GPU) -> Answer | None:
        if not self._is_shared:
            return found.verdict.answer
        usable = gpu.usable
        if usable >= found.ample:
            return "fits"
        return "does not fit" if usable < found.least else found.answer_on(usable)


@lru_cache(maxsize=512)
def card_answers(run: RunSpec) -> CardAnswers:
    """Return the answers of a run without a GPU."""
    return CardAnswers(run)


def fits(run: RunSpec | Mapping[str, Any], pool: Iterable[str | GPU] | None = None) -> tuple[Fit, ...]:
    """Return for each GPU of the pool whether it holds the run; of all catalogued GPUs without a pool.

    The answers are those of `estimate`; the run's own `gpu` is ignored. Raises what `estimate` raises for a run that is
    refused on every GPU, and UnknownNameError for an unknown GPU.
    """
    run, named = RunSpec.model_validate(run), () if pool is None else listed("pool", pool)
    with errors_about("pool", "gpu"):
        gpus = all_gpus() if pool is None else [g if isinstance(g, GPU) else find_gpu(str(g)) for g in named]
    answers = card_answers(run.model_copy(update={"gpu": None}))
    for gpu in _largest_first(tuple(gpus)):  # what a replay with much room reserves tells of smaller GPUs, too
        answers.fit(gpu)
    found = tuple(map(answers.fit, gpus))
    if found and all(fit.refusal for fit in found):
        error = answers.on(found[0].gpu)
        assert isinstance(error, MemplanError)
        raise error
    return found


@lru_cache(maxsize=8)
def _largest_first(gpus: tuple[GPU, ...]) -> list[GPU]:
    return sorted(gpus, key=lambda gpu: -gpu.usable)
