"""Decoders with mixtures of experts that otherwise follow Llama or a family like it: one row a family.

The function of a family's `experts` returns the operations of a layer's mixture, from `n2` to `mo`.
"""

from __future__ import annotations

from memplan.catalogue.decoder.decoder import Decoder, decoder
from memplan.catalogue.decoder.frame import BOTH, after, before
from memplan.catalogue.decoder.mlp import fused_mlp, gated_mlp
from memplan.catalogue.decoder.norms import layer_norm
from memplan.catalogue.decoder.rotation import attend_heads_first, partial_rope, rope_and_norm
from memplan.catalogue.experts import expert_loops, experts, routers
from memplan.catalogue.experts.experts import mixture
from memplan.catalogue.families.dense import COHERE_2, ERNIE, GRANITE, LLAMA, QWEN_2, QWEN_3
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.rewriting import renamed
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import UnsupportedModelError
from memplan.core.ir import Op, Stack
from memplan.models.model import ModelSpec

X, Y = "n2", "mo"  # names of what an MLP reads and writes


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


def _noisy(m: ModelSpec) -> tuple[str, tuple[Op, ...]]:
    """Return the name of what router and experts read, and the ops that make it: x, times noise if configured."""
    if m.get("router_jitter_noise", 0.0) <= 0:
        return X, ()
    return "n2.noisy", routers.jitter("mlp.jitter", X, "n2.noisy")


def _added(held: tuple[str, ...] = (*routers.HELD, X)) -> tuple[Op, ...]:
    """Add the shared experts' output to the routed experts'."""
    return (ops.add("mlp.add", "routed", "shared", Y, "b s h"), ops.release_names("routed", "shared", *held))


def _mixtral(m: ModelSpec) -> tuple[Op, ...]:
    """Mixtral's mixture. Scores stay in fp32, and so do the weighted expert outputs and their sums."""
    if before_5(m):
        return _modules(m, True, name="block_sparse_moe", roles=("w1", "w3", "w2"))
    x, noise = _noisy(m)
    routed = routers.softmax_router("mlp.gate", x, normalise=True, narrow=False, together=False)
    return (*noise, *mixture(X, routed, experts.experts(x, Y, gate_up=("w1", "w3"), down=("w2",))))


def softmax_mixture(m: ModelSpec) -> tuple[Op, ...]:
    """The mixture of Qwen3 and OLMoE."""
    normalise = m.get("norm_topk_prob", False)
    if before_5(m):
        return _modules(m, normalise)
    return mixture(X, routers.softmax_router("mlp.gate", X, normalise), experts.experts(X, Y))


def qwen2_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Qwen2 with experts.

    If no sliding window is used, the config class has a window of 0 tokens, and makes the mask for it although no layer
    reads it. Source: transformers 5.24 models/qwen2_moe/configuration_qwen2_moe.py.
    """
    row = QWEN_2._replace(bias=m.get("qkv_bias", True), mlp_bias=False, experts=_qwen2)
    stack = decoder(m, wiring, row)
    if m.sliding_window is not None or before_5(m):
        return stack
    unused = wiring._replace(windowed=True)
    return stack._replace(before=before(unused, BOTH), after=after(m, unused, BOTH))


def _qwen2(m: ModelSpec) -> tuple[Op, ...]:
    """Qwen2's mixture, with a shared expert that a separate gate scales. peft adapts only linear layers."""
    n, normalise = "mlp.shared_expert_gate", m.get("norm_topk_prob", False)
    shared = gated_mlp(X, "shared.whole", "mlp.shared_expert", width="fs", flat=True)
    routed = routers.softmax_router("mlp.gate", X, normalise, stands_for=())
    mixture_ops = mixture(X, routed, experts.experts(X, "routed", gate_up=(), down=()), leaves=False)
    return (
        *((*_modules(m, normalise, "routed"), *shared) if before_5(m) else (*shared, *mixture_ops)),
        ops.linear(n, X, "shared.gate", "1", "h", "mlp", flat=True),
        routers.sigmoid(f"{n}.sigmoid", "shared.gate", "shared.share", "b s 1"),
        ops.spread(f"{n}.product", "shared.whole", "shared.share", "shared", "b s h", summed=True, small_first=True),
        ops.release_names("shared.whole"),
        *_added(),
    )


def olmoe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build OLMoE, which normalises q and k across all heads."""
    if m.get("clip_qkv", 0.0) > 0:
        raise UnsupportedModelError("clip_qkv: is not supported yet for olmoe", "clip_qkv")
    return decoder(m, wiring, LLAMA._replace(qk_norm="all", experts=softmax_mixture))


def _minimax_m2(m: ModelSpec) -> tuple[Op, ...]:
    x, noise = _noisy(m)
    routed = routers.sigmoid_router("mlp.gate", x, "mlp.e_score_correction_bias")
    return (*noise, *mixture(X, routed, experts.experts(x, Y, gate_up=("w1", "w3"), down=("w2",))))


def glm4_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build GLM-4 MoE: dense layers first, and partly rotated heads."""
    row = Decoder(
        bias="attention_bias",
        qk_norm="each" if m.get("use_qk_norm", False) else "",
        rotate=partial_rope,
        attend=attend_heads_first,
        experts=sigmoid_mixture,
    )
    return decoder(m, wiring, row)


