"""DeepSeek V4: several residual streams mixed by small matrices, one head of keys that are values too, and keys that
stand for windows of tokens.

Axes of its own: `n` streams, `nh` all of them side by side, `n2` the numbers of a matrix between them, `nw` all that a
token's mixing takes; of a head `d`, `dn` the part that is not rotated; `og` groups of the output projection, `ol` the
width of each and `ogl` of all, `gd` what a group reads; `rc` and `rh` the tokens of a window where keys are compressed
a little (and chosen from, by an indexer of `ih` heads `id` wide) and where much. Of the run: `wc` and `wh` the windows,
`uc` and `uh` the tokens in them, `wc1` one more than the windows, `kc` and `kh` the keys with them, each with a sink
`kc1`, `kh1` and `s1`; `tk` the windows that a query chooses; `several` the sequences of more than one, else 0.
Source: transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue import experts, ops, routers
from memplan.catalogue.attention import Wiring, mask
from memplan.catalogue.latent import joined
from memplan.catalogue.lightning import detached
from memplan.catalogue.llama import inputs, lm_head, positions, runs
from memplan.ir import Block, Keep, Op, Scratch, Stack, Tensor, Weight
from memplan.layers import Layer
from memplan.models import ModelSpec

_SOURCE = "transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py"
_CACHE = f"{_SOURCE} DeepseekV4HCACache.update; transformers 5.24 cache_utils.py DynamicSlidingWindowLayer.update"
_STREAMS = "b s n h"


class Windows(NamedTuple):
    """How a layer compresses keys: the axes of its windows, of the tokens in them and in one, and of all keys."""

    kind: str
    number: str
    tokens: str
    rate: str
    keys: str
    with_sink: str


PLAIN = Windows("", "", "", "", "s", "s1")
SPARSE = Windows("sparse", "wc", "uc", "rc", "kc", "kc1")
HEAVY = Windows("heavy", "wh", "uh", "rh", "kh", "kh1")


# Norms, rotations, small products


def times(name: str, x: str, factor: str, y: str, shape: str) -> Op:
    """`x * factor` where the factor is spread over an axis: for its gradient the product with x is made whole."""
    return Op(
        name,
        (x, factor),
        (Tensor(y, shape),),
        (),
        (Keep(factor, x), Keep(x, factor)),
        scratch_back=(Scratch(Tensor("product", shape, f"={y}"), factor),),
        source=f"{ops.DERIVATIVES}: mul.Tensor",
    )


def summed(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """A sum over an axis that `shape` no longer has: its gradient is spread by a view."""
    return (
        ops.view(f"{name}.rows", x, f"{y}.rows", shape),
        Op(
            name,
            (f"{y}.rows",),
            (Tensor(y, shape),),
            gradient="same",
            autocast="wide",
            source=f"{ops.DERIVATIVES}: sum.dim_IntList",
        ),
    )


def norm(name: str, x: str, y: str, shape: str, axis: str) -> tuple[Op, ...]:
    """The weight is fp32, and multiplied before the result is cast."""
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    weight = Weight(f"{name}.weight", axis, "norm", "fp32")
    return (
        *(op._replace(unit="") for op in normalise),
        ops.weigh(f"{name}.weight", f"{y}.n32", f"{y}.y32", shape, weight),
        ops.cast(f"{name}.to", f"{y}.y32", y, shape, f"={x}"),
        ops.leave(f"{y}.mean", f"{y}.n32"),
    )


def plain_norm(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """No weight: x times the inverse of its root mean square, which is fp32 until it is cast."""
    row = shape.rsplit(" ", 1)[0]
    first, square, mean, eps, rsqrt, *_ = ops.rms_norm(name, x, y, shape, "h")
    return (
        *(op._replace(unit="") for op in (first, square, mean, eps, rsqrt)),
        ops.cast(f"{name}.to", f"{y}.rstd", f"{y}.inverse", row, f"={x}"),
        times(f"{name}.scale", x, f"{y}.inverse", y, shape),
    )


def table(kind: str, rows: str = "s", where: str = "model.rotary_emb", weighs: bool = True) -> tuple[Op, ...]:
    """cos and sin of one kind of layers, half as wide as what they rotate."""
    shape, angles = f"{rows} rot2", f"{kind}.angles"
    names = (f"{k}_{n}" for k in ("main", "compress") for n in ("inv_freq", "original_inv_freq"))
    buffers = tuple(Weight(f"{where}.{n}", "rot2", "buffer", "fp32", False) for n in names) if weighs else ()
    made: list[Op] = [
        Op(
            f"rotary.{angles}",
            (),
            (Tensor(angles, shape, "fp32"),),
            buffers,
            scratch=(Tensor("positions", rows, "fp32"),),
            gradient="none",
            source=f"{_SOURCE} DeepseekV4RotaryEmbedding",
        )
    ]
    for name in ("cos", "sin"):
        wide = f"{kind}.{name}32"
        made.append(
            Op(f"rotary.{wide}", (angles,), (Tensor(wide, shape, "fp32"),), scratch=(Tensor(name, shape, "fp32"),))
        )
    for name in ("cos", "sin"):
        made.append(ops.cast(f"rotary.{kind}.{name}", f"{kind}.{name}32", f"{kind}.{name}", shape, "=embeds"))
    return (*made, ops.leave(angles, f"{kind}.cos32", f"{kind}.sin32"))


def turned(
    name: str, x: str, y: str, lead: str, kind: str, rows: str = "s", width: str = "d", sine: str = ""
) -> tuple[Op, ...]:
    """The end of every head rotated in fp32, pair by pair, and joined with the rest. What is sliced off has a gradient
    as wide as a head; cos and sin are made as wide as what they rotate in every call."""
    part, half, whole = f"{lead} rot", f"{lead} rot2", f"{lead} {width}"
    cos, sin = f"{y}.cos", f"{y}.sin"
    source = f"{_SOURCE} apply_rotary_pos_emb"
    return (
        Op(f"{name}.cos", (f"{kind}.cos",), (Tensor(cos, f"{rows} rot", f"={kind}.cos"),), gradient="none"),
        Op(f"{name}.sin", (sine or f"{kind}.sin",), (Tensor(sin, f"{rows} rot", f"={kind}.sin"),), gradient="none"),
        ops.view(f"{name}.rest", x, f"{y}.rest", whole, gradient="new"),
        ops.view(f"{name}.end", x, f"{y}.end", part, gradient="new"),
        ops.cast(f"{name}.float", f"{y}.end", f"{y}.end32", part, "fp32"),
        Op(f"{name}.times_cos", (f"{y}.end32", cos), (Tensor(f"{y}.cosine", part),), (), (Keep(cos, f"{y}.end32"),)),
        ops.rotate_half(f"{name}.rotate_half", f"{y}.end", f"{y}.half", part, half),
        ops.cast(f"{name}.half_float", f"{y}.half", f"{y}.half32", part, "fp32"),
        Op(f"{name}.times_sin", (f"{y}.half32", sin), (Tensor(f"{y}.sine", part),), (), (Keep(sin, f"{y}.half32"),)),
        ops.add(f"{name}.add", f"{y}.cosine", f"{y}.sine", f"{y}.turned32", part),
        ops.cast(f"{name}.to", f"{y}.turned32", f"{y}.turned", part, f"={x}")._replace(source=source),
        *joined(f"{name}.cat", (f"{y}.rest", f"{y}.turned"), y, whole),
        ops.leave(cos, sin, f"{y}.turned"),
    )


# Streams


def mixed(name: str, x: str) -> tuple[Op, ...]:
    """What the streams are put together with, and what a module's result is spread over them with."""
    t = name
    return (
        *_mixes(name, x, "nw", "fn", t),
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


def _mixes(name: str, x: str, out: str, weight: str, t: str) -> tuple[Op, ...]:
    """All streams of a token normalised together in fp32, and multiplied."""
    w = Weight(f"{name}.{weight}", f"{out} nh", "mixer", "fp32", rows=1)
    product = ops.linear(f"{name}.{weight}", f"{t}.normed", f"{t}.mixes", out, "nh", "mlp")
    keeps = (Keep(w.name, f"{t}.normed"), Keep(f"{t}.normed", w.name))
    return (
        ops.view(f"{name}.flatten", x, f"{t}.rows", "b s nh"),
        ops.cast(f"{name}.float", f"{t}.rows", f"{t}.flat", "b s nh", "fp32"),
        *plain_norm(f"{name}.input_norm", f"{t}.flat", f"{t}.normed", "b s nh"),
        ops.leave(f"{t}.flat"),
        product._replace(weights=(w,), keeps=keeps),
    )


def _scaled(name: str, x: str, y: str, shape: str, t: str) -> tuple[Op, ...]:
    return (
        times(f"{name}.scale", x, f"{t}.scales", f"{y}.scaled", shape),
        Op(f"{name}.shift", (f"{y}.scaled", f"{t}.bases"), (Tensor(y, shape),), gradient="same"),
    )


def balanced(name: str, iterations: int) -> Iterator[Op]:
    """Sinkhorn and Knopp's iterations: rows and columns are divided by their sums in turn; each division keeps both."""
    t = name
    for i in range(2 * iterations - 1):
        total, shifted = f"{t}.{i}.total", f"{t}.{i}.shifted"
        yield from summed(f"{name}.sum_{i}", f"{t}.{i}", total, "b s n")
        yield Op(f"{name}.eps_{i}", (total,), (Tensor(shifted, "b s n"),), gradient="same")
        yield Op(
            f"{name}.divide_{i}",
            (f"{t}.{i}", shifted),
            (Tensor(f"{t}.{i + 1}", "b s n2"),),
            (),
            (Keep(shifted, f"{t}.{i}"), Keep(f"{t}.{i}", shifted), Keep(shifted, shifted)),
            scratch_back=(Scratch(Tensor("quotient", "b s n2", f"={t}.{i}"), shifted),),
            source=f"{ops.DERIVATIVES}: div.Tensor",
        )


def entered(name: str, x: str, y: str, iterations: int) -> tuple[Op, ...]:
    """From the streams to what a module reads."""
    t = name
    last = f"{t}.comb.{2 * iterations - 1}"
    return (
        *mixed(name, x),
        *balanced(f"{name}.comb", iterations),
        times(f"{name}.weigh", x, f"{t}.pre", f"{t}.weighed", _STREAMS),
        *summed(f"{name}.collapse", f"{t}.weighed", f"{t}.one", "b s h"),
        ops.cast(f"{name}.to", f"{t}.one", y, "b s h", f"={x}"),
        ops.leave(f"{t}.normed", f"{t}.mixes", f"{t}.pre", f"{t}.bases", f"{t}.scales"),
        ops.view(f"{name}.comb", last, f"{t}.comb", "b s n2"),
    )


def left(t: str, x: str, result: str, y: str, held: tuple[str, ...] = ()) -> tuple[Op, ...]:
    """A module's result spread over the streams, and these mixed among each other, added; `t` has their weights."""
    name = f"{t}.out"
    return (
        ops.cast(f"{name}.post", f"{t}.post", f"{t}.post.low", "b s n", f"={x}"),
        # both products are made whole before one of them is summed
        ops.view(f"{name}.weights", f"{t}.post.low", f"{t}.post.rows", _STREAMS, gradient="new"),
        ops.view(f"{name}.result", result, f"{t}.result.rows", _STREAMS, gradient="new"),
        ops.mul(f"{name}.spread", f"{t}.post.rows", f"{t}.result.rows", f"{t}.spread", _STREAMS),
        ops.cast(f"{name}.comb", f"{t}.comb", f"{t}.comb.low", "b s n2", f"={x}"),
        ops.matmul(f"{name}.mix", f"{t}.comb.low", x, f"{t}.mixed", _STREAMS),
        ops.add(f"{name}.add", f"{t}.spread", f"{t}.mixed", y, _STREAMS),
        ops.leave(*held),
    )


# Keys that stand for windows


def kept(name: str, x: str, y: str, shape: str) -> Op:
    """A view that a cache keeps, with all that it is of."""
    return Op(name, (x,), (Tensor(y, shape),), view=True, holds="cache", source=f"{_SOURCE} DeepseekV4HCACache")


def compressor(name: str, x: str, y: str, w: Windows, width: str, where: str, caching: bool = False) -> tuple[Op, ...]:
    """A key for every window: what its tokens make, weighed by a softmax over them and summed; `width` wide.

    `sparse`: a window's key is made of its own tokens' second halves and the first halves of those before. A cache
    (`caching`) keeps the keys, what tokens that do not fill a window yet made, as a view of what all of them did, and
    of the last window the halves that the next one's key is made of too.
    """
    double = w.kind == "sparse"
    c, out = f"{y}.c", f"2 {width}" if double else width
    shape, raw = f"b {w.tokens} {out}", f"b {w.tokens} {out}"
    keys = f"b {w.number} {width}"
    bias = Weight(f"{name}.position_bias", f"{w.rate} {out}", "attention", "fp32")
    kv, gate = f"{c}.kv.used", f"{c}.gate.biased"
    buffers = tuple(kept(f"{name}.cache.{t}", f"{c}.{t}", f"{c}.{t} of a window", raw) for t in ("kv", "gate"))
    halves = tuple(
        Op(f"{name}.overlap.{t}", (t,), (Tensor(f"{t}.half", f"b {w.rate} {width}", f"={t}"),), holds="cache")
        for t in (kv, gate)
    )
    laid = (*_overlapped(name, kv, f"{c}.kv.laid", w, width), *_overlapped(name, gate, f"{c}.gate.laid", w, width))
    laid = (*halves, *laid) if caching else laid
    if double:
        kv, gate = f"{c}.kv.laid", f"{c}.gate.laid"
    return (
        ops.linear(f"{name}.kv_proj", x, f"{c}.kv", out, "h", "attention"),
        ops.linear(f"{name}.gate_proj", x, f"{c}.gate", out, "h", "attention"),
        *(buffers if caching else ()),
        ops.view(f"{name}.kv_used", f"{c}.kv", f"{c}.kv.used", raw),
        ops.view(f"{name}.gate_used", f"{c}.gate", f"{c}.gate.used", raw),
        Op(f"{name}.bias", (f"{c}.gate.used",), (Tensor(f"{c}.gate.biased", raw),), (bias,), gradient="same"),
        *(laid if double else ()),
        *ops.softmax(f"{name}.softmax", gate, f"{c}.soft", shape, "fp32"),
        ops.cast(f"{name}.weights", f"{c}.soft", f"{c}.weights", shape, f"={kv}"),
        ops.mul(f"{name}.product", kv, f"{c}.weights", f"{c}.product", shape),
        *summed(f"{name}.sum", f"{c}.product", f"{c}.sum", keys),
        *norm(f"{name}.kv_norm", f"{c}.sum", f"{c}.normed", keys, width),
        ops.leave(f"{c}.sum"),
        Op(f"{name}.positions", (), (Tensor(f"{c}.positions", w.number, "int64"),), gradient="none"),
        *table(c, f"b {w.number}", f"{where}.rotary_emb"),
        *turned(f"{name}.rope", f"{c}.normed", y, f"b {w.number}", c, f"b {w.number}", width),
        ops.leave(f"{c}.normed"),
        *((kept(f"{name}.cache.keys", y, f"{y} cache", keys),) if caching else ()),
    )


def compressed(y: str, double: bool) -> Op:
    """The function that made `y` returns, and what else it did is done."""
    laid = ("kv.laid", "gate.laid") if double else ()
    return ops.leave(*(f"{y}.c.{t}" for t in ("kv", "gate", "gate.biased", "positions", "cos", "sin", *laid)))


def _overlapped(name: str, x: str, y: str, w: Windows, width: str) -> tuple[Op, ...]:
    """Two halves copied into their places among zeros; see `memplan.catalogue.latent` for how such a copy goes back."""
    half, whole = f"b {w.tokens} {width}", f"b {w.tokens} 2 {width}"
    n = f"{name}.{y.rpartition('.c.')[2]}"
    return (
        ops.view(f"{n}.own", x, f"{y}.own", half, gradient="new"),
        Op(
            f"{n}.copy_own",
            (f"{y}.own",),
            (Tensor(f"{y}.begun", whole, f"={x}"),),
            scratch_back=(Scratch(Tensor("gradient of the whole", whole, f"={x}")),),
            gradient="own",
        ),
        ops.view(f"{n}.before", x, f"{y}.before", half, gradient="new"),
        Op(
            f"{n}.copy_before",
            (f"{y}.begun", f"{y}.before"),
            (Tensor(y, whole, f"={x}"),),
            scratch_back=(Scratch(Tensor("zeros", half, f"={x}")),),
            gradient="own",
            view=True,
        ),
    )


def indexer(name: str, x: str, latent: str, caching: bool = False) -> tuple[Op, ...]:
    """The windows a query chooses, `chosen`. Nothing of it gets a gradient, though autograd records it meanwhile."""
    i, w = "index", SPARSE
    scores = f"b s ih {w.number}"
    operations = (
        *compressor(name, x, f"{i}.keys", w, "id", name, caching),
        *table(f"{i}.q", where="", weighs=False),
        ops.linear(f"{name}.q_b_proj", latent, f"{i}.q0", "ih id", "ql", "attention"),
        *turned(f"{name}.rope_q", f"{i}.q0", f"{i}.query", "b s ih", f"{i}.q", width="id"),
        ops.leave(f"{i}.q0"),
        ops.cast(f"{name}.q_float", f"{i}.query", f"{i}.q32", "b s ih id", "fp32"),
        ops.cast(f"{name}.k_float", f"{i}.keys", f"{i}.k32", f"b {w.number} id", "fp32"),
        # rows of several sequences, which lie head by head, are copied to lie one after another
        ops.copy(f"{name}.q_flat", f"{i}.q32", f"{i}.q.flat", "b s ih id"),
        ops.copy(f"{name}.k_expand", f"{i}.k32", f"{i}.k.every", f"several s id {w.number}"),
        Op(
            f"{name}.products",
            (f"{i}.q.flat", f"{i}.k32", f"{i}.k.every", f"{i}.q32"),
            (Tensor(f"{i}.products", scores),),
            autocast="lower",
            product="matrix",
        ),
        ops.activation(f"{name}.relu", f"{i}.products", f"{i}.relu", scores),
        ops.leave(f"{i}.products"),
        ops.scale(f"{name}.scale", f"{i}.relu", f"{i}.scores", scores),
        ops.linear(f"{name}.scorer.weights_proj", x, f"{i}.w0", "ih", "h", "attention"),
        ops.cast(f"{name}.scorer.float", f"{i}.w0", f"{i}.w32", "b s ih", "fp32"),
        ops.scale(f"{name}.scorer.scale", f"{i}.w32", f"{i}.w", "b s ih"),
        Op(f"{name}.scorer.weigh", (f"{i}.scores", f"{i}.w"), (Tensor(f"{i}.weighed", scores),)),
        Op(f"{name}.scorer.sum", (f"{i}.weighed",), (Tensor(f"{i}.sum", f"b s {w.number}"),)),
        ops.leave(f"{i}.scores", f"{i}.w"),
        Op(
            f"{name}.future",
            (f"{i}.sum",),
            (Tensor(f"{i}.masked", f"b s {w.number}", f"={i}.sum"), Tensor(f"{i}.future", f"s {w.number}", "bool")),
        ),
        Op(
            f"{name}.topk",
            (f"{i}.masked",),
            (Tensor(f"{i}.best", "b s tk", f"={i}.sum"), Tensor(f"{i}.top", "b s tk", "int64")),
        ),
        ops.leave(f"{i}.best"),
        Op(
            f"{name}.where",
            (f"{i}.top",),
            (Tensor("chosen", "b s tk", "int64"),),
            scratch=(Tensor("invalid", "b s tk", "bool"), Tensor("none", "b s tk", "int64")),
        ),
        ops.leave(f"{i}.top", f"{i}.masked", f"{i}.future", f"{i}.keys", f"{i}.query", f"{i}.q.cos", f"{i}.q.sin"),
        compressed(f"{i}.keys", double=True),
        # what autograd has recorded goes with the function
        ops.leave(
            *(f"{i}.{t}" for t in ("relu", "scores", "w", "q.flat", "k32", "k.every")),
            *(f"{i}.keys.c.{t}" for t in ("kv.laid", "soft", "weights", "normed.x32", "normed.n32")),
        )._replace(recorded=True),
    )
    return detached(*operations)


def _windows_mask(w: Windows) -> tuple[Op, ...]:
    """Which windows a query sees, behind the mask of tokens."""
    shape = f"b s {w.number}"
    if w.kind == "sparse":
        made = (
            Op(
                "windows.bias",
                ("chosen",),
                (
                    Tensor("windows", "b s wc1", "=compressed"),
                    Tensor("safe", "b s tk", "int64"),
                    Tensor("valid", "b s tk", "bool"),
                ),
                scratch=(Tensor("none", "b s tk", "int64"),),
            ),
            ops.leave("chosen", "valid", "safe"),
        )
    else:
        made = (
            Op("windows.zeros", (), (Tensor("windows.zeros", shape, "=compressed"),)),
            Op(
                "windows.bias",
                ("windows.zeros",),
                (Tensor("windows", shape, "=compressed"),),
                scratch=(Tensor("future", f"s {w.number}", "bool"),),
            ),
            ops.leave("windows.zeros"),
        )
    return detached(
        *made,
        ops.cast("windows.to", "windows", "windows.like", shape, "=mask"),
        Op("windows.mask", ("mask", "windows.like"), (Tensor("mask.all", f"b s {w.keys}", "=mask"),)),
    )


# Attention


def _product(name: str, x: str, heads: str, y: str, shape: str, w: Windows) -> tuple[Op, ...]:
    """With one head spread over all: of a single sequence without a copy, of several a copy is made for the product."""
    flat, op = f"{heads}.flat", ops.matmul(name, x, heads, y, shape)
    return (
        Op(f"{name}.flat", (heads,), (Tensor(flat, f"several {w.keys} a d", f"={heads}"),), gradient="none", laid=True),
        op._replace(reads=(*op.reads, flat), keeps=(*op.keeps, Keep(flat, x))),
    )


def sink_attention(name: str, keys: str, y: str, given: str, w: Windows, drop: bool) -> tuple[Op, ...]:
    """Of one head of keys, which are values too, copied for every head of queries; sinks make the softmax fp32."""
    scores, every = f"b a s {w.keys}", f"b a s {w.with_sink}"
    sinks = Weight("self_attn.sinks", "a", "attention", "fp32")
    return (
        *(ops.view(f"{name}.repeat_{t}", keys, f"{t}.heads", f"b {w.keys} a d", gradient="new") for t in "kv"),
        *_product(f"{name}.scores", "q", "k.heads", "scores", scores, w),
        ops.scale(f"{name}.scaling", "scores", "scaled", scores),
        Op(f"{name}.add_mask", ("scaled", given), (Tensor("masked", scores),), gradient="same"),
        ops.view(f"{name}.part", "masked", "masked.part", every),
        Op(f"{name}.join", ("masked.part",), (Tensor("joined", every),), (sinks,), gradient="same"),
        Op(
            f"{name}.max",
            ("joined",),
            (Tensor("largest", "b a s", "=joined"), Tensor("largest.at", "b a s", "int64")),
            (),
            (Keep("largest.at", "joined"),),
        ),
        Op(
            f"{name}.minus",
            ("joined", "largest"),
            (Tensor("shifted", every),),
            gradient="same",
            scratch_back=(Scratch(Tensor("negative", every, "=joined"), "largest"),),
        ),
        ops.leave("joined", "largest"),
        *ops.softmax(f"{name}.softmax", "shifted", "softmax", every, "=shifted"),
        ops.view(f"{name}.drop_sink", "softmax", "kept", scores, gradient="new"),
        *((ops.dropout(f"{name}.dropout", "kept", "dropped", scores),) if drop else ()),
        ops.cast(f"{name}.cast", "dropped" if drop else "kept", "probs", scores, "=v.heads"),
        ops.leave("masked"),
        *_product(f"{name}.product", "probs", "v.heads", "heads", "b s a d", w),
        ops.copy(f"{name}.contiguous", "heads", y, "b s a d", gradient="new"),
        ops.leave("k.heads", "v.heads", "shifted", "softmax"),
    )


def attention(x: str, y: str, w: Windows, drop: bool, caching: bool = False) -> tuple[Op, ...]:
    n, g = "self_attn", "attention"
    kind = "compress" if w.kind else "main"
    turns = "kv.turned" if caching else "kv"
    keys, given = ("kv.all", "mask.all") if w.kind else ("kv", "mask")
    both = (("kv",) if w.kind else ("kv", "values of the window")) if caching else ()  # a plain layer's are kept twice
    cache = (
        Op(f"{n}.cache.window", (), (Tensor("length of the window", "", "int64"),), holds="cache", source=_CACHE),
        *(Op(f"{n}.cache", (turns,), (Tensor(t, "b s d", f"={turns}"),), holds="cache", source=_CACHE) for t in both),
        ops.leave(turns),
    )
    more: tuple[Op, ...] = ()
    if w.kind:
        inner = f"{n}.compressor"
        more = (
            *compressor(inner, x, "compressed", w, "d", inner, caching),
            *(indexer(f"{inner}.indexer", x, "q.normed", caching) if w.kind == "sparse" else ()),
            *_windows_mask(w),
            compressed("compressed", w.kind == "sparse"),
            *joined(f"{n}.kv_cat", ("kv", "compressed"), "kv.all", f"b {w.keys} d"),
            ops.leave("kv", "compressed"),
        )
    low = Weight(f"{n}.o_a_proj.weight", "og ol gd", g, matrix=True, rows=2, viewed=True, several=True)
    return (
        ops.linear(f"{n}.q_a_proj", x, "q.low", "ql", "h", g),
        *norm(f"{n}.q_a_norm", "q.low", "q.normed", "b s ql", "ql"),
        ops.leave("q.low"),
        ops.linear(f"{n}.q_b_proj", "q.normed", "q0", "a d", "ql", g),
        ops.view(f"{n}.q_heads", "q0", "q1", "b s a d", gradient="new"),
        *plain_norm(f"{n}.q_b_norm", "q1", "q2", "b s a d"),
        ops.leave("q1"),
        *turned(f"{n}.rope_q", "q2", "q", "b s a", kind),
        ops.leave("q2"),
        ops.linear(f"{n}.kv_proj", x, "kv.low", "d", "h", g),
        *norm(f"{n}.kv_norm", "kv.low", "kv.normed", "b s d", "d"),
        ops.leave("kv.low"),
        *turned(f"{n}.rope_kv", "kv.normed", turns, "b s", kind),
        ops.leave("kv.normed"),
        *(cache if caching else ()),
        *more,
        *sink_attention(f"{n}.attention", keys, "o", given, w, drop),
        Op(f"{n}.back", (f"{kind}.sin",), (Tensor("minus_sin", "s rot2", f"={kind}.sin"),), gradient="none"),
        *turned(f"{n}.rope_back", "o", "o.back", "b s a", kind, sine="minus_sin"),
        ops.leave("o", "minus_sin"),
        ops.copy(f"{n}.group", "o.back", "o.grouped", "b s a d", gradient="new"),
        Op(
            f"{n}.o_a_proj",
            ("o.grouped",),
            (Tensor("o.low.raw", "b s ogl"),),
            (low,),
            (Keep(low.name, "o.grouped"), Keep("o.grouped", low.name)),
            scratch_back=(Scratch(Tensor("transposed gradient", low.shape, f"={low.name}"), low.name),),
            gradient="view",
            autocast="lower",
            product="matrix",
            source=f"{ops.DERIVATIVES}: bmm",
        ),
        ops.copy(f"{n}.flatten", "o.low.raw", "o.low", "b s ogl"),
        ops.leave("o.low.raw", "o.grouped"),
        ops.linear(f"{n}.o_b_proj", "o.low", y, "h", "ogl", g),
        ops.leave("q", "q.normed", keys, "o.back", "o.low", x, *(("mask.all", "windows") if w.kind else ())),
    )


# Experts


def _limited(name: str, gate: str, up: str, y: str, shape: str) -> tuple[Op, ...]:
    return (
        ops.clamp(f"{name}.clamp_gate", gate, f"{y}.gate", shape, 1),
        ops.clamp(f"{name}.clamp_up", up, f"{y}.up", shape, 2),
        ops.activation(f"{name}.act_fn", f"{y}.gate", f"{y}.act", shape),
        ops.mul(f"{name}.product", f"{y}.act", f"{y}.up", y, shape),
        ops.leave(f"{y}.gate", f"{y}.up"),
    )


def _gated(name: str, x: str, y: str) -> tuple[Op, ...]:
    shape = f"{routers.PAIRS} m"
    return (
        ops.split(f"{name}.chunk", x, (Tensor(f"{y}.gate0", shape), Tensor(f"{y}.up0", shape))),
        *_limited(name, f"{y}.gate0", f"{y}.up0", y, shape),
        ops.leave(x),
    )


def router(name: str, x: str, hashed: bool) -> tuple[Op, ...]:
    """Roots of softplus. `hashed`: a token's experts are looked up by its id."""
    logits, soft, scores = "router.logits", "router.soft", "router.roots"
    bias = Weight(f"{name}.e_score_correction_bias", "E", "buffer", "fp32", False)
    listed = Weight(f"{name}.tid2eid", "v e", "buffer", "int64", False)
    chosen = (
        (Op(f"{name}.lookup", ("ids",), (Tensor(routers.CHOSEN, routers.PAIRS, "int64"),), (listed,), gradient="none"),)
        if hashed
        else (
            Op(f"{name}.bias", (scores,), (Tensor("router.biased", "b s E", "fp32"),), (bias,), gradient="none"),
            routers.top_k(f"{name}.topk", "router.biased", "router.top")._replace(gradient="none"),
        )
    )
    return (
        routers.gate(name, x, logits),
        ops.activation(f"{name}.softplus", logits, soft, "b s E")._replace(autocast="fp32"),
        Op(
            f"{name}.sqrt",
            (soft,),
            (Tensor(scores, "b s E"),),
            (),
            (Keep(scores, soft),),
            scratch_back=(Scratch(Tensor("twice the root", "b s E", f"={scores}")),),
            source=f"{ops.DERIVATIVES}: sqrt",
        ),
        *chosen,
        routers.gathered(f"{name}.gather", scores, routers.CHOSEN, "router.picked"),
        Op(f"{name}.sum", ("router.picked",), (Tensor("router.total", "b s 1"),), autocast="wide"),
        Op(f"{name}.eps", ("router.total",), (Tensor("router.total.eps", "b s 1"),), gradient="same"),
        Op(
            f"{name}.divide",
            ("router.picked", "router.total.eps"),
            (Tensor("router.normal", routers.PAIRS),),
            (),
            (
                Keep("router.total.eps", "router.picked"),
                Keep("router.picked", "router.total.eps"),
                Keep("router.total.eps", "router.total.eps"),
            ),
        ),
        ops.leave("router.picked"),
        ops.scale(f"{name}.scale", "router.normal", routers.SCORES, routers.PAIRS),
        ops.leave(scores, "router.normal"),
    )


def feed(x: str, y: str, hashed: bool, bias: bool) -> tuple[Op, ...]:
    n = "mlp.shared_experts"
    return (
        *experts.mixture(x, router("mlp.gate", x, hashed), experts.experts(x, "routed", act=_gated), leaves=False),
        ops.linear(f"{n}.gate_proj", x, "shared.gate0", "m", "h", "mlp", bias),
        ops.clamp(f"{n}.clamp_gate", "shared.gate0", "shared.gate", "b s m", 1),
        ops.linear(f"{n}.up_proj", x, "shared.up0", "m", "h", "mlp", bias),
        ops.clamp(f"{n}.clamp_up", "shared.up0", "shared.up", "b s m", 2),
        ops.activation(f"{n}.act_fn", "shared.gate", "shared.act", "b s m"),
        ops.mul(f"{n}.product", "shared.act", "shared.up", "shared.product", "b s m"),
        ops.linear(f"{n}.down_proj", "shared.product", "shared", "h", "m", "mlp", bias),
        ops.leave("shared.gate", "shared.up"),
        ops.add("mlp.add", "routed", "shared", y, "b s h"),
        ops.leave("routed", "shared", *routers.HELD, x),
    )


# The model

_KINDS = {"sliding": PLAIN, "sparse": SPARSE, "heavy": HEAVY}


def deepseek_v4(m: ModelSpec, wiring: Wiring) -> Stack:
    iterations = m.whole("hc_sinkhorn_iters", 20)

    def block(layer: Layer) -> Block:
        return Block(
            "model.layers",
            (
                *entered("attn_hc", "x", "c1", iterations),
                *norm("input_layernorm", "c1", "n1", "b s h", "h"),
                *attention("n1", "ao", _KINDS[layer.mixer], wiring.drops, wiring.caching),
                *left("attn_hc", "x", "ao", "x1"),
                *entered("ffn_hc", "x1", "c2", iterations),
                ops.leave("c1", "attn_hc.post", "attn_hc.comb"),
                *norm("post_attention_layernorm", "c2", "n2", "b s h", "h"),
                *feed("n2", "mo", layer.ffn == "hashed", m.get("mlp_bias", False)),
                *left("ffn_hc", "x1", "mo", "y", ("c2", "ao", "mo", "probs", "ffn_hc.post", "ffn_hc.comb", "x1")),
            ),
        )

    eager = wiring._replace(backend="eager", masked="eager")
    embedding = ops.embedding("model.embed_tokens", "ids", "tokens", "v", "h")
    before = (
        inputs(wiring.padded),
        embedding,
        positions(),
        *(
            op._replace(writes=tuple(t._replace(dtype="=tokens") if t.dtype == "=embeds" else t for t in op.writes))
            for op in mask(eager, "embeds")
        ),
        ops.copy("model.streams", "tokens", "embeds", _STREAMS, gradient="new"),
        *table("main"),
        *table("compress", weighs=False),
    )
    h = "model.hc_head"
    after = (
        *_mixes(h, "x", "n", "hc_fn", "head"),
        Op(
            f"{h}.hc_scale",
            ("head.mixes",),
            (Tensor("head.scaled", "b s n"),),
            (Weight(f"{h}.hc_scale", "1", "mixer", "fp32"),),
            (Keep("head.mixes", f"{h}.hc_scale"),),
        ),
        Op(
            f"{h}.hc_base",
            ("head.scaled",),
            (Tensor("head.sum", "b s n"),),
            (Weight(f"{h}.hc_base", "n", "mixer", "fp32"),),
            gradient="same",
        ),
        routers.sigmoid(f"{h}.sigmoid", "head.sum", "head.gate", "b s n"),
        Op(f"{h}.eps", ("head.gate",), (Tensor("head.pre", "b s n"),), gradient="same"),
        times(f"{h}.weigh", "x", "head.pre", "head.weighed", _STREAMS),
        *summed(f"{h}.collapse", "head.weighed", "head.one", "b s h"),
        ops.cast(f"{h}.to", "head.one", "hidden", "b s h", "=x"),
        ops.leave("head.normed", "head.mixes", "head.pre"),
        *norm("model.norm", "hidden", "n", "b s h", "h"),
        ops.leave(
            "hidden",
            "x",
            "tokens",
            "positions",
            "mask",
            *(f"{k}.{t}" for k in ("main", "compress") for t in ("cos", "sin")),
        ),
        lm_head("n", "model.embed_tokens.weight" if m.tie_word_embeddings else ""),
    )
    return Stack(before, runs(m, block), after)


BUILDERS = {"deepseek_v4": deepseek_v4}
