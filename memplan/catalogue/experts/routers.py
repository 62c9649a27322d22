"""Routers of mixtures of experts: which `e` of `E` experts a token uses, and with which weights."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

SCORES, CHOSEN = "router.scores", "router.chosen"  # a router's outputs: `b s e` weights, and the experts they belong to
HELD = (SCORES, CHOSEN, "router.logits")  # tensors that the module references until it returns
PAIRS = "b s e"


def hold_router_logits(op: Op) -> Op:
    """Return the operation. Router logits are held until the model returns, for the load-balancing loss.

    That loss comes after the model's and its backward comes first, so it does not affect the peak.
    Source: transformers 5.24 models/mixtral/modeling_mixtral.py load_balancing_loss_func.
    """
    return op._replace(holds="forward") if any(t.name == "router.logits" for t in op.writes) else op


def without_adapter_targets(router: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return the router's ops without the linear-layer names by which peft would find its parameters."""
    return tuple(op._replace(weights=tuple(w._replace(stands_for=()) for w in op.weights)) for op in router)


def gate(
    name: str, x: str, y: str = "router.logits", stands_for: tuple[str, ...] = ("gate",), matrix: bool = False
) -> Op:
    """Return one logit per expert. `matrix`: the weight belongs to a linear layer, not to a plain parameter."""
    product = ops.linear(name, x, y, "E", "h", "router", flat=True)
    weight = product.weights[0]._replace(matrix=matrix, stands_for=stands_for)
    return product._replace(weights=(weight,))


def fp32_gate(name: str, x: str, autocast: str = "lower") -> tuple[Op, ...]:
    """Return one logit per expert, from x in fp32 and an fp32 weight."""
    product = gate(name, "router.x")
    return (
        ops.cast(f"{name}.float", x, "router.x", "b s h", "fp32"),
        product._replace(weights=(product.weights[0]._replace(dtype="fp32"),), autocast=autocast),
        ops.release_names("router.x"),
    )


def gate_of_casts(name: str, x: str) -> tuple[Op, ...]:
    """Return one logit per expert, from x and the weight cast to fp32."""
    wide, w32, product = "router.x", "router.w32", gate(name, "router.x")
    weights, w = product.weights, product.weights[0].name
    return (
        ops.cast(f"{name}.float", x, wide, "b s h", "fp32"),
        Op(f"{name}.float_weight", (), (Tensor(w32, "E h", "fp32"),), weights, cast=True, gradient="none"),
        product._replace(
            reads=(wide, w32),
            keeps=(Keep(w32, wide), Keep(wide, w)),
            scratch_back=(Scratch(Tensor("gradient", "E h", "fp32"), w),),
        ),
        ops.release_names(wide, w32),
    )


def top_k(name: str, x: str, values: str) -> Op:
    """Return the `e` largest of a token's `E` numbers. The gradient has all `E` again."""
    return Op(
        name,
        (x,),
        (Tensor(values, PAIRS, f"={x}"), Tensor(CHOSEN, PAIRS, "int64")),
        (),
        (Keep(CHOSEN, x),),
        source=f"{ops.DERIVATIVES}: topk",
    )


def gathered(name: str, x: str, indices: str, y: str) -> Op:
    """Gather a token's numbers, out of `E`, at its chosen experts. Keeps all of the numbers, too."""
    op = ops.with_constant(name, x, indices, y, PAIRS, "gather", f"={x}")
    return op._replace(keeps=(*op.keeps, Keep(x, x)))


def _total(name: str, x: str, y: str) -> Op:
    """Return the sum of a token's numbers, in fp32 under autocast."""
    source = f"{ops.DERIVATIVES}: sum.dim_IntList"
    return Op(f"{name}.sum", (x,), (Tensor(y, "b s 1"),), autocast="wide", source=source)


