"""DeepSeek's mixtures of experts and models like them: latent attention, dense layers first, shared experts."""

from __future__ import annotations

from memplan.catalogue.attention import sparse_indexer as lightning
from memplan.catalogue.attention.latent import Turn, complex_pairs, complex_table, halves, latent_attention, pairs
from memplan.catalogue.decoder.frame import decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.experts.experts import mixture
from memplan.catalogue.families.minicpm3 import model_around
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Block, Op, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_V2 = "transformers 5.24 models/deepseek_v2/modeling_deepseek_v2.py DeepseekV2TopkRouter"


def feed(layer: Layer, routed: tuple[Op, ...], bias: bool = False) -> tuple[Op, ...]:
    """A layer's MLP: dense, or the routed experts plus the shared ones, which are computed as one."""
    if layer.ffn == "dense":
        return gated_mlp("n2", "mo", bias=bias)
    return (
        *mixture("n2", routed, experts.experts("n2", "routed"), leaves=False),
        *gated_mlp("n2", "shared", "mlp.shared_experts", bias, width="fs"),
        ops.add("mlp.add", "routed", "shared", "mo", "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, "n2"),
    )


def _softmax_router(name: str, x: str, limited: bool) -> tuple[Op, ...]:
    """Softmax over all experts, then the largest scores, scaled.

    `limited`: experts are selected from the best groups only; the scores of the other groups are set to 0.
    """
    shape, probs, top = "b s E", "router.probs", "router.top"
    scores = "router.limited" if limited else probs
    product = routers.gate(name, "router.x")
    groups = (
        Op(
            f"{name}.groups",
            (probs,),
            (Tensor("router.mask", shape, "fp32"),),
            scratch=(Tensor("groups", "b s G", "fp32"), Tensor("their best", "b s G", "int64")),
            gradient="none",
            source=_V2,
        ),
        Op(f"{name}.others", ("router.mask",), (Tensor("router.others", shape, "bool"),), gradient="none"),
        routers.masked(f"{name}.masked_fill", probs, "router.others", scores, shape),
        ops.release_names("router.others"),
    )
    return (
        ops.cast(f"{name}.float", x, "router.x", "b s h", "fp32"),
        product._replace(weights=(product.weights[0]._replace(dtype="fp32"),)),
        ops.release_names("router.x"),
        *ops.softmax(f"{name}.softmax", "router.logits", probs, shape, "fp32"),
        *(groups if limited else ()),
        routers.top_k(f"{name}.topk", scores, top),
        ops.scale(f"{name}.scale", top, routers.SCORES, routers.PAIRS),
        ops.release_names(probs, scores, top, *(("router.mask",) if limited else ())),
    )


def deepseek_v2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DeepSeek V2: complex rotation, and a softmax router."""
    bias = m.get("attention_bias", False)
    heads = latent_attention(m, wiring, "n1", "ao", complex_pairs, bias)
    routed = _softmax_router("mlp.gate", "n2", m.get("topk_method", "") == "group_limited_greedy")
    blocks = runs(
        m,
        lambda layer: decoder_block(heads, feed(layer, routed, m.get("mlp_bias", False)), held=returned(wiring)),
    )
    return model_around(m, wiring, blocks, table=complex_table())


def deepseek_v3(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DeepSeek V3 and R1, Kimi K2, Moonlight, GLM 4.7 Flash: sigmoid scores, and a bias that balances experts."""
    turn: Turn = pairs if m.get("rope_interleave", True) else halves
    heads = latent_attention(m, wiring, "n1", "ao", turn, m.get("attention_bias", False))
    routed = routers.grouped_router("mlp.gate", "n2", m.get("norm_topk_prob", True))
    return model_around(
        m, wiring, runs(m, lambda layer: decoder_block(heads, feed(layer, routed), held=returned(wiring)))
    )


def deepseek_v32(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DeepSeek V3.2, whose queries select the keys they attend to."""
    routed = routers.grouped_router("mlp.gate", "n2", m.get("norm_topk_prob", True))
    heads = _sparse_attention(m, wiring, lightning.indexer("self_attn", "n1", "q.normed", wiring, False))
    blocks = runs(m, lambda layer: decoder_block(heads, feed(layer, routed), held=returned(wiring)))
    return model_around(m, wiring, blocks, made=lightning.causal_mask(wiring))


def _sparse_attention(m: ModelSpec, wiring: Wiring, chosen: tuple[Op, ...], keeps: bool = False) -> tuple[Op, ...]:
    """Latent attention to the keys that `chosen` selects. `keeps`: the block returns the selection with its output."""
    sparse = (*chosen, *lightning.sparse_mask("self_attn", wiring))
    bias, held = m.get("attention_bias", False), () if keeps else (lightning.KEYS,)
    return latent_attention(m, wiring, "n1", "ao", pairs, bias, sparse=sparse, mask=lightning.MASK, held=held)


def glm_moe_dsa(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM 5: a layer returns the keys its queries selected, and some layers reuse the previous layer's selection.

    A checkpoint keeps the selection of every layer, which is not counted.
    """
    routed = routers.grouped_router("mlp.gate", "n2", m.get("norm_topk_prob", True))
    indexer = lightning.indexer("self_attn", "n1", "q.normed", wiring, True)

    def block(layer: Layer) -> Block:
        shared = layer.mixer == "shared"
        heads = _sparse_attention(m, wiring, () if shared else indexer, keeps=True)
        layer_block = decoder_block(heads, feed(layer, routed), held=returned(wiring))
        return layer_block._replace(ops=(*layer_block.ops, *lightning.handed_on())) if shared else layer_block

    model = model_around(m, wiring, runs(m, block), made=lightning.causal_mask(wiring))
    return model._replace(after=(*model.after[:-1], ops.release_names(lightning.KEYS), model.after[-1]))


BUILDERS = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "deepseek_v32": deepseek_v32,
    "glm4_moe_lite": deepseek_v3,
    "glm_moe_dsa": glm_moe_dsa,
}
