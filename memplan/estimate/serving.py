"""The answer for a serving engine: what it takes of a card, the pool, and whether the run's requests fit in that."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

from memplan.catalogue.hardware.overhead import Overhead
from memplan.core.cached_property import cached_property
from memplan.engine.allocator import OutOfMemoryError
from memplan.estimate.answer import Card, Estimate, Line, Parameters, Peak, Phase, Rank
from memplan.estimate.usage import Around, Band, Usage
from memplan.models.model import ModelSpec
from memplan.program.graph import active, elements
from memplan.program.serving.budget import Budget, budget, card_for, layers_that_fit
from memplan.program.serving.engine_step import Step
from memplan.program.serving.images import seen
from memplan.program.serving.model_weights import TABLE, host_of_adapters, kernel_of
from memplan.program.serving.settings import Settings
from memplan.resolve.serving import settled
from memplan.spec.run import RunSpec

COVERAGE = 0.94


def serve(run: RunSpec, model: ModelSpec | None = None) -> Estimate:
    """How a serving engine divides its card, and whether the run's requests fit at once.

    Raises SpecError, UnknownNameError, ConfigError or FactsMissingError.
    """
    s = settled(run, model)
    total = s.gpu.usable if s.gpu else None
    b = budget(s, total)
    usage = Served(s, b)
    b = usage.budget
    phases = _phases(b)
    peak = max(range(len(phases)), key=lambda i: (phases[i].peak, -i))
    return Estimate(
        run,
        {"serving": s.serving},
        parameters_of(s.model),
        usage,
        Card(s.gpu.name, s.gpu.usable, run.parallelism.world) if s.gpu else None,
        Peak(phases[peak].phase, phases[peak].where),
        phases,
        host_of_adapters(s),
        tuple(_notes(b, run)),
        Engine(b),
        None,
        serving=facts(b),
    )


@lru_cache(maxsize=512)
def parameters_of(model: ModelSpec) -> Parameters:
    """The model's parameters, of which none train."""
    from memplan.program.stored.checkpoint import parameters

    axes = model.axes()
    own = [p.weight for p in parameters(model) if p.weight.group != "buffer"]
    return Parameters(sum(elements(w, axes) for w in own), 0, sum(active(w, axes) for w in own))


def pool_tokens(run: RunSpec, model: ModelSpec | None = None) -> int:
    """Tokens that the engine's pool holds on the run's card; of a run without one, of a pool made for its requests."""
    s = settled(run, model)
    return budget(s, s.gpu.usable if s.gpu else None).pool.tokens


def requests(run: RunSpec, context: int, model: ModelSpec | None = None) -> int:
    """How many requests of `context` tokens the pool on the run's card holds at once."""
    s = settled(run, model)
    return int(budget(s, s.gpu.usable if s.gpu else None).pool.concurrency(context))


# What `facts` says, in order.
FACTS = (
    *("engine", "read", "budget", "weights", "activations", "cuda_graphs", "pool", "blocks", "block_size"),
    *("block_bytes", "tokens", "cache_dtype", "context", "requests", "concurrency", "max_model_len"),
    *("longest_concurrency", "max_num_seqs", "max_num_batched_tokens", "needed", "sharing", "card", "layers"),
)


def facts(b: Budget) -> dict[str, Any]:
    """What the answer says of the engine and its pool; bytes are per card."""
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
    s = b.settings
    if asked.serving.gpu_layers is None and b.wished:
        layers = layers_that_fit(s)
        if layers is not None:
            yield (
                f"llama.cpp itself would lay {layers:,} of {s.model.num_hidden_layers + 1:,} layers on the cards, and "
                "leave the others with the host (--fit); --gpu-layers says so too"
            )
    if s.engine.kind == "tgi":
        yield "TGI: its warm-up was read; its kernels and how many tokens it reads at once are assumed"
    if s.gpu is None:
        yield f"{s.engine.title} without a GPU: a pool for the run's requests alone, not one of all that is left"
    kernel = kernel_of(s)
    if kernel is not None:
        yield f"experts in mxfp4 as {kernel.name} kernels have them: padded, which is more than is stored"
    elif s.quantization is not None and s.engine.kind != "llama.cpp":
        yield "quantised weights as they are stored: what the engine's kernels repack is not counted"
    if s.gpu is not None and s.engine.kind == "vllm" and not b.pool.holds(s.longest, 1):
        yield (
            f"vLLM does not start with max_model_len {s.longest:,}, of which the pool holds not one request: say "
            "serving.max_model_len (--max-model-len)"
        )
    if s.ranks.pp > 1 or s.ranks.cards > 1:
        name = "stage" if s.ranks.pp > 1 else "card"
        cards = max(s.ranks.pp, s.ranks.cards)
        yield f"the figures are of {name} {s.stage.number + 1} of {cards:,}, the fullest: {s.stage.text}"
    found = seen(s)
    if found is not None and b.step.where.startswith("encoder"):
        yield (
            f"vLLM first runs its encoder on {found.items:,} {found.kind}{'s' if found.items > 1 else ''} of "
            f"{found.tokens:,} tokens, which is the largest step; serving.limit_{found.kind}s 0 "
            f"(--limit-{found.kind}s) leaves that out"
        )
    elif s.engine.kind in ("llama.cpp", "tgi") and s.model.part("vision_config"):
        yield f"what sees is not counted with {s.engine.name}"
    if s.engine.waits:
        yield f"not counted: {'; '.join(s.engine.waits)}"


