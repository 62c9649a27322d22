"""Granite: Llama with embeddings, branches and logits multiplied by constants from the config."""

from __future__ import annotations

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.scaling import scaled_branch, scaled_embeddings, scaled_logits
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Run, Stack
from memplan.models.model import ModelSpec


def granite(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Granite.

    Multiplying by a constant keeps nothing, but input and output are alive together, so the logits exist twice.
    """
    bias = m.get("attention_bias", False)
    block = decoder_block(
        llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias),
        gated_mlp("n2", "mo", bias=m.get("mlp_bias", False)),
        scaled_branch,
        held=returned(wiring),
    )
    return Stack(before(wiring, embedded=scaled_embeddings()), (Run((block,), "L"),), scaled_logits(after(m, wiring)))


def granitemoe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Granite with experts, which both peft and bitsandbytes leave alone."""
    bias, name = m.get("attention_bias", False), "block_sparse_moe"
    routed = routers.late_softmax_router(f"{name}.router", "n2")
    expert_ops = experts.experts("n2", "mo", f"{name}.experts", gate_up=(), down=())
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias)
    block = decoder_block(heads, experts.mixture("n2", routed, expert_ops), scaled_branch, held=returned(wiring))
    return Stack(before(wiring, embedded=scaled_embeddings()), (Run((block,), "L"),), scaled_logits(after(m, wiring)))


BUILDERS = {"granite": granite, "granitemoe": granitemoe}
