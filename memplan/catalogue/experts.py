"""Mixtures of experts: the router that chooses, the products of the experts chosen, the sum over them.

transformers 5 keeps the matrices of all experts as one parameter of three dimensions, and by default multiplies in one
grouped product a matrix (`grouped_mm`): the tokens are sorted by expert, once for every expert they choose, so that
what is allocated does not depend on how evenly they are spread. `e` of `E` experts, `m` wide each, are a token's.

Source: transformers 5.24 integrations/moe.py grouped_mm_experts_forward.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue import ops
from memplan.catalogue.gpt import power, relu
from memplan.ir import Keep, Op, Scratch, Tensor, Weight

_MOE = "transformers 5.24 integrations/moe.py"
SCORES, CHOSEN = "router.scores", "router.chosen"  # what a router writes: `b s e` numbers, and whose they are
AS_MODULES = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # also counted as versions before transformers 5 have them
HELD = (SCORES, CHOSEN, "router.logits")  # what the module has names for until it returns
PAIRS = "b s e"


def mixture(x: str, routed: tuple[Op, ...], made: tuple[Op, ...], leaves: bool = True) -> tuple[Op, ...]:
    """The router's choice, then the experts. `leaves`: the module has nothing else to do."""
    return (*routed, *made, *((ops.leave(*HELD, x),) if leaves else ()))


def balanced(op: Op) -> Op:
    """The operation; the logits of a router stay until the model has returned, for a loss of the routers' own.

    That loss is made when the model's is done, and its backward comes first: neither is where most is allocated.
    Source: transformers 5.24 models/mixtral/modeling_mixtral.py load_balancing_loss_func.
    """
    return op._replace(holds="forward") if any(t.name == "router.logits" for t in op.writes) else op


# The router


def gate(
    name: str, x: str, y: str = "router.logits", stands_for: tuple[str, ...] = ("gate",), matrix: bool = False
) -> Op:
    """A number an expert. `matrix`: of a linear layer, else of a parameter that the model multiplies by itself."""
    product = ops.linear(name, x, y, "E", "h", "router", flat=True)
    weight = product.weights[0]._replace(matrix=matrix, stands_for=stands_for)
    return product._replace(weights=(weight,))


def top_k(name: str, x: str, values: str, indices: str = CHOSEN) -> Op:
    """The `e` largest of a token's `E` numbers; the gradient is as wide as those again."""
    return Op(
        name,
        (x,),
        (Tensor(values, PAIRS, f"={x}"), Tensor(indices, PAIRS, "int64")),
        (),
        (Keep(indices, x),),
        source=f"{ops.DERIVATIVES}: topk",
    )


def gathered(name: str, x: str, indices: str, y: str) -> Op:
    """The numbers of a token's `E` that its choice points to."""
    return Op(
        name, (x, indices), (Tensor(y, PAIRS, f"={x}"),), (), (Keep(indices, x),), source=f"{ops.DERIVATIVES}: gather"
    )


def normalised(name: str, x: str, y: str) -> tuple[Op, ...]:
    """`x /= x.sum(-1)`, in place: autograd keeps a copy of what x was."""
    total, before = f"{y}.total", f"{y}.before"
    return (
        Op(f"{name}.sum", (x,), (Tensor(total, "b s 1", f"={x}"),), source=f"{ops.DERIVATIVES}: sum.dim_IntList"),
        Op(f"{name}.copy", (x,), (Tensor(before, PAIRS, f"={x}"),), gradient="none", recorded=True),
        ops.view(name, x, y, PAIRS, gradient="new")._replace(
            reads=(x, total, before),
            keeps=(Keep(total, x), Keep(before, total), Keep(total, total)),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        ),
        ops.leave(total),
    )


def masked(name: str, x: str, mask: str, y: str, shape: str) -> Op:
    """`x.masked_fill(mask, 0)` keeps the mask."""
    return Op(
        name, (x, mask), (Tensor(y, shape, f"={x}"),), (), (Keep(mask, x),), source=f"{ops.DERIVATIVES}: masked_fill"
    )


def sigmoid(name: str, x: str, y: str, shape: str) -> Op:
    """Keeps its output."""
    return Op(name, (x,), (Tensor(y, shape, f"={x}"),), (), (Keep(y, x),), source=f"{ops.DERIVATIVES}: sigmoid")


