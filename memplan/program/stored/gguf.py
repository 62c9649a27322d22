"""A model as llama.cpp stores it: the tensors of its GGUF file in one of the tool's types of file, and the header."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import NamedTuple

from memplan.catalogue.quantization.gguf import (
    ALIASES,
    ARCHITECTURES,
    BARE,
    BLOCKS,
    BY_LAYER,
    FILE_TYPES,
    INSIDE,
    NEEDS_IMATRIX,
    OUTSIDE,
    OWN,
    PARTS,
    SOURCE,
    VALUES,
    Sizes,
    category,
    types_of,
)
from memplan.core.errors import UnknownNameError, UnsupportedModelError, printable
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import Parameter, parameters

ALIGNMENT = 32  # bytes; general.alignment where a file does not say another
_PREFIX = "gguf:"
_APART = ("vision", "projector", "audio")  # in a file of their own, mmproj
_VALUES_FIRST = "blk.0.attn_v.weight"
_LAYER = re.compile(r"^(?:[a-z_]+\.)*?(?:layers|h|blocks)\.(\d+)\.")
_KEPT = ("e_score_correction_bias",)  # buffers that a file has
# Bytes of a tokenizer in the header, of each token: its text with 8 bytes of length before it, its type, and of a
# tokenizer with merges one of those, which is two texts and a space. Texts are assumed to have 7 bytes on average.
_TEXT, _LENGTH, _TYPE = 7, 8, 4
_KEYS = 2048  # bytes of the other keys, without a chat template


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file: its name and type there, its shape as torch has it, and the parameter it is of."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    parameter: str
    group: str


class GgufFile(NamedTuple):
    """What a file has: its tensors in order, and the bytes before them, which are partly assumed."""

    file_type: str
    tensors: tuple[GgufTensor, ...]
    header: int

    @property
    def bytes(self) -> int:
        """The file's size: every tensor starts at a multiple of 32 bytes."""
        return _aligned(self.header) + sum(_aligned(tensor.bytes) for tensor in self.tensors)


def file_type_of(name: str) -> str | None:
    """The type of file that a name means (`Q4_K_M`, `gguf:q4_k_m`), in any case; None where it is no such.

    Raises UnknownNameError for a name that says it is one and is not known.
    """
    lowered = name.strip()
    said = lowered.lower().startswith(_PREFIX)
    plain = (lowered[len(_PREFIX) :] if said else lowered).upper().replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain in FILE_TYPES:
        return plain
    if said:
        raise UnknownNameError("method.quantization.format", lowered[len(_PREFIX) :], FILE_TYPES)
    return None


