"""What CUDA kernels allocate inside themselves, which no ATen call shows: a row for each, with its source.

Everything else inside kernels (reductions, sorts, cub's scans) is small and not counted.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from memplan.probe.libraries import library

Scratch = Callable[[Any, Any], list[tuple[str, int]]]
_aten: Any = torch.ops.aten
_ATEN = "torch 2.13 aten/src/ATen/native"


class Row(NamedTuple):
    """A kernel: the operation that runs it, what it allocates from its arguments and the card, and where that is read.

    `bytes_of` takes the call's arguments, its keywords and the card, and gives names and bytes.
    """

    op: str
    bytes_of: Callable[[Any, Any, Card], Iterator[tuple[str, int]]]
    source: str


class Card(NamedTuple):
    """What kernels choose by: compute capability, and the number of multiprocessors."""

    capability: tuple[int, int]
    processors: int


# Multiprocessors of a common card of each compute capability: NVIDIA's architecture whitepapers (T4, A100, RTX 3090,
# RTX 4090, H100 SXM, B200, RTX 5090). Only bitsandbytes' choice of a 4-bit kernel depends on it.
_PROCESSORS = {(7, 5): 40, (8, 0): 108, (8, 6): 82, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


def card_of(capability: tuple[int, int] | None) -> Card:
    """The card kernels are chosen for; like an A100 where none is named."""
    capability = capability or (8, 0)
    nearest = max((known for known in _PROCESSORS if known <= capability), default=(7, 5))
    return Card(capability, _PROCESSORS[nearest])


def scratch_of(card: Card) -> dict[Any, Scratch]:
    """For every operation that has a row: from its arguments to names and bytes of what its kernel allocates."""
    found: dict[Any, Scratch] = {}
    for row in ROWS:
        op = _operation(row.op)
        if op is not None:
            found[op] = _bound(row, card)
    return found


def without_data() -> dict[Any, Callable[..., Any]]:
    """What runs in place of operations whose outputs depend on the data: LLM.int8 finds no outliers, and a mask
    marks as many places as there is to put there."""
    found = {
        "bitsandbytes::int8_vectorwise_quant": _quantise_rows,
        "bitsandbytes::int8_mixed_scaled_mm": _multiply_int8,
        "aten::masked_scatter_backward": _select_masked,
        "_c10d_functional::wait_tensor": _same,
        "_c10d_functional::_wrap_tensor_autograd": _alias,
    }
    operations = ((_operation(name), function) for name, function in found.items())
    return {op: function for op, function in operations if op is not None}


def _same(tensor: Any) -> Any:
    """Waiting for a collective makes no other tensor, as torch's own rule for tensors without data has it."""
    return tensor


def _alias(tensor: Any) -> Any:
    return torch.ops.aten.alias.default(tensor)


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
    taken_out = torch.empty(0, device=values.device, dtype=values.dtype)
    multiply = torch.ops.bitsandbytes.int8_scaled_mm.default
    return multiply(codes, weight, scales, weight_scales, bias=bias, dtype=values.dtype), taken_out


def _select_masked(gradient: Any, mask: Any, sizes: Any) -> Any:
    """What a mask marks, as many as there were: by an index of every place, found in the mask spread to all axes.

    Source: torch 2.13 aten/src/ATen/native/cuda/IndexKernel.cpp masked_select_out_cuda_impl, Nonzero.cu.
    """
    spread = mask.expand_as(gradient).contiguous()
    found = torch.empty(gradient.dim(), math.prod(sizes), dtype=torch.int64, device=gradient.device)
    selected = torch.empty(tuple(sizes), dtype=gradient.dtype, device=gradient.device)
    del spread, found
    return selected


def _bound(row: Row, card: Card) -> Scratch:
    def bytes_of(args: Any, kwargs: Any) -> list[tuple[str, int]]:
        return list(row.bytes_of(args, kwargs, card))

    return bytes_of


