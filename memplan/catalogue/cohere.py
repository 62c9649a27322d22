"""Cohere: attention and MLP side by side, LayerNorms written out in fp32, and a rotation in fp32."""

from __future__ import annotations

from functools import partial

from memplan.catalogue import ops
from memplan.catalogue.attention import Wiring
from memplan.catalogue.granite import scaled_logits
from memplan.catalogue.llama import gated_mlp, llama_attention, returned, runs
from memplan.catalogue.mixed import after, before, tables
from memplan.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.layers import Layer
from memplan.models import ModelSpec

_SOURCE = "transformers 5.24 models/cohere/modeling_cohere.py"
_Q, _K = "b s a d", "b s k d"


def layer_norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """Keeps three tensors in fp32: x less its mean twice, for the variance and the product, and the normalised x.

    The product's cast of the weight is said after it, so that the weight is met first where it trains.
    """
    row = shape.rsplit(" ", 1)[0]
    x32, mean, centred, square, again, n32, y32 = (
        f"{y}.{part}" for part in ("x32", "mean", "centred", "square", "centred_again", "n32", "y32")
    )
    variance, shifted, rstd, w32 = (f"{y}.{part}" for part in ("variance", "shifted", "rstd", "w32"))
    w = Weight(f"{name}.weight", axis, "norm")
    *_, pow_, mean_of_square, eps, rsqrt, scale, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    return (
        ops.cast(f"{name}.float", x, x32, shape, "fp32"),
        mean_of_square._replace(reads=(x32,), writes=(Tensor(mean, row),)),
        _centre(f"{name}.centre", x32, mean, centred, shape),
        pow_._replace(reads=(centred,), writes=(Tensor(square, shape),), keeps=(Keep(centred, centred),)),
        mean_of_square._replace(name=f"{name}.variance", reads=(square,), writes=(Tensor(variance, row),)),
        ops.leave(centred),
        _centre(f"{name}.centre_again", x32, mean, again, shape),
        eps._replace(reads=(variance,), writes=(Tensor(shifted, row),)),
        rsqrt._replace(reads=(shifted,), writes=(Tensor(rstd, row),), keeps=(Keep(rstd, shifted),)),
        scale._replace(reads=(again, rstd), writes=(Tensor(n32, shape),), keeps=(Keep(rstd, again), Keep(again, rstd))),
        ops.leave(x32, again),
        ops.weigh(f"{name}.weight", n32, y32, shape, w),
        Op(f"{name}.float_weight", (), (Tensor(w32, axis, "fp32"),), (w._replace(trains=False),), cast=True),
        ops.cast(f"{name}.cast", y32, y, shape, f"={x}")._replace(reads=(y32, w32), keeps=(Keep(w32, y32),)),
        ops.leave(mean, variance, y32),
    )


def _centre(name: str, x: str, mean: str, y: str, shape: str) -> Op:
    """The gradient of the mean is the negated gradient, summed."""
    return Op(
        name,
        (x, mean),
        (Tensor(y, shape),),
        gradient="same",
        scratch_back=(Scratch(Tensor("negative gradient", shape, f"={y}"), mean),),
        source=f"{ops.DERIVATIVES}: sub.Tensor",
    )


def rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """q and k are cast to fp32 first, rotated pair by pair, and cast back."""
    return (
        ops.cast(f"{name}.float_q", q, "q.wide", _Q, "fp32"),
        ops.cast(f"{name}.float_k", k, "k.wide", _K, "fp32"),
        *ops.rotate(f"{name}.rope_q", "q.wide", "q.rotated", _Q, "b s a rot2"),
        *ops.rotate(f"{name}.rope_k", "k.wide", "k.rotated", _K, "b s k rot2"),
        ops.cast(f"{name}.cast_q", "q.rotated", "q", _Q, f"={q}"),
        ops.cast(f"{name}.cast_k", "k.rotated", "k", _K, f"={k}"),
        ops.leave("q.wide", "k.wide", "q.rotated", "k.rotated"),
        ops.leave(q, k),
    )


def norm_and_rope(name: str, q: str, k: str) -> tuple[Op, ...]:
    """Each head of q and k has a norm with a weight of its own."""
    return (
        *layer_norm(f"{name}.q_norm", q, "q.normed", _Q, "a d"),
        ops.leave(q),
        *layer_norm(f"{name}.k_norm", k, "k.normed", _K, "k d"),
        ops.leave(k),
        *rope(name, "q.normed", "k.normed"),
    )


def cohere(m: ModelSpec, wiring: Wiring, mixed: bool = False) -> Stack:
    """One norm for both branches, and logits multiplied by a number. Cohere 2 rotates in layers with a window only."""
    bias = m.get("attention_bias", False)
    turn = norm_and_rope if m.get("use_qk_norm", False) and not mixed else rope

    def block(layer: Layer) -> Block:
        heads = llama_attention(
            m, wiring, "n1", "ao", bias=bias, out_bias=bias, rotary=layer.rotary, sliding=layer.sliding, turn=turn
        )
        return Block(
            "model.layers",
            (
                *layer_norm("input_layernorm", "x", "n1", "b s h", "h"),
                *heads,
                *gated_mlp("n1", "mo"),
                ops.add("residual_1", "x", "ao", "x1", "b s h"),
                ops.add("residual_2", "x1", "mo", "y", "b s h"),
                ops.leave("n1", "ao", "mo", "positions", *returned(wiring)),
            ),
        )

    last = after(m, wiring, mixed, layer_norm)
    return Stack(before(wiring, mixed, tables()), runs(m, block), scaled_logits(last))


BUILDERS = {"cohere": cohere, "cohere2": partial(cohere, mixed=True)}
