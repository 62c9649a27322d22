"""Activations and dropout, fused in one kernel or written out as several operations."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor
from memplan.models.model import ModelSpec


def drops(m: ModelSpec, *keys: str) -> bool:
    """Return whether any of these dropout probabilities in the config is above 0."""
    return any(m.probability(key) > 0 for key in keys)


def dropped(name: str, x: str, y: str, shape: str, drop: bool) -> tuple[Op, ...]:
    """Return dropout, or a view of x if `drop` is false."""
    return (ops.dropout(name, x, y, shape),) if drop else (ops.view(name, x, y, shape),)


def activation(m: ModelSpec, name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return transformers' activation for `hidden_act`: one kernel, unless transformers writes it out."""
    match m.hidden_act:
        case "gelu_new":
            return gelu_new(name, x, y, shape)
        case "relu":
            return (relu(name, x, y, shape),)
        case "relu2":
            return (relu(f"{name}.relu", x, f"{y}.relu", shape), power(f"{name}.square", f"{y}.relu", y, shape))
        case _:
            return (ops.activation(name, x, y, shape),)


def relu(name: str, x: str, y: str, shape: str) -> Op:
    """Return relu, which keeps its output."""
    return ops.keeping_output(name, x, y, shape, "relu")


def power(name: str, x: str, y: str, shape: str) -> Op:
    """Return `x ** n` for a number n, in fp32 under autocast. Backward computes the derivative in two steps."""
    return Op(
        name,
        (x,),
        (Tensor(y, shape),),
        (),
        (Keep(x, x),),
        scratch_back=(Scratch(Tensor("power", shape, f"={y}")), Scratch(Tensor("derivative", shape, f"={y}"))),
        autocast="fp32",
        source=f"{ops.DERIVATIVES}: pow.Tensor_Scalar",
    )


def gelu_new(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return `0.5 * x * (1 + tanh(c * (x + 0.044715 * x ** 3)))`, written out. It keeps x and three intermediates."""
    half, cube, scaled, inner, outer, tanh, shifted = (
        f"{y}.{part}" for part in ("half", "cube", "scaled", "inner", "outer", "tanh", "one")
    )
    source = "transformers 5.24 activations.py NewGELUActivation"
    return (
        ops.scale(f"{name}.half", x, half, shape),
        power(f"{name}.pow", x, cube, shape),
        ops.scale(f"{name}.cubed", cube, scaled, shape),
        ops.add(f"{name}.sum", x, scaled, inner, shape),
        ops.scale(f"{name}.outer", inner, outer, shape),
        ops.keeping_output(f"{name}.tanh", outer, tanh, shape, "tanh"),
        Op(f"{name}.one", (tanh,), (Tensor(shifted, shape),), gradient="same", source=source),
        ops.mul(name, half, shifted, y, shape),
    )