def divided(name: str, x: str, y: str, by: str = "sum") -> tuple[Op, ...]:
    """`x / x.sum(-1)`, as a tensor of its own; or by the `norm` of x, which keeps x and itself."""
    total = f"{y}.total"
    kept = (Keep(x, x), Keep(total, x)) if by == "norm" else ()
    return (
        Op(f"{name}.{by}", (x,), (Tensor(total, "b s 1", f"={x}"),), (), kept, source=f"{ops.DERIVATIVES}: {by}"),
        Op(
            name,
            (x, total),
            (Tensor(y, PAIRS),),
            (),
            (Keep(total, x), Keep(x, total), Keep(total, total)),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        ),
        ops.leave(total, x),
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
    """Softmax over all experts in fp32, then the largest. `narrow`: these are cast back to the logits' dtype;
    `together`: fp32 is asked of the softmax itself, which reads fp16 as it is. `module`: the gate is a linear layer, as
    it was before transformers 5, and the scores are cast to the dtype of x.

    Source: transformers 5.24 models/qwen2_moe/modeling_qwen2_moe.py Qwen2MoeTopKRouter, models/mixtral.
    """
    logits, probs, top, shape = "router.logits", "router.probs", "router.top", "b s E"
    dtype, like = "fp32" if together else "", f"={x}" if module else f"={logits}"
    wide = () if together else (ops.cast(f"{name}.float", logits, "router.wide", shape, "fp32"),)
    return (
        gate(name, x, logits, stands_for, matrix=module),
        *wide,
        *ops.softmax(f"{name}.softmax", logits if together else "router.wide", probs, shape, dtype),
        top_k(f"{name}.topk", probs, top),
        *(normalised(f"{name}.normalise", top, "router.normal") if normalise else ()),
        ops.cast(f"{name}.cast", "router.normal" if normalise else top, SCORES, PAIRS, like if narrow else ""),
        ops.leave(probs),
    )


def late_softmax_router(name: str, x: str) -> tuple[Op, ...]:
    """The largest logits in fp32, and a softmax over these alone, cast back to the dtype of x.

    Source: transformers 5.24 models/granitemoe/modeling_granitemoe.py GraniteMoeTopKRouter.
    """
    return (
        gate(name, x, "router.narrow", stands_for=()),
        ops.cast(f"{name}.float", "router.narrow", "router.logits", "b s E", "fp32"),
        ops.leave("router.narrow"),
        top_k(f"{name}.topk", "router.logits", "router.top"),
        *ops.softmax(f"{name}.softmax", "router.top", "router.probs", PAIRS),
        ops.cast(f"{name}.cast", "router.probs", SCORES, PAIRS, f"={x}"),
        ops.leave("router.top", "router.probs"),
    )


def sigmoid_router(name: str, x: str, bias: str, normalise: bool = True) -> tuple[Op, ...]:
    """Sigmoids in fp32; a bias is added before the largest are chosen, and forgotten after. `bias`: the buffer's name.

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
        *(normalised(f"{name}.normalise", "router.picked", SCORES) if normalise else ()),
        ops.leave(scores, "router.biased", "router.top"),
    )


def grouped_router(name: str, x: str, normalise: bool, wide: bool = True) -> tuple[Op, ...]:
    """The same where only the experts of the best groups are chosen from, with a product in fp32 (`wide`) and the
    scores scaled.

    Source: transformers 5.24 models/glm4_moe/modeling_glm4_moe.py Glm4MoeTopkRouter.
    """
    scores, shape, choice = "router.sigmoids", "b s E", "router.choice"
    product = gate(name, "router.x" if wide else x)
    weight = product.weights[0]._replace(dtype="fp32") if wide else product.weights[0]
    ends = "router.normal" if normalise else "router.picked"
    return (
        *((ops.cast(f"{name}.float", x, "router.x", "b s h", "fp32"),) if wide else ()),
        product._replace(weights=(weight,)),
        *((ops.leave("router.x"),) if wide else ()),
        sigmoid(f"{name}.sigmoid", "router.logits", scores, shape),
        _biased(name, scores, f"{name}.e_score_correction_bias"),
        Op(
            f"{name}.groups",
            ("router.biased",),
            (Tensor("router.mask", shape, "fp32"),),
            gradient="none",
        ),
        Op(
            f"{name}.masked_fill",
            ("router.biased", "router.mask"),
            (Tensor(choice, shape, "fp32"),),
            scratch=(Tensor("chosen", shape, "bool"), Tensor("not chosen", shape, "bool")),
            gradient="none",
        ),
        ops.leave("router.biased"),
        top_k(f"{name}.topk", choice, "router.top")._replace(gradient="none"),
        gathered(f"{name}.gather", scores, CHOSEN, "router.picked"),
        *(normalised(f"{name}.normalise", "router.picked", "router.normal") if normalise else ()),
        ops.scale(f"{name}.scale", ends, SCORES, PAIRS),
        ops.leave(scores, choice, "router.mask", "router.top", ends),
    )


def sparse_mixer(name: str, x: str) -> tuple[Op, ...]:
    """Two experts drawn one after the other, each by a softmax over the logits near the largest.

    Of the softmaxes the autograd function of the scores makes the gradient itself; their own nodes keep what they do.
    Source: transformers 5.24 models/phimoe/modeling_phimoe.py sparsemixer, PhimoeMultiplier.
    """
    logits, shape = "router.logits", "b s E"
    product = gate(name, x, logits, stands_for=(), matrix=True)
    return (
        product._replace(weights=(product.weights[0]._replace(several=True),)),
        *_drawn(name, logits, "first"),
        Op(
            f"{name}.scatter",
            (logits, "first.chosen"),
            (Tensor("second.logits", shape, f"={logits}"),),
            (),
            (Keep("first.chosen", logits),),
            source=f"{ops.DERIVATIVES}: scatter.value",
        ),
        *_drawn(name, "second.logits", "second"),
        Op(
            f"{name}.cat",
            ("first.score", "second.score"),
            (Tensor(SCORES, PAIRS, f"={logits}"),),
            gradient="same",
            source=f"{ops.DERIVATIVES}: cat",
        ),
        Op(f"{name}.cat_chosen", ("first.chosen", "second.chosen"), (Tensor(CHOSEN, PAIRS, "int64"),), gradient="none"),
        ops.leave(
            *(f"{t}.{part}" for t in ("first", "second") for part in ("chosen", "gates", "own", "score", "mask"))
        ),
        ops.leave("second.logits"),
    )


def _drawn(name: str, x: str, t: str) -> tuple[Op, ...]:
    """One expert by the logits x: `t.chosen`, and its score, whose gradient goes to the router's logits alone."""
    logits, shape, one = "router.logits", "b s E", "b s 1"
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
        Op(
            f"{name}.{t}.masked_fill",
            (x, f"{t}.mask"),
            (Tensor(f"{t}.near", shape, like),),
            (),
            (Keep(f"{t}.mask", x),),
            source=f"{ops.DERIVATIVES}: masked_fill.Scalar",
        ),
        Op(
            f"{name}.{t}.draw",
            (f"{t}.near",),
            (Tensor(f"{t}.chosen", one, "int64"),),
            scratch=tuple(Tensor(part, shape, like) for part in ("exponential", "logarithm", "perturbed")),
            gradient="none",
        ),
        *ops.softmax(f"{name}.{t}.softmax", f"{t}.near", f"{t}.gates", shape),
        ops.leave(f"{t}.near"),
        gathered(f"{name}.{t}.gather", f"{t}.gates", f"{t}.chosen", f"{t}.own")._replace(
            writes=(Tensor(f"{t}.own", one, like),)
        ),
        Op(
            f"{name}.{t}.multiplier",
            (logits,),
            (Tensor(f"{t}.score", one, like),),
            (),
            tuple(Keep(what, logits) for what in kept),
            scratch=(Tensor("midpoint", one, "fp32"),),
            scratch_back=(Scratch(Tensor("by its score", one, like)),),
            source="transformers 5.24 models/phimoe/modeling_phimoe.py PhimoeMultiplier",
        ),
    )


