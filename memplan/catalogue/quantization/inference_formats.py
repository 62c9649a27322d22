"""How transformers runs weights that nothing trains over: what it has on the GPU for a matrix, what making that takes,
and what a product with it makes beside its output.

    decompressed  compressed-tensors: as stored until the model is called first, then whole for good; a layer whose
                  config quantises inputs rounds them, and computes in the model's dtype
    scaled_mm     compressed-tensors' FP8 with `use_optimized_inference`: inputs in FP8, row by row
    fbgemm        FP8 by row with FBGEMM's kernels
    torchao       a whole copy of the matrix for every product; of 4 bits a kernel that needs none
    quanto        the same
    triton        gpt-oss' experts in MXFP4, as they are stored, with OpenAI's kernels
    dequantised   the same experts, and FP8 in squares on a card without its kernels, whole from when they are loaded
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.experts.routers import CHOSEN, SCORES
from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.storage import KINDS, Layout, parts_of
from memplan.core.ir import Op, Tensor, Weight

_CT = "compressed-tensors 0.20"
_DECOMPRESSED = f"{_CT} compressors/model_compressors/model_compressor.py decompress_model"
_QDQ = f"{_CT} quantization/lifecycle/forward.py set_forward_quantized, forward_helpers.py _quantize_dequantize"


class Kernel(NamedTuple):
    """Where it is read, the least compute capability it runs on, dtypes of the model that it takes (all, if empty), and
    whether the rows were seen in a trace (derived) or read (assumed)."""

    source: str
    needs: tuple[int, int] = (0, 0)
    dtypes: tuple[str, ...] = ()
    basis: str = "derived"


KERNELS = {
    "decompressed": Kernel(_DECOMPRESSED),
    "scaled_mm": Kernel("transformers 5.24 integrations/compressed_tensors.py CompressedTensorsFP8Linear", (8, 9)),
    "fbgemm": Kernel(
        "transformers 5.24 integrations/fbgemm_fp8.py FbgemmFp8Linear", (9, 0), ("bf16",), basis="assumed"
    ),
    "torchao": Kernel("torchao 0.18 quantization/quantize_/workflows, linear of each tensor"),
    "quanto": Kernel("optimum-quanto 0.2.7 library/qbytes_mm.py qbytes_mm_impl_cuda, tensor/weights/tinygemm/qbits.py"),
    "triton": Kernel("transformers 5.24 integrations/mxfp4.py Mxfp4GptOssExperts", (7, 5), basis="assumed"),
    "dequantised": Kernel(
        "transformers 5.24 integrations/mxfp4.py _convert_moe_packed_tensors, finegrained_fp8.py Fp8Dequantize"
    ),
}

# By format, the kernels that run it, that of most checkpoints first.
RUNS: dict[str, tuple[str, ...]] = {
    "fp8": ("", "decompressed", "dequantised"),
    "fp8-tensor": ("decompressed", "scaled_mm"),
    "fp8-channel": ("decompressed", "scaled_mm", "fbgemm", "torchao", "quanto"),
    "w8a8-int8": ("decompressed",),
    "w4a16": ("decompressed",),
    "w8a16": ("decompressed",),
    "mxfp4": ("triton", "dequantised", "decompressed"),
    "mxfp8": ("decompressed",),
    "nvfp4": ("decompressed",),
    "torchao-int8": ("torchao",),
    "torchao-int4": ("torchao",),
    "quanto-int8": ("quanto",),
    "quanto-int4": ("quanto",),
}
# Kernels of 4 bits that read weights as they are: what they run on, beside what their library needs.
# Source: optimum-quanto 0.2.7 tensor/weights/qbits.py WeightQBitsTensor.create; torchao 0.18
# quantization/quantize_/workflows/int4/int4_tensor.py Int4Tensor.from_hp, which wants the package mslk
FOUR_BITS = {
    "quanto-int4": Kernel("tinygemm", (8, 0), ("bf16",), "assumed"),
    "torchao-int4": Kernel("mslk", (0, 0), ("bf16",), "assumed"),
}
MADE_WHEN_LOADED = ("torchao", "quanto", "fbgemm")  # of a checkpoint that is whole
UNPACKED = ("decompressed", "dequantised")  # kernels whose matrices are whole when the model computes


class Running(NamedTuple):
    """How the matrices of a model run: in which layout they are stored, and what runs them. `experts`: the layout of
    stacks of experts, where that is another. `lays`: experts are laid anew for the tensor cores of capability 9.
    `at_once`: matrices are made whole as they are loaded, and nothing else stays. `skip`: modules that are not stored
    so."""

    layout: Layout
    kernel: str
    experts: Layout | None = None
    lays: bool = False
    at_once: bool = False
    skip: tuple[str, ...] = ()

    def of(self, w: Weight) -> Layout:
        return self.experts or self.layout if w.stacked else self.layout

    @property
    def whole(self) -> bool:
        """Whether they are whole when the model computes."""
        return self.kernel in UNPACKED

    @property
    def source(self) -> str:
        row = KERNELS[self.kernel]
        read = self.layout.format in FOUR_BITS or (self.kernel == "torchao" and bool(self.layout.acts))
        basis = "assumed" if read else row.basis
        return row.source if basis == "derived" else f"{basis}: {row.source}"


def resident(w: Weight, how: Running) -> tuple[Tensor, ...]:
    """The tensors there are for a matrix when the model computes."""
    parts = parts_of(w, how.of(w))
    if not how.whole:
        return (*parts, *_UNUSED) if how.kernel == "quanto" else parts
    whole = Tensor("weight", w.shape, w.dtype)
    if how.at_once:
        return (whole,)
    beside = (t._replace(dtype=_like(t, w)) if _replaced(t, how) else t for t in parts)
    return (whole, *(t for t in beside if t.name not in _CODES))


# Scales of inputs and outputs, which nothing quantises.
# Source: optimum-quanto 0.2.7 nn/qmodule.py QModuleMixin.__init__; transformers 5.24 integrations/quanto.py
_UNUSED = (Tensor("input_scale", "", "fp32"), Tensor("output_scale", "", "fp32"))
_CODES = ("weight", "weight_packed", "fp8")


def _replaced(t: Tensor, how: Running) -> bool:
    """Whether scales are replaced by others in the model's dtype."""
    return t.name == "weight_scale" and how.layout.format in ("mxfp4", "mxfp8", "nvfp4")


