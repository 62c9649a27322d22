"""How transformers runs quantised weights for inference: what it stores, and what loading and products allocate.

decompressed  compressed-tensors: packed until the first call, then dequantised permanently. A layer whose config
              quantises inputs rounds them, and computes in the model's dtype
scaled_mm     compressed-tensors' FP8 with `use_optimized_inference`: inputs in FP8, quantised by row
fbgemm        FP8 by row with FBGEMM's kernels
torchao       as quanto: a dequantised copy of the matrix for every product; 4 bits have a kernel without a copy
triton        gpt-oss' experts in MXFP4, kept packed, with OpenAI's kernels
dequantised   gpt-oss' experts, and FP8 in squares on a GPU without its kernels, dequantised while loading
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.experts.routers import CHOSEN, SCORES
from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.storage import KINDS, Layout, parts_of
from memplan.core.ir import Op, Tensor, Weight
from memplan.core.records import NamedTuple

_CT = "compressed-tensors 0.20"
_DECOMPRESSED = f"{_CT} compressors/model_compressors/model_compressor.py decompress_model"
_QDQ = f"{_CT} quantization/lifecycle/forward.py set_forward_quantized, forward_helpers.py _quantize_dequantize"


class InferenceKernel(NamedTuple):
    """Where a kernel was read and what it requires.

    needs   minimum compute capability
    dtypes  dtypes of the model that it supports; empty for all
    basis   `derived` if its rows were checked with a trace, `assumed` if only read
    """

    source: str
    needs: tuple[int, int] = (0, 0)
    dtypes: tuple[str, ...] = ()
    basis: str = "derived"


KERNELS = {
    "decompressed": InferenceKernel(_DECOMPRESSED),
    "scaled_mm": InferenceKernel(
        "transformers 5.24 integrations/compressed_tensors.py CompressedTensorsFP8Linear", (8, 9)
    ),
    "fbgemm": InferenceKernel(
        "transformers 5.24 integrations/fbgemm_fp8.py FbgemmFp8Linear", (9, 0), ("bf16",), basis="assumed"
    ),
    "torchao": InferenceKernel("torchao 0.18 quantization/quantize_/workflows, linear of each tensor"),
    "quanto": InferenceKernel(
        "optimum-quanto 0.2.7 library/qbytes_mm.py qbytes_mm_impl_cuda, tensor/weights/tinygemm/qbits.py"
    ),
    "triton": InferenceKernel("transformers 5.24 integrations/mxfp4.py Mxfp4GptOssExperts", (7, 5), basis="assumed"),
    "dequantised": InferenceKernel(
        "transformers 5.24 integrations/mxfp4.py _convert_moe_packed_tensors, finegrained_fp8.py Fp8Dequantize"
    ),
}

# The kernels for each format; most checkpoints use the first.
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
# 4-bit kernels that read packed weights: their requirements in addition to their library's.
# Source: optimum-quanto 0.2.7 tensor/weights/qbits.py WeightQBitsTensor.create; torchao 0.18
# quantization/quantize_/workflows/int4/int4_tensor.py Int4Tensor.from_hp, which needs the package mslk
FOUR_BITS = {
    "quanto-int4": InferenceKernel("tinygemm", (8, 0), ("bf16",), "assumed"),
    "torchao-int4": InferenceKernel("mslk", (0, 0), ("bf16",), "assumed"),
}
MADE_WHEN_LOADED = ("torchao", "quanto", "fbgemm")  # quantise an unquantised checkpoint
UNPACKED = ("decompressed", "dequantised")  # kernels that dequantise matrices before the model computes


class InferenceFormat(NamedTuple):
    """How a model's quantised matrices are stored and run.

    layout   how they are stored
    kernel   what runs them
    experts  layout of stacks of experts, if it differs
    lays     experts are repacked for the tensor cores of capability 9
    at_once  matrices are dequantised while loading, and nothing else stays
    skip     modules that are not stored so
    """

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
        """Whether the matrices are dequantised when the model computes."""
        return self.kernel in UNPACKED

    @property
    def source(self) -> str:
        row = KERNELS[self.kernel]
        is_assumed = self.layout.format in FOUR_BITS or (self.kernel == "torchao" and bool(self.layout.acts))
        basis = "assumed" if is_assumed else row.basis
        return row.source if basis == "derived" else f"{basis}: {row.source}"


def resident(w: Weight, how: InferenceFormat) -> tuple[Tensor, ...]:
    """Return the tensors that stand for a matrix when the model computes."""
    parts = parts_of(w, how.of(w))
    if not how.whole:
        return (*parts, *_UNUSED) if how.kernel == "quanto" else parts
    dequantised = Tensor("weight", w.shape, w.dtype)
    if how.at_once:
        return (dequantised,)
    kept = (t._replace(dtype=_like(t, w)) if _replaced(t, how) else t for t in parts)
    return (dequantised, *(t for t in kept if t.name not in _CODES))


# Scales of inputs and outputs, which exist although nothing is quantised with them.
# Source: optimum-quanto 0.2.7 nn/qmodule.py QModuleMixin.__init__; transformers 5.24 integrations/quanto.py
_UNUSED = (Tensor("input_scale", "", "fp32"), Tensor("output_scale", "", "fp32"))
_CODES = ("weight", "weight_packed", "fp8")


def _replaced(t: Tensor, how: InferenceFormat) -> bool:
    """Return whether a scale is replaced by one in the model's dtype."""
    return t.name == "weight_scale" and how.layout.format in ("mxfp4", "mxfp8", "nvfp4")


