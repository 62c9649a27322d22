"""What Kimi K3 adds to Kimi Linear: residuals that are chosen, bounded activations, experts in a narrower space.

transformers 5.24 has no class for it. The parts here follow the code published beside its weights; what they stand in,
the delta rule, the router and the product of the experts, is taken as transformers computes Kimi Linear
(`memplan.catalogue.families.kimi_linear`), and marked as assumed where the published code does it another way: that
calls flash-linear-attention's kernels, and runs the routed experts without gradients.

Letters of their own: `hl` the width of what the routed experts see.

Source: modeling_kimi_linear.py of moonshotai/Kimi-K3, 2026; Attention Residuals (arXiv:2603.15031).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from memplan.catalogue.attention.compressed_keys import summed
from memplan.catalogue.decoder.mlp import gated_mlp
from memplan.catalogue.experts import experts, routers
from memplan.catalogue.experts.experts import mixture
from memplan.catalogue.kernels import ops
from memplan.catalogue.kernels.recurrent import exp
from memplan.core.ir import Block, Keep, Op, Scratch, Tensor, Weight
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

_CODE = "modeling_kimi_linear.py of moonshotai/Kimi-K3"
EXPERTS = "the published code runs the routed experts without gradients; taken as transformers multiplies Kimi Linear's"
DELTA_RULE = "the published code calls flash-linear-attention; taken as transformers' torch code of Kimi Linear"

Act = Callable[[str, str, str, str], tuple[Op, ...]]


def assumed(operations: Iterable[Op], why: str) -> tuple[Op, ...]:
    """The operations, each marked as assumed and `why`."""
    return tuple(op._replace(source=f"assumed: {why}; {op.source}".removesuffix("; ")) for op in operations)


# Residuals


def sums_of(number: int) -> str:
    """The name of the `number` sums of earlier layers that a layer chooses from."""
    return f"sums.{number}"


def chosen(name: str, x: str, y: str, number: int) -> tuple[Op, ...]:
    """_apply_attn_res: `number` sums of earlier layers and x, weighed by a softmax over one number each, and summed.

    The weights of the norm and of the projection are multiplied with one another: no module is called.
    """
    together, row, f = f"b s {number + 1} h", f"b s {number + 1}", "fp32"
    t = {
        part: f"{y}.{part}"
        for part in (
            *("all", "all32", "square", "variance", "shifted", "rstd", "keys", "norm32", "proj32", "weight"),
            *("product", "numbers", "probs", "mix"),
        )
    }
    norm, proj = _choosing(name)
    return (
        Op(f"{name}.cat", (sums_of(number), x), (Tensor(t["all"], together),), gradient="view", source=_CODE),
        ops.cast(f"{name}.float", t["all"], t["all32"], together, f),
        Op(
            f"{name}.pow",
            (t["all32"],),
            (Tensor(t["square"], together),),
            (),
            (Keep(t["all32"], t["all32"]),),
            scratch_back=(Scratch(Tensor("pow", together, f)), Scratch(Tensor("2x", together, f))),
            source=f"{ops.DERIVATIVES}: pow.Tensor_Scalar",
        ),
        Op(f"{name}.mean", (t["square"],), (Tensor(t["variance"], row),), source=f"{ops.DERIVATIVES}: mean.dim"),
        ops.add_number(f"{name}.eps", t["variance"], t["shifted"], row),
        Op(
            f"{name}.rsqrt",
            (t["shifted"],),
            (Tensor(t["rstd"], row),),
            (),
            (Keep(t["rstd"], t["shifted"]),),
            scratch_back=(Scratch(Tensor("cube", row, f)), Scratch(Tensor("half", row, f))),
            source=f"{ops.DERIVATIVES}: rsqrt",
        ),
        ops.spread(f"{name}.scale", t["all32"], t["rstd"], t["keys"], together),
        Op(f"{name}_norm.float", (), (Tensor(t["norm32"], "h", f),), (norm,), cast=True, source=_CODE),
        Op(f"{name}_proj", (), (Tensor(t["proj32"], "h", f),), (proj,), cast=True, source=_CODE),
        ops.mul(f"{name}.weight", t["norm32"], t["proj32"], t["weight"], "h"),
        ops.leave(t["norm32"], t["proj32"]),
        ops.spread(f"{name}.product", t["keys"], t["weight"], t["product"], together),
        *summed(f"{name}.sum", t["product"], t["numbers"], row),
        *ops.softmax(f"{name}.softmax", t["numbers"], t["probs"], row),
        ops.matmul(f"{name}.mix", t["probs"], t["all32"], t["mix"], "b s h"),
        ops.cast(f"{name}.cast", t["mix"], y, "b s h", f"={t['all']}"),
        ops.leave(*(t[part] for part in ("all", "all32", "variance", "keys", "weight", "numbers", "probs", "mix"))),
    )


def _choosing(name: str) -> tuple[Weight, Weight]:
    return (
        Weight(f"{name}_norm.weight", "h", "norm"),
        Weight(f"{name}_proj.weight", "1 h", "attention", matrix=True, rows=1, direct=True),
    )


def block(layer: Layer, attention: tuple[Op, ...], feed: tuple[Op, ...], held: tuple[str, ...] = ()) -> Block:
    """KimiDecoderLayer._forward_attn_residual: what is chosen, normed, through attention from `n1` to `ao`; the same to
    the MLP, from `n2` to `mo`; both outputs are added to the sum that the layers before handed on.

    A layer that opens a sum puts what it was given to those that later layers choose from.
    """
    number, first, name = layer.sums, "h1", "self_attention_res"
    given = chosen(name, "x", first, number) if number else ()
    if not number:  # the first layer has the weights, and nothing to choose from
        first, given = "x", (Op(f"{name}_proj", weights=_choosing(name), gradient="none"),)
    opened: tuple[Op, ...] = ()
    if layer.opens:
        before = (sums_of(number),) if number else ()
        made = Tensor(sums_of(number + 1), f"b s {number + 1} h")
        opened = (Op("block_residual.cat", (*before, "x"), (made,), gradient="view", source=_CODE),)
    total = "ao" if layer.opens else "x1"
    return Block(
        "model.layers",
        (
            *given,
            *opened,
            *ops.rms_norm("input_layernorm", first, "n1", "b s h", "h"),
            *((ops.leave("h1"),) if number else ()),
            *attention,
            *(() if layer.opens else (ops.add("residual_1", "x", "ao", "x1", "b s h"),)),
            *chosen("mlp_res", total, "h2", number + layer.opens),
            ops.leave("ao"),
            *ops.rms_norm("post_attention_layernorm", "h2", "n2", "b s h", "h"),
            ops.leave("h2"),
            *feed,
            ops.add("residual_2", total, "mo", "y", "b s h"),
            ops.leave("positions", *held),
        ),
        shares=(sums_of(number + 1),) if layer.opens else (),
        returned=True,
        replaces=(sums_of(number),) if layer.opens and number else (),
    )


# MLPs


def situ(name: str, x: str, y: str, shape: str, bounded: bool = True) -> tuple[Op, ...]:
    """SituAndMul, all in fp32: `beta * tanh(gate / beta) * sigmoid(gate)` times the other half of x, `bounded` by a
    tanh too. The gradient of either half is as wide as both."""
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
                ops.leave(f"{y}.up", f"{y}.up32"),
            )
            if bounded
            else ()
        ),
        ops.mul(f"{name}.product", t["act"], up, t["wide"], shape),
        ops.cast(f"{name}.cast", t["wide"], y, shape, f"={x}"),
        ops.leave(x, f"{y}.gate", f"{y}.gate32", t["act"], up),
    )


def activation(m: ModelSpec) -> Act | None:
    """What makes y of both products joined; None for Kimi Linear's gated MLP."""
    return partial(situ, bounded=m.config.get("activation_situ_linear_beta") is not None) if _bounded(m) else None


