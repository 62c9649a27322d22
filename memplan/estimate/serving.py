"""The answer for a serving engine: what it takes of a card, its pool, and whether the run's requests fit it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from memplan.catalogue.hardware.overhead import Overhead
from memplan.catalogue.quantization.gguf import dynamic_range
from memplan.core.cached_property import cached_property
from memplan.core.errors import printable
from memplan.core.units import GIB
from memplan.estimate.answer import Line, Parameters, Phase, Walk, largest_first
from memplan.estimate.usage import Answer, ProcessOverhead, Usage
from memplan.models.model import ModelSpec
from memplan.program.serving.budget import Budget, budget, card_for, experts_on_host, layers_that_fit
from memplan.program.serving.engine_step import EngineStep
from memplan.program.serving.images import profiled_items
from memplan.program.serving.model_weights import TABLE, host_of_adapters, kernel_of
from memplan.program.serving.settings import Settings
from memplan.program.stored.gguf import file_type_of
from memplan.program.weight_sizes import active_elements, elements
from memplan.resolve.serving import resolve_serving
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration

COVERAGE = 0.94


class ServingWalk(Walk):
    """The walk of a run on a serving engine: how it divides the card that has the smallest pool.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """

    is_calibrated = False  # a profile is of processes that do not divide their card

    def __init__(self, run: RunSpec, model: ModelSpec | None = None) -> None:
        self.run, self.settings = run, resolve_serving(run, model)
        self.gpu = self.settings.gpu
        self.verdict: Answer | None = self._verdict()
        b = self.at("usual")
        self.budget = b._replace(shows_needed_pool=self.verdict == "does not fit")
        self.resident = self.load = b.parameters
        graphs, step, decoding = b.graphs.usual, b.step, b.decoding
        held = b.parameters + graphs + self.budget.shown
        self.phases = (
            Phase("load", None, b.parameters, ""),
            Phase("prefill", None, held + step.bytes, step.where),
            Phase("decode", None, held + decoding.bytes, decoding.where),
        )

    def at(self, level: str) -> Budget:
        """Return the budget at the `low`, `usual` or `high` end of what the process takes outside torch's tensors."""
        return budget(self.settings, self.gpu.usable if self.gpu else None, level)

    def _verdict(self) -> Answer | None:
        """Return fits if the requests fit and the engine starts for every measured overhead, tight if for some, does
        not start if the requests fit for some; None without a card."""
        if self.gpu is None:
            return None
        most, least = self.at("low"), self.at("high")
        if not most.fits:
            return "does not fit"
        if not most.starts:
            return "does not start"
        return "fits" if least.fits and least.starts else "tight"

    @property
    def parts(self) -> Mapping[str, object]:
        return {"serving": self.settings.serving}

    @property
    def parameters(self) -> Parameters:
        return parameters_of(self.settings.model)

    @property
    def host_bytes(self) -> int:
        return host_of_adapters(self.settings)

    def serving(self) -> Mapping[str, Any]:
        return facts(self.budget)

    def notes(self) -> Iterable[str]:
        return _notes(self.budget, self.run)

    def usage(self, calibration: Calibration | None) -> Usage:
        del calibration
        return ServingUsage(self)

    def lines(self, at: Phase) -> list[Line]:
        if at.phase == "load":
            return largest_first(_weights(self.budget))
        step = self.budget.decoding if at.phase == "decode" else self.budget.step
        return largest_first(_lines(self.budget, step))

    def moments(self) -> Iterable[Phase]:
        return self.phases


@lru_cache(maxsize=512)
def parameters_of(model: ModelSpec) -> Parameters:
    """Return the model's parameter counts; none train."""
    from memplan.program.stored.checkpoint import parameters

    axes = model.axes()
    weights = [p.weight for p in parameters(model) if p.weight.group != "buffer"]
    return Parameters(sum(elements(w, axes) for w in weights), 0, sum(active_elements(w, axes) for w in weights))


def pool_tokens(run: RunSpec, model: ModelSpec | None = None) -> int:
    """Return how many tokens the pool on the run's card holds; without a card, of a pool sized for its requests."""
    s = resolve_serving(run, model)
    return budget(s, s.gpu.usable if s.gpu else None).pool.tokens


def requests(run: RunSpec, context: int, model: ModelSpec | None = None) -> int:
    """Return how many requests of `context` tokens the pool on the run's card holds at once."""
    s = resolve_serving(run, model)
    return int(budget(s, s.gpu.usable if s.gpu else None).pool.concurrency(context))