def sigmoid_mixture(m: ModelSpec, adapted: bool = True) -> tuple[Op, ...]:
    """The mixture of GLM-4 and DeepSeek V3: an fp32 router of sigmoids, routed and shared experts."""
    return with_shared_experts(routers.grouped_router("mlp.gate", X, m.get("norm_topk_prob", True)), adapted=adapted)


def with_shared_experts(routed: tuple[Op, ...], bias: bool = False, adapted: bool = True) -> tuple[Op, ...]:
    """Return routed experts plus the shared ones, computed as one. `adapted`: peft knows the router and routed ones."""
    stacks = experts.experts(X, "routed") if adapted else experts.experts(X, "routed", gate_up=(), down=())
    return (
        *mixture(X, routed if adapted else routers.without_adapter_targets(routed), stacks, leaves=False),
        *gated_mlp(X, "shared", "mlp.shared_experts", bias, width="fs"),
        *_added(),
    )


def _phimoe(m: ModelSpec) -> tuple[Op, ...]:
    """Phi-3.5's mixture, whose router samples.

    If the config has input noise, the input is multiplied by it in place, twice.
    """
    noisy = m.get("input_jitter_noise", 0.0) > 0
    x, seen = ("n2.noisy", "n2.noisier") if noisy else (X, X)
    return (
        *(routers.jitter("mlp.jitter", X, x) if noisy else ()),
        *(routers.jitter("mlp.router.jitter", x, seen) if noisy else ()),
        *mixture(X, routers.sparse_mixer("mlp.router", seen), experts.experts(seen, Y, gate_up=(), down=())),
    )


def _ernie4_5(m: ModelSpec) -> tuple[Op, ...]:
    """Ernie 4.5's mixture. Shared experts, if any, are computed first."""
    routed = routers.biased_softmax_router("mlp.gate", X)
    if not m.config_int("moe_num_shared_experts", 2, least=0):
        return mixture(X, routed, experts.experts(X, Y))
    return (
        *gated_mlp(X, "shared", "mlp.shared_experts", width="fs", bias=m.get("use_bias", False), flat=True),
        *mixture(X, routed, experts.experts(X, "routed"), leaves=False),
        *_added(),
    )


def ernie4_5_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Ernie 4.5 with experts. Its attention never applies dropout."""
    return decoder(m, wiring._replace(drops=False), ERNIE._replace(experts=_ernie4_5, head_bias="use_bias"))


def _hunyuan(m: ModelSpec) -> tuple[Op, ...]:
    """Hunyuan's mixture next to a shared MLP. Its router is a linear layer in fp32.

    Source: transformers 5.24 models/hunyuan_v1_moe/modeling_hunyuan_v1_moe.py HunYuanMoEV1Gate.
    """
    name = "mlp.gate.wg"
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
    return (
        *gated_mlp(X, "shared", "mlp.shared_mlp"),
        *mixture(X, routed, experts.experts(X, "routed"), leaves=False),
        *_added(),
    )


def _hunyuan_3(m: ModelSpec) -> tuple[Op, ...]:
    """Hunyuan 3's mixture, which adds shared experts in fp32 unless the config says otherwise."""
    bias, shared = m.get("mlp_bias", False), "mlp.shared_experts"
    routed = routers.scaled_sigmoid_router(
        "mlp.gate", X, "mlp.e_score_correction_bias", True, routers.fp32_gate("mlp.gate", X)
    )
    stacks = experts.experts(X, "routed", gate_up=(), down=())
    mixed = mixture(X, routers.without_adapter_targets(routed), stacks, leaves=False)
    if not m.get("enable_moe_fp32_combine", True):
        return (*mixed, *gated_mlp(X, "shared", shared, bias, width="fs"), *_added())
    return (
        *mixed,
        ops.cast("mlp.routed_float", "routed", "routed32", "b s h", "fp32"),
        *gated_mlp(X, "shared", shared, bias, width="fs"),
        ops.cast("mlp.shared_float", "shared", "shared32", "b s h", "fp32"),
        ops.release_names("shared"),
        ops.add("mlp.add", "routed32", "shared32", "sum32", "b s h"),
        ops.release_names("routed32", "shared32"),
        ops.cast("mlp.cast", "sum32", Y, "b s h", f"={X}"),
        ops.release_names("sum32", "routed", *routers.HELD, X),
    )


