"""Quantised weights: what is stored, and what computing with them makes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from memplan.catalogue.kernels import ops
from memplan.core.ir import Keep, Op, Scratch, Tensor, Weight

_BNB = "bitsandbytes 0.50"
_GPTQ, _AWQ = "gptqmodel 7.7; auto-gptq 0.7 stores the same", "gptqmodel 7.7; autoawq 0.2.9 stores the same"


class Format(NamedTuple):
    """How a matrix is stored and multiplied by: the library, which of its words the tensors have, and the source.

    `needs` is what the library must be told or have before adapters train over it; `basis` is derived, or assumed
    where what computing makes was read and not seen.
    """

    library: str
    source: str
    needs: str = ""
    basis: str = "derived"


FORMATS = {
    "nf4": Format(_BNB, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState"),
    "fp4": Format(_BNB, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState"),
    "int8": Format(_BNB, "bitsandbytes 0.50 backends for LLM.int8"),
    **dict.fromkeys(
        ("gptq-int4", "gptq-int8"),
        Format(
            _GPTQ,
            "gptqmodel 7.7 nn_modules/qlinear/__init__.py _register_gptq_buffers, torch.py TorchLinear._forward_eager, "
            "which tritonv2.py calls in training; auto-gptq 0.7 qlinear_tritonv2.py",
            "a backend that trains: GPTQConfig(backend='auto_trainable')",
            "assumed",
        ),
    ),
    "awq-int4": Format(
        _AWQ,
        "gptqmodel 7.7 nn_modules/qlinear/__init__.py AWQuantLinear, gemm_awq.py AwqGemmFn; of up to 1,024 tokens its "
        "kernel's partial sums are not counted",
        "a backend that trains: AwqConfig(backend='auto_trainable'); transformers loads it in fp16",
        "assumed",
    ),
    "fp8": Format(
        "transformers 5.24",
        "transformers 5.24 integrations/finegrained_fp8.py FP8Linear, FP8LinearFunction, _dequantize_fp8_weight",
        "compute capability 8.9",
        "assumed",
    ),
}
# Rows that bitsandbytes multiplies by packed weights whatever the card and the matrix; before 0.50 it was one. Of up to
# 1,536 it chooses by both.
# Source: bitsandbytes 0.50 backends/cuda/ops.py gemm_4bit; 0.41 to 0.49 autograd/_functions.py matmul_4bit.
FEW_ROWS = 4
WHOLE = -1  # the block size of one scale a column
FP8_BLOCK = 128


def stored(w: Weight, format: str, double_quant: bool, block_size: int) -> tuple[Tensor, ...]:
    """The tensors that hold a quantised matrix. A dtype `x/n` is one x for every n elements, rounded up.

    GPTQ has words of int32, a half-precision scale and a zero a group of inputs (or one group, `WHOLE`), and every
    input's group; AWQ the same without the last. FP8 has a byte a weight, and a scale a square of 128.
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
    if format == "fp8":
        each = " ".join(tokens[: 1 if w.stacked else 0])  # a scale for itself of every expert
        squares = f"{'*'.join(out[1:] if w.stacked else out)}/{FP8_BLOCK} {'*'.join(into)}/{FP8_BLOCK}"
        blocks = f"{each} {squares}".strip() if block_size != WHOLE else each
        return (Tensor("fp8", w.shape, "fp8"), Tensor("weight_scale_inv", blocks, "fp32"))
    if format == "int8":
        return (Tensor("int8", w.shape, "int8"), Tensor("row scales", tokens[0], "fp32"))
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


def family_of(w: Weight) -> str:
    """Whose words a quantised matrix is stored in: gptq, awq, fp8, int8, or 4bit for bitsandbytes' four bits."""
    names = [t.name for t in w.stored]
    if "qweight" in names:
        return "gptq" if "g_idx" in names else "awq"
    return {"fp8": "fp8", "int8": "int8"}.get(names[0], "4bit")


