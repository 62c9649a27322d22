"""The fully resolved settings of a run on a serving engine."""

from __future__ import annotations

from memplan.catalogue.hardware.gpu import GPU
from memplan.catalogue.inference.cache_formats import cache_format
from memplan.catalogue.inference.caches import CONVOLUTION, CachePart, LayerCache, caches
from memplan.catalogue.profiles.engines import EngineBehaviour, ServingEngine
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.models.model import ModelSpec
from memplan.program.serving.layer_ranges import Stage
from memplan.spec.formats import Quantization
from memplan.spec.serving import Serving


class Settings(NamedTuple):
    """Everything that decides the memory of a serving run on one GPU.

    engine        engine and version
    behaviour     what the engine's code does
    model         the model
    gpu           the GPU, if one was given
    dtype         dtype the model computes in, and of unquantised weights
    quantization  format of quantised weights
    serving       the run's serving options, with every null filled in
    context       tokens of one request
    prompt        tokens of one request's prompt
    batch         requests that must fit at once
    ranks         how GPUs divide the model
    stage         layers on this GPU
    draft         what proposes tokens in speculative decoding
    """

    engine: ServingEngine
    behaviour: EngineBehaviour
    model: ModelSpec
    gpu: GPU | None
    dtype: str
    quantization: Quantization | str | None
    serving: Serving
    context: int
    prompt: int
    batch: int
    ranks: ServingRanks
    stage: Stage
    draft: Draft | None = None

    @property
    def tp(self) -> int:
        """Tensor-parallel degree of attention, and of everything without a degree of its own."""
        return self.ranks.tp

    @property
    def caches(self) -> tuple[LayerCache, ...]:
        """Caches of the stage's layers."""
        return caches(self.model)[self.stage.first : self.stage.last]

    @property
    def longest(self) -> int:
        """Tokens of the longest request that the engine accepts."""
        return self.serving.max_model_len or self.context

    @property
    def steps(self) -> int:
        """Most tokens of one step."""
        return self.serving.max_num_batched_tokens or 1

    @property
    def requests(self) -> int:
        """Most requests of one step."""
        return min(self.serving.max_num_seqs or 1, self.steps)

    @property
    def block(self) -> int:
        return self.serving.block_size or 1

    @property
    def cache_dtype(self) -> str:
        asked = self.serving.cache_dtype or "auto"
        return ("fp8" if self.model.has_compressed_cache else self.dtype) if asked == "auto" else asked

    @property
    def packed(self) -> bool:
        """Whether keys and values are stored in eight bits, with one scale for all."""
        return self.cache_dtype in EIGHT_BITS

    def cache_bytes(self, p: CachePart) -> int:
        """Return the bytes of one token's cache entry on one rank."""
        stored = cache_format(self.cache_dtype)
        if not p.heads:
            return stored.head(p.elements)
        return -(-p.heads // self.tp) * stored.head(p.elements // p.heads)

    def token_bytes(self, c: LayerCache, packed: bool) -> int:
        """Return the bytes of one token in one layer on one rank; a sparse latent may be `packed` in fp8."""
        index = sum(p.elements + _FP8_INDEX for p in c.parts if p.name == "index keys")
        if index and c.kind == "latent" and packed:
            return _FP8_LATENT + index
        return sum(self.cache_bytes(p) for p in c.parts if p.name != "index keys") + index

    def state_bytes(self, c: LayerCache, dtype: str) -> int:
        """Return the bytes of one layer's states of a request on one rank, in `dtype`.

        Convolutions keep one column less than their kernel is wide, in the model's dtype.
        """
        kernel, total = self.model.axes()["kernel"], 0
        for p in c.parts:
            if p.name.startswith(CONVOLUTION):
                total += p.on(self.tp) // kernel * (kernel - 1) * ITEMSIZE[self.dtype]
            else:
                total += p.on(self.tp) * ITEMSIZE[dtype]
        return total


_FP8_LATENT = 656  # bytes of a sparse latent: 512 numbers in fp8, 4 scales in fp32, 64 rotated numbers in bf16
_FP8_INDEX = 4  # bytes of the scale of an index key in fp8
EIGHT_BITS = ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_e4m3fn")
COMPRESSES, ENTRIES = "vllm-0.33", 256  # the engine with compressed caches, and the tokens of its blocks


class Draft(NamedTuple):
    """The draft that proposes tokens in speculative decoding.

    method    draft_model, eagle, eagle3, mtp or ngram
    tokens    tokens proposed in a step
    settings  settings of the draft's model, with only the layers that have keys and values; None for n-grams
    """

    method: str
    tokens: int
    settings: Settings | None

    @property
    def model(self) -> ModelSpec | None:
        return self.settings.model if self.settings else None


class ServingRanks(NamedTuple):
    """How many GPUs divide each part of a model.

    tp       tensor-parallel degree of attention, and of everything without a degree of its own
    dense    tensor-parallel degree of MLPs and the head
    ep       ranks that divide the experts, each with whole ones
    etp      ranks that divide the width of each expert
    sharing  data-parallel groups whose tokens share the experts
    pp       pipeline stages
    cards    GPUs of llama.cpp
    """

    tp: int = 1
    dense: int = 1
    ep: int = 1
    etp: int = 1
    sharing: int = 1
    pp: int = 1
    cards: int = 1