def goes(t: Tensor, w: Weight, how: Running) -> bool:
    """Whether a tensor that is stored goes when its matrix is whole: of experts all do."""
    return w.stacked or how.at_once or t.name in _CODES or _replaced(t, how)


def takes_experts(how: Running) -> bool:
    """Whether experts in one parameter are stored so."""
    return KINDS[(how.experts or how.layout).format].experts and how.kernel not in MADE_WHEN_LOADED


def takes_alone(how: Running) -> bool:
    """Whether those are all that is."""
    return how.layout.format == "mxfp4" and how.kernel in ("triton", "dequantised")


def _like(t: Tensor, w: Weight) -> str:
    """The dtype of a weight, in a tensor's blocks."""
    return t.dtype.replace(t.dtype.partition("/")[0], w.dtype)


# What unpacking a matrix makes, in order: names with a dtype are made, in the matrix's shape, others go. `=` is the
# model's dtype. `codes` is what is stored, `weight` what stays.
_Steps = tuple[tuple[str, str], ...]
_OWN = "own scales"  # in the model's dtype
_PLACES = "places"  # six tensors of the 32 places of a group, 512 bytes each
_NAIVE: _Steps = (("cast", "="), ("weight", "="), ("cast", ""))
_FOUR: _Steps = (
    *(("high", "uint8/2"), ("low", "uint8/2"), ("pairs", "uint8")),
    *(("low", ""), ("high", ""), ("numbers", "int8"), ("pairs", "")),
    *(("cast", "="), ("weight", "="), ("cast", ""), ("numbers", "")),
)
_EIGHT: _Steps = (
    *((_PLACES, "int32"), ("words", "int32"), ("shifted", "int32"), ("words", "")),
    *(("masked", "int32"), ("shifted", ""), ("centred", "int32"), ("numbers", "int8"), ("centred", "")),
    *(("masked", ""), (_PLACES, ""), ("cast", "="), ("weight", "="), ("cast", ""), ("numbers", "")),
)
_PAIRS: _Steps = (
    *(("masked", "uint8/2"), ("high", "uint8/2"), ("masked", ""), ("low", "uint8/2"), ("pairs", "uint8")),
    *(("sign bits", "uint8"), ("signs", "bool"), ("sign bits", "")),
    *(("bits", "uint8"), ("indices", "int64"), ("bits", ""), ("values", "fp32"), ("ones", "fp32")),
    *(("signed", "fp32"), ("values", ""), ("ones", "")),
)
_PAIRS_GONE: _Steps = (("high", ""), ("low", ""), ("pairs", ""), ("signs", ""), ("indices", ""), ("signed", ""))
# Source: transformers 5.24 integrations/finegrained_fp8.py Fp8Dequantize._dequantize_one
_FP8: _Steps = (("wide", "fp32"), ("scaled", "fp32"), ("weight", "="), ("scaled", ""), ("wide", ""))
_MXFP8: _Steps = ((_OWN, "="), *_NAIVE)
_MXFP4: _Steps = (*_PAIRS, ("numbers", "="), *_PAIRS_GONE, (_OWN, "="), ("weight", "="), ("numbers", ""))
_NVFP4: _Steps = (
    *(*_PAIRS, ("numbers", "="), *_PAIRS_GONE, (_OWN, "=")),
    *(("scales", "fp32/16"), ("cast", "fp32"), ("scaled", "fp32"), ("cast", ""), ("scales", "")),
    *(("weight", "="), ("scaled", ""), ("numbers", "")),
)
_UNPACKING: dict[str, _Steps] = {
    **dict.fromkeys(("fp8", "fp8-tensor", "fp8-channel", "w8a8-int8"), _NAIVE),
    "mxfp8": _MXFP8,
    "w4a16": _FOUR,
    "w8a16": _EIGHT,
    "mxfp4": _MXFP4,
    "nvfp4": _NVFP4,
}
# What quantising a matrix makes as it is loaded, beside itself: `codes` is what stays.
# Source: torchao 0.18 quantization/quant_primitives.py quantize_affine, float8/inference.py; optimum-quanto 0.2.7
# tensor/weights/quantization.py, library/quantize.py, tensor/optimizers.
_FROM_INT8_AO: _Steps = (
    *(("scaled", "fp32"), ("rounded", "fp32"), ("scaled", ""), ("shifted", "fp32"), ("rounded", "")),
    *(("clamped", "fp32"), ("shifted", ""), ("codes", "*"), ("clamped", "")),
)
_FROM_FP8_AO: _Steps = (
    *(("wide", "fp32"), ("scaled", "fp32"), ("clamped", "fp32"), ("codes", "*")),
    *(("wide", ""), ("scaled", ""), ("clamped", "")),
)
_FROM_INT8_QUANTO: _Steps = (
    *(("magnitudes", "="), ("of both signs", "="), ("scaled", "="), ("rounded", "="), ("scaled", "")),
    *(("clamped", "="), ("codes", "*"), ("clamped", ""), ("rounded", ""), ("of both signs", ""), ("magnitudes", "")),
)
_FROM_FP8_QUANTO: _Steps = (
    *(("magnitudes", "="), ("of both signs", "="), ("scaled", "=")),
    *(("clamped", "="), ("codes", "*"), ("clamped", ""), ("scaled", ""), ("of both signs", ""), ("magnitudes", "")),
)
_QUANTISING: dict[tuple[str, str], _Steps] = {
    ("torchao-int8", "torchao"): _FROM_INT8_AO,
    ("fp8-channel", "torchao"): _FROM_FP8_AO,
    ("quanto-int8", "quanto"): _FROM_INT8_QUANTO,
    ("fp8-channel", "quanto"): _FROM_FP8_QUANTO,
}


