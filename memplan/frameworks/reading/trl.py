"""Rules of TRL's command line, and of transformers' TrainingArguments alone.

Source: trl 0.24.0, 1.14.1 and 1.16.0 scripts/sft.py, trainer/sft_config.py, base_config.py, model_config.py, utils.py
get_quantization_config, get_peft_config; transformers 5.24 training_args.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from memplan.core.errors import SpecError
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, version_number
from memplan.models.peft_methods import default_targets

_REWARD, _TEACHER = "reward_model_name_or_path", "teacher_model_name_or_path"
_PPO_REWARD = "reward_model_path"
# Keys that only other trainers' configs have. A TRL file does not name its trainer: the command does.
_OTHER_TRAINERS = {
    "distillation": (_TEACHER,),
    "GRPO or RLOO": ("num_generations", "max_completion_length", "reward_funcs", "use_vllm"),
    "PPO": (_PPO_REWARD,),
    "KTO": ("desirable_weight", "undesirable_weight"),
    "DPO or KTO": (
        "max_prompt_length",
        "beta",
        "precompute_ref_log_probs",
        "ref_model_init_kwargs",
        "f_divergence_type",
    ),
    "reward modelling": ("center_rewards_coefficient",),
}
_READ = {"PPO": "ppo", "distillation": "distill", "GRPO or RLOO": "grpo", "KTO": "kto", "DPO or KTO": "dpo"} | {
    "reward modelling": "reward"
}
_SFT_LOSSES = ("nll", "chunked_nll")


_GENERATING = ("grpo", "rloo", "distillation")
_COMPARING = ("dpo", "kto", "orpo", "cpo", "simpo", "reward", "gkd")
_LATER = ("onlinedpo", "xpo", "prm", "bco")
_HINT = "--trainer names another"


def _command(config: Config) -> str:
    """Return the trainer that a command or script names: `trl dpo`, `reward_modeling.py`, `train.py:7 KTOTrainer`."""
    name = config.command.lower().replace("trainer", "").replace("online_dpo", "onlinedpo")
    words = re.findall("[a-z]+", name)
    later = [word.upper() for word in words if word in _LATER and name.endswith(".py")]
    if later:
        raise SpecError(f"spec: {config.command} is taken for {later[0]}, which is not supported yet; {_HINT}", "spec")
    return next((word for word in reversed(words) if word in (*_GENERATING, *_COMPARING, "ppo", "sft")), "")


def trainer_of(config: Config) -> None:
    """The trainer that a command or script names, or that the file's keys tell."""
    typed = config.options.get("trainer")
    named = typed or _command(config)
    is_by_name = typed is None and config.command.endswith(".py")
    why = f"assumed: the script is {config.command}; {_HINT}" if is_by_name else config.command or f"trl {named}"
    if named == "cpo" and config.get("loss_type") == "simpo" and not config.number("cpo_alpha"):
        named = "simpo"
    if named in _GENERATING:
        _generation(config, "distill" if named == "distillation" else named, why=why)
        return
    if named == "ppo":
        _ppo(config, named, why=why)
        return
    if typed is not None or named in _COMPARING:
        trainer.preference(config, named, why=why)
        teacher = config.text(_TEACHER) if named == "gkd" else None
        if teacher is not None:
            trainer.role(config, "teacher", teacher, _TEACHER)
        return
    for title, told in _told(config) if not named else ():
        name, key, why = _READ[title], told, f"assumed: {title} has this key; {_HINT}"
        if name == "dpo":
            name, key, why = next(_by_names(config), (name, key, why))
        read = {"grpo": _generation, "distill": _generation, "ppo": _ppo}.get(name, trainer.preference)
        read(config, name, key, why=why)
        return
    kind = config.get("loss_type")
    if kind is not None and kind not in _SFT_LOSSES:
        config.leave("loss_type", f"{kind!r:.40}: the profile's loss is counted instead")
    elif config.said("loss_type") == "chunked_nll" and config.title.startswith("TRL 1."):
        config.set("kernels.loss", "chunked", "loss_type")


