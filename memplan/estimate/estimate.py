"""The door: one answer for a run of training, inference or serving."""

from __future__ import annotations

from memplan.catalogue.profiles.engines import find_engine
from memplan.estimate import inference
from memplan.estimate.answer import Card, Estimate, Host, HostPhase, Parameters, Peak
from memplan.estimate.calibration import Calibration, calibration_of
from memplan.estimate.host import on_host
from memplan.estimate.training import Engine, staged, usage_of
from memplan.estimate.walk import worst
from memplan.models.model import ModelSpec
from memplan.program.run import Decided
from memplan.program.training.program import host_bytes, host_notes
from memplan.resolve.batches import check_batch
from memplan.resolve.communicators import NODE
from memplan.resolve.decide import decide
from memplan.spec.run import RunSpec
from memplan.spec.training import Also


def estimate(run: RunSpec, calibration: Calibration | None = None, model: ModelSpec | None = None) -> Estimate:
    """How much memory the run takes, when, and whether it fits.

    `calibration` is a machine's own profile, for runs on the card it is of; others are answered without it. `model` is
    the one the run names where it has been found already: by find_model(..., online=True), for this asks no network.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError (all MemplanError) where the run cannot be
    answered. A run that does not fit is an answer, not an error.
    """
    if find_engine(run.profile) is not None:
        from memplan.estimate.serving import serve

        return serve(run, model)
    found = decide(run, model)
    if run.task != "train":
        return _inferred(run, found, calibration)
    decided, walked = worst(run, found)
    more: list[str] = []
    if run.also != Also():
        from memplan.estimate.side_tasks import asides, notes_of

        walked = walked.followed_by(asides(run, walked, decided, model))
        more += notes_of(run, walked.asides)
    p = walked.program
    note = check_batch(decided.batch, p.structure.graph.model)
    top = walked.top
    calibration = calibration_of(decided.gpu, calibration)
    in_steps = host_bytes(p, walked.axes)
    notes = [
        *decided.notes,
        *host_notes(decided.structure, run.parallelism.gpus_per_node or NODE),
        *((note,) if note else ()),
        *more,
        *((calibration.named(),) if calibration else ()),
    ]
    return Estimate(
        run,
        {**decided.parts, **staged(run, decided), "objective": p.structure.graph.model.objective},
        Parameters(p.total_parameters, p.trainable_parameters, p.active_parameters),
        usage_of(run, decided, walked, calibration),
        Card(decided.gpu.name, decided.gpu.usable, run.parallelism.world) if decided.gpu else None,
        Peak(top.phase, top.where),
        tuple(walked.phases),
        in_steps + max((aside.host for aside in walked.asides), default=0),
        tuple(notes),
        Engine(run, walked, decided, calibration),
        calibration,
        host=on_host(decided.structure, run.parallelism, run.profile, in_steps, walked.asides),
    )


def _inferred(run: RunSpec, decided: Decided, calibration: Calibration | None) -> Estimate:
    """The answer for a run in which nothing trains."""
    expandable = run.loop.expandable_segments
    walked = inference.worst(decided, run.parallelism.stage, expandable)
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
        Parameters(*inference.counted(walked.graph)),
        inference.usage_of(walked, expandable, calibration),
        Card(decided.gpu.name, decided.gpu.usable, run.parallelism.world) if decided.gpu else None,
        Peak(top.phase, top.where),
        tuple(phases),
        in_host,
        (*decided.notes, *((note,) if note else ()), *((calibration.named(),) if calibration else ())),
        inference.Engine(walked, top.phase, expandable, calibration),
        calibration,
        host=Host(1, (HostPhase("decode", in_host, in_host, 0),)) if walked.host_bytes else None,
    )
