"""Losses of other libraries, written to allocate what they do: see `memplan.catalogue.kernels.losses`.

Each calls the model's body and head separately, as those libraries do, to avoid having all logits at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import FakeTensor

from memplan.core.records import NamedTuple
from memplan.probe.libraries import library
from memplan.probe.script.model import base_of
from memplan.probe.script.trl_losses import chunked_nll, tiled_lm_head

_CHUNKS = 8  # torchtune 0.6 CEWithChunkedOutputLoss num_output_chunks
_TOKENS = 128  # litgpt 0.5 lm_head_chunk_size
_IGNORED = -100


class LossOutput(NamedTuple):
    """The loss, and the outputs that a script may hold through backward."""

    loss: torch.Tensor
    outputs: Any


def compute(
    kind: str, model: Any, inputs: Mapping[str, Any], labels: Any, in_fp32: bool = False, **options: Any
) -> LossOutput:
    """Return the loss `kind`, a name from `kernels.loss`, of the model on `inputs`.

    in_fp32  accelerate casts the outputs to fp32, which only a loss outside of the model sees

    Without `labels` the loss is the mean of the pooled output, or of the last hidden state of a model without one.
    """
    if labels is None:
        outputs = model(**inputs, **options)
        pooled = getattr(outputs, "pooler_output", None)
        return LossOutput((pooled if pooled is not None else outputs.last_hidden_state).mean(), outputs)
    if kind == "hf":
        outputs = model(**inputs, labels=labels, **options)
        return LossOutput(outputs.loss, outputs)
    if kind == "label_smoothing":
        return _label_smoothing(model, inputs, labels, in_fp32, options)
    ids = inputs["input_ids"]
    base = base_of(model)
    body = getattr(base, base.base_model_prefix)
    head = _head(base)
    match kind:
        case "chunked":
            return _chunked(_logits(body, head, ids, options, _into_eight), labels)
        case "chunked_lm_head":
            return _chunked_lm_head(_logits(body, head, ids, options, _by_tokens), labels)
        case "fused":
            hidden = body(input_ids=ids, **options).last_hidden_state
            return LossOutput(_fused(hidden, labels, base.get_output_embeddings()), None)
        case "chunked_nll" | "chunked_nll_fp32":
            hidden = body(input_ids=ids, **options).last_hidden_state
            matrix, scaled = base.get_output_embeddings(), _scaling(base.config.get_text_config())
            return LossOutput(chunked_nll(hidden, labels, matrix, scaled, kind == "chunked_nll_fp32"), None)
        case "tiled_lm_head":
            hidden = body(input_ids=ids, **options).last_hidden_state
            cap = getattr(base.config.get_text_config(), "final_logit_softcapping", None)
            return LossOutput(
                tiled_lm_head(
                    hidden, labels, base.get_output_embeddings(), _factor(base.config.get_text_config()), cap
                ),
                None,
            )
        case other:
            raise AssertionError(other)


def _label_smoothing(
    model: Any, inputs: Mapping[str, Any], labels: Any, in_fp32: bool, options: Mapping[str, Any]
) -> LossOutput:
    """Return the Trainer's smoothed loss of the model's outputs."""
    causal = library("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if base_of(model).config.is_encoder_decoder:
        options = {**options, "decoder_input_ids": base_of(model).prepare_decoder_input_ids_from_labels(labels)}
    outputs = model(**inputs, **options)
    if in_fp32:
        outputs = library("accelerate.utils.operations").convert_to_fp32(outputs)
    smoother = library("transformers.trainer_pt_utils").LabelSmoother(epsilon=0.1)
    return LossOutput(smoother(outputs, labels, shift_labels=type(base_of(model)).__name__ in causal), outputs)


def _logits(body: Any, head: Any, ids: Any, options: dict[str, Any], split: Callable[[Any], Any]) -> list[Any]:
    """Return the logits of every chunk. The hidden states are freed on return, as when a model returns."""
    return [head(chunk) for chunk in split(body(input_ids=ids, **options).last_hidden_state)]


def _into_eight(hidden: Any) -> Any:
    return hidden.chunk(_CHUNKS, dim=1)


def _by_tokens(hidden: Any) -> Any:
    return hidden.split(_TOKENS, dim=1)


def _head(base: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from hidden states to logits, including some families' scaling and soft capping."""
    matrix, scaled = base.get_output_embeddings(), _scaling(base.config.get_text_config())
    return lambda hidden: scaled(matrix(hidden))


