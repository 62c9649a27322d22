"""Rules of `unsloth train` and Unsloth Studio's files.

Source: unsloth 2026.10.9 unsloth_cli/config.py, studio/backend/core/training/trainer.py; models/loader.py, rl.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks.reading import trainer, trl
from memplan.frameworks.reading.config import Config, Rule, shown
from memplan.models.cards import card_names, other_format

_EMBEDDINGS = ("embed_tokens", "lm_head")  # among targets, models/llama.py moves them to modules_to_save
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_CHECKPOINTING = {"unsloth": "offload", "true": "full", "none": "none", "false": "none"}


_ENDINGS = ("-unsloth-bnb-4bit", "-bnb-4bit", "-unsloth", "-instruct", "-it", "-base", "-pt")


def original(config: Config) -> None:
    """Unsloth's copies of a model have its name: unsloth/Meta-Llama-3.1-8B-bnb-4bit. Its loader chooses among them by
    `load_in_4bit`, whatever the name says."""
    name = config.get("model")
    if not isinstance(name, str) or not name.startswith("unsloth/") or "model" in config.options:
        return
    config.set("model", name, "model")
    for field in ("method.quantization.format", "method.quantization.double_quant"):
        config.found.pop(field, None)
    if trainer.model_of(config) is not None:
        return
    card = name.partition("/")[2].lower().removeprefix("meta-")
    other = other_format(name)
    for ending in ("", *_ENDINGS):
        card = other[0] if other is not None else card.removesuffix(ending)
        if card in card_names():
            origin = config.found["model"]
            config.found["model"] = origin._replace(value=card, why=f"a copy of the original: {origin.why}")
            return


def _method(config: Config) -> None:
    if config.command == "unsloth-cli.py":  # of its repository, whose --load_in_4bit is off
        config.defaults = {**config.defaults, "training.load_in_4bit": False}
    kind = config.word("training.training_type", "lora", "full") or "lora"
    if kind == "lora" and config.flag("training.load_in_4bit"):
        config.set("method.quantization.format", "nf4", "training.load_in_4bit")
        config.set("method.quantization.double_quant", True, why=f"{config.title} sets it")
    is_dora = config.flag("lora.use_dora")
    trainer.adapter(config, kind == "lora", is_dora, "training.training_type", "lora.use_dora")
    if kind == "lora":
        names = config.names("lora.target_modules") or list(TARGETS)
        moved = [name for name in names if name in _EMBEDDINGS]
        saved = list(dict.fromkeys([*(config.names("modules_to_save") or []), *moved]))
        if saved:
            why = f"{config.title} trains them as full matrices" if moved else ""
            config.set(
                "method.modules_to_save", saved, "modules_to_save", *["lora.target_modules"] * bool(moved), why=why
            )
        names = [name for name in names if name not in moved]
        config.set("method.targets", "all-linear" if names == ["all-linear"] else names, "lora.target_modules")
        if config.flag("lora.use_rslora"):
            config.set("method.options", {"use_rslora": True}, "lora.use_rslora")
        if config.flag("lora.use_loftq"):
            config.leave("lora.use_loftq", "not counted")
    model = trainer.model_of(config)
    if model is not None and model.has_tower:
        parts = {"vision": "lora.finetune_vision_layers", "language": "lora.finetune_language_layers"}
        frozen = [part for part, key in parts.items() if not config.flag(key)]
        config.set("method.frozen", frozen, *parts.values())
        for key in ("lora.finetune_attention_modules", "lora.finetune_mlp_modules"):
            if config.said(key) is not None and not config.flag(key):
                config.leave(key, "adapters of these modules are counted")


def _trainer(config: Config) -> None:
    """A trainer of TRL, which only a script names."""
    if not config.command:
        return
    beta_is_zero = str(config.get("loss_type") or "dapo").lower() in ("dapo", "dr_grpo")
    config.defaults = {**config.defaults, "beta": 0.0 if beta_is_zero else 0.001}
    trl.trainer_of(config)
    group = config.value("batch.generations")
    if group and (config.value("batch.micro") or 1) * (config.value("batch.accumulation") or 1) % group:
        config.set("batch.micro", group, "num_generations", why=f"{config.title} makes a step of other sizes this one")
    longest, key = config.whole("training.max_seq_length"), "training.max_seq_length"
    if group and longest and config.said("max_prompt_length") is None:
        rest = max(longest - (config.value("batch.new_tokens") or 0), 1)
        config.set("batch.sequence", rest, key, why="assumed: a prompt and its completion fill the context")
    if config.value("rollout") is not None:
        config.set("serving.max_model_len", longest, key)


def _settings(config: Config) -> None:
    value = str(config.get("training.gradient_checkpointing")).lower()
    if value not in _CHECKPOINTING:
        raise config.error("training.gradient_checkpointing", f"must be unsloth, true or none, not {shown(value)}")
    config.set("kernels.checkpointing", _CHECKPOINTING[value], "training.gradient_checkpointing")
    config.set("optimizer.name", "adamw_8bit", why=f"default of {config.title}")
    if config.said("training.optim") is not None:
        trainer.optimizer(config, "training.optim")
    trainer.packing(config, "bfd" if config.flag("training.packing") else None, "training.packing")
    trainer.loop(config)
    trainer.lower_precision(config, "bf16", "bf16")
    for field in [field for field in config.found if field.startswith("precision.")]:
        config.found[field] = config.found[field]._replace(why="bf16, on a GPU that has it")


RULES: Mapping[str, tuple[Rule, ...]] = {
    "unsloth": (original, _method, _trainer, _settings),
}
