"""The walk of a training run on the rank with the most: what torch reserves, the ledger, the timeline and the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from memplan.catalogue.hardware.overhead import COMPILED
from memplan.catalogue.kernels.wiring import GENERATING
from memplan.core.cached_property import cached_property
from memplan.core.records import NamedTuple
from memplan.engine.allocator import OutOfMemoryError
from memplan.engine.capacities import ReservedPeak, by_capacity
from memplan.engine.native import exact, new_allocator
from memplan.engine.walk import counts_at_each, size
from memplan.estimate import ledger
from memplan.estimate.answer import Host, Line, Parameters, Phase, Rank, Walk, bytes_by_kind
from memplan.estimate.host import host_memory
from memplan.estimate.side_task import BetweenSteps, SideTask, largest
from memplan.estimate.training_peaks import (
    TrainingPeaks,
    lengths_of,
    step_program,
    training_peaks,
    workspace_of,
)
from memplan.estimate.usage import Usage, calibration_of, room, run_overhead
from memplan.models.model import ModelSpec
from memplan.program.graph import operations_of, total_bytes
from memplan.program.run import ResolvedRun
from memplan.program.sharding.choice import sharding_of
from memplan.program.structure import Structure, chunks_of
from memplan.program.training.passes import pass_of as lowered_pass
from memplan.program.training.pipeline import in_flight, layers_of, parameters_of
from memplan.program.training.program import host_bytes, host_notes, program
from memplan.program.training.replay import (
    LONG_PASS,
    STREAMS,
    cached_logits,
    pass_of,
    replay_steps,
    replayed_microbatches,
)
from memplan.resolve.batches import check_batch
from memplan.resolve.communicators import NODE
from memplan.spec.run import RunSpec, is_default

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration


class TrainingWalk(Walk):
    """The walk of a training run on one rank: its steps and, with `with_side_tasks`, what runs in addition to them."""

    _asked: tuple[SideTask, ...] = ()
    _generates = False
    _side_notes: tuple[str, ...] = ()

    def __init__(self, run: RunSpec, decided: ResolvedRun) -> None:
        self.run, self.decided, self.gpu = run, decided, decided.gpu
        self.communicators = decided.communicators
        self._step = step = step_program(decided.structure)
        self._top: Phase | None = None
        self.resident, self.load = step.resident, step.program.loading

    def with_side_tasks(self, model: ModelSpec | None) -> TrainingWalk:
        run, trainer = self.run, self.decided.structure.graph.trainer
        if not is_default(run, "also"):
            from memplan.estimate.side_tasks import notes_of, side_tasks_of

            self._asked = side_tasks_of(run, self._between_steps, self.decided, model)
            self._side_notes = tuple(notes_of(run, self._asked))
        if trainer is not None and trainer.name in GENERATING:
            from memplan.estimate.rollout import elsewhere, rollout
            from memplan.estimate.run_peaks import run_peaks

            self._generates, self.unsupported = True, tuple(elsewhere(run))
            if self.decided.alike is not None and not self._asked:
                known = run_peaks(self.decided.alike, self._step).peak(run, self.decided, rollout)
                if known is not None:
                    self._top, self.resident = known
                    return self
        if self._generates or self._asked:
            self.resident = min((self.resident, *(task.persistent_bytes for task in self.side_tasks)))
            self.load = max((self.load, *(task.loads for task in self.side_tasks)))
            self._top = self.peaks.top
        return self

    @property
    def top(self) -> Phase:
        if self._top is None:
            self._top = self._step.top(*lengths_of(self.decided))
        return self._top

    @property
    def _between_steps(self) -> BetweenSteps:
        return BetweenSteps(self._step.program, workspace_of(self.decided))

    @cached_property
    def side_tasks(self) -> tuple[SideTask, ...]:
        """Tasks in addition to the steps: the trainer's own, then those that the run asks for."""
        if not self._generates:
            return self._asked
        from memplan.estimate.rollout import rollout

        return (*map(largest, rollout(self.run, self._between_steps, self.decided)), *self._asked)

    @cached_property
    def peaks(self) -> TrainingPeaks:
        """The peaks of all phases."""
        peaks = training_peaks(self.decided)
        return peaks.followed_by(self.side_tasks) if self.side_tasks else peaks

    @cached_property
    def axes(self) -> dict[str, int]:
        """The run's axes, for what needs no peaks."""
        return self._step.axes(lengths_of(self.decided)[0])

    def __getstate__(self) -> dict[str, object]:
        """Return the state with the peaks of all phases, which another process would have to lower the run for."""
        kept = {"_top": self.top, "peaks": self.peaks, "axes": self.peaks.axes, "side_tasks": self.side_tasks}
        return {name: value for name, value in {**vars(self), **kept}.items() if name != "_step"}

    @cached_property
    def phases(self) -> Sequence[Phase]:  # pyright: ignore[reportIncompatibleVariableOverride] (computed if asked for)
        return self.peaks.phases

    @property
    def compiled_away(self) -> int:
        """Temporaries, and the share of kept activations that AOTAutograd's partitioner may recompute."""
        if not self.run.kernels.compile:
            return 0
        of_kind = bytes_by_kind(self.lines(self.top))
        return of_kind["temp"] - of_kind["activation"] * COMPILED.low // 1000

    @property
    def parts(self) -> Mapping[str, object]:
        structure = self.decided.structure
        parts: dict[str, object] = {**self.decided.parts, "objective": structure.graph.model.objective}
        if structure.graph.trainer is not None:
            parts["reference"] = structure.graph.trainer.reference
        if structure.pipe.engine:
            stage = {"stage": structure.graph.degrees.stage, "schedule": structure.pipe.schedule}
            parts["parallelism"] = self.run.parallelism.model_copy(update=stage)
        return parts

    @property
    def parameters(self) -> Parameters:
        p = self.peaks.program
        return Parameters(p.counts.total, p.counts.trainable, p.counts.active)

    def notes(self) -> Iterator[str]:
        note = check_batch(self.decided.batch, self.decided.structure.graph.model)
        yield from self.decided.notes
        if self.run.kernels.compile:
            yield (
                "torch.compile: counted as eager code, which takes the most; the range goes down to what compiled code "
                f"may take ({COMPILED.basis}: {COMPILED.source})"
            )
        yield from host_notes(self.decided.structure, self.run.parallelism.gpus_per_node or NODE)
        yield from (note,) if note else ()
        yield from self._side_notes

    @cached_property
    def _host_bytes_in_steps(self) -> int:
        return host_bytes(self.peaks.program, self.peaks.axes)

    @property
    def host_bytes(self) -> int:
        return self._host_bytes_in_steps + max((task.host for task in self.side_tasks), default=0)

    def host(self) -> Host:
        d, run, in_steps = self.decided, self.run, self._host_bytes_in_steps
        return host_memory(d.structure, run.parallelism, run.profile, in_steps, self.side_tasks)

    def lines(self, at: Phase) -> list[Line]:
        return ledger.lines(self.peaks.at(at), self.decided)

    def moments(self) -> Iterator[Phase]:
        return ledger.timeline(self.peaks)

    def kinds(self) -> Iterator[Mapping[str, int]]:
        return ledger.timeline_kinds(self.peaks, self.decided)

    def counts(self, at: Phase) -> Iterator[dict[int, int]] | None:
        later, moment = self.peaks.moments[self.peaks.phases.index(at)]
        if moment < 0:
            return None
        low = lowered_pass(self.decided.structure, later)
        axes = {**operations_of(self.decided.structure.graph)[1], **self.axes}
        sizes = [size(key[0], key[1], axes)[1] for key in low.sizes]
        moments = (moment for moment in low.moments if moment.phase == at.phase)
        return counts_at_each(moments, low.runs, axes, sizes)

    def ranks(self, calibration: Calibration | None) -> Iterator[Rank]:
        for decided in self.decided.every_stage() if self.decided.has_stages else ():
            walk, structure = TrainingWalk(self.run, decided), decided.structure
            numbers, stage = parameters_of(structure), structure.graph.degrees.stage
            yield Rank.of(walk.usage(calibration), walk.top, stage, layers_of(structure), numbers, in_flight(structure))

    @cached_property
    def replay(self) -> TrainingReplay:
        """The inputs that determine the allocations."""
        axes, workspace = tuple(self.axes.items()), workspace_of(self.decided)
        expandable = self.run.loop.expandable_segments
        return TrainingReplay(self.decided.structure, axes, workspace, expandable, self.side_tasks)

    @property
    def is_long(self) -> bool:
        return _is_long(self.decided.structure)

    def usage(self, calibration: Calibration | None) -> Usage:
        if self.decided.colocated is None or not self.gpu:
            return super().usage(calibration)
        from memplan.estimate.colocated import ColocatedUsage

        return ColocatedUsage(self, self.decided.colocated, calibration)

    def reserved(self, capacity: int | None = None) -> int | None:
        return reserved(self.replay, capacity)

    def reserved_within(self, most: int) -> int | None:
        return reserved.within(self.replay, most)

    def free_in_other_streams(self) -> int:
        return sharding_of(self.decided.structure).idle_in_streams()

    def unreplayed_bytes(self) -> int:
        return cached_logits(self.decided.structure, self.axes)


