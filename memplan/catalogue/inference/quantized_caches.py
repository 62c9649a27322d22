"""A layer's keys and values stored in few bits: what that leaves, and what is made on the way there and back.

Two backends quantise in groups, each with a scale and a zero point: quanto and hqq. Their codes cannot be added to, so
that the newest tokens stay as they are, the residual, until there are as many as it may have; then all tokens are
quantised anew. The third, fp8, has one scale for a tensor, and takes each token as it comes. Whatever attention reads,
it reads dequantised: of one layer at a time there is everything in the model's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor

Backend = Literal["quanto", "hqq", "fp8"]
# Axes: tokens that are quantised before a pass, that wait to be, and that wait when it is over.
QUANTIZED, RESIDUAL, AFTER = "quantized", "residual", "residual_after"
RANKED = "ranked"  # an axis that is 1 once the beams of a prompt were ranked, and 0 while it is read
Keyed = Callable[[str, str], str]  # a shape with another axis of tokens

_LAYERS = "transformers 5.24 cache_utils.py QuantizedLayer.update"
_FP8 = "transformers 5.24 cache_utils.py Fp8QuantizedLayer"
_MAX = "optimum-quanto 0.2.7 tensor/optimizers/max_optimizer.py MaxOptimizer.optimize"
_AFFINE = "optimum-quanto 0.2.7 library/quantize.py quantize_affine"
_GROUPED = "optimum-quanto 0.2.7 tensor/grouped.py group, ungroup"
_PACK = "optimum-quanto 0.2.7 tensor/packed.py pack_weights"
_UNPACK = "optimum-quanto 0.2.7 library/extensions/cuda/unpack.cu"
_BACK = "optimum-quanto 0.2.7 tensor/qbits.py QBitsDequantizer"
_HQQ = "hqq 0.2.8 core/quantize.py Quantizer.quantize"
_SEARCH = "hqq 0.2.8 core/optimize.py optimize_weights_proximal_legacy"
_BITS = "hqq 0.2.8 core/bitpack.py BitPack"

# Which bits a number may have, and along which axes groups may lie.
NBITS: Mapping[str, tuple[int, ...]] = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}
AXES: Mapping[str, tuple[int, ...]] = {"quanto": (0, -1), "hqq": (0, 1)}
# What a run has that leaves it open. Source: transformers 5.24 cache_utils.py QuantizedCache.
USUAL: Mapping[str, int] = {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128}


class Stored(NamedTuple):
    """How a quantised cache stores what it is given: `nbits` a number, with a scale and a zero point for each `group`
    along the axis of the keys and that of the values, all but the newest tokens, which are fewer than `residual`."""

    backend: Backend
    nbits: int = 4
    axis_key: int = 0
    axis_value: int = 0
    group: int = 64
    residual: int = 128

    def axis(self, what: str) -> int:
        """The axis along which groups of that lie."""
        return self.axis_value if what.startswith("value") else self.axis_key

    @property
    def grouped(self) -> bool:
        return self.backend != "fp8"

    def after(self, quantized: int, residual: int, fed: int) -> tuple[int, int]:
        """How many tokens are quantised and how many wait, once so many were `fed`."""
        every = quantized + residual + fed
        if not self.grouped or not quantized or residual + fed >= self.residual:
            return every, 0
        return quantized, residual + fed

    def quantized_of(self, parts: int, part: int) -> int:
        """How many tokens are quantised once this many `parts` of a prompt were read, each of `part` tokens."""
        if not self.grouped or not parts:
            return parts * part
        until = -(-self.residual // part)  # parts that wait until all are quantised again
        return (1 + (parts - 1) // until * until) * part


def stored(what: str, shape: str, like: str, how: Stored) -> tuple[Tensor, ...]:
    """The tensors that hold `what` of that shape, which has been in the dtype of `like`, in the order they are made in:
    codes, and scale and zero point of each group; of fp8 a scale, and codes."""
    codes = Tensor(f"{what} codes", *_codes(shape, how))
    if not how.grouped:
        return Tensor(f"{what} scale", "", "fp32"), codes
    few = f"={like}/{how.group}"
    of_groups = Tensor(f"{what} scales", shape, few), Tensor(f"{what} zero points", shape, few)
    return (*of_groups, codes) if how.backend == "quanto" else (codes, *of_groups)


def _codes(shape: str, how: Stored) -> tuple[str, str]:
    """The shape and dtype of codes: so many to a byte, or ten of three bits to four bytes, in rows that are filled."""
    if not how.grouped:
        return shape, "fp8"
    if how.nbits != 3:
        return shape, _share(8 // how.nbits)
    return f"{shape} {_rows_of_three(how) // 10}", f"int32/{how.group}"


def _share(per: int) -> str:
    return f"uint8/{per}" if per > 1 else "uint8"


def _rows_of_three(how: Stored) -> int:
    """The rows of a matrix whose columns are groups, filled up to tens."""
    return -(-how.group // 10) * 10


def quantised(what: str, x: str, shape: str, like: str, how: Stored, leaves: tuple[str, ...] = ()) -> Iterator[Op]:
    """`x`, contiguous, is stored as `what`; then goes what it `leaves`."""
    yield from {"quanto": _quanto, "hqq": _hqq, "fp8": _fp8}[how.backend](what, x, shape, like, how)
    yield ops.leave(x, *leaves)


def dequantised(what: str, of: str, y: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    """What is stored as `of`, in the dtype of `like`."""
    yield from {"quanto": _from_quanto, "hqq": _from_hqq, "fp8": _from_fp8}[how.backend](what, of, y, shape, like, how)


def _quanto(what: str, x: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    """The extremes of every group make its scale and shift; then all is shifted, scaled, rounded and cut off, in a
    tensor each. Along the last axis groups are columns of a copy."""

    def op(name: str, reads: tuple[str, ...], y: str = "", dtype: str = "", source: str = _AFFINE) -> Op:
        return Op(f"{what}.{name}", reads, (Tensor(y, shape, dtype or f"={like}"),), source=source)

    few = f"={like}/{how.group}"
    scales, zeros, codes = stored(what, shape, like, how)
    last = how.axis(what) == -1
    given = f"{what} grouped" if last else x
    if last:
        yield op("group", (x,), given, source=_GROUPED)
    yield op("amin", (given,), f"{what} least", few, _MAX)
    yield op("amax", (given,), f"{what} most", few, _MAX)
    yield op("range", (f"{what} most", f"{what} least"), f"{what} range", few, _MAX)
    yield Op(f"{what}.scale", (f"{what} range",), (scales,), holds="cache", source=_MAX)
    yield Op(f"{what}.shift", (f"{what} least",), (zeros,), holds="cache", source=_MAX)
    yield ops.leave(f"{what} least", f"{what} most", *((given,) if last else ()))
    if last:
        given = f"{what} grouped again"
        yield op("group_again", (x,), given, source=_GROUPED)
    yield op("add", (given, zeros.name), f"{what} shifted")
    yield op("div", (f"{what} shifted", scales.name), f"{what} scaled")
    yield op("round", (f"{what} scaled",), f"{what} rounded")
    yield op("clamp", (f"{what} rounded",), f"{what} cut off")
    yield op("cast", (f"{what} cut off",), f"{what} numbers", "uint8")
    yield ops.leave(f"{what} rounded", *((given,) if last else ()))
    yield Op(f"{what}.pack", (f"{what} numbers",), (codes,), holds="cache", source=_PACK)
    yield Op(f"{what}.shift_bits", (f"{what} numbers",), scratch=(codes._replace(name="bits"),), source=_PACK)
    yield ops.leave(f"{what} numbers")


def _from_quanto(what: str, of: str, y: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    last = how.axis(what) == -1
    numbers, product = f"{what} unpacked", f"{what} columns" if last else y
    yield Op(f"{what}.unpack", (f"{of} codes",), (Tensor(numbers, shape, "uint8"),), source=_UNPACK)
    yield Op(f"{what}.mul", (numbers, f"{of} scales"), (Tensor(product, shape, f"={like}"),), source=_BACK)
    if last:
        yield Op(f"{what}.ungroup", (product,), (Tensor(y, shape, f"={like}"),), source=_GROUPED)
    yield ops.leave(numbers, *((product,) if last else ()))


def _hqq(what: str, x: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    """In fp32 there are the tensor, and extremes and scales of every group; scales are then searched for in fp16, in
    two steps at least, of which each keeps what it made until the next has its own."""

    def op(
        name: str, reads: tuple[str, ...], *y: str, dtype: str = "fp16", scratch: tuple[Tensor, ...] = (), few: int = 0
    ) -> Op:
        kind = f"{dtype}/{how.group}" if few else dtype
        source = _HQQ if few == 2 else _SEARCH
        return Op(f"{what}.{name}", reads, tuple(Tensor(t, shape, kind) for t in y), scratch=scratch, source=source)

    def half(name: str) -> Tensor:
        return Tensor(f"{what} {name}", shape, "fp16")

    wide, narrow, places = f"{what} in fp32", f"{what} in fp16", Tensor("places", shape, f"int64/{how.group}")
    codes, scales, zeros = stored(what, shape, like, how)
    least, most, spread, scale32, zero32 = (f"{what} {t}" for t in ("least", "most", "range", "scale32", "zero32"))
    yield ops.cast(f"{what}.float", x, wide, shape, "fp32")
    yield op("min", (wide,), least, dtype="fp32", scratch=(places,), few=2)
    yield op("max", (wide,), most, dtype="fp32", scratch=(places,), few=2)
    yield op("denominator", (most, least), spread, dtype="fp32", few=2)
    some = tuple(Tensor(name, shape, f"{kind}/{how.group}") for name, kind in _OF_SCALE)
    yield op("scale", (spread,), scale32, dtype="fp32", scratch=some, few=2)
    yield op("zero", (least, scale32), zero32, dtype="fp32", scratch=some[:1], few=2)
    scale16, zero16 = f"{what} scale16", f"{what} zero16"
    yield op("half", (wide,), narrow)
    yield op("half_scale", (scale32,), scale16, few=1)
    yield op("half_zero", (zero32,), zero16, few=1)
    error, best = f"{what} error", f"{what} least error"
    yield Op(f"{what}.best", (), (Tensor(best, "", "fp32"),), source=_SEARCH)
    before: tuple[str, ...] = ()
    for step in ("first", "second"):

        def of(name: str, step: str = step) -> str:
            return f"{what} {name}, {step} step"

        yield op(f"mul_{step}", (narrow, scale16), of("product"))
        yield op(f"add_{step}", (of("product"), zero16), of("sum"))
        yield op(f"round_{step}", (of("sum"),), of("numbers"))
        yield op(f"sub_{step}", (of("numbers"), zero16), of("difference"))
        yield op(f"div_{step}", (of("difference"), scale16), of("back"))
        yield op(f"error_{step}", (narrow, of("back")), of("error"))
        powers = (half("power"), half("share of the power"))
        yield op(f"shrink_{step}", (of("error"),), of("shrunk"), scratch=powers)
        yield ops.leave(of("error"))
        yield op(f"less_{step}", (narrow, of("shrunk")), of("rest"))
        yield op(f"times_{step}", (of("rest"), scale16), of("scaled rest"))
        yield op(f"from_{step}", (of("numbers"), of("scaled rest")), of("zeros"))
        yield op(f"mean_{step}", (of("zeros"),), of("zero"), few=1)
        yield ops.leave(of("shrunk"), *before, zero16)
        before, zero16 = (of("numbers"), of("back")), of("zero")
    yield op("distance", (narrow, before[1]), f"{what} distance", scratch=(half("sizes"),))
    yield Op(f"{what}.error_of_all", (), (Tensor(error, "", "fp32"),), source=_SEARCH)
    yield ops.leave(narrow, *before)
    yield op("mul_again", (wide, scale16), f"{what} product32", dtype="fp32")
    yield op("add_again", (f"{what} product32", zero16), f"{what} sum32", dtype="fp32")
    yield op("round_again", (f"{what} sum32",), f"{what} numbers32", dtype="fp32")
    yield ops.leave(error, best, scale32, zero32, wide, least, most)
    yield op(
        "inverse", (scale16,), f"{what} inverse", few=1, scratch=(Tensor("reciprocal", shape, f"fp16/{how.group}"),)
    )
    yield ops.leave(scale16)
    yield from _packed(what, f"{what} numbers32", codes, shape, how)
    yield ops.leave(f"{what} numbers32", spread)
    yield _as(f"{what}.cast_scale", f"{what} inverse", scales)
    yield _as(f"{what}.cast_zero", zero16, zeros)


_OF_SCALE = (("inverse", "fp32"), ("least scale", "bool"), ("ones", "fp32"), ("chosen", "fp32"))


def _as(name: str, x: str, to: Tensor) -> Op:
    return Op(name, (x,), (to,), holds="cache", source=_HQQ)


def _packed(what: str, x: str, codes: Tensor, shape: str, how: Stored) -> Iterator[Op]:
    """Numbers as bytes, or three bits of ten in 32: each part is shifted, and joined with those before."""
    bits = codes._replace(name="bits")
    if how.nbits == 8:
        yield Op(f"{what}.pack", (x,), (codes,), holds="cache", source=_BITS)
        return
    kind = Tensor(f"{what} numbers", shape, "uint8")
    if how.nbits == 3:
        kind = Tensor(kind.name, f"{shape} {_rows_of_three(how)}", f"int32/{how.group}")
    yield Op(f"{what}.integers", (x,), (kind,), source=_BITS)
    parts = 10 if how.nbits == 3 else 8 // how.nbits
    shifted = (bits,) if parts == 2 else (bits, bits._replace(name="joined"))
    yield Op(f"{what}.pack", (kind.name,), (codes,), scratch=shifted, holds="cache", source=_BITS)
    yield ops.leave(kind.name)


def _from_hqq(what: str, of: str, y: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    """Numbers in the dtype they are to have, less their zero point, by their scale: in a tensor each."""
    kind = f"={like}"
    whole = Tensor(f"{what} numbers", shape, kind)
    if how.nbits == 3:
        whole = Tensor(whole.name, f"{shape} {_rows_of_three(how)}", f"{kind}/{how.group}")
    bits = Tensor("bits", *_codes(shape, how))
    shifts = () if how.nbits == 8 else (bits, bits._replace(name="bits shifted"))
    yield Op(f"{what}.unpack", (f"{of} codes",), (whole,), scratch=shifts, source=_BITS)
    source = "hqq 0.2.8 core/quantize.py Quantizer.dequantize"
    less = Tensor(f"{what} less", shape, kind)
    yield Op(f"{what}.sub", (whole.name, f"{of} zero points"), (less,), source=source)
    yield Op(f"{what}.mul", (less.name, f"{of} scales"), (Tensor(y, shape, kind),), source=source)
    yield ops.leave(whole.name)


def _fp8(what: str, x: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    """The largest number of all makes the one scale; then all is divided by it in fp32, and cast."""
    scale, codes = stored(what, shape, like, how)
    yield Op(f"{what}.abs", (x,), scratch=(Tensor("sizes", shape, f"={like}"),), source=_FP8)
    yield Op(f"{what}.scale", (x,), (scale,), scratch=(scale._replace(name="largest"),), holds="cache", source=_FP8)
    yield from _to_fp8(what, x, codes, shape, holds=True)


def _to_fp8(what: str, x: str, codes: Tensor, shape: str, holds: bool) -> Iterator[Op]:
    yield ops.cast(f"{what}.float", x, f"{what} in fp32", shape, "fp32")
    divided = Tensor(f"{what} divided", shape, "fp32")
    yield Op(f"{what}.div", (f"{what} in fp32",), (divided,), source=_FP8)
    yield Op(f"{what}.cast", (divided.name,), (codes,), holds="cache" if holds else "", source=_FP8)


def _from_fp8(what: str, of: str, y: str, shape: str, like: str, how: Stored) -> Iterator[Op]:
    wide, scaled = f"{what} in fp32", f"{what} scaled"
    yield Op(f"{what}.float", (f"{of} codes",), (Tensor(wide, shape, "fp32"),), source=_FP8)
    yield Op(f"{what}.mul", (wide,), (Tensor(scaled, shape, "fp32"),), source=_FP8)
    yield ops.cast(f"{what}.back", scaled, y, shape, f"={like}")


# --- a layer's update


def prompt(name: str, tensors: list[tuple[Tensor, str]], keyed: Keyed, how: Stored, beams: bool) -> Iterator[Op]:
    """The first tokens of a sequence, of which all are stored, and handed back as they came: `tensors` and what each is
    called. Groups are of a contiguous copy."""
    for t, what in tensors:
        x = t.name
        if how.grouped:
            x = f"{what} contiguous"
            yield ops.copy(f"{name}.{what}.contiguous", t.name, x, t.shape)
        yield from quantised(what, x, t.shape, t.name, how)
    for t, what in tensors if how.grouped else ():  # an empty tensor, for there is none that waits
        after = Tensor(f"{what} residual", keyed(t.shape, AFTER), f"={t.name}")
        yield Op(f"{name}.{what}.residual", (t.name,), (after,), holds="cache", source=_LAYERS)
    if beams and how.grouped:
        yield Op(f"{name}.order", (), (_ORDER,), holds="cache", source=_REORDER)
    yield ops.leave(*(t.name for t, _ in tensors))


_ORDER = Tensor("order of the beams", f"b {RANKED}", "int64")  # in which a layer's are to be, when they come back
_REORDER = "transformers 5.24 cache_utils.py QuantizedLayer.reorder_cache"


def tokens(
    name: str, given: list[tuple[Tensor, str]], keyed: Keyed, axis: str, how: Stored, anew: bool, beams: bool
) -> Iterator[Op]:
    """Further tokens: what is stored comes back, and all are joined, for attention to read (`what` itself, the name
    after each of the tensors). The new ones join the residual; where they are too many then, all are stored `anew`.

    `keyed` makes a shape one of other tokens: those of QUANTIZED and of RESIDUAL before, of AFTER, and of
    `axis`, all. With `beams` what came back is put in another order first.
    """
    shapes = [
        {of: keyed(t.shape, of) for of in (QUANTIZED, RESIDUAL, AFTER)} | {"all": keyed(t.shape, axis)}
        for t, _ in given
    ]
    if not how.grouped:
        yield from _appended(name, given, shapes, how)
        return
    old: list[str] = []
    back: list[str] = []
    for (t, what), shape in zip(given, shapes, strict=True):
        held = stored(what, shape[QUANTIZED], t.name, how)
        for part in held:
            before = part._replace(name=f"{part.name} before")
            if anew:
                old.append(before.name)
                yield Op(f"{name}.{part.name}_before", (before.name,), past=(before,))
            else:
                yield Op(f"{name}.{part.name}", (before.name,), (part,), past=(before,), view=True, holds="cache")
    for (t, what), shape in zip(given, shapes, strict=True):
        y = f"{what} dequantised"
        back.append(y)
        of = {
            f"{what} {part}": f"{what} {part}{' before' if anew else ''}" for part in ("codes", "scales", "zero points")
        }
        for op in dequantised(f"{what} back", what, y, shape[QUANTIZED], t.name, how):
            yield op._replace(reads=tuple(of.get(r, r) for r in op.reads))
    order: Op | None = None
    if beams:
        ordered = [f"{y} in order" for y in back]
        for (t, what), shape, y, z in zip(given, shapes, back, ordered, strict=True):
            source = "transformers 5.24 cache_utils.py QuantizedLayer._apply_pending_reorder"
            yield Op(f"{name}.{what}.reorder", (y,), (Tensor(z, shape[QUANTIZED], f"={t.name}"),), source=source)
        yield ops.leave(*back)
        back = ordered
        last = _ORDER._replace(name=f"{_ORDER.name} before")
        order = Op(f"{name}.order", (last.name,), (_ORDER,), past=(last,), view=True, holds="cache", source=_REORDER)
    waiting: list[str] = []
    for (t, what), shape, y in zip(given, shapes, back, strict=True):
        before = Tensor(f"{what} residual before", shape[RESIDUAL], f"={t.name}")
        waiting.append(before.name)
        joined = (Tensor(what, shape["all"], f"={t.name}"),)
        yield Op(f"{name}.{what}", (y, before.name, t.name), joined, past=(before,), source=_LAYERS)
    if anew:
        for (t, what), shape in zip(given, shapes, strict=True):
            parts = tuple(n for n in old if n.startswith(what))
            yield from quantised(what, what, shape["all"], t.name, how, parts)
        yield ops.leave(*waiting)
        # none wait now, and an empty tensor stands for them
    for (t, what), shape, before in zip(given, shapes, waiting, strict=True):
        after = Tensor(f"{what} residual", shape[AFTER], f"={t.name}")
        reads = (t.name,) if anew else (before, t.name)
        yield Op(f"{name}.{what}.residual", reads, (after,), holds="cache", source=_LAYERS)
    if order is not None:
        yield order
    yield ops.leave(*(t.name for t, _ in given), *back, *(what for _, what in given))


def _appended(
    name: str, given: list[tuple[Tensor, str]], shapes: Sequence[Mapping[str, str]], how: Stored
) -> Iterator[Op]:
    """New tokens by the scale of the first ones, joined with those before; then all come back."""
    new: list[str] = []
    old: list[str] = []  # which names keep until the update is over
    for t, what in given:
        new.append(f"{what} new")
        yield from _to_fp8(f"{what} new", t.name, Tensor(f"{what} new", t.shape, "fp8"), t.shape, holds=False)
    for (_, what), shape, x in zip(given, shapes, new, strict=True):
        scale = Tensor(f"{what} scale", "", "fp32")
        before = scale._replace(name=f"{what} scale before")
        yield Op(f"{name}.{what}.scale", (before.name,), (scale,), past=(before,), view=True, holds="cache")
        before = Tensor(f"{what} codes before", shape[QUANTIZED], "fp8")
        codes = Tensor(f"{what} codes", shape["all"], "fp8")
        old.append(before.name)
        yield Op(f"{name}.{what}.codes", (before.name, x), (codes,), past=(before,), holds="cache", source=_FP8)
    for (t, what), shape in zip(given, shapes, strict=True):
        yield from dequantised(f"{what} back", what, what, shape["all"], t.name, how)
    yield ops.leave(*(t.name for t, _ in given), *new, *old, *(what for _, what in given))
