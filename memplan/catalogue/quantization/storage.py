"""How checkpoints and libraries store a quantised matrix for inference: the tensors that replace it, as data.

Formats that can be trained over are in `memplan.catalogue.quantization.quantization`; this module has all formats for
inference, including those. Sizes are of the stored tensors only, without what a kernel repacks or computes in addition.
"""

from __future__ import annotations

from memplan.catalogue.quantization.quantization import FP8_BLOCK, WHOLE, stored
from memplan.core.ir import Tensor, Weight
from memplan.core.records import NamedTuple

_COMPRESSED = "compressed-tensors 0.20 compressors"


class StorageKind(NamedTuple):
    """A format of stored weights.

    group    default group size, in weights along a row; WHOLE for a row or the entire matrix, see `source`
    source   where it was read
    zeros    groups have zero points
    experts  stacks of experts in one parameter can be stored so; libraries that quantise at load time skip them
    alone    if a model has stacks of experts, only they are stored so, as in gpt-oss, DeepSeek-V4 and Kimi K3
    """

    group: int
    source: str
    zeros: bool = False
    experts: bool = True
    alone: bool = False


KINDS = {
    "nf4": StorageKind(64, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState", experts=False),
    "fp4": StorageKind(64, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState", experts=False),
    "int8": StorageKind(WHOLE, "bitsandbytes 0.50 nn/modules.py Int8Params: a scale a row", experts=False),
    "gptq-int4": StorageKind(128, "gptqmodel 7.7 nn_modules/qlinear/__init__.py _register_gptq_buffers", zeros=True),
    "gptq-int8": StorageKind(128, "gptqmodel 7.7 nn_modules/qlinear/__init__.py _register_gptq_buffers", zeros=True),
    "awq-int4": StorageKind(128, "gptqmodel 7.7 nn_modules/qlinear/__init__.py AWQuantLinear", zeros=True),
    "fp8": StorageKind(FP8_BLOCK, "transformers 5.24 integrations/finegrained_fp8.py FP8Linear: squares of 128"),
    "fp8-tensor": StorageKind(WHOLE, f"{_COMPRESSED}/naive_quantized/base.py, strategy tensor: a scale a matrix"),
    "fp8-channel": StorageKind(WHOLE, f"{_COMPRESSED}/naive_quantized/base.py, strategy channel: a scale a row"),
    "w8a8-int8": StorageKind(WHOLE, f"{_COMPRESSED}/naive_quantized/base.py, strategy channel: a scale a row"),
    "w4a16": StorageKind(128, f"{_COMPRESSED}/pack_quantized/base.py"),
    "w8a16": StorageKind(128, f"{_COMPRESSED}/pack_quantized/base.py"),
    "mxfp4": StorageKind(
        32, "transformers 5.24 integrations/mxfp4.py; OCP Microscaling Formats 1.0, table 1", alone=True
    ),
    "mxfp8": StorageKind(32, f"{_COMPRESSED}/mxfp8/base.py; OCP Microscaling Formats 1.0, table 1"),
    "nvfp4": StorageKind(16, f"{_COMPRESSED}/nvfp4/base.py"),
    "torchao-int8": StorageKind(WHOLE, "torchao 0.18 quantize_/workflows/int8/int8_tensor.py, PerRow", experts=False),
    "torchao-int4": StorageKind(
        128, "torchao 0.18 quantize_/workflows/int4/int4_tensor.py, plain packing", zeros=True, experts=False
    ),
    "hqq-int4": StorageKind(64, "hqq 0.2.8 core/quantize.py Quantizer.quantize, 4 bits", zeros=True, experts=False),
    "quanto-int8": StorageKind(WHOLE, "optimum-quanto 0.2.7 tensor/weights/qbytes.py: a scale a row", experts=False),
    "quanto-int4": StorageKind(
        128, "optimum-quanto 0.2.7 tensor/weights/qbits.py, nn/qmodule.py", zeros=True, experts=False
    ),
}

# Formats whose scales have a fixed dtype.
_TRAINED_OVER = ("nf4", "fp4", "int8", "gptq-int4", "gptq-int8", "awq-int4", "fp8")
_WORDS = {"w4a16": 4, "w8a16": 8}  # bits per weight, packed in int32


class Layout(NamedTuple):
    """How one matrix is stored: a format of `KINDS`, with the settings of its checkpoint.

    group         weights along a row that share a scale, or WHOLE
    double_quant  bitsandbytes quantises the scales too
    zeros         every group has a zero point
    order         the group of every input is stored (GPTQ's g_idx, act-order)
    inputs        a fixed scale for the layer's inputs is stored
    scales        dtype of the scales; empty if the format fixes it
    acts          how inputs are quantised: empty, `fixed`, `rows`, `groups/n`, or `local/n` (plus one global scale)
    """

    format: str
    group: int
    double_quant: bool = False
    zeros: bool = False
    order: bool = False
    inputs: bool = False
    scales: str = ""
    acts: str = ""

    @property
    def source(self) -> str:
        return KINDS[self.format].source


def plain(format: str, group: int | None = None, scales: str = "bf16", double_quant: bool = False) -> Layout:
    """Return the format with its defaults. `scales`: dtype of scales that have the dtype of the original weights."""
    kind = KINDS[format]
    scales_dtype = "" if format in _TRAINED_OVER else scales
    return Layout(format, kind.group if group is None else group, double_quant, kind.zeros, scales=scales_dtype)


def parts_of(w: Weight, layout: Layout) -> tuple[Tensor, ...]:  # noqa: PLR0911 (a return for each format)
    """Return the tensors that replace a matrix, or a stack of experts' matrices.

    An axis `x/n` is rounded up. Checkpoints store gate and up of a joint parameter as two matrices per expert.
    """
    form, group = layout.format, layout.group
    tokens = w.shape.split()
    each = tokens[:1] if w.stacked else []
    out, into = tokens[len(each) : w.rows], tokens[w.rows :]
    wide = "*".join(into)
    matrices = " ".join([*each, *(["2"] if w.stacked and w.name.endswith("gate_up_proj") else [])])
    rows, grouped = " ".join([*each, *out]), _per([*each, *out], wide, group)
    inputs = (Tensor("input_scale", matrices, "fp32"),) if layout.inputs else ()
    if form in _TRAINED_OVER:
        tensors = stored(w, form, layout.double_quant, group)
        if form in ("gptq-int4", "gptq-int8") and w.stacked:  # every matrix has its own order of inputs
            tensors = tuple(
                t._replace(shape=f"{matrices} {' '.join(into)}") if t.name == "g_idx" else t for t in tensors
            )
        if form == "fp8":
            shape = matrices if w.stacked and group == WHOLE else tensors[1].shape
            tensors = (tensors[0], Tensor(tensors[1].name, shape, layout.scales or tensors[1].dtype))
        return (*tensors, *inputs)
    match form:
        case "fp8-tensor":
            return Tensor("weight", w.shape, "fp8"), Tensor("weight_scale", matrices, layout.scales), *inputs
        case "fp8-channel":
            return Tensor("weight", w.shape, "fp8"), Tensor("weight_scale", rows, layout.scales), *inputs
        case "torchao-int8":
            points = Tensor("weight_zero_point", rows, "int8")
            return Tensor("weight", w.shape, "int8"), Tensor("weight_scale", rows, "fp32"), points
        case "w8a8-int8" | "quanto-int8":
            return Tensor("weight", w.shape, "int8"), Tensor("weight_scale", rows, layout.scales), *inputs
        case "w4a16" | "w8a16":
            bits = _WORDS[form]
            points = _per(each, "*".join(out), 32 // bits, grouped.split()[len(each) + len(out) :])
            return (
                Tensor("weight_packed", _per([*each, *out], wide, 32 // bits), "int32"),
                Tensor("weight_scale", grouped, layout.scales),
                Tensor("weight_shape", f"{matrices} 2".strip(), "int64"),
                *((Tensor("weight_zero_point", points, "int32"),) if layout.zeros else ()),
                *((Tensor("weight_g_idx", f"{matrices} {' '.join(into)}".strip(), "int32"),) if layout.order else ()),
                *inputs,
            )
        case "mxfp4":
            packed = Tensor("weight_packed", _per([*each, *out], wide, 2), "uint8")
            return packed, Tensor("weight_scale", grouped, "uint8"), *inputs
        case "mxfp8":
            return Tensor("weight", w.shape, "fp8"), Tensor("weight_scale", grouped, "uint8"), *inputs
        case "nvfp4":
            return (
                Tensor("weight_packed", _per([*each, *out], wide, 2), "uint8"),
                Tensor("weight_scale", grouped, "fp8"),
                Tensor("weight_global_scale", matrices, "fp32"),
                *inputs,
            )
        case _:  # 4 bits with a scale and a zero point or shift per group: torchao, HQQ, quanto
            return (
                Tensor("weight_packed", _per([*each, *out], wide, 2), "uint8"),
                Tensor("weight_scale", grouped, layout.scales),
                Tensor("weight_zero_point", grouped, layout.scales),
            )


def _per(before: list[str], axis: str, n: int, after: list[str] | None = None) -> str:
    """Return a shape whose axis `axis` is divided by n, rounded up; the axis is left out if n is WHOLE."""
    return " ".join([*before, *([f"{axis}/{n}"] if n != WHOLE else []), *(after or [])])
