"""One head of keys, plus compressed keys that each stand for a window of tokens, as in DeepSeek V4.

Also the norms and rotations that only DeepSeek V4 uses. Axes are those of `memplan.catalogue.families.deepseek_v4`.
Source: transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py.
"""

from __future__ import annotations

from memplan.catalogue.attention.latent import concat_parts
from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.core.records import NamedTuple

SOURCE = "transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py"


class Windows(NamedTuple):
    """How a layer compresses keys, as names of axes.

    kind       `sparse` or `heavy`; empty if it does not compress
    number     windows in the sequence
    tokens     tokens in all windows
    rate       tokens in one window
    keys       all keys, compressed ones included
    with_sink  all keys and the attention sink
    """

    kind: str
    number: str
    tokens: str
    rate: str
    keys: str
    with_sink: str

    @property
    def masked(self) -> str:
        """The axis of all keys, which is 0 if none of them stands for a window."""
        return f"{self.keys}_masked"


PLAIN = Windows("", "", "", "", "s", "s1")
SPARSE = Windows("sparse", "wc", "uc", "rc", "kc", "kc1")
HEAVY = Windows("heavy", "wh", "uh", "rh", "kh", "kh1")


# Norms, rotations, small products


def summed(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Sum over an axis that `shape` no longer has. The gradient is broadcast by a view."""
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
    """Return an RMS norm with an fp32 weight, multiplied before the result is cast."""
    *normalise, _, _, _ = ops.rms_norm(name, x, y, shape, axis)
    weight = Weight(f"{name}.weight", axis, "norm", "fp32")
    return (
        *(op._replace(unit="") for op in normalise),
        ops.multiply_weight(f"{name}.weight", f"{y}.n32", f"{y}.y32", shape, weight),
        ops.cast(f"{name}.to", f"{y}.y32", y, shape, f"={x}"),
        ops.release_names(f"{y}.mean", f"{y}.n32"),
    )


def plain_norm(name: str, x: str, y: str, shape: str) -> tuple[Op, ...]:
    """Return an RMS norm without weight: x times the inverse root mean square, which is fp32 until it is cast."""
    row = shape.rsplit(" ", 1)[0]
    first, square, mean, eps, rsqrt, *_ = ops.rms_norm(name, x, y, shape, "h")
    return (
        *(op._replace(unit="") for op in (first, square, mean, eps, rsqrt)),
        ops.cast(f"{name}.to", f"{y}.rstd", f"{y}.inverse", row, f"={x}"),
        ops.spread(f"{name}.scale", x, f"{y}.inverse", y, shape),
    )


def table(kind: str, rows: str = "s", where: str = "model.rotary_emb", weighs: bool = True) -> tuple[Op, ...]:
    """Return cos and sin for one kind of layer, half as wide as what they rotate."""
    shape, angles = f"{rows} rot2", f"{kind}.angles"
    names = (f"{k}_{n}" for k in ("main", "compress") for n in ("inv_freq", "original_inv_freq"))
    buffers = tuple(Weight(f"{where}.{n}", "rot2", "buffer", "fp32", False) for n in names) if weighs else ()
    operations: list[Op] = [
        Op(
            f"rotary.{angles}",
            (),
            (Tensor(angles, shape, "fp32"),),
            buffers,
            scratch=(Tensor("positions", rows, "fp32"),),
            gradient="none",
            source=f"{SOURCE} DeepseekV4RotaryEmbedding",
        )
    ]
    for name in ("cos", "sin"):
        wide = f"{kind}.{name}32"
        operations.append(
            Op(f"rotary.{wide}", (angles,), (Tensor(wide, shape, "fp32"),), scratch=(Tensor(name, shape, "fp32"),))
        )
    for name in ("cos", "sin"):
        operations.append(ops.cast(f"rotary.{kind}.{name}", f"{kind}.{name}32", f"{kind}.{name}", shape, "=embeds"))
    return (*operations, ops.release_names(angles, f"{kind}.cos32", f"{kind}.sin32"))


def turned(
    name: str, x: str, y: str, lead: str, kind: str, rows: str = "s", width: str = "d", sine: str = ""
) -> tuple[Op, ...]:
    """Rotate the end of every head in fp32, pair by pair, and join it with the rest.

    The gradient of each slice is as wide as a head. Every call widens cos and sin to what they rotate.
    """
    part, half, whole = f"{lead} rot", f"{lead} rot2", f"{lead} {width}"
    cos, sin = f"{y}.cos", f"{y}.sin"
    source = f"{SOURCE} apply_rotary_pos_emb"
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
        *concat_parts(f"{name}.cat", (f"{y}.rest", f"{y}.turned"), y, whole),
        ops.release_names(cos, sin, f"{y}.turned"),
    )


# Compressed keys


def cached_view(name: str, x: str, y: str, shape: str) -> Op:
    """Return a view held by the cache, which keeps its whole storage alive."""
    return Op(name, (x,), (Tensor(y, shape),), view=True, holds="cache", source=f"{SOURCE} DeepseekV4HCACache")


def compressor(name: str, x: str, y: str, w: Windows, width: str, where: str, caching: bool = False) -> tuple[Op, ...]:
    """Return one key per window, `width` wide: the softmax-weighted sum over the window's tokens.

    `sparse`: a window's key combines the second halves of its own tokens with the first halves of the previous
    window's. With `caching`, the cache holds the keys, the projections of tokens in an unfinished window (as a view of
    those of all tokens), and the last window's halves for the next key.
    """
    double = w.kind == "sparse"
    c, out = f"{y}.c", f"2 {width}" if double else width
    raw = f"b {w.tokens} {out}"
    buffers = tuple(cached_view(f"{name}.cache.{t}", f"{c}.{t}", f"{c}.{t} of a window", raw) for t in ("kv", "gate"))
    halves = tuple(
        Op(f"{name}.overlap.{t}", (t,), (Tensor(f"{t}.half", f"b {w.rate}_kept {width}", f"={t}"),), holds="cache")
        for t in (f"{c}.kv.used", f"{c}.gate.biased")
    )
    return (
        *projected(name, x, y, out),
        *(buffers if caching else ()),
        *pooled(name, y, y, f"{c}.kv", f"{c}.gate", w, width, where, halves if caching and double else ()),
        *((cached_view(f"{name}.cache.keys", y, f"{y} cache", f"b {w.number} {width}"),) if caching else ()),
    )


def projected(name: str, x: str, y: str, out: str) -> tuple[Op, ...]:
    """Return the key and gate projections of every token, `out` wide."""
    return (
        ops.linear(f"{name}.kv_proj", x, f"{y}.c.kv", out, "h", "attention"),
        ops.linear(f"{name}.gate_proj", x, f"{y}.c.gate", out, "h", "attention"),
    )


def pooled(
    name: str,
    x: str,
    y: str,
    kv: str,
    gate: str,
    w: Windows,
    width: str,
    where: str,
    halves: tuple[Op, ...] = (),
) -> tuple[Op, ...]:
    """Return the keys `y` of full windows from their tokens' projections `kv` and `gate`.

    `x` prefixes the names of intermediates. `halves`: operations by which a cache keeps the last window's halves.
    """
    double = w.kind == "sparse"
    c, out = f"{x}.c", f"2 {width}" if double else width
    shape = raw = f"b {w.tokens} {out}"
    keys = f"b {w.number} {width}"
    bias = Weight(f"{name}.position_bias", f"{w.rate} {out}", "attention", "fp32")
    kv_used, biased = f"{c}.kv.used", f"{c}.gate.biased"
    laid = (
        *halves,
        *_overlapped(name, kv_used, f"{c}.kv.laid", w, width),
        *_overlapped(name, biased, f"{c}.gate.laid", w, width),
    )
    weighed, weight = (f"{c}.kv.laid", f"{c}.gate.laid") if double else (kv_used, biased)
    return (
        ops.view(f"{name}.kv_used", kv, kv_used, raw),
        ops.view(f"{name}.gate_used", gate, f"{c}.gate.used", raw),
        Op(f"{name}.bias", (f"{c}.gate.used",), (Tensor(biased, raw),), (bias,), gradient="same"),
        *(laid if double else ()),
        *ops.softmax(f"{name}.softmax", weight, f"{c}.soft", shape, "fp32"),
        ops.cast(f"{name}.weights", f"{c}.soft", f"{c}.weights", shape, f"={weighed}"),
        ops.mul(f"{name}.product", weighed, f"{c}.weights", f"{c}.product", shape),
        *summed(f"{name}.sum", f"{c}.product", f"{c}.sum", keys),
        *norm(f"{name}.kv_norm", f"{c}.sum", f"{c}.normed", keys, width),
        ops.release_names(f"{c}.sum"),
        Op(f"{name}.positions", (), (Tensor(f"{c}.positions", w.number, "int64"),), gradient="none"),
        *table(c, f"b {w.number}", f"{where}.rotary_emb"),
        *turned(f"{name}.rope", f"{c}.normed", y, f"b {w.number}", c, f"b {w.number}", width),
        ops.release_names(f"{c}.normed"),
    )


def compressed(y: str, double: bool) -> Op:
    """The function that computed `y` returns and drops its other tensors."""
    laid = ("kv.laid", "gate.laid") if double else ()
    return ops.release_names(*(f"{y}.c.{t}" for t in ("kv", "gate", "gate.biased", "positions", "cos", "sin", *laid)))


def _overlapped(name: str, x: str, y: str, w: Windows, width: str) -> tuple[Op, ...]:
    """Copy two halves into a zeroed tensor, as `memplan.catalogue.attention.latent` copies the parts of keys."""
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
