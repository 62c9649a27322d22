"""Scratch memory that CUDA kernels allocate internally, invisible to ATen calls: one row per kernel, with its source.

Other scratch (reductions, sorts, cub's scans) is small and not counted.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from memplan.catalogue.quantization.fused_4bit import KernelCard
from memplan.core.records import NamedTuple
from memplan.probe.libraries import library

Scratch = Callable[[Any, Any], list[tuple[str, int]]]
_aten: Any = torch.ops.aten
_ATEN = "torch 2.13 aten/src/ATen/native"


class KernelScratch(NamedTuple):
    """The scratch memory of one kernel.

    op          the operation that runs the kernel
    bytes_of    yields names and bytes from the call's arguments, its keywords and the card
    source      where the kernel allocates it
    """

    op: str
    bytes_of: Callable[[Any, Any, KernelCard], Iterator[tuple[str, int]]]
    source: str


def scratch_of(card: KernelCard) -> dict[Any, Scratch]:
    """Return, for every operation with a row, a function from its arguments to the scratch's names and bytes."""
    scratch: dict[Any, Scratch] = {}
    for row in ROWS:
        op = _operation(row.op)
        if op is not None:
            scratch[op] = _bound(row, card)
    return scratch


# How many positions a mask of a shape selects, if not all.
selections: dict[tuple[int, ...], int] = {}


def _selected(mask: Any) -> int:
    count: int = mask.numel()
    return selections.get(tuple(mask.shape), count)


def data_free_kernels() -> dict[Any, Callable[..., Any]]:
    """Return replacements for operations whose outputs depend on the data.

    LLM.int8 finds no outliers. A mask selects exactly as many positions as there are values for them, or all of them.
    All values of a tensor are equal.
    A replacement returns NotImplemented for a call that does not depend on the data.
    """
    replacements = {
        "bitsandbytes::int8_vectorwise_quant": _quantise_rows,
        "bitsandbytes::int8_mixed_scaled_mm": _multiply_int8,
        "aten::masked_scatter_backward": _select_masked,
        "aten::_unique2": _one_value,
        "aten::index.Tensor": _rows_of_mask,
        "aten::index_put_": _put_rows_of_mask,
        "_c10d_functional::wait_tensor": _identity,
        "_c10d_functional::_wrap_tensor_autograd": _alias,
    }
    operations = ((_operation(name), function) for name, function in replacements.items())
    return {op: function for op, function in operations if op is not None}


def _identity(tensor: Any) -> Any:
    """Return the tensor itself: waiting for a collective creates none, as in torch's fake implementation."""
    return tensor


def _alias(tensor: Any) -> Any:
    return torch.ops.aten.alias.default(tensor)


def _one_value(values: Any, *_: Any, **__: Any) -> Any:
    """Return the only value, without where it is and how often."""
    none = torch.empty(0, device=values.device, dtype=torch.int64)
    return torch.empty(1, device=values.device, dtype=values.dtype), none, none.clone()


