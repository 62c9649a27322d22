"""Decoders whose MLPs are mixtures of experts, and which otherwise follow Llama or a family like it."""

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

X, Y = "n2", "mo"  # names of what an MLP reads and writes
Ffn = Callable[[Layer], tuple[Op, ...]]


def mlp_by_layer(of_experts: tuple[Op, ...]) -> Ffn:
    """Return the builder of a layer's MLP: the mixture, or a dense MLP if the layer has no experts."""
    return lambda layer: of_experts if layer.ffn == "experts" else gated_mlp(X, Y)


def before_5(m: ModelSpec) -> bool:
    """Whether experts are separate modules, as in versions of transformers before 5."""
    return m.get("experts_implementation", "") == "modules"


def _modules(
    m: ModelSpec,
    normalise: bool,
    y: str = Y,
    name: str = "mlp",
    roles: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Op, ...]:
    """Router and experts before transformers 5, when all of them were linear layers."""
    sizes, (gate, up, down) = m.axes(), roles
    return (
        *routers.softmax_router(f"{name}.gate", X, normalise, stands_for=(), module=True),
        *expert_loops.added(X, y, expert_loops.experts_of(m), sizes["e"], f"{name}.experts", (gate, up, down)),
        *((ops.release_names(*routers.HELD, X),) if y == Y else ()),
    )


def mixtral(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Mixtral. Scores stay in fp32, and so do the weighted expert outputs and their sums."""
    if before_5(m):
        return llama(m, wiring, mlp=mlp_by_layer(_modules(m, True, name="block_sparse_moe", roles=("w1", "w3", "w2"))))
    x, noise = _noisy(m)
    routed = routers.softmax_router("mlp.gate", x, normalise=True, narrow=False, together=False)
    expert_ops = experts.experts(x, Y, gate_up=("w1", "w3"), down=("w2",))
    return llama(m, wiring, mlp=mlp_by_layer((*noise, *mixture(X, routed, expert_ops))))


def _noisy(m: ModelSpec) -> tuple[str, tuple[Op, ...]]:
    """Return the name of what router and experts read, and the ops that make it: x, times noise if configured."""
    if m.get("router_jitter_noise", 0.0) <= 0:
        return X, ()
    return "n2.noisy", routers.jitter("mlp.jitter", X, "n2.noisy")


def qwen3_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Qwen3 with experts."""
    normalise = m.get("norm_topk_prob", False)
    routed = routers.softmax_router("mlp.gate", X, normalise)
    bias = m.get("attention_bias", False)
    ffn = mlp_by_layer(_modules(m, normalise) if before_5(m) else mixture(X, routed, experts.experts(X, Y)))
    return llama(m, wiring, bias=bias, out_bias=bias, qk_norm=True, mlp=ffn)


def qwen2_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Qwen2 with experts and a shared expert that a separate gate scales. peft adapts only linear layers.

    If no sliding window is used, the config class has a window of 0 tokens, and makes the mask for it although no layer
    reads it. Source: transformers 5.24 models/qwen2_moe/configuration_qwen2_moe.py.
    """
    uses_modules, normalise = before_5(m), m.get("norm_topk_prob", False)
    shared = gated_mlp(X, "shared.whole", "mlp.shared_expert", width="fs", flat=True)
    routed = routers.softmax_router("mlp.gate", X, normalise, stands_for=())
    mixture_ops = mixture(X, routed, experts.experts(X, "routed", gate_up=(), down=()), leaves=False)
    ffn = (
        *((*_modules(m, normalise, "routed"), *shared) if uses_modules else (*shared, *mixture_ops)),
        ops.linear("mlp.shared_expert_gate", X, "shared.gate", "1", "h", "mlp", flat=True),
        routers.sigmoid("mlp.shared_expert_gate.sigmoid", "shared.gate", "shared.share", "b s 1"),
        _scaled("mlp.shared_expert_gate.product", "shared.share", "shared.whole", "shared"),
        ops.release_names("shared.whole"),
        ops.add("mlp.add", "routed", "shared", Y, "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, X),
    )
    stack = llama(m, wiring, bias=m.get("qkv_bias", True), mixed=True, mlp=mlp_by_layer(ffn))
    if m.sliding_window is not None or uses_modules:
        return stack
    unused, kinds = wiring._replace(windowed=True), (False, True)
    return stack._replace(before=before(unused, kinds), after=after(m, unused, kinds))


def _scaled(name: str, share: str, x: str, y: str) -> Op:
    """Multiply each row by its number. The product for that number's gradient is materialised before it is summed."""
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
    """Build OLMoE, which normalises q and k across all heads."""
    if m.get("clip_qkv", 0.0) > 0:
        raise UnsupportedModelError("clip_qkv: is not supported yet for olmoe", "clip_qkv")
    bias = m.get("attention_bias", False)
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, whole_norm=True)
    routed = routers.softmax_router("mlp.gate", X, normalise=m.get("norm_topk_prob", False))
    mixture_ops = mixture(X, routed, experts.experts(X, Y))
    if before_5(m):
        mixture_ops = _modules(m, m.get("norm_topk_prob", False))
    block = decoder_block(heads, mixture_ops, held=returned(wiring))
    return Stack(before(wiring), runs(m, lambda _: block), after(m, wiring))


