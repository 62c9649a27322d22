"""Seed-OSS: Llama with biases on q, k and v, and dropout after the attention and after the MLP."""

from __future__ import annotations

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring
from memplan.catalogue.gpt import drops
from memplan.catalogue.llama import after, before, decoder_block, gated_mlp, llama_attention, returned, runs
from memplan.ir import Block, Op, Stack
from memplan.layers import Layer
from memplan.models import ModelSpec


def seed_oss(m: ModelSpec, wiring: Wiring) -> Stack:
    """The config says which projections have biases, and how much is dropped.

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
