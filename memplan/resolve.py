"""What a run leaves open is decided here, and what memplan does not support yet is refused here.

A profile (a framework and its version) says what `null` means: `transformers-5` is transformers 5 with peft 0.21,
bitsandbytes 0.50 and torch 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from memplan.cards import find_model
from memplan.catalogue.attention import Wiring
from memplan.catalogue.methods import ADAPTERS, Recipe
from memplan.catalogue.states import spares_embeddings
from memplan.errors import SpecError, UnknownNameError
from memplan.gpus import GPU, ambiguous_with, find_gpu
from memplan.graph import Graph, adaptable, attention_dtype, modules
from memplan.models import ModelSpec
from memplan.program import Structure
from memplan.spec import Kernels, Loop, Method, Optimizer, Parallelism, Part, Precision, RunSpec

_ONE_GPU = Parallelism()
PROFILES = ("transformers-5",)
_PEFT_ALPHA = 8.0  # peft 0.21 LoraConfig.lora_alpha; memory does not depend on it


class Decided(NamedTuple):
    """A run with nothing left open but its batch.

    `half` is whether attention computes in 16 bits, `large_tiles` whether the card's shared memory holds tiles of
    128 x 128; `parts` are the spec's parts with every null filled in.
    """

    structure: Structure
    gpu: GPU | None
    half: bool
    large_tiles: bool
    notes: tuple[str, ...]
    parts: dict[str, Part]


def decide(run: RunSpec) -> Decided:
    """Fill in every null of the run. Raises SpecError, UnknownNameError, ConfigError or FactsMissingError."""
    _refuse_unsupported(run)
    model = find_model(run.model)
    window = model.sliding_window
    return _decide(
        model,
        run.method,
        run.precision,
        run.optimizer,
        run.kernels,
        run.loop,
        run.gpu,
        run.batch.accumulation > 1,
        window is not None and run.batch.sequence >= window,
    )


def check_batch(run: RunSpec, model: ModelSpec) -> str | None:
    """A note where the sequence is longer than the model's positions; SpecError where positions are learned."""
    most = model.max_position_embeddings
    if most is None or run.batch.sequence <= most:
        return None
    if model.learned_positions:
        raise SpecError(
            f"batch.sequence: {run.batch.sequence} tokens, but {model.name or model.model_type} has learned positions "
            f"for {most}",
            "batch.sequence",
        )
    return f"sequence {run.batch.sequence} is beyond the {most} positions of the model's config"


def _refuse_unsupported(run: RunSpec) -> None:
    """A field or value of the contract that is not supported yet is an error that says so, never ignored."""
    if run.profile not in PROFILES:
        raise UnknownNameError("profile", run.profile, PROFILES)
    if run.task != "train":
        raise SpecError(f"task: {run.task!r} is not supported yet; supported: train", "task")
    if run.parallelism != _ONE_GPU:
        changed = [f for f in Parallelism.model_fields if getattr(run.parallelism, f) != getattr(_ONE_GPU, f)]
        raise SpecError(f"parallelism.{changed[0]}: several GPUs and offloading are not supported yet", "parallelism")
    for field, value, message in _unsupported(run):
        raise SpecError(f"{field}: {value!r} is not supported yet; {message}", field)


def _unsupported(run: RunSpec) -> Iterator[tuple[str, object, str]]:
    if run.batch.new_tokens:
        yield "batch.new_tokens", run.batch.new_tokens, "training generates nothing"
    if run.kernels.checkpointing not in ("none", "full"):
        yield "kernels.checkpointing", run.kernels.checkpointing, "supported: none, full"
    if run.kernels.fused:
        yield "kernels.fused", list(run.kernels.fused), "only the loss can be fused (kernels.loss)"
    if run.kernels.compile:
        yield "kernels.compile", True, "supported: false"
    if run.precision.compute in ("fp8", "float8"):
        yield "precision.compute", run.precision.compute, "supported: bf16, fp16, fp32"
    if run.method.options:
        yield "method.options", dict(run.method.options), "LoRA and DoRA have none that memory depends on"
    q = run.method.quantization
    if q is not None and q.format not in ("nf4", "fp4", "int8"):
        yield "method.quantization.format", q.format, "supported: nf4, fp4, int8"
    if q is not None and q.storage != "uint8":
        yield "method.quantization.storage", q.storage, "supported: uint8"