def jitter(name: str, x: str, y: str) -> tuple[Op, ...]:
    """x times noise near 1, in place: autograd keeps the noise."""
    noise = f"{y}.noise"
    return (
        Op(name, (), (Tensor(noise, "b s h", f"={x}"),), gradient="none"),
        ops.view(f"{name}.mul", x, y, "b s h", gradient="new")._replace(
            reads=(x, noise), keeps=(Keep(noise, x),), source=f"{ops.DERIVATIVES}: mul.Tensor"
        ),
        ops.leave(noise),
    )


def biased_softmax_router(name: str, x: str) -> tuple[Op, ...]:
    """All in fp32, autocast or not; a bias that does not train is added before the largest are chosen.

    Source: transformers 5.24 models/ernie4_5_moe/modeling_ernie4_5_moe.py Ernie4_5_MoeTopKRouter.
    """
    probs, shape, product = "router.probs", "b s E", gate(name, "router.x")
    bias = Weight(f"{name}.moe_statics.e_score_correction_bias", "E", "router", "fp32", False)
    return (
        ops.cast(f"{name}.float", x, "router.x", "b s h", "fp32"),
        product._replace(weights=(product.weights[0]._replace(dtype="fp32"),), autocast=""),
        ops.leave("router.x"),
        *ops.softmax(f"{name}.softmax", "router.logits", probs, shape),
        Op(f"{name}.bias", (probs,), (Tensor("router.biased", shape, "fp32"),), (bias,), gradient="none"),
        top_k(f"{name}.topk", "router.biased", "router.top")._replace(gradient="none"),
        ops.leave("router.biased"),
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
        Op(
            f"{name}.normalise",
            ("router.picked", "router.least"),
            (Tensor("router.normal", PAIRS),),
            (),
            (
                Keep("router.least", "router.picked"),
                Keep("router.picked", "router.least"),
                Keep("router.least", "router.least"),
            ),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        ),
        ops.cast(f"{name}.cast", "router.normal", SCORES, PAIRS, f"={x}"),
        ops.leave(probs, "router.top", "router.picked", "router.normal", "router.total", "router.least"),
    )


