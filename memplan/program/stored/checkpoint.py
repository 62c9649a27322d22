"""What a checkpoint's files hold, beside what the model builds: notes of what differs, errors where shapes contradict.

Names are transformers'. Where a family's files have other names than its model, and the numbers of elements in a layer
are the same, they are the same tensors.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import lru_cache
from math import prod
from typing import NamedTuple

from memplan.catalogue import build
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import ConfigError, printable
from memplan.core.ir import Op, Weight
from memplan.core.units import gib
from memplan.models.gguf import parameters_in
from memplan.models.headers import Checkpoint, StoredTensor, stored_bytes
from memplan.models.model import ModelSpec
from memplan.program.graph import shape_of

_PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_NAMED = 3  # kinds of tensors that a note names
_LONGEST = 120  # letters of a tensor's name


class Built(NamedTuple):
    """A parameter of the model: its shape, and the one its file may have too."""

    shape: tuple[int, ...]
    turned: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


def notes(model: ModelSpec) -> list[str]:
    """What an answer says of the model's checkpoint. Raises ConfigError where a tensor has another shape."""
    seen = model.checkpoint
    if seen is None:
        return []
    facts = [f"facts from the Hugging Face Hub: {seen.where}"] if seen.remote else []
    if seen.why_not:
        return [*facts, f"the checkpoint was not looked at: {seen.why_not}"]
    return [*facts, *(_gguf(model, seen) if seen.kind == "gguf" else _safetensors(model, seen))]


def built_tensors(model: ModelSpec) -> Mapping[str, Built]:
    """Every parameter of the model by the name it has in transformers' state dict; a tied one once."""
    return _built(model)[0]


class Parameter(NamedTuple):
    """A parameter or buffer of the model by its name in transformers' state dict, and its shape as torch has it."""

    name: str
    weight: Weight
    shape: tuple[int, ...]


@lru_cache(maxsize=64)
def parameters(model: ModelSpec) -> tuple[Parameter, ...]:
    """Every parameter and buffer of the model in the order it uses them; a tied one once."""
    stack, axes = build(model, Wiring("flash", "efficient")), model.axes()
    found: dict[str, Parameter] = {}

    def add(prefix: str, operations: Iterable[Op]) -> None:
        for op in operations:
            for w in op.weights:
                found.setdefault(prefix + w.name, Parameter(prefix + w.name, w, shape_of(w, axes)))

    add("", stack.before)
    first: dict[str, int] = {}  # how many layers there were before, of every list of layers
    for run in stack.runs:
        add("", run.before)
        for block in run.blocks:
            first.setdefault(block.name, 0)
        period, copies = len(run.blocks), axes[run.times]
        for copy in range(copies):
            for i, block in enumerate(run.blocks):
                add(f"{block.name}.{first[block.name] + copy * period + i}.", block.ops)
        for name in {block.name for block in run.blocks}:
            first[name] += period * copies
    add("", stack.after)
    return tuple(found.values())


@lru_cache(maxsize=64)
def _built(model: ModelSpec) -> tuple[Mapping[str, Built], frozenset[str]]:
    """The parameters, and the names of buffers."""
    found: dict[str, Built] = {}
    buffers: set[str] = set()
    for name, w, shape in parameters(model):
        if w.group == "buffer":
            buffers.add(name)
        else:
            found[name] = Built(shape, shape[::-1] if w.transposed else shape)
    return found, frozenset(buffers)


# What libraries call the tensors that stand for a module's weight. Source: gptqmodel 7.7, bitsandbytes 0.50,
# transformers 5.24 quantizers/ serialized_names, compressed-tensors 0.20 compressors.
_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|activation_scale|input_scale"
    r"|weight_(packed|scale|shape|zero_point|global_scale|scale_inv|g_idx)"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__[a-z0-9]+))$"
)


_PACKED_STACK = re.compile(r"_(blocks|scales|scale_inv)$")


class Compared(NamedTuple):
    """The tensors that only the checkpoint has, the names of parameters that only the model has, and the tensors that
    are buffers of the model."""

    extra: list[StoredTensor]
    missing: list[str]
    buffers: list[StoredTensor]


@lru_cache(maxsize=64)
def compared(model: ModelSpec, tensors: tuple[StoredTensor, ...]) -> Compared:
    """Checkpoint and model, name by name. Raises ConfigError where one tensor has two shapes."""
    parameters = {_rootless(name): (name, one) for name, one in built_tensors(model).items()}
    layers = {_layer(name) for name in parameters}
    names = {_rootless(tensor.name) for tensor in tensors}
    extra: list[StoredTensor] = []
    packed: set[str] = set()  # layers with matrices that are in no tensor of their own shape
    missing = dict(parameters)
    for tensor in tensors:
        name = _rootless(tensor.name)
        whole = next((owner for owner in _wholes(name) if owner in parameters), None)
        if whole is not None:
            missing.pop(whole, None)
            continue
        if name not in parameters:
            part = next(_wholes(name), "")
            if not part or _layer(name) not in layers:
                extra.append(tensor)
            elif part not in names:
                packed.add(_layer(name))
            continue
        missing.pop(name, None)
        _, one = parameters[name]
        squeezed = tuple(n for n in tensor.shape if n != 1)
        shapes = [tuple(n for n in shape if n != 1) for shape in one]
        if tensor.dtype in (*_PLAIN, "F8_E4M3", "F8_E5M2") and squeezed not in shapes:
            has, builds = " x ".join(map(str, tensor.shape)), " x ".join(map(str, one.shape))
            raise ConfigError(
                f"model: {_shown(tensor.name)} is {has} in the checkpoint, and {builds} by its config", "model"
            )
    lacks = [name for name, _ in missing.values() if _layer(name) not in packed]
    known = {_rootless(name) for name in _built(model)[1]}
    buffers = [tensor for tensor in extra if _rootless(tensor.name) in known]
    others = [tensor for tensor in extra if _rootless(tensor.name) not in known]
    return _same_elsewhere(Compared(others, lacks, buffers), built_tensors(model))


