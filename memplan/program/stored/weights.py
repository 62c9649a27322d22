"""The weights of a model as they are stored to run it: every tensor that stands for a parameter, and its bytes.

What is counted are the tensors themselves, as a checkpoint has them: the same for every engine that does not repack
them. Nothing here is about training (`memplan.resolve.quantized_checkpoint` is).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, cast

from memplan.catalogue.quantization.gguf import FILE_TYPES
from memplan.catalogue.quantization.gguf import SOURCE as QUANTIZE
from memplan.catalogue.quantization.storage import KINDS, Layout, parts_of, plain
from memplan.core.errors import SpecError, UnknownNameError, UnsupportedModelError
from memplan.core.ir import Tensor, Weight
from memplan.core.units import ITEMSIZE
from memplan.engine.walk import shared
from memplan.models.gguf import loaded
from memplan.models.headers import StoredTensor
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import compared, owners, parameters
from memplan.program.stored.gguf import file_type_of, gguf_file
from memplan.program.stored.quantization_config import FIELD, LayoutOf, everywhere, plainly, scheme_of
from memplan.spec.formats import Quantization

UNQUANTISED = "none"
_HEAD, _OTHER = "lm_head", "other"
# Buffers that checkpoints hold beside the parameters; the others are made anew.
_KEPT = ("e_score_correction_bias", "tid2eid", "layer_scalar", "input_max", "input_min", "output_max", "output_min")


class StoredWeight(NamedTuple):
    """A tensor of the weights as they are stored.

    name    the parameter it stands for, by its name in transformers' state dict (`model.layers.0.mlp.up_proj.weight`)
    part    the tensor's own name, where it is one of several in place of the parameter (`weight_scale`)
    dtype   of its elements: memplan's word, or ggml's (`Q4_K`) in a GGUF file
    shape   the parameter's as torch has it, whatever the tensor's; in a GGUF file the tensor's
    bytes   of the tensor
    group   what the parameter is counted under: embedding attention mixer mlp router norm vision lm_head ...
    source  where its size comes from; `basis` is derived, or assumed
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
    """The weights of `model` as they are stored in `quantization`, in the model's order.

    quantization  a format by name: one of `memplan.catalogue.quantization.storage.KINDS` (`fp8`, `w4a16`, `awq-int4`),
                  or a type of GGUF file (`Q4_K_M`, `gguf:Q4_K_M`); one with its settings; `none` for plain weights; or
                  None for what the checkpoint itself is: its files' tensors where they were seen, what its config says
                  else
    dtype         of what is not quantised: embeddings, norms, routers, the head: `bf16`, `fp16` or `fp32`. A GGUF file
                  has types of its own for those

    Raises UnknownNameError for a format that is not known, UnsupportedModelError for a family whose tensors have no
    names in GGUF that are known, SpecError and ConfigError for a `quantization_config` that is not supported or none.
    The sum of `bytes` is what the weights take.
    """
    return _stored(model, quantization, dtype)


def format_of(name: str) -> str:
    """The format a name means, in any case. Raises UnknownNameError with the nearest ones."""
    found = name.strip().lower().replace("_", "-")
    if found in KINDS or found == UNQUANTISED:
        return found
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
            return tuple(_rows(model, plainly, dtype))
    if quantization is None:
        seen = model.checkpoint
        if seen is not None and seen.tensors and (seen.kind == "gguf" or model.config.get(FIELD)):
            return tuple(_as_seen(model, seen.tensors, seen.kind))
        return tuple(_rows(model, _as_published(model, dtype), dtype))
    layout_of = _one_format(model, quantization, dtype)
    return tuple(_rows(model, layout_of, dtype))


def _as_seen(model: ModelSpec, tensors: tuple[StoredTensor, ...], kind: str) -> Iterator[StoredWeight]:
    """The tensors of the checkpoint's files that are of the model, each as it is."""
    source = "the headers of its files"
    if kind == "gguf":
        try:
            known = {t.name: (t.parameter, t.group) for t in gguf_file(model, "F16").tensors}
        except UnsupportedModelError:  # its file says what it is, though not which parameters
            known = {}
        for t in loaded(tensors):
            name, group = known.get(t.name, ("", _OTHER))
            yield StoredWeight(name or t.name, t.name, t.dtype, t.shape, t.bytes, group, source)
        return
    extra = {t.name for t in compared(model, tensors).extra}
    for t, of in zip(tensors, owners(model, (t.name for t in tensors)), strict=True):
        if of is not None or t.name not in extra:
            name, group, shape = (of.name, of.weight.group, of.shape) if of is not None else (t.name, _OTHER, t.shape)
            yield StoredWeight(name, "" if name == t.name else t.name, t.dtype, shape, t.bytes, group, source)


def _in_gguf(model: ModelSpec, file_type: str) -> Iterator[StoredWeight]:
    """The tensors of a GGUF file, of which one parameter may have several."""
    for t in gguf_file(model, file_type).tensors:
        yield StoredWeight(t.parameter or t.name, t.name, t.type, t.shape, t.bytes, t.group, QUANTIZE)


def _one_format(model: ModelSpec, quantization: str | Quantization, dtype: str) -> LayoutOf:
    """Every matrix in one format, but for the head, routers, and what the run or the model leaves out; of gpt-oss in
    mxfp4, the experts alone, as it was published."""
    if isinstance(quantization, Quantization):
        q = quantization
        _refuse_blocks(q)
        group = q.block_size if "block_size" in q.model_fields_set else None  # else the format's own
        layout, skip = plain(q.format, group, dtype, q.double_quant), q.skip
    else:
        layout, skip = plain(quantization, None, dtype), None
    whole = everywhere(layout, [*((_HEAD,) if skip is None else skip), *model.unquantised])
    if not KINDS[layout.format].alone or not any(one.weight.stacked for one in parameters(model)):
        return whole

    def of(name: str, w: Weight) -> Layout | None:
        return whole(name, w) if w.stacked else None

    return of


_SMALLEST_BLOCK = {"nf4": 32, "fp4": 32}  # bitsandbytes 0.50 functional.py quantize_4bit


def _refuse_blocks(q: Quantization) -> None:
    """Raise SpecError for blocks that bitsandbytes does not make, -1 among them."""
    least, field = _SMALLEST_BLOCK.get(q.format, q.block_size), "method.quantization.block_size"
    if q.block_size < least:
        raise SpecError(f"{field}: {q.format} has no blocks of {q.block_size}; say {least} to 4,096", field)


def _as_published(model: ModelSpec, dtype: str) -> LayoutOf:
    """What the checkpoint's own config says, and nothing quantised where it says nothing."""
    config: Any = model.config.get(FIELD)
    if not isinstance(config, Mapping) or not config:
        return plainly
    return scheme_of(
        cast(Mapping[str, Any], config), dtype, str(model.config.get("expert_dtype", "")), model.model_type
    ).layout_of


def _rows(model: ModelSpec, layout_of: LayoutOf, dtype: str) -> Iterator[StoredWeight]:
    axes = model.axes()
    for name, w, shape in parameters(model):
        if w.group == "buffer" and not w.name.endswith(_KEPT):
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
    """Exact bytes of a tensor. A dtype `x/n` is one x for every n elements, rounded up; so is an axis `x*y/n`."""
    name, _, per = t.dtype.partition("/")
    numbers = prod(int(a) if a.isdigit() else shared(a, axes) if "/" in a else axes[a] for a in t.shape.split())
    return -(-numbers // int(per or 1)) * ITEMSIZE[name]
