"""Cohere: attention and MLP in parallel, LayerNorms written out in fp32, and rotation in fp32."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import returned, runs
from memplan.catalogue.decoder.layer_norm_fp32 import layer_norm
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_logits
from memplan.catalogue.decoder.windows import after, before, tables
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_SOURCE = "transformers 5.24 models/cohere/modeling_cohere.py"
_Q, _K = "b s a d", "b s k d"


def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Cast q and k to fp32, rotate them pair by pair, and cast them back."""
    return (
        ops.cast(f"{name}.float_q", q, "q.wide", _Q, "fp32"),
        ops.cast(f"{name}.float_k", k, "k.wide", _K, "fp32"),
        *ops.rotate(f"{name}.rope_q", "q.wide", "q.rotated", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", "k.wide", "k.rotated", _K, "b s k rot2"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", _Q, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", _K, f"={k}"),
        ops.release_names("q.wide", "k.wide", "q.rotated", "k.rotated"),
        ops.release_names(q, k),
    )


def norm_and_rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Normalise q and k, with a separate weight for each head, then rotate them."""
    return (
        *layer_norm(f"{name}.q_norm", q, "q.normed", _Q, "a d"),
        ops.release_names(q),
        *layer_norm(f"{name}.k_norm", k, "k.normed", _K, "k d"),
        ops.release_names(k),
        *rope(name, "q.normed", "k.normed"),
    )


def cohere(m: ModelSpec, wiring: Wiring, mixed: bool = False) -> Stack:
    """Build Cohere: one norm for both branches, and logits multiplied by a constant.

    `mixed`: Cohere 2, which rotates only in layers with a sliding window.
    """
    bias = m.get("attention_bias", False)
    turn = norm_and_rope if m.get("use_qk_norm", False) and not mixed else rope

    def block(layer: Layer) -> Block:
        heads = llama_attention(
            m, wiring, "n1", "ao", bias=bias, out_bias=bias, rotary=layer.rotary, sliding=layer.sliding, turn=turn
        )
        return Block(
            "model.layers",
            (
                *layer_norm("input_layernorm", "x", "n1", "b s h", "h"),
                *heads,
                *gated_mlp("n1", "mo"),
                ops.add("residual_1", "x", "ao", "x1", "b s h"),
                ops.add("residual_2", "x1", "mo", "y", "b s h"),
                ops.release_names("n1", "ao", "mo", "positions", *returned(wiring)),
            ),
        )

    last = after(m, wiring, mixed, layer_norm)
    return Stack(before(wiring, mixed, tables()), runs(m, block), scaled_logits(last))


BUILDERS = {"cohere": cohere, "cohere2": partial(cohere, mixed=True)}
