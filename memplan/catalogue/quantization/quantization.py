"""Quantised weights that can be trained over: what is stored, and what computing with them allocates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memplan.catalogue.kernels import ops
from memplan.catalogue.quantization.fused_4bit import Copies, copied
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight
from memplan.core.records import NamedTuple

BNB = "bitsandbytes 0.50"
_GPTQ = "gptqmodel 7.7; auto-gptq 0.7 stores the same tensors"
_HQQ, _TORCHAO = "hqq 0.2.8", "torchao 0.18"
_AWQ = "gptqmodel 7.7; autoawq 0.2.9 stores the same tensors"


class TrainableFormat(NamedTuple):
    """How a matrix is stored and multiplied.

    library  library whose names the stored tensors have
    source   where it was read
    needs    what the library needs before adapters can train over it
    basis    `derived`, or `assumed` if the temporaries of computing were read and not traced
    casts    peft's preparation casts to fp32 what is not quantised
    linear   its layers are linear layers to peft, which all-linear finds
    conv1d   it also stores transformers' Conv1D
    note     what to tell the user of a run that names the format
    """

    library: str
    source: str
    needs: str = ""
    basis: str = "derived"
    casts: bool = True
    linear: bool = True
    conv1d: bool = True
    note: str = ""


FORMATS = {
    "nf4": TrainableFormat(BNB, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState"),
    "fp4": TrainableFormat(BNB, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState"),
    "int8": TrainableFormat(BNB, "bitsandbytes 0.50 backends for LLM.int8"),
    **dict.fromkeys(
        ("gptq-int4", "gptq-int8"),
        TrainableFormat(
            _GPTQ,
            "gptqmodel 7.7 nn_modules/qlinear/__init__.py _register_gptq_buffers, torch.py TorchLinear._forward_eager, "
            "which tritonv2.py calls in training; auto-gptq 0.7 qlinear_tritonv2.py",
            "a backend that trains: GPTQConfig(backend='auto_trainable')",
            "assumed",
            casts=False,
        ),
    ),
    "awq-int4": TrainableFormat(
        _AWQ,
        "gptqmodel 7.7 nn_modules/qlinear/__init__.py AWQuantLinear, gemm_awq.py AwqGemmFn; of up to 1,024 tokens its "
        "kernel's partial sums are not counted",
        "a backend that trains: AwqConfig(backend='auto_trainable'); transformers loads it in fp16",
        "assumed",
    ),
    "fp8": TrainableFormat(
        "transformers 5.24",
        "transformers 5.24 integrations/finegrained_fp8.py FP8Linear, FP8LinearFunction, _dequantize_fp8_weight",
        "compute capability 8.9",
        "assumed",
    ),
    "hqq-int4": TrainableFormat(
        _HQQ,
        "hqq 0.2.8 core/quantize.py HQQMatmulNoCacheMul, Quantizer.dequantize; peft 0.21 tuners/lora/hqq.py",
        casts=False,
        linear=False,
        conv1d=False,
        note="hqq-int4 is made by hqq's AutoHQQHFModel.quantize_model: transformers 5 cannot quantise with HqqConfig",
    ),
    "torchao-int8": TrainableFormat(
        _TORCHAO,
        "torchao 0.18 quantize_/workflows/int8/int8_tensor.py, linear of weights alone",
        casts=False,
        conv1d=False,
    ),
}
WHOLE = -1  # the block size if there is one scale per column
FP8_BLOCK = 128


# Formats of stacked experts alone: names of their halves of bytes, and of an exponent for 32 weights of a row.
# Source: transformers 5.24 integrations/finegrained_fp8.py FP8Experts, integrations/mxfp4.py Mxfp4GptOssExperts.
_FP4_OF_STACKS = {"fp8-fp4": ("fp8", "weight_scale_inv"), "mxfp4": ("weight_packed", "weight_scale")}


def stored(w: Weight, format: str, double_quant: bool, block_size: int, compute: str = "bf16") -> tuple[Tensor, ...]:
    """Return the tensors that hold a quantised matrix. A dtype `x/n` is one x for every n elements, rounded up.

    GPTQ has int32 words, a half-precision scale and a zero point per group of inputs (or one group, `WHOLE`), and every
    input's group. AWQ has no groups of inputs. FP8 has a byte per weight and a scale per square of 128, and `fp8-fp4`
    half a byte and an exponent for 32 weights of a row. HQQ has scales and zero points in the `compute` dtype.
    """
    tokens = w.shape.split(" ")
    out, into = tokens[: w.rows], tokens[w.rows :]
    if format in ("gptq-int4", "gptq-int8", "awq-int4"):
        per = 4 if format == "gptq-int8" else 8  # weights in a word
        grouped = w.shape if block_size != WHOLE else " ".join(out)
        group = block_size if block_size != WHOLE else 1
        return (
            Tensor("qweight", w.shape, f"int32/{per}"),
            Tensor("scales", grouped, f"fp16/{group}"),
            Tensor("qzeros", grouped, f"int32/{per * group}"),
            *((Tensor("g_idx", " ".join(into), "int32"),) if format != "awq-int4" else ()),
        )
    if format in _FP4_OF_STACKS:
        packed, exponents = _FP4_OF_STACKS[format]
        return (Tensor(packed, w.shape, "uint8/2"), Tensor(exponents, w.shape, "uint8/32"))
    if format == "fp8":
        each = " ".join(tokens[: 1 if w.stacked else 0])  # every expert has its own scale
        squares = f"{'*'.join(out[1:] if w.stacked else out)}/{FP8_BLOCK} {'*'.join(into)}/{FP8_BLOCK}"
        blocks = f"{each} {squares}".strip() if block_size != WHOLE else each
        return (Tensor("fp8", w.shape, "fp8"), Tensor("weight_scale_inv", blocks, "fp32"))
    if format == "int8":
        return (Tensor("int8", w.shape, "int8"), Tensor("row scales", " ".join(out), "fp32"))
    if format == "hqq-int4":
        groups = (Tensor(name, w.shape, f"{compute}/{block_size}") for name in ("scale", "zero"))
        return (Tensor("W_q", w.shape, "uint8/2"), *groups)
    if format == "torchao-int8":
        rows = (Tensor("scale", " ".join(out), "fp32"), Tensor("zero point", " ".join(out), "int8"))
        return (Tensor("qdata", w.shape, "int8"), *rows)
    packed = Tensor("packed", w.shape, "uint8/2")
    code = Tensor("code", "16", "fp32")
    if not double_quant:
        return (packed, Tensor("absmax", w.shape, f"fp32/{block_size}"), code)
    return (
        packed,
        Tensor("absmax", w.shape, f"uint8/{block_size}"),
        Tensor("nested absmax", w.shape, f"fp32/{block_size * 256}"),
        Tensor("nested code", "256", "fp32"),
        Tensor("offset", "", "fp32"),
        code,
    )


def codes_of_scales(weights: Iterable[Weight]) -> tuple[Tensor, ...]:
    """Return the codes that quantising scales leaves once in the process; every matrix has its own next to them."""
    return tuple(t for w in weights for t in w.stored if t.name == "nested code")[:1]


def family_of(w: Weight) -> str:
    """Return the family of a stored matrix's format: gptq, awq, fp8, int8, hqq, torchao, or 4bit for bitsandbytes'."""
    names = [t.name for t in w.stored]
    if "qweight" in names:
        return "gptq" if "g_idx" in names else "awq"
    return {"fp8": "fp8", "int8": "int8", "W_q": "hqq", "qdata": "torchao"}.get(names[0], "4bit")


def storage_of(w: Weight) -> str:
    """Return the library that stores a quantised matrix in this format."""
    libraries = {"gptq": _GPTQ, "awq": _AWQ, "fp8": FORMATS["fp8"].library, "hqq": _HQQ, "torchao": _TORCHAO}
    return libraries.get(family_of(w), BNB)


def absmax(w: Weight) -> tuple[Tensor, ...]:
    """Return the fp32 scales of a doubly quantised matrix, computed whenever it is dequantised."""
    nested = w.stored[1].name == "absmax" and w.stored[1].dtype.startswith("uint8/")
    block_size = w.stored[1].dtype.partition("/")[2]
    return (Tensor("absmax", w.shape, f"fp32/{block_size}"),) if nested else ()


def dequantise(w: Weight, name: str, y: str, shape: str) -> Op:
    """Return the matrix in the dtype it had before it was quantised."""
    return Op(name, (), (Tensor(y, shape, w.dtype),), (w,), scratch=absmax(w), source=f"{BNB} dequantize_4bit")


def quantised_linear(
    op: Op, name: str, y: str, compute: str, older: bool = False, keeps: bool = False, copies: Copies = "always"
) -> Iterator[Op]:
    """Return the linear layer with which the matrix's library replaces `op`, writing `y`.

    compute  dtype in which 4-bit layers compute
    older    before bitsandbytes 0.43 a 4-bit layer held its input to the end of the step
    keeps    torch keeps GPTQ's dequantised matrix for backward, as with gptqmodel but not auto-gptq
    copies   when a 4-bit matrix is dequantised first
    """
    w = next(w for w in op.weights if w.matrix)
    if op.skipped:  # its bias keeps the loaded dtype
        return iter((op,))
    match family_of(w):
        case "int8":
            return _linear_int8(op, w, name, y)
        case "fp8":
            return _linear_fp8(op, w, name, y, compute)
        case "gptq" if keeps:
            return _linear_kept(op, w, name, y)
        case "hqq":
            return _linear_hqq(op, w, name, y, compute)
        case "torchao":
            return _linear_torchao(op, w, name, y)
        case _:
            return _linear_4bit(op, w, name, y, compute, older, copies)


def _linear_kept(op: Op, w: Weight, name: str, y: str) -> Iterator[Op]:
    """Return a GPTQ linear layer whose dequantised matrix torch keeps for the gradient of the input.

    The matrix is dequantised to the dtype of its scales and cast to the input's. The scales are assumed to have the
    dtype in which the model is loaded.
    """
    (x,), shape = op.reads, op.writes[0].shape
    row, dequantised, matrix = FORMATS["gptq-int4"], f"{y}.dequantised", f"{y}.matrix"
    source = f"{row.basis}: {row.source}"
    yield Op(f"{name}.dequantise", (), (Tensor(dequantised, w.shape, w.dtype),), (w,), source=source)
    yield ops.cast(f"{name}.cast", dequantised, matrix, w.shape, f"={x}")
    yield ops.release_names(dequantised)
    yield Op(
        name,
        (x, matrix),
        (Tensor(y, shape),),
        tuple(v for v in op.weights if not v.matrix),
        (Keep(matrix, x),),
        gradient=op.gradient,
        autocast="lower",
        product="matrix",
        source=source,
    )
    yield ops.release_names(matrix)


def _linear_hqq(op: Op, w: Weight, name: str, y: str, compute: str) -> Iterator[Op]:
    """Return an HQQ layer, which keeps its input, though frozen weights have no gradient, and dequantises twice.

    Unpacked numbers, less their zero points, times their scales are three matrices at once.
    """
    (x,), shape, source = op.reads, op.writes[0].shape, FORMATS["hqq-int4"].source
    lead, _, into = ops.axes_of(op)
    matrix = f"{y}.matrix"
    unpacked = tuple(Tensor(what, w.shape, compute) for what in ("numbers", "numbers less zero points"))
    yield Op(f"{name}.dequantise", (), (Tensor(matrix, w.shape, compute),), (w,), scratch=unpacked, source=source)
    yield Op(
        name,
        (x, matrix),
        (Tensor(y, shape, compute),),
        tuple(v._replace(dtype=compute) for v in op.weights if not v.matrix),
        (Keep(x, x),),
        scratch=(Tensor("input, cast", f"{lead} {into}", f"{compute}!{x}"),),
        scratch_back=(*(Scratch(t, early=True) for t in unpacked), Scratch(Tensor("dequantised", w.shape, compute))),
        gradient=op.gradient,
        product="matrix",
        source=source,
    )
    yield ops.release_names(matrix)


def _linear_torchao(op: Op, w: Weight, name: str, y: str) -> Iterator[Op]:
    """Return a linear layer with torchao's weights in 8 bits: autograd keeps the matrix, cast to the input's dtype."""
    (x,), output, source = op.reads, op.writes[0], FORMATS["torchao-int8"].source
    matrix, product, scaled, scales = (f"{y}.{part}" for part in ("matrix", "product", "scaled", "scales"))
    rows = Tensor(scales, " ".join(w.shape.split()[: w.rows]), f"={product}")
    others = tuple(v for v in op.weights if not v.matrix)
    yield Op(f"{name}.widen", (x,), (Tensor(matrix, w.shape, f"={x}"),), (w,), gradient="none", source=source)
    yield Op(
        name,
        (x, matrix),
        (Tensor(product, output.shape),),
        (),
        (Keep(matrix, x),),
        gradient=op.gradient,
        autocast="lower",
        product="matrix",
        source=source,
    )
    yield Op(
        f"{name}.scale",
        (product,),
        (Tensor(scaled, output.shape), rows),
        others,
        (Keep(scales, product),),
        source=source,
    )
    yield ops.release_names(matrix, product, scales)
    yield ops.cast(f"{name}.cast", scaled, y, output.shape, f"={x}")
    yield ops.release_names(scaled)


def _linear_fp8(op: Op, w: Weight, name: str, y: str, compute: str) -> Iterator[Op]:
    """Return an FP8 linear layer, which quantises its input and keeps none of it.

    Backward dequantises the matrix, and broadcasts its scales over its rows.
    """
    (x,), shape = op.reads, op.writes[0].shape
    lead, _, into = ops.axes_of(op)
    row, rows = FORMATS["fp8"], f"{lead} {into}"
    yield Op(
        name,
        (x,),
        (Tensor(y, shape, f"={x}"),),
        op.weights,
        scratch=(Tensor("quantised input", rows, "fp8"), Tensor("input's scales", rows, f"fp32/{FP8_BLOCK}")),
        scratch_back=(
            Scratch(Tensor("dequantised", w.shape, f"={x}")),
            Scratch(Tensor("scales of rows", w.shape, f"{compute}/{FP8_BLOCK}")),
        ),
        gradient=op.gradient,
        product="matrix",
        source=f"{row.basis}: {row.source}",
    )


def _linear_int8(op: Op, w: Weight, name: str, y: str) -> Iterator[Op]:
    """Return an LLM.int8 layer: the input is quantised by row, and the backward node keeps it, checkpointing or not.

    Columns with outliers are multiplied separately; their number depends on the data, and they are not counted.
    Source: bitsandbytes 0.50 autograd/_functions.py MatMul8bitLt, backends/cuda/ops.py.
    """
    (x,), shape = op.reads, op.writes[0].shape
    lead, _, into = ops.axes_of(op)
    rows = f"{lead} {into}"
    yield Op(f"{name}.half", (x,), (Tensor(f"{y}.half", rows, "fp16"),), cast=True, gradient="none")
    yield Op(
        f"{name}.quantise",
        (f"{y}.half",),
        (Tensor(f"{y}.int8", rows, "int8"), Tensor(f"{y}.scales", lead, "fp32")),
        scratch=(Tensor("magnitudes", rows, "fp16"), Tensor("outliers", rows, "bool")),
        gradient="none",
        source=f"{BNB} int8_vectorwise_quant",
    )
    yield Op(
        name,
        (x, f"{y}.int8", f"{y}.scales"),
        (Tensor(y, shape, f"={x}"),),
        op.weights,
        scratch=(Tensor("int32 product", shape, "int32"), Tensor("fp16 product", shape, f"fp16!{x}")),
        scratch_back=(Scratch(Tensor("dequantised", w.shape, f"={x}")),),
        gradient=op.gradient,
        captures=(x,),
        product="matrix",
        source=f"{BNB} MatMul8bitLt",
    )


def experts_fp8(op: Op, w: Weight, compute: str) -> Op:
    """Return a grouped product with experts in FP8.

    Like `_linear_fp8`, but backward dequantises only as many experts at once as fit in 1 GiB.
    """
    row, tokens = FORMATS["fp8"], w.shape.split(" ")
    out, into = " ".join(tokens[1 : w.rows]), " ".join(tokens[w.rows :])
    rows, chunk = f"{op.writes[0].shape.removesuffix(out)}{into}", f"{fp8_chunk(w)} {out} {into}"
    return op._replace(
        scratch=(
            *op.scratch,
            Tensor("quantised input", rows, "fp8"),
            Tensor("input's scales", rows, f"fp32/{FP8_BLOCK}"),
        ),
        scratch_back=(
            *op.scratch_back,
            Scratch(Tensor("dequantised experts", chunk, compute)),
            Scratch(Tensor("scales of rows", chunk, f"{compute}/{FP8_BLOCK}")),
        ),
        source=f"{row.basis}: {row.source}, FP8GroupedMatmulFunction",
    )


def fp8_chunk(w: Weight) -> str:
    """Return the axis that counts the experts of a stack that are dequantised at once."""
    return f"chunk:{w.name}"


def fp8_experts_at_once(elements: int, experts: int, itemsize: int) -> int:
    """Return how many experts of a stack of `elements` weights are dequantised at once.

    Source: transformers 5.24 integrations/finegrained_fp8.py FP8GroupedMatmulFunction.dequant_budget_bytes.
    """
    return min(experts, max(1, 2**30 // (elements // experts * itemsize)))


def _source(w: Weight) -> str:
    """Return the source of the temporaries of a product with packed weights."""
    row = {"gptq": FORMATS["gptq-int4"], "awq": FORMATS["awq-int4"]}.get(family_of(w))
    return f"{row.basis}: {row.source}" if row else f"{BNB} MatMul4Bit"


def _linear_4bit(op: Op, w: Weight, name: str, y: str, compute: str, older: bool, copies: Copies) -> Iterator[Op]:
    """Return a 4-bit linear layer. It keeps nothing of the input and dequantises the matrix in both directions.

    The input is cast to the layer's compute dtype and the result back; the first call casts the bias permanently.
    Forward dequantises directly to the compute dtype, backward to the matrix's original dtype and then casts. Before
    0.43 forward did as backward does, and the backward node referenced the input (`older`). Few rows may read the
    packed weights (`copies`). Source: bitsandbytes 0.50 nn/modules.py Linear4bit.forward,
    autograd/_functions.py MatMul4Bit; 0.41.3 and 0.42.
    """
    (x,), shape = op.reads, op.writes[0].shape
    lead, _, into = ops.axes_of(op)
    full = Tensor("dequantised", w.shape, compute)
    back = (Scratch(Tensor("dequantised", w.shape, w.dtype)), *((Scratch(full),) if compute != w.dtype else ()))
    scales = absmax(w)
    dequantised = tuple(t.tensor for t in back)
    scratch = (*scales, *scales, full)
    if older:
        scratch = dequantised if len(dequantised) > 1 else (*scales, *dequantised)  # the cast finds the scales freed
    yield ops.cast(f"{name}.cast", x, f"{y}.in", f"{lead} {into}", compute)
    yield Op(
        name,
        (f"{y}.in",),
        (Tensor(f"{y}.out", shape, compute),),
        tuple(v if v.matrix else v._replace(dtype=compute) for v in op.weights),
        scratch=copied(scratch, w, lead, compute) if copies == "by rows" else scratch if copies else (),
        scratch_back=(*(Scratch(t, early=True) for t in scales), *back),
        gradient=op.gradient,
        captures=(f"{y}.in",) if older else (),
        product="matrix",
        source=_source(w),
    )
    yield ops.cast(f"{name}.cast_back", f"{y}.out", y, shape, f"={x}")
    yield ops.release_names(f"{y}.in")
