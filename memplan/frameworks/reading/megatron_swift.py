"""Megatron-SWIFT's rules: `megatron sft` and `megatron pt` of ms-swift, over Megatron-core's layers.

Source: ms-swift 4.6.0 megatron/arguments/megatron_args.py, megatron_base_args.py; cli/_megatron; megatron/utils.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import lcm

from memplan.frameworks.reading import swift, trainer
from memplan.frameworks.reading.config import Config, Rule

_DEGREES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
}
_STAGES = {
    "virtual_stages": "virtual_pipeline_model_parallel_size",
    "first_stage_layers": "decoder_first_pipeline_num_layers",
    "last_stage_layers": "decoder_last_pipeline_num_layers",
}
# The backend of attention -> memplan's name; Transformer Engine chooses itself without one.
_ATTENTION = {"flash": "flash_attention_2", "flash_2": "flash_attention_2", "unfused": "eager", "local": "eager"}
_OPTIMIZERS = {"adam": "adamw_torch_fused", "sgd": "sgd"}
_RECOMPUTED = ["core_attn"]


def _program(config: Config) -> None:
    if config.said("rlhf_type") is not None or config.command.endswith("rlhf"):
        text = (
            "preference and reinforcement learning with Megatron-SWIFT are not supported yet; supported: megatron sft"
        )
        raise config.error("rlhf_type", text)
    if config.get("task_type") not in (None, "causal_lm"):
        raise config.refuse("task_type", "causal_lm")


def _method(config: Config) -> None:
    kind = config.word("tuner_type", "full", "lora")
    trainer.adapter(config, kind == "lora", False, "tuner_type")
    if kind == "lora":
        swift.adapted_modules(config)
        if config.get("lora_dtype") is not None:
            config.leave("lora_dtype", "adapters are counted in the weights' dtype")
        config.get("use_rslora")
    trainer.frozen(config, "freeze_vit", "freeze_aligner", "freeze_llm")


def _precision(config: Config) -> None:
    """Weights in 16 bits with fp32 master weights and gradients, which the optimizer and DDP's buffer hold."""
    name = config.text("torch_dtype")
    if name is not None and name not in trainer.DTYPES:
        raise config.error("torch_dtype", "must be float16, bfloat16 or float32")
    said = [kind for kind in ("bf16", "fp16") if config.said(kind) is not None and config.flag(kind)]
    weights = said[0] if said else trainer.DTYPES[name] if name is not None else "bf16"
    keys = tuple(said) or ("torch_dtype",)
    why = "" if said or name is not None else "the checkpoint's dtype, assumed bf16"
    for field, value in {"weights": weights, "grads": "fp32", "master": "fp32"}.items():
        if weights != "fp32" or field == "weights":
            config.set(f"precision.{field}", value, *(() if why else keys), why=why)
    for key in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if config.get(key) not in (None, "fp32"):
            config.leave(key, "fp32 is counted")


def _parallelism(config: Config) -> None:
    launch = config.companions.get("accelerate")
    if launch is not None:
        trainer.accelerate(config, launch)
    for field, key in {**_DEGREES, **_STAGES}.items():
        size = config.whole(key)
        if size is not None and size > 1:
            config.set(f"parallelism.{field}", size, key)
    if config.value("parallelism.tp") and config.flag("sequence_parallel"):
        config.set("parallelism.sequence_parallel", True, "sequence_parallel")
    if config.value("parallelism.ep"):
        config.set("parallelism.etp", config.whole("expert_tensor_parallel_size"), "expert_tensor_parallel_size")
    if config.value("parallelism.cp") and config.names("cp_comm_type") == ["a2a"]:
        config.set("parallelism.context", "ulysses", "cp_comm_type")
    _least_world(config)
    trainer.degrees(config)
    if (config.value("parallelism.dp") or 1) * (config.value("parallelism.cp") or 1) > 1:
        strategy = "megatron_dist_opt" if config.flag("use_distributed_optimizer") else "ddp"
        config.set("parallelism.strategy", strategy, "use_distributed_optimizer")


def _least_world(config: Config) -> None:
    """Several nodes may take their number from the cluster: as few GPUs as the degrees need are counted then."""
    if config.gpus is None and config.value("parallelism.world") is None and config.value("parallelism.ep"):
        tp, cp, ep, etp = (config.value(f"parallelism.{name}") or 1 for name in ("tp", "cp", "ep", "etp"))
        world = lcm(tp * cp, ep * etp) * (config.value("parallelism.pp") or 1)
        config.set("parallelism.world", world, why="assumed: as few GPUs as the degrees need; add --gpus")


def _batch(config: Config) -> None:
    """Sequences are packed, or joined without padding, into rows of as many tokens."""
    if config.get("max_length") is None:
        trainer.assume_length(config, "max_length")
    packed = config.whole("packing_length") if config.flag("packing") else None
    if packed is not None:
        config.set("batch.sequence", packed, "packing_length")
    config.get("padding_free")
    together = (config.whole("micro_batch_size") or 1) * (config.value("parallelism.dp") or 1)
    step = config.whole("global_batch_size") or 1
    if step % together:
        text = f"{step} is no multiple of micro_batch_size times the replicas, {together}"
        raise config.error("global_batch_size", text)
    config.set("batch.accumulation", step // together, "global_batch_size")


def _kernels(config: Config) -> None:
    kind = config.word("recompute_granularity", "none", "selective", "full")
    if kind == "selective" and config.value("parallelism.cp"):
        kind = "none"
        config.leave("recompute_granularity", "attention over divided sequences is counted as kept")
    config.set("kernels.checkpointing", kind, "recompute_granularity")
    if kind == "selective" and (config.names("recompute_modules") or _RECOMPUTED) != _RECOMPUTED:
        config.leave("recompute_modules", "core_attn is counted as recomputed")
    layers, method = config.whole("recompute_num_layers") or 1, config.word("recompute_method", "uniform", "block")
    if kind == "full" and (layers > 1 or method == "block"):
        config.leave("recompute_num_layers", "every layer is counted as recomputed by itself")
    backend = str(config.get("attention_backend"))
    if backend in _ATTENTION:
        config.set("kernels.attention", _ATTENTION[backend], "attention_backend")
    elif backend not in ("auto", "fused"):
        raise config.refuse("attention_backend", ", ".join((*_ATTENTION, "auto", "fused")))
    fuses, form = config.flag("cross_entropy_loss_fusion"), config.word("cross_entropy_fusion_impl", "native", "te")
    if not fuses or form == "te":  # else the profile's
        keys = ("cross_entropy_loss_fusion", "cross_entropy_fusion_impl")
        config.set("kernels.fused", ["cross_entropy"] if fuses else [], *keys)


def _optimizer(config: Config) -> None:
    name = str(config.get("optimizer"))
    if name not in _OPTIMIZERS:
        raise config.refuse("optimizer", ", ".join(_OPTIMIZERS))
    config.set("optimizer.name", _OPTIMIZERS[name], "optimizer")


RULES: Mapping[str, tuple[Rule, ...]] = {
    "megatron-swift": (_program, _method, _precision, _parallelism, _batch, _kernels, _optimizer),
}