def _biased(name: str, x: str, bias: str) -> Op:
    weight = Weight(bias, "E", "buffer", "fp32", False)
    return Op(f"{name}.bias", (x,), (Tensor("router.biased", "b s E", "fp32"),), (weight,), gradient="none")


# The experts


def _stack(name: str, shape: str, rows: int, stands_for: tuple[str, ...]) -> Weight:
    return Weight(name, shape, "mlp", rows=rows, chosen="e", stacked=True, stands_for=stands_for)


def grouped_mm(name: str, x: str, y: str, out: str, w: Weight) -> tuple[Op, ...]:
    """Each row by the matrix of its expert, in the dtype of the matrices: autocast does not know this product.

    Source: torch 2.13 aten/src/ATen/native/GroupedMMUtils.h, tools/autograd/derivatives.yaml: _grouped_mm.
    """
    into, offsets = " ".join(w.shape.split()[w.rows :]), "experts.offsets"
    inner = f"{y}.in"
    return (
        ops.cast(f"{name}.cast", x, inner, f"{PAIRS} {into}", f"={w.name}"),
        Op(
            name,
            (inner, offsets),
            (Tensor(y, f"{PAIRS} {out}", f"={w.name}"),),
            (w,),
            tuple(Keep(what, of) for of in (inner, w.name) for what in ({inner: w.name, w.name: inner}[of], offsets)),
            product="grouped",
            source=f"{ops.DERIVATIVES}: _grouped_mm",
        ),
        ops.leave(inner),
    )


