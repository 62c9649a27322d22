"""Answers from a trace, for any model class that the installed transformers builds.

The trace has every allocation of the step in order, so phases, categories and ledger are read off it, and torch's
segments come from replaying it. What a trace does not see is added as in the engine's answers: cuBLAS's workspaces, the
CUDA context, the loaded kernels, and the range.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.cached_property import cached_property
from memplan.core.errors import UnsupportedModelError, printable
from memplan.core.frozen import FrozenDict
from memplan.engine.allocator import OutOfMemoryError
from memplan.estimate.answer import Estimate, Holding, Line, Parameters, Phase, Walk, largest_first
from memplan.estimate.lines import workspace_line
from memplan.estimate.usage import Answer
from memplan.models.cards import PublishedModel, facts_of, find_config
from memplan.models.gguf import parameters_in
from memplan.models.headers import Checkpoint
from memplan.probe import limits
from memplan.probe.libraries import objective_of
from memplan.probe.refusals import checked_run, refuse_several
from memplan.probe.run import cache
from memplan.probe.run.trace import TracedPhase, TracedRun, TracedStorage, Tracer, read, replayed
from memplan.resolve.card import find_card
from memplan.resolve.decide import fill_defaults
from memplan.resolve.notes import checkpoint_notes
from memplan.spec.generation import InlineModel
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

A100 = (8, 0)  # compute capability assumed if the run names no card, or one of another vendor


def traced_answer(
    run: RunSpec, tracer: Tracer, calibration: Calibration | None = None, *, keep: bool = True
) -> Estimate:
    """Return how much memory the run takes, by tracing its step. With `keep`, traces are cached on disk.

    Raises ProbeError if a library, a compiler or the model class is missing or the trace fails, SpecError for a run
    that a probe cannot run, ConfigError for an implausible config.
    """
    facts = PublishedModel(run.model.config) if isinstance(run.model, InlineModel) else facts_of(run.model)
    config = facts.config
    limits.check(config)
    notes = list(checkpoint_notes(config, run.method, run.precision))
    refuse_several(run, "an answer by trace")
    traced = _trace(checked_run(run), config, tracer, keep)
    notes += [
        *_architecture_notes(config, traced.built, run.batch.sees),
        *_parameter_count_notes(facts.checkpoint, traced.parameters),
    ]
    return _answer(run, traced, notes, calibration)


def _parameter_count_notes(checkpoint: Checkpoint | None, parameters: int) -> Iterator[str]:
    """Yield a note if an unquantised checkpoint's parameter count differs from the model's.

    Without a stack we cannot say which tensors differ.
    """
    if checkpoint is not None and checkpoint.why_not:
        yield f"the checkpoint was not looked at: {checkpoint.why_not}"
    tensors = checkpoint.tensors if checkpoint is not None else ()
    if not tensors or any(tensor.dtype not in ("BF16", "F16", "F32") for tensor in tensors):
        return
    stored = parameters_in(tensors)
    if stored != parameters:
        yield f"the checkpoint has {stored:,} numbers, and the model is built with {parameters:,} parameters"


def _architecture_notes(config: Mapping[str, Any], built: str, sees: bool) -> Iterator[str]:
    """Yield notes on how the traced model differs from the config's. Raises UnsupportedModelError for another head."""
    named = config.get("architectures")
    names = (
        [name for name in cast(list[Any], named) if isinstance(name, str)] if isinstance(named, (list, tuple)) else []
    )
    if names and built not in names:
        name = printable(names[0], 80)
        if not any(word in name for word in ("CausalLM", "LMHead")):
            raise UnsupportedModelError(
                f"architectures: {name} has a head of its own, but a trace builds transformers' {built}",
                "architectures",
            )
        yield f"architectures: the config is of {name}; transformers' {built} was traced"
    if config.get("auto_map"):
        yield f"the config names custom code (auto_map), which is never run: transformers' {built} was traced"
    towers = [key for key in ("vision_config", "audio_config") if config.get(key)]
    if towers and not sees:
        yield "traced on text alone: the vision and audio parts are loaded but not run"


