"""The share of a card's peak rates that generation reaches: ranges, each with basis and source. None is derived.

No row has a usual value: how close a step comes to the memory bandwidth depends on the kernels in use.
"""

from __future__ import annotations

from memplan.core.records import NamedTuple


class Span(NamedTuple):
    """`low` to `high`, in the unit named in `what`; `basis` is `measured`, or `assumed` if either end is."""

    what: str
    low: float
    high: float
    basis: str
    source: str

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


_GPT_FAST = "pytorch-labs/gpt-fast README, batch 1 on A100 80GB"
_PHYSICAL = "arXiv:2605.30571, batch 1"
_LLAMA_CPP = "ggml-org/llama.cpp#4766 and #4812, tg 128"

_PLAIN = (
    f"69 % ({_GPT_FAST}, Llama 2 7B), 81 % ({_PHYSICAL}, Qwen2.5 7B on an L4), 82 % ({_LLAMA_CPP}, F16 on an RTX 4090);"
    " both ends are assumed around them"
)
PLAIN = Span("reading caches and 16- or 32-bit weights: % of the memory bandwidth", 50, 95, "assumed", _PLAIN)

_EIGHT = (
    f"52 % ({_GPT_FAST}, Llama 2 7B) and 37 % (Llama 2 70B on eight cards, communication included), 70 % with Q8_0 on "
    f"an RTX 4090 ({_LLAMA_CPP}); both ends are assumed around them"
)
EIGHT = Span("reading 8-bit weights: % of the memory bandwidth", 35, 92, "assumed", _EIGHT)

_FEWER = (
    f"42 % in groups of 32 ({_GPT_FAST}, Llama 2 7B), 48 % with Q4_0 on an RTX 3090 Ti and about 25 % with Q2_K on a "
    f"P40 ({_LLAMA_CPP}), on an L4 34 % with Marlin and about 90 % with ExLlamaV2 ({_PHYSICAL}); both ends are "
    "assumed around them"
)
FEWER = Span("reading packed weights, or weights of fewer bits: % of the memory bandwidth", 25, 92, "assumed", _FEWER)

_NF4 = f"about a third with NF4 on an L4 ({_PHYSICAL}); both ends are assumed around it"
BITSANDBYTES = Span("reading weights that bitsandbytes dequantises: % of the memory bandwidth", 10, 60, "assumed", _NF4)

_PROMPTS = (
    "90 % with F16 and 65 % with Q4_0 on an RTX 4090 (ggml-org/llama.cpp#4766, pp 512), 42 to 92 % in training "
    "(memplan.catalogue.hardware.rates); the low end, for short prompts and for weights that are dequantised first, is "
    "assumed"
)
PRODUCTS = Span("matrix products of a prompt: % of the card's dense peak", 25, 92, "assumed", _PROMPTS)

_FLASH = "25 to 73 % on an A100 (arXiv:2307.08691), up to 75 % on an H100 (arXiv:2407.08608); the low end is assumed"
ATTENTION = Span("attention of a prompt: % of the card's dense peak", 15, 75, "assumed", _FLASH)

_HOSTS = (
    f"about 17 ({_PHYSICAL}, transformers on an H100: 27 % of the bandwidth, a thousand kernels per token); hosts "
    "twice as fast and half as fast are assumed"
)
LAUNCH = Span("the host: microseconds per kernel, without CUDA graphs", 8, 40, "assumed", _HOSTS)

_VLLM = (
    "none if the next step is planned while one runs; 62 % of the time of Llama 3 8B on an H100 with vLLM 0.5.3, "
    "whose steps took about 5 ms on the card (blog.vllm.ai 2024-09-05 and 2025-01-27)"
)
SCHEDULING = Span("a serving engine between steps: microseconds", 0, 8000, "assumed", _VLLM)

_CPP = "one process, whose graph is recorded or launched in C++"
REPLAY = Span("the host of llama.cpp between steps: microseconds", 0, 1000, "assumed", _CPP)
