"""Gemma: scaled embeddings, and RMSNorms that multiply by `1 + weight` in fp32 and so keep a second fp32 tensor."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import KEYS, QUERIES, attention
from memplan.catalogue.decoder.attention import rope
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import BOTH, Norm
from memplan.catalogue.decoder.norms import gemma_norm
from memplan.catalogue.decoder.scaling import scaled_embedding
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack
from memplan.models.model import ModelSpec


def norm_then_rope(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """q and k normalised head by head, then rotated."""
    return (*norm_heads(name, q, k, "q.normed", "k.normed", gemma_norm), *rope(m, name, "q.normed", "k.normed"))


def norm_heads(name: str, q: str, k: str, q_normed: str, k_normed: str, norm: Norm) -> tuple[Op, ...]:
    return (
        *norm(f"{name}.q_norm", q, q_normed, QUERIES, "d"),
        ops.release_names(q),
        *norm(f"{name}.k_norm", k, k_normed, KEYS, "d"),
        ops.release_names(k),
    )


def scaled_apart(wiring: Wiring, stack: Stack) -> Stack:
    """Scale the embeddings in the model instead of in their module, if this version of transformers does.

    The unscaled embeddings then stay alive as long as the model runs.
    """
    if not wiring.scales_embeddings_outside:
        return stack
    i = next(i for i, op in enumerate(stack.before) if op.name == "model.embed_tokens")
    plain = ops.embedding("model.embed_tokens", "ids", "looked_up", "v", "h")
    scale = ops.scale("model.normalizer", "looked_up", "embeds", "b s h")
    before = (*stack.before[:i], plain, scale, *stack.before[i + 1 :])
    head = next(i for i, op in enumerate(stack.after) if op.name == "lm_head")
    after = (*stack.after[:head], ops.release_names("looked_up"), *stack.after[head:])
    return stack._replace(before=before, after=after)


def capped_logits(last: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return `last`, which ends with the output projection, with soft-capped logits. The tanh is kept."""
    head = last[-1]
    uncapped = head._replace(writes=(head.writes[0]._replace(name="uncapped_logits"),))
    return (*last[:-1], uncapped, *ops.softcap("final_logit_softcapping", "uncapped_logits", "logits", "b s v"))


def capped_attention(
    name: str, q: str, k: str, v: str, y: str, wiring: Wiring, grouped: bool, sliding: bool, mask: str
) -> tuple[Op, ...]:
    """Eager attention that soft-caps the scaled scores before it adds the mask, if there is one. The tanh is kept."""
    kernel = attention(name, q, k, v, y, wiring, grouped, sliding, mask)
    i = next(i for i, op in enumerate(kernel) if "scaled" in op.reads)
    capped = ops.softcap(f"{name}.softcap", "scaled", "capped", "b a s s")
    return (*kernel[:i], *capped, *renamed(kernel[i:], {"scaled": "capped"}))


_GEMMA = Decoder(bias="attention_bias", out_bias="attention_bias", norm=gemma_norm, embedded=(scaled_embedding(),))
# A norm before and after each branch, layers with and without a sliding window.
_GEMMA_2 = _GEMMA._replace(
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    masks=BOTH,
)


def gemma(m: ModelSpec, wiring: Wiring) -> Stack:
    return scaled_apart(wiring, decoder(m, wiring, _GEMMA))


def gemma2(m: ModelSpec, wiring: Wiring, *, row: Decoder = _GEMMA_2) -> Stack:
    """Build Gemma 2, with soft-capped scores and logits.

    Of the kernels only flash attention 2 and flex attention cap inside. Otherwise attention is eager, except in
    versions of transformers whose sdpa attention does not cap (`Wiring.uncapped`).
    """
    inside = wiring.backend in ("flash_2", "flex") or (wiring.uncapped and wiring.backend != "eager")
    wiring = wiring if inside else wiring._replace(backend="eager", masked="eager")
    capped = not inside and m.get("attn_logit_softcapping", 0.0) > 0
    row = _capped(m, row._replace(attend=capped_attention if capped else attention))
    return scaled_apart(wiring, decoder(m, wiring, row))


def gemma3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Gemma 3's decoder: q and k are normalised, and layers with a sliding window have their own rotary table."""
    return decoder(m, wiring, _capped(m, _GEMMA_2._replace(rotate=norm_then_rope, local_table=True)))


def _capped(m: ModelSpec, row: Decoder) -> Decoder:
    return row._replace(logits=capped_logits) if m.get("final_logit_softcapping", 0.0) > 0 else row


_VAULT = _GEMMA_2._replace(norms=("input_layernorm", "", "pre_feedforward_layernorm", ""))

BUILDERS = {"gemma": gemma, "gemma2": gemma2, "gemma3_text": gemma3, "vaultgemma": partial(gemma2, row=_VAULT)}
