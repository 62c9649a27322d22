"""A run on a serving engine with nothing left open."""

from __future__ import annotations

from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.inference.cache_formats import cache_format
from memplan.catalogue.inference.caches import LayerCache, Part, caches
from memplan.catalogue.profiles.engines import Engine
from memplan.core.frozen import FrozenDict
from memplan.models.model import ModelSpec
from memplan.program.serving.layer_ranges import Stage
from memplan.spec.formats import Quantization
from memplan.spec.serving import Serving


class Settings(NamedTuple):
    """Everything that decides an answer.

    dtype          what the model computes in, and what of it is not quantised
    words          what the engine's rows say beside the fields (`memplan.catalogue.profiles.engines.WORDS`)
    context        tokens of one of the run's requests; `batch` of them are to fit at once
    ranks          how the cards divide the model; `stage` is what the one that this is about has of the layers
    """

    engine: Engine
    words: FrozenDict
    model: ModelSpec
    gpu: GPU | None
    dtype: str
    quantization: Quantization | str | None
    serving: Serving
    context: int
    prompt: int
    batch: int
    ranks: Ranks
    stage: Stage
    draft: Draft | None = None

    @property
    def tp(self) -> int:
        """Ranks that divide attention, and all that nothing else is said of."""
        return self.ranks.tp

    @property
    def caches(self) -> tuple[LayerCache, ...]:
        """What the stage's layers keep."""
        return caches(self.model)[self.stage.first : self.stage.last]

    @property
    def longest(self) -> int:
        """The most tokens of a request that the engine admits."""
        return self.serving.max_model_len or self.context

    @property
    def steps(self) -> int:
        """Tokens of one step."""
        return self.serving.max_num_batched_tokens or 1

    @property
    def requests(self) -> int:
        """Requests of one step."""
        return min(self.serving.max_num_seqs or 1, self.steps)

    @property
    def block(self) -> int:
        return self.serving.block_size or 1

    @property
    def cache_dtype(self) -> str:
        asked = self.serving.cache_dtype or "auto"
        return ("fp8" if self.model.model_type == COMPRESSED else self.dtype) if asked == "auto" else asked

    @property
    def packed(self) -> bool:
        """Whether keys and values are stored in eight bits, by one scale."""
        return self.cache_dtype in EIGHT_BITS

    def cache_bytes(self, p: Part) -> int:
        """Bytes of a token's part of a cache of keys and values on one rank."""
        kept = cache_format(self.cache_dtype)
        if not p.heads:
            return kept.head(p.elements)
        return -(-p.heads // self.tp) * kept.head(p.elements // p.heads)


EIGHT_BITS = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fn")
COMPRESSED, COMPRESSES, ENTRIES = "deepseek_v4", "vllm-0.33", 256


class Draft(NamedTuple):
    """What proposes tokens: by which method, so many in a step, and the engine's settings for its model, whose layers
    are those that have keys and values; None of n-grams."""

    method: str
    tokens: int
    settings: Settings | None

    @property
    def model(self) -> ModelSpec | None:
        return self.settings.model if self.settings else None


class Ranks(NamedTuple):
    """How many cards divide what.

    tp       attention, and all that nothing else is said of
    dense    MLPs and the head
    ep       experts, one by one; etp their width
    sharing  groups of ranks whose tokens meet at the experts
    pp       stages of layers
    cards    of llama.cpp
    """

    tp: int = 1
    dense: int = 1
    ep: int = 1
    etp: int = 1
    sharing: int = 1
    pp: int = 1
    cards: int = 1
