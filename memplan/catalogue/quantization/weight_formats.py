"""Formats of weights that those who run a model choose from, the mildest first, as each framework can read them.

What a format does to the result is what its source measured, on that source's model; other models, smaller ones above
all, lose more or less.
"""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """`format` as `method.quantization.format` has it, and what it does to the result, in words, by whom.

    capability  the least compute capability of an NVIDIA card whose kernels read it, in tenths
    kernels     who says so
    """

    format: str
    quality: str
    source: str
    capability: int = 0
    kernels: str = ""


_DEATH = "Kurtic et al. 2024, Give Me BF16 or Give Me Death?, arXiv:2411.02355, Llama 3.1 from 8B to 405B"
_EIGHT = "Dettmers et al. 2022, LLM.int8(), arXiv:2208.07339"
_QLORA = "Dettmers et al. 2023, QLoRA, arXiv:2305.14314, table 4"
_HELP = "llama.cpp tools/quantize/quantize.cpp QUANT_OPTIONS"
_SCHEMES = "layers/quantization/compressed_tensors/schemes get_min_capability"
_FP8 = "none that was seen; inputs in 8 bits too where the card has units for them"


def _compressed(fp8: int, int8: int, int4: int, read: str) -> tuple[Step, ...]:
    """What engines read in compressed-tensors."""
    return (
        Step("fp8-channel", _FP8, _DEATH, fp8, f"{read} {_SCHEMES}"),
        Step("w8a8-int8", "1 to 3 % in benchmarks, inputs in 8 bits too", _DEATH, int8, f"{read} {_SCHEMES}"),
        Step("w4a16", "as good as 8-bit integers", _DEATH, int4, f"{read} {_SCHEMES}"),
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

# By an engine's name; transformers' for all other profiles.
FORMATS: dict[str, tuple[Step, ...]] = {
    "transformers": (
        Step("int8", "none that was seen", _EIGHT, 75, "bitsandbytes' documentation, installation: LLM.int8()"),
        Step("nf4", "a point or less in MMLU", _QLORA),
    ),
    "vllm-0.33": _compressed(75, 75, 75, "vllm 0.33.0"),
    "vllm-0.11": _compressed(80, 75, 80, "vllm 0.11.0"),
    "sglang-0.5": _compressed(80, 80, 80, "sglang 0.5.23"),
    "tgi-3": (
        Step("fp8-channel", _FP8, _DEATH, 80, "assumed: Marlin's kernels"),
        Step("gptq-int4", "as good as 8-bit integers", _DEATH),
    ),
    "llama.cpp-2026": tuple(Step(name, f"perplexity +{more}", _HELP) for name, more in _PERPLEXITY),
}


def formats(profile: str, capability: tuple[int, int] | None) -> tuple[Step, ...]:
    """Those of a profile that a card of that compute capability reads; of a card that has none all."""
    found = FORMATS.get(profile, FORMATS["transformers"])
    if capability is None:
        return found
    return tuple(step for step in found if capability >= divmod(step.capability, 10))