def _bounded(m: ModelSpec) -> bool:
    return m.hidden_act == "situ"


def mlp(x: str, y: str, act: Act | None, name: str = "mlp", width: str = "f") -> tuple[Op, ...]:
    """KimiMLP: with `act`, both products are joined before it."""
    if act is None:
        return gated_mlp(x, y, name, width=width)
    shape = f"b s {width}"
    return (
        ops.linear(f"{name}.gate_proj", x, "gate", width, "h", "mlp"),
        ops.linear(f"{name}.up_proj", x, "up", width, "h", "mlp"),
        Op(
            f"{name}.cat",
            ("gate", "up"),
            (Tensor("gate_up", f"b s 2 {width}"),),
            gradient="view",
            source=f"{ops.DERIVATIVES}: cat",
        ),
        *act(f"{name}.act_fn", "gate_up", "product", shape),
        ops.linear(f"{name}.down_proj", "product", y, "h", width, "mlp"),
        ops.leave("gate_up", x),
    )


def feed(m: ModelSpec, layer: Layer, routed: tuple[Op, ...]) -> tuple[Op, ...]:
    """A layer's MLP: a dense one, or experts, in a narrower space where the config says so, and those of all tokens."""
    act = activation(m)
    if layer.ffn == "dense":
        return mlp("n2", "mo", act)
    low = m.config.get("routed_expert_hidden_size") is not None
    x, made, width = ("latent", "routed.low", "hl") if low else ("n2", "routed", "h")

    def of_experts(name: str, joined: str, inner: str) -> tuple[Op, ...]:
        return act(name, joined, inner, f"{routers.PAIRS} m") if act is not None else ()

    every = experts.experts(x, made, width=width, act=of_experts if act is not None else None)
    down = up = ()
    if low:
        normed = "routed.normed" if m.get("latent_moe_use_norm", False) else made
        norm = ops.rms_norm("mlp.routed_expert_norm", made, normed, "b s hl", "hl") if normed != made else ()
        down = (ops.linear("mlp.routed_expert_down_proj", "n2", x, "hl", "h", "mlp", flat=True),)
        up = (
            *norm,
            *((ops.leave(made),) if norm else ()),
            ops.linear("mlp.routed_expert_up_proj", normed, "routed", "h", "hl", "mlp", flat=True),
        )
    return (
        *routed,
        *down,
        *mixture(x, (), assumed(every, EXPERTS) if act is not None or low else every, leaves=False),
        *up,
        *mlp("n2", "shared", act, "mlp.shared_experts", width="fs"),
        ops.add("mlp.add", "routed", "shared", "mo", "b s h"),
        ops.leave("routed", "shared", *routers.HELD, *((x,) if low else ()), "n2"),
    )


def of_its_own(m: ModelSpec) -> bool:
    """Whether a config has anything of Kimi K3's: then transformers' class of Kimi Linear is not what it means."""
    kda = m.part("linear_attn_config")
    keys = ("attn_res_block_size", "routed_expert_hidden_size", "mla_use_output_gate")
    return (
        any(m.config.get(key) for key in keys)
        or _bounded(m)
        or any(kda.get(key) for key in ("use_full_rank_gate", "gate_lower_bound"))
    )