def storage_of(w: Weight) -> str:
    """The library that stores a quantised matrix so."""
    return {"gptq": _GPTQ, "awq": _AWQ, "fp8": FORMATS["fp8"].library}.get(family_of(w), _BNB)


def absmax(w: Weight) -> tuple[Tensor, ...]:
    """The fp32 scales of a doubly quantised matrix, made again whenever it is dequantised."""
    nested = w.stored[1].dtype.startswith("uint8/")
    block_size = w.stored[1].dtype.partition("/")[2]
    return (Tensor("absmax", w.shape, f"fp32/{block_size}"),) if nested else ()


def dequantise(w: Weight, name: str, y: str, shape: str, dtype: str = "") -> Op:
    """The matrix in the dtype it had before it was quantised."""
    return Op(name, (), (Tensor(y, shape, w.dtype),), (w,), scratch=absmax(w), source=f"{_BNB} dequantize_4bit")


def quantised_linear(
    op: Op, name: str, y: str, compute: str, older: bool = False, keeps: bool = False, copies: bool = True
) -> Iterator[Op]:
    """The linear layer of the library that stores `op`'s matrix in its place, writing `y`; `compute` is what 4-bit ones
    compute in.

    `older`: before bitsandbytes 0.43 a 4-bit layer held its input to the end of the step. `keeps`: of GPTQ, torch keeps
    the dequantised matrix for the backward pass, as gptqmodel has it and auto-gptq had not. `copies`: a kernel that
    reads 4-bit weights as they are is not taken.
    """
    w = next(w for w in op.weights if w.matrix)
    if op.skipped:  # its bias is as it was loaded
        return iter((op,))
    match family_of(w):
        case "int8":
            return _linear_int8(op, w, name, y)
        case "fp8":
            return _linear_fp8(op, w, name, y, compute)
        case "gptq" if keeps:
            return _linear_kept(op, w, name, y)
        case _:
            return _linear_4bit(op, w, name, y, compute, older, copies)


def _linear_kept(op: Op, w: Weight, name: str, y: str) -> Iterator[Op]:
    """The matrix is dequantised, in the dtype of its scales, cast to the input's and multiplied as any other: torch
    keeps it for the gradient of the input. Scales are taken to be in the dtype the model is loaded in."""
    (x,), shape = op.reads, op.writes[0].shape
    row, made, full = FORMATS["gptq-int4"], f"{y}.dequantised", f"{y}.matrix"
    source = f"{row.basis}: {row.source}"
    yield Op(f"{name}.dequantise", (), (Tensor(made, w.shape, w.dtype),), (w,), source=source)
    yield ops.cast(f"{name}.cast", made, full, w.shape, f"={x}")
    yield ops.leave(made)
    yield Op(
        name,
        (x, full),
        (Tensor(y, shape),),
        tuple(v._replace(trains=False) for v in op.weights if not v.matrix),
        (Keep(full, x),),
        gradient=op.gradient,
        autocast="lower",
        product="matrix",
        source=source,
    )
    yield ops.leave(full)