def _scaling(config: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what some families do with the product of hidden states and the head's matrix."""
    cap = getattr(config, "final_logit_softcapping", None)
    divisor = getattr(config, "logits_scaling", None)
    factor = getattr(config, "logit_scale", None)

    def scaled(out: torch.Tensor) -> torch.Tensor:
        if divisor is not None:
            out = out / divisor
        if factor is not None:
            out = out * factor
        if cap is not None:
            out = out / cap
            out = torch.tanh(out)
            out = out * cap
        return out

    return scaled


def _factor(config: Any) -> float:
    """Return the factor of the logits; 1 if there is none."""
    divisor, factor = getattr(config, "logits_scaling", None), getattr(config, "logit_scale", None)
    return 1 / divisor if divisor else 1.0 if factor is None else factor


def _shifted(labels: torch.Tensor) -> torch.Tensor:
    """Return the labels shifted by one, with the last of every row ignored."""
    return F.pad(labels, (0, 1), value=_IGNORED)[..., 1:].contiguous()


def _chunked(chunks: list[Any], labels: torch.Tensor) -> LossOutput:
    """torchtune's loss: the head on every chunk of the sequence, then each chunk's loss in fp32."""
    targets: Any = [chunk.reshape(-1) for chunk in _into_eight(_shifted(labels))]
    logits = [chunk.reshape(-1, chunk.size(-1)) for chunk in chunks]
    loss: Any = 0.0
    for chunk, target in zip(logits, targets, strict=True):
        loss = loss + F.cross_entropy(chunk.float(), target, ignore_index=_IGNORED, reduction="sum")
    return LossOutput(loss, chunks)


def _chunked_lm_head(kept: list[Any], labels: Any) -> LossOutput:
    """LitGPT's loss: the head on 128 tokens at a time, losses in the logits' dtype; the loop holds the logits."""
    kept[-1] = kept[-1][..., :-1, :]
    logits = [chunk.reshape(-1, chunk.size(-1)) for chunk in kept]
    targets = [chunk.reshape(-1) for chunk in _by_tokens(labels[..., 1:])]
    losses = [
        F.cross_entropy(chunk, target, ignore_index=_IGNORED, reduction="none")
        for chunk, target in zip(logits, targets, strict=False)  # a last chunk of one token predicts nothing
    ]
    return LossOutput(torch.cat(losses).sum(), kept)


def _fused(hidden: torch.Tensor, labels: torch.Tensor, matrix: Any) -> torch.Tensor:
    """Liger's loss, which computes the gradients together with the loss."""
    target = _shifted(labels).view(-1)
    return _FusedLinearCrossEntropy.apply(hidden.view(-1, hidden.shape[-1]), matrix.weight, target)  # pyright: ignore


# As in Liger: autocast applies to forward's products, and backward runs in forward's autocast mode.
_amp: Any = torch.amp
_forward: Callable[[Any], Any] = _amp.custom_fwd(device_type="cuda")
_backward: Callable[[Any], Any] = _amp.custom_bwd(device_type="cuda")


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Allocates what liger-kernel 0.8's function does: chunks of logits become their gradients in place."""

    @staticmethod
    @_forward
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        tokens, width = hidden.shape
        vocabulary = weight.shape[0]
        chunk_tokens = -(-tokens // -(-vocabulary // width))
        size = min(1 << (chunk_tokens - 1).bit_length(), tokens)
        hidden_gradient = torch.zeros_like(hidden)
        weight_gradient = torch.zeros_like(weight) if weight.requires_grad else None
        losses = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)
        valid = target != _IGNORED
        count = valid.sum().item()
        uses_buffer = hidden.dtype == weight.dtype and _keeps_dtype(hidden)
        buffer = torch.empty((size, vocabulary), dtype=hidden.dtype, device=hidden.device) if uses_buffer else None
        for start in range(0, tokens, size):
            part = hidden[start : start + size]
            if buffer is not None:
                logits = buffer[: part.shape[0]]
                torch.mm(part, weight.t(), out=logits)
            else:
                logits = part @ weight.t()
            if not isinstance(logits, FakeTensor):
                _into_gradient(logits, target[start : start + size], losses[start : start + size], int(count))
            if buffer is not None:
                torch.mm(logits, weight, out=hidden_gradient[start : start + size])
            else:
                hidden_gradient[start : start + size] = logits @ weight
            if weight_gradient is not None:
                _add_product(weight_gradient, logits, part)
            del logits, part
        del buffer
        loss = losses.sum()
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return loss

    @staticmethod
    @_backward
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_gradient, weight_gradient = ctx.saved_tensors  # one of Liger's kernels scales them in place
        hidden_gradient.mul_(gradient)
        if weight_gradient is not None:
            weight_gradient.mul_(gradient)
        return hidden_gradient, weight_gradient, None


def _keeps_dtype(hidden: torch.Tensor) -> bool:
    """Return whether autocast is off or would not change the product's dtype."""
    enabled = torch.is_autocast_enabled("cuda")
    return not enabled or torch.get_autocast_dtype("cuda") == hidden.dtype


def _into_gradient(logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor, number: int) -> None:
    """Turn logits, in place, into the gradient of their mean cross entropy over `number` tokens.

    One of Liger's kernels does it without allocating; here there are a few temporaries of one number per row.
    """
    ignored = target == _IGNORED
    rows = target.clamp(min=0).unsqueeze(1)
    logits.sub_(logits.amax(dim=1, keepdim=True))
    losses.sub_(logits.gather(1, rows).squeeze(1))
    logits.exp_()
    total = logits.sum(dim=1, keepdim=True, dtype=torch.float32)
    losses.add_(total.squeeze(1).log()).masked_fill_(ignored, 0.0).div_(number)
    logits.div_(total)
    logits.scatter_add_(1, rows, torch.full_like(rows, -1, dtype=logits.dtype))
    logits.masked_fill_(ignored.unsqueeze(1), 0.0).div_(number)


def _add_product(into: torch.Tensor, logits: torch.Tensor, part: torch.Tensor) -> None:
    """Add the chunk's part of the weight's gradient; in place on cards that can for half precision."""
    half = logits.dtype in (torch.float16, torch.bfloat16)
    ampere = torch.cuda.get_device_capability(into.device)[0] >= 8 if into.is_cuda else False
    if ampere and half and into.dtype == torch.float32:
        torch.addmm(into, logits.t(), part.to(logits.dtype), out_dtype=torch.float32, out=into)  # pyright: ignore
    elif ampere and half and into.dtype == logits.dtype:
        torch.addmm(into, logits.t(), part.to(logits.dtype), out=into)
    else:
        into += torch.mm(logits.t(), part).float()
