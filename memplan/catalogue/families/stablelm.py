"""StableLM: Llama with LayerNorms and partly rotated heads; the 12B model runs attention and MLP in parallel."""

from __future__ import annotations

from memplan.catalogue.attention.attention import KEYS, QUERIES
from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.norms import layer_norm
from memplan.catalogue.decoder.rotation import attend_heads_first, partly_rotated
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import rewrite
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def _norm_and_rope(m: ModelSpec, name: str, q: str, k: str) -> tuple[Op, ...]:
    """Rotate part of q and k. With `qk_layernorm` every head has its own LayerNorm; together they are one operation."""
    if not m.get("qk_layernorm", False):
        return partly_rotated(m, name, q, k)
    return (
        *_norm_heads(f"{name}.q_layernorm", q, "q.normed", QUERIES, "a d"),
        *_norm_heads(f"{name}.k_layernorm", k, "k.normed", KEYS, "k d"),
        *partly_rotated(m, name, "q.normed", "k.normed"),
    )


def _norm_heads(name: str, x: str, y: str, shape: str, axes: str) -> tuple[Op, ...]:
    return (
        ops.view(f"{name}.split", x, f"{y}.heads", shape, gradient="new"),
        ops.layer_norm(f"{name}.norms", f"{y}.heads", f"{y}.separate", shape, axes, bias=False),
        ops.copy(f"{name}.cat", f"{y}.separate", y, shape),
        ops.release_names(f"{y}.separate", x),
    )


def _attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    """Attention, whose local variables stay alive to its end."""
    ends = ("q.normed", "k.normed") if m.get("qk_layernorm", False) else ("q1", "k1")
    bias = m.get("use_qkv_bias", False)
    return (
        *llama_attention(m, wiring, "n1", "ao", bias=bias, rotate=_norm_and_rope, attend=attend_heads_first),
        ops.release_names("q.turned", "k.turned", *ends),
    )


def _mlp_and_dropout(x: str, y: str, bias: bool) -> tuple[Op, ...]:
    return (*gated_mlp(x, "mo.whole"), ops.dropout("dropout", "mo.whole", y, "b s h"), ops.release_names("mo.whole"))


def stablelm(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build StableLM. Local variables of the block stay alive to its end, in parallel blocks except the first sum."""
    row = Decoder(
        attention=_attention,
        mlp=_mlp_and_dropout if m.get("hidden_dropout", 0.0) > 0 else gated_mlp,
        norm=layer_norm,
        parallel="use_parallel_residual",
        held=("n1", "ao", "mo"),
    )
    stack = decoder(m, wiring, row)
    if not m.get("use_parallel_residual", False):
        return stack
    return rewrite(stack, lambda op: (op, ops.release_names("x1")) if op.name == "residual_2" else (op,))


BUILDERS = {"stablelm": stablelm}