def _linear_fp8(op: Op, w: Weight, name: str, y: str, compute: str) -> Iterator[Op]:
    """The input is quantised for the kernel, and nothing of it kept; backward dequantises the matrix, and spreads its
    scales over its rows."""
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
    """LLM.int8: the input is quantised row by row and kept whole by the backward node, checkpointing or not.

    Columns with outliers are multiplied apart; how many there are depends on the data, and they are not counted.
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
        source=f"{_BNB} int8_vectorwise_quant",
    )
    yield Op(
        name,
        (x, f"{y}.int8", f"{y}.scales"),
        (Tensor(y, shape, f"={x}"),),
        op.weights,
        scratch=(Tensor("int32 product", shape, "int32"), Tensor("fp16 product", shape, "fp16")),
        scratch_back=(Scratch(Tensor("dequantised", w.shape, f"={x}")),),
        gradient=op.gradient,
        captures=(x,),
        product="matrix",
        source=f"{_BNB} MatMul8bitLt",
    )


def experts_fp8(op: Op, w: Weight, compute: str) -> Op:
    """A grouped product with the matrices of experts in FP8: as `_linear_fp8`, but that backward dequantises only as
    many experts at once as take 1 GiB."""
    row, tokens = FORMATS["fp8"], w.shape.split(" ")
    out, into = " ".join(tokens[1 : w.rows]), " ".join(tokens[w.rows :])
    rows, some = f"{op.writes[0].shape.removesuffix(out)}{into}", f"{fp8_chunk(w)} {out} {into}"
    return op._replace(
        scratch=(
            *op.scratch,
            Tensor("quantised input", rows, "fp8"),
            Tensor("input's scales", rows, f"fp32/{FP8_BLOCK}"),
        ),
        scratch_back=(
            *op.scratch_back,
            Scratch(Tensor("dequantised experts", some, compute)),
            Scratch(Tensor("scales of rows", some, f"{compute}/{FP8_BLOCK}")),
        ),
        source=f"{row.basis}: {row.source}, FP8GroupedMatmulFunction",
    )


def fp8_chunk(w: Weight) -> str:
    """The axis that says how many experts of a stack are dequantised at once."""
    return f"chunk:{w.name}"


def fp8_experts_at_once(elements: int, experts: int, itemsize: int) -> int:
    """How many experts of a stack of so many elements are dequantised at once.

    Source: transformers 5.24 integrations/finegrained_fp8.py FP8GroupedMatmulFunction.dequant_budget_bytes.
    """
    return min(experts, max(1, 2**30 // (elements // experts * itemsize)))


def _source(w: Weight) -> str:
    """Where it is read what a product with a matrix of packed weights makes."""
    row = {"gptq": FORMATS["gptq-int4"], "awq": FORMATS["awq-int4"]}.get(family_of(w))
    return f"{row.basis}: {row.source}" if row else f"{_BNB} MatMul4Bit"


def _linear_4bit(op: Op, w: Weight, name: str, y: str, compute: str, older: bool, copies: bool = True) -> Iterator[Op]:
    """Nothing of the input is kept; the matrix is dequantised in both directions.

    The input is cast to the layer's compute dtype and the result back; the first call casts the bias, for good. Forward
    dequantises to the compute dtype at once, backward to the dtype the matrix had and then casts that.
    Before 0.43 forward did as backward does, and the backward node referred to the input (`older`). Without `copies` a
    kernel reads the packed weights themselves.
    Source: bitsandbytes 0.50 nn/modules.py Linear4bit.forward, autograd/_functions.py MatMul4Bit; 0.41.3 and 0.42.
    """
    (x,), shape = op.reads, op.writes[0].shape
    lead, _, into = ops.axes_of(op)
    full = Tensor("dequantised", w.shape, compute)
    back = (Scratch(Tensor("dequantised", w.shape, w.dtype)), *((Scratch(full),) if compute != w.dtype else ()))
    scales = absmax(w)
    whole = tuple(t.tensor for t in back)
    before = whole if len(whole) > 1 else (*scales, *whole)  # scales are gone when the matrix is cast
    yield ops.cast(f"{name}.cast", x, f"{y}.in", f"{lead} {into}", compute)
    yield Op(
        name,
        (f"{y}.in",),
        (Tensor(f"{y}.out", shape, compute),),
        tuple(v if v.matrix else v._replace(dtype=compute) for v in op.weights),
        scratch=() if not copies else (*scales, *scales, full) if not older else before,
        scratch_back=(*(Scratch(t, early=True) for t in scales), *back),
        gradient=op.gradient,
        captures=(f"{y}.in",) if older else (),
        product="matrix",
        source=_source(w),
    )
    yield ops.cast(f"{name}.cast_back", f"{y}.out", y, shape, f"={x}")
    yield ops.leave(f"{y}.in")
