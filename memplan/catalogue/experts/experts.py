"""Experts in one grouped product per matrix, weighted by the router's scores and summed.

transformers 5 stores the matrices of all experts as one three-dimensional parameter, and by default multiplies in one
grouped product per matrix (`grouped_mm`). Tokens are sorted by expert, repeated for every expert they choose, so the
allocations do not depend on the balance among experts. A token uses `e` of `E` experts, each `m` wide. Routers are in
`memplan.catalogue.experts.routers`, experts in a loop in `memplan.catalogue.experts.expert_loops`.

Source: transformers 5.24 integrations/moe.py grouped_mm_experts_forward.
"""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.experts.routers import CHOSEN, HELD, PAIRS, SCORES, sigmoid
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.activations import relu_squared
from memplan.core.ir import Keep, Op, Tensor, Weight

_MOE = "transformers 5.24 integrations/moe.py"


def mixture(x: str, routed: tuple[Op, ...], expert_ops: tuple[Op, ...], leaves: bool = True) -> tuple[Op, ...]:
    """Return the router, then the experts. `leaves`: the module returns right after them."""
    return (*routed, *expert_ops, *((ops.release_names(*HELD, x),) if leaves else ()))


def scaled_and_shared(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Scale the output of the `chosen` experts, and add the `shared` expert's."""
    return (
        ops.scale(f"{name}.scale", "chosen", "experts.scaled", "b s h"),
        ops.release_names("chosen"),
        ops.add(f"{name}.add", "experts.scaled", "shared", y, "b s h"),
        ops.release_names("experts.scaled", "shared", *HELD, x),
    )


def stack(name: str, shape: str, rows: int, stands_for: tuple[str, ...]) -> Weight:
    return Weight(name, shape, "mlp", rows=rows, chosen="e", stacked=True, stands_for=stands_for)


def grouped_mm(name: str, x: str, y: str, out: str, w: Weight) -> tuple[Op, ...]:
    """Multiply each row by its expert's matrix, in the matrices' dtype. Autocast does not know this product.

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
        ops.release_names(inner),
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
    """Return a gated MLP of every expert that a token chose, weighted by the router's scores and summed.

    gate_up, down  linear layers that peft adapts the stacks as; empty if it does not know them
    plain          no gate, but relu squared
    width          axis of x, if it is not the model's
    act            `act(name, x, y)` computes y from the first product, instead of `gated`
    biased         each product adds the expert's bias
    """
    t = {part: f"experts.{part}" for part in (*_KEPT, "token", "gate", "up", "act", "inner", "weighted", "sum")}
    up = stack(f"{name}.gate_up_proj", f"E 2 m {width}", 3, gate_up)
    if plain:
        up = stack(f"{name}.up_proj", f"E m {width}", 2, gate_up)
    down_stack, rows_shape = stack(f"{name}.down_proj", f"E {width} m", 2, down), f"{PAIRS} {width}"
    up_product, down_product = (
        ("experts.up_product", "experts.down_product") if biased else ("experts.gate_up", t["down"])
    )
    activate = act or (squared if plain else gated)
    return (
        Op(
            f"{name}.sort",
            (CHOSEN,),
            (Tensor(t["ids"], PAIRS, "int64"), Tensor(t["order"], PAIRS, "int64")),
            gradient="none",
            source=_MOE,
        ),
        Op(f"{name}.token", (t["order"],), (Tensor(t["token"], PAIRS, "int64"),), gradient="none"),
        ops.index(f"{name}.gather", x, t["token"], t["rows"], rows_shape),
        ops.release_names(t["token"]),
        ops.index(f"{name}.scores", SCORES, t["order"], t["scores"], PAIRS),
        Op(f"{name}.ids", (t["ids"],), (Tensor(t["counted"], PAIRS, "int32"),), gradient="none"),
        Op(f"{name}.count", (t["counted"],), (Tensor(t["counts"], "E", "int32"),), gradient="none"),
        Op(f"{name}.cumsum", (t["counts"],), (Tensor(t["offsets"], "E", "int32"),), gradient="none"),
        *(of_each(up, "2 m", "experts.up_bias") if biased else ()),
        *grouped_mm(up.name, t["rows"], up_product, "m" if plain else "2 m", up),
        *(add_of_each(up, up_product, "experts.up_bias", "experts.gate_up", "2 m") if biased else ()),
        *activate(name, "experts.gate_up", t["inner"]),
        *(of_each(down_stack, width, "experts.down_bias") if biased else ()),
        *((ops.release_names("experts.up_bias"),) if biased else ()),
        *grouped_mm(down_stack.name, t["inner"], down_product, width, down_stack),
        *(add_of_each(down_stack, down_product, "experts.down_bias", t["down"], width) if biased else ()),
        weighed(name, t["down"], t["scores"], t["weighted"], rows_shape),
        Op(
            f"{name}.inverse",
            (t["order"],),
            (Tensor(t["places"], PAIRS, "int64"),),
            scratch=(Tensor("arange", PAIRS, "int64"),),
            gradient="none",
        ),
        ops.index(f"{name}.reorder", t["weighted"], t["places"], t["ordered"], rows_shape),
        Op(
            f"{name}.sum",
            (t["ordered"],),
            (Tensor(t["sum"], f"b s {width}"),),
            autocast="wide",
            source=f"{ops.DERIVATIVES}: sum.dim_IntList",
        ),
        ops.cast(f"{name}.cast", t["sum"], y, f"b s {width}", f"={x}"),
        ops.release_names(*(t[part] for part in _KEPT), *(("experts.down_bias",) if biased else ()))._replace(
            name=f"{name}.return"
        ),
    )


def of_each(w: Weight, out: str, y: str) -> tuple[Op, ...]:
    """Gather the bias of each row's expert."""
    bias = Weight(f"{w.name}_bias", f"E {out}", "mlp", rows=1, chosen="e")
    return (ops.lookup(f"{w.name}.bias_of_each", "experts.ids", y, f"{PAIRS} {out}", bias, "index"),)


def add_of_each(w: Weight, x: str, bias: str, y: str, out: str) -> tuple[Op, ...]:
    """Add the gathered biases in place."""
    return (ops.add(f"{w.name}.add_bias", x, bias, y, f"{PAIRS} {out}")._replace(view=True),)


def clamped(slices: bool) -> Callable[[str, str, str], tuple[Op, ...]]:
    """Return `(up + 1) * gate * sigmoid(alpha * gate)` of a clamped gate and up.

    `slices`: gate and up are every other number, and each gradient is as wide as both.

    Source: transformers 5.24 models/gpt_oss/modeling_gpt_oss.py GptOssExperts._apply_gate.
    """

    def act(name: str, x: str, y: str) -> tuple[Op, ...]:
        return clamped_gate(name, x, y, f"{PAIRS} m", slices)

    return act


def clamped_gate(name: str, x: str, y: str, shape: str, slices: bool = False) -> tuple[Op, ...]:
    """Return the operations of `clamped` for rows of any `shape`."""
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
        ops.release_names(x, t["gate"], t["up"], t["glu"]),
    )


# Tensors that the function references until it returns.
_KEPT = ("ids", "order", "rows", "scores", "counted", "counts", "offsets", "down", "places", "ordered")


def gated(name: str, x: str, y: str) -> tuple[Op, ...]:
    """Return `act(gate) * up` of the two halves of x, whose gradients are joined."""
    shape, gate, up, act = f"{PAIRS} m", f"{y}.gate", f"{y}.up", f"{y}.act"
    return (
        ops.split(f"{name}.chunk", x, (Tensor(gate, shape), Tensor(up, shape))),
        ops.activation(f"{name}.act_fn", gate, act, shape),
        ops.mul(f"{name}.product", act, up, y, shape),
        ops.release_names(x),
    )


def squared(name: str, x: str, y: str) -> tuple[Op, ...]:
    return relu_squared(f"{name}.act_fn", x, y, f"{PAIRS} m")


def weighed(name: str, x: str, scores: str, y: str, shape: str = f"{PAIRS} h") -> Op:
    """Multiply each row by its score. Backward sums a full-size product with x for the gradient of the scores."""
    return ops.spread(f"{name}.weigh", x, scores, y, shape, summed=True)