@lru_cache(maxsize=64)
def gguf_file(model: ModelSpec, file_type: str, imatrix: bool | None = None) -> GgufFile:
    """The file that llama.cpp's conversion and quantize tool make of a model.

    file_type  one of `FILE_TYPES`
    imatrix    whether it is quantised with an importance matrix, which moves a few tensors to other types; None: where
               the tool asks for one

    Raises UnsupportedModelError for a family whose tensors' names in GGUF are not known here.
    """
    architecture = ARCHITECTURES.get(model.model_type)
    if architecture is None:
        near = " or ".join(UnknownNameError("model", model.model_type, ARCHITECTURES).nearest)
        raise UnsupportedModelError(
            f"model: the tensors of a {printable(model.model_type, 40)} in GGUF are not known yet; the nearest that "
            f"are: {near}",
            "model",
        )
    found: dict[str, tuple[tuple[int, ...], Parameter | None]] = {}
    for of in parameters(model):
        found.update({name: (shape, of) for name, shape in _tensors(model, of)})
    if _rotates_as_llama_3(model):
        found["rope_freqs.weight"] = ((model.head_dim // 2,), None)
    order = sorted(found, key=lambda name: (_layer_of(name), name))
    sizes = Sizes(
        architecture=architecture,
        layers=model.num_hidden_layers,
        experts=model.axes().get("E", 0),
        ratio=0 if architecture in BY_LAYER and _VALUES_FIRST not in found else _ratio(model),
        seventy=_is_seventy(model, architecture),
        tied="output.weight" not in found,
        values=sum(category(name) in VALUES for name in order),
        imatrix=file_type in NEEDS_IMATRIX if imatrix is None else imatrix,
    )
    tensors: list[GgufTensor] = []
    for name, shape, kind in types_of([(name, found[name][0]) for name in order], file_type, sizes):
        elements, bytes_ = BLOCKS[kind]
        of = found[name][1]
        where, group = (of.name, of.weight.group) if of is not None else ("", "buffer")
        tensors.append(GgufTensor(name, kind, shape, prod(shape) // elements * bytes_, where, group))
    return GgufFile(file_type, tuple(tensors), _header(model, tensors))


def _tensors(model: ModelSpec, of: Parameter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a parameter's tensors in a file. Raises UnsupportedModelError for one that has no name."""
    w, shape = of.weight, of.shape
    if w.group in _APART or (w.group == "buffer" and not of.name.endswith(_KEPT)):
        return
    inside = _LAYER.match(of.name)
    whole = of.name[inside.end() :] if inside else of.name
    path, _, kind = whole.rpartition(".")
    if kind not in ("weight", "bias"):
        path, kind = whole, "bias" if whole.endswith("bias") else "weight"
    names = _names(model, path, inside is not None)
    if not names:
        raise UnsupportedModelError(
            f"model: {printable(of.name, 80)} of a {model.model_type} has no name in GGUF that is known here", "model"
        )
    shapes = [shape] if len(names) == 1 else list(_divided(model, path, shape))
    for name, part in zip(names, shapes, strict=True):
        full = name if name in BARE else f"{name}.{kind}"
        yield (f"blk.{inside[1]}.{full}" if inside else full), part


def _names(model: ModelSpec, path: str, inside: bool) -> tuple[str, ...]:
    if not inside:
        found = OUTSIDE.get(path.rpartition(".")[2])
        return (found,) if found else ()
    found = OWN.get(model.model_type, {}).get(path) or INSIDE.get(path)
    names = PARTS.get(path) or ((found,) if found else ())
    dense = path.startswith("shared_mlp.") and "E" not in model.axes()  # shared by experts that are not there
    return tuple(name.removesuffix("_shexp") for name in names) if dense else names


def _divided(model: ModelSpec, path: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """The shapes of the parts that the conversion makes of one parameter."""
    axes = model.axes()
    match path.rpartition(".")[2]:
        case "wqkv" | "W_pack":
            for heads in (axes["a"], axes["k"], axes["k"]):
                yield heads * axes["d"], *shape[1:]
        case "kv_b_proj":  # for attention in the latent space: the keys' part turned, both by head
            nope, values = model.whole("qk_nope_head_dim"), model.whole("v_head_dim")
            yield axes["a"], shape[1], nope
            yield axes["a"], values, shape[1]
        case "in_proj_qkvz":
            gate = model.whole("linear_num_value_heads") * model.whole("linear_value_head_dim")
            yield shape[0] - gate, *shape[1:]
            yield gate, *shape[1:]
        case "input_linear":
            yield from [(shape[0] // 2, *shape[1:])] * 2
        case _:  # gates and ups of experts
            yield from [(shape[0], shape[1] // 2, *shape[2:])] * 2


def _layer_of(name: str) -> int:
    """The layer of a tensor, -1 outside of layers: llama_model_loader::weight_name_comparer."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _ratio(model: ModelSpec) -> int:
    """Query heads to a head of keys and values in the first layer; all, where they share latent ones."""
    first = model.layers[0] if model.layers else None
    if model.config.get("kv_lora_rank"):
        return model.num_attention_heads
    return model.num_attention_heads // (first.k if first is not None and first.k else model.num_key_value_heads)


def _is_seventy(model: ModelSpec, architecture: str) -> bool:
    """Whether llama.cpp calls it 70B: src/models/llama.cpp, qwen2.cpp, olmo.cpp load_arch_hparams."""
    if model.num_hidden_layers != 80:
        return False
    if architecture == "llama":
        return model.num_attention_heads != model.num_key_value_heads
    return architecture in ("qwen2", "olmo")


def _rotates_as_llama_3(model: ModelSpec) -> bool:
    """Whether the conversion writes a table of rotary factors: conversion/llama.py generate_extra_tensors."""
    for key in ("rope_scaling", "rope_parameters"):
        said = model.config.get(key)
        if isinstance(said, dict) and "llama3" in (said.get("rope_type"), said.get("type")):  # pyright: ignore[reportUnknownMemberType]
            return True
    return False


def _header(model: ModelSpec, tensors: list[GgufTensor]) -> int:
    """Bytes before the tensors: their descriptions, which are derived, and the keys with the tokenizer, assumed."""
    infos = sum(8 + len(t.name) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    token = _LENGTH + _TEXT + _TYPE
    merge = _LENGTH + _TEXT + 1
    return 24 + _KEYS + infos + model.vocab_size * (token + merge)


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


__all__ = ["SOURCE", "GgufFile", "GgufTensor", "file_type_of", "gguf_file"]
