"""torchtune's rules.

Source: torchtune 0.6.1 recipes/lora_finetune_*.py, full_finetune_*.py, models/*/_model_builders.py, modules/loss.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from memplan.frameworks.change_table import pairs
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, shown

# torchtune.models.llama3_1.qlora_llama3_1_8b, qwen2_5_0_5b_instruct, phi3_mini
_BUILDER = re.compile(r"(?:(q?)(lora|dora)_)?(?:code_)?([a-z]+)([\d_]*?)_?((?:\d+_)?\d+b|mini)(?:_base|_instruct)?")
_OPTIMIZERS = pairs(
    "torch.optim.AdamW=adamw_torch torch.optim.Adam=adamw_torch torch.optim.SGD=sgd "
    "bitsandbytes.optim.PagedAdamW=paged_adamw_32bit bitsandbytes.optim.PagedAdamW8bit=paged_adamw_8bit "
    "bitsandbytes.optim.AdamW8bit=adamw_bnb_8bit bitsandbytes.optim.AdamW=adamw_torch "
    "torchao.optim.AdamW8bit=adamw_torch_8bit torchao.optim.AdamW4bit=adamw_torch_4bit "
    "torchao.prototype.low_bit_optim.AdamW8bit=adamw_torch_8bit"
)
_LOSSES = {
    "LinearCrossEntropyLoss": "chunked",
    "CEWithChunkedOutputLoss": "chunked",
    "CrossEntropyLoss": "hf",
}


def _model(config: Config) -> None:
    """The builder's name says the model and the method."""
    builder = (config.text("model._component_") or "").rpartition(".")[2]
    if not builder:
        trainer.adapter(config, False, False)
        return
    match = _BUILDER.fullmatch(builder)
    if match is None:
        raise config.error("model._component_", f"{shown(builder)} is not known here")
    quantised, kind, family, version, size = match.groups()
    numbers = [*filter(None, version.split("_")), *size.split("_")]
    splits = ((".".join(numbers[:n]), ".".join(numbers[n:])) for n in range(len(numbers) - 1, -1, -1))
    known = next(filter(None, (trainer.card_of(family, *split) for split in splits)), None)
    if known is None and "model" not in config.options:
        text = f"the model of {builder} is not known here; write memplan MODEL --spec {config.document.name}"
        raise config.error("model._component_", text)
    trainer.set_model(config, known or "", "model._component_", why="the builder's name")
    if quantised or config.flag("model.quantize_base"):
        config.set("method.quantization.format", "nf4", "model._component_")
        config.set("method.quantization.double_quant", True, why="torchao's NF4Tensor")
    trainer.adapter(config, kind is not None, kind == "dora" or config.flag("model.use_dora"), "model._component_")
    if kind is not None:
        _targets(config)


def _targets(config: Config) -> None:
    names = ["o_proj" if name == "output_proj" else name for name in config.names("model.lora_attn_modules") or []]
    names += ["gate_proj", "up_proj", "down_proj"] if config.flag("model.apply_lora_to_mlp") else []
    names += ["lm_head"] if config.flag("model.apply_lora_to_output") else []
    config.set("method.targets", names, "model.lora_attn_modules", "model.apply_lora_to_mlp")


def _settings(config: Config) -> None:
    for section, word in (("loss", "rlhf"), ("teacher_model", ""), ("reward_and_value_model", "")):
        if word in str(config.get(f"{section}._component_")) and config.said(f"{section}._component_") is not None:
            raise config.error(f"{section}._component_", "only supervised fine-tuning is supported yet")
    if config.value("batch.sequence") is None:
        trainer.assume_length(config, "tokenizer.max_seq_len")
    packs = config.flag("dataset.packed")
    if packs:
        config.leave("dataset.packed", "packed samples' mask is not counted")
    trainer.padding(config, True)  # the collator makes no mask
    loss = str(config.get("loss._component_") or "").rpartition(".")[2]
    if loss in _LOSSES:
        config.set("kernels.loss", _LOSSES[loss], "loss._component_")
    elif loss:
        config.leave("loss._component_", f"{shown(loss)}: the profile's loss is counted instead")
    checkpoints, offloads = config.flag("enable_activation_checkpointing"), config.flag("enable_activation_offloading")
    kind = "none" if not checkpoints else "offload" if offloads else "full"
    keys = ("enable_activation_checkpointing", *(["enable_activation_offloading"] if offloads else []))
    if offloads and not checkpoints:
        raise config.error("enable_activation_offloading", "torchtune needs enable_activation_checkpointing with it")
    config.set("kernels.checkpointing", kind, *keys)
    config.set("loop.clip_grad_norm", config.number("clip_grad_norm"), "clip_grad_norm")
    name = config.text("dtype") or "bf16"
    if name not in trainer.DTYPES:
        raise config.error("dtype", f"must be bf16, fp16 or fp32, not {shown(name)}")
    config.set("precision.weights", trainer.DTYPES[name], "dtype")


def _optimizer(config: Config) -> None:
    key = "optimizer._component_"
    name = config.text(key)
    if name is None:
        return
    if name not in _OPTIMIZERS:
        raise config.error(key, f"{shown(name)} is not supported yet; supported: {', '.join(_OPTIMIZERS)}")
    is_fused = config.flag("optimizer.fused") and _OPTIMIZERS[name] == "adamw_torch"
    config.set("optimizer.name", "adamw_torch_fused" if is_fused else _OPTIMIZERS[name], key)
    if config.flag("optimizer_in_bwd"):
        config.set("optimizer.in_backward", True, "optimizer_in_bwd")


def _parallelism(config: Config) -> None:
    launch = config.companions.get("accelerate")
    world = config.gpus or (launch.values.get("num_processes") if launch is not None else None)
    if isinstance(world, int) and world > 1:
        why = launch.where("num_processes") if launch is not None else ""
        config.set("parallelism.world", world, why=f"{why} nproc_per_node".strip())
        config.set("parallelism.strategy", "fsdp2", why=f"{config.title}'s distributed recipes shard with FSDP2")
        if config.flag("fsdp_cpu_offload"):
            config.set("parallelism.offload.parameters", True, "fsdp_cpu_offload")
            config.set("parallelism.offload.optimizer", True, "fsdp_cpu_offload")
    trainer.degrees(config)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "torchtune": (_model, _settings, _optimizer, _parallelism),
}
