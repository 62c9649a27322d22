"""The hinge: a run becomes a program, a program and a batch become an answer.

Pure: no network, no printing, no state but caches; the same run gives the same answer on any thread.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import mul
from typing import TYPE_CHECKING, NamedTuple

from memplan import inference
from memplan.answer import Bytes, Card, Estimate, Host, HostPhase, Line, Parameters, Peak, Phase, Rank, Verdict
from memplan.batches import check_batch
from memplan.catalogue.engines import find_engine
from memplan.catalogue.overhead import Communicator, cublas_workspace, cuda_context, nccl
from memplan.communicators import NODE
from memplan.engine.walk import largest, values
from memplan.errors import InternalError
from memplan.gpus import GPU
from memplan.host import on_host
from memplan.program import PHASES, Program, host_bytes, host_notes, phase_peaks, program, step_where
from memplan.resolve import Decided, decide
from memplan.run_axes import run_axes
from memplan.sizes import ONE_RUN
from memplan.spec import Also, RunSpec
from memplan.stages import every_stage, in_flight, layers_of, may_be_worst, parameters_of
from memplan.usage import Around, Replay, Usage, around, resident

if TYPE_CHECKING:
    from memplan.also import Aside
    from memplan.calibration import Calibration
    from memplan.models import ModelSpec


def estimate(run: RunSpec, calibration: Calibration | None = None, model: ModelSpec | None = None) -> Estimate:
    """How much memory the run takes, when, and whether it fits.

    `calibration` is a machine's own profile, for runs on the card it is of; others are answered without it. `model` is
    the one the run names where it has been found already: by find_model(..., online=True), for this asks no network.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError (all MemplanError) where the run cannot be
    answered. A run that does not fit is an answer, not an error.
    """
    if find_engine(run.profile) is not None:
        from memplan.serving import serve

        return serve(run, model)
    found = decide(run, model)
    if run.task != "train":
        return _inferred(run, found, calibration)
    decided, walked = worst(run, found)
    more: list[str] = []
    if run.also != Also():
        from memplan.also import asides, notes_of

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
        {**decided.parts, **_staged(run, decided), "objective": p.structure.graph.model.objective},
        Parameters(p.total_parameters, p.trainable_parameters, p.active_parameters),
        _usage(run, decided, walked, calibration),
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


def _usage(run: RunSpec, decided: Decided, walked: Walked, calibration: Calibration | None) -> Usage:
    """What a rank takes of its card."""
    axes, expandable = tuple(walked.axes.items()), run.loop.expandable_segments
    replay = Replay(decided.structure, axes, walked.workspace, expandable, walked.asides)
    beside = around_of(decided.gpu, decided.communicators, calibration)
    there = min((resident(walked.program), *(a.standing for a in walked.asides)))
    load = max((walked.phases[0].peak, *(a.loads for a in walked.asides)))
    return Usage(replay, there, load, walked.top.peak, decided.gpu, beside)


def _staged(run: RunSpec, decided: Decided) -> dict[str, object]:
    """What of a run's parallelism was decided: the schedule of a pipeline, and the stage that the answer is of."""
    structure = decided.structure
    if not structure.pipe.engine:
        return {}
    found = {"stage": structure.graph.degrees.stage, "schedule": structure.pipe.schedule}
    return {"parallelism": run.parallelism.model_copy(update=found)}


class Numbers(NamedTuple):
    """The values of a program's variables and of its chain of products for one run."""

    values: list[int]
    products: list[int]


class Walked(NamedTuple):
    """A run's peaks, phase by phase, and which is the largest. The last phases are what it does beside its steps."""

    program: Program
    axes: dict[str, int]
    numbers: Numbers
    workspace: int
    phases: list[Phase]
    moments: list[tuple[bool, int]]  # per phase: whether in a later micro-batch, and the moment's index (-1: none)
    peak: int
    asides: tuple[Aside, ...] = ()

    def followed_by(self, asides: tuple[Aside, ...]) -> Walked:
        """The same with what the run does beside its steps."""
        phases = [*self.phases, *(Phase(aside.phase, None, aside.peak, aside.where) for aside in asides)]
        moments = [*self.moments, *((False, -1) for _ in asides)]
        peak = max(range(len(phases)), key=lambda i: (phases[i].peak, i))
        return self._replace(phases=phases, moments=moments, peak=peak, asides=asides)

    @property
    def aside(self) -> Aside | None:
        """What the run does at its peak, where that is not a step."""
        at = self.peak - len(self.phases) + len(self.asides)
        return self.asides[at] if at >= 0 else None

    @property
    def top(self) -> Phase:
        """The phase of the peak."""
        return self.phases[self.peak]