def is_freed(t: Tensor, w: Weight, how: InferenceFormat) -> bool:
    """Return whether a stored tensor is freed once its matrix is dequantised. All of an expert stack's are."""
    return w.stacked or how.at_once or t.name in _CODES or _replaced(t, how)


def takes_experts(how: InferenceFormat) -> bool:
    """Return whether experts in one parameter are stored so."""
    return KINDS[(how.experts or how.layout).format].experts and how.kernel not in MADE_WHEN_LOADED


def takes_alone(how: InferenceFormat) -> bool:
    """Return whether experts in one parameter are the only weights stored so."""
    return how.layout.format == "mxfp4" and how.kernel in ("triton", "dequantised")


def _like(t: Tensor, w: Weight) -> str:
    """Return the weight's dtype with the block size of the tensor's dtype."""
    return t.dtype.replace(t.dtype.partition("/")[0], w.dtype)


# Steps of unpacking a matrix, in order: a name with a dtype is allocated in the matrix's shape, a name without one is
# freed. `=` is the model's dtype. `codes` is the stored tensor, `weight` the one that stays.
_Steps = tuple[tuple[str, str], ...]
_OWN = "own scales"  # scales in the model's dtype
_PLACES = "places"  # six tensors for the 32 places of a group, 512 bytes each
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
DEQUANTISED_ON_LOADING = frozenset(_UNPACKING)  # the formats that loading can dequantise
# Experts of gpt-oss, looked up in chunks.
_GPT_OSS: _Steps = (
    *(("wide exponents", "int32/32"), ("exponents", "int32/32"), ("wide exponents", ""), ("table", "=")),
    *(("whole", "="), ("bits", "uint8"), ("indices", "int32"), ("bits", ""), ("numbers", "="), ("numbers", "")),
    *(("indices", ""), ("weight", "="), ("whole", ""), ("exponents", ""), ("table", ""), ("codes", "")),
)
# Steps of quantising a matrix while loading it; `codes` stays.
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


class LoadStep(NamedTuple):
    """A step of loading: `made` is allocated, or if it is None, the tensor `name` is freed.

    `codes` names what is stored, `weight` what stays.
    """

    name: str
    made: Tensor | None = None


