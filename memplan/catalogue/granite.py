"""Granite: Llama whose embeddings, branches and logits are multiplied by numbers of the config."""

from __future__ import annotations

from memplan.catalogue import experts, ops, routers
from memplan.catalogue.attention import Wiring
from memplan.catalogue.llama import after, before, decoder_block, gated_mlp, llama_attention, returned
from memplan.ir import Op, Run, Stack
from memplan.models import ModelSpec


def granite(m: ModelSpec, wiring: Wiring) -> Stack:
    """A product with a number keeps nothing, but its input and output are alive together: so are two logits."""
    bias = m.get("attention_bias", False)
    block = decoder_block(
        llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias),
        gated_mlp("n2", "mo", bias=m.get("mlp_bias", False)),
        scaled_branch,
        held=returned(wiring),
    )
    return Stack(before(wiring, embedded=scaled_embeddings()), (Run((block,), "L"),), scaled_logits(after(m, wiring)))


def scaled_embeddings() -> tuple[Op, ...]:
    return (
        ops.embedding("model.embed_tokens", "ids", "unscaled_embeds", "v", "h"),
        ops.scale("embedding_multiplier", "unscaled_embeds", "embeds", "b s h"),
    )


def scaled_branch(name: str, x: str, y: str) -> tuple[Op, ...]:
    return (ops.scale(f"{name}.residual_multiplier", x, y, "b s h"),)


def scaled_logits(last: tuple[Op, ...]) -> tuple[Op, ...]:
    """`last` ends with the output projection; its result is divided before the loss."""
    projection = last[-1]
    unscaled = projection._replace(writes=(projection.writes[0]._replace(name="unscaled_logits"),))
    return (*last[:-1], unscaled, ops.scale("logits_scaling", "unscaled_logits", "logits", "b s v"))


def granitemoe(m: ModelSpec, wiring: Wiring) -> Stack:
    """The same with experts, which peft and bitsandbytes both pass over."""
    bias, name = m.get("attention_bias", False), "block_sparse_moe"
    routed = routers.late_softmax_router(f"{name}.router", "n2")
    made = experts.experts("n2", "mo", f"{name}.experts", gate_up=(), down=())
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias)
    block = decoder_block(heads, experts.mixture("n2", routed, made), scaled_branch, held=returned(wiring))
    return Stack(before(wiring, embedded=scaled_embeddings()), (Run((block,), "L"),), scaled_logits(after(m, wiring)))


BUILDERS = {"granite": granite, "granitemoe": granitemoe}
