"""Refuse runs that the probe's training script cannot run, in one line that names the field."""

from __future__ import annotations

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.optimizers.optimizers import OPTIMIZERS
from memplan.catalogue.profiles.profile_table import known_name
from memplan.core.errors import SpecError, UnknownNameError, UnsupportedModelError, nearest, refused
from memplan.models.cards import find_config, find_model
from memplan.models.peft_methods import PEFT_METHODS
from memplan.resolve.decide import fill_from_profile
from memplan.resolve.defaults import adapted_experts, complete_method
from memplan.resolve.kernels import FLASH_PACKAGES
from memplan.resolve.parallelism import check_product, is_wrapped
from memplan.resolve.peft_options import lora_options
from memplan.resolve.quantized_checkpoint import method_for_training
from memplan.resolve.refusals.across_parts import contradictions
from memplan.resolve.refusals.refuse import refuse
from memplan.resolve.refusals.settings import optimizer_offload
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.training import Kernels

# The optimizers of `memplan.probe.script.optimizers`: torch's own, transformers' Adafactor and bitsandbytes'.
TORCH = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")
BITSANDBYTES = {
    "adamw_bnb_8bit": ("AdamW", 8, False),
    "adamw_8bit": ("AdamW", 8, False),
    "paged_adamw_32bit": ("AdamW", 32, True),
    "paged_adamw_8bit": ("AdamW", 8, True),
    "lion_8bit": ("Lion", 8, False),
    "lion_32bit": ("Lion", 32, False),
    "paged_lion_32bit": ("Lion", 32, True),
    "paged_lion_8bit": ("Lion", 8, True),
    "ademamix": ("AdEMAMix", 32, False),
    "ademamix_8bit": ("AdEMAMix", 8, False),
    "paged_ademamix_32bit": ("AdEMAMix", 32, True),
    "paged_ademamix_8bit": ("AdEMAMix", 8, True),
    "rmsprop_bnb": ("RMSprop", 32, False),
    "rmsprop_bnb_8bit": ("RMSprop", 8, False),
    "rmsprop_bnb_32bit": ("RMSprop", 32, False),
}
OPTIMIZER_NAMES = (*TORCH, "adafactor", *BITSANDBYTES, "none")


def checked_run(run: RunSpec) -> RunSpec:
    """Return the run with its defaults filled in. Raises SpecError or UnknownNameError if the script cannot run it."""
    if run.trainer != "sft":
        _refuse_trl(run)
    elif not run.profile.startswith("transformers-"):
        near = "; --profile transformers-5 probes the run as transformers has it" if run.task == "train" else ""
        raise refused(
            "profile",
            f"a probe runs transformers' own step, with the libraries that are installed; {run.profile} is "
            f"another framework's{near}",
        )
    run = fill_from_profile(run)
    _refuse(run)
    if run.also.merging is not None and run.also.merging.model == "reloaded":
        raise refused("also.merging", "a probe merges into the model that it trained; probe a run without quantisation")
    if run.parallelism.world > 1 and (run.also.saving is not None or run.also.merging is not None):
        raise refused("also", "a probe saves and merges on one GPU only")
    e = run.also.evaluation
    if run.parallelism.world > 1 and e is not None and e.kept_batches:
        raise refused("also.evaluation.kept_batches", "a probe keeps logits on one GPU only")
    return run


def _refuse_trl(run: RunSpec) -> None:
    """Refuse runs that the installed TRL's trainer does not run, or with what the probe does not set there."""
    from importlib.metadata import version

    from memplan.probe.libraries import require

    if not run.profile.startswith("trl-"):
        raise SpecError(f"profile: a probe of {run.trainer} runs TRL's trainer, not {run.profile}'s", "profile")
    require("trl")
    installed = f"trl-{version('trl')}"
    if known_name(installed) != known_name(run.profile):
        raise SpecError(
            f"profile: {installed} is installed, which {known_name(installed)} stands for, not {run.profile}", "profile"
        )
    is_fused = run.trainer in ("dpo", "kto", "grpo") and run.kernels.loss == "fused"
    defaults = RunSpec(model=run.model, kernels=Kernels(loss="fused") if is_fused else Kernels())
    for part, fields in _NOT_SET.items():
        for field in fields:
            if getattr(getattr(run, part), field) != getattr(getattr(defaults, part), field):
                raise SpecError(f"{part}.{field}: a probe of {run.trainer} does not set it in TRL", f"{part}.{field}")


