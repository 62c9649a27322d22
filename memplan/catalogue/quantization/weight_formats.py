"""Weight formats from which a user who runs a model can choose, mildest first, for each framework.

The effect on quality is what the source measured on its own model. Other models, especially smaller ones, may lose more
or less.
"""

from __future__ import annotations

from memplan.catalogue.inference.cache_formats import FIRST_VLLM
from memplan.core.records import NamedTuple


class FormatChoice(NamedTuple):
    """A format and its cost in quality.

    format      value of `method.quantization.format`
    quality     effect on quality, in words
    source      who measured it
    capability  minimum compute capability of an NVIDIA GPU whose kernels read it, times ten
    kernels     source of that minimum
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
_FP8 = "none measured; 8-bit inputs too if the GPU has units for them"


def _compressed(fp8: int, int8: int, int4: int, read: str) -> tuple[FormatChoice, ...]:
    """Return the compressed-tensors formats that an engine reads."""
    return (
        FormatChoice("fp8-channel", _FP8, _DEATH, fp8, f"{read} {_SCHEMES}"),
        FormatChoice("w8a8-int8", "1 to 3 % in benchmarks; 8-bit inputs too", _DEATH, int8, f"{read} {_SCHEMES}"),
        FormatChoice("w4a16", "as good as 8-bit integers", _DEATH, int4, f"{read} {_SCHEMES}"),
    )


# Increase of Llama 3 8B's perplexity over 16-bit weights, as printed by llama-quantize's help.
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

# By engine; all other profiles use transformers' formats.
FORMATS: dict[str, tuple[FormatChoice, ...]] = {
    "transformers": (
        FormatChoice("int8", "none measured", _EIGHT, 75, "bitsandbytes' documentation, installation: LLM.int8()"),
        FormatChoice("nf4", "at most one point in MMLU", _QLORA),
    ),
    "vllm-0.33": _compressed(75, 75, 75, "vllm 0.33.0"),
    "vllm-0.11": _compressed(80, 75, 80, "vllm 0.11.0"),
    **dict.fromkeys(FIRST_VLLM, _compressed(80, 75, 80, "vllm 0.6.4.post1")),
    "sglang-0.5": _compressed(80, 80, 80, "sglang 0.5.23"),
    "tgi-3": (
        FormatChoice("fp8-channel", _FP8, _DEATH, 80, "assumed: Marlin's kernels"),
        FormatChoice("gptq-int4", "as good as 8-bit integers", _DEATH),
    ),
    "llama.cpp-2026": tuple(FormatChoice(name, f"perplexity +{more}", _HELP) for name, more in _PERPLEXITY),
}


def formats(profile: str, capability: tuple[int, int] | None) -> tuple[FormatChoice, ...]:
    """Return a profile's formats that a GPU of that compute capability can read; all of them without a capability."""
    steps = FORMATS.get(profile, FORMATS["transformers"])
    if capability is None:
        return steps
    return tuple(step for step in steps if capability >= divmod(step.capability, 10))
