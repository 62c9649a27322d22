"""GLM-4: Llama with gate and up in one projection, and heads rotated in part and pair by pair."""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import fused_mlp
from memplan.catalogue.decoder.rotation import attend_heads_first, partly_rotated
from memplan.catalogue.decoder.windows import after, before, normed_block, renamed, tables
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Op, Stack
from memplan.models.model import ModelSpec


def glm(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM-4 9B in Llama's frame."""
    block = decoder_block(_attention(m, wiring), fused_mlp("n2", "mo"), held=returned(wiring))
    return Stack(before(wiring, False, tables()), runs(m, lambda _: block), after(m, wiring, False))


def glm4(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM-4-0414, which also has norms at the end of the branches."""
    block = normed_block(
        _attention(m, wiring),
        fused_mlp("n2", "mo"),
        ops.rms_norm,
        ("input_layernorm", "post_attention_layernorm"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
        returned(wiring),
    )
    return Stack(before(wiring, False, tables()), runs(m, lambda _: block), after(m, wiring, False))


def _attention(m: ModelSpec, wiring: Wiring) -> tuple[Op, ...]:
    partial = m.rotary_width < m.head_dim

    def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
        """Rotate q and k. Every layer repeats cos and sin for each pair, and keeps the copies."""
        turned = partly_rotated(name, q, k, partial)
        return (
            ops.copy(f"{name}.pairs_of_cos", "cos", "cos.pairs", "s rot"),
            ops.copy(f"{name}.pairs_of_sin", "sin", "sin.pairs", "s rot"),
            *renamed(turned, {"cos": "cos.pairs", "sin": "sin.pairs"}),
            ops.release_names("cos.pairs", "sin.pairs"),
            ops.release_names(q, k),
        )

    return llama_attention(
        m, wiring, "n1", "ao", bias=m.get("attention_bias", False), turn=rope, attend=attend_heads_first
    )


BUILDERS = {"glm": glm, "glm4": glm4}