def _phases(b: Budget) -> tuple[Phase, ...]:
    beside = b.graphs.usual
    there = b.parameters + beside + b.shown
    return (
        Phase("load", None, b.parameters, ""),
        Phase("prefill", None, there + b.step.bytes, b.step.where),
        Phase("decode", None, there + b.decoding.bytes, b.decoding.where),
    )


class Engine(NamedTuple):
    """Where an answer's ledger and timeline come from."""

    budget: Budget

    def lines(self) -> Iterable[Line]:
        return sorted(_lines(self.budget, self.budget.step), key=lambda line: (-line.bytes, line.where, line.what))

    def moments(self) -> Iterable[Phase]:
        return _phases(self.budget)

    def ranks(self) -> Iterable[Rank]:
        return ()


def _lines(b: Budget, step: Step) -> Iterable[Line]:
    for h in b.weights:
        if h.bytes:
            kind = "buffer" if h.group in ("buffer", TABLE) else "parameter"
            why = "the card's part of the model's weights" if _divided(b.settings) else "the model's weights"
            why = "the runner's, for every request or token that may be in a step" if h.group == TABLE else why
            yield Line(h.what, kind, "", "", (), h.dtype, h.tensors, h.bytes, why, h.source, h.basis)
    pool, s = b.pool, b.settings
    if b.shown:
        why = f"{pool.tokens:,} tokens of a sequence, in {pool.blocks:,} blocks of {pool.block_bytes:,} bytes"
        if b.wished:
            why = f"{s.batch:,} requests of {s.context:,} tokens, which do not fit"
        yield Line("KV cache", "buffer", "", "", (), s.cache_dtype, 1, b.shown, why, s.engine.read)
    for t in step.alive:
        why = "alive in the largest step"
        yield Line(t.what, "activation", step.where, t.shape, t.dims, t.dtype, 1, t.bytes, why, step.source, step.basis)
    if b.graphs.usual:
        why = "recorded steps and what they compute in"
        yield Line(b.graphs.what, "other", "", "", (), "uint8", 1, b.graphs.usual, why, b.graphs.source, b.graphs.basis)


def _divided(s: Settings) -> bool:
    r = s.ranks
    return max(r.dense, r.ep * r.etp, r.pp, r.cards) > 1


class _Nothing:
    """No allocations to replay: an engine's share of its card is arithmetic."""

    is_long = False

    def reserved(self, capacity: int | None = None) -> int | None:
        raise OutOfMemoryError

    def apart(self) -> int:
        return 0

    def beside(self) -> int:
        return 0


class Served(Usage):
    """What a serving engine takes of a card. It fits where the run's requests do, at every end of what was measured
    beside torch's tensors; and is tight where they fit at some."""

    def __init__(self, s: Settings, b: Budget) -> None:
        self._settings, self._gpu = s, s.gpu
        self._budget = b = b._replace(wished=self.answer == "does not fit")
        held = b.parameters + b.graphs.usual + b.shown + b.step.bytes
        super().__init__(_Nothing(), b.parameters, b.parameters, held, s.gpu, Around(0, 0, 0, 0, COVERAGE))

    @property
    def budget(self) -> Budget:
        """What the answer shows."""
        return self._budget

    def _fits_at(self, level: str) -> bool:
        return self._gpu is not None and budget(self._settings, self._gpu.usable, level).fits

    @property
    def answer(self) -> str | None:
        if self._gpu is None:
            return None
        if self.fits:
            return "fits"
        return "tight" if self._fits_at("low") else "does not fit"

    @cached_property
    def fits(self) -> bool:
        return self._fits_at("high")

    def told(self, usable: int, replayed: bool = False) -> bool | None:
        """Of its own card alone: how an engine is started depends on the card."""
        return self.fits if self._gpu is not None and usable == self._gpu.usable else None

    @property
    def least(self) -> int:
        return (
            self._budget.parameters
            + self._budget.step.bytes
            + self._budget.pool.needs(self._settings.context, self._settings.batch)
        )

    @property
    def beside(self) -> tuple[Overhead, ...]:
        """What the process has beside torch's tensors and the graphs."""
        b = self._budget
        return (b.context, *b.nccl, b.beside)

    def _beside_torch(self, level: str) -> int:
        return sum(getattr(row, level) for row in self.beside)

    @cached_property
    def used(self) -> int:
        used = self.reserved + self._beside_torch("usual")
        if self._gpu is None:
            return used
        if self._budget.wished:  # at the engine's share of a card
            return max(used, card_for(self._budget))
        return max(min(used, self._gpu.usable), self.reserved)

    @cached_property
    def reserved(self) -> int:
        return self.allocated

    @property
    def band(self) -> Band:
        b = self._budget
        low = self.reserved - b.graphs.usual + b.graphs.low + self._beside_torch("low")
        high = self.reserved - b.graphs.usual + b.graphs.high + self._beside_torch("high")
        low, high = min(low, self.used), max(high, self.used)
        if self._gpu is not None:
            usable = self._gpu.usable
            match self.answer:
                case "fits":
                    high = min(high, usable)
                case "tight":
                    low, high = min(low, usable), max(high, usable + 1)
                case _:
                    low = max(low, card_for(b, "low"), usable + 1)
                    high = max(high, card_for(b, "high"), usable + 1)
        return Band(min(low, high), high, COVERAGE)
