"""Attention as CUDA runs it: the kernel that `scaled_dot_product_attention` chooses, and the flash-attn functions.

A build of torch without CUDA would always choose the math kernel. Here torch's rules for CUDA choose among the kernels
that the script has enabled, and the chosen kernel's operation is called, for which torch has a fake implementation.

Source: torch 2.13 aten/src/ATen/native/transformers/attention.cpp, cuda/sdp_utils.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812

from memplan.probe.libraries import library

_aten: Any = torch.ops.aten
_cuda: Any = library("torch.backends.cuda")
_HALF = (torch.bfloat16, torch.float16)


def choose(query: Any, key: Any, value: Any, mask: Any, grouped: bool, capability: tuple[int, int]) -> str:
    """Return flash, cudnn, efficient or math.

    cuDNN's is chosen only where it and math alone are enabled, as a card's own preference is not read.

    Flash needs a 16-bit dtype, no mask, heads up to 256 wide and compute capability 8; the memory-efficient kernel
    needs head widths that are a multiple of 16 bytes. Neither broadcasts one key head to many query heads
    (check_batch_size_and_num_heads_dense).
    """
    if not grouped and not query.shape[:2] == key.shape[:2] == value.shape[:2]:
        return "math"
    half = query.dtype in _HALF
    if not _cuda.flash_sdp_enabled() and _cuda.cudnn_sdp_enabled() and half and mask is None:
        return "cudnn"
    same = query.shape[-1] == value.shape[-1] <= 256
    if _cuda.flash_sdp_enabled() and half and mask is None and same and capability >= (8, 0):
        return "flash"
    aligned = not any(t.shape[-1] % (8 if half else 4) for t in (query, value))
    return "efficient" if _cuda.mem_efficient_sdp_enabled() and aligned else "math"


def sdpa(capability: tuple[int, int]) -> Callable[..., torch.Tensor]:
    """Return `torch.nn.functional.scaled_dot_product_attention` as a card of this compute capability runs it."""

    def scaled_dot_product_attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        query, key, value, mask = (_autocast(t) for t in (query, key, value, attn_mask))
        with torch.autocast("cuda", enabled=False):  # inside the operation nothing is cast again
            if mask is not None and mask.dtype == torch.bool:
                mask = _additive(mask, query)
            kernel = choose(query, key, value, mask, enable_gqa, capability)
            if kernel == "flash":
                return _flash(query, key, value, dropout_p, is_causal, scale)
            if kernel == "cudnn":
                needs = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
                arguments = (None, needs, dropout_p, is_causal, False)
                return _aten._scaled_dot_product_cudnn_attention(query, key, value, *arguments, scale=scale)[0]
            if kernel == "efficient":
                return _efficient(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)
            return _math(query, key, value, mask, dropout_p, is_causal, scale, enable_gqa)

    return scaled_dot_product_attention


def _autocast(t: Any) -> Any:
    """Return an argument as autocast casts it."""
    if t is None or not torch.is_autocast_enabled("cuda") or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(torch.get_autocast_dtype("cuda"))


def _additive(mask: Any, query: Any) -> Any:
    """Return the additive mask of a boolean one (convert_boolean_attn_mask): 0 or minus infinity."""
    zero = torch.scalar_tensor(0.0, dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.scalar_tensor(-math.inf, dtype=query.dtype, device=query.device))


def _flash(query: Any, key: Any, value: Any, dropout: float, causal: bool, scale: float | None) -> Any:
    width = query.shape[-1]
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    q, k, v = (_padded(t) for t in (query, key, value))
    out = _aten._scaled_dot_product_flash_attention(q, k, v, dropout, causal, False, scale=scale)[0]
    return out[..., :width] if out.shape[-1] != width else out


def _padded(t: Any) -> Any:
    """Pad the head width to the next multiple of 8 (pad_last_dim<8>)."""
    missing = -t.shape[-1] % 8
    return F.pad(t, (0, missing)) if missing else t


def _efficient(
    query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, scale: float | None, grouped: bool
) -> Any:
    key, value = _repeated(query, key, value, grouped)
    needs_sums = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if mask is not None:
        last = mask.shape[-1]
        if last % 8:  # pad_bias<8>: rows of the mask start at multiples of 16 bytes
            mask = F.pad(mask, (0, -last % 8))[..., :last]
        mask = mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return _aten._scaled_dot_product_efficient_attention(
        query, key, value, mask, needs_sums, dropout, causal, scale=scale
    )[0]


def _math(
    query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, scale: float | None, grouped: bool
) -> Any:
    """_scaled_dot_product_attention_math: in fp32, with the mask added in place and an unused second result."""
    dtype = query.dtype
    if dtype in _HALF:
        query, key, value = query.float(), key.float(), value.float()
        mask = None if mask is None else mask.float()
    if causal:
        causal_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        mask = _additive(causal_mask, query)
        del causal_mask
    root = math.sqrt(1.0 / math.sqrt(query.shape[-1]) if scale is None else scale)
    query = query * root
    key, value = _repeated(query, key, value, grouped)
    scores = torch.matmul(query, key.transpose(-2, -1) * root)
    if mask is None:
        scores = torch.softmax(scores, -1)
    else:
        scores.add_(mask)
        scores = _aten._safe_softmax(scores, -1)
    if dropout > 0:
        scores = F.dropout(scores, dropout)
    second = scores.to(dtype)
    out = torch.matmul(scores, value).to(dtype)
    del second
    return out


def _repeated(query: Any, key: Any, value: Any, grouped: bool) -> tuple[Any, Any]:
    """Return keys and values repeated for every query head, if `enable_gqa` is set."""
    if not grouped or key.shape[1] == query.shape[1]:
        return key, value
    times = query.shape[1] // key.shape[1]
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


# Flex attention


def flex_attention(query: Any, key: Any, value: Any, training: bool = False, **options: Any) -> tuple[Any, Any]:
    """transformers' compile_friendly_flex_attention: the output, and row sums as `aux.lse`."""
    mask = options["block_mask"]
    tensors = [part for part in mask.as_tuple() if isinstance(part, torch.Tensor)] + [*_captured(mask.mask_mod)]
    apply: Any = _FlexAttention.apply  # pyright: ignore
    out, sums = apply(*(_autocast(t) for t in (query, key, value)), *tensors)
    return out, library("torch.nn.attention.flex_attention").AuxOutput(lse=sums)


