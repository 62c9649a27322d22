"""Decoders whose MLPs are mixtures of experts, and which are Llama or one of its like else."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.decoder.attention import llama_attention
from memplan.catalogue.decoder.frame import after, before, decoder_block, returned, runs
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.decoder.rotation import attend_heads_first, partly_rotated
from memplan.catalogue.decoder.rotation_fp32 import rope_in_fp32
from memplan.catalogue.experts import expert_loops, experts, routers
from memplan.catalogue.experts.experts import mixture
from memplan.catalogue.families.llama import llama, rope_and_norm
from memplan.catalogue.families.stablelm import layer_norm
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Block, Keep, Op, Scratch, Stack, Tensor
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

X, Y = "n2", "mo"  # what an MLP reads and writes
Ffn = Callable[[Layer], tuple[Op, ...]]


def either(of_experts: tuple[Op, ...]) -> Ffn:
    """A layer's MLP: the mixture, or a dense one where the layer has no experts."""
    return lambda layer: of_experts if layer.ffn == "experts" else gated_mlp(X, Y)


def before_5(m: ModelSpec) -> bool:
    """Whether experts are modules, as a version before transformers 5 has them."""
    return m.get("experts_implementation", "") == "modules"


def _modules(
    m: ModelSpec,
    normalise: bool,
    y: str = Y,
    name: str = "mlp",
    roles: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Op, ...]:
    """Router and experts before transformers 5: linear layers all."""
    sizes, (gate, up, down) = m.axes(), roles
    return (
        *routers.softmax_router(f"{name}.gate", X, normalise, stands_for=(), module=True),
        *expert_loops.added(X, y, expert_loops.experts_of(m), sizes["e"], f"{name}.experts", (gate, up, down)),
        *((ops.leave(*routers.HELD, X),) if y == Y else ()),
    )


def mixtral(m: ModelSpec, wiring: Wiring) -> Stack:
    """Scores stay fp32, and so do the weighed rows and their sums."""
    if before_5(m):
        return llama(m, wiring, mlp=either(_modules(m, True, name="block_sparse_moe", roles=("w1", "w3", "w2"))))
    x, noise = _noisy(m)
    routed = routers.softmax_router("mlp.gate", x, normalise=True, narrow=False, together=False)
    made = experts.experts(x, Y, gate_up=("w1", "w3"), down=("w2",))
    return llama(m, wiring, mlp=either((*noise, *mixture(X, routed, made))))


def _noisy(m: ModelSpec) -> tuple[str, tuple[Op, ...]]:
    """What router and experts read: where the config has noise for it, x times that."""
    if m.get("router_jitter_noise", 0.0) <= 0:
        return X, ()
    return "n2.noisy", routers.jitter("mlp.jitter", X, "n2.noisy")


def qwen3_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Qwen3 with experts."""
    normalise = m.get("norm_topk_prob", False)
    routed = routers.softmax_router("mlp.gate", X, normalise)
    bias = m.get("attention_bias", False)
    ffn = either(_modules(m, normalise) if before_5(m) else mixture(X, routed, experts.experts(X, Y)))
    return llama(m, wiring, bias=bias, out_bias=bias, qk_norm=True, mlp=ffn)


def qwen2_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Qwen2 with experts and a shared one, which a gate of its own scales. peft adapts linear layers alone.

    Where no window is used, the class has one of 0 tokens, and makes that mask for no layer.
    Source: transformers 5.24 models/qwen2_moe/configuration_qwen2_moe.py.
    """
    old, normalise = before_5(m), m.get("norm_topk_prob", False)
    shared = gated_mlp(X, "shared.whole", "mlp.shared_expert", width="fs", flat=True)
    routed = routers.softmax_router("mlp.gate", X, normalise, stands_for=())
    now = mixture(X, routed, experts.experts(X, "routed", gate_up=(), down=()), leaves=False)
    ffn = (
        *((*_modules(m, normalise, "routed"), *shared) if old else (*shared, *now)),
        ops.linear("mlp.shared_expert_gate", X, "shared.gate", "1", "h", "mlp", flat=True),
        routers.sigmoid("mlp.shared_expert_gate.sigmoid", "shared.gate", "shared.share", "b s 1"),
        _scaled("mlp.shared_expert_gate.product", "shared.share", "shared.whole", "shared"),
        ops.leave("shared.whole"),
        ops.add("mlp.add", "routed", "shared", Y, "b s h"),
        ops.leave("routed", "shared", *routers.HELD, X),
    )
    made = llama(m, wiring, bias=m.get("qkv_bias", True), mixed=True, mlp=either(ffn))
    if m.sliding_window is not None or old:
        return made
    unused, kinds = wiring._replace(windowed=True), (False, True)
    return made._replace(before=before(unused, kinds), after=after(m, unused, kinds))