def normalised(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Return `x /= x.sum(-1)`, in place. Autograd keeps a copy of the old x."""
    total, copied = f"{y}.total", f"{y}.before"
    return (
        _total(name, x, total),
        Op(f"{name}.copy", (x,), (Tensor(copied, PAIRS, f"={x}"),), gradient="none", needs_recording=True),
        ops.view(name, x, y, PAIRS, gradient="new")._replace(
            reads=(x, total, copied),
            writes=(Tensor(y, PAIRS, f"={x}"),),
            keeps=(Keep(total, x), Keep(copied, total), Keep(total, total)),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        ),
        ops.release_names(total),
    )


def sigmoid(name: str, x: str, y: str, shape: str) -> Op:
    """Return a sigmoid, which keeps its output."""
    return Op(name, (x,), (Tensor(y, shape, f"={x}"),), (), (Keep(y, x),), source=f"{ops.DERIVATIVES}: sigmoid")


def divided(name: str, x: str, y: str, by: str = "sum") -> tuple[Op, ...]:
    """Return `x / x.sum(-1)` as a new tensor, or x divided by its `norm`, which keeps x and the norm."""
    total = f"{y}.total"
    kept = (Keep(x, x), Keep(total, x)) if by == "norm" else ()
    return (
        Op(f"{name}.{by}", (x,), (Tensor(total, "b s 1", f"={x}"),), (), kept, source=f"{ops.DERIVATIVES}: {by}"),
        ops.divide(name, x, total, y, PAIRS),
        ops.release_names(total, x),
    )


def softmax_router(
    name: str,
    x: str,
    normalise: bool,
    narrow: bool = True,
    together: bool = True,
    stands_for: tuple[str, ...] = ("gate",),
    module: bool = False,
) -> tuple[Op, ...]:
    """Return an fp32 softmax over all experts, then the largest.

    narrow    the chosen scores are cast back to the logits' dtype
    together  the softmax is called with dtype fp32, so it reads fp16 without a cast
    module    the gate is a linear layer, as before transformers 5, and the scores are cast to the dtype of x

    Source: transformers 5.24 models/qwen2_moe/modeling_qwen2_moe.py Qwen2MoeTopKRouter, models/mixtral.
    """
    logits, probs, top, shape = "router.logits", "router.probs", "router.top", "b s E"
    dtype, like = "fp32" if together else "", f"={x}" if module else f"={logits}"
    to_fp32 = () if together else (ops.cast(f"{name}.float", logits, "router.wide", shape, "fp32"),)
    return (
        gate(name, x, logits, stands_for, matrix=module),
        *to_fp32,
        *ops.softmax(f"{name}.softmax", logits if together else "router.wide", probs, shape, dtype),
        top_k(f"{name}.topk", probs, top),
        *(normalised(f"{name}.normalise", top, "router.normal") if normalise else ()),
        ops.cast(f"{name}.cast", "router.normal" if normalise else top, SCORES, PAIRS, like if narrow else ""),
        ops.release_names(probs),
    )


def late_softmax_router(name: str, x: str) -> tuple[Op, ...]:
    """Return the largest logits in fp32, and a softmax over only these, cast back to the dtype of x.

    Source: transformers 5.24 models/granitemoe/modeling_granitemoe.py GraniteMoeTopKRouter.
    """
    return (
        gate(name, x, "router.narrow", stands_for=()),
        ops.cast(f"{name}.float", "router.narrow", "router.logits", "b s E", "fp32"),
        ops.release_names("router.narrow"),
        top_k(f"{name}.topk", "router.logits", "router.top"),
        *ops.softmax(f"{name}.softmax", "router.top", "router.probs", PAIRS),
        ops.cast(f"{name}.cast", "router.probs", SCORES, PAIRS, f"={x}"),
        ops.release_names("router.top", "router.probs"),
    )


def sigmoid_router(name: str, x: str, bias: str) -> tuple[Op, ...]:
    """Return sigmoids in fp32. A bias, the buffer `bias`, is used to choose the largest but not in their scores.

    Source: transformers 5.24 models/minimax_m2/modeling_minimax_m2.py MiniMaxM2TopKRouter.
    """
    logits, scores = "router.logits", "router.sigmoids"
    return (
        gate(name, x, logits),
        ops.cast(f"{name}.float", logits, "router.wide", "b s E", "fp32"),
        sigmoid(f"{name}.sigmoid", "router.wide", scores, "b s E"),
        _biased(name, scores, bias),
        top_k(f"{name}.topk", "router.biased", "router.top")._replace(gradient="none"),
        gathered(f"{name}.gather", scores, CHOSEN, "router.picked"),
        *normalised(f"{name}.normalise", "router.picked", SCORES),
        ops.release_names(scores, "router.biased", "router.top"),
    )


def scaled_sigmoid_router(name: str, x: str, bias: str, normalise: bool, gates: tuple[Op, ...] = ()) -> tuple[Op, ...]:
    """Return the largest sigmoids, normalised if asked, and scaled. The buffer `bias` is used only to choose them.

    `gates` compute the logits, if that is not a product in the dtype of x.

    Source: transformers 5.24 models/lfm2_moe/modeling_lfm2_moe.py Lfm2MoeTopKRouter.
    """
    logits, scores, ranked, picked = "router.logits", "router.sigmoids", "router.biased", "router.picked"
    biased = (
        _biased(name, scores, bias),
        top_k(f"{name}.topk", ranked, "router.top")._replace(gradient="none"),
        gathered(f"{name}.gather", scores, CHOSEN, picked),
    )
    normal = (
        _total(name, picked, "router.total"),
        ops.add_number(f"{name}.eps", "router.total", "router.least", "b s 1"),
        ops.divide(f"{name}.normalise", picked, "router.least", "router.normal", PAIRS),
    )
    return (
        *(gates or (gate(name, x, logits),)),
        sigmoid(f"{name}.sigmoid", logits, scores, "b s E"),
        *(biased if bias else (top_k(f"{name}.topk", scores, picked),)),
        *(normal if normalise else ()),
        ops.scale(f"{name}.scale", "router.normal" if normalise else picked, SCORES, PAIRS),
        ops.release_names(scores, picked, *((ranked, "router.top") if bias else ())),
        ops.release_names(*(("router.total", "router.least", "router.normal") if normalise else ())),
    )


def grouped_router(name: str, x: str, normalise: bool) -> tuple[Op, ...]:
    """Return an fp32 sigmoid router that chooses only from the best groups of experts and scales the scores.

    Source: transformers 5.24 models/glm4_moe/modeling_glm4_moe.py Glm4MoeTopkRouter.
    """
    scores, biased = "router.sigmoids", "router.biased"
    return (
        *fp32_gate(name, x),
        sigmoid(f"{name}.sigmoid", "router.logits", scores, "b s E"),
        _biased(name, scores, f"{name}.e_score_correction_bias"),
        *_best_of_groups(name, scores, biased, normalise),
    )


def grouped_softmax_router(name: str, x: str, normalise: bool) -> tuple[Op, ...]:
    """Return a softmax over all experts in the dtype of x that chooses like `grouped_router`, without a bias.

    Source: transformers 5.24 models/mistral4/modeling_mistral4.py Mistral4TopkRouter.
    """
    scores = "router.probs"
    return (
        gate(name, x),
        *ops.softmax(f"{name}.softmax", "router.logits", scores, "b s E"),
        *_best_of_groups(name, scores, scores, normalise),
    )


def _best_of_groups(name: str, scores: str, ranked: str, normalise: bool) -> tuple[Op, ...]:
    """Return the scores of the experts ranked best in the best groups, normalised if asked, and scaled."""
    shape, choice, like = "b s E", "router.choice", f"={ranked}"
    unscaled = "router.normal" if normalise else "router.picked"
    return (
        Op(f"{name}.groups", (ranked,), (Tensor("router.mask", shape, like),), gradient="none"),
        Op(
            f"{name}.masked_fill",
            (ranked, "router.mask"),
            (Tensor(choice, shape, like),),
            scratch=(Tensor("chosen", shape, "bool"), Tensor("not chosen", shape, "bool")),
            gradient="none",
        ),
        ops.release_names(*((ranked,) if ranked != scores else ())),
        top_k(f"{name}.topk", choice, "router.top")._replace(gradient="none"),
        gathered(f"{name}.gather", scores, CHOSEN, "router.picked"),
        *(normalised(f"{name}.normalise", "router.picked", "router.normal") if normalise else ()),
        ops.scale(f"{name}.scale", unscaled, SCORES, PAIRS),
        ops.release_names(scores, choice, "router.mask", "router.top", unscaled),
    )


def scaled_softmax_router(name: str, x: str, limited: bool) -> tuple[Op, ...]:
    """Return an fp32 softmax over all experts, then the largest scores, scaled.

    `limited`: experts are selected from the best groups only; the scores of the other groups are set to 0.

    Source: transformers 5.24 models/deepseek_v2/modeling_deepseek_v2.py DeepseekV2TopkRouter.
    """
    shape, probs, top = "b s E", "router.probs", "router.top"
    scores = "router.limited" if limited else probs
    groups = (
        Op(
            f"{name}.groups",
            (probs,),
            (Tensor("router.mask", shape, "fp32"),),
            scratch=(Tensor("groups", "b s G", "fp32"), Tensor("their best", "b s G", "int64")),
            gradient="none",
            source="transformers 5.24 models/deepseek_v2/modeling_deepseek_v2.py DeepseekV2TopkRouter",
        ),
        Op(f"{name}.others", ("router.mask",), (Tensor("router.others", shape, "bool"),), gradient="none"),
        ops.masked_fill(f"{name}.masked_fill", probs, "router.others", scores, shape),
        ops.release_names("router.others"),
    )
    return (
        *fp32_gate(name, x),
        *ops.softmax(f"{name}.softmax", "router.logits", probs, shape, "fp32"),
        *(groups if limited else ()),
        top_k(f"{name}.topk", scores, top),
        ops.scale(f"{name}.scale", top, SCORES, PAIRS),
        ops.release_names(probs, scores, top, *(("router.mask",) if limited else ())),
    )


def late_sigmoid_router(name: str, x: str, normalise: bool) -> tuple[Op, ...]:
    """Return the sigmoids of the largest fp32 logits, normalised if asked. A bias is used only to choose them.

    Source: transformers 5.24 models/kolibri1/modeling_kolibri1.py Kolibri1TopKRouter.
    """
    logits, picked = "router.logits", "router.picked"
    normal = (
        _total(f"{name}.normalise", "router.sigmoids", "router.total"),
        ops.divide(f"{name}.normalise", "router.sigmoids", "router.total", SCORES, PAIRS),
        ops.release_names("router.sigmoids", "router.total"),
    )
    return (
        *gate_of_casts(name, x),
        _biased(name, logits, f"{name}.e_score_correction_bias"),
        top_k(f"{name}.topk", "router.biased", "router.top")._replace(gradient="none"),
        gathered(f"{name}.gather", logits, CHOSEN, picked),
        sigmoid(f"{name}.sigmoid", picked, "router.sigmoids" if normalise else SCORES, PAIRS),
        ops.release_names(picked, "router.biased", "router.top"),
        *(normal if normalise else ()),
    )


def sparse_mixer(name: str, x: str) -> tuple[Op, ...]:
    """Return two experts, drawn one after the other, each by a softmax over the logits near the largest.

    The autograd function of the scores computes the softmaxes' gradient; the softmax nodes still keep their outputs.
    Source: transformers 5.24 models/phimoe/modeling_phimoe.py sparsemixer, PhimoeMultiplier.
    """
    logits, shape = "router.logits", "b s E"
    product = gate(name, x, logits, stands_for=(), matrix=True)
    return (
        product._replace(weights=(product.weights[0]._replace(returns_more=True),)),
        *_draw(name, logits, "first"),
        ops.with_constant(
            f"{name}.scatter", logits, "first.chosen", "second.logits", shape, "scatter.value", f"={logits}"
        ),
        *_draw(name, "second.logits", "second"),
        ops.cat(f"{name}.cat", ("first.score", "second.score"), SCORES, PAIRS, dtype=f"={logits}"),
        Op(f"{name}.cat_chosen", ("first.chosen", "second.chosen"), (Tensor(CHOSEN, PAIRS, "int64"),), gradient="none"),
        ops.release_names(
            *(f"{t}.{part}" for t in ("first", "second") for part in ("chosen", "gates", "own", "score", "mask"))
        ),
        ops.release_names("second.logits"),
    )


def _draw(name: str, x: str, t: str) -> tuple[Op, ...]:
    """Draw one expert by the logits x: `t.chosen`, and its score, whose gradient goes only to the router's logits."""
    logits, shape, row = "router.logits", "b s E", "b s 1"
    kept = (f"{t}.own", f"{t}.chosen", f"{t}.gates")
    like = f"={logits}"
    return (
        Op(
            f"{name}.{t}.threshold",
            (x,),
            (Tensor(f"{t}.mask", shape, "bool"),),
            scratch=tuple(Tensor(part, shape, like) for part in ("factor", "distance", "share")),
            gradient="none",
        ),
        ops.with_constant(f"{name}.{t}.masked_fill", x, f"{t}.mask", f"{t}.near", shape, "masked_fill.Scalar", like),
        Op(
            f"{name}.{t}.draw",
            (f"{t}.near",),
            (Tensor(f"{t}.chosen", row, "int64"),),
            scratch=tuple(Tensor(part, shape, like) for part in ("exponential", "logarithm", "perturbed")),
            gradient="none",
        ),
        *ops.softmax(f"{name}.{t}.softmax", f"{t}.near", f"{t}.gates", shape),
        ops.release_names(f"{t}.near"),
        gathered(f"{name}.{t}.gather", f"{t}.gates", f"{t}.chosen", f"{t}.own")._replace(
            writes=(Tensor(f"{t}.own", row, like),)
        ),
        Op(
            f"{name}.{t}.multiplier",
            (logits,),
            (Tensor(f"{t}.score", row, like),),
            (),
            tuple(Keep(what, logits) for what in kept),
            scratch=(Tensor("midpoint", row, "fp32"),),
            scratch_back=(Scratch(Tensor("by its score", row, like)),),
            source="transformers 5.24 models/phimoe/modeling_phimoe.py PhimoeMultiplier",
        ),
    )


def jitter(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Multiply x by noise near 1, in place. Autograd keeps the noise."""
    noise = f"{y}.noise"
    return (
        Op(name, (), (Tensor(noise, "b s h", f"={x}"),), gradient="none"),
        ops.view(f"{name}.mul", x, y, "b s h", gradient="new")._replace(
            reads=(x, noise), keeps=(Keep(noise, x),), source=f"{ops.DERIVATIVES}: mul.Tensor"
        ),
        ops.release_names(noise),
    )


def biased_softmax_router(name: str, x: str) -> tuple[Op, ...]:
    """Return a router entirely in fp32, even under autocast. A bias that does not train is used to choose the largest.

    Source: transformers 5.24 models/ernie4_5_moe/modeling_ernie4_5_moe.py Ernie4_5_MoeTopKRouter.
    """
    probs, shape = "router.probs", "b s E"
    bias = Weight(f"{name}.moe_statics.e_score_correction_bias", "E", "router", "fp32", False)
    return (
        *fp32_gate(name, x, autocast=""),
        *ops.softmax(f"{name}.softmax", "router.logits", probs, shape),
        Op(f"{name}.bias", (probs,), (Tensor("router.biased", shape, "fp32"),), (bias,), gradient="none"),
        top_k(f"{name}.topk", "router.biased", "router.top")._replace(gradient="none"),
        ops.release_names("router.biased"),
        gathered(f"{name}.gather", probs, CHOSEN, "router.picked"),
        Op(f"{name}.sum", ("router.picked",), (Tensor("router.total", "b s 1"),), source=ops.DERIVATIVES),
        Op(
            f"{name}.clamp",
            ("router.total",),
            (Tensor("router.least", "b s 1"),),
            (),
            (Keep("router.total", "router.total"),),
            source=f"{ops.DERIVATIVES}: clamp",
        ),
        ops.divide(f"{name}.normalise", "router.picked", "router.least", "router.normal", PAIRS),
        ops.cast(f"{name}.cast", "router.normal", SCORES, PAIRS, f"={x}"),
        ops.release_names(probs, "router.top", "router.picked", "router.normal", "router.total", "router.least"),
    )


def _biased(name: str, x: str, bias: str) -> Op:
    weight = Weight(bias, "E", "buffer", "fp32", False)
    return Op(f"{name}.bias", (x,), (Tensor("router.biased", "b s E", "fp32"),), (weight,), gradient="none")
