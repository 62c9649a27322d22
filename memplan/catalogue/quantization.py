"""Quantised weights: what is stored, and what computing with them makes."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue import ops
from memplan.ir import Op, Scratch, Tensor, Weight

_BNB = "bitsandbytes 0.50"


def stored(w: Weight, format: str, double_quant: bool, block_size: int) -> tuple[Tensor, ...]:
    """The tensors that hold a quantised matrix. A dtype `x/n` is one x for every n elements, rounded up.

    GPTQ has 4-bit words in int32, a half-precision scale and a zero a group of inputs, and every input's group.
    Source: bitsandbytes 0.50 functional.py quantize_4bit, QuantState; backends for LLM.int8; auto-gptq 0.7
    qlinear_tritonv2.py.
    """
    if format == "gptq-int4":
        return (
            Tensor("qweight", w.shape, "int32/8"),
            Tensor("scales", w.shape, f"fp16/{block_size}"),
            Tensor("qzeros", w.shape, f"int32/{8 * block_size}"),
            Tensor("g_idx", " ".join(w.shape.split(" ")[w.rows :]), "int32"),
        )
    if format == "int8":
        return (Tensor("int8", w.shape, "int8"), Tensor("row scales", w.shape.split(" ")[0], "fp32"))
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


def storage_of(w: Weight) -> str:
    """The library that stores a quantised matrix so."""
    return "auto-gptq 0.7" if w.stored[0].name == "qweight" else _BNB


def absmax(w: Weight) -> tuple[Tensor, ...]:
    """The fp32 scales of a doubly quantised matrix, made again whenever it is dequantised."""
    nested = w.stored[1].dtype.startswith("uint8/")
    block_size = w.stored[1].dtype.partition("/")[2]
    return (Tensor("absmax", w.shape, f"fp32/{block_size}"),) if nested else ()


def dequantise(w: Weight, name: str, y: str, shape: str, dtype: str = "") -> Op:
    """The matrix in the dtype it had before it was quantised."""
    return Op(name, (), (Tensor(y, shape, w.dtype),), (w,), scratch=absmax(w), source=f"{_BNB} dequantize_4bit")


def quantised_linear(op: Op, name: str, y: str, compute: str, older: bool = False) -> Iterator[Op]:
    """bitsandbytes' linear layer in place of `op`, writing `y`; `compute` is what 4-bit ones compute in.

    `older`: before bitsandbytes 0.43 a 4-bit layer held its input to the end of the step.
    """
    w = next(w for w in op.weights if w.matrix)
    if op.skipped:  # its bias is as it was loaded
        return iter((op,))
    return _linear_int8(op, w, name, y) if w.stored[0].dtype == "int8" else _linear_4bit(op, w, name, y, compute, older)


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


def _linear_4bit(op: Op, w: Weight, name: str, y: str, compute: str, older: bool) -> Iterator[Op]:
    """Nothing of the input is kept; the matrix is dequantised in both directions.

    The input is cast to the layer's compute dtype and the result back; the first call casts the bias, for good. Forward
    dequantises to the compute dtype at once, backward to the dtype the matrix had and then casts that.
    Before 0.43 forward did as backward does, and the backward node referred to the input (`older`).
    Source: bitsandbytes 0.50 nn/modules.py Linear4bit.forward, autograd/_functions.py MatMul4Bit; 0.41.3 and 0.42.
    """
    (x,), shape = op.reads, op.writes[0].shape
    lead, _, into = ops.axes_of(op)
    full = Tensor("dequantised", w.shape, compute)
    back = (Scratch(Tensor("dequantised", w.shape, w.dtype)), *((Scratch(full),) if compute != w.dtype else ()))
    scales = absmax(w)
    yield ops.cast(f"{name}.cast", x, f"{y}.in", f"{lead} {into}", compute)
    yield Op(
        name,
        (f"{y}.in",),
        (Tensor(f"{y}.out", shape, compute),),
        tuple(v if v.matrix else v._replace(dtype=compute) for v in op.weights),
        scratch=(*scales, *scales, full) if not older else (*scales, *(t.tensor for t in back)),
        scratch_back=(*(Scratch(t, early=True) for t in scales), *back),
        gradient=op.gradient,
        captures=(f"{y}.in",) if older else (),
        product="matrix",
        source=f"{_BNB} MatMul4Bit",
    )
    yield ops.cast(f"{name}.cast_back", f"{y}.out", y, shape, f"={x}")
    yield ops.leave(f"{y}.in")
