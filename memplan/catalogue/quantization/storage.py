"""How checkpoints and libraries store a quantised matrix for running a model: the tensors in its place, as data.

What can be trained over is in `memplan.catalogue.quantization.quantization`; here are all formats that are read or
named for running a model, those among them. Sizes are of the tensors alone, without what a kernel repacks or computes
beside them.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.catalogue.quantization.quantization import FP8_BLOCK, WHOLE, stored
from memplan.core.ir import Tensor, Weight

_COMPRESSED = "compressed-tensors 0.20 compressors"


class Kind(NamedTuple):
    """A format: the size of its groups where nothing says another, in weights along a row (WHOLE: the row, or the whole
    matrix, as `source` has it), where it was read, whether groups have zero points, and whether stacks of experts in
    one parameter are stored so: libraries that quantise a model as it is loaded take linear layers only. `alone`: where
    a model has such stacks, nothing else is, as gpt-oss, DeepSeek-V4 and Kimi K3 were published."""

    group: int
    source: str
    zeros: bool = False
    experts: bool = True
    alone: bool = False


KINDS = {
    "nf4": Kind(64, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState", experts=False),
    "fp4": Kind(64, "bitsandbytes 0.50 functional.py quantize_4bit, QuantState", experts=False),
    "int8": Kind(WHOLE, "bitsandbytes 0.50 nn/modules.py Int8Params: a scale a row", experts=False),
    "gptq-int4": Kind(128, "gptqmodel 7.7 nn_modules/qlinear/__init__.py _register_gptq_buffers", zeros=True),
    "gptq-int8": Kind(128, "gptqmodel 7.7 nn_modules/qlinear/__init__.py _register_gptq_buffers", zeros=True),
    "awq-int4": Kind(128, "gptqmodel 7.7 nn_modules/qlinear/__init__.py AWQuantLinear", zeros=True),
    "fp8": Kind(FP8_BLOCK, "transformers 5.24 integrations/finegrained_fp8.py FP8Linear: squares of 128"),
    "fp8-tensor": Kind(WHOLE, f"{_COMPRESSED}/naive_quantized/base.py, strategy tensor: a scale a matrix"),
    "fp8-channel": Kind(WHOLE, f"{_COMPRESSED}/naive_quantized/base.py, strategy channel: a scale a row"),
    "w8a8-int8": Kind(WHOLE, f"{_COMPRESSED}/naive_quantized/base.py, strategy channel: a scale a row"),
    "w4a16": Kind(128, f"{_COMPRESSED}/pack_quantized/base.py"),
    "w8a16": Kind(128, f"{_COMPRESSED}/pack_quantized/base.py"),
    "mxfp4": Kind(32, "transformers 5.24 integrations/mxfp4.py; OCP Microscaling Formats 1.0, table 1", alone=True),
    "mxfp8": Kind(32, f"{_COMPRESSED}/mxfp8/base.py; OCP Microscaling Formats 1.0, table 1"),
    "nvfp4": Kind(16, f"{_COMPRESSED}/nvfp4/base.py"),
    "torchao-int8": Kind(WHOLE, "torchao 0.18 quantize_/workflows/int8/int8_tensor.py, PerRow", experts=False),
    "torchao-int4": Kind(
        128, "torchao 0.18 quantize_/workflows/int4/int4_tensor.py, plain packing", zeros=True, experts=False
    ),
    "hqq-int4": Kind(64, "hqq 0.2.8 core/quantize.py Quantizer.quantize, 4 bits", zeros=True, experts=False),
    "quanto-int8": Kind(WHOLE, "optimum-quanto 0.2.7 tensor/weights/qbytes.py: a scale a row", experts=False),
    "quanto-int4": Kind(128, "optimum-quanto 0.2.7 tensor/weights/qbits.py, nn/qmodule.py", zeros=True, experts=False),
}

# Formats whose scales have a dtype of their own.
_TRAINED_OVER = ("nf4", "fp4", "int8", "gptq-int4", "gptq-int8", "awq-int4", "fp8")
_WORDS = {"w4a16": 4, "w8a16": 8}  # bits of a weight in words of int32


class Layout(NamedTuple):
    """How one matrix is stored: a format of `KINDS`, and what its checkpoint says of it.

    group         weights along a row that share a scale, or WHOLE
    double_quant  bitsandbytes quantises the scales, too
    zeros         every group has a zero point
    order         the group of every input is stored (GPTQ's g_idx, act-order)
    inputs        a scale for the layer's inputs is stored, which is fixed
    acts          how inputs are quantised: empty, `fixed`, `rows`, or in `groups/n`, `local/n` (one more for all)
    scales        dtype of the scales; empty where the format has one of its own
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
    """The format with its own defaults. `scales` are in that dtype where they have the dtype of the weights that were
    quantised."""
    kind = KINDS[format]
    own = "" if format in _TRAINED_OVER else scales
    return Layout(format, kind.group if group is None else group, double_quant, kind.zeros, scales=own)


def parts_of(w: Weight, layout: Layout) -> tuple[Tensor, ...]:
    """The tensors that stand for a matrix, or for a stack of experts' matrices one by one.

    An axis `x/n` is rounded up. A stack of gates and ups in one parameter is two matrices of each expert in files.
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
        made = stored(w, form, layout.double_quant, group)
        if form in ("gptq-int4", "gptq-int8") and w.stacked:  # every matrix has an order of its own inputs
            made = tuple(t._replace(shape=f"{matrices} {' '.join(into)}") if t.name == "g_idx" else t for t in made)
        if form == "fp8":
            shape = matrices if w.stacked and group == WHOLE else made[1].shape
            made = (made[0], Tensor(made[1].name, shape, layout.scales or made[1].dtype))
        return (*made, *inputs)
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
        case _:  # 4 bits with a scale and a zero point or shift a group: torchao, HQQ, quanto
            return (
                Tensor("weight_packed", _per([*each, *out], wide, 2), "uint8"),
                Tensor("weight_scale", grouped, layout.scales),
                Tensor("weight_zero_point", grouped, layout.scales),
            )


def _per(before: list[str], axis: str, n: int, after: list[str] | None = None) -> str:
    """A shape whose axis `axis` is divided by n and rounded up; left out where n is WHOLE."""
    return " ".join([*before, *([f"{axis}/{n}"] if n != WHOLE else []), *(after or [])])
