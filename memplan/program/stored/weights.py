"""A model's weights as stored for inference: every tensor that stands for a parameter, and its bytes.

Sizes are those of a checkpoint's tensors, which every engine that does not repack them has. For training see
`memplan.resolve.quantized_checkpoint`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any, cast

from memplan.catalogue.quantization.gguf import FILE_TYPES
from memplan.catalogue.quantization.gguf import SOURCE as QUANTIZE
from memplan.catalogue.quantization.storage import KINDS, Layout, parts_of, plain
from memplan.core.errors import UnknownNameError, UnsupportedModelError, refused
from memplan.core.ir import Tensor, Weight
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import shared
from memplan.models.gguf import loaded
from memplan.models.headers import StoredTensor
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import compare_checkpoint, owners, parameters
from memplan.program.stored.gguf import file_type_of, gguf_file
from memplan.program.stored.quantization_config import FIELD, LayoutOf, scheme_of, uniform_layout, unquantised_layout
from memplan.spec.formats import Quantization

UNQUANTISED = "none"
_HEAD, _OTHER = "lm_head", "other"
# Buffers that checkpoints store; the others are computed when the model is built.
_STORED_BUFFERS = (
    *("e_score_correction_bias", "tid2eid", "layer_scalar"),
    *("input_max", "input_min", "output_max", "output_min"),
)


class StoredWeight(NamedTuple):
    """A stored tensor.

    name    the parameter it stands for, by its name in transformers' state dict (`model.layers.0.mlp.up_proj.weight`)
    part    the tensor's own name, if several stand for the parameter (`weight_scale`)
    dtype   memplan's name of its dtype; in a GGUF file ggml's (`Q4_K`)
    shape   the parameter's shape in torch; in a GGUF file the tensor's
    bytes   size of the tensor
    group   part of the model the parameter belongs to: embedding attention mixer mlp router norm vision lm_head ...
    source  where its size comes from
    basis   derived or assumed
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    group: str
    source: str
    basis: str = "derived"


def stored_weights(
    model: ModelSpec, quantization: str | Quantization | None = None, dtype: str = "bf16"
) -> tuple[StoredWeight, ...]:
    """Return the stored weights of `model` in the model's order. Their `bytes` add up to the size of the weights.

    quantization  name of a format: one of `memplan.catalogue.quantization.storage.KINDS` (`fp8`, `w4a16`, `awq-int4`),
                  or a GGUF file type (`Q4_K_M`, `gguf:Q4_K_M`); a format with its settings; `none` for unquantised
                  weights; or None for the checkpoint's own format, from its files if they were read, else from its
                  config
    dtype         dtype of unquantised weights (embeddings, norms, routers, the head): `bf16`, `fp16` or `fp32`. A GGUF
                  file has types of its own for them

    Raises UnknownNameError for an unknown format, UnsupportedModelError for a family whose GGUF tensor names are not
    known, SpecError for a `quantization_config` that is not supported, and ConfigError for an invalid one.
    """
    return _stored(model, quantization, dtype)


def format_of(name: str) -> str:
    """Return the format that a name means, in any case. Raises UnknownNameError, which names the nearest ones."""
    lowered = name.strip().lower().replace("_", "-")
    if lowered in KINDS or lowered == UNQUANTISED:
        return lowered
    file_type = file_type_of(name)
    if file_type is None:
        raise UnknownNameError("method.quantization.format", name, (*KINDS, *FILE_TYPES))
    return file_type


@lru_cache(maxsize=64)
def _stored(model: ModelSpec, quantization: str | Quantization | None, dtype: str) -> tuple[StoredWeight, ...]:
    if isinstance(quantization, Quantization) and quantization.format in FILE_TYPES:
        quantization = quantization.format
    if isinstance(quantization, str):
        quantization = format_of(quantization)
        if quantization in FILE_TYPES:
            return tuple(_in_gguf(model, quantization))
        if quantization == UNQUANTISED:
            return tuple(_rows(model, unquantised_layout, dtype))
    if quantization is None:
        checkpoint = model.checkpoint
        if checkpoint is not None and checkpoint.tensors and (checkpoint.kind == "gguf" or model.config.get(FIELD)):
            return tuple(_from_files(model, checkpoint.tensors, checkpoint.kind))
        return tuple(_rows(model, _published_layout(model, dtype), dtype))
    layout_of = _one_format(model, quantization, dtype)
    return tuple(_rows(model, layout_of, dtype))


