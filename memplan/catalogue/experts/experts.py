"""Experts in one grouped product a matrix, weighed by what a router says and summed.

transformers 5 keeps the matrices of all experts as one parameter of three dimensions, and by default multiplies in one
grouped product a matrix (`grouped_mm`): the tokens are sorted by expert, once for every expert they choose, so that
what is allocated does not depend on how evenly they are spread. `e` of `E` experts, `m` wide each, are a token's.
Routers are in `memplan.catalogue.experts.routers`, experts one after the other in
`memplan.catalogue.experts.expert_loops`.

Source: transformers 5.24 integrations/moe.py grouped_mm_experts_forward.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.experts.routers import CHOSEN, HELD, PAIRS, SCORES, sigmoid
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import power, relu
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_MOE = "transformers 5.24 integrations/moe.py"


def mixture(x: str, routed: tuple[Op, ...], made: tuple[Op, ...], leaves: bool = True) -> tuple[Op, ...]:
    """The router's choice, then the experts. `leaves`: the module has nothing else to do."""
    return (*routed, *made, *((ops.leave(*HELD, x),) if leaves else ()))


def stack(name: str, shape: str, rows: int, stands_for: tuple[str, ...]) -> Weight:
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
    up = stack(f"{name}.gate_up_proj", f"E 2 m {width}", 3, gate_up)
    if plain:
        up = stack(f"{name}.up_proj", f"E m {width}", 2, gate_up)
    back, wide = stack(f"{name}.down_proj", f"E {width} m", 2, down), f"{PAIRS} {width}"
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
        moved(f"{name}.gather", x, t["token"], t["rows"], wide),
        ops.leave(t["token"]),
        moved(f"{name}.scores", SCORES, t["order"], t["scores"], PAIRS),
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
        moved(f"{name}.reorder", t["weighted"], t["places"], t["ordered"], wide),
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


def moved(name: str, x: str, indices: str, y: str, shape: str) -> Op:
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
