"""Activations and dropout, fused in one kernel or written out as several operations."""

from __future__ import annotations

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
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
            return relu_squared(name, x, y, shape)
        case "xielu":
            return xielu(name, x, y, shape)
        case _:
            return (ops.activation(name, x, y, shape),)


def relu(name: str, x: str, y: str, shape: str) -> Op:
    """Return relu, which keeps its output."""
    return ops.keeping_output(name, x, y, shape, "relu")


def relu_squared(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return relu squared, which keeps the output of relu, and holds it and x until it returns."""
    made = f"{y}.relu"
    return (relu(f"{name}.relu", x, made, shape), power(f"{name}.square", made, y, shape), ops.release_names(made, x))


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


def xielu(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return Apertus' activation, written out: `a * x * x + b * x` above 0, else `(expm1(min(x, e)) - x) * c + b * x`.

    `a` and `c` are the softplus of a weight each; `b` and `e` are buffers.
    """
    source = "transformers 5.24 activations.py XIELUActivation"
    names = ("above", "ax", "axx", "bx", "first", "least", "exp", "less", "cx", "bx2", "second")
    above, ax, axx, bx, first, least, exp, less, cx, bx2, second = (f"{y}.{part}" for part in names)
    a, c, c0 = f"{y}.a", f"{y}.c", f"{y}.c0"
    beta, eps = (Weight(f"{name}.{buffer}", "", "buffer", "", False) for buffer in ("beta", "eps"))

    def softplus(part: str, out: str) -> Op:
        w = Weight(f"{name}.alpha_{part}", "1", "mlp")
        return Op(
            f"{name}.softplus_{part}",
            (),
            (Tensor(out, "1"),),
            (w,),
            (Keep(w.name, w.name),),
            autocast="fp32",
            source=f"{ops.DERIVATIVES}: softplus",
        )

    def times_beta(part: str, out: str) -> Op:
        made = Tensor(out, shape, f"={x}")  # a tensor without axes widens nothing
        return Op(f"{name}.{part}", (x,), (made,), (beta,), (Keep(beta.name, x),), source=source)

    return (
        softplus("p", a),
        softplus("n", c0),
        ops.add_number(f"{name}.alpha_n", c0, c, "1"),
        ops.release_names(c0),
        Op(f"{name}.above", (x,), (Tensor(above, shape, "bool"),), gradient="none", source=source),
        ops.spread(f"{name}.ax", x, a, ax, shape, small_first=True),
        ops.mul(f"{name}.axx", ax, x, axx, shape),
        times_beta("bx", bx),
        ops.add(f"{name}.first", axx, bx, first, shape),
        ops.release_names(ax, axx, bx),
        Op(
            f"{name}.least",
            (x,),
            (Tensor(least, shape, f"={x}"),),
            (eps,),
            (Keep(x, x), Keep(eps.name, x)),
            scratch_back=(Scratch(Tensor("equal", shape, "bool")), Scratch(Tensor("half", shape, f"={x}"))),
            source=f"{ops.DERIVATIVES}: minimum",
        ),
        Op(
            f"{name}.expm1",
            (least,),
            (Tensor(exp, shape),),
            (),
            (Keep(exp, least),),
            autocast="fp32",
            scratch_back=(Scratch(Tensor("plus one", shape, f"={exp}")),),
            source=f"{ops.DERIVATIVES}: expm1",
        ),
        ops.release_names(least),
        ops.view(f"{name}.minus", x, f"{y}.minus", shape, "new"),
        ops.add(f"{name}.less", exp, f"{y}.minus", less, shape),
        ops.release_names(exp),
        ops.spread(f"{name}.cx", less, c, cx, shape),
        ops.release_names(less),
        times_beta("bx2", bx2),
        ops.add(f"{name}.second", cx, bx2, second, shape),
        ops.release_names(cx, bx2),
        Op(
            name,
            (first, second, above),
            (Tensor(y, shape),),
            (),
            (Keep(above, first), Keep(above, second)),
            source=f"{ops.DERIVATIVES}: where",
        ),
        ops.release_names(a, c, above, first, second),
    )
