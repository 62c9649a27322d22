"""DeepSeek's mixtures of experts and models like them: latent attention, dense layers first, shared experts."""

from __future__ import annotations

from memplan.catalogue.attention import sparse_indexer as lightning
from memplan.catalogue.attention.latent import complex_pairs, complex_table, halves, latent_attention, pairs
from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation import scaled_queries
from memplan.catalogue.experts import routers
from memplan.catalogue.families.mixtures import sigmoid_mixture, with_shared_experts
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec


def _complex_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    return latent_attention(m, wiring, complex_pairs)


def _softmax_mixture(m: ModelSpec) -> tuple[Op, ...]:
    limited = m.get("topk_method", "") == "group_limited_greedy"
    return with_shared_experts(routers.scaled_softmax_router("mlp.gate", "n2", limited), m.get("mlp_bias", False))


def deepseek_v2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DeepSeek V2: complex rotation, and a softmax router."""
    row = Decoder(attention=_complex_attention, mlp_bias="mlp_bias", experts=_softmax_mixture)
    first, last = before(wiring, table=complex_table()), after(m, wiring, table=("turns",))
    return decoder(m, wiring, row)._replace(before=first, after=last)


def _rotated_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    return latent_attention(m, wiring, pairs if m.get("rope_interleave", True) else halves)


# DeepSeek V3 and R1, Kimi K2, Moonlight, GLM 4.7 Flash: sigmoid scores, and a bias that balances experts.
DEEPSEEK_V3 = Decoder(attention=_rotated_attention, experts=sigmoid_mixture)


def _scaled_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    rotate = pairs if m.get("rope_interleave", True) else halves
    return latent_attention(m, wiring, rotate, scaled=scaled_queries("self_attn"))


def _grouped_softmax_mixture(m: ModelSpec) -> tuple[Op, ...]:
    router = routers.grouped_softmax_router("mlp.gate", "n2", m.get("norm_topk_prob", True))
    return with_shared_experts(router, adapted=False)


def _indexed_attention(m: ModelSpec, wiring: Wiring, layer: Layer) -> tuple[Op, ...]:
    return _sparse_attention(m, wiring, lightning.indexer("self_attn", "n1", "q.normed", wiring, False))


def deepseek_v32(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DeepSeek V3.2, whose queries select the keys they attend to."""
    stack, made = decoder(m, wiring, DEEPSEEK_V3._replace(attention=_indexed_attention)), lightning.causal_mask(wiring)
    return stack._replace(before=before(wiring, made=made), after=after(m, wiring, made=made))


def _sparse_attention(m: ModelSpec, wiring: Wiring, chosen: tuple[Op, ...], keeps: bool = False) -> tuple[Op, ...]:
    """Latent attention to the keys that `chosen` selects. `keeps`: the block returns the selection with its output."""
    sparse = (*chosen, *lightning.sparse_mask("self_attn", wiring))
    held = () if keeps else (lightning.KEYS,)
    return latent_attention(m, wiring, pairs, sparse=sparse, mask=lightning.MASK, held=held)


def glm_moe_dsa(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM 5: a layer returns the keys its queries selected, and some reuse the previous layer's selection."""
    indexer = lightning.indexer("self_attn", "n1", "q.normed", wiring, True)
    mixture, made = sigmoid_mixture(m), lightning.causal_mask(wiring)

    def block(layer: Layer) -> Block:
        shared, mlp = layer.mixer == "shared", mixture if layer.ffn == "experts" else gated_mlp("n2", "mo")
        heads = _sparse_attention(m, wiring, () if shared else indexer, keeps=True)
        held = (*returned(wiring), *(() if shared else (lightning.KEYS,)))
        return decoder_block(heads, mlp, held=held)._replace(passed=(lightning.KEYS,))

    *last, head = after(m, wiring, made=made)
    return Stack(before(wiring, made=made), runs(m, block), (*last, ops.release_names(lightning.KEYS), head))


def _normed_mixture(m: ModelSpec) -> tuple[Op, ...]:
    """DeepSeek V3's mixture, whose module ends with a norm."""
    mixed = renamed(sigmoid_mixture(m, adapted=False), {"mo": "mixed"})
    return (*mixed, *ops.rms_norm("mlp.post_mlp_layernorm", "mixed", "mo", "b s h", "h"))


BUILDERS = {
    "axk1": DEEPSEEK_V3._replace(experts=_normed_mixture),
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": deepseek_v32,
    "glm4_moe_lite": DEEPSEEK_V3,
    "glm_moe_dsa": glm_moe_dsa,
    "mistral4": Decoder(attention=_scaled_attention, experts=_grouped_softmax_mixture),
    "youtu": DEEPSEEK_V3,
}