class Engine(NamedTuple):
    """Where an answer's ledger and timeline come from: a walk of the run's program."""

    run: RunSpec
    walked: Walked
    decided: Decided
    calibration: Calibration | None

    def lines(self) -> Iterable[Line]:
        from memplan.ledger import lines

        return lines(self.walked, self.decided)

    def moments(self) -> Iterable[Phase]:
        from memplan.ledger import timeline

        return timeline(self.walked)

    def ranks(self) -> Iterable[Rank]:
        if self.decided.structure.graph.degrees.pp == 1:
            return
        for structure in every_stage(self.decided.structure):
            decided = self.decided._replace(structure=structure)
            walked = walk(self.run, decided)
            usage = _usage(self.run, decided, walked, self.calibration)
            yield Rank(
                structure.graph.degrees.stage,
                layers_of(structure),
                parameters_of(structure),
                in_flight(structure),
                Bytes(usage),
                Peak(walked.top.phase, walked.top.where),
                Verdict(usage, decided.gpu.usable if decided.gpu else None),
            )


def walk(run: RunSpec, decided: Decided) -> Walked:
    """Put batch and sequence into the run's program: the peak of every phase of the first and of later steps."""
    p = program(decided.structure)
    b, lengths = decided.batch, (decided.pictures, decided.batch.target_sequence)
    axes = run_axes(p, b.micro, b.sequence, decided.half, decided.large_tiles, ONE_RUN, *lengths)
    numbers = Numbers(values(p.variables, axes), values(p.products, axes))
    workspace = workspace_of(decided)
    found = [(False, *_best(p, False, phase, numbers)) for phase in PHASES]
    if p.structure.accumulates:
        later = [(True, *_best(p, True, phase, numbers)) for phase in PHASES]
        more = [(b[0], b[1] + p.accumulated[phase], b[2]) for b, phase in zip(later, PHASES, strict=True)]
        found = [max(a, b, key=_bytes) if b[2] >= 0 else a for a, b in zip(found, more, strict=True)]
    moving = [size for _, size, _ in found]
    held = sum(map(mul, p.held, numbers.values))
    phases = [Phase("load", None, p.loading, "")]
    moments = [(False, -1)]
    for phase, step, bytes_ in phase_peaks(p, workspace, moving, held):
        if bytes_ < p.parameters:
            raise InternalError(f"{phase} takes {bytes_} bytes, less than the {p.parameters} of the weights")
        if phase == "step":
            phases.append(Phase(phase, step, bytes_, step_where(p, step)))
            moments.append((False, -1))
        elif found[PHASES.index(phase)][2] >= 0:
            micro, _, index = found[PHASES.index(phase)]
            phases.append(Phase(phase, step, bytes_, p.where[micro][index]))
            moments.append((micro, index))
    peak = max(range(len(phases)), key=lambda i: (phases[i].peak, i))
    return Walked(p, axes, numbers, workspace, phases, moments, peak)


def worst(run: RunSpec, decided: Decided) -> tuple[Decided, Walked]:
    """The run on the rank that holds most, or on the stage of a pipeline that was asked for, and its walk."""
    if decided.structure.graph.degrees.pp == 1 or run.parallelism.stage is not None:
        return decided, walk(run, decided)
    each = (decided._replace(structure=one) for one in may_be_worst(decided.structure))
    return max(((one, walk(run, one)) for one in each), key=lambda found: found[1].top.peak)


def workspace_of(decided: Decided) -> int:
    """Bytes of one of cuBLAS's workspaces on the run's card."""
    return cublas_workspace(decided.gpu.compute_capability if decided.gpu else None).usual


def calibration_of(gpu: GPU | None, calibration: Calibration | None) -> Calibration | None:
    """The machine's own profile, where it is of the run's card."""
    if calibration is None or gpu is None or calibration.gpu != gpu.name:
        return None
    return calibration


def around_of(gpu: GPU | None, communicators: tuple[Communicator, ...], calibration: Calibration | None) -> Around:
    """What a process takes beside torch's segments, on the run's card and in so many `communicators`."""
    return around(cuda_context(gpu.compute_capability if gpu else None), calibration, nccl(communicators))


def _best(p: Program, later: bool, phase: str, numbers: Numbers) -> tuple[int, int]:
    """The most bytes of a phase, and the moment's index: -1 where the rank has no such phase."""
    terms = (p.later if later else p.first)[phase]
    return largest(terms, *numbers) if terms else (0, -1)


def _bytes(found: tuple[bool, int, int]) -> int:
    return found[1]