def experts(
    x: str,
    y: str,
    name: str = "mlp.experts",
    gate_up: tuple[str, ...] = ("gate_proj", "up_proj"),
    down: tuple[str, ...] = ("down_proj",),
    plain: bool = False,
    width: str = "h",
    act: Callable[[str, str, str], tuple[Op, ...]] | None = None,
    biased: bool = False,
) -> tuple[Op, ...]:
    """A gated MLP of every expert that a token chose, weighed by the router's scores and summed.

    `gate_up` and `down` are the linear layers that peft takes the stacks for, empty where it does not know them.
    `plain`: no gate, and relu squared; `width`: the axis of x, where it is not the model's. `act(name, x, y)`: what
    makes y of both products, instead of `gated`. `biased`: each product has one an expert.
    """
    t = {part: f"experts.{part}" for part in (*_KEPT, "token", "gate", "up", "act", "inner", "weighted", "sum")}
    up = _stack(f"{name}.gate_up_proj", f"E 2 m {width}", 3, gate_up)
    if plain:
        up = _stack(f"{name}.up_proj", f"E m {width}", 2, gate_up)
    back, wide = _stack(f"{name}.down_proj", f"E {width} m", 2, down), f"{PAIRS} {width}"
    summed, lowered = ("experts.up_product", "experts.down_product") if biased else ("experts.gate_up", t["down"])
    acted = act or (squared if plain else gated)
    return (
        Op(
            f"{name}.sort",
            (CHOSEN,),
            (Tensor(t["ids"], PAIRS, "int64"), Tensor(t["order"], PAIRS, "int64")),
            gradient="none",
            source=_MOE,
        ),
        Op(f"{name}.token", (t["order"],), (Tensor(t["token"], PAIRS, "int64"),), gradient="none"),
        _moved(f"{name}.gather", x, t["token"], t["rows"], wide),
        ops.leave(t["token"]),
        _moved(f"{name}.scores", SCORES, t["order"], t["scores"], PAIRS),
        Op(f"{name}.ids", (t["ids"],), (Tensor(t["counted"], PAIRS, "int32"),), gradient="none"),
        Op(f"{name}.count", (t["counted"],), (Tensor(t["counts"], "E", "int32"),), gradient="none"),
        Op(f"{name}.cumsum", (t["counts"],), (Tensor(t["offsets"], "E", "int32"),), gradient="none"),
        *(of_each(up, "2 m", "experts.up_bias") if biased else ()),
        *grouped_mm(up.name, t["rows"], summed, "m" if plain else "2 m", up),
        *(add_of_each(up, summed, "experts.up_bias", "experts.gate_up", "2 m") if biased else ()),
        *acted(name, "experts.gate_up", t["inner"]),
        *(of_each(back, width, "experts.down_bias") if biased else ()),
        *((ops.leave("experts.up_bias"),) if biased else ()),
        *grouped_mm(back.name, t["inner"], lowered, width, back),
        *(add_of_each(back, lowered, "experts.down_bias", t["down"], width) if biased else ()),
        weighed(name, t["down"], t["scores"], t["weighted"], wide),
        Op(
            f"{name}.inverse",
            (t["order"],),
            (Tensor(t["places"], PAIRS, "int64"),),
            scratch=(Tensor("arange", PAIRS, "int64"),),
            gradient="none",
        ),
        _moved(f"{name}.reorder", t["weighted"], t["places"], t["ordered"], wide),
        Op(
            f"{name}.sum",
            (t["ordered"],),
            (Tensor(t["sum"], f"b s {width}"),),
            autocast="wide",
            source=f"{ops.DERIVATIVES}: sum.dim_IntList",
        ),
        ops.cast(f"{name}.cast", t["sum"], y, f"b s {width}", f"={x}"),
        ops.leave(*(t[part] for part in _KEPT), *(("experts.down_bias",) if biased else ()))._replace(
            name=f"{name}.return"
        ),
    )


def of_each(w: Weight, out: str, y: str) -> tuple[Op, ...]:
    """The bias of its expert for each row."""
    bias = Weight(f"{w.name}_bias", f"E {out}", "mlp", rows=1, chosen="e")
    return (
        Op(
            f"{w.name}.bias_of_each",
            ("experts.ids",),
            (Tensor(y, f"{PAIRS} {out}", f"={bias.name}"),),
            (bias,),
            (Keep("experts.ids", bias.name),),
            source=f"{ops.DERIVATIVES}: index",
        ),
    )


def add_of_each(w: Weight, x: str, bias: str, y: str, out: str) -> tuple[Op, ...]:
    """The biases added in place."""
    return (ops.add(f"{w.name}.add_bias", x, bias, y, f"{PAIRS} {out}")._replace(view=True),)


def clamped(slices: bool) -> Callable[[str, str, str], tuple[Op, ...]]:
    """`(up + 1) * gate * sigmoid(alpha * gate)` of a gate and an up that are clamped first. `slices`: every other
    number is the gate's, and the gradient of either is as wide as both.

    Source: transformers 5.24 models/gpt_oss/modeling_gpt_oss.py GptOssExperts._apply_gate.
    """

    def act(name: str, x: str, y: str) -> tuple[Op, ...]:
        return clamped_gate(name, x, y, f"{PAIRS} m", slices)

    return act


