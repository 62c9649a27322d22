"""A model in GGUF: the tensors and header of the file that llama.cpp writes for one of its file types."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from math import prod

from memplan.catalogue.quantization.gguf import (
    ALIASES,
    BARE,
    BLOCKS,
    BY_LAYER,
    FILE_TYPES,
    INSIDE,
    NEEDS_IMATRIX,
    OUTSIDE,
    PARTS,
    SOURCE,
    VALUES,
    Sizes,
    category,
    types_of,
)
from memplan.core.errors import UnknownNameError, UnsupportedModelError, printable
from memplan.core.records import NamedTuple
from memplan.models.configs import families
from memplan.models.model import ModelSpec
from memplan.program.stored.checkpoint import CheckpointParameter, parameters

ALIGNMENT = 32  # bytes; default of general.alignment
_PREFIX = "gguf:"
_MMPROJ_GROUPS = ("vision", "projector", "audio")  # in a file of their own, mmproj
_FIRST_VALUES = "blk.0.attn_v.weight"
_LAYER = re.compile(r"^(?:[a-z_]+\.)*?(?:layers|h|blocks)\.(\d+)\.")
_STORED_BUFFERS = ("e_score_correction_bias",)
# Bytes of the tokenizer in the header for each token: its text, the length of the text, and its type. A merge is two
# texts and a space. Texts are assumed to have 7 bytes on average.
_TEXT, _LENGTH, _TYPE = 7, 8, 4
_KEYS = 2048  # bytes of other keys, without a chat template


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file.

    name       name in the file
    type       ggml type, such as `Q4_K`
    shape      shape in torch's order
    bytes      size in the file
    parameter  parameter it is, or is part of, empty for computed tensors
    group      part of the model the parameter belongs to
    """

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    parameter: str
    group: str


class GgufFile(NamedTuple):
    """A GGUF file: its type, its tensors in order, and the bytes of its header, which are partly assumed."""

    file_type: str
    tensors: tuple[GgufTensor, ...]
    header: int

    @property
    def bytes(self) -> int:
        """Size of the file. Every tensor starts at a multiple of 32 bytes."""
        return _aligned(self.header) + sum(_aligned(tensor.bytes) for tensor in self.tensors)


def file_type_of(name: str) -> str | None:
    """Return the file type that a name means (`Q4_K_M`, `gguf:q4_k_m`), in any case, or None if it is not a file type.

    Raises UnknownNameError for an unknown name with the prefix `gguf:`.
    """
    stripped = name.strip()
    has_prefix = stripped.lower().startswith(_PREFIX)
    plain = (stripped[len(_PREFIX) :] if has_prefix else stripped).upper().replace("-", "_").removeprefix("UD_")
    plain = ALIASES.get(plain, plain)
    if plain in FILE_TYPES:
        return plain
    if has_prefix:
        raise UnknownNameError("method.quantization.format", stripped[len(_PREFIX) :], FILE_TYPES)
    return None