_NOT_SET = {
    "kernels": ("loss", "fused", "reentrant"),
    "batch": ("images",),
    "loop": ("hold_outputs", "padded", "grad_scaler"),
    "optimizer": ("in_backward", "state_dtype"),
}


def refuse_several(run: RunSpec, what: str) -> None:
    """Raise SpecError for a run on several GPUs: only `memplan probe --trace` shows one of its ranks."""
    if run.parallelism.world > 1:
        raise refused("parallelism", f"{what} covers one GPU; memplan probe --trace shows one rank of several")


def _refuse(run: RunSpec) -> None:
    offload = run.parallelism.offload
    _parallelism(run)
    tp, cp = run.parallelism.tp, run.parallelism.cp
    if run.batch.sequence % ((2 * cp if run.parallelism.context == "ring" else cp) if cp > 1 else 1):
        raise refused("parallelism.cp", f"{2 * cp} slices do not divide {run.batch.sequence} tokens")
    if tp > 1 and (offload.optimizer or run.optimizer.in_backward or run.method.quantization is not None):
        raise refused(
            "parallelism.tp",
            f"a probe cannot run {tp} ranks with an optimizer on the host or in backward, or with quantised weights",
        )
    if offload.optimizer:
        refuse(optimizer_offload(str(run.optimizer.name)))
        if run.loop.grad_scaler:
            raise refused("loop.grad_scaler", "a probe scales no losses for an optimizer on the host")
    # context-parallel ranks without a strategy are traced with all weights
    refuse(error for error in contradictions(run) if cp == 1 or error.field != "parallelism.strategy")
    _optimizer(run)
    _kernels(run)
    _precision(run)
    q = run.method.quantization
    if run.method.kind in ADAPTERS and q is None and _stored(run):
        raise SpecError(
            "quantization_config: a probe creates its own weights, stored as method.quantization says; use qlora, or a "
            "config without quantization_config",
            "model",
        )
    if q is not None:
        if q.format not in _FORMATS:
            raise _not_run("method.quantization.format", q.format, ", ".join(_FORMATS))
        if q.storage != "uint8" and not is_wrapped(run.parallelism):
            raise _not_run("method.quantization.storage", q.storage, "uint8")
        if run.method.kind in ("full", "freeze", "lora", "dora") and run.task == "train":
            raise refused("method.quantization", f"{run.method.kind} trains no quantised weights; use qlora or qdora")
        model = find_model(run.model)
        if q.experts and adapted_experts(model, complete_method(run.method, model)):
            raise refused(
                "method.targets",
                "peft by itself finds no quantised experts, as Axolotl's patches let it; name only linear layers to "
                "trace them",
            )
    for error in lora_options(run.method) if run.method.kind not in PEFT_METHODS else ():
        raise error
    if run.method.options.get("init_lora_weights") == "loftq":
        raise _not_run("method.options.init_lora_weights", "loftq", "any other")


_FORMATS = ("nf4", "fp4", "int8", "hqq-int4", "torchao-int8")
_STRATEGIES = ("ddp", "fsdp", "fsdp2")