def clamped_gate(name: str, x: str, y: str, shape: str, slices: bool = False) -> tuple[Op, ...]:
    """See `clamped`; of rows of any `shape`."""
    t = {part: f"{y}.{part}" for part in ("gate0", "up0", "gate", "up", "alpha", "sigmoid", "glu", "up1")}
    halves = (
        tuple(ops.view(f"{name}.{part}", x, t[f"{part}0"], shape, gradient="new") for part in ("gate", "up"))
        if slices
        else (ops.split(f"{name}.chunk", x, (Tensor(t["gate0"], shape), Tensor(t["up0"], shape))),)
    )
    return (
        *halves,
        ops.clamp(f"{name}.clamp_gate", t["gate0"], t["gate"], shape, 1),
        ops.clamp(f"{name}.clamp_up", t["up0"], t["up"], shape, 2),
        ops.scale(f"{name}.alpha", t["gate"], t["alpha"], shape),
        sigmoid(f"{name}.sigmoid", t["alpha"], t["sigmoid"], shape),
        ops.mul(f"{name}.glu", t["gate"], t["sigmoid"], t["glu"], shape),
        ops.add_number(f"{name}.plus_one", t["up"], t["up1"], shape),
        ops.mul(f"{name}.product", t["up1"], t["glu"], y, shape),
        ops.leave(x, t["gate"], t["up"], t["glu"]),
    )


# What the function has names for until it returns.
_KEPT = ("ids", "order", "rows", "scores", "counted", "counts", "offsets", "down", "places", "ordered")


def _moved(name: str, x: str, indices: str, y: str, shape: str) -> Op:
    return Op(
        name, (x, indices), (Tensor(y, shape, f"={x}"),), (), (Keep(indices, x),), source=f"{ops.DERIVATIVES}: index"
    )


def gated(name: str, x: str, y: str) -> tuple[Op, ...]:
    """`act(gate) * up` of both halves of x, whose gradients are joined."""
    shape, gate_, up, act = f"{PAIRS} m", f"{y}.gate", f"{y}.up", f"{y}.act"
    return (
        ops.split(f"{name}.chunk", x, (Tensor(gate_, shape), Tensor(up, shape))),
        ops.activation(f"{name}.act_fn", gate_, act, shape),
        ops.mul(f"{name}.product", act, up, y, shape),
        ops.leave(x),
    )


def squared(name: str, x: str, y: str) -> tuple[Op, ...]:
    """relu squared, which keeps what relu leaves."""
    return (*relu_squared(f"{name}.act_fn", x, y, f"{PAIRS} m"), ops.leave(x))