# The keys of `facts`, in order.
FACTS = (
    *("engine", "read", "budget", "weights", "activations", "cuda_graphs", "pool", "blocks", "block_size"),
    *("block_bytes", "tokens", "cache_dtype", "context", "requests", "concurrency", "max_model_len"),
    *("longest_concurrency", "max_num_seqs", "max_num_batched_tokens", "needed", "sharing", "card", "layers"),
)


def facts(b: Budget) -> dict[str, Any]:
    """Return what the answer says about the engine and its pool; bytes are per card."""
    s = b.settings
    return {
        "engine": s.engine.name,
        "read": s.engine.read,
        "budget": b.taken,
        "weights": sum(h.bytes for h in b.weights if h.group != TABLE),
        "activations": b.step.bytes,
        "cuda_graphs": b.graphs.usual,
        "pool": b.pool.bytes,
        "blocks": b.pool.blocks,
        "block_size": b.pool.block,
        "block_bytes": b.pool.block_bytes,
        "tokens": b.pool.tokens,
        "cache_dtype": s.cache_dtype,
        "context": s.context,
        "requests": int(b.pool.concurrency(s.context)),
        "concurrency": round(float(b.pool.concurrency(s.context)), 2),
        "max_model_len": s.longest,
        "longest_concurrency": round(float(b.pool.concurrency(s.longest)), 2),
        "max_num_seqs": s.serving.max_num_seqs,
        "max_num_batched_tokens": s.steps,
        "needed": b.pool.needs(s.context, s.batch),
        "sharing": s.ranks.sharing,
        "card": s.stage.number,
        "layers": s.stage.layers,
    }


def _notes(b: Budget, asked: RunSpec) -> Iterable[str]:
    """Yield the notes of the answer."""
    s = b.settings
    if asked.serving.gpu_layers is None and not s.serving.overrides and b.shows_needed_pool:
        experts = experts_on_host(s) if "E" in s.model.axes() else None
        layers = layers_that_fit(s) if experts is None else None
        if experts is not None:
            yield f"it fits with the experts of the first {experts:,} layers on the host: --n-cpu-moe {experts}"
        elif layers is not None:
            yield (
                f"llama.cpp itself would put {layers:,} of {s.model.num_hidden_layers + 1:,} layers on the GPUs and "
                f"leave the rest on the host (--fit); --gpu-layers {layers} does the same here"
            )
    if s.engine.kind == "tgi":
        yield "TGI: its warm-up follows its source; its kernels and tokens per step are assumed"
    if isinstance(s.quantization, str) and dynamic_range(s.quantization) is not None:
        yield (
            f"{printable(s.quantization, 20)} is counted as {file_type_of(s.quantization)}, and the range is wider: "
            "unsloth chooses a type for each tensor of each model; give the .gguf file for its own bytes"
        )
    if s.gpu is None:
        yield f"{s.engine.title} without a GPU: the pool only holds the run's requests, instead of filling the card"
    kernel = kernel_of(s)
    if kernel is not None:
        yield f"mxfp4 experts are padded for {kernel.name} kernels, so they take more than is stored"
    elif (s.quantization or s.model.config.get("quantization_config")) and s.engine.kind != "llama.cpp":
        yield "quantised weights are counted as stored: repacking by the engine's kernels is not counted"
    if s.gpu is not None and not b.starts and not b.fits:
        yield f"nor does it start: {why_not_started(b, b)}"
    if s.ranks.pp > 1 or s.ranks.cards > 1:
        name = "stage" if s.ranks.pp > 1 else "card"
        cards = max(s.ranks.pp, s.ranks.cards)
        yield f"the figures are for {name} {s.stage.number + 1} of {cards:,}, the fullest: {s.stage.text}"
    largest = profiled_items(s)
    if largest is not None and b.step.where.startswith("encoder"):
        yield (
            f"vLLM first runs its encoder on {largest.items:,} {largest.kind}{'s' if largest.items > 1 else ''} of "
            f"{largest.tokens:,} tokens, its largest step; serving.limit_{largest.kind}s 0 (--limit-{largest.kind}s) "
            "leaves that out"
        )
    elif s.engine.kind in ("llama.cpp", "tgi") and s.model.part("vision_config"):
        yield f"the vision tower is not counted with {s.engine.name}"
    if s.engine.waits:
        yield f"not counted: {'; '.join(s.engine.waits)}"