def _captured(read: Any) -> Iterator[Any]:
    """Yield the tensors that a function, or functions that it calls, have captured, which autograd saves, too."""
    for cell in getattr(read, "__closure__", None) or ():
        value: Any = cell.cell_contents
        for inner in cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,):
            if isinstance(inner, torch.Tensor):
                yield inner
            else:
                yield from _captured(inner)


def create_block_mask(**options: Any) -> Any:
    """torch's create_block_mask, compiled: without a mask of single tokens."""
    batch, (queries, keys) = options["B"], (options["Q_LEN"], options["KV_LEN"])
    rows, columns = -(-queries // 128), -(-keys // 128)
    shapes = [(batch, 1, rows), (batch, 1, rows, columns)] * 2 + [(batch, 1, columns), (batch, 1, columns, rows)] * 2
    tensors = (torch.empty(shape, dtype=torch.int32, device=options["device"]) for shape in shapes)
    mask: Any = library("torch.nn.attention.flex_attention").BlockMask
    return mask((queries, keys), *tensors, (128, 128), options["mask_mod"])


class _FlexAttention(torch.autograd.Function):
    """Allocates and saves what torch's compiled flex attention does.

    Source: torch 2.13 _higher_order_ops/flex_attention.py FlexAttentionAutogradOp, nn/attention/flex_attention.py
    _finalize_outputs, _inductor/kernel/flex/flex_attention.py.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, *mask: Any) -> Any:
        sums, scores = (torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) for _ in range(2))
        out = torch.empty_like(q) if q.shape[-1] == v.shape[-1] else torch.empty_like(q[..., : v.shape[-1]])
        del scores
        scaled = torch.empty_like(sums)
        ctx.save_for_backward(q, k, v, out, sums, *mask)
        return out, scaled

    @staticmethod
    def backward(ctx: Any, gradient: Any, of_sums: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, _out, sums, *mask = ctx.saved_tensors  # to the end: see _FlashAttention3
        delta = torch.empty_like(sums)
        gradients = tuple(torch.empty_like(t) for t in (q, k, v))
        del delta
        return *gradients, *(None for _ in mask)


# The flash-attn package


def flash_attn_func(  # noqa: PLR0913, PLR0917 (torch's own signature)
    q: Any,
    k: Any,
    v: Any,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash-attn's function: q [batch, rows, heads, width]; k and v may have fewer heads."""
    width = q.shape[-1]
    out = _FlashAttention.apply(*(_padded(t) for t in (q, k, v)))  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    return out[..., :width]  # pyright: ignore[reportIndexIssue, reportUnknownVariableType, reportOptionalSubscript]


def flash_attn_varlen_func(  # noqa: PLR0913, PLR0917 (torch's own signature)
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Any:
    """flash-attn's function for packed sequences: q, k, v [tokens, heads, width]."""
    width = q.shape[-1]
    heads = (_padded(t).unsqueeze(0) for t in (q, k, v))
    out: Any = _FlashAttention.apply(*heads, cu_seqlens_q.shape[0] - 1)  # pyright: ignore
    return out.squeeze(0)[..., :width]  # pyright: ignore


def flash_attn_3_func(
    q: Any,
    k: Any,
    v: Any,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Any = None,
) -> Any:
    """FlashAttention 3's function, on heads whose width is a multiple of 8; with sinks, the Hub's."""
    return _FlashAttention3.apply(q, k, v)  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]


def flash_attn_3_varlen_func(  # noqa: PLR0913, PLR0917 (the package's own signature)
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Any = None,
) -> Any:
    """FlashAttention 3's function for packed sequences."""
    out: Any = _FlashAttention3.apply(*(t.unsqueeze(0) for t in (q, k, v)), cu_seqlens_q.shape[0] - 1)  # pyright: ignore
    return out.squeeze(0)  # pyright: ignore


class _FlashAttention3(torch.autograd.Function):
    """Allocates and saves what FlashAttention 3 does on a GPU of compute capability 9, with a causal mask.

    Source: flash-attention 0e79d71 hopper/flash_attn_interface.py setup_context, flash_api.cpp mha_bwd.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sequences: int = 0) -> Any:
        ctx.sequences = sequences
        batch, rows, heads, _ = q.shape
        out = q.new_empty(q.shape)
        sums = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_held = ctx.saved_tensors  # to the end: checkpoints keep no other reference to what they recompute
        batch, rows, heads, width = q.shape
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        wide = next((w for w in (64, 96, 128, 192) if width <= w), 256)
        step = 128 if wide <= 64 else 64
        rounded, keys = -(-rows // step) * step, -(-k.shape[1] // 128) * 128
        if ctx.sequences:
            rounded, keys = (-(-(n + each * ctx.sequences) // each) * each for n, each in ((rows, step), (rows, 128)))
        shapes = [(batch, heads, rounded), (batch, heads, rounded), (batch, heads, rounded * wide)]
        shapes += [(batch, k.shape[2], keys * wide)] * (2 * (k.shape[2] != heads))
        scratch = [torch.empty(shape, dtype=torch.float32, device=q.device) for shape in shapes]
        del scratch
        return *gradients, None


class _FlashAttention(torch.autograd.Function):
    """Allocates and saves what FlashAttnFunc does: q, k, v, the output, fp32 row sums and the generator's state.

    If it is given a number of packed `sequences`, it is FlashAttnVarlenFunc.

    Source: flash-attn 2.8 flash_attn_interface.py FlashAttnFunc, csrc/flash_attn/flash_api.cpp mha_fwd, mha_bwd.
    """

    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, sequences: int = 0) -> Any:
        ctx.sequences = sequences
        batch, rows, heads, _ = q.shape
        out = torch.empty_like(q)
        sums = torch.empty((batch, heads, rows), dtype=torch.float32, device=q.device)
        state = torch.empty(2, dtype=torch.int64, device=q.device)
        ctx.save_for_backward(q, k, v, out, sums, state)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, *_held = ctx.saved_tensors  # to the end: checkpoints keep no other reference to what they recompute
        batch, rows, heads, width = q.shape
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        rounded_rows = rows + 128 * ctx.sequences if ctx.sequences else -(-rows // 128) * 128
        rounded_width = -(-width // (32 if width <= 128 else 64)) * (32 if width <= 128 else 64)
        scratch = [
            torch.empty((batch, heads, rounded_rows), dtype=torch.float32, device=q.device),
            torch.empty((batch, rounded_rows, heads, rounded_width), dtype=torch.float32, device=q.device),
        ]
        if k.shape[2] != heads:  # gradients of k and v for every query head, then summed
            scratch += [
                torch.empty((batch, k.shape[1], heads, width), dtype=k.dtype, device=k.device) for _ in range(2)
            ]
        del scratch
        return dq, dk, dv, None
