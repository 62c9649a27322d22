"""Refusals of what a training run's model, library or GPUs do not support."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.families import megatron
from memplan.catalogue.kernels.trl_losses import TRL_LOSSES
from memplan.catalogue.optimizers.optimizers import OPTIMIZERS
from memplan.catalogue.parallelism.sharding import (
    ALLOWED_ON_FLAT_PARTITIONS,
    ALLOWED_ON_SLICES,
    ELEMENTWISE,
    MEGATRON,
)
from memplan.core.errors import SpecError, refused
from memplan.models.configs import families
from memplan.models.configs.megatron import groups_products
from memplan.models.peft_methods import BITSANDBYTES
from memplan.resolve.open_run import OpenRun
from memplan.resolve.parallelism import ZERO
from memplan.resolve.refusals.parallelism import ONE_GPU
from memplan.resolve.refusals.refuse import not_yet, not_yet_with
from memplan.spec.formats import Quantization

_CPU_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad")  # DeepSpeedCPUAdam, DeepSpeedCPUAdagrad
# The methods that each strategy shards correctly.
_METHODS_OF = {
    "fsdp": ("full", "freeze", "lora", "qlora"),  # peft 0.21's DoRA reads the shape of weights that FSDP1 has flattened
    "fsdp2": ("full", "freeze", "lora", "qlora", "dora"),
    **dict.fromkeys(ZERO[:3], ("full", "freeze", "lora", "qlora", "dora", "qdora")),
    "zero3": ("full", "freeze", "lora", "qlora"),  # DoRA takes norms of weights that another module gathers
    MEGATRON: ("full", "lora"),
}

# Source: transformers 5.24 distributed/tensor_parallel.py; bitsandbytes 0.50.2 nn/modules.py Linear4bit.forward reads
# weight.quant_state.
_CANNOT = (
    "transformers 5.24 cannot run {} with tensor parallelism: it turns bitsandbytes' weights into DTensors, and their "
    "layers fail in the first pass"
)


def _with_own_layers() -> str:
    """Return the families that Megatron-core has layers of its own for."""
    return ", ".join(name for name, row in families().items() if row.parallel.gpt is not None)


# The layers that LoRA adapts, all by default. Source: megatron-bridge 0.3.1 peft/lora.py LoRA; ms-swift 4.0.0
# megatron/utils/utils.py find_all_linears, without the head.
_ADAPTED = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def runs_in_megatron(r: OpenRun) -> bool:
    """Return whether Megatron-core can train a model of another family so, given that it has layers for it."""
    kind = r.method.kind
    return not r.precision.autocast and (kind == "full" or (kind == "lora" and _adapts_megatron_layers(r)))


def _adapts_megatron_layers(r: OpenRun) -> bool:
    targets = r.method.targets
    return targets == "all-linear" or (isinstance(targets, tuple) and set(targets) <= set(_ADAPTED))


def megatron_model(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what Megatron-core's own layers do not support."""
    method, kernels = r.method, r.kernels
    library = r.library.sharding
    if library.tensor_parallel != "megatron":
        yield refused("profile", f"megatron_gpt needs Megatron-core's layers; use megatron-core, not {r.profile}")
    if method.kind not in ("full", "lora"):
        yield not_yet("method.kind", method.kind, "full, lora with Megatron-core's layers")
    p = r.parallelism
    if method.kind == "lora" and megatron.has_experts(r.model) and not library.divides_rank:
        yield not_yet("method.kind", "lora", f"full of models with experts under {r.profile}")
    if method.kind == "lora" and megatron.has_experts(r.model) and not groups_products(r.model):
        yield not_yet("method.kind", "lora", "full with Megatron-core's layers and moe_grouped_gemm false")
    if method.kind == "lora" and p.tp == 1 and p.etp not in (None, 1):
        yield not_yet("parallelism.etp", p.etp, "1 with adapters of Megatron-core's layers and tp 1")
    if method.kind == "lora" and library.divides_rank and method.rank % max(p.tp, p.etp or 1):
        yield refused("method.rank", f"{method.rank} is not divided by tp {p.tp} or etp {p.etp or p.tp}")
    drops = library.divides_rank and bool(method.dropout)
    if method.kind == "lora" and (not _adapts_megatron_layers(r) or method.modules_to_save or drops):
        field = "modules_to_save" if method.modules_to_save else "dropout" if drops else "targets"
        known = {"targets": f"all-linear, {', '.join(_ADAPTED)}", "dropout": "0"}.get(field, "none")
        yield not_yet(f"method.{field}", str(getattr(method, field)), f"{known} with Megatron-core's layers")
    if r.precision.autocast:
        yield SpecError(
            "precision.autocast: Megatron-core casts the model itself; use precision without autocast", "precision"
        )
    if kernels.loss != "hf":
        yield not_yet("kernels.loss", kernels.loss, "hf with Megatron-core's layers (its own loss)")
    losses = {"cross_entropy", "compiled_cross_entropy"} & set(kernels.fused or ())
    others = set(kernels.fused or ()) - losses
    if others:
        supported = "cross_entropy, compiled_cross_entropy with Megatron-core's layers, whose others are fused anyway"
        yield not_yet("kernels.fused", ", ".join(sorted(others)), supported)
    if len(losses) > 1:
        yield refused("kernels.fused", f"{' and '.join(sorted(losses))} are two forms of one loss; name one")
    if kernels.checkpointing == "offload":
        yield not_yet(
            "kernels.checkpointing", kernels.checkpointing, "none, full, selective with Megatron-core's layers"
        )
    if r.loop.padded:
        yield not_yet("loop.padded", True, "false with Megatron-core's layers")


