"""Kernels of packed GPTQ and AWQ weights: buffers allocated at load, and temporaries of their products.

exllama_v1, exllama_v2  GPTQ, 4 bits: few rows read the packed weights; for more, the matrix is dequantised into a
                        buffer that all layers share, so a product allocates nothing
cuda_old                GPTQ, 8 bits: a special kernel for few rows; for more, torch operations that shift every
                        32-bit word once per weight in it
gemm                    AWQ, 4 bits: a special kernel for few rows; for more, a matrix in half precision
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import prod

from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.core.ir import Op, Stack, Tensor, Weight

# The kernels a user can choose, by format.
BACKENDS = {
    "gptq-int4": ("exllama_v1", "exllama_v2"),
    "gptq-int8": ("cuda_old",),
    "awq-int4": ("gemm",),
}
# Number of rows from which a product dequantises the matrix.
# Source: auto-gptq 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py kernel_switch_threshold; autoawq 0.2.9
# modules/linear/gemm.py WQLinearMMFunction.forward, 0.1.8 the same.
MANY_ROWS = {"cuda_old": 128, "gemm": 1024}
_SOURCES = {
    "cuda_old": "auto-gptq 0.7.1 nn_modules/qlinear/qlinear_cuda_old.py QuantLinear.forward",
    "gemm": "autoawq 0.2.9 modules/linear/gemm.py WQLinearMMFunction.forward",
}
_BUFFERS = "auto-gptq 0.7.1 modeling/_utils.py autogptq_post_init"
# Rows for which ExLlama version 2 has room, at 4 bytes a number.
# Source: auto-gptq 0.7.1 nn_modules/qlinear/qlinear_exllamav2.py QuantLinear.scratch_space_fixed
_ROWS_OF_2 = 2048 * 8
_SPARE_OF_2 = 128  # padding of each part, in bytes


def with_buffers(stack: Stack, backend: str, weights: Iterable[Weight], axes: Mapping[str, int]) -> Stack:
    """Return the stack with ExLlama's buffers, for GPTQ matrices without `desc_act`.

    Version 1 has room for the largest matrix in half precision and for a row of the widest input or output. Version 2
    has room for the largest sum of a half-precision matrix and fp32 outputs of eight sequences of 2,048 tokens.
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
    buffers = (Weight(f"exllama.{name}", str(n), "buffer", "fp16", False) for name, n in sizes.items())
    return stack._replace(before=(*stack.before, Op("exllama", (), (), tuple(buffers), source=_BUFFERS)))


def _product(tokens: list[str], axes: Mapping[str, int]) -> int:
    return prod(int(token) if token.isdigit() else axes[token] for token in tokens)


def unpacked(stack: Stack, backend: str) -> Stack:
    """Return the stack with products of many rows dequantising their matrices.

    AWQ's half-precision matrix exists in addition to the output. GPTQ's 8-bit matrix peaks as 32-bit and 16-bit words,
    and then exists in half precision for the product.
    """

    def change(op: Op) -> Iterator[Op]:
        w = next((w for w in op.weights if w.stored and w.stored[0].name == "qweight" and not w.stacked), None)
        if w is None or not op.product:
            yield op
            return
        if backend == "gemm":
            dequantised = Tensor("dequantised", w.shape, "fp16")
            yield op._replace(scratch=(*op.scratch, dequantised), source=_SOURCES[backend])
            return
        name = f"{op.writes[0].name}.matrix"
        words = Tensor("words", w.shape, "int32")
        yield Op(f"{op.name}.unpack", (), (Tensor(name, w.shape, "fp16"),), scratch=(words,), source=_SOURCES[backend])
        yield op._replace(reads=(*op.reads, name))
        yield ops.release_names(name)

    return rewrite(stack, change)