_EXPERT = re.compile(r"\.experts\.\d+\.(\w+?)(_proj)?\.")


def owners(model: ModelSpec, names: Iterable[str]) -> Iterator[Parameter | None]:
    """The parameter that each tensor of a checkpoint is, or is a part of; None where that is not found by its name."""
    known = {_rootless(one.name): one for one in parameters(model)}

    def of(name: str) -> Parameter | None:
        found = next((known[whole] for whole in (name, *_wholes(name)) if whole in known), None)
        expert = _EXPERT.search(name) if found is None else None
        if expert is None:
            return found
        stack = f"{name[: expert.start()]}.experts."
        last = "down_proj" if expert[1] in ("down", "w2") else "gate_up_proj"
        return known.get(stack + last) or known.get(f"{stack}{expert[1]}_proj")

    return (of(_rootless(name)) for name in names)


def _wholes(name: str) -> Iterator[str]:
    """The parameters that a tensor may be a part of, where it is a part of how a library stores one."""
    whole = _PACKED.sub("", name)
    if whole != name:
        yield f"{whole}.weight"
    whole = _PACKED_STACK.sub("", name)
    if whole != name:
        yield whole


def _same_elsewhere(found: Compared, parameters: Mapping[str, Built]) -> Compared:
    """Without the layers in which the checkpoint has as many elements as the model, under other names."""
    has: dict[str, int] = {}
    builds: dict[str, int] = {}
    for tensor in found.extra:
        layer = _layer(tensor.name)
        has[layer] = has.get(layer, 0) + tensor.elements
    for name in found.missing:
        layer = _layer(name)
        builds[layer] = builds.get(layer, 0) + parameters[name].elements
    same = {layer for layer, elements in has.items() if builds.get(layer) == elements}
    return Compared(
        [tensor for tensor in found.extra if _layer(tensor.name) not in same],
        [name for name in found.missing if _layer(name) not in same],
        found.buffers,
    )


def _safetensors(model: ModelSpec, seen: Checkpoint) -> Iterator[str]:
    found = compared(model, seen.tensors)
    if found.extra:
        bytes_ = sum(tensor.bytes for tensor in found.extra)
        layers = {_layer(name) for name in built_tensors(model)}
        kinds = _kinds((t.name for t in found.extra), layers)
        yield f"the checkpoint also has {kinds} ({gib(bytes_)}): not in the model"
    if found.missing:
        yield f"the checkpoint lacks {_kinds(found.missing)}: made anew when the model is loaded"
    dtypes = stored_bytes(seen.tensors)
    if model.get("quantization_config"):
        yield f"the checkpoint has {_by_type(dtypes)}"
    most = next(iter(dtypes), "")
    said = model.get("dtype") or model.get("torch_dtype")
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if most in _PLAIN and isinstance(said, str) and names.get(said, most) != most:
        yield f"the checkpoint is stored in {most} ({gib(dtypes[most])}), though its config says {said}"


def _gguf(model: ModelSpec, seen: Checkpoint) -> Iterator[str]:
    has = parameters_in(seen.tensors)
    builds = sum(one.elements for one in built_tensors(model).values())
    if has != builds:
        raise ConfigError(
            f"model: {seen.where} has {has:,} parameters, and a {model.model_type} of its sizes {builds:,}; give the "
            "model's config.json",
            "model",
        )
    yield f"the GGUF file has {_by_type(stored_bytes(seen.tensors))}, which transformers trains dequantised"


def _by_type(dtypes: Mapping[str, int]) -> str:
    """Bytes of tensors, and of which dtypes most of them are."""
    most = ", ".join(f"{dtype} {gib(n)}" for dtype, n in list(dtypes.items())[:_NAMED])
    return f"{gib(sum(dtypes.values()))} of tensors ({most})"


def _kinds(names: Iterable[str], layers: Container[str] = ()) -> str:
    """Names with what they share said once: "32 × model.layers.*.self_attn.rotary_emb.inv_freq"; of `layers`, where
    they are given, those of any other in one: "7 × model.layers.61.*"."""
    kinds: dict[str, int] = {}
    for name in names:
        layer = _layer(name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if layers and layer and layer not in layers:
            kind = f"{name[: name.index(layer)]}{layer}.*"
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = [f"{n} × {_shown(kind)}" if n > 1 else _shown(kind) for kind, n in list(kinds.items())[:_NAMED]]
    rest = len(kinds) - len(shown)
    listed = [*shown, f"{rest} more"] if rest else shown
    return f"{', '.join(listed[:-1])} and {listed[-1]}" if len(listed) > 1 else listed[0]


_ROOT = re.compile(r"^((base_model|language_model|model|transformer)\.)+")


def _rootless(name: str) -> str:
    """A name without what classes around the decoder put before it, which is not in every file."""
    return _ROOT.sub("", name)


def _layer(name: str) -> str:
    """The layer a tensor is in, by what its name begins with up to the first number; empty outside of layers."""
    found = re.match(r".*?\.\d+(?=\.)", _rootless(name))
    return found[0] if found else ""


def _shown(name: str) -> str:
    return printable(name, _LONGEST)
