"""Grouped products of experts' matrices in fp32 and fp16, which torch's fake kernel does not support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def grouped_mm(bf16: Callable[..., Any]) -> Callable[..., Any]:
    """Return `torch.nn.functional.grouped_mm`, using torch's own function, `bf16`, for the dtype it supports."""

    def grouped(mat_a: Any, mat_b: Any, *, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
        if mat_b.dtype == torch.bfloat16:
            return bf16(mat_a, mat_b, offs=offs, bias=bias, out_dtype=out_dtype)
        return _GroupedProduct.apply(mat_a, mat_b, offs)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]

    return grouped


class _GroupedProduct(torch.autograd.Function):
    """Multiply the rows of `a` [rows, in] by their expert's matrix in `b` [experts, in, out], into one output.

    The gradient of `b` has the strides of `b`: if the matrices are transposed so is the gradient, so that autograd
    accumulates it into the parameter without a copy.
    Source: torch 2.13 aten/src/ATen/native/cuda/GroupedBlas.cpp _grouped_mm_fallback; saved tensors:
    tools/autograd/derivatives.yaml _grouped_mm; torch/csrc/autograd/FunctionsManual.cpp _grouped_mm_mat2_backward.
    """

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, offsets: Any) -> Any:
        needs_a, needs_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if needs_b else None, b if needs_a else None, offsets)
        ctx.experts, ctx.transposed = b.shape[0], b.stride(-2) == 1
        return a.new_empty(a.shape[0], b.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, _ = ctx.saved_tensors
        gradient_a = gradient.new_empty(gradient.shape[0], b.shape[-2]) if b is not None else None
        if a is None:
            return gradient_a, None, None
        into, out = a.shape[-1], gradient.shape[-1]
        if ctx.transposed:
            return gradient_a, gradient.new_empty(ctx.experts, out, into).transpose(-2, -1), None
        return gradient_a, gradient.new_empty(ctx.experts, into, out), None