def _cohere_2(m: ModelSpec) -> tuple[Op, ...]:
    """Cohere 2's mixture of the input of attention, which only weighs the largest logits; shared experts, if any."""
    name, shared = "mlp.gate", m.config_int("num_shared_experts", 0, least=0)
    top, scores = "router.top", "router.probs"
    if m.config.get("expert_selection_fn", "softmax") == "sigmoid":
        normalise = m.get("norm_topk_prob", True)
        raw = scores if normalise else routers.SCORES
        weighed = (
            routers.sigmoid(f"{name}.sigmoid", top, raw, routers.PAIRS),
            *(routers.divided(f"{name}.normalise", raw, routers.SCORES) if normalise else ()),
        )
    else:
        weighed = (
            *ops.softmax(f"{name}.softmax", top, scores, routers.PAIRS, "fp32"),
            ops.cast(f"{name}.cast", scores, routers.SCORES, routers.PAIRS, f"={X}"),
        )
    gate = (routers.gate(name, X), routers.top_k(f"{name}.topk", "router.logits", top))
    routed = (*gate, *weighed, ops.release_names(top, scores))
    stacks = experts.experts(X, "routed" if shared else Y)
    halves = m.config.get("shared_expert_combination_strategy", "average") == "average"
    joined = (
        *gated_mlp(X, "shared", "mlp.shared_experts", width="fs", flat=True),
        ops.add("mlp.add", "routed", "shared", "halved" if halves else Y, "b s h"),
        *((ops.scale("mlp.average", "halved", Y, "b s h"),) if halves else ()),
        ops.release_names("halved", "shared", "routed", *routers.HELD, X),
    )
    return renamed(mixture(X, routed, (*stacks, *(joined if shared else ())), leaves=not shared), {X: "n1"})


def cohere2_moe(m: ModelSpec, wiring: Wiring) -> Stack:
    """Build Cohere 2 with experts, whose norms are Llama's if the config has an epsilon for these."""
    row = COHERE_2._replace(experts=_cohere_2)
    return decoder(m, wiring, row if m.config.get("rms_norm_eps") is None else row._replace(norm=ops.rms_norm))


def _deepseek(m: ModelSpec) -> tuple[Op, ...]:
    """DeepSeek-MoE's mixture, from its published code: experts as modules, and shared experts.

    The router's auxiliary loss is a few numbers per sequence, and is not counted.
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
    return (
        *routed,
        *expert_loops.modules(X, "routed", expert_loops.experts_of(m), m.axes()["e"]),
        *gated_mlp(X, "shared", "mlp.shared_experts", width="fs"),
        *_added((routers.SCORES, routers.CHOSEN, X)),
    )


def granite_mixture(shared: str = "") -> tuple[Op, ...]:
    """Granite's mixture, which both peft and bitsandbytes leave alone. `shared`: width of a dense MLP next to it."""
    name, y = "block_sparse_moe", "routed" if shared else Y
    routed = routers.late_softmax_router(f"{name}.router", X)
    mixed = mixture(X, routed, experts.experts(X, y, f"{name}.experts", gate_up=(), down=()))
    if not shared:
        return mixed
    add = ops.add("add_experts", y, "dense.out", Y, "b s h")
    return (*mixed, *granite_mlp("dense.out", shared), add, ops.release_names(y, "dense.out"))


def granite_experts(m: ModelSpec) -> tuple[Op, ...]:
    return granite_mixture("fs" if m.axes().get("fs") else "")


def granite_mlp(y: str, width: str = "f") -> tuple[Op, ...]:
    return fused_mlp(X, y, "shared_mlp", ("input_linear", "output_linear"), width=width)


_LLAMA = Decoder(bias="attention_bias", out_bias="attention_bias")

BUILDERS = {
    "cohere2_moe": cohere2_moe,
    "deepseek": _LLAMA._replace(experts=_deepseek),
    "dots1": QWEN_3._replace(mlp_bias=False, experts=sigmoid_mixture),
    "ernie4_5_moe": ernie4_5_moe,
    "glm4_moe": glm4_moe,
    "granitemoe": GRANITE._replace(experts=granite_experts),
    "granitemoeshared": GRANITE._replace(experts=granite_experts),
    "hunyuan_v1_moe": _LLAMA._replace(rotate=rope_and_norm, experts=_hunyuan),
    "hy_v3": QWEN_3._replace(experts=_hunyuan_3),
    "mellum": QWEN_3._replace(mlp_bias=False, experts=softmax_mixture, local_table=True),
    "minimax_m2": Decoder(qk_norm="all", rotate=partial_rope, attend=attend_heads_first, experts=_minimax_m2),
    "mixtral": Decoder(experts=_mixtral),
    "olmoe": olmoe,
    "phimoe": _LLAMA._replace(norm=layer_norm, experts=_phimoe, head_bias="lm_head_bias"),
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": QWEN_3._replace(mlp_bias=False, experts=softmax_mixture),
    "solar_open": Decoder(bias="attention_bias", experts=sigmoid_mixture),
}
