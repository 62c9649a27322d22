"""StableLM: Llama with LayerNorms and partly rotated heads; the 12B model runs attention and MLP in parallel."""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation import attend_heads_first, partly_rotated
from memplan.catalogue.decoder.windows import after, before, tables
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack
from memplan.models.model import ModelSpec


def layer_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    return (ops.layer_norm(name, x, y, shape, axis),)


def stablelm(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build StableLM. Local variables of attention and block stay alive to their ends."""
    parallel = m.get("use_parallel_residual", False)
    dropped = m.get("hidden_dropout", 0.0) > 0
    mo = "mo.whole" if dropped else "mo"
    dropout = (ops.dropout("dropout", mo, "mo", "b s h"), ops.release_names(mo)) if dropped else ()
    branches = (
        (
            *gated_mlp("n1", mo),
            *dropout,
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
            ops.release_names("x1"),
        )
        if parallel
        else (
            ops.add("residual_1", "x", "ao", "x1", "b s h"),
            *layer_norm("post_attention_layernorm", "x1", "n2", "b s h", "h"),
            *gated_mlp("n2", mo),
            *dropout,
            ops.add("residual_2", "x1", "mo", "y", "b s h"),
        )
    )
    block = Block(
        "model.layers",
        (
            *layer_norm("input_layernorm", "x", "n1", "b s h", "h"),
            *_attention(m, wiring),
            *branches,
            ops.release_names("n1", "ao", "mo", "positions", *returned(wiring)),
        ),
    )
    return Stack(before(wiring, False, tables()), runs(m, lambda _: block), after(m, wiring, False, layer_norm))


def _attention(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    """Attention. With `qk_layernorm` every head has its own LayerNorm; together they are one operation here."""
    normed = m.get("qk_layernorm", False)
    ends = ("q.normed", "k.normed") if normed else ("q1", "k1")

    def turn(name: str, q: str, k: str) -> tuple[Op, ...]:
        norms = (
            *_norm_heads(f"{name}.q_layernorm", q, ends[0], "a"),
            *_norm_heads(f"{name}.k_layernorm", k, ends[1], "k"),
        )
        return (*(norms if normed else ()), *partly_rotated(name, *ends, m.rotary_width < m.head_dim))

    return (
        *llama_attention(
            m, wiring, "n1", "ao", bias=m.get("use_qkv_bias", False), turn=turn, attend=attend_heads_first
        ),
        ops.release_names("q.turned", "k.turned", *ends),
    )


def _norm_heads(name: str, x: str, y: str, heads: str) -> tuple[Op, ...]:
    shape = f"b s {heads} d"
    return (
        ops.view(f"{name}.split", x, f"{y}.heads", shape, gradient="new"),
        ops.layer_norm(f"{name}.norms", f"{y}.heads", f"{y}.separate", shape, f"{heads} d", bias=False),
        ops.copy(f"{name}.cat", f"{y}.separate", y, shape),
        ops.release_names(f"{y}.separate", x),
    )


BUILDERS = {"stablelm": stablelm}