def _scaled(name: str, share: str, x: str, y: str) -> Op:
    """A row times its number: the product with x is made whole before it is summed for the number."""
    return Op(
        name,
        (share, x),
        (Tensor(y, "b s h"),),
        (),
        (Keep(x, share), Keep(share, x)),
        scratch_back=(Scratch(Tensor("product", "b s h", f"={y}"), share, summed=True),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )


def olmoe(m: ModelSpec, wiring: Wiring) -> Stack:
    """q and k are normalised across all heads."""
    if m.get("clip_qkv", 0.0) > 0:
        raise UnsupportedModelError("clip_qkv: is not supported yet for olmoe", "clip_qkv")
    bias = m.get("attention_bias", False)
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, whole_norm=True)
    routed = routers.softmax_router("mlp.gate", X, normalise=m.get("norm_topk_prob", False))
    made = mixture(X, routed, experts.experts(X, Y))
    if before_5(m):
        made = _modules(m, m.get("norm_topk_prob", False))
    block = decoder_block(heads, made, held=returned(wiring))
    return Stack(before(wiring), runs(m, lambda _: block), after(m, wiring))


def _partial_rope(m: ModelSpec) -> Callable[[str, str, str], tuple[Op, ...]]:
    return lambda name, q, k: (*partly_rotated(name, q, k, m.rotary_width < m.head_dim), ops.leave(q, k))


def minimax_m2(m: ModelSpec, wiring: Wiring) -> Stack:
    """OLMoE's norms, a part of each head rotated, and scores that are sigmoids."""
    heads = llama_attention(m, wiring, "n1", "ao", whole_norm=True, turn=_partial_rope(m), attend=attend_heads_first)
    x, noise = _noisy(m)
    routed = routers.sigmoid_router("mlp.gate", x, "mlp.e_score_correction_bias")
    made = experts.experts(x, Y, gate_up=("w1", "w3"), down=("w2",))
    block = decoder_block(heads, (*noise, *mixture(X, routed, made)), held=returned(wiring))
    return Stack(before(wiring), runs(m, lambda _: block), after(m, wiring))


def glm4_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Dense layers first; then experts and shared ones, a router in fp32, and a part of each head rotated."""
    routed = routers.grouped_router("mlp.gate", X, m.get("norm_topk_prob", True))
    ffn = either(
        (
            *mixture(X, routed, experts.experts(X, "routed"), leaves=False),
            *gated_mlp(X, "shared", "mlp.shared_experts", width="fs"),
            ops.add("mlp.add", "routed", "shared", Y, "b s h"),
            ops.leave("routed", "shared", *routers.HELD, X),
        )
    )
    heads = llama_attention(
        m,
        wiring,
        "n1",
        "ao",
        bias=m.get("attention_bias", False),
        qk_norm=m.get("use_qk_norm", False),
        turn=_partial_rope(m),
        attend=attend_heads_first,
    )
    return Stack(
        before(wiring),
        runs(m, lambda layer: decoder_block(heads, ffn(layer), held=returned(wiring))),
        after(m, wiring),
    )


def phimoe(m: ModelSpec, wiring: Wiring) -> Stack:
    """LayerNorms, and a router that draws. Noise on the input, where there is any, is multiplied in place, twice."""
    bias, sliding = m.get("attention_bias", False), (m.sliding_window is not None,)
    noisy = m.get("input_jitter_noise", 0.0) > 0
    x, seen = ("n2.noisy", "n2.noisier") if noisy else (X, X)
    ffn = (
        *(routers.jitter("mlp.jitter", X, x) if noisy else ()),
        *(routers.jitter("mlp.router.jitter", x, seen) if noisy else ()),
        *mixture(X, routers.sparse_mixer("mlp.router", seen), experts.experts(seen, Y, gate_up=(), down=())),
    )
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, sliding=sliding[0])
    block = decoder_block(heads, ffn, norm=layer_norm, held=returned(wiring))
    last = after(m, wiring, sliding, m.get("lm_head_bias", False), layer_norm)
    return Stack(before(wiring, sliding), runs(m, lambda _: block), last)


def ernie4_5_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Ernie 4.5 with experts, and shared ones whose sum is made first."""
    bias, wiring = m.get("use_bias", False), wiring._replace(drops=False)
    shared = gated_mlp(X, "shared", "mlp.shared_experts", width="fs", bias=bias, flat=True)
    mixed = mixture(X, routers.biased_softmax_router("mlp.gate", X), experts.experts(X, "routed"), leaves=False)
    sparse = (
        *shared,
        *mixed,
        ops.add("mlp.add", "routed", "shared", Y, "b s h"),
        ops.leave("routed", "shared", *routers.HELD, X),
    )
    if not m.whole("moe_num_shared_experts", 2, least=0):
        sparse = mixture(X, routers.biased_softmax_router("mlp.gate", X), experts.experts(X, Y))
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, turn=rope_in_fp32)

    def block(layer: Layer) -> Block:
        ffn = sparse if layer.ffn == "experts" else gated_mlp(X, Y, bias=bias)
        return decoder_block(heads, ffn, held=returned(wiring))

    return Stack(before(wiring, table_dtype="fp32"), runs(m, block), after(m, wiring, bias=bias))