class Step(NamedTuple):
    """A step of loading: a tensor is `made`, or where there is none, that of the `name` goes; `codes` and `weight` are
    what is stored and what stays."""

    name: str
    made: Tensor | None = None


def unpacking(w: Weight, how: Running) -> Iterator[Step]:
    """What comes and goes while a matrix that is stored packed is made whole; its codes go at last.

    Of experts in MXFP4 numbers are looked up for as many rows of 16 bytes at once as `MOST_ROWS`. Experts of
    compressed-tensors are made whole one by one, into a tensor for all, and gates and ups are then joined.
    """
    if how.of(w).format == "mxfp4" and how.kernel == "dequantised":
        yield from _of_gpt_oss(w)
        return
    if w.stacked and how.kernel == "dequantised":  # expert by expert, then joined
        whole = Tensor("weight", w.shape, w.dtype)
        yield from (Step("apart", whole), Step("codes"), Step("weight", whole), Step("apart"))
        return
    if w.stacked:
        whole = Tensor("weight", w.shape, w.dtype)
        joins = w.name.endswith("gate_up_proj")
        yield Step("apart" if joins else "weight", whole)
        yield Step("codes")
        if joins:
            yield Step("weight", whole)
            yield Step("apart")
        return
    own = next((t._replace(dtype=_like(t, w)) for t in parts_of(w, how.of(w)) if _replaced(t, how)), None)
    shapes = {_OWN: own, _PLACES: Tensor(_PLACES, str(6 * 128), "int32")}
    for step in _steps(w, _FP8 if how.kernel == "dequantised" else _UNPACKING[how.layout.format]):
        yield step._replace(made=shapes.get(step.name, step.made)) if step.made else step
    yield Step("codes")
    if own is not None and how.at_once:
        yield Step(_OWN)