def megatron_experts(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for expert parallelism that Megatron-core does not support."""
    p, (experts, width) = r.parallelism, megatron.experts_and_width(r.model)
    for field in ("ep", "etp"):
        if not experts and getattr(p, field) not in (1, ONE_GPU.etp):
            value = getattr(p, field)
            yield refused(f"parallelism.{field}", f"{value} needs a model with experts, and this one has none")
    if not experts:
        return
    if p.expert_imbalance != 1:
        yield not_yet(
            "parallelism.expert_imbalance",
            p.expert_imbalance,
            "1 with Megatron-core's layers; set moe_capacity_factor in a megatron_gpt config",
        )
    etp = p.tp if p.etp is None else p.etp
    if experts % p.ep:
        yield refused("parallelism.ep", f"{p.ep} does not divide {experts} experts")
    if width % etp:
        yield refused("parallelism.etp", f"{etp} does not divide an expert's width of {width}")
    ranks = p.dp * p.tp * p.cp
    if ranks % (p.ep * etp):
        yield refused(
            "parallelism.ep", f"ep {p.ep} x etp {etp} does not divide dp {p.dp} x tp {p.tp} x cp {p.cp} = {ranks}"
        )
    if p.tp > 1 and not p.sequence_parallel:
        yield refused(
            "parallelism.sequence_parallel",
            "Megatron-core needs it to train mixtures of experts with tensor parallelism; set it to true",
        )


def expert_parallel(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for expert parallelism that transformers, or memplan so far, does not support.

    Each rank has some of the experts, undivided.
    """
    p, method = r.parallelism, r.method
    if p.etp not in (1, ONE_GPU.etp):
        yield not_yet("parallelism.etp", p.etp, f"1, except for experts of {_with_own_layers()} under megatron-core")
    field = "parallelism.ep"
    if p.ep == 1:
        if p.expert_imbalance != 1:
            field = "parallelism.expert_imbalance"
            yield refused(field, f"{p.expert_imbalance:g} only applies to expert parallelism, and ep is 1")
        return
    if r.style != "transformers":
        yield not_yet(
            field,
            p.ep,
            f"1 with profile {r.profile} for {r.model.model_type}; more with profile transformers-5, or for "
            f"{_with_own_layers()}",
        )
    wrong = [f"a multiple of tp {p.tp}"] * bool(p.ep % p.tp)
    wrong += [f"a divisor of dp {p.dp} x tp {p.tp} = {p.dp * p.tp}"] * bool(p.dp * p.tp % p.ep)
    if wrong:
        yield refused(field, f"transformers needs {' and '.join(wrong)}, not {p.ep}")
    for other in ("cp", "pp"):
        if getattr(p, other) > 1:
            yield not_yet(
                f"parallelism.{other}", getattr(p, other), "1 with expert parallelism of transformers' models"
            )
    if p.dp == 1:
        return
    if p.tp > 1 or p.ep < p.dp:
        field = "parallelism.tp" if p.tp > 1 else field
        value, other = (p.tp, f"1 with ep {p.ep} and dp {p.dp}") if p.tp > 1 else (p.ep, f"1 or {p.dp} (dp)")
        yield not_yet(field, value, other)
    if p.strategy != "fsdp2":
        yield refused("parallelism.strategy", f"{p.strategy} cannot be combined with expert parallelism; use fsdp2")
    for name in ("shard_group", "reshard_after_forward"):
        if getattr(p, name) != getattr(ONE_GPU, name):
            yield not_yet(f"parallelism.{name}", getattr(p, name), f"{getattr(ONE_GPU, name)} with expert parallelism")
    if p.offload.parameters:
        yield not_yet("parallelism.offload", "parameters", "none with expert parallelism and fsdp2")
    if method.kind != "full":
        yield not_yet("method.kind", method.kind, "full with expert parallelism and fsdp2")
    if r.precision.autocast:
        yield not_yet("precision.autocast", True, "false with expert parallelism and fsdp2")
    if r.loop.trainer and r.batch_facts.accumulates:
        yield not_yet_with("batch.accumulation", "expert parallelism, fsdp2 and loop.trainer", "1")


def deepspeed_offload(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for an optimizer that DeepSpeed cannot offload, or settings it cannot resolve."""
    p, optimizer = r.parallelism, str(r.optimizer.name)
    if p.offload.optimizer and optimizer not in _CPU_OPTIMIZERS:
        yield refused(
            "parallelism.offload",
            f"DeepSpeed cannot offload {optimizer} (optimizer.name); use {', '.join(_CPU_OPTIMIZERS)}",
        )
    for name, value in p.zero:
        if value == "auto" and not r.loop.trainer:
            field = f"parallelism.zero.{name}"
            yield refused(field, "auto needs transformers' Trainer to fill it in; set loop.trainer or a value")


def activation_offload(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for runs whose saved tensors memplan cannot offload yet."""
    p, method, kernels, model = r.parallelism, r.method, r.kernels, r.model
    field = "parallelism.offload"
    if not r.library.checkpointing.saved_tensors:
        yield not_yet(field, "activations", f"optimizer, and kernels.checkpointing offload, with profile {r.profile}")
    if any(layer.mixer in ("mamba", "linear_attention") for layer in model.layers):
        yield not_yet(field, "activations", f"none for models with attention-free layers, such as {model.model_type}")
    for name in ("tp", "cp", "ep", "pp"):
        if getattr(p, name) > 1:
            yield not_yet(f"parallelism.{name}", getattr(p, name), "1 with activations offloaded")
    by_trl = r.library.checkpointing.saved_tensors == "trl"
    if p.world > 1 and p.strategy not in ("ddp", *(() if by_trl else ("fsdp2",))):
        strategies = "ddp" if by_trl else "ddp, fsdp2"
        yield not_yet("parallelism.strategy", p.strategy, f"{strategies} with activations offloaded")
    if by_trl and kernels.checkpointing != "none":
        both = (
            "none with activations offloaded; offload alone stands for TRL's activation_offloading with checkpointing"
        )
        yield not_yet("kernels.checkpointing", kernels.checkpointing, both)
    if method.quantization is not None and method.quantization.format not in ("nf4", "fp4"):
        yield not_yet("method.quantization.format", method.quantization.format, "nf4, fp4 with activations offloaded")
    if r.batch_facts.media:
        yield not_yet_with("batch.images", "offloaded activations", "0")
    if kernels.fused:
        yield not_yet("kernels.fused", ", ".join(kernels.fused), "none with activations offloaded")
    losses = ("hf", "chunked", "fused", *(TRL_LOSSES if by_trl else ()))
    if kernels.loss not in losses:
        yield not_yet("kernels.loss", kernels.loss, f"{', '.join(losses)} with activations offloaded")


def quantised_experts(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for quantised stacks of experts that memplan does not support yet."""
    q, field = r.method.quantization, "method.quantization.experts"
    if q is None or not q.experts:
        return
    if "E" not in r.model.axes():
        yield refused(field, f"{r.model.model_type} has no experts; leave it out")
    if r.library.model.experts != "stacked":
        yield refused(field, f"{r.profile} has experts as linear layers, which are quantised anyway; leave it out")
    if q.format not in ("nf4", "fp4"):
        yield not_yet_with(field, f"format {q.format}", "nf4, fp4")
    if r.parallelism.world > 1 and r.parallelism.strategy not in ("ddp", "fsdp2"):
        yield not_yet_with(field, "pipelines" if r.parallelism.pp > 1 else r.parallelism.strategy, "ddp, fsdp2")


# Source: DeepSpeed 0.19.7 and 0.19.8 runtime/engine.py _configure_distributed_model.
FP8_IN_ZERO = "DeepSpeed before 0.19.8 casts all of its weights to 16 bits; 0.19.8 leaves them in fp8, half as large"


def several_gpus(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what several GPUs, or memplan so far, do not support."""
    p, method, optimizer = r.parallelism, r.method, r.optimizer
    row = OPTIMIZERS.get(str(optimizer.name))
    if optimizer.in_backward:
        yield not_yet("optimizer.in_backward", True, f"false with {p.strategy}")
    if row is not None and row.frees_gradients:
        yield refused(
            "optimizer.name", f"{optimizer.name} steps in backward, which is not supported yet with {p.strategy}"
        )
    if p.strategy not in _METHODS_OF:
        return
    if method.kind not in _METHODS_OF[p.strategy]:
        yield not_yet("method.kind", method.kind, f"{', '.join(_METHODS_OF[p.strategy])} with {p.strategy}")
    if method.modules_to_save:
        yield not_yet("method.modules_to_save", ", ".join(method.modules_to_save), f"none with {p.strategy}")
    supported = (*ELEMENTWISE, *ALLOWED_ON_FLAT_PARTITIONS) if p.strategy in ZERO else ELEMENTWISE
    if p.strategy == "fsdp" and not p.offload.parameters:
        supported = (*ELEMENTWISE, *ALLOWED_ON_SLICES)
    if p.strategy == "fsdp2" and optimizer.name in ALLOWED_ON_SLICES:
        yield refused(
            "optimizer.name",
            f"bitsandbytes' {optimizer.name} cannot step on fsdp2's DTensors; use strategy fsdp, or "
            f"{', '.join(ELEMENTWISE)}",
        )
    if row is not None and optimizer.name not in supported:
        yield not_yet("optimizer.name", optimizer.name, f"{', '.join(supported)} with {p.strategy}")
    yield from _precision_of_strategy(r)
    q = method.quantization
    packed = ("nf4", "fp4", *(("gptq-int4", "gptq-int8") if p.strategy == "fsdp" else ()))
    if p.strategy != MEGATRON and q is not None and q.format not in packed:
        if q.format == "fp8" and p.strategy in ("zero1", "zero2"):
            yield refused(
                "method.quantization.format", f"fp8 under {p.strategy}: {FP8_IN_ZERO}; leave it out for 16 bits"
            )
        yield not_yet("method.quantization.format", q.format, f"{', '.join(packed)} with {p.strategy}")


def _precision_of_strategy(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for dtypes and scalers that the library of a strategy sets itself."""
    p, method, precision, scales = r.parallelism, r.method, r.precision, r.loop.grad_scaler
    if p.strategy == MEGATRON:
        if precision.autocast:
            yield refused("precision.autocast", "Megatron computes in the weights' dtype; use precision mixed")
        if scales:
            yield refused("loop.grad_scaler", "Megatron scales the loss itself; leave it out")
        return
    if precision.grads not in (None, precision.weights):
        yield not_yet("precision.grads", precision.grads, f"{precision.weights} (the weights' dtype) with {p.strategy}")
    if p.strategy in ZERO:
        if precision.autocast:
            yield refused(
                "precision.autocast", "DeepSpeed casts the model itself, with fp32 masters; use precision mixed"
            )
        if method.quantization is not None and method.quantization.kbit_preparation:
            field = "method.quantization.kbit_preparation"
            yield refused(field, "DeepSpeed casts the prepared fp32 weights back; set it to false")
        if method.quantization is not None and p.offload.parameters:
            yield not_yet("parallelism.offload", "parameters", f"optimizer with {method.kind}")
        if scales:
            yield refused("loop.grad_scaler", "DeepSpeed scales the loss itself; leave it out")
    elif precision.master is not None:
        yield refused("precision.master", "FSDP uses autocast for mixed precision; use precision amp")


def pipeline(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what pipeline stages, or memplan so far, do not support."""
    p, objective = r.parallelism, r.model.objective
    if objective != "causal_lm":
        yield not_yet("parallelism.pp", p.pp, f"1 for {objective}")
    if r.batch_facts.media:
        yield not_yet_with("batch.images", f"pp {p.pp}", "0")
    if (r.method.kind == "freeze" or r.method.frozen) and p.strategy not in ("none", "fsdp2"):
        yield refused("parallelism.strategy", f"{p.strategy} fails in a stage where nothing trains; use fsdp2")
    if r.loop.hold_outputs:
        yield not_yet("loop.hold_outputs", r.loop.hold_outputs, f"false with pp {p.pp}")


def tensor_parallel(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what tensor parallelism, or memplan so far, does not support."""
    p, method, kernels, style = r.parallelism, r.method, r.kernels, r.style
    if style == "":
        yield refused(
            "parallelism.tp",
            f"{p.tp} is not supported yet with profile {r.profile}; supported: transformers-5, megatron-core, "
            "torchtitan",
        )
    if style == "litgpt" and r.trains:
        yield refused("parallelism.tp", f"profile {r.profile} only supports {p.tp} for generation")
    if style in ("megatron", "torchtitan", "litgpt") and method.kind != "full" and not r.is_megatron_model:
        yield not_yet("method.kind", method.kind, f"full with tensor parallelism and profile {r.profile}")
    if style == "megatron":
        if p.dp > 1 and not r.is_megatron_model:
            yield not_yet(
                "parallelism.dp",
                p.dp,
                f"1 with tensor parallelism and profile {r.profile}, except for {_with_own_layers()} in full training",
            )
        if r.precision.autocast:
            yield SpecError(
                "precision.autocast: Megatron-core casts the model itself; use precision without autocast",
                "precision",
            )
    elif p.sequence_parallel and style == "transformers":
        yield refused(
            "parallelism.sequence_parallel",
            f"is not supported with profile {r.profile}; use megatron-core or torchtitan",
        )
    if p.dp > 1 and p.strategy != "fsdp2" and not r.is_megatron_model:
        yield refused("parallelism.strategy", f"{p.strategy} cannot be combined with tensor parallelism; use fsdp2")
    if style not in ("megatron", "litgpt") and method.quantization is not None:
        if method.kind == "full":  # nothing trains
            yield from _divided_format(r, method.quantization)
        else:
            yield refused(
                "method.kind",
                f"{_CANNOT.format(method.kind)}; use full, freeze or lora",
            )
    if method.kind not in ("full", "freeze", "lora"):
        yield not_yet("method.kind", method.kind, "full, freeze, lora with tensor parallelism")
    if method.modules_to_save:
        yield not_yet("method.modules_to_save", ", ".join(method.modules_to_save), "none with tensor parallelism")
    if r.trains:
        yield from _divided_training(r)
    if kernels.fused and not r.is_megatron_model:
        yield not_yet("kernels.fused", ", ".join(kernels.fused), "none with tensor parallelism")


def _divided_format(r: OpenRun, q: Quantization) -> Iterator[SpecError]:
    """Yield errors for quantised weights that ranks cannot divide; fp8 layers multiply each rank's part and its scales.
    Of gpt-oss in mxfp4, ranks divide the embeddings and the head.

    Source: transformers 5.24 integrations/finegrained_fp8.py replace_with_fp8_linear, distributed/tensor_parallel.py,
    models/gpt_oss/configuration_gpt_oss.py base_model_tp_plan.
    """
    tp, axes, block = r.parallelism.tp, r.model.axes(), max(q.block_size, 1)
    field, others = "method.quantization.format", "fp8, mxfp4, and weights in 16 or 32 bits, with transformers' tp"
    if q.format in BITSANDBYTES and r.style == "transformers":
        yield refused(field, f"{_CANNOT.format(q.format)}; use fp8, or weights in 16 or 32 bits")
    elif q.format not in ("fp8", "mxfp4") or r.style != "transformers":
        yield not_yet(field, q.format, others)
    divided = ("kd", "ad", "f", "m") if q.format == "fp8" else ()
    uneven = next((axes[name] for name in divided if axes.get(name, 0) % (tp * block)), None)
    if uneven is not None:
        yield refused(
            "parallelism.tp",
            f"{tp} ranks would divide blocks of {block} x {block} fp8 weights (of {uneven:,}), which share a scale; "
            "use fewer",
        )


def _divided_training(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for optimizers and losses that cannot read weights which tensor parallelism divides."""
    optimizer, loss = r.optimizer, r.kernels.loss
    if optimizer.name not in ELEMENTWISE:
        yield not_yet("optimizer.name", optimizer.name, f"{', '.join(ELEMENTWISE)} with tensor parallelism")
    if optimizer.in_backward:
        yield not_yet("optimizer.in_backward", True, "false with tensor parallelism")
    if loss == "fused" and r.style != "megatron":
        yield refused(
            "kernels.loss",
            f"Liger's fused loss cannot read the head's matrix, which tp {r.parallelism.tp} shards as a DTensor; use "
            "hf",
        )
    if loss != "hf":
        yield not_yet("kernels.loss", loss, "hf with tensor parallelism")


def context_parallel(r: OpenRun) -> Iterator[SpecError]:
    """Yield errors for what context parallelism, or memplan so far, does not support."""
    p, kernels, field = r.parallelism, r.kernels, "parallelism.cp"
    if r.is_megatron_model:
        if kernels.attention == "eager" or kernels.checkpointing == "selective":
            yield refused(
                field,
                f"{p.cp} needs fused attention (kernels.attention sdpa or flash_attention_2), and does not work with "
                "kernels.checkpointing selective",
            )
        heads = r.model.num_key_value_heads // p.tp
        if p.context == "ulysses" and heads % p.cp:
            yield refused(field, f"{p.cp} ranks cannot exchange {heads} key/value heads; use parallelism.context ring")
        return
    if r.style != "transformers":
        yield not_yet(field, p.cp, f"1 with profile {r.profile}; more with profile transformers-5")
    if p.tp > 1:
        yield refused(
            field,
            f"accelerate 1.15 cannot combine cp {p.cp} with tp {p.tp} under transformers 5.24: for FSDP2 it imports "
            "ReplicateParallel, which transformers has removed",
        )
    if p.context == "ulysses" and p.strategy not in ZERO:
        yield refused("parallelism.strategy", f"Ulysses needs DeepSpeed ({', '.join(ZERO)}), not {p.strategy}")
    if p.context == "ring" and p.strategy != "fsdp2":
        yield refused("parallelism.strategy", "accelerate's context parallelism needs FSDP2; use fsdp2")
    if kernels.loss != "hf":
        yield not_yet("kernels.loss", kernels.loss, "hf with context parallelism")
    if r.loop.padded:
        yield refused("loop.padded", "accelerate's context parallelism does not support attention masks")
