"""Formats of weights that those who run a model choose from, the mildest first, as each framework can read them.

What a format does to the result is what its source measured, on that source's model; other models, smaller ones above
all, lose more or less.
"""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """`format` as `method.quantization.format` has it, and what it does to the result, in words, by whom."""

    format: str
    quality: str
    source: str


_DEATH = "Kurtic et al. 2024, Give Me BF16 or Give Me Death?, arXiv:2411.02355, Llama 3.1 from 8B to 405B"
_EIGHT = "Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339"
_QLORA = "Dettmers et al. 2023, QLoRA, arXiv:2305.14314, table 4"
_HELP = "llama.cpp tools/quantize/quantize.cpp QUANT_OPTIONS"

_ENGINES = (
    Step("fp8-channel", "none that was seen, inputs in 8 bits too", _DEATH),
    Step("w8a8-int8", "1 to 3 % in benchmarks, inputs in 8 bits too", _DEATH),
    Step("w4a16", "as good as 8-bit integers", _DEATH),
)
# Perplexity of Llama 3 8B above that of its 16-bit weights, as llama-quantize's help prints it.
_PERPLEXITY = (
    ("Q8_0", "0.0026"),
    ("Q6_K", "0.0217"),
    ("Q5_K_M", "0.0569"),
    ("Q5_K_S", "0.1049"),
    ("Q4_K_M", "0.1754"),
    ("Q4_K_S", "0.2689"),
    ("Q3_K_L", "0.5562"),
    ("Q3_K_M", "0.6569"),
    ("Q3_K_S", "1.6321"),
    ("Q2_K", "3.5199"),
)

FORMATS: dict[str, tuple[Step, ...]] = {
    "transformers": (
        Step("int8", "none that was seen", _EIGHT),
        Step("nf4", "a point or less in MMLU", _QLORA),
    ),
    "vllm": _ENGINES,
    "sglang": _ENGINES,
    "tgi": (
        Step("fp8-channel", "none that was seen, inputs in 8 bits too", _DEATH),
        Step("gptq-int4", "as good as 8-bit integers", _DEATH),
    ),
    "llama.cpp": tuple(Step(name, f"perplexity +{more}", _HELP) for name, more in _PERPLEXITY),
}