@lru_cache(maxsize=4096)
def _decide(
    model: ModelSpec,
    method: Method,
    precision: Precision,
    optimizer: Optimizer,
    kernels: Kernels,
    loop: Loop,
    gpu_name: str | None,
    accumulates: bool,
    windowed: bool,
) -> Decided:
    notes: list[str] = []
    gpu = find_gpu(gpu_name) if gpu_name is not None else None
    if gpu is not None and gpu_name is not None:
        notes += _gpu_notes(gpu, gpu_name)
    precision, method, optimizer = _precision(precision), _method(method), _optimizer(optimizer)
    compute = str(precision.compute)
    if gpu is not None and compute == "bf16" and "bf16" not in gpu.native_dtypes:
        notes.append(f"bf16 is not native to {gpu.title}: slow or refused there; fp16 takes the same memory")
    recipe, more = _recipe(model, method, precision)
    notes += more
    capability = gpu.compute_capability if gpu else None
    seen = _attention_dtype(model, recipe)
    graph = Graph(
        model,
        recipe,
        _wiring(model, kernels.attention, seen, recipe, capability, loop.padded, windowed),
        checkpoint=kernels.checkpointing == "full",
        loss=kernels.loss,
        hold_outputs=loop.hold_outputs,
        rank=method.rank,
        trainable_layers=min(method.trainable_layers, model.num_hidden_layers) if method.kind == "freeze" else 0,
    )
    structure = Structure(
        graph,
        accumulates=accumulates and not optimizer.in_backward,
        optimizer=optimizer.name,
        foreach=optimizer.foreach if optimizer.name in _FOREACH else None,
        state_dtype=optimizer.state_dtype,
        momentum=optimizer.momentum,
        in_backward=optimizer.in_backward,
        grads=precision.grads if precision.grads != precision.weights else None,
        master=precision.master,
        clips=bool(loop.clip_grad_norm) and not optimizer.in_backward,
        scales=loop.grad_scaler,
        trainer=loop.trainer,
    )
    if spares_embeddings(optimizer.name) and not loop.trainer and (method.kind == "full" or method.modules_to_save):
        notes.append(
            f"under transformers' Trainer, {optimizer.name} keeps the states of embeddings in fp32: "
            "say so with loop.trainer (--trainer)"
        )
    if accumulates and optimizer.in_backward:
        raise SpecError("optimizer.in_backward: needs batch.accumulation 1", "optimizer.in_backward")
    large_tiles = capability is None or capability[0] in (9, 10) or capability == (8, 0)
    parts: dict[str, Part] = {"method": method, "precision": precision, "optimizer": optimizer}
    return Decided(structure, gpu, seen != "fp32", large_tiles, tuple(notes), parts)


def _gpu_notes(gpu: GPU, typed: str) -> Iterator[str]:
    others = ambiguous_with(typed)
    if others:
        yield f"{typed!r} is taken as {gpu.title}; also: {', '.join(o.name for o in others)}"
    if gpu.driver_basis == "rule":
        yield f"no driver reading of {gpu.title}'s usable memory was found: a conservative rule stands in for it"
    if gpu.vendor != "NVIDIA":
        yield f"kernels are taken as on an NVIDIA card of compute capability 8.0, not measured on {gpu.vendor}"


def _precision(p: Precision) -> Precision:
    compute = p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)
    return p.model_copy(update={"compute": compute, "grads": p.grads or p.weights})


def _method(m: Method) -> Method:
    if m.kind not in ADAPTERS:
        return m
    return m.model_copy(update={"alpha": m.alpha or _PEFT_ALPHA, "adapter_dtype": m.adapter_dtype or "fp32"})


def _optimizer(o: Optimizer) -> Optimizer:
    if o.foreach and o.name not in _FOREACH:
        raise SpecError(
            f"optimizer.foreach: {o.name} has no foreach step; {', '.join(_FOREACH)} have", "optimizer.foreach"
        )
    foreach = o.foreach if o.foreach is not None else o.name in _FOREACH
    momentum = o.momentum if o.momentum is not None else 0.0
    return o.model_copy(update={"foreach": foreach, "momentum": momentum})


_FOREACH = ("adamw_torch", "sgd", "adagrad", "rmsprop")  # torch.optim's own: lists by default, a loop on demand


def _attention_dtype(model: ModelSpec, recipe: Recipe) -> str:
    """The dtype attention computes in. Whether norms that were cast to fp32 hand on fp32 depends on the family."""
    if recipe.autocast:
        return recipe.compute
    return attention_dtype(model, recipe) if recipe.preparation else recipe.weights