def _from_files(model: ModelSpec, tensors: tuple[StoredTensor, ...], kind: str) -> Iterator[StoredWeight]:
    """Yield the tensors of the checkpoint's files that belong to the model."""
    source = "the headers of its files"
    if kind == "gguf":
        try:
            parameters_of = {t.name: (t.parameter, t.group) for t in gguf_file(model, "F16").tensors}
        except UnsupportedModelError:  # sizes are known even if names do not tell the parameters
            parameters_of = {}
        for t in loaded(tensors):
            name, group = parameters_of.get(t.name, ("", _OTHER))
            yield StoredWeight(name or t.name, t.name, t.dtype, t.shape, t.bytes, group, source)
        return
    extra = {t.name for t in compare_checkpoint(model, tensors).extra}
    for t, owner in zip(tensors, owners(model, (t.name for t in tensors)), strict=True):
        if owner is not None or t.name not in extra:
            name, group, shape = (
                (owner.name, owner.weight.group, owner.shape) if owner is not None else (t.name, _OTHER, t.shape)
            )
            yield StoredWeight(name, "" if name == t.name else t.name, t.dtype, shape, t.bytes, group, source)


def _in_gguf(model: ModelSpec, file_type: str) -> Iterator[StoredWeight]:
    """Yield the tensors of a GGUF file. A parameter may have several."""
    for t in gguf_file(model, file_type).tensors:
        yield StoredWeight(t.parameter or t.name, t.name, t.type, t.shape, t.bytes, t.group, QUANTIZE)


def _one_format(model: ModelSpec, quantization: str | Quantization, dtype: str) -> LayoutOf:
    """Return one layout for every matrix except the head, routers, and modules that the run or the model leaves out. In
    formats for experts only, such as mxfp4 of gpt-oss, only stacks of experts have it."""
    if isinstance(quantization, Quantization):
        q = quantization
        _refuse_blocks(q)
        group = q.block_size if "block_size" in q.model_fields_set else None  # None is the format's default
        layout, skip = plain(q.format, group, dtype, q.double_quant), q.skip
    else:
        layout, skip = plain(quantization, None, dtype), None
    layout_of = uniform_layout(layout, [*((_HEAD,) if skip is None else skip), *model.family.training.never_quantised])
    if not KINDS[layout.format].alone or not any(parameter.weight.stacked for parameter in parameters(model)):
        return layout_of

    def layout_of_experts(name: str, w: Weight) -> Layout | None:
        return layout_of(name, w) if w.stacked else None

    return layout_of_experts


_SMALLEST_BLOCK = {"nf4": 32, "fp4": 32}  # bitsandbytes 0.50 functional.py quantize_4bit


def _refuse_blocks(q: Quantization) -> None:
    """Raise SpecError for block sizes that bitsandbytes does not support, including -1."""
    least, field = _SMALLEST_BLOCK.get(q.format, q.block_size), "method.quantization.block_size"
    if q.block_size < least:
        raise refused(field, f"{q.format} has no blocks of {q.block_size}; use {least} to 4,096")


def _published_layout(model: ModelSpec, dtype: str) -> LayoutOf:
    """Return the layouts of the checkpoint's own `quantization_config`; without one, nothing is quantised."""
    config: Any = model.config.get(FIELD)
    if not isinstance(config, Mapping) or not config:
        return unquantised_layout
    return scheme_of(
        cast(Mapping[str, Any], config),
        dtype,
        str(model.config.get("expert_dtype", "")),
        model.family.checkpoint.half_scales,
    ).layout_of


def _rows(model: ModelSpec, layout_of: LayoutOf, dtype: str) -> Iterator[StoredWeight]:
    axes = model.axes()
    for name, w, shape in parameters(model):
        if w.group == "buffer" and not w.name.endswith(_STORED_BUFFERS):
            continue
        layout = layout_of(name, w) if w.group != "buffer" else None
        if layout is None:
            tensor = Tensor("", w.shape, w.dtype or dtype)
            yield StoredWeight(name, "", tensor.dtype, shape, _bytes(tensor, axes), w.group, "the model's config")
            continue
        for part in parts_of(w, layout):
            kind = part.dtype.partition("/")[0]
            yield StoredWeight(name, part.name, kind, shape, _bytes(part, axes), w.group, layout.source)


def _bytes(t: Tensor, axes: dict[str, int]) -> int:
    """Return the exact bytes of a tensor. A dtype `x/n` is one x per n elements, rounded up; so is an axis `x*y/n`."""
    name, _, per = t.dtype.partition("/")
    numbers = prod(int(a) if a.isdigit() else shared(a, axes) if "/" in a else axes[a] for a in t.shape.split())
    return -(-numbers // int(per or 1)) * ITEMSIZE[name]