def least_bytes(decided: ResolvedRun) -> int:
    """Return the bytes of the weights, and of the gradients if all are there at once: a training run's peak is not
    less. Takes no pass."""
    sharding = sharding_of(decided.structure)
    gradients = () if sharding.frees_gradients or sharding.gradients_in_buckets else sharding.gradients()
    return total_bytes((*sharding.weights(), *gradients))


def cannot_fit(decided: ResolvedRun, calibration: Calibration | None) -> bool:
    """Return whether weights and gradients alone do not fit. Cheaper than an estimate, which runs the passes."""
    gpu = decided.gpu
    if gpu is None or not decided.trains or decided.has_stages:
        return False
    overhead = run_overhead(gpu, decided.communicators, calibration_of(gpu, calibration))
    return least_bytes(decided) > room(gpu.usable, overhead).possible


class TrainingReplay(NamedTuple):
    """The inputs that determine the allocations of a training run, by which its replays are cached.

    workspace   bytes of cuBLAS's workspace
    expandable  whether the allocator uses expandable segments
    side_tasks  the run's side tasks
    """

    structure: Structure
    axes: tuple[tuple[str, int], ...]
    workspace: int
    expandable: bool
    side_tasks: tuple[SideTask, ...] = ()


@by_capacity
@exact
def reserved(replay: TrainingReplay, capacity: int | None) -> ReservedPeak:
    """Return the peak that torch reserves on a card with `capacity` bytes."""
    short, extra = shorten_replay(replay)
    if short is not replay:
        return reserved.peak(short, None if capacity is None else capacity - extra).plus(extra)
    after = [task.replay for task in replay.side_tasks if task.own_process_graph is None]
    alone = [task.replay for task in replay.side_tasks if task.own_process_graph is not None]
    allocators = [new_allocator(replay.expandable, capacity, STREAMS)]
    try:
        replay_steps(program(replay.structure), dict(replay.axes), replay.workspace, allocators[0], after)
        for replay_task in alone:
            allocators.append(new_allocator(replay.expandable, capacity))
            replay_task(allocators[-1])
    except OutOfMemoryError:
        return ReservedPeak.of(allocators, survived=False)
    return ReservedPeak.of(allocators, survived=True)


@lru_cache(maxsize=1024)
def _is_long(structure: Structure) -> bool:
    return sum(pass_of(chunk, later=False).length for chunk in chunks_of(structure)) > LONG_PASS


def shorten_replay(replay: TrainingReplay) -> tuple[TrainingReplay, int]:
    """Return a replay with fewer microbatches, and the bytes that the others add to its peak.

    Each of the others is assumed to add what one of the second half of those replayed adds.
    """
    pipe = replay.structure.pipe
    few = replayed_microbatches(replay.structure) if pipe.engine else pipe.microbatches
    if pipe.microbatches <= few:
        return replay, 0

    def with_microbatches(count: int) -> TrainingReplay:
        return replay._replace(structure=replay.structure._replace(pipe=pipe._replace(microbatches=count)))

    short, half = with_microbatches(few), with_microbatches(few // 2)
    growth = (reserved(short) or 0) - (reserved(half) or 0)
    return short, max(0, growth) * (pipe.microbatches - few) // (few - few // 2)