def why_not_started(b: Budget, fullest: Budget) -> str:
    """Return the error that vLLM stops with, and the longest request with which it starts on the `fullest` GPU.

    Source: vllm 0.33.0 v1/core/kv_cache_planning.py _check_enough_kv_cache_memory.
    """
    longest, needed = b.settings.longest, b.pool.needs(b.settings.longest, 1)
    line = (
        f"To serve at least one request with the model's max seq len ({longest}), ({needed / GIB:.2f} GiB KV cache is "
        f"needed, which is larger than the available KV cache memory ({max(0, b.available) / GIB:.2f} GiB)"
    )
    admitted = bisect_left(range(1, longest), True, key=lambda tokens: not fullest.pool.holds(tokens, 1))
    starts = f"; it starts with serving.max_model_len (--max-model-len) {admitted}" if admitted else ""
    return f'vLLM stops with "{line}"{starts}'


def _weights(b: Budget) -> Iterable[Line]:
    for h in b.weights:
        if h.bytes:
            kind = "buffer" if h.group in ("buffer", TABLE) else "parameter"
            why = "this GPU's shard of the model's weights" if _is_divided(b.settings) else "the model's weights"
            why = "the runner's buffers for every request or token of a step" if h.group == TABLE else why
            yield Line(h.what, kind, "", "", (), h.dtype, h.tensors, h.bytes, why, h.source, h.basis)


def _lines(b: Budget, step: EngineStep) -> Iterable[Line]:
    yield from _weights(b)
    pool, s = b.pool, b.settings
    if b.shown:
        why = f"{pool.tokens:,} tokens of a sequence, in {pool.blocks:,} blocks of {pool.block_bytes:,} bytes"
        if b.shows_needed_pool:
            why = f"{s.batch:,} requests of {s.context:,} tokens, which do not fit"
        yield Line("KV cache", "buffer", "", "", (), s.cache_dtype, 1, b.shown, why, s.engine.read)
    for t in step.alive:
        why = "alive in the largest step"
        yield Line(t.what, "activation", step.where, t.shape, t.dims, t.dtype, 1, t.bytes, why, step.source, step.basis)
    if b.graphs.usual:
        why = "captured steps and their buffers"
        yield Line(b.graphs.what, "other", "", "", (), "uint8", 1, b.graphs.usual, why, b.graphs.source, b.graphs.basis)


def _is_divided(s: Settings) -> bool:
    r = s.ranks
    return max(r.dense, r.ep * r.etp, r.pp, r.cards) > 1


class ServingUsage(Usage):
    """The bytes that a serving engine takes of a card, which is arithmetic and needs no replay."""

    def __init__(self, walk: ServingWalk) -> None:
        super().__init__(walk)
        self._verdict: Answer | None = walk.verdict
        self._budget = walk.budget
        self._fullest, self._emptiest = walk.at("high"), walk.at("low")

    @cached_property
    def _overhead(self) -> ProcessOverhead:
        return ProcessOverhead(0, 0, 0, 0, COVERAGE)

    @property
    def answer(self) -> Answer | None:
        return self._verdict

    @property
    def reason(self) -> str | None:
        return why_not_started(self._budget, self._fullest) if self._verdict == "does not start" else None

    @cached_property
    def fits(self) -> bool:
        return self.usable is not None and self._fullest.fits

    @property
    def may_fit(self) -> bool:
        return self.usable is not None and self._emptiest.fits

    def fits_card_of(self, usable: int, replayed: bool = False) -> bool | None:
        """Only known for the run's own card, because how an engine is started depends on the card."""
        return self.fits if usable == self.usable else None

    @cached_property
    def least(self) -> int:
        b, s = self._budget, self._budget.settings
        return b.parameters + b.step.bytes + b.pool.needs(s.context, s.batch)

    @property
    def overheads(self) -> tuple[Overhead, ...]:
        """Memory of the process outside torch's tensors and the CUDA graphs."""
        b = self._budget
        return (b.context, *b.nccl, b.driver_kernels)

    @cached_property
    def reserved(self) -> int:
        return self.allocated

    @cached_property
    def _roomy(self) -> int:
        return self.allocated

    def _shown_at(self, level: str, segments: int | None = None) -> int:
        b, segments = self._budget, self.reserved if segments is None else segments
        shown = segments - b.graphs.usual + sum(getattr(row, level) for row in (b.graphs, *self.overheads))
        # the engine would take its share of a large enough card
        return max(shown, card_for(b, level)) if b.shows_needed_pool else shown