def _trace(run: RunSpec, config: Mapping[str, Any], tracer: Tracer, keep: bool) -> TracedRun:
    steps = 2 if run.task == "train" else 1
    assistant = run.generation.assistant_model
    assistant_config = {"assistant": find_config(assistant)} if assistant is not None else {}
    key = {**cache.key_of(run, config, _capability(run.gpu), steps), **assistant_config}
    traced = cache.cached_trace(run, key) if keep else None
    if traced is None:
        answer = tracer.answer(run, steps)
        traced = read(run, answer)
        if keep:
            cache.store_trace(key, answer)
    return traced


def _capability(gpu: str | None) -> tuple[int, int]:
    return (find_gpu(gpu).compute_capability if gpu is not None else None) or A100


def _answer(run: RunSpec, traced: TracedRun, notes: list[str], calibration: Calibration | None) -> Estimate:
    gpu, card = find_card(run.gpu, on_several=False) if run.gpu is not None else (None, None)
    complete = fill_defaults(run)
    notes = [
        _traced_note(traced),
        *notes,
        *((*card.notes, *card.dtype_notes(str(complete.precision.compute))) if card is not None else ()),
        *traced.notes,
    ]
    names = ("method", "precision", "optimizer", "kernels", "loop")
    parts = {**{name: getattr(complete, name) for name in names}, "objective": objective_of(run)}
    return Estimate(TraceWalk(run, traced, gpu, parts, notes), calibration)


def _traced_note(traced: TracedRun) -> str:
    return f"traced, not estimated from one of memplan's stacks: the step as {_versions(traced.versions)} run it"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)


def _active(traced: TracedRun) -> int:
    return traced.parameters if traced.active is None else traced.active


def _gaps(run: RunSpec, traced: TracedRun) -> Iterator[str]:
    if traced.active is None:
        yield "parameters.active: the config does not say how many experts a token is sent to; all are counted"
    if (
        run.parallelism.offload.optimizer
        or run.kernels.checkpointing == "offload"
        or str(run.optimizer.name).startswith("paged")
    ):
        yield "host_bytes: a trace does not see the host's memory"


