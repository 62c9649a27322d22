"""Compare a checkpoint's files with the model: notes on differences, errors if shapes contradict each other.

Names are those of transformers. If a family's files use other names than its model, tensors of a layer are taken to be
the same if their numbers of elements are equal.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Mapping
from functools import lru_cache
from math import prod

from memplan.catalogue import build
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import ConfigError, printable
from memplan.core.ir import Op, Weight
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.models.gguf import parameters_in
from memplan.models.headers import Checkpoint, StoredTensor, stored_bytes
from memplan.models.model import ModelSpec
from memplan.program.weight_sizes import shape_of

_PLAIN = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_MAX_KINDS = 3  # kinds of tensors that a note names
_MAX_NAME = 120  # characters of a tensor's name


class BuiltParameter(NamedTuple):
    """A parameter of the model: its shape, and the transposed shape if its file may have that."""

    shape: tuple[int, ...]
    turned: tuple[int, ...]

    @property
    def elements(self) -> int:
        return prod(self.shape)


def notes(model: ModelSpec) -> list[str]:
    """Return notes on the model's checkpoint. Raises ConfigError if a tensor's shape differs from the model's."""
    checkpoint = model.checkpoint
    if checkpoint is None:
        return []
    origin = [f"facts from the Hugging Face Hub: {checkpoint.where}"] if checkpoint.remote else []
    if checkpoint.why_not:
        return [*origin, f"the checkpoint was not looked at: {checkpoint.why_not}"]
    return [*origin, *(_gguf(model, checkpoint) if checkpoint.kind == "gguf" else _safetensors(model, checkpoint))]


def built_tensors(model: ModelSpec) -> Mapping[str, BuiltParameter]:
    """Map every parameter of the model by its name in transformers' state dict. A tied parameter occurs once."""
    return _built(model)[0]


class CheckpointParameter(NamedTuple):
    """A parameter or buffer of the model: its name in transformers' state dict, the weight, and its shape in torch."""

    name: str
    weight: Weight
    shape: tuple[int, ...]


@lru_cache(maxsize=64)
def parameters(model: ModelSpec) -> tuple[CheckpointParameter, ...]:
    """Return every parameter and buffer of the model in the order it uses them. A tied parameter occurs once."""
    stack, axes = build(model, Wiring("flash", "efficient")), model.axes()
    by_name: dict[str, CheckpointParameter] = {}

    def add(prefix: str, operations: Iterable[Op]) -> None:
        for op in operations:
            for w in op.weights:
                by_name.setdefault(prefix + w.name, CheckpointParameter(prefix + w.name, w, shape_of(w, axes)))

    add("", stack.before)
    first: dict[str, int] = {}  # number of earlier layers in each list of layers
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
    return tuple(by_name.values())


@lru_cache(maxsize=64)
def _built(model: ModelSpec) -> tuple[Mapping[str, BuiltParameter], frozenset[str]]:
    """Return the parameters by name, and the names of buffers."""
    by_name: dict[str, BuiltParameter] = {}
    buffers: set[str] = set()
    for name, w, shape in parameters(model):
        if w.group == "buffer":
            buffers.add(name)
        else:
            by_name[name] = BuiltParameter(shape, shape[::-1] if w.transposed else shape)
    return by_name, frozenset(buffers)


# Suffixes of the tensors that libraries store in place of a module's weight. Source: gptqmodel 7.7, bitsandbytes 0.50,
# transformers 5.24 quantizers/ serialized_names, compressed-tensors 0.20 compressors.
_PACKED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_format|activation_scale|input_scale"
    r"|weight_(packed|scale|shape|zero_point|global_scale|scale_inv|g_idx)"
    r"|weight\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.bitsandbytes__[a-z0-9]+))$"
)


_PACKED_STACK = re.compile(r"_(blocks|scales|scale_inv)$")


