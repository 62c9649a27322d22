"""Parts that Kimi K3 adds to Kimi Linear: attention residuals, bounded activations, and experts in a narrower space.

transformers 5.24 has no class for it. These parts follow the code published with its weights. The rest (the delta rule,
the router and the product of the experts) is taken as transformers computes Kimi Linear
(`memplan.catalogue.families.kimi_linear`), and is marked as assumed where the published code differs: that calls
flash-linear-attention's kernels, and runs the routed experts without gradients.

Axis `hl` is the width of what the routed experts read.

Source: modeling_kimi_linear.py of moonshotai/Kimi-K3, 2026; Attention Residuals (arXiv:2603.15031).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache, partial

from memplan.catalogue.attention.compressed_keys import summed
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.experts.experts import mixture
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.recurrent import exp
from memplan.core.ir import Block, Op, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_CODE = "modeling_kimi_linear.py of moonshotai/Kimi-K3"
EXPERTS = "the published code runs the routed experts without gradients; computed here as in transformers' Kimi Linear"
DELTA_RULE = "the published code calls flash-linear-attention; computed here as in transformers' torch Kimi Linear"

Act = Callable[[str, str, str, str], tuple[Op, ...]]


def mark_assumed(operations: Iterable[Op], why: str) -> tuple[Op, ...]:
    """Return the operations, each with a source that says it is assumed, and `why`."""
    return tuple(op._replace(source=f"assumed: {why}; {op.source}".removesuffix("; ")) for op in operations)


# Residuals


def residual_sums_name(number: int) -> str:
    """Return the name of the `number` sums of earlier layers that a layer selects from."""
    return f"sums.{number}"


@lru_cache(maxsize=128)  # layers share them
def attention_residual(name: str, x: str, y: str, number: int) -> tuple[Op, ...]:
    """_apply_attn_res: the sum of `number` sums of earlier layers and x, weighted by a softmax over one number each.

    The weights of the norm and of the projection are multiplied with each other; no module is called.
    """
    together, row, f = f"b s {number + 1} h", f"b s {number + 1}", "fp32"
    t = {
        part: f"{y}.{part}"
        for part in (
            *("all", "all32", "square", "variance", "shifted", "rstd", "keys", "norm32", "proj32", "weight"),
            *("product", "numbers", "probs", "mix"),
        )
    }
    norm, proj = _selection_weights(name)
    return (
        Op(
            f"{name}.cat", (residual_sums_name(number), x), (Tensor(t["all"], together),), gradient="view", source=_CODE
        ),
        ops.cast(f"{name}.float", t["all"], t["all32"], together, f),
        ops.square(f"{name}.pow", t["all32"], t["square"], together),
        Op(f"{name}.mean", (t["square"],), (Tensor(t["variance"], row),), source=f"{ops.DERIVATIVES}: mean.dim"),
        ops.add_number(f"{name}.eps", t["variance"], t["shifted"], row),
        ops.rsqrt(f"{name}.rsqrt", t["shifted"], t["rstd"], row),
        ops.spread(f"{name}.scale", t["all32"], t["rstd"], t["keys"], together),
        Op(f"{name}_norm.float", (), (Tensor(t["norm32"], "h", f),), (norm,), cast=True, source=_CODE),
        Op(f"{name}_proj", (), (Tensor(t["proj32"], "h", f),), (proj,), cast=True, source=_CODE),
        ops.mul(f"{name}.weight", t["norm32"], t["proj32"], t["weight"], "h"),
        ops.release_names(t["norm32"], t["proj32"]),
        ops.spread(f"{name}.product", t["keys"], t["weight"], t["product"], together),
        *summed(f"{name}.sum", t["product"], t["numbers"], row),
        *ops.softmax(f"{name}.softmax", t["numbers"], t["probs"], row),
        ops.matmul(f"{name}.mix", t["probs"], t["all32"], t["mix"], "b s h"),
        ops.cast(f"{name}.cast", t["mix"], y, "b s h", f"={t['all']}"),
        ops.release_names(
            *(t[part] for part in ("all", "all32", "variance", "keys", "weight", "numbers", "probs", "mix"))
        ),
    )


def _selection_weights(name: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{name}_norm.weight", "h", "norm"),
        Weight(f"{name}_proj.weight", "1 h", "attention", matrix=True, rows=1, bypasses_module=True),
    )


@lru_cache(maxsize=4)
def _norm(name: str, x: str, y: str) -> tuple[Op, ...]:
    return ops.rms_norm(name, x, y, "b s h", "h")


def attention_residual_block(
    layer: Layer, attention: tuple[Op, ...], feed: tuple[Op, ...], held: tuple[str, ...] = ()
) -> Block:
    """KimiDecoderLayer._forward_attn_residual.

    The selected sum is normalised and goes through attention, from `n1` to `ao`; the next one through the MLP, from
    `n2` to `mo`. Both outputs are added to the sum handed on by the layers before. A layer that opens a new sum appends
    its input to the sums that later layers select from.
    """
    number, first, name = layer.choosable_sums, "h1", "self_attention_res"
    selected = attention_residual(name, "x", first, number) if number else ()
    if not number:  # the first layer has the weights, but nothing to select from
        first, selected = "x", (Op(f"{name}_proj", weights=_selection_weights(name), gradient="none"),)
    opened: tuple[Op, ...] = ()
    if layer.opens_sum:
        before = (residual_sums_name(number),) if number else ()
        sums = Tensor(residual_sums_name(number + 1), f"b s {number + 1} h")
        opened = (Op("block_residual.cat", (*before, "x"), (sums,), gradient="view", source=_CODE),)
    total = "ao" if layer.opens_sum else "x1"
    return Block(
        "model.layers",
        (
            *selected,
            *opened,
            *_norm("input_layernorm", first, "n1"),
            *((ops.release_names("h1"),) if number else ()),
            *attention,
            *(() if layer.opens_sum else (ops.add("residual_1", "x", "ao", "x1", "b s h"),)),
            *attention_residual("mlp_res", total, "h2", number + layer.opens_sum),
            ops.release_names("ao"),
            *_norm("post_attention_layernorm", "h2", "n2"),
            ops.release_names("h2"),
            *feed,
            ops.add("residual_2", total, "mo", "y", "b s h"),
            ops.release_names("positions", *held),
        ),
        shares=(residual_sums_name(number + 1),) if layer.opens_sum else (),
        returned=True,
        replaces=(residual_sums_name(number),) if layer.opens_sum and number else (),
    )


# MLPs


def situ(name: str, x: str, y: str, shape: str, bounded: bool = True) -> tuple[Op, ...]:
    """SituAndMul, all in fp32: `beta * tanh(gate / beta) * sigmoid(gate)` times the other half of x.

    `bounded`: the other half goes through a tanh as well. The gradient of either half is as wide as both.
    """
    f, halves = "fp32", ("gate", "up")
    t = {part: f"{y}.{part}" for part in ("divided", "tanh", "curve", "open", "act", "over", "bent", "bound", "wide")}
    up = t["bound"] if bounded else f"{y}.up32"
    return (
        *(
            op
            for half in halves
            for op in (
                ops.view(f"{name}.{half}", x, f"{y}.{half}", shape, gradient="new"),
                ops.cast(f"{name}.{half}_float", f"{y}.{half}", f"{y}.{half}32", shape, f),
            )
        ),
        ops.scale(f"{name}.divide", f"{y}.gate32", t["divided"], shape),
        exp(f"{name}.tanh", t["divided"], t["tanh"], shape),
        ops.scale(f"{name}.beta", t["tanh"], t["curve"], shape),
        routers.sigmoid(f"{name}.sigmoid", f"{y}.gate32", t["open"], shape),
        ops.mul(f"{name}.act", t["curve"], t["open"], t["act"], shape),
        *(
            (
                ops.scale(f"{name}.divide_up", f"{y}.up32", t["over"], shape),
                exp(f"{name}.tanh_up", t["over"], t["bent"], shape),
                ops.scale(f"{name}.linear_beta", t["bent"], t["bound"], shape),
                ops.release_names(f"{y}.up", f"{y}.up32"),
            )
            if bounded
            else ()
        ),
        ops.mul(f"{name}.product", t["act"], up, t["wide"], shape),
        ops.cast(f"{name}.cast", t["wide"], y, shape, f"={x}"),
        ops.release_names(x, f"{y}.gate", f"{y}.gate32", t["act"], up),
    )


def activation(m: ModelSpec) -> Act | None:
    """Return the builder of the activation of gate and up joined, or None for Kimi Linear's gated MLP."""
    return partial(situ, bounded=m.config.get("activation_situ_linear_beta") is not None) if _uses_situ(m) else None


