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

    Source: torch 2.13 aten/src/ATen/native/cuda/GroupedBlas.cpp _grouped_mm_fallback.
    """

    @staticmethod
    def forward(ctx: Any, a: Any, b: Any, offsets: Any) -> Any:
        ctx.save_for_backward(a, b, offsets)
        return a.new_empty(a.shape[0], b.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, b, _ = ctx.saved_tensors
        of_a = a.new_empty(a.shape) if ctx.needs_input_grad[0] else None
        of_b = torch.empty_like(b) if ctx.needs_input_grad[1] else None
        return of_a, of_b, None