def unpacking(w: Weight, how: InferenceFormat) -> Iterator[LoadStep]:
    """Yield the allocations and frees while a packed matrix is dequantised. Its codes are freed last.

    Experts in MXFP4 are looked up in chunks of at most `MOST_ROWS` rows of 16 bytes. transformers dequantises other
    experts one by one and joins them; compressed-tensors does so into a tensor for all, then joins gates and ups.
    """
    if how.of(w).format == "mxfp4" and how.kernel == "dequantised":
        chunk = chunk_of(w)
        chunked = (Tensor("bits", chunk, "uint8"), Tensor("indices", chunk, "int32"), Tensor("numbers", chunk, w.dtype))
        table = Tensor("table", "16", w.dtype)
        yield from _steps(w, _GPT_OSS, {t.name: t for t in (*chunked, table)})
        return
    if w.stacked:
        dequantised = Tensor("weight", w.shape, w.dtype)
        joins = how.kernel == "dequantised" or w.name.endswith("gate_up_proj")
        yield LoadStep("apart" if joins else "weight", dequantised)
        yield LoadStep("codes")
        if joins:
            yield LoadStep("weight", dequantised)
            yield LoadStep("apart")
        return
    scales = next((t._replace(dtype=_like(t, w)) for t in parts_of(w, how.of(w)) if _replaced(t, how)), None)
    others = {_PLACES: Tensor(_PLACES, str(6 * 128), "int32"), **({_OWN: scales} if scales else {})}
    yield from _steps(w, _FP8 if how.kernel == "dequantised" else _UNPACKING[how.layout.format], others)
    yield LoadStep("codes")
    if scales is not None and how.at_once:
        yield LoadStep(_OWN)


def laying(w: Weight, how: InferenceFormat) -> Iterator[LoadStep]:
    """Yield the allocations and frees while experts in MXFP4 are repacked in the layout of their kernel.

    They are permuted, and 32-bit words are assembled from parts, which takes up to eight times the codes' bytes at
    once. `codes` is what was stored.

    Source: triton_kernels tensor_details/layout_details/hopper_value.py HopperMXValueLayout.swizzle_data, _pack_bits.
    """
    repacked = parts_of(w, how.of(w))[0]
    yield LoadStep("permuted", repacked)
    yield LoadStep("words", Tensor("words", w.shape, "fp32"))
    yield LoadStep("words")
    yield LoadStep("laid", repacked)
    yield LoadStep("permuted")
    yield LoadStep("codes")


def quantising(w: Weight, how: InferenceFormat) -> Iterator[LoadStep]:
    """Yield the allocations and frees while an unquantised matrix is quantised during loading."""
    steps = _QUANTISING.get((how.layout.format, how.kernel))
    yield from _steps(w, steps) if steps else iter((LoadStep("codes", Tensor("codes")),))


def _steps(w: Weight, steps: _Steps, others: Mapping[str, Tensor] | None = None) -> Iterator[LoadStep]:
    """Yield the steps with their tensors: those of `others` by name, the rest in the matrix's shape."""
    for name, dtype in steps:
        kind, _, per = dtype.partition("/")
        kind = w.dtype if kind == "=" else kind
        made = (others or {}).get(name) or Tensor(name, w.shape, f"{kind}/{per}" if per else kind)
        yield LoadStep(name, made if dtype else None)


def chunk_of(w: Weight) -> str:
    """Return the axis that counts the bytes of an expert stack that are looked up at once."""
    return f"mxfp4:{w.name}"


MOST_ROWS = 32768 * 1024  # each 16 bytes, 32 weights
# Source: transformers 5.24 integrations/mxfp4.py _convert_moe_packed_tensors rows_per_chunk