def _partial_rope(m: ModelSpec) -> Callable[[str, str, str], tuple[Op, ...]]:
    return lambda name, q, k: (*partly_rotated(name, q, k, m.rotary_width < m.head_dim), ops.release_names(q, k))


def minimax_m2(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build MiniMax-M2: OLMoE's norms, partly rotated heads, and sigmoid scores."""
    heads = llama_attention(m, wiring, "n1", "ao", whole_norm=True, turn=_partial_rope(m), attend=attend_heads_first)
    x, noise = _noisy(m)
    routed = routers.sigmoid_router("mlp.gate", x, "mlp.e_score_correction_bias")
    expert_ops = experts.experts(x, Y, gate_up=("w1", "w3"), down=("w2",))
    block = decoder_block(heads, (*noise, *mixture(X, routed, expert_ops)), held=returned(wiring))
    return Stack(before(wiring), runs(m, lambda _: block), after(m, wiring))


def glm4_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM-4 MoE: dense layers first, then routed and shared experts; an fp32 router, and partly rotated heads."""
    routed = routers.grouped_router("mlp.gate", X, m.get("norm_topk_prob", True))
    ffn = mlp_by_layer(
        (
            *mixture(X, routed, experts.experts(X, "routed"), leaves=False),
            *gated_mlp(X, "shared", "mlp.shared_experts", width="fs"),
            ops.add("mlp.add", "routed", "shared", Y, "b s h"),
            ops.release_names("routed", "shared", *routers.HELD, X),
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
    """Build Phi-3.5-MoE: LayerNorms, and a router that samples.

    If the config has input noise, the input is multiplied by it in place, twice.
    """
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
    """Build Ernie 4.5 with experts. Shared experts, if any, are computed first."""
    bias, wiring = m.get("use_bias", False), wiring._replace(drops=False)
    shared = gated_mlp(X, "shared", "mlp.shared_experts", width="fs", bias=bias, flat=True)
    mixed = mixture(X, routers.biased_softmax_router("mlp.gate", X), experts.experts(X, "routed"), leaves=False)
    sparse = (
        *shared,
        *mixed,
        ops.add("mlp.add", "routed", "shared", Y, "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, X),
    )
    if not m.config_int("moe_num_shared_experts", 2, least=0):
        sparse = mixture(X, routers.biased_softmax_router("mlp.gate", X), experts.experts(X, Y))
    heads = llama_attention(m, wiring, "n1", "ao", bias=bias, out_bias=bias, turn=rope_in_fp32)

    def block(layer: Layer) -> Block:
        ffn = sparse if layer.ffn == "experts" else gated_mlp(X, Y, bias=bias)
        return decoder_block(heads, ffn, held=returned(wiring))

    return Stack(before(wiring, table_dtype="fp32"), runs(m, block), after(m, wiring, bias=bias))


def hunyuan_v1_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Hunyuan with experts next to a shared MLP. Its router is a linear layer in fp32.

    Source: transformers 5.24 models/hunyuan_v1_moe/modeling_hunyuan_v1_moe.py HunYuanMoEV1Gate.
    """
    name, bias = "mlp.gate.wg", m.get("attention_bias", False)
    product = routers.gate(name, "router.x", stands_for=(), matrix=True)
    weight = product.weights[0]._replace(dtype="fp32")
    routed = (
        ops.cast(f"{name}.float", X, "router.x", "b s h", f"={weight.name}"),
        product._replace(weights=(weight,)),
        ops.release_names("router.x"),
        *ops.softmax(f"{name}.softmax", "router.logits", "router.probs", "b s E", "fp32"),
        routers.top_k(f"{name}.topk", "router.probs", "router.top"),
        *routers.normalised(f"{name}.normalise", "router.top", "router.normal"),
        ops.cast(f"{name}.cast", "router.normal", routers.SCORES, routers.PAIRS, "=router.logits"),
        ops.release_names("router.probs"),
    )
    ffn = (
        *gated_mlp(X, "shared", "mlp.shared_mlp"),
        *mixture(X, routed, experts.experts(X, "routed"), leaves=False),
        ops.add("mlp.add", "routed", "shared", Y, "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, X),
    )
    return llama(m, wiring, bias=bias, out_bias=bias, turn=rope_and_norm, mlp=lambda _: ffn)


def deepseek(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build DeepSeek-MoE from its published code: dense layers first, then experts as modules, and shared experts.

    Everything else is Llama. The router's auxiliary loss is a few numbers per sequence, and is not counted.
    """
    scores, top, shape = "router.probs", "router.top", "b s E"
    normalise = m.get("norm_topk_prob", False) and m.config_int("num_experts_per_tok") > 1
    routed = (
        routers.gate("mlp.gate", X, stands_for=()),
        *ops.softmax("mlp.gate.softmax", "router.logits", scores, shape),
        routers.top_k("mlp.gate.topk", scores, top if normalise else routers.SCORES),
        *(routers.divided("mlp.gate.normalise", top, routers.SCORES) if normalise else ()),
        ops.release_names("router.logits", scores),
    )
    sizes = m.axes()
    ffn = mlp_by_layer(
        (
            *routed,
            *expert_loops.modules(X, "routed", expert_loops.experts_of(m), sizes["e"]),
            *gated_mlp(X, "shared", "mlp.shared_experts", width="fs"),
            ops.add("mlp.add", "routed", "shared", Y, "b s h"),
            ops.release_names("routed", "shared", routers.SCORES, routers.CHOSEN, X),
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