def _parallelism(run: RunSpec) -> None:
    """Refuse several GPUs unless they divide exactly one of batch, matrices and sequence.

    Ranks that divide the batch need the model's own loss.
    """
    p = run.parallelism
    wrong = check_product(p)
    if wrong is not None:
        raise wrong
    if run.task != "train" and (p.device_map is not None or 1 < p.pp == p.world):
        if run.method.quantization is not None:
            raise refused("method.quantization", "a probe places only unquantised weights by a device_map")
        return
    ep = p.ep if p.ep == p.tp else 1  # tensor-parallel ranks may also divide the experts
    if (
        p.model_copy(update={"strategy": "none"} if p.cp > 1 and p.strategy == "fsdp2" else {})
        == Parallelism(world=p.tp * p.cp, tp=p.tp, cp=p.cp, context=p.context, ep=ep, offload=p.offload)
        and min(p.tp, p.cp) == 1
    ):
        return
    if p.dp != p.world:
        raise refused(
            "parallelism",
            "a probe runs on one GPU, or as one rank of data, tensor or (with fsdp2) context parallelism, but not of a "
            "combination",
        )
    if is_wrapped(p) and p.strategy not in _STRATEGIES:
        raise _not_run("parallelism.strategy", p.strategy, ", ".join(_STRATEGIES))
    if p.ep > 1 and (p.ep != p.dp or p.strategy != "fsdp2" or run.precision.autocast or run.method.kind != "full"):
        raise refused(
            "parallelism.ep",
            f"a probe runs {p.ep} expert-parallel ranks only with tp of the same degree, or with dp of "
            "the same degree in full training under fsdp2 without autocast",
        )
    if run.task != "train" and is_wrapped(p):
        raise _not_run("task", run.task, "train, on several GPUs")
    if p.static_graph:  # DDP would count the used parameters in pinned memory
        raise _not_run("parallelism.static_graph", "true", "false")
    if run.kernels.loss != "hf" and is_wrapped(p) and run.trainer == "sft":
        raise _not_run("kernels.loss", run.kernels.loss, "hf, on several GPUs")


def _stored(run: RunSpec) -> bool:
    """Whether adapters would train on the checkpoint's stored quantised weights. False for unknown families."""
    if not find_config(run.model).get("quantization_config"):
        return False
    try:
        model = find_model(run.model)
    except UnsupportedModelError:
        return False
    capability = find_gpu(run.gpu).compute_capability if run.gpu else None
    return method_for_training(model, run.method, "", capability).as_stored


def _optimizer(run: RunSpec) -> None:
    o = run.optimizer
    if o.name not in OPTIMIZER_NAMES:
        if o.name not in OPTIMIZERS:
            raise UnknownNameError("optimizer.name", str(o.name), OPTIMIZER_NAMES)
        near = " or ".join(nearest(str(o.name), OPTIMIZER_NAMES, 2))
        raise refused("optimizer.name", f"a probe does not run {o.name}; it runs {near}, for example")
    if o.state_dtype is not None:
        raise refused("optimizer.state_dtype", f"{o.name} decides that itself; a probe does not set it")
    if o.foreach is not None and o.name not in ("adamw_torch", "sgd", "adagrad", "rmsprop"):
        raise refused("optimizer.foreach", f"{o.name} has no foreach step to turn on or off")
    if o.momentum and o.name not in ("sgd", "rmsprop"):
        raise refused("optimizer.momentum", f"{o.name} has no momentum to set; only sgd and rmsprop have")
    if o.in_backward and run.batch.accumulation > 1:
        raise refused("optimizer.in_backward", "needs batch.accumulation 1")
    if o.in_backward and run.loop.grad_scaler:
        raise refused("loop.grad_scaler", "cannot scale gradients that optimizer.in_backward uses up")


def _kernels(run: RunSpec) -> None:
    k = run.kernels
    if k.fused:
        raise _not_run("kernels.fused", ", ".join(k.fused), "none but a fused loss (kernels.loss)")
    if k.packages:
        raise _not_run("kernels.packages", ", ".join(k.packages), "transformers' torch code")
    if k.loss == "fused_chunks":
        raise _not_run("kernels.loss", k.loss, "fused, or another loss that is not Unsloth's")
    if k.compile:
        raise _not_run("kernels.compile", "true", "false")
    if k.attention in FLASH_PACKAGES and run.precision.weights == "fp32" and not run.precision.autocast:
        raise refused("kernels.attention", f"{k.attention} needs bf16 or fp16")


def _precision(run: RunSpec) -> None:
    p = run.precision
    if p.compute in ("fp8", "float8"):
        raise _not_run("precision.compute", p.compute, "bf16, fp16, fp32")
    if p.autocast and p.compute == "fp32":
        raise refused("precision.compute", "autocast computes in bf16 or fp16, not fp32")
    for field in ("grads", "master"):
        if getattr(p, field) not in (None, p.weights if field == "grads" else None):
            raise SpecError(
                f"precision.{field}: transformers' training step has no such dtype; a probe runs pure and autocast",
                f"precision.{field}",
            )


def _not_run(field: str, value: object, known: str) -> SpecError:
    return refused(field, f"a probe does not run {value!r}; it runs {known}")
