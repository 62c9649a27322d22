"""ExLlama's kernels for GPTQ's 4 bits: the buffers they are given once, when the model is loaded.

They read packed weights as they are for few rows, and dequantise a matrix into a buffer of all layers for more, so that
a product makes nothing but its output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod

from memplan.ir import Op, Weight

_SOURCE = "auto-gptq 0.7.1 modeling/_utils.py autogptq_post_init"
# How many rows version 2 has room for, in 4 bytes each.
# Source: auto-gptq 0.7.1 nn_modules/qlinear/qlinear_exllamav2.py QuantLinear.scratch_space_fixed
_ROWS_OF_2 = 2048 * 8
_SPARE_OF_2 = 128  # bytes that it adds to either part


def buffers(backend: str, weights: Iterable[Weight], axes: Mapping[str, int]) -> Op:
    """The buffers for matrices of GPTQ's, without an order of inputs (`desc_act`).

    Version 1 has the largest matrix in half precision and a row of the widest input or output; version 2 the largest
    sum of a matrix in half precision and fp32 outputs of 2,048 tokens of eight sequences.
    """
    shapes = [
        (_product(w.shape.split()[: w.rows], axes), _product(w.shape.split()[w.rows :], axes))
        for w in weights
        if any(t.name == "g_idx" for t in w.stored)
    ]
    if not shapes:
        return Op("exllama")
    if backend == "exllama_v1":
        sizes = {
            "temp_dq": max(out * into for out, into in shapes),
            "temp_state": max(max(shape) for shape in shapes),
        }
    else:
        parts = (2 * out * into + _SPARE_OF_2 + 4 * _ROWS_OF_2 * out + _SPARE_OF_2 for out, into in shapes)
        sizes = {"scratch": max(parts) // 2}
    made = (Weight(f"exllama.{name}", str(n), "buffer", "fp16", False) for name, n in sizes.items())
    return Op("exllama", (), (), tuple(made), source=_SOURCE)


def _product(tokens: list[str], axes: Mapping[str, int]) -> int:
    return prod(int(token) if token.isdigit() else axes[token] for token in tokens)