def relu_squared(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    return (relu(f"{name}.relu", x, f"{y}.relu", shape), power(f"{name}.square", f"{y}.relu", y, shape))


def weighed(name: str, x: str, scores: str, y: str, shape: str = f"{PAIRS} h") -> Op:
    """A row times its score: the product with x is made whole before it is summed for the score."""
    return Op(
        f"{name}.weigh",
        (x, scores),
        (Tensor(y, shape),),
        (),
        (Keep(scores, x), Keep(x, scores)),
        scratch_back=(Scratch(Tensor("product", shape, f"={y}"), scores, summed=True),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )


# Experts one after the other, as Python writes a loop. How many rows each has depends on the data: `routed` is how
# many where they are spread evenly.

ROWS = "routed"


def modules(x: str, y: str, number: int, used: int, name: str = "mlp.experts") -> tuple[Op, ...]:
    """Experts that are modules, `used` of `number` a token: rows are picked by a mask, and put in place by another.

    In place, so that backward makes the whole gradient anew for every expert.
    Source: the code published with DeepSeek-MoE, DeepseekMoE.forward.
    """
    every, whole = f"{PAIRS} h", "experts.rows"
    out: list[Op] = [
        ops.copy(f"{name}.repeat", x, whole, every, gradient="new"),
        Op(f"{name}.empty", (), (Tensor("experts.out", every, f"={whole}"),), gradient="none"),
    ]
    last = "experts.out"
    for i in range(number):
        t, n = f"expert{i}", f"{name}.{i}"
        for part in ("picked", "placed"):
            mask = Tensor(f"{t}.{part}", PAIRS, "bool")
            out.append(Op(f"{n}.{part}", (CHOSEN,), (mask,), gradient="none"))
            if part == "picked":
                out.append(_moved(f"{n}.pick", whole, mask.name, f"{t}.in", f"{ROWS} h"))
                out += _module(n, t, i < used)
        placed = f"{t}.all"
        out.append(
            Op(
                f"{n}.place",
                (last, f"{t}.out", f"{t}.placed"),
                (Tensor(placed, every, f"={whole}"),),
                (),
                (Keep(f"{t}.placed", last), Keep(f"{t}.placed", f"{t}.out")),
                view=True,
                source=f"{ops.DERIVATIVES}: index_put_",
            )
        )
        last = placed
    return (
        *out,
        weighed(name, last, SCORES, "experts.weighted"),
        Op(f"{name}.sum", ("experts.weighted",), (Tensor(y, "b s h"),), autocast="wide", source=ops.DERIVATIVES),
        ops.leave("experts.weighted", whole, last),
    )


def added(
    x: str,
    y: str,
    number: int,
    used: int,
    name: str = "mlp.experts",
    roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> tuple[Op, ...]:
    """Experts that are modules, as transformers before 5 has them: each adds its rows to the sum in place.

    Source: transformers 4.48.1 models/mixtral/modeling_mixtral.py MixtralSparseMoeBlock, and alike.
    """
    rows, last = f"{ROWS} h", "experts.sum"
    out: list[Op] = [
        Op(f"{name}.zeros", (), (Tensor(last, "b s h", f"={x}"),), gradient="none"),
        Op(f"{name}.one_hot", (CHOSEN,), (Tensor("experts.mask", f"{PAIRS} E", "int64"),), gradient="none"),
    ]
    for i in range(number):
        t, n = f"expert{i}", f"{name}.{i}"
        places, sum_ = f"{t}.places", f"{t}.sum"
        out += (
            Op(f"{n}.where", ("experts.mask",), (Tensor(places, f"2 {ROWS}", "int64"),), gradient="none"),
            _moved(f"{n}.gather", x, places, f"{t}.in", rows),
            *_module(n, t, i < used, roles),
            _moved(f"{n}.scores", SCORES, places, f"{t}.scores", ROWS),
            weighed(n, f"{t}.out", f"{t}.scores", f"{t}.weighted", rows),
            ops.cast(f"{n}.cast", f"{t}.weighted", f"{t}.added", rows, f"={x}"),
            Op(
                f"{n}.index_add",
                (last, f"{t}.added", places),
                (Tensor(sum_, "b s h", f"={x}"),),
                (),
                (Keep(places, f"{t}.added"), Keep(f"{t}.added", f"{t}.added")),
                gradient="same",
                view=True,
                source=f"{ops.DERIVATIVES}: index_add",
            ),
        )
        last = sum_
    return (*out, ops.view(f"{name}.view", last, y, "b s h"), ops.leave("experts.mask", x))


def _module(
    name: str, t: str, used: bool, roles: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> tuple[Op, ...]:
    """One expert's MLP, a module like any; a token uses as many of them as it chooses, whichever these are."""
    shape, (gate_, up, down) = f"{ROWS} m", roles

    def linear(role: str, x: str, y: str, out: str, into: str) -> Op:
        op = ops.linear(f"{name}.{role}", x, y, out, into, "mlp", lead=ROWS, flat=True)
        return op if used else op._replace(weights=(op.weights[0]._replace(chosen="none"),))

    return (
        linear(gate_, f"{t}.in", f"{t}.gate", "m", "h"),
        ops.activation(f"{name}.act_fn", f"{t}.gate", f"{t}.act", shape),
        linear(up, f"{t}.in", f"{t}.up", "m", "h"),
        ops.mul(f"{name}.product", f"{t}.act", f"{t}.up", f"{t}.inner", shape),
        linear(down, f"{t}.inner", f"{t}.out", "h", "m"),
        ops.leave(f"{t}.in"),
    )


Expert = Callable[[str, str], tuple[Op, ...]]
OF_A_GROUP = "spread"  # how many rows a group of experts has


def loop(x: str, y: str, number: int, name: str, expert: Expert, each: str = ROWS) -> tuple[Op, ...]:
    """Experts that are parts of parameters, one after the other: each adds to the sum in place.

    An expert's part of a parameter is a view, and backward makes the whole parameter's gradient for each.
    `expert(name, t)`: what makes `t.out` of `t.in`. `each`: how many rows one has. Where a group of experts stands for
    one, what is kept is the same to the byte, and what is there for a moment is a group's rows, which are more.
    Source: transformers 5.24 models/dbrx/modeling_dbrx.py DbrxExperts, models/step3p7/modeling_step3p7.py.
    """
    out: list[Op] = [
        Op(f"{name}.zeros", (), (Tensor("experts.sum", "b s h", f"={x}"),), gradient="none"),
        Op(f"{name}.one_hot", (CHOSEN,), (Tensor("experts.mask", f"{PAIRS} E1", "int64"),), gradient="none"),
        Op(f"{name}.hit", ("experts.mask",), (Tensor("experts.hit", "E1", "int64"),), gradient="none"),
    ]
    last = "experts.sum"
    for i in range(number):
        t, n, rows = f"expert{i}", f"{name}.{i}", f"{each} h"
        places, added = f"{t}.places", f"{t}.sum"
        out += (
            Op(f"{n}.where", ("experts.mask",), (Tensor(places, f"2 {each}", "int64"),), gradient="none"),
            _moved(f"{n}.gather", x, places, f"{t}.in", rows),
            *expert(n, t),
            _moved(f"{n}.scores", SCORES, places, f"{t}.scores", each),
            weighed(n, f"{t}.out", f"{t}.scores", f"{t}.weighted", rows),
            ops.cast(f"{n}.cast", f"{t}.weighted", f"{t}.added", rows, f"={x}"),
            Op(
                f"{n}.index_add",
                (last, f"{t}.added", places),
                (Tensor(added, "b s h", f"={x}"),),
                (),
                (Keep(places, f"{t}.added"), Keep(f"{t}.added", f"{t}.added")),
                gradient="same",
                view=True,
                source=f"{ops.DERIVATIVES}: index_add",
            ),
        )
        last = added
    return (*out, ops.view(f"{name}.view", last, y, "b s h"), ops.leave("experts.mask", "experts.hit", x))


def in_rows(name: str) -> Expert:
    """For `loop`, a gated MLP whose matrices lie one after the other in parameters that are not stacked."""
    gate_, up, down = (Weight(f"{name}.mlp.{w}", "E f h", "mlp", rows=2, chosen="e") for w in ("w1", "v1", "w2"))
    wide = f"{ROWS} f"

    def expert(n: str, t: str) -> tuple[Op, ...]:
        return (
            _part(f"{n}.w1", f"{t}.in", f"{t}.gate", wide, gate_),
            _part(f"{n}.v1", f"{t}.in", f"{t}.up", wide, up),
            ops.activation(f"{n}.activation_fn", f"{t}.gate", f"{t}.act", wide),
            ops.mul(f"{n}.product", f"{t}.act", f"{t}.up", f"{t}.inner", wide),
            _part(f"{n}.w2", f"{t}.inner", f"{t}.out", f"{ROWS} h", down),
            ops.leave(f"{t}.in", f"{t}.up", f"{t}.act"),
        )

    return expert


def in_stacks(name: str, act: Callable[[str, str, str], tuple[Op, ...]]) -> Expert:
    """For `loop` in groups, matrices stacked as in `experts`, which peft takes for no linear layers, and its `act`."""
    up = _stack(f"{name}.gate_up_proj", "E 2 m h", 3, ())
    down = _stack(f"{name}.down_proj", "E h m", 2, ())

    def expert(n: str, t: str) -> tuple[Op, ...]:
        return (
            _part(f"{n}.gate_up_proj", f"{t}.in", f"{t}.gate_up", f"{OF_A_GROUP} 2 m", up),
            ops.leave(f"{t}.in"),
            *act(n, f"{t}.gate_up", f"{t}.inner"),
            ops.leave(f"{t}.gate_up"),
            _part(f"{n}.down_proj", f"{t}.inner", f"{t}.out", f"{OF_A_GROUP} h", down),
        )

    return expert


def _part(name: str, x: str, y: str, shape: str, w: Weight) -> Op:
    """A product with one expert's part of a parameter."""
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (w,),
        (Keep(w.name, x), Keep(x, w.name)),
        scratch_back=(Scratch(Tensor("of one expert", w.shape.partition(" ")[2], f"={w.name}"), w.name),),
        autocast="lower",
        product="matrix",
        source=f"{ops.DERIVATIVES}: mm, select_backward",
    )