def hunyuan_v1_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Hunyuan with experts beside a shared MLP, and a router that is a linear layer in fp32.

    Source: transformers 5.24 models/hunyuan_v1_moe/modeling_hunyuan_v1_moe.py HunYuanMoEV1Gate.
    """
    name, bias = "mlp.gate.wg", m.get("attention_bias", False)
    product = routers.gate(name, "router.x", stands_for=(), matrix=True)
    weight = product.weights[0]._replace(dtype="fp32")
    routed = (
        ops.cast(f"{name}.float", X, "router.x", "b s h", f"={weight.name}"),
        product._replace(weights=(weight,)),
        ops.leave("router.x"),
        *ops.softmax(f"{name}.softmax", "router.logits", "router.probs", "b s E", "fp32"),
        routers.top_k(f"{name}.topk", "router.probs", "router.top"),
        *routers.normalised(f"{name}.normalise", "router.top", "router.normal"),
        ops.cast(f"{name}.cast", "router.normal", routers.SCORES, routers.PAIRS, "=router.logits"),
        ops.leave("router.probs"),
    )
    ffn = (
        *gated_mlp(X, "shared", "mlp.shared_mlp"),
        *mixture(X, routed, experts.experts(X, "routed"), leaves=False),
        ops.add("mlp.add", "routed", "shared", Y, "b s h"),
        ops.leave("routed", "shared", *routers.HELD, X),
    )
    return llama(m, wiring, bias=bias, out_bias=bias, turn=rope_and_norm, mlp=lambda _: ffn)


def deepseek(m: ModelSpec, wiring: Wiring) -> Stack:
    """DeepSeek-MoE, by the code published with it: dense layers first, then experts that are modules, and shared ones.

    Llama else. The loss of the router's own is a few numbers a sequence, and is not counted.
    """
    scores, top, shape = "router.probs", "router.top", "b s E"
    normalise = m.get("norm_topk_prob", False) and m.whole("num_experts_per_tok") > 1
    routed = (
        routers.gate("mlp.gate", X, stands_for=()),
        *ops.softmax("mlp.gate.softmax", "router.logits", scores, shape),
        routers.top_k("mlp.gate.topk", scores, top if normalise else routers.SCORES),
        *(routers.divided("mlp.gate.normalise", top, routers.SCORES) if normalise else ()),
        ops.leave("router.logits", scores),
    )
    sizes = m.axes()
    ffn = either(
        (
            *routed,
            *expert_loops.modules(X, "routed", expert_loops.experts_of(m), sizes["e"]),
            *gated_mlp(X, "shared", "mlp.shared_experts", width="fs"),
            ops.add("mlp.add", "routed", "shared", Y, "b s h"),
            ops.leave("routed", "shared", routers.SCORES, routers.CHOSEN, X),
        )
    )
    return llama(m, wiring, bias=m.get("attention_bias", False), out_bias=m.get("attention_bias", False), mlp=ffn)


BUILDERS = {
    "deepseek": deepseek,
    "ernie4_5_moe": ernie4_5_moe,
    "phimoe": phimoe,
    "glm4_moe": glm4_moe,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "minimax_m2": minimax_m2,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
}