@lru_cache(maxsize=64)
def gguf_file(model: ModelSpec, file_type: str, imatrix: bool | None = None) -> GgufFile:
    """Return the file that llama.cpp's conversion script and quantize tool make of a model.

    file_type  one of `FILE_TYPES`
    imatrix    quantise with an importance matrix, which changes the type of a few tensors; None: only if the file type
               requires one

    Raises UnsupportedModelError for a family whose GGUF tensor names are not known.
    """
    architecture = model.family.checkpoint.gguf
    if not architecture:
        known = [name for name, row in families().items() if row.checkpoint.gguf]
        near = " or ".join(UnknownNameError("model", model.model_type, known).suggestions)
        raise UnsupportedModelError(
            f"model: tensor names of {printable(model.model_type, 40)} in GGUF are not known yet; the nearest known: "
            f"{near}",
            "model",
        )
    by_name: dict[str, tuple[tuple[int, ...], CheckpointParameter | None]] = {}
    for parameter in parameters(model):
        by_name.update({name: (shape, parameter) for name, shape in _tensors(model, parameter)})
    if _has_llama_3_rope(model):
        by_name["rope_freqs.weight"] = ((model.head_dim // 2,), None)
    order = sorted(by_name, key=lambda name: (_layer_of(name), name))
    sizes = Sizes(
        architecture=architecture,
        layers=model.num_hidden_layers,
        experts=model.axes().get("E", 0),
        ratio=0 if architecture in BY_LAYER and _FIRST_VALUES not in by_name else _heads_ratio(model),
        seventy=_is_70b(model, architecture),
        tied="output.weight" not in by_name,
        values=sum(category(name) in VALUES for name in order),
        imatrix=file_type in NEEDS_IMATRIX if imatrix is None else imatrix,
    )
    tensors: list[GgufTensor] = []
    for name, shape, kind in types_of([(name, by_name[name][0]) for name in order], file_type, sizes):
        elements, bytes_ = BLOCKS[kind]
        parameter = by_name[name][1]
        source, group = (parameter.name, parameter.weight.group) if parameter is not None else ("", "buffer")
        tensors.append(GgufTensor(name, kind, shape, prod(shape) // elements * bytes_, source, group))
    return GgufFile(file_type, tuple(tensors), _header(model, tensors))


@lru_cache(maxsize=64)
def names_in_gguf(model: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Return the names of each parameter's tensors in a GGUF file. Raises as `gguf_file`."""
    names: dict[str, tuple[str, ...]] = {}
    for t in gguf_file(model, "F16").tensors:
        names[t.parameter] = (*names.get(t.parameter, ()), t.name)
    return names


def _tensors(model: ModelSpec, parameter: CheckpointParameter) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names and shapes of a parameter's tensors in a file.

    Raises UnsupportedModelError if the parameter's GGUF name is not known.
    """
    w, shape = parameter.weight, parameter.shape
    if w.group in _MMPROJ_GROUPS or (w.group == "buffer" and not parameter.name.endswith(_STORED_BUFFERS)):
        return
    inside = _LAYER.match(parameter.name)
    in_layer = parameter.name[inside.end() :] if inside else parameter.name
    path, _, kind = in_layer.rpartition(".")
    if kind not in ("weight", "bias"):
        path, kind = in_layer, "bias" if in_layer.endswith("bias") else "weight"
    names = _names(model, path, inside is not None)
    if not names:
        raise UnsupportedModelError(
            f"model: the GGUF name of {printable(parameter.name, 80)} in a {model.model_type} is not known", "model"
        )
    shapes = [shape] if len(names) == 1 else list(_split_shapes(model, path, shape))
    for name, part in zip(names, shapes, strict=True):
        full = name if name in BARE else f"{name}.{kind}"
        yield (f"blk.{inside[1]}.{full}" if inside else full), part


def _names(model: ModelSpec, path: str, inside: bool) -> tuple[str, ...]:
    if not inside:
        name = OUTSIDE.get(path.rpartition(".")[2])
        return (name,) if name else ()
    name = model.family.checkpoint.gguf_modules.get(path) or INSIDE.get(path)
    names = PARTS.get(path) or ((name,) if name else ())
    dense = path.startswith("shared_mlp.") and "E" not in model.axes()  # a shared MLP in a model without experts
    return tuple(name.removesuffix("_shexp") for name in names) if dense else names


def _split_shapes(model: ModelSpec, path: str, shape: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Yield the shapes of the tensors that the conversion splits one parameter into."""
    axes = model.axes()
    match path.rpartition(".")[2]:
        case "wqkv" | "W_pack":
            for heads in (axes["a"], axes["k"], axes["k"]):
                yield heads * axes["d"], *shape[1:]
        case "kv_b_proj":  # for attention in the latent space: split by head, the keys' part transposed
            nope, values = model.config_int("qk_nope_head_dim"), model.config_int("v_head_dim")
            yield axes["a"], shape[1], nope
            yield axes["a"], values, shape[1]
        case "in_proj_qkvz":
            gate = model.config_int("linear_num_value_heads") * model.config_int("linear_value_head_dim")
            yield shape[0] - gate, *shape[1:]
            yield gate, *shape[1:]
        case "input_linear":
            yield from [(shape[0] // 2, *shape[1:])] * 2
        case _:  # gates and ups of experts
            yield from [(shape[0], shape[1] // 2, *shape[2:])] * 2


def _layer_of(name: str) -> int:
    """Return a tensor's layer, or -1 outside of layers: llama_model_loader::weight_name_comparer."""
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _heads_ratio(model: ModelSpec) -> int:
    """Return the query heads per key/value head in the first layer; with latent attention, all query heads."""
    first = model.layers[0] if model.layers else None
    if model.config.get("kv_lora_rank"):
        return model.num_attention_heads
    return model.num_attention_heads // (first.k if first is not None and first.k else model.num_key_value_heads)


def _is_70b(model: ModelSpec, architecture: str) -> bool:
    """Whether llama.cpp calls it 70B: src/models/llama.cpp, qwen2.cpp, olmo.cpp load_arch_hparams."""
    if model.num_hidden_layers != 80:
        return False
    if architecture == "llama":
        return model.num_attention_heads != model.num_key_value_heads
    return architecture in ("qwen2", "olmo")


def _has_llama_3_rope(model: ModelSpec) -> bool:
    """Whether the conversion writes a table of rotary factors: conversion/llama.py generate_extra_tensors."""
    for key in ("rope_scaling", "rope_parameters"):
        rope = model.config.get(key)
        if isinstance(rope, dict) and "llama3" in (rope.get("rope_type"), rope.get("type")):  # pyright: ignore[reportUnknownMemberType]
            return True
    return False


def _header(model: ModelSpec, tensors: list[GgufTensor]) -> int:
    """Return the bytes before the tensors: tensor descriptions (derived), and keys with the tokenizer (assumed)."""
    infos = sum(8 + len(t.name) + 4 + 8 * len(t.shape) + 4 + 8 for t in tensors)
    token = _LENGTH + _TEXT + _TYPE
    merge = _LENGTH + _TEXT + 1
    return 24 + _KEYS + infos + model.vocab_size * (token + merge)


def _aligned(n: int) -> int:
    return -(-n // ALIGNMENT) * ALIGNMENT


__all__ = ["SOURCE", "GgufFile", "GgufTensor", "file_type_of", "gguf_file", "names_in_gguf"]