class TraceWalk(Walk):
    """The walk of a traced run on a card, which decides the bytes of cuBLAS's workspaces."""

    via = "trace"

    def __init__(
        self,
        run: RunSpec,
        traced: TracedRun,
        gpu: GPU | None,
        parts: Mapping[str, object] = FrozenDict(),
        notes: Sequence[str] = (),
    ) -> None:
        self.run, self.traced, self.gpu = run, traced, gpu
        self._parts, self._notes = parts, notes
        self._workspace = cublas_workspace(gpu.compute_capability if gpu else None).usual
        self._reserved: dict[int | None, int | None] = {}
        self.phases = self._peaks()
        self.load = max((phase.peak for phase in self.phases if phase.phase == "load"), default=0)
        # parameters, buffers and optimizer states that stay to the end
        end, kinds = len(traced.events), ("parameter", "buffer", "optstate")
        self.resident = sum(s.bytes for s in traced.storages if s.died == end and s.kind in kinds)
        self.unsupported = tuple(_gaps(run, traced))

    def on(self, gpu: GPU) -> TraceWalk:
        """Return the walk on another card with equally large workspaces. Both share their replays."""
        walk = copy(self)
        walk.gpu = gpu
        return walk

    @property
    def parts(self) -> Mapping[str, object]:
        return self._parts

    @property
    def parameters(self) -> Parameters:
        return Parameters(self.traced.parameters, self.traced.trainable, _active(self.traced))

    def notes(self) -> Sequence[str]:
        return self._notes

    # The peaks

    def _peaks(self) -> tuple[Phase, ...]:
        """Return the peak of every phase. The first step is separate only if it differs from the later ones."""
        tops = [self._phase(name, step, group) for (name, step), group in self._groups.items()]
        load, aside = ([p for p in tops if not p.step and (p.phase == "load") == loads] for loads in (True, False))
        first, later = ([phase for phase in tops if phase.step == step] for step in (1, 2))
        if not later or [p.peak for p in first] == [p.peak - self._extra(p.phase) for p in later]:
            return (*load, *(p._replace(step=None) for p in later or first), *aside)
        return (*load, *first, *later, *aside)

    @cached_property
    def _groups(self) -> dict[tuple[str, int], list[TracedPhase]]:
        """The trace's phases, by their name in an answer and their step."""
        groups: dict[tuple[str, int], list[TracedPhase]] = {}
        for phase in self.traced.phases:
            groups.setdefault((_PHASES.get(phase.phase, phase.phase), phase.step), []).append(phase)
        return groups

    def _phase(self, name: str, step: int, group: list[TracedPhase]) -> Phase:
        top = max(group, key=lambda phase: phase.peak)
        where = {"load": "", "clip": "clipping", "step": "optimizer"}.get(top.phase)
        peak = top.peak + self._handles(name, step) * self._workspace
        return Phase(name, step or None, peak, self._place(top.phase, top.peak_at) if where is None else where)

    def _handles(self, phase: str, step: int) -> int:
        """Return how many threads have a cuBLAS workspace: forward's from the first product on, then backward's too."""
        if phase == "load":
            return 0
        return 1 + (self.traced.run.task == "train" and (step != 1 or phase in ("backward", "step")))

    def _extra(self, phase: str) -> int:
        """Return the bytes of workspaces that a phase has in later steps but not in the first."""
        return (self._handles(phase, 2) - self._handles(phase, 1)) * self._workspace

    @property
    def top(self) -> Phase:
        """The phase of the peak; the last one if several are equally large."""
        return max(reversed(self.phases), key=lambda phase: phase.peak)

    def _place(self, phase: str, event: int) -> str:
        """Return the module and operation at an event."""
        number = self.traced.events[event]
        storage = self.traced.storages[number if number >= 0 else ~number]
        module = self._module(storage)
        if not module and phase in ("loss", "backward"):
            module = "loss"
        return f"{module}.{storage.op}".removeprefix(".")

    def _module(self, storage: TracedStorage) -> str:
        return self._plain(storage.module)

    def _plain(self, name: str) -> str:
        """Return a name without peft's wrappers around the model, its layers and its adapters."""
        if self.traced.run.method.kind not in ADAPTERS:
            return name
        before, _, path = name.rpartition(" of ") if " of " in name else ("", "", name)
        path = re.sub(r"^base_model\.model(\.|$)", "", path)
        path = re.sub(r"\.base_layer(?=\.weight|\.bias)|\.default(?=\.|$)", "", path)
        return f"{before} of {path}" if before else path

    # torch's segments

    def reserved(self, capacity: int | None = None) -> int | None:
        if capacity not in self._reserved:
            try:
                held = replayed(self.traced, self._workspace, self.run.loop.expandable_segments, capacity)
            except OutOfMemoryError:
                held = None
            self._reserved[capacity] = held
        return self._reserved[capacity]

    # The ledger and the timeline

    def lines(self, at: Phase) -> list[Line]:
        """Return the tensors alive at the peak of a phase, equal tensors of all layers in one line, largest first."""
        step = at.step if at.step is not None else max(p.step for p in self.traced.phases)
        stepless = (at.phase, 0)  # loading and side tasks belong to no step
        group = self._groups[stepless if stepless in self._groups else (at.phase, step)]
        top = max(group, key=lambda phase: phase.peak)
        source = _versions(self.traced.versions)
        counts = Counter(self._row(storage) for storage in self.traced.alive_at(top.peak_at) if storage.bytes)
        rows = [
            Line(what, kind, where, "", shape, dtype, count, bytes_ * count, why, source, "traced")
            for (what, kind, where, shape, dtype, bytes_, why), count in counts.items()
        ]
        handles = self._handles(at.phase, step)
        return largest_first([*rows, *([workspace_line(self.gpu, handles)] if handles else [])])

    def _row(self, storage: TracedStorage) -> tuple[str, str, str, tuple[int, ...], str, int, str]:
        """Return the key by which storages are grouped into one line."""
        dtype = _DTYPES.get(storage.dtype, storage.dtype)
        common = (storage.shape, dtype, storage.bytes)
        if storage.name:
            return (_without_layer_numbers(self._plain(storage.name)), storage.kind, "", *common, _WHY[storage.kind])
        temporary = f"made by {storage.op}, not yet used up"
        why = "kept for backward, or for a later operation" if storage.kind == "activation" else temporary
        return (storage.op, storage.kind, _without_layer_numbers(self._module(storage)), *common, why)

    def moments(self) -> Iterator[Phase]:
        """Yield the allocated bytes at every local maximum of the last traced step."""
        for name, phase, event in self._maxima():
            size = self.traced.allocated[event] + self._workspaces(name)
            yield Phase(name, None, size, self._place(phase, event))

    def kinds(self) -> Iterator[Mapping[str, int]]:
        held: Counter[str] = Counter()
        before = 0
        for name, _, event in self._maxima():
            for at in self.traced.events[before : event + 1]:
                storage = self.traced.storages[at if at >= 0 else ~at]
                held[storage.kind] += storage.bytes if at >= 0 else -storage.bytes
            before = event + 1
            yield held + Counter(other=self._workspaces(name))

    def _maxima(self) -> Iterator[tuple[str, str, int]]:
        """Yield memplan's and the trace's name of the phase and the event of each moment of the timeline."""
        traced = self.traced
        last = max(phase.step for phase in traced.phases)
        for phase in traced.phases:
            if phase.step not in (0, last) or phase.phase == "load":
                continue
            for event, following in pairwise(range(phase.start, min(phase.end + 1, len(traced.events)))):
                if traced.events[event] >= 0 > traced.events[following]:
                    yield _PHASES.get(phase.phase, phase.phase), phase.phase, event

    def _workspaces(self, phase: str) -> int:
        return self._handles(phase, max(phase.step for phase in self.traced.phases)) * self._workspace


