"""Kernels of packed weights, GPTQ's and AWQ's: the buffers they are given when the model is loaded, and what their
products make beside their output.

    exllama_v1, exllama_v2  GPTQ's 4 bits: packed weights as they are for few rows, and a matrix in a buffer that all
                            layers share for more, so that a product makes nothing
    cuda_old                GPTQ's 8 bits: a kernel of its own for few rows, and torch's operations for more, which
                            shift every word of 32 bits as many times as it has weights
    gemm                    AWQ's 4 bits: a kernel of its own for some rows, and a matrix in half precision for more
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.core.ir import Op, Stack, Tensor, Weight

# By format, the kernels that may be asked for.
BACKENDS = {
    "gptq-int4": ("exllama_v1", "exllama_v2"),
    "gptq-int8": ("cuda_old",),
    "awq-int4": ("gemm",),
}
# Rows from which on a product makes a whole matrix.
# Source: auto-gptq 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py kernel_switch_threshold; autoawq 0.2.9
# modules/linear/gemm.py WQLinearMMFunction.forward, 0.1.8 the same.
MANY_ROWS = {"cuda_old": 128, "gemm": 1024}
_SOURCES = {
    "cuda_old": "auto-gptq 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py QuantLinear.forward",
    "gemm": "autoawq 0.2.9 modules/linear/gemm.py WQLinearMMFunction.forward",
}
_BUFFERS = "auto-gptq 0.7.1 modeling/_utils.py autogptq_post_init"
# How many rows version 2 of ExLlama's has room for, in 4 bytes a number.
# Source: auto-gptq 0.7.1 nn_modules/qlinear/qlinear_exllamav2.py QuantLinear.scratch_space_fixed
_ROWS_OF_2 = 2048 * 8
_SPARE_OF_2 = 128  # bytes that it adds to either part


def with_buffers(stack: Stack, backend: str, weights: Iterable[Weight], axes: Mapping[str, int]) -> Stack:
    """The stack with the buffers of ExLlama's kernels, for matrices of GPTQ's without an order of inputs (`desc_act`).

    Version 1 has the largest matrix in half precision and a row of the widest input or output; version 2 the largest
    sum of a matrix in half precision and fp32 outputs of 2,048 tokens of eight sequences.
    """
    shapes = [
        (_product(w.shape.split()[: w.rows], axes), _product(w.shape.split()[w.rows :], axes))
        for w in weights
        if any(t.name == "g_idx" for t in w.stored)
    ]
    if not shapes or not backend.startswith("exllama"):
        return stack
    if backend == "exllama_v1":
        sizes = {
            "temp_dq": max(out * into for out, into in shapes),
            "temp_state": max(max(shape) for shape in shapes),
        }
    else:
        parts = (2 * out * into + _SPARE_OF_2 + 4 * _ROWS_OF_2 * out + _SPARE_OF_2 for out, into in shapes)
        sizes = {"scratch": max(parts) // 2}
    made = (Weight(f"exllama.{name}", str(n), "buffer", "fp16", False) for name, n in sizes.items())
    return stack._replace(before=(*stack.before, Op("exllama", (), (), tuple(made), source=_BUFFERS)))


def _product(tokens: list[str], axes: Mapping[str, int]) -> int:
    return prod(int(token) if token.isdigit() else axes[token] for token in tokens)


def unpacked(stack: Stack, backend: str) -> Stack:
    """The stack where products of many rows make whole matrices.

    AWQ's are there in half precision beside the output. Of GPTQ's 8 bits a matrix is there in words of 32 bits and in
    16, at the most; then in half precision for the product.
    """

    def change(op: Op) -> Iterator[Op]:
        w = next((w for w in op.weights if w.stored and w.stored[0].name == "qweight" and not w.stacked), None)
        if w is None or not op.product:
            yield op
            return
        if backend == "gemm":
            whole = Tensor("dequantised", w.shape, "fp16")
            yield op._replace(scratch=(*op.scratch, whole), source=_SOURCES[backend])
            return
        name = f"{op.writes[0].name}.matrix"
        words = Tensor("words", w.shape, "int32")
        yield Op(f"{op.name}.unpack", (), (Tensor(name, w.shape, "fp16"),), scratch=(words,), source=_SOURCES[backend])
        yield op._replace(reads=(*op.reads, name))
        yield ops.leave(name)

    return rewrite(stack, change)
