"""NeMo Automodel's rules.

Source: nemo_automodel 0.7.0 recipes/llm/train_ft.py, components/_peft/lora.py, components/distributed/config.py,
components/loss, _transformers/auto_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, shown

_RECIPE = "TrainFinetuneRecipeForNextTokenPrediction"
_LOSSES = {"FusedLinearCrossEntropy": "fused", "ChunkedCrossEntropy": "chunked", "MaskedCrossEntropy": "hf"}
_OPTIMIZERS = {"AdamW": "adamw_torch", "Adam": "adamw_torch", "SGD": "sgd", "FusedAdam": "adamw_torch"}
_STRATEGIES = {"fsdp2": "fsdp2", "ddp": "ddp"}


def _method(config: Config) -> None:
    recipe = (config.text("recipe") or _RECIPE).rpartition(".")[2]
    if recipe != _RECIPE:
        raise config.error("recipe", f"{shown(recipe)} is not supported yet; supported: {_RECIPE}")
    trainer.set_model(config, config.text("model.pretrained_model_name_or_path"), "model.pretrained_model_name_or_path")
    bits = 4 if config.flag("quantization.load_in_4bit") else 8 if config.flag("quantization.load_in_8bit") else 16
    if bits == 4:
        key = "quantization.bnb_4bit_quant_type"
        config.set("method.quantization.format", config.word(key, "nf4", "fp4") or "fp4", "quantization.load_in_4bit")
        key = "quantization.bnb_4bit_use_double_quant"
        config.set("method.quantization.double_quant", config.flag(key), key)
    elif bits == 8:
        config.set("method.quantization.format", "int8", "quantization.load_in_8bit")
    has_adapter = config.said("peft") is not None
    trainer.adapter(config, has_adapter, config.flag("peft.use_dora"), "peft")
    if not has_adapter:
        return
    names = config.names("peft.target_modules")
    if config.flag("peft.match_all_linear") or names in (["*_proj"], ["*"]):
        config.set("method.targets", "all-linear", "peft.target_modules", "peft.match_all_linear")
    elif names is not None and any("*" in name.removeprefix("*.") for name in names):
        config.leave("peft.target_modules", "a pattern: all linear layers are counted instead")
    elif names is not None:
        config.set("method.targets", [name.rpartition(".")[2] for name in names], "peft.target_modules")


def _batch(config: Config) -> None:
    packs = config.whole("packed_sequence.packed_sequence_size") or 0
    if packs:
        config.set("batch.sequence", packs, "packed_sequence.packed_sequence_size")
    elif config.whole("dataset.seq_length") is not None:
        config.set("batch.sequence", config.whole("dataset.seq_length"), "dataset.seq_length")
    else:
        trainer.assume_length(config, "packed_sequence.packed_sequence_size")
    trainer.padding(config, bool(packs))
    norm = config.number("clip_grad_norm.max_norm")
    config.set("loop.clip_grad_norm", 1.0 if norm is None else norm, "clip_grad_norm.max_norm")


def _kernels(config: Config) -> None:
    trainer.attention(config, "model.attn_implementation")
    is_on = config.flag("distributed.activation_checkpointing") or config.flag("activation_checkpointing")
    config.set("kernels.checkpointing", "full" if is_on else "none", "distributed.activation_checkpointing")
    loss = str(config.get("loss_fn._target_") or "").rpartition(".")[2]
    if loss in _LOSSES:
        config.set("kernels.loss", _LOSSES[loss], "loss_fn._target_")
    elif loss:
        config.leave("loss_fn._target_", f"{shown(loss)}: the profile's loss is counted instead")
    name = str(config.get("optimizer._target_") or "torch.optim.AdamW").rpartition(".")[2]
    if name not in _OPTIMIZERS:
        raise config.error("optimizer._target_", f"the optimizer {shown(name)} is not supported yet")
    config.set("optimizer.name", _OPTIMIZERS[name], "optimizer._target_")


def _precision(config: Config) -> None:
    name = str(config.get("model.torch_dtype") or config.get("model.dtype") or "auto").rpartition(".")[2]
    if name != "auto" and name not in trainer.DTYPES:
        raise config.error("model.torch_dtype", f"must be auto, bfloat16, float16 or float32, not {shown(name)}")
    why = "the checkpoint's dtype, assumed bf16" if name == "auto" else ""
    weights = trainer.DTYPES.get(name, "bf16")
    config.set("precision.weights", weights, "model.torch_dtype", why=why)
    if weights == "fp32" and config.value("parallelism.strategy") == "fsdp2":
        why = "FSDP2's mixed precision gathers weights in bf16"
        config.set("precision.compute", "bf16", why=why)
        config.set("precision.autocast", True, why=why)


def _parallelism(config: Config) -> None:
    name = config.text("distributed.strategy") or "fsdp2"
    if name not in _STRATEGIES:
        raise config.error("distributed.strategy", f"{shown(name)} is not supported yet; supported: fsdp2, ddp")
    launch = config.companions.get("accelerate")
    world: object = launch.values.get("num_processes") if launch is not None else config.get("distributed.dp_size")
    for degree in ("tp", "cp", "pp"):
        size = config.whole(f"distributed.{degree}_size")
        if size is not None and size > 1:
            config.set(f"parallelism.{degree}", size, f"distributed.{degree}_size")
    if config.value("parallelism.tp"):
        config.set("kernels.fused", [], why=f"{config.title}'s functions take no tensors that ranks divide")
    if isinstance(world, int) and world > 1:
        ranks = 1
        for degree in ("tp", "cp", "pp") if launch is None else ():
            ranks *= config.value(f"parallelism.{degree}") or 1
        config.set("parallelism.world", world * ranks, *(["distributed.dp_size"] if launch is None else []))
    if (config.gpus or config.value("parallelism.world") or 1) > 1:
        config.set("parallelism.strategy", _STRATEGIES[name], "distributed.strategy")
        sync = "distributed.defer_fsdp_grad_sync"
        config.set("loop.sync_each_batch", config.get(sync) is not None and not config.flag(sync), sync)
    trainer.degrees(config)
    together, micro = config.whole("step_scheduler.global_batch_size"), config.value("batch.micro") or 1
    if together is not None:
        replicas = config.value("parallelism.dp") or 1
        keys = ("step_scheduler.global_batch_size", "step_scheduler.local_batch_size")
        config.set("batch.accumulation", max(together // (micro * replicas), 1), *keys)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "automodel": (_method, _batch, _kernels, _parallelism, _precision),
}
