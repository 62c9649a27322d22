"""Estimate a run: training, inference or serving."""

from __future__ import annotations

from typing import TYPE_CHECKING

from memplan.catalogue.profiles.engines import find_engine
from memplan.estimate import inference
from memplan.estimate.answer import Card, Estimate, Host, HostPhase, Parameters, Peak
from memplan.estimate.host import host_memory
from memplan.estimate.training import TrainingDetails, decided_parallelism, usage_of
from memplan.estimate.usage import calibration_of
from memplan.estimate.walk import walk_fullest_rank
from memplan.models.model import ModelSpec
from memplan.program.run import ResolvedRun
from memplan.program.training.program import host_bytes, host_notes
from memplan.resolve.batches import check_batch
from memplan.resolve.communicators import NODE
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec
from memplan.spec.training import Also

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


def estimate(run: RunSpec, calibration: Calibration | None = None, model: ModelSpec | None = None) -> Estimate:
    """Return how much memory the run takes, when, and whether it fits.

    `calibration` is a machine's own profile; it is ignored if it belongs to another card. `model` is the run's model if
    it has been looked up already, for instance by find_model(..., online=True): estimate never uses the network.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError (all MemplanError) if the run cannot be
    answered. A run that does not fit is an answer, not an error.
    """
    if find_engine(run.profile) is not None:
        from memplan.estimate.serving import serve

        return serve(run, model)
    resolved = decide(run, model)
    if run.task != "train":
        return _estimate_inference(run, resolved, calibration)
    decided, walked = walk_fullest_rank(run, resolved)
    side_notes: list[str] = []
    if run.also != Also():
        from memplan.estimate.side_tasks import notes_of, side_tasks_of

        walked = walked.followed_by(side_tasks_of(run, walked, decided, model))
        side_notes += notes_of(run, walked.side_tasks)
    p = walked.program
    note = check_batch(decided.batch, p.structure.graph.model)
    top = walked.top
    calibration = calibration_of(decided.gpu, calibration)
    in_steps = host_bytes(p, walked.axes)
    notes = [
        *decided.notes,
        *host_notes(decided.structure, run.parallelism.gpus_per_node or NODE),
        *((note,) if note else ()),
        *side_notes,
        *((calibration.named(),) if calibration else ()),
    ]
    return Estimate(
        run,
        {**decided.parts, **decided_parallelism(run, decided), "objective": p.structure.graph.model.objective},
        Parameters(p.total_parameters, p.trainable_parameters, p.active_parameters),
        usage_of(run, decided, walked, calibration),
        Card(decided.gpu.name, decided.gpu.usable, run.parallelism.world) if decided.gpu else None,
        Peak(top.phase, top.where),
        tuple(walked.phases),
        in_steps + max((task.host for task in walked.side_tasks), default=0),
        tuple(notes),
        TrainingDetails(run, walked, decided, calibration),
        calibration,
        host=host_memory(decided.structure, run.parallelism, run.profile, in_steps, walked.side_tasks),
    )


def _estimate_inference(run: RunSpec, decided: ResolvedRun, calibration: Calibration | None) -> Estimate:
    """Return the answer for a run that does not train."""
    expandable = run.loop.expandable_segments
    walked = inference.walk_fullest_gpu(decided, run.parallelism.stage, expandable)
    phases = walked.phases
    top = max(phases, key=lambda phase: phase.peak)
    model = decided.structure.graph.model
    note = check_batch(decided.batch, model)
    calibration = calibration_of(decided.gpu, calibration)
    in_host = walked.host + walked.host_bytes
    parts = {**decided.parts, "objective": model.objective}
    placed = walked.decided.structure.graph.placed
    if placed is not None:
        device_map = run.parallelism.device_map or "auto"
        parts["parallelism"] = run.parallelism.model_copy(update={"stage": placed.card, "device_map": device_map})
    return Estimate(
        run,
        parts,
        Parameters(*inference.inference_parameters(walked.graph)),
        inference.usage_of(walked, expandable, calibration),
        Card(decided.gpu.name, decided.gpu.usable, run.parallelism.world) if decided.gpu else None,
        Peak(top.phase, top.where),
        tuple(phases),
        in_host,
        (*decided.notes, *((note,) if note else ()), *((calibration.named(),) if calibration else ())),
        inference.InferenceDetails(walked, top.phase, expandable, calibration),
        calibration,
        host=Host(1, (HostPhase("decode", in_host, in_host, 0),)) if walked.host_bytes else None,
    )