def bytes_at_once(elements: int) -> int:
    """Return how many bytes of an MXFP4 stack of `elements` weights are looked up at once."""
    return min(elements // 2, MOST_ROWS * 16)


def wide_bias(w: Weight, how: InferenceFormat) -> bool:
    """Return whether an expert bias is kept in fp32.

    Source: transformers 5.24 integrations/mxfp4.py Mxfp4GptOssExperts.
    """
    return how.kernel == "triton" and bool(w.chosen) and w.name.endswith("_bias")


def with_triton(operations: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return a block's operations with its experts run by OpenAI's kernels.

    One kernel routes. The first product includes the activation; the second has one row per choice before they are
    summed. Temporaries that divide a product of few rows among more blocks are not counted (`split_k`). Source:
    transformers 5.24 integrations/mxfp4.py Mxfp4GptOssMLP; triton_kernels matmul_ogs.py init_allocation, routing.py
    SortTokens, topk.py.
    """
    names = [op.name for op in operations]
    if "mlp.experts.return" not in names:
        return operations
    start, end = names.index("mlp.router.topk"), names.index("mlp.experts.return")
    inner = operations[start : end + 1]
    weights_by_name = {w.name: w for op in inner for w in op.weights}
    source = f"{KERNELS['triton'].basis}: {KERNELS['triton'].source}"

    def of(part: str) -> tuple[Weight, ...]:
        return tuple(w for name, w in weights_by_name.items() if f".{part}_proj" in name)

    top = (Tensor("top", "b s e", "=router.logits"), Tensor("chosen", "b s e", "int32"))
    replacements = (
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
        ops.release_names("experts.inner"),
    )
    products = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    described = (
        op._replace(source=source, product="grouped" if op.name in products else "") if op.writes else op
        for op in replacements
    )
    return (*operations[:start], *described, *operations[end + 1 :])


def product(op: Op, name: str, y: str, how: InferenceFormat) -> Iterator[Op]:
    """Yield a linear layer whose matrix runs so, writing `y`."""
    match how.kernel:
        case "decompressed":
            operations = _over_rounded(op, name, y, how.layout)
        case "scaled_mm":
            operations = _scaled_mm(op, name, y)
        case "fbgemm":
            operations = _fbgemm(op, name, y)
        case "torchao" if how.layout.format == "torchao-int8" and how.layout.acts:
            operations = _torchao_dynamic(op, name, y)
        case "torchao" if how.layout.format == "torchao-int8":
            operations = _torchao_int8(op, name, y)
        case "torchao" if how.layout.format == "fp8-channel":
            operations = _torchao_fp8(op, name, y)
        case "quanto" if how.layout.format == "quanto-int8":
            operations = _quanto(op, name, y, promotes=False)
        case "quanto" if how.layout.format == "fp8-channel":
            operations = _quanto(op, name, y, promotes=True)
        case _:
            operations = _packed_linear(op, name, y, how.kernel == "quanto")
    source = _QDQ if how.kernel == "decompressed" and how.layout.acts else how.source
    return (o._replace(source=source) if o.name.startswith(name) else o for o in operations)


def _parts(op: Op) -> tuple[str, Tensor, str, Weight, tuple[Weight, ...]]:
    """Return a linear layer's input name, output, input shape, matrix and other weights."""
    (x,), output = op.reads, op.writes[0]
    lead, _, into = ops.axes_of(op)
    w = next(w for w in op.weights if w.matrix)
    return x, output, f"{lead} {into}".strip(), w, tuple(v for v in op.weights if v is not w)


def _elementwise(name: str, reads: tuple[str, ...], y: str, shape: str, dtype: str = "") -> Op:
    return Op(name, reads, (Tensor(y, shape, dtype or f"={reads[0]}"),))


def _multiplied(op: Op, name: str, x: str, y: str, *also: str, like: str = "") -> Op:
    """Return the product, with the stored matrix or with the copy in `also`."""
    shape = op.writes[0].shape
    weights = op.weights
    return Op(name, (x, *also), (Tensor(y, shape, f"={like or x}"),), weights, product="matrix")


_PARTS = ("scales", "points", "unscaled", "scaled", "clamped", "rounded", "less", "wide", "in")


def _over_rounded(op: Op, name: str, y: str, layout: Layout) -> Iterator[Op]:
    """Yield a linear layer whose inputs, if the config quantises them, are divided by scales, rounded and rescaled."""
    x, _, rows, _, _ = _parts(op)
    if not layout.acts:
        yield op._replace(name=name, writes=(op.writes[0]._replace(name=y),))
        yield ops.release_names(x)
        return
    t = {part: f"{y}.{part}" for part in _PARTS}
    kind, _, group = layout.acts.partition("/")
    fixed, local = kind == "fixed", kind == "local"
    wide_dtype = "fp32" if local else f"={x}"
    if not fixed:
        shape, per = (rows, f"/{group}") if group else (ops.axes_of(op)[0], "")
        scales = (Tensor(t["scales"], shape, f"{wide_dtype}{per}"), Tensor(t["points"], shape, f"int8{per}"))
        unscaled = (Tensor(t["unscaled"], shape, f"{wide_dtype}{per}"),) if local else ()  # over the global scale
        yield Op(f"{name}.scales", (x,), (*scales, *unscaled))
    yield _elementwise(f"{name}.scale", (x,), t["scaled"], rows, wide_dtype)
    yield _elementwise(f"{name}.clamp", (t["scaled"],), t["clamped"], rows)
    yield from _rounded(name, y, t["clamped"], t["rounded"], rows, "fp4" if local else _ROUNDED[layout.format])
    last = t["rounded"]
    if not fixed:
        yield _elementwise(f"{name}.shift", (last,), t["less"], rows)
        last = t["less"]
    yield _elementwise(f"{name}.unscale", (last,), t["wide"] if local else t["in"], rows)
    yield ops.release_names(t["scaled"], t["rounded"], last, *((t["unscaled"],) if local else ()))
    if local:
        yield _elementwise(f"{name}.narrow", (t["wide"],), t["in"], rows, f"={x}")
    yield ops.release_names(*((t["scales"], t["points"]) if not fixed else ()), *((t["wide"],) if local else ()))
    yield _multiplied(op, name, t["in"], y)
    yield ops.release_names(x, t["in"])


_ROUNDED = {**dict.fromkeys(("fp8", "fp8-tensor", "fp8-channel", "mxfp8"), "fp8"), "w8a8-int8": "int8"}


def _rounded(name: str, y: str, x: str, to: str, shape: str, kind: str) -> Iterator[Op]:
    """Round numbers to another dtype's values without changing their own: through FP8, or one by one for FP4.

    Source: compressed-tensors 0.20 quantization/quant_args.py round_to_quantized_type_args, utils/fp4_utils.py.
    """
    if kind == "fp8":
        yield _elementwise(f"{name}.round", (x,), f"{y}.codes", shape, "fp8")
        yield _elementwise(f"{name}.widen", (f"{y}.codes",), to, shape, f"={x}")
        yield ops.release_names(x, f"{y}.codes")
    elif kind == "fp4":
        signs, sizes, ranges = f"{y}.signs", f"{y}.magnitudes", Tensor("ranges", shape, "bool")
        yield _elementwise(f"{name}.sign", (x,), signs, shape)
        yield _elementwise(f"{name}.abs", (x,), sizes, shape)
        yield Op(f"{name}.round", (sizes,), scratch=(ranges, ranges, ranges))
        yield _elementwise(f"{name}.signed", (sizes, signs), to, shape)
        yield ops.release_names(x, signs, sizes)
    else:
        yield _elementwise(f"{name}.round", (x,), to, shape)
        yield ops.release_names(x)


def _scaled_mm(op: Op, name: str, y: str) -> Iterator[Op]:
    """Quantise inputs by row to FP8.

    Source: transformers 5.24 integrations/compressed_tensors.py quantize_fp8_per_row.
    """
    x, _, rows, _, _ = _parts(op)
    lead = ops.axes_of(op)[0]
    wide, divided, clamped, codes, scales = (
        f"{y}.{part}" for part in ("wide", "divided", "clamped", "codes", "scales")
    )
    yield _elementwise(f"{name}.widen", (x,), wide, rows, "fp32")
    yield Op(f"{name}.scales", (wide,), (Tensor(scales, lead, "fp32"),), scratch=(Tensor("magnitudes", rows, "fp32"),))
    yield _elementwise(f"{name}.divide", (wide, scales), divided, rows)
    yield _elementwise(f"{name}.clamp", (divided,), clamped, rows)
    yield _elementwise(f"{name}.round", (clamped,), codes, rows, "fp8")
    yield ops.release_names(wide)
    yield _multiplied(op, name, codes, y, scales, like=x)
    yield ops.release_names(x, codes, scales)


def _fbgemm(op: Op, name: str, y: str) -> Iterator[Op]:
    x, output, rows, _, others = _parts(op)
    lead = ops.axes_of(op)[0]
    codes, scales, unbiased = f"{y}.codes", f"{y}.scales", f"{y}.unbiased" if others else y
    yield Op(f"{name}.quantise", (x,), (Tensor(codes, rows, "fp8"), Tensor(scales, lead, "fp32")))
    yield _multiplied(op, name, codes, unbiased, scales, like=x)
    if others:
        yield _elementwise(f"{name}.bias", (unbiased,), y, output.shape)
    yield ops.release_names(x, codes, scales, unbiased)


def _torchao_int8(op: Op, name: str, y: str) -> Iterator[Op]:
    """Multiply by a dequantised copy of the matrix, then scale the output."""
    x, output, _, w, _ = _parts(op)
    copy, unscaled = f"{y}.matrix", f"{y}.unscaled"
    yield _elementwise(f"{name}.widen", (x,), copy, w.shape)
    yield _multiplied(op, name, x, unscaled, copy)
    out = " ".join(w.shape.split()[: w.rows])
    yield _elementwise(f"{name}.scale", (unscaled,), y, output.shape)._replace(
        scratch=(Tensor("scales", out, f"={x}"),)
    )
    yield ops.release_names(x, unscaled)


def _torchao_dynamic(op: Op, name: str, y: str) -> Iterator[Op]:
    """Quantise inputs by row and multiply them in int32 by a transposed copy of the matrix.

    The product is scaled by rows in fp32, cast, scaled by columns in fp32, and cast again.

    Source: torchao 0.18 quantization/quantize_/workflows/int8/int8_tensor.py, kernel/intmm.py safe_int_mm on CUDA.
    """
    x, output, rows, w, _ = _parts(op)
    lead = ops.axes_of(op)[0]
    names = ("scales", "points", "scaled", "rounded", "shifted", "clamped", "codes")
    names += ("transposed", "product", "by rows", "narrow", "wide")
    t = {part: f"{y}.{part}" for part in names}
    yield Op(f"{name}.scales", (x,), (Tensor(t["scales"], lead, "fp32"), Tensor(t["points"], lead, "int8")))
    previous = x
    for part in ("scaled", "rounded", "shifted", "clamped"):
        yield _elementwise(f"{name}.{part}", (previous,), t[part], rows, "fp32")
        previous = t[part]
    yield _elementwise(f"{name}.quantise", (previous,), t["codes"], rows, "int8")
    yield Op(f"{name}.transpose", (), (Tensor(t["transposed"], w.shape, "int8"),))
    product = Tensor(t["product"], output.shape, "int32")
    yield _multiplied(op, name, t["codes"], t["product"], t["transposed"])._replace(writes=(product,))
    yield _elementwise(f"{name}.by_rows", (t["product"], t["scales"]), t["by rows"], output.shape, "fp32")
    yield _elementwise(f"{name}.narrow", (t["by rows"],), t["narrow"], output.shape, f"={x}")
    yield _elementwise(f"{name}.by_columns", (t["narrow"],), t["wide"], output.shape, "fp32")
    yield _elementwise(f"{name}.cast", (t["wide"],), y, output.shape, f"={x}")
    yield ops.release_names(x, t["codes"], t["scales"], t["points"], t["narrow"], t["wide"])


def _torchao_fp8(op: Op, name: str, y: str) -> Iterator[Op]:
    """Dequantise the matrix in fp32 and cast it."""
    (x, _, _, w, _), wide, scaled, copy = _parts(op), f"{y}.wide", f"{y}.scaled", f"{y}.matrix"
    yield Op(f"{name}.widen", (), (Tensor(wide, w.shape, "fp32"),))
    yield _elementwise(f"{name}.scale", (wide,), scaled, w.shape)
    yield _elementwise(f"{name}.narrow", (scaled,), copy, w.shape, f"={x}")
    yield ops.release_names(wide, scaled)
    yield _multiplied(op, name, x, y, copy)
    yield ops.release_names(x)


def _quanto(op: Op, name: str, y: str, promotes: bool) -> Iterator[Op]:
    """Multiply by a copy of the matrix times its scales. FP8 is cast first. Adding a bias takes another tensor."""
    x, output, _, w, others = _parts(op)
    copy, unbiased = f"{y}.matrix", f"{y}.unbiased" if others else y
    if promotes:
        yield _elementwise(f"{name}.widen", (x,), f"{y}.wide", w.shape)
    yield _elementwise(f"{name}.scale", (f"{y}.wide" if promotes else x,), copy, w.shape)
    yield _multiplied(op, name, x, unbiased, copy)
    if others:
        yield _elementwise(f"{name}.bias", (unbiased,), y, output.shape)
    yield ops.release_names(x, unbiased)


def _packed_linear(op: Op, name: str, y: str, adds: bool) -> Iterator[Op]:
    """Multiply with a kernel that reads the stored weights. `adds`: adding a bias takes another tensor."""
    x, output, _, _, others = _parts(op)
    unbiased = f"{y}.unbiased" if others and adds else y
    yield _multiplied(op, name, x, unbiased)
    if unbiased != y:
        yield _elementwise(f"{name}.bias", (unbiased,), y, output.shape)
    yield ops.release_names(x, unbiased)
