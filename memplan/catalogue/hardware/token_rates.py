"""How much of what a card can do generating gets: rows with two ends, each with its basis and source. None is derived.

No row has a usual figure: how close to a card's memory a step comes depends on the kernels of the day.
"""

from __future__ import annotations

from typing import NamedTuple


class Span(NamedTuple):
    """`low` to `high`, in the unit that `what` says; `basis` is measured, or assumed where one end is."""

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

PLAIN = Span(
    "reading caches and weights of 16 or 32 bits: hundredths of the memory's bandwidth",
    50,
    95,
    "assumed",
    f"69 % ({_GPT_FAST}, Llama 2 7B), 81 % ({_PHYSICAL}, Qwen2.5 7B on an L4), 82 % ({_LLAMA_CPP}, F16 on an RTX 4090);"
    " both ends are assumed around them",
)
EIGHT = Span(
    "reading weights of 8 bits: hundredths of the memory's bandwidth",
    35,
    92,
    "assumed",
    f"52 % ({_GPT_FAST}, Llama 2 7B) and, with what eight cards send each other, 37 % (Llama 2 70B), 70 % of Q8_0 on "
    f"an RTX 4090 ({_LLAMA_CPP}); both ends are assumed around them",
)
FEWER = Span(
    "reading weights of fewer bits, or packed: hundredths of the memory's bandwidth",
    25,
    92,
    "assumed",
    f"42 % in groups of 32 ({_GPT_FAST}, Llama 2 7B), 48 % of Q4_0 on an RTX 3090 Ti and about a quarter of Q2_K on a "
    f"P40 ({_LLAMA_CPP}), on an L4 34 % under Marlin and nine tenths under ExLlamaV2 ({_PHYSICAL}); both ends are "
    "assumed around them",
)
BITSANDBYTES = Span(
    "reading weights that bitsandbytes dequantises: hundredths of the memory's bandwidth",
    10,
    60,
    "assumed",
    f"about a third of NF4 on an L4 ({_PHYSICAL}); both ends are assumed around it",
)
PRODUCTS = Span(
    "products of a prompt's tokens: hundredths of the card's dense peak",
    25,
    92,
    "assumed",
    "90 % of F16 and 65 % of Q4_0 on an RTX 4090 (ggml-org/llama.cpp#4766, pp 512), 42 to 92 % in training "
    "(memplan.catalogue.hardware.rates); the low end, for short prompts and for weights that are made whole first, is "
    "assumed",
)
ATTENTION = Span(
    "attention of a prompt: hundredths of the card's dense peak",
    15,
    75,
    "assumed",
    "25 to 73 % on an A100 (arXiv:2307.08691), up to 75 % on an H100 (arXiv:2407.08608); the low end is assumed",
)
LAUNCH = Span(
    "the host: microseconds for every kernel, where steps are not recorded",
    8,
    40,
    "assumed",
    f"about 17 ({_PHYSICAL}, transformers on an H100: 27 % of the bandwidth, a thousand kernels a token); hosts twice "
    "as fast and half as fast are assumed",
)
SCHEDULING = Span(
    "a serving engine between steps: microseconds",
    0,
    8000,
    "assumed",
    "none where the next step is planned while one runs; 62 % of the time of Llama 3 8B on an H100 with vLLM 0.5.3, "
    "whose steps took about 5 ms on the card (blog.vllm.ai 2024-09-05 and 2025-01-27)",
)
REPLAY = Span(
    "the host of llama.cpp between steps: microseconds",
    0,
    1000,
    "assumed",
    "one process, whose graph is recorded or launched in C++",
)
