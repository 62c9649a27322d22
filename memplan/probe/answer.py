"""An answer from a trace: of any model class that the installed transformers builds, whether memplan has a stack for it
or not.

The trace has every allocation of the step in order, so phases, categories and ledger are read off it, and torch's
segments are a replay of it. What a trace does not see is added as the engine's answers have it: cuBLAS's workspaces,
the CUDA context and the loaded kernels, and the band.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.cached_property import cached_property
from memplan.core.errors import UnsupportedModelError, printable
from memplan.engine.allocator import OutOfMemoryError
from memplan.estimate.answer import Card, Estimate, Holding, Line, Parameters, Peak, Phase, Rank
from memplan.estimate.calibration import calibration_of
from memplan.estimate.usage import Usage, around_of
from memplan.models.cards import Facts, facts_of, find_config
from memplan.models.gguf import parameters_in
from memplan.models.headers import Checkpoint
from memplan.probe import limits
from memplan.probe.refusals import refuse_several, settled
from memplan.probe.run import cache
from memplan.probe.run.trace import Storage, Traced, TracedPhase, Tracer, read, replayed
from memplan.resolve.decide import completed, objective_of
from memplan.resolve.notes import checkpoint_notes, dtype_notes, gpu_notes
from memplan.spec.generation import InlineModel
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

A100 = (8, 0)  # whose kernels are taken where no card is named, or one of another vendor


def traced_answer(
    run: RunSpec, tracer: Tracer, calibration: Calibration | None = None, *, keep: bool = True
) -> Estimate:
    """How much memory the run takes, as its step was traced; taken from the disk and kept there unless `keep` is false.

    Raises ProbeError where a library, a compiler or the model's class is missing or the trace fails, SpecError for what
    a probe does not run, ConfigError for a config that is no model's.
    """
    facts = Facts(run.model.config) if isinstance(run.model, InlineModel) else facts_of(run.model)
    config = facts.config
    limits.check(config)
    notes = list(checkpoint_notes(config, run.method, run.precision))
    refuse_several(run, "an answer by trace")
    traced = _trace(settled(run), config, tracer, keep)
    notes += [*_as_published(config, traced.built, run.batch.images), *_beside(facts.checkpoint, traced.parameters)]
    return _answer(run, traced, notes, calibration)


def _beside(checkpoint: Checkpoint | None, parameters: int) -> Iterator[str]:
    """Where a checkpoint that is not quantised has other numbers than the model: it has no stack to say in what."""
    if checkpoint is not None and checkpoint.why_not:
        yield f"the checkpoint was not looked at: {checkpoint.why_not}"
    tensors = checkpoint.tensors if checkpoint is not None else ()
    if not tensors or any(tensor.dtype not in ("BF16", "F16", "F32") for tensor in tensors):
        return
    stored = parameters_in(tensors)
    if stored != parameters:
        yield f"the checkpoint has {stored:,} numbers, and the model is built with {parameters:,} parameters"


def _as_published(config: Mapping[str, Any], built: str, images: int) -> Iterator[str]:
    """Where what was traced is not what the config is of. Raises UnsupportedModelError for another head."""
    named = config.get("architectures")
    names = (
        [name for name in cast(list[Any], named) if isinstance(name, str)] if isinstance(named, (list, tuple)) else []
    )
    if names and built not in names:
        name = printable(names[0], 80)
        if not any(word in name for word in ("CausalLM", "LMHead")):
            raise UnsupportedModelError(
                f"architectures: {name} has a head of its own, and transformers' {built} is what a trace builds",
                "architectures",
            )
        yield f"architectures: the config is of {name}; transformers' {built} was traced"
    if config.get("auto_map"):
        yield f"the config names code of its own (auto_map), which is never run: transformers' {built} was traced"
    towers = [key for key in ("vision_config", "audio_config") if config.get(key)]
    if towers and not images:
        yield "traced on text alone: what sees images or hears is loaded, and does nothing"


def _trace(run: RunSpec, config: Mapping[str, Any], tracer: Tracer, keep: bool) -> Traced:
    steps = 2 if run.task == "train" else 1
    assistant = run.generation.assistant_model
    beside = {"assistant": find_config(assistant)} if assistant is not None else {}
    key = {**cache.key_of(run, config, _capability(run.gpu), steps), **beside}
    traced = cache.found(run, key) if keep else None
    if traced is None:
        answer = tracer.answer(run, steps)
        traced = read(run, answer)
        if keep:
            cache.keep(key, answer)
    return traced


def _capability(gpu: str | None) -> tuple[int, int]:
    return (find_gpu(gpu).compute_capability if gpu is not None else None) or A100


def _answer(run: RunSpec, traced: Traced, notes: list[str], calibration: Calibration | None) -> Estimate:
    gpu = find_gpu(run.gpu) if run.gpu is not None else None
    workspace = cublas_workspace(gpu.compute_capability if gpu else None)
    details = Details(traced, workspace.usual, run.loop.expandable_segments)
    top = details.top
    calibration = calibration_of(gpu, calibration)
    whole = completed(run)
    notes = [
        _how(traced),
        *notes,
        *(gpu_notes(gpu, str(run.gpu)) if gpu is not None else ()),
        *dtype_notes(gpu, str(whole.precision.compute)),
        *traced.notes,
        *((calibration.named(),) if calibration else ()),
    ]
    usage = Usage(details, details.resident, details.load, top.peak, gpu, around_of(gpu, (), calibration))
    return Estimate(
        run,
        {
            **{name: getattr(whole, name) for name in ("method", "precision", "optimizer", "kernels", "loop")},
            "objective": objective_of(run),
        },
        Parameters(traced.parameters, traced.trainable, _active(traced)),
        usage,
        Card(gpu.name, gpu.usable, 1) if gpu else None,
        Peak(top.phase, top.where),
        details.phases,
        0,
        tuple(notes),
        details,
        calibration,
        "trace",
        tuple(_left_out(run, traced)),
    )


def _how(traced: Traced) -> str:
    return f"traced, not estimated from a stack of memplan's: the step as {_versions(traced.versions)} take it"


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)


def _active(traced: Traced) -> int:
    return traced.parameters if traced.active is None else traced.active


def _left_out(run: RunSpec, traced: Traced) -> Iterator[str]:
    if traced.active is None:
        yield "parameters.active: the config does not say how many experts a token is sent to; all are counted"
    if (
        run.parallelism.offload.optimizer
        or run.kernels.checkpointing == "offload"
        or str(run.optimizer.name).startswith("paged")
    ):
        yield "host_bytes: a trace does not see the host's memory"


class Details:
    """A trace as an answer shows it, with a `workspace` of cuBLAS's (bytes) for every thread that multiplies."""

    is_long = False

    def __init__(self, traced: Traced, workspace: int, expandable: bool) -> None:
        self.traced = traced
        self._workspace = workspace
        self._expandable = expandable
        self._reserved: dict[int | None, int | None] = {}

    def beside_a(self, workspace: int) -> Details:
        """The same on a card whose workspaces are others."""
        return Details(self.traced, workspace, self._expandable)

    # The peaks

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The peak of every phase: of the first step and of the later ones, where they differ at all."""
        tops = [self._phase(name, step, group) for (name, step), group in self._groups.items()]
        load, aside = ([p for p in tops if not p.step and (p.phase == "load") == loads] for loads in (True, False))
        first, later = ([phase for phase in tops if phase.step == step] for step in (1, 2))
        if not later or [p.peak for p in first] == [p.peak - self._extra(p.phase) for p in later]:
            return (*load, *(p._replace(step=None) for p in later or first), *aside)
        return (*load, *first, *later, *aside)

    @cached_property
    def _groups(self) -> dict[tuple[str, int], list[TracedPhase]]:
        """The trace's phases by the name they have in an answer, and the step."""
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
        """How many threads have a workspace by then: forward's comes with the first product, then backward's."""
        if phase == "load":
            return 0
        return 1 + (self.traced.run.task == "train" and (step != 1 or phase in ("backward", "step")))

    def _extra(self, phase: str) -> int:
        """What a phase has more of workspaces in later steps than in the first."""
        return (self._handles(phase, 2) - self._handles(phase, 1)) * self._workspace

    @cached_property
    def top(self) -> Phase:
        """The phase of the peak, the last where several are as large."""
        most = max(phase.peak for phase in self.phases)
        return [phase for phase in self.phases if phase.peak == most][-1]

    @property
    def load(self) -> int:
        """The peak of loading, in bytes."""
        return max((phase.peak for phase in self.phases if phase.phase == "load"), default=0)

    @cached_property
    def resident(self) -> int:
        """Bytes that are there to the end."""
        end = len(self.traced.events)
        kinds = ("parameter", "buffer", "optstate")
        return sum(s.bytes for s in self.traced.storages if s.died == end and s.kind in kinds)

    def _place(self, phase: str, event: int) -> str:
        """The operation at an event, and its module."""
        number = self.traced.events[event]
        storage = self.traced.storages[number if number >= 0 else ~number]
        module = self._module(storage)
        if not module and phase in ("loss", "backward"):
            module = "loss"
        return f"{module}.{storage.op}".removeprefix(".")

    def _module(self, storage: Storage) -> str:
        return self._plain(storage.module)

    def _plain(self, name: str) -> str:
        """A name without peft's wrappers around the model, its layers and its adapters."""
        if self.traced.run.method.kind not in ADAPTERS:
            return name
        before, _, path = name.rpartition(" of ") if " of " in name else ("", "", name)
        path = re.sub(r"^base_model\.model(\.|$)", "", path)
        path = re.sub(r"\.base_layer(?=\.weight|\.bias)|\.default(?=\.|$)", "", path)
        return f"{before} of {path}" if before else path

    # Torch's segments: as `memplan.estimate.usage.Allocations`

    def reserved(self, capacity: int | None = None) -> int | None:
        if capacity not in self._reserved:
            try:
                held = replayed(self.traced, self._workspace, self._expandable, capacity)
            except OutOfMemoryError:
                held = None
            self._reserved[capacity] = held
        return self._reserved[capacity]

    def apart(self) -> int:
        return 0

    def beside(self) -> int:
        return 0

    # The ledger and the timeline: as `memplan.estimate.answer.Details`

    def lines(self) -> Iterator[Line]:
        """Tensors alive at the peak, those of equal layers together, largest first."""
        step = self.top.step if self.top.step is not None else max(p.step for p in self.traced.phases)
        outside = (self.top.phase, 0)  # of the steps: loading, and what a run does beside them
        group = self._groups[outside if outside in self._groups else (self.top.phase, step)]
        top = max(group, key=lambda phase: phase.peak)
        source = _versions(self.traced.versions)
        counts = Counter(self._row(storage) for storage in self.traced.alive_at(top.peak_at) if storage.bytes)
        found = [
            Line(what, kind, where, "", shape, dtype, count, bytes_ * count, why, source, "traced")
            for (what, kind, where, shape, dtype, bytes_, why), count in counts.items()
        ]
        handles = self._handles(self.top.phase, step)
        if handles:
            gpu = self.traced.run.gpu
            row = cublas_workspace(find_gpu(gpu).compute_capability if gpu is not None else None)
            why = "one for each thread that multiplies matrices"
            held = handles * row.usual
            found.append(Line(row.what, "other", "torch", "", (), "uint8", handles, held, why, row.source, row.basis))
        yield from sorted(found, key=lambda line: (-line.bytes, line.where, line.what))

    def _row(self, storage: Storage) -> tuple[str, str, str, tuple[int, ...], str, int, str]:
        """What a storage shares with those that stand in one line with it."""
        dtype = _DTYPES.get(storage.dtype, storage.dtype)
        alike = (storage.shape, dtype, storage.bytes)
        if storage.name:
            return (_every(self._plain(storage.name)), storage.kind, "", *alike, _WHY[storage.kind])
        made = f"made by {storage.op}, not yet used up"
        why = "kept for a gradient, or for what follows" if storage.kind == "activation" else made
        return (storage.op, storage.kind, _every(self._module(storage)), *alike, why)

    def moments(self) -> Iterator[Phase]:
        """What is allocated whenever memory is about to fall, in the last step that was traced."""
        traced = self.traced
        last = max(phase.step for phase in traced.phases)
        for phase in traced.phases:
            if phase.step not in (0, last) or phase.phase == "load":
                continue
            name = _PHASES.get(phase.phase, phase.phase)
            for at, after in pairwise(range(phase.start, min(phase.end + 1, len(traced.events)))):
                if traced.events[at] >= 0 > traced.events[after]:
                    size = traced.allocated[at] + self._handles(name, last) * self._workspace
                    yield Phase(name, None, size, self._place(phase.phase, at))

    def ranks(self) -> Iterator[Rank]:
        """A trace is of one GPU."""
        yield from ()


