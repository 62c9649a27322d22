"""Which of many GPUs hold a run, from one walk of it for all GPUs that run the same kernels."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from math import inf
from typing import Any

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.hardware.overhead import cuda_context
from memplan.catalogue.kernels.wiring import GENERATING
from memplan.catalogue.profiles.engines import find_engine
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, errors_about, refused
from memplan.core.records import NamedTuple
from memplan.core.several import several
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate, estimate_of
from memplan.estimate.training_peaks import workspace_of
from memplan.estimate.usage import Answer
from memplan.resolve.decide import Resolver
from memplan.resolve.parallelism import ZERO
from memplan.resolve.refusals.vendors import not_on
from memplan.spec.pool import listed
from memplan.spec.run import RunSpec, is_default


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
    a serving engine's, also next to training, DeepSpeed's, and a device map. So do capabilities that a run which only
    trains is resolved alike for.
    """

    def __init__(self, run: RunSpec) -> None:
        self.run = run
        p = run.parallelism
        divides = find_engine(run.profile) is not None or run.rollout == "colocate" or p.strategy in ZERO
        self._is_shared = not divides and p.device_map is None
        trains = run.task == "train" and run.trainer not in GENERATING and is_default(run, "also")
        self._only_trains = self._is_shared and trains  # without tasks that are resolved by themselves
        self._on: dict[object, Estimate | MemplanError] = {}
        self._alike: dict[Hashable, Estimate] = {}
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
                self._on[key] = self._estimate(gpu)
            except MemplanError as error:
                self._on[key] = error
        return self._on[key]

    def _estimate(self, gpu: GPU) -> Estimate:
        """Return the estimate on this GPU, or one that differs from it only in its notes, as all capabilities for which
        the run is resolved alike have equal memory."""
        if not self._only_trains:
            return estimate(self.run.model_copy(update={"gpu": gpu.name}))
        d, context = self._resolver.on(gpu.name), cuda_context(gpu.compute_capability)
        alike = d.structure, d.half, d.large_tiles, workspace_of(d), context
        found = self._alike.get(alike)
        if found is None:
            found = estimate_of(self.run.model_copy(update={"gpu": gpu.name}), d)
        return self._alike.setdefault(alike, found)

    @cached_property
    def _resolver(self) -> Resolver:
        return Resolver(self.run)

    def fit(self, gpu: GPU) -> Fit:
        """Return the answer on this GPU."""
        if gpu.name not in self._fits:
            self._settle(_Pool.of((gpu,), self._is_shared))
        return self._fits[gpu.name]

    def fits(self, gpus: Sequence[GPU]) -> tuple[Fit, ...]:
        """Return the answers on several GPUs."""
        pool = _catalogue(self._is_shared) if gpus is all_gpus() else _Pool.of(gpus, self._is_shared)
        if not all(map(self._fits.__contains__, pool.names)):
            self._settle(pool)
        return tuple(map(self._fits.__getitem__, pool.names))

    def _settle(self, pool: _Pool) -> None:
        """Answer on all GPUs: by bounds where they tell, then by replays."""
        edge: list[tuple[_Alike, Estimate]] = []
        for kind in pool.kinds:
            found = self.on(kind[0].gpus[0])
            if isinstance(found, MemplanError):
                self._fits |= {gpu.name: Fit(gpu, None, str(found)) for alike in kind for gpu in alike.gpus}
                continue
            ample, least = (found.ample, found.least) if self._is_shared else (inf, 0)
            for alike in kind:
                if least <= alike.usable < ample:
                    edge.append((alike, found))
                else:
                    self._fits |= alike.fits("fits" if alike.usable >= ample else "does not fit")
        for alike, found in sorted(edge, key=_usable, reverse=True):  # a replay tells of smaller ones, too
            answer = found.answer_on(alike.usable) if self._is_shared else found.verdict.answer
            assert answer is not None
            self._fits |= alike.fits(answer)


@lru_cache(maxsize=512)
def card_answers(run: RunSpec) -> CardAnswers:
    """Return the answers of a run without a GPU."""
    return CardAnswers(run)


def _kind(name: str) -> GPU:
    if several(name)[0] is not None:
        raise refused("pool", f"{name!r:.80} is a number of GPUs; name the kind alone, as the run says how many")
    return find_gpu(name)


def fits(run: RunSpec | Mapping[str, Any], pool: Iterable[str | GPU] | None = None) -> tuple[Fit, ...]:
    """Return for each GPU of the pool whether it holds the run; of all catalogued GPUs without a pool.

    The answers are those of `estimate`; the run's own `gpu` is ignored. Raises what `estimate` raises for a run that is
    refused on every GPU, UnknownNameError for an unknown GPU, and SpecError for a pool without one.
    """
    run, named = RunSpec.model_validate(run), () if pool is None else listed("pool", pool)
    with errors_about("pool", "gpu"):
        gpus = all_gpus() if pool is None else [g if isinstance(g, GPU) else _kind(str(g)) for g in named]
    if not gpus:
        raise refused("pool", "has no GPU; give one, as in ['a100']")
    answers = card_answers(run.model_copy(update={"gpu": None}))
    found = answers.fits(gpus)
    if all(fit.refusal for fit in found):
        error = answers.on(found[0].gpu)
        assert isinstance(error, MemplanError)
        raise error
    return found


class _Alike:
    """GPUs of one kind with equally many usable bytes: they have the same answers."""

    def __init__(self, usable: int) -> None:
        self.usable, self.gpus = usable, list[GPU]()
        self._fits: dict[Answer, dict[str, Fit]] = {}

    def fits(self, answer: Answer) -> dict[str, Fit]:
        """Return the GPUs with this answer, by name."""
        if answer not in self._fits:
            self._fits[answer] = {gpu.name: Fit(gpu, answer) for gpu in self.gpus}
        return self._fits[answer]


class _Pool(NamedTuple):
    """GPUs in the order of `names`, and those of each kind."""

    names: tuple[str, ...]
    kinds: Collection[Sequence[_Alike]]

    @classmethod
    def of(cls, gpus: Sequence[GPU], by_capability: bool) -> _Pool:
        """Return GPUs by vendor and compute capability, which run the same kernels, or each as a kind."""
        kinds: dict[Hashable, dict[int, _Alike]] = {}
        for gpu in gpus:
            kind = kinds.setdefault((gpu.vendor, gpu.compute_capability) if by_capability else gpu.name, {})
            kind.setdefault(gpu.usable, _Alike(gpu.usable)).gpus.append(gpu)
        return cls(tuple(gpu.name for gpu in gpus), [[*kind.values()] for kind in kinds.values()])


def _usable(on: tuple[_Alike, Estimate]) -> int:
    return on[0].usable


@cache
def _catalogue(by_capability: bool) -> _Pool:
    return _Pool.of(all_gpus(), by_capability)
