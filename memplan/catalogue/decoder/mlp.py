"""Gated MLPs, with separate or fused gate and up projections."""

from __future__ import annotations

from functools import partial

from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor


def fused_mlp(
    x: str,
    y: str,
    name: str = "mlp",
    layers: tuple[str, str] = ("gate_up_proj", "down_proj"),
    bias: bool = False,
    width: str = "f",
) -> tuple[Op, ...]:
    """Return an MLP with fused gate and up projections.

    The joint output lives as long as either half. The gradients of the halves are joined in one tensor.
    """
    up, down = layers
    shape = f"b s {width}"
    return (
        ops.linear(f"{name}.{up}", x, "gate_up", f"2 {width}", "h", "mlp", bias),
        ops.split(f"{name}.chunk", "gate_up", (Tensor("gate", shape), Tensor("up", shape))),
        ops.activation(f"{name}.activation_fn", "gate", "act", shape),
        ops.mul(f"{name}.product", "up", "act", "product", shape),
        ops.linear(f"{name}.{down}", "product", y, "h", width, "mlp", bias),
        ops.release_names("gate", x),
    )


def gated_mlp(
    x: str,
    y: str,
    name: str = "mlp",
    bias: bool = False,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    width: str = "f",
    flat: bool = False,
    act: tuple[Op, ...] = (),
    norm: str = "",
) -> tuple[Op, ...]:
    """Return `down_proj(act(gate_proj(x)) * up_proj(x))`.

    flat  the input is already two-dimensional
    act   the activation of `gate`, if it is not one kernel
    norm  name of the RMSNorm of the product, if there is one
    """
    gate, up, down = projections
    shape, linear = f"b s {width}", partial(ops.linear, group="mlp", bias=bias, flat=flat)
    *activated, product = ops.unit(
        f"swiglu {name}",
        *(act or (ops.activation(f"{name}.act_fn", "gate", "act", shape),)),
        ops.mul(f"{name}.product", "act", "up", "product", shape),
    )
    return (
        linear(f"{name}.{gate}", x, "gate", width, "h"),
        *activated,
        linear(f"{name}.{up}", x, "up", width, "h"),
        product,
        *(
            (*ops.rms_norm(f"{name}.{norm}", "product", "normed", shape, width), ops.release_names("product"))
            if norm
            else ()
        ),
        linear(f"{name}.{down}", "normed" if norm else "product", y, "h", width),
        ops.release_names(x),
    )
