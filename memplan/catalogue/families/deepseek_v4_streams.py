"""DeepSeek V4's hyper-connections: several residual streams, mixed before and after every block."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.attention.compressed_keys import plain_norm, summed
from memplan.catalogue.experts import routers
from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Tensor, Weight

STREAMS = "b s n h"


def stream_weights(name: str, x: str) -> tuple[Op, ...]:
    """The weights that combine the streams into one, and those that spread a module's output over them."""
    t = name
    return (
        *project_streams(name, x, "nw", "fn", t),
        ops.split(
            f"{name}.split",
            f"{t}.mixes",
            (Tensor(f"{t}.pre.raw", "b s n"), Tensor(f"{t}.post.raw", "b s n"), Tensor(f"{t}.comb.raw", "b s n2")),
        ),
        Op(f"{name}.base", (), (Tensor(f"{t}.bases", "nw", "fp32"),), (Weight(f"{name}.base", "nw", "mixer", "fp32"),)),
        Op(
            f"{name}.scales",
            (),
            (Tensor(f"{t}.scales", "3", "fp32"),),
            (Weight(f"{name}.scale", "3", "mixer", "fp32"),),
        ),
        *_scaled(f"{name}.pre", f"{t}.pre.raw", f"{t}.pre.sum", "b s n", t),
        routers.sigmoid(f"{name}.pre.sigmoid", f"{t}.pre.sum", f"{t}.pre.gate", "b s n"),
        Op(f"{name}.pre.eps", (f"{t}.pre.gate",), (Tensor(f"{t}.pre", "b s n"),), gradient="same"),
        *_scaled(f"{name}.post", f"{t}.post.raw", f"{t}.post.sum", "b s n", t),
        routers.sigmoid(f"{name}.post.sigmoid", f"{t}.post.sum", f"{t}.post.gate", "b s n"),
        ops.scale(f"{name}.post.twice", f"{t}.post.gate", f"{t}.post", "b s n"),
        *_scaled(f"{name}.comb", f"{t}.comb.raw", f"{t}.comb.sum", "b s n2", t),
        *ops.softmax(f"{name}.comb.softmax", f"{t}.comb.sum", f"{t}.comb.soft", "b s n2"),
        Op(f"{name}.comb.eps", (f"{t}.comb.soft",), (Tensor(f"{t}.comb.0", "b s n2"),), gradient="same"),
    )


def project_streams(name: str, x: str, out: str, weight: str, t: str) -> tuple[Op, ...]:
    """All streams of a token, normalised together in fp32 and projected."""
    w = Weight(f"{name}.{weight}", f"{out} nh", "mixer", "fp32", rows=1)
    product = ops.linear(f"{name}.{weight}", f"{t}.normed", f"{t}.mixes", out, "nh", "mlp")
    keeps = (Keep(w.name, f"{t}.normed"), Keep(f"{t}.normed", w.name))
    return (
        ops.view(f"{name}.flatten", x, f"{t}.rows", "b s nh"),
        ops.cast(f"{name}.float", f"{t}.rows", f"{t}.flat", "b s nh", "fp32"),
        *plain_norm(f"{name}.input_norm", f"{t}.flat", f"{t}.normed", "b s nh"),
        ops.release_names(f"{t}.flat"),
        product._replace(weights=(w,), keeps=keeps),
    )


def _scaled(name: str, x: str, y: str, shape: str, t: str) -> tuple[Op, ...]:
    return (
        ops.spread(f"{name}.scale", x, f"{t}.scales", f"{y}.scaled", shape),
        Op(f"{name}.shift", (f"{y}.scaled", f"{t}.bases"), (Tensor(y, shape),), gradient="same"),
    )


def sinkhorn(name: str, iterations: int) -> Iterator[Op]:
    """Sinkhorn-Knopp iterations: divide rows and columns by their sums in turn. Each division keeps both operands."""
    t = name
    for i in range(2 * iterations - 1):
        total, shifted = f"{t}.{i}.total", f"{t}.{i}.shifted"
        yield from summed(f"{name}.sum_{i}", f"{t}.{i}", total, "b s n")
        yield Op(f"{name}.eps_{i}", (total,), (Tensor(shifted, "b s n"),), gradient="same")
        yield ops.divide(f"{name}.divide_{i}", f"{t}.{i}", shifted, f"{t}.{i + 1}", "b s n2", quotient=f"={t}.{i}")


def combine_streams(name: str, x: str, y: str, iterations: int) -> tuple[Op, ...]:
    """Combine the streams into the input of a module."""
    t = name
    last = f"{t}.comb.{2 * iterations - 1}"
    return (
        *stream_weights(name, x),
        *sinkhorn(f"{name}.comb", iterations),
        ops.spread(f"{name}.weigh", x, f"{t}.pre", f"{t}.weighed", STREAMS),
        *summed(f"{name}.collapse", f"{t}.weighed", f"{t}.one", "b s h"),
        ops.cast(f"{name}.to", f"{t}.one", y, "b s h", f"={x}"),
        ops.release_names(f"{t}.mixes", f"{t}.pre", f"{t}.bases", f"{t}.scales"),
        ops.view(f"{name}.comb", last, f"{t}.comb", "b s n2"),
    )


def spread_output(t: str, x: str, result: str, y: str, held: tuple[str, ...] = ()) -> tuple[Op, ...]:
    """Spread a module's output over the streams, and add the streams mixed with each other.

    `t` is the name under which the weights were made.
    """
    name = f"{t}.out"
    return (
        ops.cast(f"{name}.post", f"{t}.post", f"{t}.post.low", "b s n", f"={x}"),
        # autograd materialises both products before it sums one of them
        ops.view(f"{name}.weights", f"{t}.post.low", f"{t}.post.rows", STREAMS, gradient="new"),
        ops.view(f"{name}.result", result, f"{t}.result.rows", STREAMS, gradient="new"),
        ops.mul(f"{name}.spread", f"{t}.post.rows", f"{t}.result.rows", f"{t}.spread", STREAMS),
        ops.cast(f"{name}.comb", f"{t}.comb", f"{t}.comb.low", "b s n2", f"={x}"),
        ops.matmul(f"{name}.mix", f"{t}.comb.low", x, f"{t}.mixed", STREAMS),
        ops.add(f"{name}.add", f"{t}.spread", f"{t}.mixed", y, STREAMS),
        ops.release_names(*held),
    )