class CheckpointDifference(NamedTuple):
    """How a checkpoint differs from the model.

    extra    tensors that only the checkpoint has
    missing  names of parameters that only the model has
    buffers  tensors that are buffers of the model
    """

    extra: list[StoredTensor]
    missing: list[str]
    buffers: list[StoredTensor]


@lru_cache(maxsize=64)
def compare_checkpoint(model: ModelSpec, tensors: tuple[StoredTensor, ...]) -> CheckpointDifference:
    """Compare checkpoint and model by name. Raises ConfigError if a tensor's shape differs from its parameter's."""
    parameters = {_rootless(name): (name, parameter) for name, parameter in built_tensors(model).items()}
    layers = {_layer(name) for name in parameters}
    names = {_rootless(tensor.name) for tensor in tensors}
    extra: list[StoredTensor] = []
    packed: set[str] = set()  # layers whose matrices are stored packed, under names without a parameter
    missing = dict(parameters)
    for tensor in tensors:
        name = _rootless(tensor.name)
        owner = next((owner for owner in _owner_names(name) if owner in parameters), None)
        if owner is not None:
            missing.pop(owner, None)
            continue
        if name not in parameters:
            owner = next(_owner_names(name), "")
            if not owner or _layer(name) not in layers:
                extra.append(tensor)
            elif owner not in names:
                packed.add(_layer(name))
            continue
        missing.pop(name, None)
        _, parameter = parameters[name]
        squeezed = tuple(n for n in tensor.shape if n != 1)
        shapes = [tuple(n for n in shape if n != 1) for shape in parameter]
        if tensor.dtype in (*_PLAIN, "F8_E4M3", "F8_E5M2") and squeezed not in shapes:
            has, builds = " x ".join(map(str, tensor.shape)), " x ".join(map(str, parameter.shape))
            raise ConfigError(
                f"model: {_shown(tensor.name)} is {has} in the checkpoint, and {builds} by its config", "model"
            )
    missing_names = [name for name, _ in missing.values() if _layer(name) not in packed]
    buffer_names = {_rootless(name) for name in _built(model)[1]}
    buffers = [tensor for tensor in extra if _rootless(tensor.name) in buffer_names]
    others = [tensor for tensor in extra if _rootless(tensor.name) not in buffer_names]
    return _without_renamed_layers(CheckpointDifference(others, missing_names, buffers), built_tensors(model))


_EXPERT = re.compile(r"\.experts\.\d+\.(\w+?)(_proj)?\.")


def owners(model: ModelSpec, names: Iterable[str]) -> Iterator[CheckpointParameter | None]:
    """Yield the parameter that each tensor of a checkpoint is, or is part of; None if its name does not tell."""
    by_name = {_rootless(parameter.name): parameter for parameter in parameters(model)}

    def owner(name: str) -> CheckpointParameter | None:
        parameter = next((by_name[full] for full in (name, *_owner_names(name)) if full in by_name), None)
        expert = _EXPERT.search(name) if parameter is None else None
        if expert is None:
            return parameter
        stack = f"{name[: expert.start()]}.experts."
        last = "down_proj" if expert[1] in ("down", "w2") else "gate_up_proj"
        return by_name.get(stack + last) or by_name.get(f"{stack}{expert[1]}_proj")

    return (owner(_rootless(name)) for name in names)


def _owner_names(name: str) -> Iterator[str]:
    """Yield the parameters that a tensor may be part of, if its name is one of those under which libraries store
    quantised weights."""
    owner = _PACKED.sub("", name)
    if owner != name:
        yield f"{owner}.weight"
    owner = _PACKED_STACK.sub("", name)
    if owner != name:
        yield owner