def _operation(name: str) -> Any:
    """The operation, or None where the installed libraries have none of that name."""
    space, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    if not hasattr(getattr(torch.ops, space), packet):
        return None
    return getattr(getattr(getattr(torch.ops, space), packet), overload or "default")


def _flash_backward(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """Row sums and the gradient of q in fp32, rows rounded up to 128, widths to 32 or 64; with fewer key heads than
    query heads, gradients of k and v for every query head."""
    q, k = args[1], args[2]
    batch, heads, rows, width = q.shape
    rounded = _up(rows, 128)
    yield "flash row sums", 4 * batch * heads * rounded
    yield "flash gradient of q in fp32", 4 * batch * heads * rounded * _up(width, 32 if width <= 128 else 64)
    if k.shape[1] != heads:
        expanded = batch * k.shape[2] * heads * width * q.element_size()
        yield "flash gradient of k for every head", expanded
        yield "flash gradient of v for every head", expanded


def _efficient_backward(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """Row sums in fp32 (of fp32 inputs through a product of their size), and a workspace that depends on the tile.

    The tile of heads over 64 wide depends on the shared memory, which 8.0, 9.0 and 10.0 have more of.
    """
    q, k, v = args[1], args[2], args[3]
    batch, heads, rows, width = q.shape
    keys, value_width = k.shape[2], v.shape[3]
    widest = max(width, value_width)
    half = q.element_size() == 2
    if widest <= 64:
        block_i, block_j, most = 64, 64, 64
    elif widest <= 96:
        block_i, block_j, most = 128, 64, 96
    elif widest <= 128 and card.capability in ((8, 0), (9, 0), (10, 0)):
        block_i, block_j, most = 128, 128, 128
    else:
        block_i, block_j, most = 64, 64, 128 if widest <= 128 else 65536
    yield "efficient row sums", 4 * batch * heads * rows
    if not half:
        yield "efficient product in fp32", 4 * batch * rows * heads * value_width
        yield "efficient sums of the product", 4 * batch * rows * heads
    workspace = -(-rows // block_i) * -(-width // block_j) * (block_i * block_j * 4 + 16)
    if half and most > block_i:
        splits = max(1, min(-(-keys // block_j), 200 // (batch * heads)))
        workspace += 4 * splits * _up(keys, block_j) * (_up(width, block_i) + _up(value_width, block_i))
    yield "efficient workspace", batch * heads * workspace


def _embedding_backward(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """Above 3,072 indices they are sorted, and their gradients summed in fp32, segment by segment."""
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


def _softmax_backward(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """The gradient times the output."""
    yield "softmax gradient times output", args[1].numel() * args[1].element_size()


def _masked_scatter(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """The mask as large as what it is of, and a running count of it."""
    yield "mask spread", args[0].numel()
    yield "mask's prefix sums", 8 * args[0].numel()


def _layer_norm(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """A copy of an input that does not lie row by row."""
    if not args[0].is_contiguous():
        yield "input of layer norm, contiguous", args[0].numel() * args[0].element_size()


def _layer_norm_backward(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """The same, and of the gradient."""
    for what, t in (("gradient", args[0]), ("input", args[1])):
        if not t.is_contiguous():
            yield f"{what} of layer norm, contiguous", t.numel() * t.element_size()


def _foreach_norm(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """A number for every 65,536 elements of the largest tensor, for every tensor."""
    tensors = args[0]
    if tensors:
        yield "norms of parts", 4 * len(tensors) * max(-(-t.numel() // 65536) for t in tensors)


def _multinomial(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """One draw divides the probabilities by numbers of an exponential distribution, which are as many."""
    yield "exponentials", args[0].numel() * args[0].element_size()


def _gemm_4bit(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """The matrix dequantised before it is multiplied, and its scales, unless bitsandbytes takes its fused kernel."""
    activations, shape, block = args[0], args[2], args[4]
    rows, columns = shape
    if _takes_fused_kernel(activations.numel() // columns, rows, columns, activations.dtype, card):
        return
    if kwargs.get("absmax_8bit") is not None or (len(args) > 7 and args[7] is not None):
        yield "4-bit scales in fp32", 4 * -(-rows * columns // block)
        yield "4-bit scales and offset", 4 * -(-rows * columns // block)
    yield "4-bit matrix dequantised", rows * columns * activations.element_size()


def _int8_product(args: Any, kwargs: Any, card: Card) -> Iterator[tuple[str, int]]:
    """The product in int32, and in fp16 where it is cast after it is scaled."""
    codes, weight = args[0], args[1]
    elements = codes.numel() // codes.shape[-1] * weight.shape[0]
    yield "int32 product", 4 * elements
    if kwargs.get("dtype", torch.float16) not in (None, torch.float16):
        yield "fp16 product", 2 * elements


@cache
def _takes_fused_kernel(m: int, n: int, k: int, dtype: torch.dtype, card: Card) -> bool:
    """bitsandbytes' own heuristic, read from the installed file, asked about another card than the one at hand."""
    choose = _heuristic(card)
    return choose is not None and bool(choose(0, dtype, m, n, k))


@cache
def _heuristic(card: Card) -> Callable[..., bool] | None:
    """The function and the tables beside it, by itself: its file imports a CUDA library. None in other versions."""
    file = Path(library("bitsandbytes").__file__).parent / "backends" / "cuda" / "ops.py"
    name = "_gemm_4bit_use_custom_cuda"
    kept: list[ast.stmt] = []
    for node in ast.parse(file.read_text("utf-8")).body if file.exists() else ():
        if isinstance(node, ast.FunctionDef) and node.name == name:
            node.decorator_list = []
            kept.append(node)
        elif isinstance(node, ast.Assign) and any(getattr(t, "id", "").startswith("_GEMM_4BIT") for t in node.targets):
            kept.append(node)
    space: dict[str, Any] = {
        "torch": torch,
        "_gpu_dispatch_props": lambda _: (card.processors, *card.capability),  # pyright: ignore[reportUnknownLambdaType]
    }
    exec(compile(ast.Module(kept, []), str(file), "exec"), space)
    return space.get(name)


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


ROWS = (
    Row(
        "aten::_scaled_dot_product_flash_attention_backward",
        _flash_backward,
        f"{_ATEN}/transformers/cuda/flash_attn/flash_api.cpp mha_bwd",
    ),
    Row(
        "aten::_scaled_dot_product_efficient_attention_backward",
        _efficient_backward,
        f"{_ATEN}/transformers/cuda/attention_backward.cu, mem_eff_attention/kernel_backward.h",
    ),
    Row(
        "aten::embedding_dense_backward",
        _embedding_backward,
        f"{_ATEN}/cuda/Embedding.cu, EmbeddingBackwardKernel.cu",
    ),
    Row("aten::_softmax_backward_data", _softmax_backward, f"{_ATEN}/cuda/SoftMax.cu softmax_backward_cuda_out"),
    Row("aten::masked_scatter", _masked_scatter, f"{_ATEN}/cuda/IndexKernel.cpp masked_scatter__cuda, IndexKernel.cu"),
    Row("aten::native_layer_norm", _layer_norm, f"{_ATEN}/cuda/layer_norm_kernel.cu layer_norm_cuda"),
    Row(
        "aten::native_layer_norm_backward",
        _layer_norm_backward,
        f"{_ATEN}/cuda/layer_norm_kernel.cu layer_norm_backward_cuda",
    ),
    Row("aten::multinomial", _multinomial, f"{_ATEN}/Distributions.cpp multinomial"),
    Row("aten::_foreach_norm.Scalar", _foreach_norm, f"{_ATEN}/cuda/ForeachReduceOp.cu"),
    Row(
        "bitsandbytes::int8_scaled_mm",
        _int8_product,
        "bitsandbytes 0.50 backends/default/ops.py int8_scaled_mm, backends/cuda/ops.py int8_mm_dequant",
    ),
    Row("bitsandbytes::gemm_4bit", _gemm_4bit, "bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit"),
)
