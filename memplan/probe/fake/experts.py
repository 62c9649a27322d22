"""Products of experts' matrices in fp32 and fp16, which a card runs and torch's fake tensors refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def grouped_mm(bf16: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.nn.functional.grouped_mm`: torch's own function, given as `bf16`, for the dtype its fake kernel takes."""

    def grouped(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        if mat_b.dtype == torch.bfloat16:
            return bf16(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
        return _GroupedProduct.apply(mat_a, mat_b, offs)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]

    return grouped


class _GroupedProduct(torch.autograd.Function):
    """Rows of `a` [rows, in] by the matrix of their expert in `b` [experts, in, out]: a loop of products into one.

    A gradient lies as what it is of: of matrices given transposed it is made transposed, so that autograd takes it as
    the parameter's without a copy.
    Source: torch 2.13 aten/src/ATen/native/cuda/GroupedBlas.cpp _grouped_mm_fallback; what is kept,
    tools/autograd/derivatives.yaml: _grouped_mm; torch/csrc/autograd/FunctionsManual.cpp _grouped_mm_mat2_backward.
    """

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, offsets: Any) -> Any:
        of_a, of_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if of_b else None, b if of_a else None, offsets)
        ctx.experts, ctx.transposed = b.shape[0], b.stride(-2) == 1
        return a.new_empty(a.shape[0], b.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, _ = ctx.saved_tensors
        of_a = gradient.new_empty(gradient.shape[0], b.shape[-2]) if b is not None else None
        if a is None:
            return of_a, None, None
        into, out = a.shape[-1], gradient.shape[-1]
        if ctx.transposed:
            return of_a, gradient.new_empty(ctx.experts, out, into).transpose(-2, -1), None
        return of_a, gradient.new_empty(ctx.experts, into, out), None
