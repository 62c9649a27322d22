"""What a serving engine's kernels make of weights that are stored quantised, where that is larger: experts in mxfp4.

Stacks of experts are padded to the tiles of the kernel that the card's generation is given, and scales are laid out
anew. Other formats are counted as they are stored.
"""

from __future__ import annotations

from typing import NamedTuple


class Kernel(NamedTuple):
    """How a kernel has experts in mxfp4.

    since, before   compute capabilities of the cards that are given it
    width, hidden   what a rank's part of an expert's width, and the hidden width, are rounded up to
    rows, columns   what the rows of a scale's matrix are rounded up to, and its columns, of which each is 32 numbers
    bias            the dtype that biases are brought to
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

# By engine: the first kernel that takes a card. 0.11's wheel brings no triton_kernels, without which Hopper has Marlin.
MXFP4 = {
    "vllm-0.33": (
        Kernel("Marlin", (7, 5), (9, 0), 128, 256, 1, 1, "bf16", _ROUNDED),
        Kernel(
            *("triton_kernels", (9, 0), (10, 0), 64, 1, 256, 4, "fp32"),
            "vllm 0.33.0 model_executor/layers/quantization/utils/mxfp4_utils.py _swizzle_mxfp4, "
            "third_party/triton_kernels/tensor_details/layout_details/hopper_scale.py",
        ),
        Kernel("TensorRT-LLM's", (10, 0), (12, 0), 128, 256, 1, 1, "fp32", _ROUNDED),
        Kernel("Marlin", (12, 0), _ANY, 128, 256, 1, 1, "bf16", _ROUNDED),
    ),
    "vllm-0.11": (
        Kernel("Marlin", (7, 5), (10, 0), 128, 256, 1, 1, "bf16", _LOADED),
        Kernel("TensorRT-LLM's", (10, 0), (12, 0), 256, 256, 1, 1, "fp32", _LOADED),
        Kernel("Marlin", (12, 0), _ANY, 128, 256, 1, 1, "bf16", _LOADED),
    ),
}


def mxfp4_kernel(engine: str, capability: tuple[int, int] | None) -> Kernel | None:
    """The kernel that an engine gives experts in mxfp4 on a card; None where it is not known. Without a card, that of
    Hopper."""
    asked = capability or (9, 0)
    return next((k for k in MXFP4.get(engine, ()) if k.since <= asked < k.before), None)
