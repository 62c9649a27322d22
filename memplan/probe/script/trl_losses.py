"""TRL's losses of SFT, written to allocate what they do: see `memplan.catalogue.kernels.trl_losses`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import FakeTensor

from memplan.catalogue.kernels.trl_losses import CHUNK, TILE_TOKENS, TILE_WIDTH

_IGNORED = -100
_utils: Any = torch.utils


def chunked_nll(hidden: Any, labels: Any, head: Any, scaled: Callable[[Any], Any], casts_to_fp32: bool) -> Any:
    """Return TRL 1.14's loss: chunks of labelled rows, each recomputed in backward. `scaled` scales and caps logits."""
    rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), labels[:, 1:].reshape(-1)
    order = (targets != _IGNORED).to(torch.int8).argsort(descending=True, stable=True)
    rows, targets = rows[order], targets[order]

    def chunk(part: Any, weight: Any, bias: Any, target: Any) -> Any:
        dtype = torch.float32 if casts_to_fp32 else part.dtype
        logits = part.to(dtype) @ weight.to(dtype).t()
        if not casts_to_fp32:
            logits = logits.float()
        logits = scaled(logits if bias is None else logits + bias.float())
        log_probs = F.log_softmax(logits, dim=-1)
        loss = F.nll_loss(log_probs, target, ignore_index=_IGNORED, reduction="sum")
        valid = target != _IGNORED
        correct = ((logits.argmax(dim=-1) == target) & valid).sum().float()
        entropy = (-(log_probs.exp() * log_probs).sum(dim=-1) * valid).sum()
        return loss, correct, entropy

    loss: Any = 0.0
    for start in range(0, rows.shape[0], CHUNK):
        part, target = rows[start : start + CHUNK], targets[start : start + CHUNK]
        loss = loss + _utils.checkpoint.checkpoint(chunk, part, head.weight, head.bias, target, use_reentrant=False)[0]
    return loss / targets.numel()


def tiled_lm_head(hidden: Any, labels: Any, head: Any, scale: float, cap: float | None) -> Any:
    """Return TRL 1.16's loss: log-probabilities in tiles of tokens by words, none of which backward keeps."""
    mask = labels[:, 1:] != _IGNORED
    function: Any = _TiledHead
    log_probs = function.apply(hidden[:, :-1][mask], head.weight, head.bias, labels[:, 1:][mask], scale, cap)
    log_probs = log_probs.new_zeros(mask.shape).masked_scatter(mask, log_probs)
    return -log_probs.sum() / mask.sum().clamp(min=1)


def _tiles(rows: torch.Tensor, words: int) -> Any:
    for first in range(0, rows.shape[0], TILE_TOKENS):
        for start in range(0, words, TILE_WIDTH):
            yield slice(first, first + TILE_TOKENS), slice(start, start + TILE_WIDTH)


class _TiledHead(torch.autograd.Function):
    """Allocates what TRL's function does. Its kernels read a tile once; here they work in place."""

    @staticmethod
    def forward(ctx: Any, rows: Any, weight: Any, bias: Any, targets: Any, scale: float, cap: float | None) -> Any:
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else rows.dtype
        maxima, *others, total, label = (torch.zeros(rows.shape[0], device=rows.device) for _ in range(7))
        maxima.fill_(-torch.inf)
        buffer = torch.empty((min(rows.shape[0], TILE_TOKENS), TILE_WIDTH), dtype=dtype, device=rows.device)
        part, last = rows, -1
        for tokens, words in _tiles(rows, weight.shape[0]):
            if tokens.start != last:
                part, last = rows[tokens].to(dtype), tokens.start
            tile = _logits(buffer, part, weight[words].to(dtype), None if bias is None else bias[words])
            if not isinstance(tile, FakeTensor):
                _transform(tile, scale, cap)
                _fold(tile, targets[tokens], words.start, maxima[tokens], total[tokens], label[tokens])
        del others
        log_z = maxima + torch.log(total)
        ctx.save_for_backward(rows, weight, bias, targets, log_z, torch.empty_like(log_z))
        ctx.dtype, ctx.scale, ctx.cap = dtype, scale, cap
        return label - log_z

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, weight, bias, targets, log_z, _ = ctx.saved_tensors
        wanted: tuple[Any, ...] = (rows, weight, bias)
        sums = [
            torch.zeros(t.shape, device=t.device) if needed and t is not None else None
            for t, needed in zip(wanted, cast(tuple[bool, ...], ctx.needs_input_grad), strict=False)
        ]
        of_rows, of_weight, of_bias = sums
        buffer = torch.empty((min(rows.shape[0], TILE_TOKENS), TILE_WIDTH), dtype=ctx.dtype, device=rows.device)
        part, last = rows, -1
        for tokens, words in _tiles(rows, weight.shape[0]):
            if tokens.start != last:
                part, last = rows[tokens].to(ctx.dtype), tokens.start
            matrix = weight[words].to(ctx.dtype)
            tile = _logits(buffer, part, matrix, None if bias is None else bias[words])
            if not isinstance(tile, FakeTensor):
                slopes = _transform(tile, ctx.scale, ctx.cap)
                _into_gradient(tile, targets[tokens], words.start, log_z[tokens], gradient[tokens])
                tile.mul_(slopes)
            if of_rows is not None:
                _add(of_rows[tokens], tile, matrix)
            if of_weight is not None:
                _add(of_weight[words], tile.t(), part)
            if of_bias is not None:
                of_bias[words] += tile.sum(dim=0, dtype=torch.float32)
        cast_back = [t if t is None else t.to(like.dtype) for t, like in zip(sums, wanted, strict=True)]
        return *cast_back, None, None, None