_PHASES = {"clip": "step"}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_WHY = {
    "parameter": "the model's weights",
    "buffer": "a buffer of the model",
    "gradient": "needed by the optimizer",
    "optstate": "state of the optimizer",
    "other": "scale of fp16 losses",
}


def _without_layer_numbers(name: str) -> str:
    """Return a name without layer numbers."""
    return re.sub(r"\.\d+(?=\.|$| )", "", name)


def gpus_that_hold(answer: Estimate, vendor: str = "") -> Iterator[Holding]:
    """Yield the catalogued GPUs, all or one `vendor`'s, that hold a traced run, least memory first.

    Only cards of compute capability 8 and later, whose kernels allocate alike except for small scratch; nothing for a
    run on an older card.
    """
    walk = answer.walk
    assert isinstance(walk, TraceWalk)
    if _capability(walk.run.gpu) < A100:
        return
    by_workspace: dict[int, TraceWalk] = {}  # cards with equal workspaces share their replays
    for gpu in sorted(all_gpus(), key=lambda gpu: (gpu.usable, gpu.name)):
        if vendor not in ("", gpu.vendor) or (gpu.compute_capability or A100) < A100:
            continue
        workspace = cublas_workspace(gpu.compute_capability).usual
        if workspace not in by_workspace:
            by_workspace[workspace] = TraceWalk(walk.run, walk.traced, gpu)
        verdict = _verdict(by_workspace[workspace].on(gpu))
        if verdict in ("fits", "tight"):
            yield Holding(gpu, verdict)


def _verdict(walk: TraceWalk) -> Answer | None:
    """Return fits, tight or does not fit, from a replay without a capacity if that decides it."""
    usage = walk.usage(None)
    return "fits" if usage.fits_card_of(usage.usable or 0, replayed=True) else usage.answer
