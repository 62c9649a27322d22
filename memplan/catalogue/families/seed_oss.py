"""Seed-OSS: Llama with biases on q, k and v, and dropout after the attention and after the MLP."""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import drops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def seed_oss(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Seed-OSS. The config says which projections have biases, and the dropout probability.

    Source: transformers 5.24 models/seed_oss/modeling_seed_oss.py SeedOssAttention, SeedOssMLP.
    """
    bias, out_bias = m.get("attention_bias", False), m.get("attention_out_bias", False)

    def dropped(name: str, x: str, y: str) -> tuple[Op, ...]:
        return (ops.dropout(f"{name}.residual_dropout", x, y, "b s h"),)

    def block(layer: Layer) -> Block:
        heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=out_bias)
        return decoder_block(
            heads,
            gated_mlp("n2", "mo", bias=m.get("mlp_bias", False)),
            dropped if drops(m, "residual_dropout") else None,
            held=returned(wiring),
        )

    return Stack(before(wiring), runs(m, block), after(m, wiring))


BUILDERS = {"seed_oss": seed_oss}