def _logits(buffer: torch.Tensor, part: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    tile = buffer[: part.shape[0], : matrix.shape[0]]
    torch.mm(part, matrix.t(), out=tile)
    return tile if bias is None else tile.add_(bias.to(tile.dtype))


def _transform(tile: torch.Tensor, scale: float, cap: float | None) -> Any:
    """Scale and cap the tile in place, and return its derivative."""
    tile.mul_(scale)
    if cap is None:
        return scale
    tile.div_(cap).tanh_()
    slopes = (1 - tile * tile) * scale
    tile.mul_(cap)
    return slopes


def _fold(tile: Any, targets: Any, start: int, maxima: Any, total: Any, label: Any) -> None:
    """Add a tile of logits to every token's maximum, sum of exponents and logit of its label, in place."""
    inside = (targets >= start) & (targets < start + tile.shape[1])
    own = tile.gather(1, (targets - start).clamp(0, tile.shape[1] - 1).unsqueeze(1)).squeeze(1).float()
    label.copy_(torch.where(inside, own, label))
    largest = torch.maximum(maxima, tile.amax(dim=1).float())
    total.mul_((maxima - largest).exp())
    maxima.copy_(largest)
    total.add_(tile.sub_(largest.unsqueeze(1)).exp_().sum(dim=1, dtype=torch.float32))


def _into_gradient(tile: Any, targets: Any, start: int, log_z: Any, gradient: Any) -> None:
    """Turn a tile of logits into the gradient of the labels' log-probabilities, in place."""
    tile.sub_(log_z.unsqueeze(1)).exp_().mul_(-gradient.unsqueeze(1))
    inside = (targets >= start) & (targets < start + tile.shape[1])
    own = (targets - start).clamp(0, tile.shape[1] - 1).unsqueeze(1)
    tile.scatter_add_(1, own, (gradient * inside).to(tile.dtype).unsqueeze(1))


def _add(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a product to a sum in fp32."""
    half = a.dtype in (torch.float16, torch.bfloat16)
    if half and into.is_cuda:
        torch.addmm(into, a, b, out_dtype=torch.float32, out=into)  # pyright: ignore
    else:
        into.addmm_(a.float(), b.float())


def compiled_pair(function: Any) -> Callable[..., Any]:
    """Return what `torch.compile` makes of the function in which Liger's loss of DPO computes a pair and its gradients,
    or that of KTO an example and its gradients.

    It allocates what Inductor's code does: logits of the pair and of the reference, whose log-probabilities it reads,
    a sum in fp32 to which the labels' gradients are added, the logits' gradient, and two products.
    """
    inside = dict(zip(function.__code__.co_freevars, function.__closure__, strict=True))
    weight, loss = inside["weight"].cell_contents, inside["compute_loss"].cell_contents
    indices = inside["argnums"].cell_contents if "argnums" in inside else (0, 1)  # Liger 0.8.2 has no such choice
    is_kto = "preference_labels_chunk" in function.__code__.co_varnames

    def run(pair: Any, *others: Any) -> Any:
        rows, of_reference = pair.flatten(0, 1), others[2 if is_kto else 1]
        logits = rows @ weight.t()
        if of_reference is not None:  # TRL 1.10's KTO gives it none under adapters
            torch.mm(of_reference.flatten(0, 1), loss.keywords["ref_weight"].t())
        sums = torch.empty(logits.shape, device=logits.device)
        gradient = torch.empty_like(logits)
        del sums
        made = {0: (gradient @ weight).view(pair.shape)}
        if 1 in indices:
            made[1] = gradient.t() @ rows
        number, one = torch.zeros((), device=logits.device), torch.zeros(1, device=logits.device)
        metrics = (number,) * 6 if is_kto else (one, one, number, number, number, one, one)
        return tuple(made[i] for i in indices), (number, metrics)

    return run
