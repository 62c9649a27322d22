"""Formats of quantised weights, and quantisation settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast, get_args

from memplan.spec.base import Flag, Names, Part
from memplan.spec.checks import Before

# Formats that adapters can train on top of; inference-only formats; llama.cpp's GGUF file types.
TrainedOver = Literal["nf4", "fp4", "int8", "gptq-int4", "gptq-int8", "awq-int4", "fp8", "hqq-int4", "torchao-int8"]
_Compressed = Literal["fp8-tensor", "fp8-channel", "w8a8-int8", "w4a16", "w8a16", "mxfp4", "mxfp8", "nvfp4"]
OnlyRuns = Literal[_Compressed, "torchao-int4", "quanto-int8", "quanto-int4"]
_Legacy = Literal["F32", "F16", "BF16", "Q1_0", "Q2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
_K = Literal["Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K"]
_IQ = Literal["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"]
GgufType = Literal[_Legacy, _K, _IQ, "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE"]
Format = Literal[TrainedOver, OnlyRuns, GgufType]
# Kernels for GPTQ and AWQ weights; implementations of the inference-only formats.
Packed = Literal["", "exllama_v1", "exllama_v2", "cuda_old", "gemm"]
Runs = Literal["decompressed", "scaled_mm", "fbgemm", "torchao", "quanto", "triton", "dequantised"]
Backend = Literal[Packed, Runs]
_FORMATS: dict[str, str] = {name.lower(): name for name in get_args(Format)}
# Default number of weights that share a scale: what each format's own library writes.
# Source: transformers 5.24 utils/quantization_config.py GPTQConfig, AwqConfig; torchao 0.18; compressed-tensors 0.20.
_GROUP_SIZES = {
    "fp8": 128,
    "gptq-int4": 128,
    "gptq-int8": 128,
    "awq-int4": 128,
    "w4a16": 128,
    "w8a16": 128,
    "mxfp4": 32,
    "mxfp8": 32,
    "nvfp4": 16,
    "torchao-int4": 128,
    "torchao-int8": -1,
    "quanto-int4": 128,
}


def _canonical_format(value: Any) -> Any:
    """Return the format's canonical name, whatever its case: `Q4_K_M` for `gguf:q4_k_m`."""
    if not isinstance(value, str):
        return value
    lowered = value.strip().lower()
    known = _FORMATS.get(lowered.removeprefix("gguf:")) or _FORMATS.get(lowered.replace("_", "-"))
    alias = _FORMATS.get(f"{lowered.removeprefix('gguf:')}_m") if lowered.endswith("_k") else None
    return known or alias or value.strip().removeprefix("gguf:")


class Quantization(Part):
    """How the frozen base weights are stored: Hugging Face's `BitsAndBytesConfig` with shorter names.

    format            storage format of the weights
    double_quant      whether the scales of 4-bit weights are quantised too
    block_size        weights that share a scale; -1 for one scale per column (`group_size=-1` of GPTQ and AWQ). FP8
                      uses blocks of 128 x 128; GGUF file types fix their own
    storage           dtype of the tensors that hold 4-bit weights
    skip              modules that stay unquantised; None for the library's default
    kbit_preparation  whether peft's `prepare_model_for_kbit_training` casts to fp32; `trl` if TRL casts back to bf16,
                      `axolotl` or `axolotl-0.12` if that Axolotl does
    backend           kernel that runs the weights, for formats that have several
    experts           whether experts that are stacked in one parameter are quantised too, as Unsloth and Axolotl's
                      `quantize_moe_experts` do; bitsandbytes by itself leaves them as they are loaded
    """

    format: Annotated[Format, Before(_canonical_format)] = "nf4"
    double_quant: Flag = True
    block_size: Literal[-1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096] = 64
    storage: Literal["uint8", "bf16", "fp16", "fp32"] = "uint8"
    skip: Names | None = None
    kbit_preparation: Literal[True, False, "trl", "axolotl", "axolotl-0.12"] | None = None
    backend: Backend | None = None
    experts: Flag | None = None

    @classmethod
    def expanded(cls, value: Any) -> Any:
        """Fill in the format's own block size if none is given; a storage of null is the default."""
        if not isinstance(value, Mapping):
            return value
        values = {k: v for k, v in cast(Mapping[str, Any], value).items() if k != "storage" or v is not None}
        name = values.get("format", "")
        size = _GROUP_SIZES.get(_canonical_format(name)) if isinstance(name, str) else None
        return {"block_size": size, **values} if size is not None else values
