"""LitGPT's rules.

Source: litgpt 0.5.13 finetune/lora.py, finetune/full.py, args.py, utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, shown

_TARGETS = {
    "lora_query": ("q_proj",),
    "lora_key": ("k_proj",),
    "lora_value": ("v_proj",),
    "lora_projection": ("o_proj",),
    "lora_mlp": ("gate_proj", "up_proj", "down_proj"),
    "lora_head": ("lm_head",),
}
# Precision -> the dtypes of the weights and of autocast.
_PRECISIONS = {
    "bf16-true": ("bf16", None),
    "16-true": ("fp16", None),
    "32-true": ("fp32", None),
    "bf16-mixed": ("fp32", "bf16"),
    "16-mixed": ("fp32", "fp16"),
}
_FORMATS = {
    "bnb.nf4": ("nf4", False),
    "bnb.nf4-dq": ("nf4", True),
    "bnb.fp4": ("fp4", False),
    "bnb.fp4-dq": ("fp4", True),
}
_OPTIMIZERS = {"AdamW": "", "SGD": "sgd", "PagedAdamW": "paged_adamw_32bit", "PagedAdamW8bit": "paged_adamw_8bit"}


def _model(config: Config) -> None:
    """The folder of a checkpoint is named as its model on the Hub; its head is not tied to the embeddings."""
    name = (config.text("checkpoint_dir") or "").strip("/")
    trainer.set_model(config, "/".join(name.split("/")[-2:]), "checkpoint_dir")
    model = trainer.model_of(config)
    if model is not None and model.config.get("tie_word_embeddings") and not config.flag("train.tie_embeddings"):
        untied = {**model.config, "tie_word_embeddings": False, "_name_or_path": config.value("model")}
        config.set("model", {"config": untied}, "checkpoint_dir", why="without tied embeddings")


def _method(config: Config) -> None:
    says_adapters = any(key.startswith("lora_") for key in (*config.document.values, *config.typed))
    trains_adapters = config.command in ("litgpt finetune", "litgpt finetune_lora") or says_adapters
    said = config.text("quantize")
    if said is not None:
        if said not in _FORMATS or not trains_adapters:
            raise config.error(
                "quantize", f"{shown(said)} is not supported; supported with LoRA: {', '.join(_FORMATS)}"
            )
        format_, double = _FORMATS[said]
        config.set("method.quantization.format", format_, "quantize")
        config.set("method.quantization.double_quant", double, "quantize")
    keys = [key for key in _TARGETS if config.flag(key)]
    trainer.adapter(config, trains_adapters, False, *keys[:1])
    if trains_adapters:
        config.set("method.targets", [name for key in keys for name in _TARGETS[key]], *keys)


def _precision(config: Config) -> None:
    name = config.text("precision") or "bf16-mixed"
    if name not in _PRECISIONS:
        raise config.error("precision", f"must be {', '.join(_PRECISIONS)}, not {shown(name)}")
    weights, casts = _PRECISIONS[name]
    trainer.lower_precision(config, weights, casts, "precision")
    config.found.pop("loop.grad_scaler", None)


def _batch(config: Config) -> None:
    if config.get("train.max_seq_length") is None:
        trainer.assume_length(config, "train.max_seq_length")
    trainer.padding(config, False)
    devices = config.whole("devices") if config.get("devices") != "auto" else None
    world = (devices or 1) * (config.whole("num_nodes") or 1)
    if config.get("devices") == "auto":
        config.leave("devices", "as many as the machine has; add --gpus")
    if world > 1:
        config.set("parallelism.world", world, "devices", "num_nodes")
    together = config.whole("train.global_batch_size") or 1
    micro = (config.whole("train.micro_batch_size") or 1) * (config.gpus or world)
    config.set("batch.accumulation", max(together // micro, 1), "train.global_batch_size", "train.micro_batch_size")
    if (config.gpus or world) > 1:
        why = f"{config.title} shards over several devices"
        config.set("parallelism.strategy", "fsdp2", why=why)
        config.set("kernels.checkpointing", "full", why=f"{why}, and checkpoints every block")
    config.set("loop.clip_grad_norm", config.number("train.max_norm"), "train.max_norm")


def _optimizer(config: Config) -> None:
    key = "optimizer.class_path" if isinstance(config.get("optimizer"), dict) else "optimizer"
    name = str(config.get(key) or "AdamW").rpartition(".")[2]
    if name not in _OPTIMIZERS:
        raise config.error(
            key, f"the optimizer {shown(name)} is not supported yet; supported: {', '.join(_OPTIMIZERS)}"
        )
    if _OPTIMIZERS[name]:
        config.set("optimizer.name", _OPTIMIZERS[name], key)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "litgpt": (_model, _method, _batch, _optimizer, trainer.degrees, _precision),
}