def laying(w: Weight, how: Running) -> Iterator[Step]:
    """What comes and goes while experts in MXFP4 are laid as their kernel reads them: they are permuted, and words of
    32 bits put together of parts, as many as eight times the codes' bytes at once; `codes` is what was stored.

    Source: triton_kernels tensor_details/layout_details/hopper_value.py HopperMXValueLayout.swizzle_data, _pack_bits.
    """
    laid = parts_of(w, how.of(w))[0]
    yield Step("permuted", laid)
    yield Step("words", Tensor("words", w.shape, "fp32"))
    yield Step("words")
    yield Step("laid", laid)
    yield Step("permuted")
    yield Step("codes")


def quantising(w: Weight, how: Running) -> Iterator[Step]:
    """What comes and goes while a whole matrix is quantised as it is loaded."""
    steps = _QUANTISING.get((how.layout.format, how.kernel))
    yield from _steps(w, steps) if steps else iter((Step("codes", Tensor("codes")),))


def _steps(w: Weight, steps: _Steps) -> Iterator[Step]:
    for name, dtype in steps:
        kind, _, per = dtype.partition("/")
        kind = w.dtype if kind == "=" else kind
        yield Step(name, Tensor(name, w.shape, f"{kind}/{per}" if per else kind) if dtype else None)


def _of_gpt_oss(w: Weight) -> Iterator[Step]:
    chunk = chunk_of(w)
    exponents = Tensor("exponents", w.shape, "int32/32")
    yield Step("wide exponents", exponents)
    yield Step("exponents", exponents)
    yield Step("wide exponents")
    yield Step("table", Tensor("table", "16", w.dtype))
    yield Step("whole", Tensor("whole", w.shape, w.dtype))
    yield Step("bits", Tensor("bits", chunk, "uint8"))
    yield Step("indices", Tensor("indices", chunk, "int32"))
    yield Step("bits")
    yield Step("numbers", Tensor("numbers", chunk, w.dtype))
    yield Step("numbers")
    yield Step("indices")
    yield Step("weight", Tensor("weight", w.shape, w.dtype))
    yield Step("whole")
    yield Step("exponents")
    yield Step("table")
    yield Step("codes")


def chunk_of(w: Weight) -> str:
    """The axis that says how many bytes of a stack of experts are looked up at once."""
    return f"mxfp4:{w.name}"


MOST_ROWS = 32768 * 1024  # of 16 bytes, 32 weights
# Source: transformers 5.24 integrations/mxfp4.py _convert_moe_packed_tensors rows_per_chunk


