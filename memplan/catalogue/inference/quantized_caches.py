"""Keys and values quantised to few bits: what stays, and the temporaries of quantising and dequantising.

The backends quanto and hqq quantise in groups, each with a scale and a zero point. Their codes cannot be appended to,
so the newest tokens stay unquantised, as the residual, until it is full; then all tokens are quantised again. The
backend fp8 has one scale per tensor and quantises each token as it comes. Attention reads dequantised tensors, so one
layer at a time exists fully in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor
from memplan.core.records import NamedTuple

Backend = Literal["quanto", "hqq", "fp8"]
# Axes: tokens quantised before a pass, tokens in the residual before it, and tokens in the residual after it.
QUANTIZED, RESIDUAL, AFTER = "quantized", "residual", "residual_after"
RANKED = "ranked"  # an axis that is 0 while the prompt is read, and 1 once beams have been ranked
Keyed = Callable[[str, str], str]  # replaces the token axis of a shape

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

# Supported bits per number, and the axes along which groups can lie.
NBITS: Mapping[str, tuple[int, ...]] = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}
AXES: Mapping[str, tuple[int, ...]] = {"quanto": (0, -1), "hqq": (0, 1)}
# Defaults. Source: transformers 5.24 cache_utils.py QuantizedCache.
USUAL: Mapping[str, int] = {"nbits": 4, "axis_key": 0, "axis_value": 0, "q_group_size": 64, "residual_length": 128}


class CacheQuantization(NamedTuple):
    """How a quantised cache stores keys and values.

    backend     quanto, hqq or fp8
    nbits       bits per number
    axis_key    axis along which the groups of keys lie
    axis_value  axis along which the groups of values lie
    group       numbers that share a scale and a zero point
    residual    the newest tokens stay unquantised while they are fewer than this
    """

    backend: Backend
    nbits: int = 4
    axis_key: int = 0
    axis_value: int = 0
    group: int = 64
    residual: int = 128

    def axis(self, what: str) -> int:
        """Return the axis of the groups of keys or of values, by the tensor's name."""
        return self.axis_value if what.startswith("value") else self.axis_key

    @property
    def grouped(self) -> bool:
        return self.backend != "fp8"

    def after(self, quantized: int, residual: int, fed: int) -> tuple[int, int]:
        """Return the number of quantised and of residual tokens after `fed` more."""
        total = quantized + residual + fed
        if not self.grouped or not quantized or residual + fed >= self.residual:
            return total, 0
        return quantized, residual + fed

    def quantized_of(self, parts: int, part: int) -> int:
        """Return the number of quantised tokens after `parts` parts of a prompt, each of `part` tokens."""
        if not self.grouped or not parts:
            return parts * part
        period = -(-self.residual // part)  # parts until all tokens are quantised again
        return (1 + (parts - 1) // period * period) * part


def stored(what: str, shape: str, like: str, how: CacheQuantization) -> tuple[Tensor, ...]:
    """Return the tensors that hold `what`, of that shape and the dtype of `like`, in order of allocation.

    Codes, and a scale and a zero point per group; for fp8 one scale, and codes.
    """
    codes = Tensor(f"{what} codes", *_codes(shape, how))
    if not how.grouped:
        return Tensor(f"{what} scale", "", "fp32"), codes
    per_group = f"={like}/{how.group}"
    group_tensors = Tensor(f"{what} scales", shape, per_group), Tensor(f"{what} zero points", shape, per_group)
    return (*group_tensors, codes) if how.backend == "quanto" else (codes, *group_tensors)


def _codes(shape: str, how: CacheQuantization) -> tuple[str, str]:
    """Return the shape and dtype of codes: several per byte, or ten 3-bit codes per four bytes, in padded rows."""
    if not how.grouped:
        return shape, "fp8"
    if how.nbits != 3:
        return shape, _share(8 // how.nbits)
    return f"{shape} {_rows_of_three(how) // 10}", f"int32/{how.group}"


def _share(per: int) -> str:
    return f"uint8/{per}" if per > 1 else "uint8"


def _rows_of_three(how: CacheQuantization) -> int:
    """Return the rows of a matrix whose columns are groups, rounded up to a multiple of ten."""
    return -(-how.group // 10) * 10


def quantised(
    what: str, x: str, shape: str, like: str, how: CacheQuantization, leaves: tuple[str, ...] = ()
) -> Iterator[Op]:
    """Quantise the contiguous `x` as `what`, then release it and `leaves`."""
    yield from {"quanto": _quanto, "hqq": _hqq, "fp8": _fp8}[how.backend](what, x, shape, like, how)
    yield ops.release_names(x, *leaves)


def dequantised(what: str, of: str, y: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    """Dequantise the tensors named `of` to the dtype of `like`."""
    yield from {"quanto": _from_quanto, "hqq": _from_hqq, "fp8": _from_fp8}[how.backend](what, of, y, shape, like, how)


def _quanto(what: str, x: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    """Each group's extremes give its scale and shift. The numbers are then shifted, scaled, rounded and clamped.

    Each step makes a new tensor. Groups along the last axis are columns of a copy.
    """

    def op(name: str, reads: tuple[str, ...], y: str = "", dtype: str = "", source: str = _AFFINE) -> Op:
        return Op(f"{what}.{name}", reads, (Tensor(y, shape, dtype or f"={like}"),), source=source)

    per_group = f"={like}/{how.group}"
    scales, zeros, codes = stored(what, shape, like, how)
    is_last = how.axis(what) == -1
    grouped = f"{what} grouped" if is_last else x
    if is_last:
        yield op("group", (x,), grouped, source=_GROUPED)
    yield op("amin", (grouped,), f"{what} least", per_group, _MAX)
    yield op("amax", (grouped,), f"{what} most", per_group, _MAX)
    yield op("range", (f"{what} most", f"{what} least"), f"{what} range", per_group, _MAX)
    yield Op(f"{what}.scale", (f"{what} range",), (scales,), holds="cache", source=_MAX)
    yield Op(f"{what}.shift", (f"{what} least",), (zeros,), holds="cache", source=_MAX)
    yield ops.release_names(f"{what} least", f"{what} most", *((grouped,) if is_last else ()))
    if is_last:
        grouped = f"{what} grouped again"
        yield op("group_again", (x,), grouped, source=_GROUPED)
    yield op("add", (grouped, zeros.name), f"{what} shifted")
    yield op("div", (f"{what} shifted", scales.name), f"{what} scaled")
    yield op("round", (f"{what} scaled",), f"{what} rounded")
    yield op("clamp", (f"{what} rounded",), f"{what} cut off")
    yield op("cast", (f"{what} cut off",), f"{what} numbers", "uint8")
    yield ops.release_names(f"{what} rounded", *((grouped,) if is_last else ()))
    yield Op(f"{what}.pack", (f"{what} numbers",), (codes,), holds="cache", source=_PACK)
    yield Op(f"{what}.shift_bits", (f"{what} numbers",), scratch=(codes._replace(name="bits"),), source=_PACK)
    yield ops.release_names(f"{what} numbers")


def _from_quanto(what: str, of: str, y: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    last = how.axis(what) == -1
    numbers, product = f"{what} unpacked", f"{what} columns" if last else y
    yield Op(f"{what}.unpack", (f"{of} codes",), (Tensor(numbers, shape, "uint8"),), source=_UNPACK)
    yield Op(f"{what}.mul", (numbers, f"{of} scales"), (Tensor(product, shape, f"={like}"),), source=_BACK)
    if last:
        yield Op(f"{what}.ungroup", (product,), (Tensor(y, shape, f"={like}"),), source=_GROUPED)
    yield ops.release_names(numbers, *((product,) if last else ()))


def _hqq(what: str, x: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    """The fp32 copy gives every group's extremes and scale; scales are then optimised in fp16.

    This takes at least two steps, each of which keeps its tensors until the next has made its own.
    """

    def op(
        name: str, reads: tuple[str, ...], *y: str, dtype: str = "fp16", scratch: tuple[Tensor, ...] = (), few: int = 0
    ) -> Op:
        kind = f"{dtype}/{how.group}" if few else dtype
        source = _HQQ if few == 2 else _SEARCH
        return Op(f"{what}.{name}", reads, tuple(Tensor(t, shape, kind) for t in y), scratch=scratch, source=source)

    def half(name: str) -> Tensor:
        return Tensor(f"{what} {name}", shape, "fp16")

    x32, x16, places = f"{what} in fp32", f"{what} in fp16", Tensor("places", shape, f"int64/{how.group}")
    codes, scales, zeros = stored(what, shape, like, how)
    least, most, spread, scale32, zero32 = (f"{what} {t}" for t in ("least", "most", "range", "scale32", "zero32"))
    yield ops.cast(f"{what}.float", x, x32, shape, "fp32")
    yield op("min", (x32,), least, dtype="fp32", scratch=(places,), few=2)
    yield op("max", (x32,), most, dtype="fp32", scratch=(places,), few=2)
    yield op("denominator", (most, least), spread, dtype="fp32", few=2)
    scale_temporaries = tuple(Tensor(name, shape, f"{kind}/{how.group}") for name, kind in _SCALE_TEMPORARIES)
    yield op("scale", (spread,), scale32, dtype="fp32", scratch=scale_temporaries, few=2)
    yield op("zero", (least, scale32), zero32, dtype="fp32", scratch=scale_temporaries[:1], few=2)
    scale16, zero16 = f"{what} scale16", f"{what} zero16"
    yield op("half", (x32,), x16)
    yield op("half_scale", (scale32,), scale16, few=1)
    yield op("half_zero", (zero32,), zero16, few=1)
    error, best = f"{what} error", f"{what} least error"
    yield Op(f"{what}.best", (), (Tensor(best, "", "fp32"),), source=_SEARCH)
    before: tuple[str, ...] = ()
    for step in ("first", "second"):

        def of(name: str, step: str = step) -> str:
            return f"{what} {name}, {step} step"

        yield op(f"mul_{step}", (x16, scale16), of("product"))
        yield op(f"add_{step}", (of("product"), zero16), of("sum"))
        yield op(f"round_{step}", (of("sum"),), of("numbers"))
        yield op(f"sub_{step}", (of("numbers"), zero16), of("difference"))
        yield op(f"div_{step}", (of("difference"), scale16), of("back"))
        yield op(f"error_{step}", (x16, of("back")), of("error"))
        powers = (half("power"), half("share of the power"))
        yield op(f"shrink_{step}", (of("error"),), of("shrunk"), scratch=powers)
        yield ops.release_names(of("error"))
        yield op(f"less_{step}", (x16, of("shrunk")), of("rest"))
        yield op(f"times_{step}", (of("rest"), scale16), of("scaled rest"))
        yield op(f"from_{step}", (of("numbers"), of("scaled rest")), of("zeros"))
        yield op(f"mean_{step}", (of("zeros"),), of("zero"), few=1)
        yield ops.release_names(of("shrunk"), *before, zero16)
        before, zero16 = (of("numbers"), of("back")), of("zero")
    yield op("distance", (x16, before[1]), f"{what} distance", scratch=(half("sizes"),))
    yield Op(f"{what}.error_of_all", (), (Tensor(error, "", "fp32"),), source=_SEARCH)
    yield ops.release_names(x16, *before)
    yield op("mul_again", (x32, scale16), f"{what} product32", dtype="fp32")
    yield op("add_again", (f"{what} product32", zero16), f"{what} sum32", dtype="fp32")
    yield op("round_again", (f"{what} sum32",), f"{what} numbers32", dtype="fp32")
    yield ops.release_names(error, best, scale32, zero32, x32, least, most)
    yield op(
        "inverse", (scale16,), f"{what} inverse", few=1, scratch=(Tensor("reciprocal", shape, f"fp16/{how.group}"),)
    )
    yield ops.release_names(scale16)
    yield from _packed(what, f"{what} numbers32", codes, shape, how)
    yield ops.release_names(f"{what} numbers32", spread)
    yield _final_cast(f"{what}.cast_scale", f"{what} inverse", scales)
    yield _final_cast(f"{what}.cast_zero", zero16, zeros)


_SCALE_TEMPORARIES = (("inverse", "fp32"), ("least scale", "bool"), ("ones", "fp32"), ("chosen", "fp32"))


def _final_cast(name: str, x: str, to: Tensor) -> Op:
    return Op(name, (x,), (to,), holds="cache", source=_HQQ)


def _packed(what: str, x: str, codes: Tensor, shape: str, how: CacheQuantization) -> Iterator[Op]:
    """Pack codes into bytes, or ten 3-bit codes into 32 bits: each part is shifted and joined with those before."""
    bits = codes._replace(name="bits")
    if how.nbits == 8:
        yield Op(f"{what}.pack", (x,), (codes,), holds="cache", source=_BITS)
        return
    numbers = Tensor(f"{what} numbers", shape, "uint8")
    if how.nbits == 3:
        numbers = Tensor(numbers.name, f"{shape} {_rows_of_three(how)}", f"int32/{how.group}")
    yield Op(f"{what}.integers", (x,), (numbers,), source=_BITS)
    parts = 10 if how.nbits == 3 else 8 // how.nbits
    shifted = (bits,) if parts == 2 else (bits, bits._replace(name="joined"))
    yield Op(f"{what}.pack", (numbers.name,), (codes,), scratch=shifted, holds="cache", source=_BITS)
    yield ops.release_names(numbers.name)


def _from_hqq(what: str, of: str, y: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    """Dequantise: subtract the zero points and multiply by the scales, each in a new tensor of the target dtype."""
    dtype = f"={like}"
    numbers = Tensor(f"{what} numbers", shape, dtype)
    if how.nbits == 3:
        numbers = Tensor(numbers.name, f"{shape} {_rows_of_three(how)}", f"{dtype}/{how.group}")
    bits = Tensor("bits", *_codes(shape, how))
    shifts = () if how.nbits == 8 else (bits, bits._replace(name="bits shifted"))
    yield Op(f"{what}.unpack", (f"{of} codes",), (numbers,), scratch=shifts, source=_BITS)
    source = "hqq 0.2.8 core/quantize.py Quantizer.dequantize"
    centred = Tensor(f"{what} less", shape, dtype)
    yield Op(f"{what}.sub", (numbers.name, f"{of} zero points"), (centred,), source=source)
    yield Op(f"{what}.mul", (centred.name, f"{of} scales"), (Tensor(y, shape, dtype),), source=source)
    yield ops.release_names(numbers.name)


def _fp8(what: str, x: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    """Compute the single scale from the largest number, then divide by it in fp32 and cast."""
    scale, codes = stored(what, shape, like, how)
    yield Op(f"{what}.abs", (x,), scratch=(Tensor("sizes", shape, f"={like}"),), source=_FP8)
    yield Op(f"{what}.scale", (x,), (scale,), scratch=(scale._replace(name="largest"),), holds="cache", source=_FP8)
    yield from _to_fp8(what, x, codes, shape, holds=True)


def _to_fp8(what: str, x: str, codes: Tensor, shape: str, holds: bool) -> Iterator[Op]:
    yield ops.cast(f"{what}.float", x, f"{what} in fp32", shape, "fp32")
    divided = Tensor(f"{what} divided", shape, "fp32")
    yield Op(f"{what}.div", (f"{what} in fp32",), (divided,), source=_FP8)
    yield Op(f"{what}.cast", (divided.name,), (codes,), holds="cache" if holds else "", source=_FP8)


def _from_fp8(what: str, of: str, y: str, shape: str, like: str, how: CacheQuantization) -> Iterator[Op]:
    wide, scaled = f"{what} in fp32", f"{what} scaled"
    yield Op(f"{what}.float", (f"{of} codes",), (Tensor(wide, shape, "fp32"),), source=_FP8)
    yield Op(f"{what}.mul", (wide,), (Tensor(scaled, shape, "fp32"),), source=_FP8)
    yield ops.cast(f"{what}.back", scaled, y, shape, f"={like}")


# --- a layer's update


def prompt(
    name: str, tensors: list[tuple[Tensor, str]], keyed: Keyed, how: CacheQuantization, beams: bool
) -> Iterator[Op]:
    """Yield the caching of a prompt's keys and values, which are all quantised; attention reads the originals.

    tensors  the tensors with the names of their caches
    keyed    replaces the token axis of a shape

    Groups are taken from a contiguous copy.
    """
    for t, what in tensors:
        contiguous = t.name
        if how.grouped:
            contiguous = f"{what} contiguous"
            yield ops.copy(f"{name}.{what}.contiguous", t.name, contiguous, t.shape)
        yield from quantised(what, contiguous, t.shape, t.name, how)
    for t, what in tensors if how.grouped else ():  # an empty tensor stands for the residual
        after = Tensor(f"{what} residual", keyed(t.shape, AFTER), f"={t.name}")
        yield Op(f"{name}.{what}.residual", (t.name,), (after,), holds="cache", source=_LAYERS)
    if beams and how.grouped:
        yield Op(f"{name}.order", (), (_ORDER,), holds="cache", source=_REORDER)
    yield ops.release_names(*(t.name for t, _ in tensors))


_ORDER = Tensor("order of the beams", f"b {RANKED}", "int64")  # applied when a layer's cache is next dequantised
_REORDER = "transformers 5.24 cache_utils.py QuantizedLayer.reorder_cache"


def tokens(
    name: str,
    new_tokens: list[tuple[Tensor, str]],
    keyed: Keyed,
    axis: str,
    how: CacheQuantization,
    requantises: bool,
    beams: bool,
) -> Iterator[Op]:
    """Yield the caching of further tokens: dequantise the cache and join it with the residual and the new tokens.

    new_tokens   the new tensors, with the names under which attention reads the joined ones
    keyed        replaces a shape's token axis by QUANTIZED, RESIDUAL, AFTER or `axis`, which counts all tokens
    requantises  the residual is full, so all tokens are quantised again
    beams        what was dequantised is reordered first

    Unless all are quantised again, the new tokens join the residual.
    """
    shapes = [
        {name: keyed(t.shape, name) for name in (QUANTIZED, RESIDUAL, AFTER)} | {"all": keyed(t.shape, axis)}
        for t, _ in new_tokens
    ]
    if not how.grouped:
        yield from _appended(name, new_tokens, shapes, how)
        return
    old: list[str] = []
    dequantised_names: list[str] = []
    for (t, what), shape in zip(new_tokens, shapes, strict=True):
        tensors = stored(what, shape[QUANTIZED], t.name, how)
        for part in tensors:
            before = part._replace(name=f"{part.name} before")
            if requantises:
                old.append(before.name)
                yield Op(f"{name}.{part.name}_before", (before.name,), past=(before,))
            else:
                yield Op(f"{name}.{part.name}", (before.name,), (part,), past=(before,), view=True, holds="cache")
    for (t, what), shape in zip(new_tokens, shapes, strict=True):
        y = f"{what} dequantised"
        dequantised_names.append(y)
        sources = {
            f"{what} {part}": f"{what} {part}{' before' if requantises else ''}"
            for part in ("codes", "scales", "zero points")
        }
        for op in dequantised(f"{what} back", what, y, shape[QUANTIZED], t.name, how):
            yield op._replace(reads=tuple(sources.get(r, r) for r in op.reads))
    order: Op | None = None
    if beams:
        ordered = [f"{y} in order" for y in dequantised_names]
        for (t, what), shape, y, z in zip(new_tokens, shapes, dequantised_names, ordered, strict=True):
            source = "transformers 5.24 cache_utils.py QuantizedLayer._apply_pending_reorder"
            yield Op(f"{name}.{what}.reorder", (y,), (Tensor(z, shape[QUANTIZED], f"={t.name}"),), source=source)
        yield ops.release_names(*dequantised_names)
        dequantised_names = ordered
        last = _ORDER._replace(name=f"{_ORDER.name} before")
        order = Op(f"{name}.order", (last.name,), (_ORDER,), past=(last,), view=True, holds="cache", source=_REORDER)
    residuals: list[str] = []
    for (t, what), shape, y in zip(new_tokens, shapes, dequantised_names, strict=True):
        before = Tensor(f"{what} residual before", shape[RESIDUAL], f"={t.name}")
        residuals.append(before.name)
        joined = (Tensor(what, shape["all"], f"={t.name}"),)
        yield Op(f"{name}.{what}", (y, before.name, t.name), joined, past=(before,), source=_LAYERS)
    if requantises:
        for (t, what), shape in zip(new_tokens, shapes, strict=True):
            parts = tuple(n for n in old if n.startswith(what))
            yield from quantised(what, what, shape["all"], t.name, how, parts)
        yield ops.release_names(*residuals)
        # the residual is empty now, and an empty tensor stands for it
    for (t, what), shape, before in zip(new_tokens, shapes, residuals, strict=True):
        after = Tensor(f"{what} residual", shape[AFTER], f"={t.name}")
        reads = (t.name,) if requantises else (before, t.name)
        yield Op(f"{name}.{what}.residual", reads, (after,), holds="cache", source=_LAYERS)
    if order is not None:
        yield order
    yield ops.release_names(*(t.name for t, _ in new_tokens), *dequantised_names, *(what for _, what in new_tokens))


def _appended(
    name: str, new_tokens: list[tuple[Tensor, str]], shapes: Sequence[Mapping[str, str]], how: CacheQuantization
) -> Iterator[Op]:
    """Quantise new tokens by the first ones' scale, join them with the earlier codes and dequantise all."""
    new: list[str] = []
    old: list[str] = []  # names hold them until the update ends
    for t, what in new_tokens:
        new.append(f"{what} new")
        yield from _to_fp8(f"{what} new", t.name, Tensor(f"{what} new", t.shape, "fp8"), t.shape, holds=False)
    for (_, what), shape, x in zip(new_tokens, shapes, new, strict=True):
        scale = Tensor(f"{what} scale", "", "fp32")
        before = scale._replace(name=f"{what} scale before")
        yield Op(f"{name}.{what}.scale", (before.name,), (scale,), past=(before,), view=True, holds="cache")
        before = Tensor(f"{what} codes before", shape[QUANTIZED], "fp8")
        codes = Tensor(f"{what} codes", shape["all"], "fp8")
        old.append(before.name)
        yield Op(f"{name}.{what}.codes", (before.name, x), (codes,), past=(before,), holds="cache", source=_FP8)
    for (t, what), shape in zip(new_tokens, shapes, strict=True):
        yield from dequantised(f"{what} back", what, what, shape["all"], t.name, how)
    yield ops.release_names(*(t.name for t, _ in new_tokens), *new, *old, *(what for _, what in new_tokens))