def _uses_situ(m: ModelSpec) -> bool:
    return m.hidden_act == "situ"


def mlp(x: str, y: str, act: Act | None, name: str = "mlp", width: str = "f") -> tuple[Op, ...]:
    """KimiMLP. With `act`, gate and up are concatenated before it."""
    if act is None:
        return gated_mlp(x, y, name, width=width)
    shape = f"b s {width}"
    return (
        ops.linear(f"{name}.gate_proj", x, "gate", width, "h", "mlp"),
        ops.linear(f"{name}.up_proj", x, "up", width, "h", "mlp"),
        ops.cat(f"{name}.cat", ("gate", "up"), "gate_up", f"b s 2 {width}", gradient="view"),
        *act(f"{name}.act_fn", "gate_up", "product", shape),
        ops.linear(f"{name}.down_proj", "product", y, "h", width, "mlp"),
        ops.release_names("gate_up", x),
    )


def kimi_mlp(m: ModelSpec, kind: str, routed: tuple[Op, ...]) -> tuple[Op, ...]:
    """The MLP of layers of a kind: dense, or routed experts plus shared ones, of which the routed may read a narrower
    space."""
    act = activation(m)
    if kind == "dense":
        return mlp("n2", "mo", act)
    narrows = m.config.get("routed_expert_hidden_size") is not None
    x, routed_out, width = ("latent", "routed.low", "hl") if narrows else ("n2", "routed", "h")

    def expert_act(name: str, joined: str, inner: str) -> tuple[Op, ...]:
        return act(name, joined, inner, f"{routers.PAIRS} m") if act is not None else ()

    expert_ops = experts.experts(x, routed_out, width=width, act=expert_act if act is not None else None)
    down = up = ()
    if narrows:
        normed = "routed.normed" if m.get("latent_moe_use_norm", False) else routed_out
        norm = (
            ops.rms_norm("mlp.routed_expert_norm", routed_out, normed, "b s hl", "hl") if normed != routed_out else ()
        )
        down = (ops.linear("mlp.routed_expert_down_proj", "n2", x, "hl", "h", "mlp", flat=True),)
        up = (
            *norm,
            *((ops.release_names(routed_out),) if norm else ()),
            ops.linear("mlp.routed_expert_up_proj", normed, "routed", "h", "hl", "mlp", flat=True),
        )
    return (
        *routed,
        *down,
        *mixture(x, (), mark_assumed(expert_ops, EXPERTS) if act is not None or narrows else expert_ops, leaves=False),
        *up,
        *mlp("n2", "shared", act, "mlp.shared_experts", width="fs"),
        ops.add("mlp.add", "routed", "shared", "mo", "b s h"),
        ops.release_names("routed", "shared", *routers.HELD, *((x,) if narrows else ()), "n2"),
    )