def bytes_at_once(elements: int) -> int:
    """How many bytes of a stack of so many weights in MXFP4 are looked up at once."""
    return min(elements // 2, MOST_ROWS * 16)


def wide_bias(w: Weight, how: Running) -> bool:
    """Whether a bias of experts is kept in fp32. Source: transformers 5.24 integrations/mxfp4.py Mxfp4GptOssExperts."""
    return how.kernel == "triton" and bool(w.chosen) and w.name.endswith("_bias")


def with_triton(some: tuple[Op, ...]) -> tuple[Op, ...]:
    """The operations of a block whose experts run in OpenAI's kernels: the router's choice in one, then a product for
    either matrix, the first with the activation in it, and the second with a row of each choice before they are summed.

    What a product of a few rows makes to be divided among more blocks is not counted (`split_k`).
    Source: transformers 5.24 integrations/mxfp4.py Mxfp4GptOssMLP; triton_kernels matmul_ogs.py init_allocation,
    routing.py SortTokens, topk.py.
    """
    names = [op.name for op in some]
    if "mlp.experts.return" not in names:
        return some
    start, end = names.index("mlp.router.topk"), names.index("mlp.experts.return")
    inner = some[start : end + 1]
    found = {w.name: w for op in inner for w in op.weights}
    source = f"{KERNELS['triton'].basis}: {KERNELS['triton'].source}"

    def of(part: str) -> tuple[Weight, ...]:
        return tuple(w for name, w in found.items() if f".{part}_proj" in name)

    top = (Tensor("top", "b s e", "=router.logits"), Tensor("chosen", "b s e", "int32"))
    made = (
        Op(
            "mlp.router.routing",
            ("router.logits",),
            (Tensor(SCORES, "b s e", "=router.logits"), Tensor(CHOSEN, "2 b s e", "int32")),
            scratch=top,
        ),
        Op("mlp.experts.gate_up_proj", ("n2", CHOSEN), (Tensor("experts.inner", "b s e m", "=n2"),), of("gate_up")),
        Op(
            "mlp.experts.down_proj",
            ("experts.inner", CHOSEN, SCORES),
            (Tensor("mo", "b s h", "=n2"),),
            of("down"),
            scratch=(Tensor("rows", "b s e h", "=n2"),),
        ),
        ops.leave("experts.inner"),
    )
    products = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    described = (
        op._replace(source=source, product="grouped" if op.name in products else "") if op.writes else op for op in made
    )
    return (*some[:start], *described, *some[end + 1 :])


def product(op: Op, name: str, y: str, how: Running) -> Iterator[Op]:
    """A linear layer whose matrix runs so, writing `y`."""
    match how.kernel:
        case "decompressed":
            made = _over_rounded(op, name, y, how.layout)
        case "scaled_mm":
            made = _scaled_mm(op, name, y)
        case "fbgemm":
            made = _fbgemm(op, name, y)
        case "torchao" if how.layout.format == "torchao-int8" and how.layout.acts:
            made = _torchao_dynamic(op, name, y)
        case "torchao" if how.layout.format == "torchao-int8":
            made = _torchao_int8(op, name, y)
        case "torchao" if how.layout.format == "fp8-channel":
            made = _torchao_fp8(op, name, y)
        case "quanto" if how.layout.format == "quanto-int8":
            made = _quanto(op, name, y, promotes=False)
        case "quanto" if how.layout.format == "fp8-channel":
            made = _quanto(op, name, y, promotes=True)
        case _:
            made = _alone(op, name, y, how.kernel == "quanto")
    source = _QDQ if how.kernel == "decompressed" and how.layout.acts else how.source
    return (o._replace(source=source) if o.name.startswith(name) else o for o in made)


def _parts(op: Op) -> tuple[str, Tensor, str, Weight, tuple[Weight, ...]]:
    """What a linear layer reads and writes, the shape of what it reads, its matrix and what else it has."""
    (x,), made = op.reads, op.writes[0]
    lead, _, into = ops.axes_of(op)
    w = next(w for w in op.weights if w.matrix)
    return x, made, f"{lead} {into}".strip(), w, tuple(v for v in op.weights if v is not w)


def _made(name: str, reads: tuple[str, ...], y: str, shape: str, dtype: str = "") -> Op:
    return Op(name, reads, (Tensor(y, shape, dtype or f"={reads[0]}"),))


def _multiplied(op: Op, name: str, x: str, y: str, *also: str, like: str = "") -> Op:
    """The product itself, of the matrix as it is there, or of the copy `also`."""
    shape = op.writes[0].shape
    weights = op.weights
    return Op(name, (x, *also), (Tensor(y, shape, f"={like or x}"),), weights, product="matrix")


_PARTS = ("scales", "points", "unscaled", "scaled", "clamped", "rounded", "less", "wide", "in")


def _over_rounded(op: Op, name: str, y: str, layout: Layout) -> Iterator[Op]:
    """Inputs are divided by their scales, rounded and multiplied again, if the config has them quantised."""
    x, _, rows, _, _ = _parts(op)
    if not layout.acts:
        yield op._replace(name=name, writes=(op.writes[0]._replace(name=y),))
        yield ops.leave(x)
        return
    t = {part: f"{y}.{part}" for part in _PARTS}
    kind, _, group = layout.acts.partition("/")
    fixed, local = kind == "fixed", kind == "local"
    wide = "fp32" if local else f"={x}"
    if not fixed:
        shape, per = (rows, f"/{group}") if group else (ops.axes_of(op)[0], "")
        made = (Tensor(t["scales"], shape, f"{wide}{per}"), Tensor(t["points"], shape, f"int8{per}"))
        once = (Tensor(t["unscaled"], shape, f"{wide}{per}"),) if local else ()  # over the one for all
        yield Op(f"{name}.scales", (x,), (*made, *once))
    yield _made(f"{name}.scale", (x,), t["scaled"], rows, wide)
    yield _made(f"{name}.clamp", (t["scaled"],), t["clamped"], rows)
    yield from _rounded(name, y, t["clamped"], t["rounded"], rows, "fp4" if local else _ROUNDED[layout.format])
    last = t["rounded"]
    if not fixed:
        yield _made(f"{name}.shift", (last,), t["less"], rows)
        last = t["less"]
    yield _made(f"{name}.unscale", (last,), t["wide"] if local else t["in"], rows)
    yield ops.leave(t["scaled"], t["rounded"], last, *((t["unscaled"],) if local else ()))
    if local:
        yield _made(f"{name}.narrow", (t["wide"],), t["in"], rows, f"={x}")
    yield ops.leave(*((t["scales"], t["points"]) if not fixed else ()), *((t["wide"],) if local else ()))
    yield _multiplied(op, name, t["in"], y)
    yield ops.leave(x, t["in"])


_ROUNDED = {**dict.fromkeys(("fp8", "fp8-tensor", "fp8-channel", "mxfp8"), "fp8"), "w8a8-int8": "int8"}


def _rounded(name: str, y: str, x: str, to: str, shape: str, kind: str) -> Iterator[Op]:
    """Numbers rounded to those of a dtype, in their own: through FP8, or one by one to those of FP4.

    Source: compressed-tensors 0.20 quantization/quant_args.py round_to_quantized_type_args, utils/fp4_utils.py.
    """
    if kind == "fp8":
        yield _made(f"{name}.round", (x,), f"{y}.codes", shape, "fp8")
        yield _made(f"{name}.widen", (f"{y}.codes",), to, shape, f"={x}")
        yield ops.leave(x, f"{y}.codes")
    elif kind == "fp4":
        signs, sizes, ranges = f"{y}.signs", f"{y}.magnitudes", Tensor("ranges", shape, "bool")
        yield _made(f"{name}.sign", (x,), signs, shape)
        yield _made(f"{name}.abs", (x,), sizes, shape)
        yield Op(f"{name}.round", (sizes,), scratch=(ranges, ranges, ranges))
        yield _made(f"{name}.signed", (sizes, signs), to, shape)
        yield ops.leave(x, signs, sizes)
    else:
        yield _made(f"{name}.round", (x,), to, shape)
        yield ops.leave(x)


def _scaled_mm(op: Op, name: str, y: str) -> Iterator[Op]:
    """Source: transformers 5.24 integrations/compressed_tensors.py quantize_fp8_per_row."""
    x, _, rows, _, _ = _parts(op)
    lead = ops.axes_of(op)[0]
    wide, divided, clamped, codes, scales = (
        f"{y}.{part}" for part in ("wide", "divided", "clamped", "codes", "scales")
    )
    yield _made(f"{name}.widen", (x,), wide, rows, "fp32")
    yield Op(f"{name}.scales", (wide,), (Tensor(scales, lead, "fp32"),), scratch=(Tensor("magnitudes", rows, "fp32"),))
    yield _made(f"{name}.divide", (wide, scales), divided, rows)
    yield _made(f"{name}.clamp", (divided,), clamped, rows)
    yield _made(f"{name}.round", (clamped,), codes, rows, "fp8")
    yield ops.leave(wide)
    yield _multiplied(op, name, codes, y, scales, like=x)
    yield ops.leave(x, codes, scales)


def _fbgemm(op: Op, name: str, y: str) -> Iterator[Op]:
    x, made, rows, _, others = _parts(op)
    lead = ops.axes_of(op)[0]
    codes, scales, alone = f"{y}.codes", f"{y}.scales", f"{y}.unbiased" if others else y
    yield Op(f"{name}.quantise", (x,), (Tensor(codes, rows, "fp8"), Tensor(scales, lead, "fp32")))
    yield _multiplied(op, name, codes, alone, scales, like=x)
    if others:
        yield _made(f"{name}.bias", (alone,), y, made.shape)
    yield ops.leave(x, codes, scales, alone)


def _torchao_int8(op: Op, name: str, y: str) -> Iterator[Op]:
    """A copy of the matrix is multiplied by, and the product by its scales."""
    x, made, _, w, _ = _parts(op)
    copy, unscaled = f"{y}.matrix", f"{y}.unscaled"
    yield _made(f"{name}.widen", (x,), copy, w.shape)
    yield _multiplied(op, name, x, unscaled, copy)
    out = " ".join(w.shape.split()[: w.rows])
    yield _made(f"{name}.scale", (unscaled,), y, made.shape)._replace(scratch=(Tensor("scales", out, f"={x}"),))
    yield ops.leave(x, unscaled)


def _torchao_dynamic(op: Op, name: str, y: str) -> Iterator[Op]:
    """Inputs are quantised by row, and multiplied by a transposed copy of the matrix, in int32; that is scaled by rows
    in fp32, cast, scaled by columns in fp32, and cast again.

    Source: torchao 0.18 quantization/quantize_/workflows/int8/int8_tensor.py, kernel/intmm.py safe_int_mm on CUDA.
    """
    x, made, rows, w, _ = _parts(op)
    lead = ops.axes_of(op)[0]
    names = ("scales", "points", "scaled", "rounded", "shifted", "clamped", "codes")
    names += ("transposed", "product", "by rows", "narrow", "wide")
    t = {part: f"{y}.{part}" for part in names}
    yield Op(f"{name}.scales", (x,), (Tensor(t["scales"], lead, "fp32"), Tensor(t["points"], lead, "int8")))
    before = x
    for part in ("scaled", "rounded", "shifted", "clamped"):
        yield _made(f"{name}.{part}", (before,), t[part], rows, "fp32")
        before = t[part]
    yield _made(f"{name}.quantise", (before,), t["codes"], rows, "int8")
    yield Op(f"{name}.transpose", (), (Tensor(t["transposed"], w.shape, "int8"),))
    yield _multiplied(op, name, t["codes"], t["product"], t["transposed"])._replace(
        writes=(Tensor(t["product"], made.shape, "int32"),)
    )
    yield _made(f"{name}.by_rows", (t["product"], t["scales"]), t["by rows"], made.shape, "fp32")
    yield _made(f"{name}.narrow", (t["by rows"],), t["narrow"], made.shape, f"={x}")
    yield _made(f"{name}.by_columns", (t["narrow"],), t["wide"], made.shape, "fp32")
    yield _made(f"{name}.cast", (t["wide"],), y, made.shape, f"={x}")
    yield ops.leave(x, t["codes"], t["scales"], t["points"], t["narrow"], t["wide"])


def _torchao_fp8(op: Op, name: str, y: str) -> Iterator[Op]:
    """The matrix is dequantised in fp32, and cast."""
    x, _, _, w, _ = _parts(op)
    wide, scaled, copy = (f"{y}.{part}" for part in ("wide", "scaled", "matrix"))
    yield Op(f"{name}.widen", (), (Tensor(wide, w.shape, "fp32"),))
    yield _made(f"{name}.scale", (wide,), scaled, w.shape)
    yield _made(f"{name}.narrow", (scaled,), copy, w.shape, f"={x}")
    yield ops.leave(wide, scaled)
    yield _multiplied(op, name, x, y, copy)
    yield ops.leave(x)


def _quanto(op: Op, name: str, y: str, promotes: bool) -> Iterator[Op]:
    """A copy of the matrix times its scales is multiplied by; FP8 is cast first. A bias is added in a tensor more."""
    x, made, _, w, others = _parts(op)
    copy, alone = f"{y}.matrix", f"{y}.unbiased" if others else y
    if promotes:
        yield _made(f"{name}.widen", (x,), f"{y}.wide", w.shape)
        yield _made(f"{name}.scale", (f"{y}.wide",), copy, w.shape)
    else:
        yield _made(f"{name}.scale", (x,), copy, w.shape)
    yield _multiplied(op, name, x, alone, copy)
    if others:
        yield _made(f"{name}.bias", (alone,), y, made.shape)
    yield ops.leave(x, alone)


def _alone(op: Op, name: str, y: str, adds: bool) -> Iterator[Op]:
    """A kernel that reads what is stored. `adds`: a bias is added in a tensor more."""
    x, made, _, _, others = _parts(op)
    alone = f"{y}.unbiased" if others and adds else y
    yield _multiplied(op, name, x, alone)
    if alone != y:
        yield _made(f"{name}.bias", (alone,), y, made.shape)
    yield ops.leave(x, alone)
