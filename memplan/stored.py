"""The weights of a model as they are stored to run it: every tensor that stands for a parameter, and its bytes.

What is counted are the tensors themselves, as a checkpoint has them: the same for every engine that does not repack
them. Nothing here is about training (`memplan.prequantized` is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

from memplan.catalogue.gguf import FILE_TYPES
from memplan.catalogue.gguf import SOURCE as QUANTIZE
from memplan.catalogue.storage import KINDS, Layout, parts_of, plain
from memplan.checkpoint import parameters
from memplan.engine.walk import shared
from memplan.errors import UnknownNameError
from memplan.gguf import file_type_of, gguf_file
from memplan.ir import Tensor, Weight
from memplan.models import ModelSpec
from memplan.spec import Quantization
from memplan.units import ITEMSIZE

_HEAD = "lm_head"
# Buffers that checkpoints hold beside the parameters; the others are made anew.
_KEPT = ("e_score_correction_bias", "tid2eid", "layer_scalar", "input_max", "input_min", "output_max", "output_min")

LayoutOf = Callable[[str, Weight], Layout | None]


class StoredWeight(NamedTuple):
    """A tensor of the weights as they are stored.

    name    the parameter it stands for, by its name in transformers' state dict (`model.layers.0.mlp.up_proj.weight`)
    part    the tensor's own name, where it is one of several in place of the parameter (`weight_scale`)
    dtype   of its elements: memplan's word, or ggml's (`Q4_K`) in a GGUF file
    shape   the parameter's as torch has it, whatever the tensor's
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

    quantization  a format by name: one of `memplan.catalogue.storage.KINDS` (`fp8`, `w4a16`, `awq-int4`), or a type of
                  GGUF file (`Q4_K_M`, `gguf:Q4_K_M`); one with its settings; or None for plain weights
    dtype         of what is not quantised: embeddings, norms, routers, the head: `bf16`, `fp16` or `fp32`. A GGUF file
                  has types of its own for those

    Raises UnknownNameError for a format that is not known, UnsupportedModelError for a family whose tensors have no
    names in GGUF that are known. The sum of `bytes` is what the weights take.
    """
    return _stored(model, quantization, dtype)


def format_of(name: str) -> str:
    """The format a name means, in any case. Raises UnknownNameError with the nearest ones."""
    found = name.strip().lower().replace("_", "-")
    if found in KINDS:
        return found
    file_type = file_type_of(name)
    if file_type is None:
        raise UnknownNameError("method.quantization.format", name, (*KINDS, *FILE_TYPES))
    return file_type


@lru_cache(maxsize=64)
def _stored(model: ModelSpec, quantization: str | Quantization | None, dtype: str) -> tuple[StoredWeight, ...]:
    if isinstance(quantization, str):
        quantization = format_of(quantization)
        if quantization in FILE_TYPES:
            return tuple(_in_gguf(model, quantization))
    layout_of = _plainly if quantization is None else _one_format(model, quantization, dtype)
    return tuple(_rows(model, layout_of, dtype))


def _in_gguf(model: ModelSpec, file_type: str) -> Iterator[StoredWeight]:
    """The tensors of a GGUF file, of which one parameter may have several."""
    for t in gguf_file(model, file_type).tensors:
        yield StoredWeight(t.parameter or t.name, t.name, t.type, t.shape, t.bytes, t.group, QUANTIZE)


def _plainly(_: str, __: Weight) -> Layout | None:
    """Nothing is quantised."""


def _one_format(model: ModelSpec, quantization: str | Quantization, dtype: str) -> LayoutOf:
    """Every matrix in one format, but for the head, routers, and what the run or the model leaves out."""
    if isinstance(quantization, Quantization):
        q = quantization
        layout = plain(q.format, q.block_size, dtype, q.double_quant)
        skip = q.skip if q.skip is not None else (_HEAD,)
    else:
        layout, skip = plain(quantization, None, dtype), (_HEAD,)
    left = {*skip, *model.unquantised}

    def of(name: str, w: Weight) -> Layout | None:
        whole = w.stacked and not KINDS[layout.format].experts
        return layout if takes(w) and not whole and left.isdisjoint(name.split(".")) else None

    return of


def takes(w: Weight) -> bool:
    """Whether formats for running a model take a weight: a linear layer's matrix or a stack of experts, no router, and
    nothing that its class keeps in a dtype of its own."""
    return ((w.matrix and not w.viewed) or w.stacked) and w.group not in ("router", "embedding") and not w.dtype


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