def _wiring(
    model: ModelSpec,
    attention: str,
    dtype: str,
    recipe: Recipe,
    capability: tuple[int, int] | None,
    padded: bool,
    windowed: bool,
) -> Wiring:
    """The kernel torch takes: flash needs 16 bits, no mask, compute capability 8 and heads up to 256 wide; the
    memory-efficient one needs head widths of a multiple of 16 bytes; what is left is the plain product. For flash
    attention 2 transformers itself casts fp32 queries to the dtype the model was loaded in, or autocast's.

    Source: torch 2.13 aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, transformers 5.24
    integrations/flash_attention.py get_target_dtype.
    """
    half = dtype != "fp32"
    aligned = model.head_dim % (8 if half else 4) == 0
    efficient = "efficient" if aligned else "math"
    if attention == "eager":
        return Wiring("eager", "eager", padded, windowed)
    if attention == "sdpa_math":
        return Wiring("math", "math", padded, windowed)
    if attention == "sdpa_efficient":
        return Wiring(efficient, efficient, padded, windowed)
    if attention == "flash_attention_2":
        target = recipe.compute if recipe.autocast else recipe.weights
        if target == "fp32":
            raise SpecError("kernels.attention: flash_attention_2 needs bf16 or fp16", "kernels.attention")
        if capability is not None and capability < (8, 0):
            raise SpecError(
                "kernels.attention: flash_attention_2 needs compute capability 8.0 or later", "kernels.attention"
            )
        return Wiring("flash_2", "flash_2", padded, windowed, target)
    flash = half and model.head_dim <= 256 and (capability is None or capability >= (8, 0))
    return Wiring("flash" if flash else efficient, efficient, padded, windowed)


def _recipe(model: ModelSpec, method: Method, precision: Precision) -> tuple[Recipe, list[str]]:
    compute, autocast = str(precision.compute), precision.autocast
    if method.kind in ("full", "freeze"):
        if method.quantization is not None:
            raise SpecError(f"method.quantization: {method.kind} does not train quantised weights", "method")
        return Recipe(method.kind, precision.weights, compute, autocast), []
    q = method.quantization
    if method.kind in ("lora", "dora") and q is not None:
        raise SpecError(f"method.quantization: use q{method.kind} for quantised weights", "method.quantization")
    targets, notes = _targets(model, method)
    saved = tuple(_module(model, name) for name in method.modules_to_save)
    recipe = Recipe(
        method.kind,
        precision.weights,
        compute if q is None or compute != "fp32" else precision.weights,
        autocast,
        targets,
        saved,
        method.dropout > 0,
        str(method.adapter_dtype),
    )
    if q is None:
        return recipe, notes
    preparation = {True: "fp32", False: "", "trl": "trl"}[q.kbit_preparation]
    if q.format == "int8":
        notes.append("LLM.int8 layers hold their inputs until the step ends, with or without checkpointing")
    return recipe._replace(
        quantization=q.format,
        double_quant=q.double_quant and q.format != "int8",
        block_size=q.block_size,
        skip=q.skip,
        preparation=preparation,
    ), notes


# A role that a family may have fused into one matrix, and what the fused ones are called.
_FUSED = {
    **dict.fromkeys(
        ("q_proj", "k_proj", "v_proj"),
        ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack"),
    ),
    **dict.fromkeys(("gate_proj", "up_proj"), ("gate_up_proj", "dense_h_to_4h", "c_fc", "fc1", "w1")),
    "o_proj": ("dense", "out_proj", "c_proj", "wo"),
    "down_proj": ("dense_4h_to_h", "c_proj", "fc2", "w2"),
}


def _targets(model: ModelSpec, method: Method) -> tuple[tuple[str, ...], list[str]]:
    """The names of the layers the adapters take, checked; a fused role is the whole fused matrix."""
    layers = adaptable(model)
    names = {path.rpartition(".")[2] for path in layers}
    if method.targets == "all-linear":
        inner = {path: dims for path, dims in layers.items() if model.vocab_size not in dims}
        if not inner:
            raise SpecError(f"method: {model.model_type} has no linear layers to adapt", "method")
        path, dims = min(inner.items(), key=lambda item: min(item[1]))
        if method.rank > min(dims):
            _refuse_rank(method.rank, path, dims)
        return ("all-linear",), []
    if not method.targets:
        raise SpecError("method.targets: no module named", "method.targets")
    found: list[str] = []
    notes: list[str] = []
    for target in method.targets:
        name = target.rpartition(".")[2]
        if name not in names:
            fused = next((f for f in _FUSED.get(name, ()) if f in names), None)
            if fused is None:
                raise UnknownNameError("method.targets", target, sorted(names))
            notes.append(f"{name} is part of {fused} in this family: the adapter is on all of {fused}")
            name = fused
        for path, dims in layers.items():
            if path.rpartition(".")[2] == name and method.rank > min(dims):
                _refuse_rank(method.rank, path, dims)
        found.append(name)
    return tuple(dict.fromkeys(found)), notes


def _refuse_rank(rank: int, path: str, dims: tuple[int, int]) -> None:
    raise SpecError(
        f"method.rank: {rank} is larger than the smaller side of {path} ({dims[0]} x {dims[1]})", "method.rank"
    )


def _module(model: ModelSpec, name: str) -> str:
    last, names = name.rpartition(".")[2], modules(model)
    if last not in names:
        raise UnknownNameError("method.modules_to_save", name, sorted(names))
    return last
