"""Sizes of quantised weights after a serving engine has repacked them for its kernels: experts in mxfp4.

Stacks of experts are padded to the tiles of the kernel for the GPU's generation, and scales are laid out again. Other
formats keep their stored size.
"""

from __future__ import annotations

from memplan.core.records import NamedTuple


class Mxfp4Kernel(NamedTuple):
    """How a kernel stores experts in mxfp4.

    since, before   range of compute capabilities of the GPUs it is used on
    width           multiple to which a rank's part of an expert's width is rounded up
    hidden          multiple to which the hidden width is rounded up
    rows, columns   multiples for a matrix of scales, in which a column covers 32 numbers
    bias            dtype to which biases are cast
    """

    name: str
    since: tuple[int, int]
    before: tuple[int, int]
    width: int
    hidden: int
    rows: int
    columns: int
    bias: str
    source: str


_LOADED = "vllm 0.11.0 model_executor/layers/quantization/mxfp4.py Mxfp4MoEMethod"
_ROUNDED = (
    "vllm 0.33.0 model_executor/layers/fused_moe/oracle/mxfp4.py mxfp4_round_up_hidden_size_and_intermediate_size"
)
_ANY = (99, 0)

# By engine; the first kernel that supports the GPU is used. 0.11's wheel has no triton_kernels, so Hopper uses Marlin.
MXFP4 = {
    "vllm-0.33": (
        Mxfp4Kernel("Marlin", (7, 5), (9, 0), 128, 256, 1, 1, "bf16", _ROUNDED),
        Mxfp4Kernel(
            *("triton_kernels", (9, 0), (10, 0), 64, 1, 256, 4, "fp32"),
            "vllm 0.33.0 model_executor/layers/quantization/utils/mxfp4_utils.py _swizzle_mxfp4, "
            "third_party/triton_kernels/tensor_details/layout_details/hopper_scale.py",
        ),
        Mxfp4Kernel("TensorRT-LLM's", (10, 0), (12, 0), 128, 256, 1, 1, "fp32", _ROUNDED),
        Mxfp4Kernel("Marlin", (12, 0), _ANY, 128, 256, 1, 1, "bf16", _ROUNDED),
    ),
    "vllm-0.11": (
        Mxfp4Kernel("Marlin", (7, 5), (10, 0), 128, 256, 1, 1, "bf16", _LOADED),
        Mxfp4Kernel("TensorRT-LLM's", (10, 0), (12, 0), 256, 256, 1, 1, "fp32", _LOADED),
        Mxfp4Kernel("Marlin", (12, 0), _ANY, 128, 256, 1, 1, "bf16", _LOADED),
    ),
}


def mxfp4_kernel(engine: str, capability: tuple[int, int] | None) -> Mxfp4Kernel | None:
    """Return the kernel that an engine uses for experts in mxfp4, or None if unknown. Without a GPU, assume Hopper."""
    target = capability or (9, 0)
    return next((k for k in MXFP4.get(engine, ()) if k.since <= target < k.before), None)
