"""Gemma: scaled embeddings, and RMSNorms that multiply by `1 + weight` in fp32 and so keep a second fp32 tensor."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.attention.attention import attention
from memplan.catalogue.decoder.attention import llama_attention, rope
from memplan.catalogue.decoder.frame import decoder_block, returned, runs
from memplan.catalogue.decoder.gemma_norm import rms_norm
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_embedding
from memplan.catalogue.decoder.windows import Norm, after, before, local, normed_block, tables
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_Q, _K = "b s a d", "b s k d"


def norm_then_rope(name: str, q: str, k: str, norm: Norm = rms_norm, rotary: bool = True) -> tuple[Op, ...]:
    """q and k normalised head by head, then rotated."""
    q2, k2 = ("q.normed", "k.normed") if rotary else ("q", "k")
    return (
        *norm(f"{name}.q_norm", q, q2, _Q, "d"),
        ops.release_names(q),
        *norm(f"{name}.k_norm", k, k2, _K, "d"),
        ops.release_names(k),
        *(rope(name, q2, k2) if rotary else ()),
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
    """Eager attention that soft-caps the scaled scores before adding the mask. The tanh is kept."""
    kernel = attention(name, q, k, v, y, wiring, grouped, sliding, mask)
    i, add = next((i, op) for i, op in enumerate(kernel) if op.name == f"{name}.add_mask")
    scores, *others = add.reads
    capped = ops.softcap(f"{name}.softcap", scores, "capped", "b a s s")
    return (*kernel[:i], *capped, add._replace(reads=("capped", *others)), *kernel[i + 1 :])


def gemma(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Gemma: Llama's block with Gemma's norms."""
    bias = m.get("attention_bias", False)
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias)
    block = decoder_block(heads, gated_mlp("n2", "mo"), norm=rms_norm, held=returned(wiring))
    stack = Stack(
        before(wiring, False, tables(), scaled_embedding()),
        runs(m, lambda _: block),
        after(m, wiring, False, rms_norm),
    )
    return scaled_apart(wiring, stack)


def alternating(m: ModelSpec, wiring: Wiring, own_table: bool = False, capped: bool = False) -> Stack:
    """Build Gemma 2 or 3: a norm before and after each branch, layers with and without a sliding window.

    own_table  Gemma 3: q and k are normalised, and sliding-window layers have a separate rotary table
    capped     attention scores are soft-capped
    """
    bias = m.get("attention_bias", False)
    heads = (
        partial(llama_attention, turn=norm_then_rope)
        if own_table
        else partial(llama_attention, attend=capped_attention if capped else attention)
    )

    def block(layer: Layer) -> Block:
        layer_block = normed_block(
            heads(m, wiring, "n1", "ao", bias=bias, out_bias=bias, sliding=layer.sliding),
            gated_mlp("n2", "mo"),
            rms_norm,
            ("input_layernorm", "pre_feedforward_layernorm"),
            ("post_attention_layernorm", "post_feedforward_layernorm"),
            returned(wiring),
        )
        return local(layer_block) if own_table and layer.sliding else layer_block

    has_sliding = own_table and any(layer.sliding for layer in m.layers)
    last = after(m, wiring, True, rms_norm, has_sliding)
    return Stack(
        before(wiring, True, tables(has_sliding), scaled_embedding()),
        runs(m, block),
        capped_logits(last) if m.get("final_logit_softcapping", 0.0) > 0 else last,
    )


def gemma2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Gemma 2, with soft-capped scores and logits.

    Of the kernels only flash attention 2 caps inside. Otherwise attention is eager, except in versions of transformers
    whose sdpa attention does not cap (`Wiring.uncapped`).
    """
    inside = wiring.backend == "flash_2" or (wiring.uncapped and wiring.backend != "eager")
    wiring = wiring if inside else wiring._replace(backend="eager", masked="eager")
    return scaled_apart(wiring, alternating(m, wiring, capped=not inside and m.get("attn_logit_softcapping", 0.0) > 0))


BUILDERS = {"gemma": gemma, "gemma2": gemma2, "gemma3_text": partial(alternating, own_table=True)}