def _without_renamed_layers(
    comparison: CheckpointDifference, parameters: Mapping[str, BuiltParameter]
) -> CheckpointDifference:
    """Drop layers in which the checkpoint has as many elements as the model, under other names."""
    has: dict[str, int] = {}
    builds: dict[str, int] = {}
    for tensor in comparison.extra:
        layer = _layer(tensor.name)
        has[layer] = has.get(layer, 0) + tensor.elements
    for name in comparison.missing:
        layer = _layer(name)
        builds[layer] = builds.get(layer, 0) + parameters[name].elements
    same = {layer for layer, elements in has.items() if builds.get(layer) == elements}
    return CheckpointDifference(
        [tensor for tensor in comparison.extra if _layer(tensor.name) not in same],
        [name for name in comparison.missing if _layer(name) not in same],
        comparison.buffers,
    )


def _safetensors(model: ModelSpec, checkpoint: Checkpoint) -> Iterator[str]:
    comparison = compare_checkpoint(model, checkpoint.tensors)
    if comparison.extra:
        bytes_ = sum(tensor.bytes for tensor in comparison.extra)
        layers = {_layer(name) for name in built_tensors(model)}
        kinds = _kinds((t.name for t in comparison.extra), layers)
        yield f"the checkpoint also has {kinds} ({gib(bytes_)}): not in the model"
    if comparison.missing:
        yield f"the checkpoint does not have {_kinds(comparison.missing)}: newly initialised when the model is loaded"
    dtypes = stored_bytes(checkpoint.tensors)
    if model.get("quantization_config"):
        yield f"the checkpoint has {_by_type(dtypes)}"
    most = next(iter(dtypes), "")
    config_dtype = model.get("dtype") or model.get("torch_dtype")
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
    if most in _PLAIN and isinstance(config_dtype, str) and names.get(config_dtype, most) != most:
        yield f"the checkpoint is stored in {most} ({gib(dtypes[most])}), though its config says {config_dtype}"


def _gguf(model: ModelSpec, checkpoint: Checkpoint) -> Iterator[str]:
    has = parameters_in(checkpoint.tensors)
    builds = sum(parameter.elements for parameter in built_tensors(model).values())
    if has != builds:
        raise ConfigError(
            f"model: {checkpoint.where} has {has:,} parameters, but a {model.model_type} of its sizes has {builds:,}; "
            "give the model's config.json",
            "model",
        )
    yield f"the GGUF file has {_by_type(stored_bytes(checkpoint.tensors))}, which transformers trains dequantised"


def _by_type(dtypes: Mapping[str, int]) -> str:
    """Return the total bytes in words, with the bytes of the largest dtypes."""
    most = ", ".join(f"{dtype} {gib(n)}" for dtype, n in list(dtypes.items())[:_MAX_KINDS])
    return f"{gib(sum(dtypes.values()))} of tensors ({most})"


def _kinds(names: Iterable[str], layers: Container[str] = ()) -> str:
    """Return the names in words, with equal names of several layers merged: "32 × model.layers.*.self_attn.q_norm".

    If `layers` are given, all names of any other layer are merged: "7 × model.layers.61.*".
    """
    kinds: dict[str, int] = {}
    for name in names:
        layer = _layer(name)
        kind = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        if layers and layer and layer not in layers:
            kind = f"{name[: name.index(layer)]}{layer}.*"
        kinds[kind] = kinds.get(kind, 0) + 1
    shown = [f"{n} × {_shown(kind)}" if n > 1 else _shown(kind) for kind, n in list(kinds.items())[:_MAX_KINDS]]
    rest = len(kinds) - len(shown)
    listed = [*shown, f"{rest} more"] if rest else shown
    return f"{', '.join(listed[:-1])} and {listed[-1]}" if len(listed) > 1 else listed[0]


_ROOT = re.compile(r"^((base_model|language_model|model|transformer)\.)+")


def _rootless(name: str) -> str:
    """Return a name without the prefixes of classes around the decoder, which not every file has."""
    return _ROOT.sub("", name)


def _layer(name: str) -> str:
    """Return a tensor's layer: its name up to the first number, or an empty string outside of layers."""
    match = re.match(r".*?\.\d+(?=\.)", _rootless(name))
    return match[0] if match else ""


def _shown(name: str) -> str:
    return printable(name, _MAX_NAME)