def _quantise_rows(values: Any, threshold: float = 0.0) -> Any:
    """Source: bitsandbytes 0.50 backends/cuda/ops.py int8_vectorwise_quant."""
    scales = torch.empty(values.numel() // values.shape[-1], device=values.device, dtype=torch.float32)
    codes = torch.empty(values.shape, device=values.device, dtype=torch.int8)
    if threshold == 0.0:
        return codes, scales, None
    outliers = values.abs() >= threshold
    outliers.any()
    return codes, scales, torch.empty(0, device=values.device, dtype=torch.int64)


def _multiply_int8(
    values: Any, codes: Any, weight: Any, scales: Any, weight_scales: Any, columns: Any = None, bias: Any = None
) -> Any:
    """Source: bitsandbytes 0.50 backends/default/ops.py int8_mixed_scaled_mm."""
    outlier_columns = torch.empty(0, device=values.device, dtype=values.dtype)
    multiply = torch.ops.bitsandbytes.int8_scaled_mm.default
    return multiply(codes, weight, scales, weight_scales, bias=bias, dtype=values.dtype), outlier_columns


def _select_masked(gradient: Any, mask: Any, sizes: Any) -> Any:
    """Return as many selected elements as `sizes` has, with the expanded mask and the int64 indices meanwhile.

    Source: torch 2.13 aten/src/ATen/native/cuda/IndexKernel.cpp masked_select_out_cuda_impl, Nonzero.cu.
    """
    expanded = mask.expand_as(gradient).contiguous()
    indices = torch.empty(gradient.dim(), math.prod(sizes), dtype=torch.int64, device=gradient.device)
    selected = torch.empty(tuple(sizes), dtype=gradient.dtype, device=gradient.device)
    del expanded, indices
    return selected


def _rows_of_mask(values: Any, indices: list[Any]) -> Any:
    """Return the rows of `values` that a mask selects, with the int64 indices of its positions meanwhile.

    Source: torch 2.13 aten/src/ATen/native/TensorAdvancedIndexing.cpp, IndexingUtils.h expandTensors.
    """
    *before, mask = indices
    if mask is None or mask.dtype != torch.bool or any(index is not None for index in before):
        return NotImplemented
    contiguous = mask.contiguous()
    positions = torch.empty(_selected(mask), mask.dim(), dtype=torch.int64, device=values.device)
    del contiguous
    rest = values.shape[len(before) + mask.dim() :]
    rows = torch.empty(*values.shape[: len(before)], _selected(mask), *rest, dtype=values.dtype, device=values.device)
    del positions
    return rows


def _put_rows_of_mask(into: Any, indices: list[Any], values: Any, *_: Any) -> Any:
    """Put values, of which there is one for each position, where a mask selects, with the positions meanwhile."""
    rows = _rows_of_mask(into, indices) if values.numel() > 1 else NotImplemented
    return rows if rows is NotImplemented else into


def _bound(row: KernelScratch, card: KernelCard) -> Scratch:
    def bytes_of(args: Any, kwargs: Any) -> list[tuple[str, int]]:
        return list(row.bytes_of(args, kwargs, card))

    return bytes_of


def _operation(name: str) -> Any:
    """Return the operation; None if the installed libraries do not have it."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if not hasattr(getattr(torch.ops, space), packet):
        return None
    return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")


def _flash_backward(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """Row sums and the gradient of q in fp32, with rows rounded up to 128 and widths to 32 or 64.

    With fewer key heads than query heads also gradients of k and v for every query head.
    """
    q, k = args[1], args[2]
    batch, heads, rows, width = q.shape
    rounded = _up(rows, 128)
    yield "flash row sums", 4 * batch * heads * rounded
    yield "flash gradient of q in fp32", 4 * batch * heads * rounded * _up(width, 32 if width <= 128 else 64)
    if k.shape[1] != heads:
        expanded = batch * k.shape[2] * heads * width * q.element_size()
        yield "flash gradient of k for every head", expanded
        yield "flash gradient of v for every head", expanded


def _efficient_backward(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """Row sums in fp32 (for fp32 inputs via a product of the input's size), and a workspace that depends on the tile.

    The tile for heads over 64 wide depends on shared memory, of which 8.0, 9.0 and 10.0 have more.
    """
    q, k, v = args[1], args[2], args[3]
    batch, heads, rows, width = q.shape
    keys, value_width = k.shape[2], v.shape[3]
    widest = max(width, value_width)
    half = q.element_size() == 2
    if widest <= 64:
        block_i, block_j, max_width = 64, 64, 64
    elif widest <= 96:
        block_i, block_j, max_width = 128, 64, 96
    elif widest <= 128 and card.capability in ((8, 0), (9, 0), (10, 0)):
        block_i, block_j, max_width = 128, 128, 128
    else:
        block_i, block_j, max_width = 64, 64, 128 if widest <= 128 else 65536
    yield "efficient row sums", 4 * batch * heads * rows
    if not half:
        yield "efficient product in fp32", 4 * batch * rows * heads * value_width
        yield "efficient sums of the product", 4 * batch * rows * heads
    workspace = -(-rows // block_i) * -(-width // block_j) * (block_i * block_j * 4 + 16)
    if half and max_width > block_i:
        splits = max(1, min(-(-keys // block_j), 200 // (batch * heads)))
        workspace += 4 * splits * _up(keys, block_j) * (_up(width, block_i) + _up(value_width, block_i))
    yield "efficient workspace", batch * heads * workspace


def _embedding_backward(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """Above 3,072 indices: the indices are sorted and their gradients summed in fp32, segment by segment."""
    gradient, indices, rows = args[0], args[1], args[2]
    n = indices.numel()
    if n <= 3072:
        return
    segments = n // 10 + min(n, rows)
    for what in ("sorted", "order", "original order", "counts", "segment starts"):
        yield f"embedding {what}", 8 * n
    yield "embedding segments", 8 * segments
    sums = 4 if gradient.element_size() == 2 else gradient.element_size()
    yield "embedding sums", segments * _up(gradient.shape[-1], 32) * sums


def _logsumexp(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """The exponents of what the input exceeds its maxima by, which are taken in place."""
    yield "exponents", args[0].numel() * args[0].element_size()


def _softmax_backward(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """The gradient times the output."""
    yield "softmax gradient times output", args[1].numel() * args[1].element_size()


def _masked_scatter(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """The expanded mask and its prefix sums."""
    yield "mask spread", args[0].numel()
    yield "mask's prefix sums", 8 * args[0].numel()


def _index_put(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """Positions of a mask. To accumulate also their row numbers, the same sorted, and the orders of both."""
    mask = args[1][0]
    if mask is None or mask.dtype != torch.bool:
        return
    yield "positions of a mask", 8 * _selected(mask) * mask.dim()
    if len(args) > 3 and args[3]:
        for what in ("rows", "sorted rows", "order", "original order"):
            yield f"index_put {what}", 8 * _selected(mask)


def _layer_norm(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """A contiguous copy of a non-contiguous input."""
    if not args[0].is_contiguous():
        yield "input of layer norm, contiguous", args[0].numel() * args[0].element_size()


def _layer_norm_backward(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """Contiguous copies of a non-contiguous input and gradient."""
    for what, t in (("gradient", args[0]), ("input", args[1])):
        if not t.is_contiguous():
            yield f"{what} of layer norm, contiguous", t.numel() * t.element_size()


def _foreach_norm(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """For every tensor, one number per 65,536 elements of the largest tensor."""
    tensors = args[0]
    if tensors:
        yield "norms of parts", 4 * len(tensors) * max(-(-t.numel() // 65536) for t in tensors)


def _multinomial(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """Exponentially distributed random numbers, as many as probabilities, by which one draw divides them."""
    yield "exponentials", args[0].numel() * args[0].element_size()


def _gemm_4bit(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """The dequantised matrix and its scales, unless bitsandbytes chooses its fused kernel."""
    activations, shape, block = args[0], args[2], args[4]
    rows, columns = shape
    many = activations.numel() // columns
    if columns % block == 0 and _takes_fused_kernel(many, rows, columns, activations.dtype, card):
        return
    if kwargs.get("absmax_8bit") is not None or (len(args) > 7 and args[7] is not None):
        yield "4-bit scales in fp32", 4 * -(-rows * columns // block)
        yield "4-bit scales and offset", 4 * -(-rows * columns // block)
    yield "4-bit matrix dequantised", rows * columns * activations.element_size()


def _int8_product(args: Any, kwargs: Any, card: KernelCard) -> Iterator[tuple[str, int]]:
    """The product in int32, and in fp16 if it is cast to another dtype after scaling."""
    codes, weight = args[0], args[1]
    elements = codes.numel() // codes.shape[-1] * weight.shape[0]
    yield "int32 product", 4 * elements
    dtype = kwargs.get("dtype", args[5] if len(args) > 5 else None)
    if dtype not in (None, torch.float16):
        yield "fp16 product", 2 * elements


@cache
def _takes_fused_kernel(m: int, n: int, k: int, dtype: torch.dtype, card: KernelCard) -> bool:
    """Return the choice of bitsandbytes' own heuristic, read from the installed file, for the traced card."""
    choose = heuristic(card)
    return choose is not None and bool(choose(0, dtype, m, n, k))


@cache
def heuristic(card: KernelCard) -> Callable[..., bool] | None:
    """Return bitsandbytes' heuristic, extracted with its tables because its file imports a CUDA library.

    None in versions without it.
    """
    file = Path(library("bitsandbytes").__file__).parent / "backends" / "cuda" / "ops.py"
    name = "_gemm_4bit_use_custom_cuda"
    nodes: list[ast.stmt] = []
    for node in ast.parse(file.read_text("utf-8")).body if file.exists() else ():
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list = []
            nodes.append(node)
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", "").startswith("_GEMM_4BIT") for t in node.targets):
            nodes.append(node)
    namespace: dict[str, Any] = {
        "torch": torch,
        "_gpu_dispatch_props": lambda _: (card.processors, *card.capability),  # pyright: ignore[reportUnknownLambdaType]
    }
    exec(compile(ast.Module(nodes, []), str(file), "exec"), namespace)
    return namespace.get(name)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


ROWS = (
    KernelScratch("aten::logsumexp", _logsumexp, f"{_ATEN}/ReduceOps.cpp logsumexp_out_impl"),
    KernelScratch(
        "aten::_scaled_dot_product_flash_attention_backward",
        _flash_backward,
        f"{_ATEN}/transformers/cuda/flash_attn/flash_api.cpp mha_bwd",
    ),
    KernelScratch(
        "aten::_scaled_dot_product_efficient_attention_backward",
        _efficient_backward,
        f"{_ATEN}/transformers/cuda/attention_backward.cu, mem_eff_attention/kernel_backward.h",
    ),
    KernelScratch(
        "aten::embedding_dense_backward",
        _embedding_backward,
        f"{_ATEN}/cuda/Embedding.cu, EmbeddingBackwardKernel.cu",
    ),
    KernelScratch(
        "aten::_softmax_backward_data", _softmax_backward, f"{_ATEN}/cuda/SoftMax.cu softmax_backward_cuda_out"
    ),
    KernelScratch(
        "aten::masked_scatter", _masked_scatter, f"{_ATEN}/cuda/IndexKernel.cpp masked_scatter__cuda, IndexKernel.cu"
    ),
    KernelScratch("aten::index_put_", _index_put, f"{_ATEN}/cuda/Indexing.cu index_put_with_sort_kernel"),
    KernelScratch("aten::native_layer_norm", _layer_norm, f"{_ATEN}/cuda/layer_norm_kernel.cu layer_norm_cuda"),
    KernelScratch(
        "aten::native_layer_norm_backward",
        _layer_norm_backward,
        f"{_ATEN}/cuda/layer_norm_kernel.cu layer_norm_backward_cuda",
    ),
    KernelScratch("aten::multinomial", _multinomial, f"{_ATEN}/Distributions.cpp multinomial"),
    KernelScratch("aten::_foreach_norm.Scalar", _foreach_norm, f"{_ATEN}/cuda/ForeachReduceOp.cu"),
    KernelScratch(
        "bitsandbytes::int8_scaled_mm",
        _int8_product,
        "bitsandbytes 0.50 backends/default/ops.py int8_scaled_mm, backends/cuda/ops.py int8_mm_dequant",
    ),
    KernelScratch("bitsandbytes::gemm_4bit", _gemm_4bit, "bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit"),
)