def _told(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the trainers whose keys the file has, with the key."""
    for title, keys in _OTHER_TRAINERS.items():
        yield from ((title, key) for key in keys if config.said(key) is not None)


def _by_names(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield the trainer of pairs or single completions that the run's own names have, with the key and why."""
    for key in ("hub_model_id", "output_dir", "run_name"):
        for word in re.findall("[a-z]+", str(config.said(key)).lower()):
            if word in _COMPARING[:5]:
                yield word, key, f"assumed: its name is {word}'s; {_HINT}"


def _ppo(config: Config, name: str, *keys: str, why: str) -> None:
    """PPO, whose script loads the policy of `sft_model_path`; its prompts have any length."""
    trainer.set_model(config, config.text("sft_model_path"), "sft_model_path")
    trainer.ppo(config, _PPO_REWARD, "response_length", *keys, why=why)
    trainer.assume_length(config, "max_length")


def _generation(config: Config, name: str, *keys: str, why: str) -> None:
    version = version_number(config.title.rpartition(" ")[2])
    mode = "server" if version < (1,) else "colocate"
    trainer.generation(config, name, *keys, adapts=config.flag("use_peft"), mode=mode, why=why)
    role, key = ("teacher", _TEACHER) if name == "distill" else ("reward", _REWARD)
    model = config.text(key)
    if model is not None:
        trainer.role(config, role, model, key)
    if name == "distill":
        config.found.pop("reference", None)  # its beta chooses a divergence
    for bonus in ("entropy_coef", "use_adaptive_entropy"):
        if config.said(bonus) and name == "grpo":
            config.set("loop.entropy_bonus", True, bonus)


def method(config: Config) -> None:
    bits = 4 if config.flag("load_in_4bit") else 8 if config.flag("load_in_8bit") else 16
    has_adapter = config.flag("use_peft")
    if bits < 16 and not has_adapter:
        raise config.error(f"load_in_{bits}bit", "quantised weights train only under adapters; set use_peft: true")
    if bits == 4:
        config.set("method.quantization.format", config.word("bnb_4bit_quant_type", "nf4", "fp4"), "load_in_4bit")
        key = "use_bnb_nested_quant"
        config.set("method.quantization.double_quant", config.flag(key), key)
    elif bits == 8:
        config.set("method.quantization.format", "int8", "load_in_8bit")
    elif config.text("stored_format") is not None:  # a script's own config
        config.set("method.quantization.format", config.text("stored_format"), "stored_format")
    trainer.adapter(config, has_adapter, config.flag("use_dora"), "use_peft", "use_dora")
    if has_adapter:
        _targets(config)
        if config.names("lora_modules_to_save"):
            config.set("method.modules_to_save", config.names("lora_modules_to_save"), "lora_modules_to_save")
        if config.flag("use_rslora"):
            config.set("method.options", {"use_rslora": True}, "use_rslora")


def _targets(config: Config) -> None:
    names = config.names("lora_target_modules")
    if names is not None:
        config.set("method.targets", "all-linear" if names == ["all-linear"] else names, "lora_target_modules")
        return
    model = trainer.model_of(config)
    if model is None:  # which is an error later
        return
    modules = default_targets("lora", model.model_type)
    if not modules:
        raise config.error("use_peft", "peft has no default modules for this model; name lora_target_modules")
    config.set("method.targets", list(modules), why="peft's default for the model's family")


def _precision(config: Config) -> None:
    name = str(config.get("dtype") or "auto")
    weights = trainer.DTYPES.get(name, "bf16")
    if name not in trainer.DTYPES and name != "auto":
        raise config.error("dtype", f"must be auto, bfloat16, float16 or float32, not {name!r:.40}")
    said = config.said("bf16")
    casts = "fp16" if config.flag("fp16") else "bf16" if said is None or config.flag("bf16") else None
    if casts == "fp16" and said is not None and config.flag("bf16"):
        raise config.error("fp16", "bf16 and fp16 exclude each other")
    keys = ("dtype", *((casts,) if casts and config.said(casts) is not None else ()))
    trainer.lower_precision(config, weights, casts, *keys)
    if name == "auto":
        origin = config.found["precision.weights"]
        config.found["precision.weights"] = origin._replace(why=f"{origin.why}: the checkpoint's dtype, assumed bf16")


def _trainer_precision(config: Config) -> None:
    """The Trainer gets a model that the script has loaded: in the checkpoint's dtype, as transformers 5 does."""
    casts = "fp16" if config.flag("fp16") else "bf16" if config.flag("bf16") else None
    trainer.lower_precision(config, "bf16", casts, casts or "bf16")
    if config.value("precision.weights") == "bf16" and "precision.master" not in config.found:
        why = "the script loads the model; assumed in a checkpoint's bf16"
        config.set("precision.weights", config.value("precision.weights"), why=why)


def _batch(config: Config) -> None:
    joins = config.value("trainer") == "dpo" and config.value("profile") == "trl-0.24"  # if padding_free says so
    if config.value("trainer") not in (None, "sft") and not joins:
        if config.flag("padding_free"):
            config.leave("padding_free", "batches are counted as padded")
        trainer.padding(config, False)
    elif config.flag("packing"):
        strategy = config.word("packing_strategy", "bfd", "bfd_split", "wrapped", "ffd")
        strategy = "bfd" if strategy == "ffd" else strategy  # trl 0.18's name
        trainer.packing(config, strategy, "packing", "packing_strategy")
    else:
        trainer.packing(config, "padding_free" if config.flag("padding_free") else None, "padding_free")


def _kernels(config: Config) -> None:
    trainer.attention(config)
    trainer.checkpointing(config)
    if config.value("kernels.checkpointing") == "full" and config.flag("activation_offloading"):
        config.set("kernels.checkpointing", "offload", "activation_offloading")  # nothing else is kept by layers
        config.found.pop("parallelism.offload.activations", None)
    if config.flag("use_liger_loss"):  # TRL 0.24
        trainer.fused_loss(config, "use_liger_loss")
    if not config.flag("use_liger_kernel"):
        return
    section = config.section("liger_kernel_config")
    # trl 1.16.0 trainer/sft_trainer.py, dpo_trainer.py: only layer kernels, around the trainer's own head
    profile = config.value("profile")
    fuses_loss, is_older = profile != "trl-1.15", profile == "trl-0.24"  # whose other trainers have use_liger_loss
    on = {"rope": True, "rms_norm": True, "swiglu": True, "cross_entropy": False}
    on["fused_linear_cross_entropy"] = fuses_loss
    for name in section.values if section is not None else ():
        on[name] = config.flag(f"liger_kernel_config.{name}")
    if on["fused_linear_cross_entropy"] and not fuses_loss:
        key = "liger_kernel_config.fused_linear_cross_entropy"
        raise config.error(
            key, "TRL refuses it since 1.15, whose trainers have a tiled head of their own; leave it out"
        )
    kernels = [name for name in ("rope", "rms_norm", "swiglu", "cross_entropy") if on[name]]
    config.set("kernels.fused", kernels, "use_liger_kernel")
    if on["fused_linear_cross_entropy"] and not (is_older and config.value("trainer")):
        trainer.fused_loss(config, "use_liger_kernel")


def _full(config: Config) -> None:
    config.set("method.kind", "full", why="TrainingArguments have no adapters")


def _unpacked(config: Config) -> None:
    trainer.padding(config, False)


def _evaluation(config: Config) -> None:
    does = str(config.get("eval_strategy")) not in ("no", "None", "False")
    trainer.evaluation(config, does, "eval_strategy", "per_device_eval_batch_size")


def _launch(config: Config) -> None:
    """`accelerate_config` names a file, or one of TRL's own."""
    name = config.text("accelerate_config")
    if name is not None and "accelerate" not in config.companions:
        own = {"single_gpu": "", "multi_gpu": "ddp", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}
        own |= {"fsdp1": "fsdp", "fsdp2": "fsdp2"}
        if name in own:
            if own[name]:
                config.set("parallelism.strategy", own[name], "accelerate_config")
        else:
            section = config.section("accelerate_config")
            config.companions = {**config.companions, "accelerate": section} if section else config.companions
    trainer.parallelism(config)


RULES: Mapping[str, tuple[Rule, ...]] = {
    "trl": (trainer_of, method, _batch, _kernels, trainer.optimizer, trainer.loop, _launch, _precision, _evaluation),
    "transformers": (
        *(_full, _unpacked, _kernels, trainer.optimizer, trainer.loop, trainer.parallelism, _trainer_precision),
        *(_evaluation,),
    ),
}