_PHASES = {"clip": "step"}
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_WHY = {
    "parameter": "the model's weights",
    "buffer": "a buffer of the model",
    "gradient": "needed by the optimizer",
    "optstate": "state of the optimizer",
    "other": "scale of fp16 losses",
}


def _every(name: str) -> str:
    """A name without the numbers of layers."""
    return re.sub(r"\.\d+(?=\.|$| )", "", name)


def holding(answer: Estimate, vendor: str = "") -> Iterator[Holding]:
    """The catalogued GPUs that hold a traced run, or of one vendor those, least memory first: of compute capability 8
    and later, whose kernels allocate alike but for small scratch. None for a run on an older card."""
    details = answer.details
    assert isinstance(details, Details)
    if _capability(details.traced.run.gpu) < A100:
        return
    by_workspace: dict[int, Details] = {}
    for gpu in sorted(all_gpus(), key=lambda gpu: (gpu.usable, gpu.name)):
        if vendor not in ("", gpu.vendor) or (gpu.compute_capability or A100) < A100:
            continue
        workspace = cublas_workspace(gpu.compute_capability).usual
        there = by_workspace.setdefault(workspace, details.beside_a(workspace))
        verdict = _verdict(there, gpu)
        if verdict in ("fits", "tight"):
            yield Holding(gpu, verdict)


def _verdict(details: Details, gpu: GPU) -> str:
    """fits, tight or does not fit; from a replay on a card with room where that tells."""
    usage = Usage(details, details.resident, details.load, details.top.peak, gpu, around_of(gpu, (), None))
    return "fits" if usage.told(gpu.usable, replayed=True) else str(usage.answer)
