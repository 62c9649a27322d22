"""Estimate a run: training, inference or serving."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from memplan.catalogue.parallelism.device_map_packing import HOST
from memplan.catalogue.profiles.engines import find_engine
from memplan.core.collection import without_collection
from memplan.estimate.answer import Estimate, Walk
from memplan.estimate.inference import InferenceWalk
from memplan.estimate.training import TrainingWalk
from memplan.models.model import ModelSpec
from memplan.program.inference import gpus
from memplan.program.run import ResolvedRun
from memplan.resolve.batches import check_batch
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


def estimate(run: RunSpec, calibration: Calibration | None = None, model: ModelSpec | None = None) -> Estimate:
    """Return how much memory the run takes, when, and whether it fits.

    `calibration` is a machine's own profile; it is ignored if it belongs to another card. `model` is the run's model if
    it has been looked up already, for instance by find_model(..., online=True): estimate never uses the network.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError (all MemplanError) if the run cannot be
    answered. A run that does not fit is an answer, not an error.
    """
    return Estimate(walk(run, model), calibration)


def walk(run: RunSpec, model: ModelSpec | None = None) -> Walk:
    """Return the walk of the run on the rank with the most, or on the stage it asks for. Raises as `estimate` does."""
    return _fullest(_walks(run, model), model)


@without_collection
def _walks(run: RunSpec, model: ModelSpec | None) -> list[Walk]:
    """Return the walks of the stages that may have the most, or the only walk."""
    if find_engine(run.profile) is not None:
        from memplan.estimate.serving import ServingWalk

        return [ServingWalk(run, model)]
    return _walks_of(run, decide(run, model), model)


def _walks_of(run: RunSpec, decided: ResolvedRun, model: ModelSpec | None = None) -> list[Walk]:
    check_batch(decided.batch, decided.structure.graph.model)
    column = TrainingWalk if decided.trains else InferenceWalk
    if not decided.has_stages or run.parallelism.stage is not None:
        return [column(run, decided).with_side_tasks(model)]
    each: list[Walk] = [column(run, stage) for stage in decided.fullest_stages()]
    return each if len(each) > 1 else [each[0].with_side_tasks(model)]


def estimate_of(run: RunSpec, decided: ResolvedRun) -> Estimate:
    """Return the estimate of a run, given what `decide` returns for it."""
    return Estimate(_fullest(_walks_of(run, decided), None))


def _fullest(walks: Sequence[Walk], model: ModelSpec | None) -> Walk:
    return walks[0] if len(walks) == 1 else type(walks[0]).fullest(walks).with_side_tasks(model)


def estimate_stages(run: RunSpec, calibration: Calibration | None = None) -> list[Estimate]:
    """Return the estimates of the stages that may have the most, or the only one. Raises as `estimate` does."""
    return [Estimate(walk, calibration) for walk in _walks(run, None)]


def fullest(stages: Sequence[Estimate]) -> Estimate:
    """Return the estimate of the stage with the most, to find which may take a replay of each. Raises as `estimate`."""
    if len(stages) == 1:
        return stages[0]
    return Estimate(_fullest([stage.walk for stage in stages], None), stages[0].calibration)


def needs_more_than_its_gpus(run: RunSpec) -> bool:
    """Whether the GPUs that a device map spreads a run over do not surely hold it without the host.

    Cheaper than an estimate, which also finds the fullest of those. False for a run without a device map.
    """
    if run.parallelism.device_map is None or run.parallelism.stage is not None or find_engine(run.profile) is not None:
        return False
    decided = decide(run)
    if gpus.weight_bytes(gpus.on_device(decided.structure, HOST)):
        return True
    if not decided.has_stages:
        return False
    walks = [InferenceWalk(run, on_gpu) for on_gpu in decided.fullest_stages()]
    return not all(walk.usage(None).fits for walk in sorted(walks, key=lambda walk: walk.peak, reverse=True))
