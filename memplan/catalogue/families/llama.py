"""Llama and the families built like it: pre-RMSNorm, a gated MLP, rotary positions, few or no biases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from memplan.catalogue.decoder.attention import KEYS, QUERIES, llama_attention, rope
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Keep, Op, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def rope_and_norm(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Hunyuan's q and k: rotated, then an RMSNorm over each head."""
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k.rotated", KEYS, "b s k rot2"),
        ops.release_names(q, k),
        *ops.rms_norm(f"{name}.query_layernorm", "q.rotated", "q", QUERIES, "d"),
        ops.release_names("q.rotated"),
        *ops.rms_norm(f"{name}.key_layernorm", "k.rotated", "k", KEYS, "d"),
        ops.release_names("k.rotated"),
    )


def rope_and_scale(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Ministral 3's q and k: rotated, then q times a per-position factor in q's dtype.

    The factor is `1 + beta * log(1 + floor(position / length))`.
    """
    steps = (Tensor("logarithm", "s", "fp32"), Tensor("scaled", "s", "fp32"))
    return (
        *ops.rotate(f"{name}.rope_q", q, "q.rotated", QUERIES, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", k, "k", KEYS, "b s k rot2"),
        ops.release_names(q, k),
        Op(f"{name}.factors", ("positions",), (Tensor("factors32", "s", "fp32"),), scratch=steps),
        Op(f"{name}.cast_factors", ("factors32",), (Tensor("factors", "s", "=q.rotated"),), cast=True),
        Op(
            f"{name}.scale_query",
            ("q.rotated", "factors"),
            (Tensor("q", QUERIES),),
            (),
            (Keep("factors", "q.rotated"),),
            source="transformers 5.24 models/ministral3/modeling_ministral3.py Ministral3Attention",
        ),
    )


def llama(
    m: ModelSpec,
    wiring: Wiring,
    *,
    bias: bool = False,
    out_bias: bool = False,
    qk_norm: bool = False,
    turn: Callable[[str, str, str], tuple[Op, ...]] = rope,
    mixed: bool = False,
    mlp: Callable[[Layer], tuple[Op, ...]] | None = None,
) -> Stack:
    """Build Llama, Mistral, Ministral 3, MiMo, Qwen2 or 3, or, through `configured`, InternLM 3, Hunyuan or SmolLM 3.

    bias      biases on q, k and v
    out_bias  a bias on the output projection of the attention
    qk_norm   RMSNorm on q and k
    turn      builds the ops that rotate q and k
    mixed     layers may differ in having a sliding window; the full mask is made even if no layer uses it
    mlp       builds a layer's ops from `n2` to `mo`, in place of a gated MLP
    """
    gated = gated_mlp("n2", "mo", bias=m.get("mlp_bias", False))

    def block(layer: Layer) -> Block:
        heads = llama_attention(
            m,
            wiring,
            "n1",
            "ao",
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            rotary=layer.rotary,
            sliding=layer.sliding,
            turn=turn,
        )
        return decoder_block(heads, mlp(layer) if mlp else gated, held=returned(wiring))

    sliding = tuple(sorted({*(layer.sliding for layer in m.layers), *((False,) if mixed else ())}))
    return Stack(before(wiring, sliding), runs(m, block), after(m, wiring, sliding))


def configured(m: ModelSpec, wiring: Wiring, **variant: Any) -> Stack:
    """Build `llama` with biases in the attention only if the config's `attention_bias` is set."""
    bias = m.get("attention_bias", False)
    return llama(m, wiring, bias=bias, out_bias=bias, **variant)


BUILDERS = {
    "hunyuan_v1_dense": partial(configured, turn=rope_and_norm),
    "internlm3": configured,
    "llama": configured,
    "mistral": llama,
    "ministral": partial(llama, mixed=True),
    "ministral3": partial(llama, turn=rope_and_scale),
    "qwen2": partial(llama, bias=True, mixed=True),
    "mimo": partial(llama, bias=True),
    "qwen3": partial(configured, qk_norm=True, mixed=True),
    "smollm3": partial(configured, mixed=True),
}
