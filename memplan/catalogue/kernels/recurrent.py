"""Operations shared by state-space models and linear attention, as transformers' plain torch code computes them."""

from __future__ import annotations

from memplan.catalogue.kernels import ops, packages
from memplan.catalogue.kernels.recurrent_step import cached_state, convolved
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight


def exp(name: str, x: str, y: str, shape: str) -> Op:
    """Return an operation that keeps its output: exp, sigmoid or tanh."""
    return ops.keeping_output(name, x, y, shape, "exp, sigmoid")


def pad(name: str, x: str, y: str, shape: str) -> Op:
    """Pad rows to a multiple of the chunk size. This copies even if there is nothing to add."""
    return Op(name, (x,), (Tensor(y, shape, f"={x}"),), source=f"{ops.DERIVATIVES}: constant_pad_nd")


def differences(name: str, x: str, y: str, shape: str) -> Op:
    """Return differences of the running sums x. The gradient of what is subtracted is negated in full size."""
    negative = (Scratch(Tensor("negative", shape, "fp32")),)
    return Op(name, (x,), (Tensor(y, shape),), scratch_back=negative, source=f"{ops.DERIVATIVES}: sub.Tensor")


def cumulate(name: str, x: str, y: str, shape: str) -> Op:
    """Return running sums. Their gradient is flipped, summed and flipped back."""
    turned = (Scratch(Tensor("flipped", shape, f"={y}")), Scratch(Tensor("sums", shape, f"={y}")))
    return Op(name, (x,), (Tensor(y, shape),), scratch_back=turned, source=f"{ops.DERIVATIVES}: cumsum")


def negative_exp(name: str, y: str, axis: str) -> tuple[Op, ...]:
    """`-exp(A_log.float())`."""
    w = Weight(name, axis, "mixer")
    return (
        Op(
            f"{name}.exp",
            (),
            (Tensor(f"{y}.exp", axis, "fp32"),),
            (w,),
            (Keep(f"{y}.exp", name),),
            scratch=(Tensor("A_log in fp32", axis, "fp32"),),
            source=f"{ops.DERIVATIVES}: exp",
        ),
        ops.scale(f"{name}.neg", f"{y}.exp", y, axis),
    )


def causal_conv(
    name: str, x: str, y: str, axis: str, bias: bool, wiring: Wiring | None = None, activates: bool = True
) -> tuple[Op, ...]:
    """Return `silu(conv1d(x))` along the sequence, with one filter per channel of `axis`. x is a transposed `b s axis`.

    The convolution pads both ends and a view drops the extra rows, so silu keeps `s_conv` rows. Inside, x is made
    contiguous. Without silu, if `activates` is false.
    Source: transformers' causal_conv1d_fn; torch 2.13 aten/src/ATen/native/Convolution.cpp.
    """
    w = Weight(f"{name}.weight", f"{axis} 1 kernel", "mixer", is_read_as_view=True)
    weights = (w, *((Weight(f"{name}.bias", axis, "mixer"),) if bias else ()))
    cast_x, shape = f"{y}.given", f"b {axis} s"
    contiguous = Tensor("contiguous input", shape, f"={cast_x}")
    state = cached_state(wiring, f"{name}.state", "conv.state", f"b {axis} kernel", f"={x}", x) if wiring else ()
    if wiring and wiring.decodes:
        return (*state, *convolved(name, x, y, axis, weights, activates))
    if wiring and "causal_conv1d" in wiring.packages:
        return (*state, packages.causal_conv1d(name, x, y, axis, weights))
    return (
        *state,
        ops.cast(f"{name}.to_weight", x, cast_x, f"b s {axis}", f"={w.name}"),
        Op(
            name,
            (cast_x,),
            (Tensor(f"{y}.conv", f"b {axis} s_conv"),),
            weights,
            (Keep(w.name, cast_x), Keep(cast_x, cast_x), *(Keep(cast_x, v.name) for v in weights)),
            scratch=(contiguous,),
            scratch_back=(Scratch(contiguous),),
            autocast="lower",
            source=f"{ops.DERIVATIVES}: convolution",
        ),
        ops.view(f"{name}.rows", f"{y}.conv", f"{y}.rows", shape, gradient="new"),
        *((ops.activation(f"{name}.act", f"{y}.rows", f"{y}.act", shape),) if activates else ()),
        ops.cast(f"{name}.cast_back", f"{y}.act" if activates else f"{y}.rows", y, shape, f"={x}"),
    )


def unpadded(wiring: Wiring, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Multiply `x` by the padding mask, since sequence mixers need zeros at padded positions."""
    if not wiring.padded or wiring.decodes:  # a cache that holds tokens has no mask
        return (ops.view("unpadded", x, y, shape),)
    return (
        Op(
            "unpadded",
            (x, "attention_mask"),
            (Tensor(y, shape, f"={x}"),),
            (),
            (Keep("attention_mask", x),),
            source="transformers 5.24 models/mamba2/modeling_mamba2.py apply_mask_to_padding_states",
        ),
    )
