"""Axolotl's rules.

Source: axolotl 0.12.2 and 0.21.0 utils/schemas/config.py, peft.py, validation.py; utils/config/__init__.py;
loaders/model.py, adapter.py; core/builders/base.py, causal.py; utils/__init__.py; integrations.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from memplan.frameworks.change_table import pairs
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, version_number

_LIGER = pairs(
    "liger_rope=rope liger_rms_norm=rms_norm liger_glu_activation=swiglu liger_swiglu=swiglu "
    "liger_cross_entropy=cross_entropy"
)
_LORA_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
_OLD_ATTENTION = pairs(
    "xformers_attention=xformers sage_attention=sage flex_attention flash_attention=flash_attention_2 "
    "sdp_attention=sdpa eager_attention=eager"
)


# The pattern of most examples: projections of each layer, as in
# model.language_model.layers.[\\d]+.(mlp|self_attn).(up|down|gate|q|k|v|o)_proj
_PROJECTIONS = re.compile(
    r"(?P<within>[\w.]*)layers\.(?:\[\\d\]|\\d)\+\.(?:\([\w.|]+\)\??\.?)*\((?P<names>\w+(?:\|\w+)*)\)_proj"
)


# TRL's keys of trainers that generate -> Axolotl's.
_GENERATION = {
    **{
        key: f"trl.{key}"
        for key in (
            *("num_generations", "max_completion_length", "use_vllm", "vllm_mode", "vllm_enable_sleep_mode"),
            *("generation_batch_size", "num_iterations"),
        )
    },
    "max_prompt_length": "sequence_len",
    "vllm_gpu_memory_utilization": "vllm.gpu_memory_utilization",
    "vllm_max_model_length": "vllm.max_model_len",
    "vllm_tensor_parallel_size": "vllm.tensor_parallel_size",
}
# A pattern of `unfrozen_parameters` that is the language model, or its head.
_LANGUAGE = re.compile(r"\^?(?:model\\?\.)?(?:language_model|lm_head)(?:\\?\.(?:model\\?\.)?)?(?:\.?\*)?$")
_TRAINERS = {"ipo": "dpo", "gdpo": "grpo"}


def _preference(config: Config) -> None:
    """`rl`; simpo is CPO's trainer, which adds the chosen half's likelihood unless cpo_alpha is 0."""
    kind = config.said("rl")
    if kind is None:
        return
    if kind not in ("dpo", "ipo", "orpo", "simpo", "kto", "grpo", "gdpo"):
        raise config.refuse("rl", "dpo, ipo, orpo, simpo, kto, grpo, gdpo")
    name = _TRAINERS.get(kind, kind)
    if name == "grpo":
        beta = "trl.beta" if config.said("trl.beta") is not None else "rl_beta"
        trainer.generation(config, name, "rl", adapts=bool(config.said("adapter")), beta=beta, **_GENERATION)
        models = [each for each in config.names("trl.reward_funcs") or () if "/" in each]
        if models:
            trainer.role(config, "reward", models[0], "trl.reward_funcs")
        if len(models) > 1:
            config.leave("trl.reward_funcs", "one reward model is counted")
        return
    trainer.preference(
        config, ("simpo" if config.number("cpo_alpha") == 0 else "cpo") if name == "simpo" else name, "rl"
    )
    if config.said("rl_adapter_ref_model") is not None and config.flag("rl_adapter_ref_model"):
        config.set("reference", "copy", "rl_adapter_ref_model")


def _method(config: Config) -> None:
    kind = config.word("adapter", "lora", "qlora")
    bits = 4 if config.flag("load_in_4bit") else 8 if config.flag("load_in_8bit") else 16
    if kind is None and bits < 16:
        raise config.error(f"load_in_{bits}bit", "Axolotl quantises only under an adapter; set adapter")
    if kind == "qlora" and bits != 4 and not config.flag("gptq"):
        raise config.error("adapter", "qlora needs load_in_4bit: true")
    if kind is not None and bits == 4:
        _quantised(config, kind)
    elif kind is not None and bits == 8:
        config.set("method.quantization.format", "int8", "load_in_8bit")
    elif config.flag("gptq"):
        config.set("method.quantization.format", "gptq-int4", "gptq")
    if kind is not None and bits < 16 and config.flag("quantize_moe_experts"):
        model = trainer.model_of(config)
        if bits != 4:
            config.leave("quantize_moe_experts", "experts in 8 bits are counted as loaded, not supported yet")
        elif model is None or "E" in model.axes():
            config.set("method.quantization.experts", True, "quantize_moe_experts")
        why = "a model whose experts are quantised is not prepared"
        config.set("method.quantization.kbit_preparation", False, "quantize_moe_experts", why=why)
    trainer.adapter(config, kind is not None, config.flag("peft_use_dora"), "adapter", "peft_use_dora")
    model, trained = trainer.model_of(config), config.names("unfrozen_parameters")
    if trained and model is not None and model.has_tower and all(_LANGUAGE.match(name) for name in trained):
        config.set("method.frozen", [*trainer.towers(model), "projector"], "unfrozen_parameters")
    elif trained:
        config.leave("unfrozen_parameters", "what trains, not supported yet")
    if kind is not None:
        _targets(config)
        if config.names("lora_modules_to_save"):
            config.set("method.modules_to_save", config.names("lora_modules_to_save"), "lora_modules_to_save")
        if config.flag("peft_use_rslora"):
            config.set("method.options", {"use_rslora": True}, "peft_use_rslora")


def _stored(config: Config) -> None:
    """A checkpoint in mxfp4 or fp8 trains dequantised, as the configs say that Axolotl publishes."""
    if config.flag("model_quantization_config_kwargs.dequantize"):
        config.get("model_quantization_config")


def _quantised(config: Config, kind: str) -> None:
    """Axolotl writes the 4-bit settings itself for qlora; for lora, transformers' defaults hold."""
    own = kind == "qlora"
    config.set("method.quantization.format", "nf4" if own else "fp4", "load_in_4bit", "adapter")
    config.set("method.quantization.double_quant", own, "load_in_4bit", why=f"{config.title} sets it")
    if config.said("embeddings_skip_upcast") is not None:
        kind = "axolotl" if config.flag("embeddings_skip_upcast") else "axolotl-0.12"
        config.set("method.quantization.kbit_preparation", kind, "embeddings_skip_upcast")
    section = config.section("bnb_config_kwargs")
    for name, value in section.values.items() if section is not None and own else ():
        key = f"bnb_config_kwargs.{name}"
        match name:
            case "bnb_4bit_quant_type":
                config.set("method.quantization.format", config.word(key, "nf4", "fp4"), key)
            case "bnb_4bit_use_double_quant":
                config.set("method.quantization.double_quant", config.flag(key), key)
            case "llm_int8_skip_modules":
                config.set("method.quantization.skip", config.names(key), key)
            case "bnb_4bit_quant_storage" | "bnb_4bit_compute_dtype":
                config.get(key)
            case _:
                if value:
                    config.leave(key, "not counted")


def _targets(config: Config) -> None:
    modules = config.names("lora_target_modules")
    if config.flag("lora_target_linear"):
        config.set("method.targets", "all-linear", "lora_target_linear")
    elif modules == ["all-linear"]:
        config.set("method.targets", "all-linear", "lora_target_modules")
    elif modules is not None and (pattern := _PROJECTIONS.fullmatch(modules[0])) is not None:
        names = [f"{name}_proj" for name in pattern["names"].split("|")]
        config.set("method.targets", names, "lora_target_modules")
        model = trainer.model_of(config)
        if "language_model" in pattern["within"] and model is not None and model.has_tower:
            why = "adapters of the language model"
            config.set("method.frozen", [*trainer.towers(model), "projector"], "lora_target_modules", why=why)
    elif modules is not None:
        if any(not name.replace(".", "").replace("_", "").isalnum() for name in modules):
            config.leave("lora_target_modules", "a pattern: all linear layers are counted instead")
        else:
            config.set("method.targets", modules, "lora_target_modules")
    elif not config.get("lora_target_parameters"):
        raise config.error("adapter", "set lora_target_linear: true, or name lora_target_modules")


def _precision(config: Config) -> None:
    bf16, key = config.get("bf16"), "bf16"
    auto = bf16 == "auto" and not config.flag("fp16")
    if auto or (bf16 not in (None, "auto") and (bf16 == "full" or config.flag("bf16"))) or config.flag("bfloat16"):
        dtype, key = "bf16", key if config.get("bf16") else "bfloat16"
    elif config.flag("fp16") or config.flag("float16") or config.flag("load_in_8bit"):
        dtype, key = "fp16", next(k for k in ("fp16", "float16", "load_in_8bit") if config.flag(k))
    else:
        dtype = "fp32"
    casts = None if dtype == "fp32" or bf16 == "full" or key == "load_in_8bit" else dtype
    trainer.lower_precision(config, dtype, casts, key)
    if auto:
        for field in [field for field in config.found if field.startswith("precision.")]:
            origin = config.found[field]
            config.found[field] = origin._replace(why=f"{origin.why}: auto, on a GPU with bf16")
    said = config.get("peft_autocast_adapter_dtype")
    if said is not None and config.value("method.kind") != "full":
        on = config.flag("peft_autocast_adapter_dtype")
        config.set("method.adapter_dtype", "fp32" if on else dtype, "peft_autocast_adapter_dtype")


def _batch(config: Config) -> None:
    total, micro = config.whole("batch_size"), config.value("batch.micro")
    if total is not None and config.said("gradient_accumulation_steps") is None and micro:
        config.set("batch.accumulation", max(total // micro, 1), "batch_size", "micro_batch_size")
    if config.flag("sample_packing"):
        trainer.packing(config, "sample_packing", "sample_packing")
        is_flash = str(config.value("kernels.attention")).startswith("flash_attention")
        if config.get("multipack_real_batches") is not None and config.flag("multipack_real_batches") == is_flash:
            rows = "one row" if is_flash else "a row of its own each"
            config.leave("multipack_real_batches", f"the sequences of a batch are counted as {rows}")
    else:
        trainer.packing(config, "padding_free" if config.flag("batch_flattening") else None, "batch_flattening")


def _attention(config: Config) -> None:
    old = [key for key in _OLD_ATTENTION if config.flag(key)]
    if config.said("attn_implementation") is None and old:
        config.defaults = {**config.defaults, old[0]: _OLD_ATTENTION[old[0]]}
        kind = _OLD_ATTENTION[old[0]]
        if kind in ("xformers", "sage"):
            config.leave(old[0], "sdpa is counted instead")
        else:
            config.set("kernels.attention", kind, old[0])
    elif config.flag("gemma4_hybrid_attn_impl"):  # flash_attention_2 in layers with a window, sdpa in the others
        config.get("attn_implementation")
        config.leave("gemma4_hybrid_attn_impl", "sdpa is counted in every layer")
    else:
        trainer.attention(config)


def _kernels(config: Config) -> None:
    plugins = config.names("plugins") or []
    fused: list[str] = []
    keys: list[str] = []
    for plugin in plugins:
        if "liger" in plugin.lower():
            on = [key for key in _LIGER if config.flag(key)]
            fused += [_LIGER[key] for key in on]
            keys += on
            if config.flag("liger_fused_linear_cross_entropy"):
                trainer.fused_loss(config, "liger_fused_linear_cross_entropy")
        elif "cut_cross_entropy" in plugin:
            if config.flag("cut_cross_entropy"):
                config.set("kernels.loss", "fused", "plugins", why="Cut Cross-Entropy, on with its plugin")
        else:
            config.leave("plugins", f"{plugin.rpartition('.')[2][:60]} is not counted")
    if config.flag("chunked_cross_entropy"):
        config.set("kernels.loss", "chunked", "chunked_cross_entropy")
    if config.value("trainer") not in (None, "sft"):  # TRL calls the model without labels, and takes its own loss
        config.found.pop("kernels.loss", None)
    for name, key in (("dpo", "dpo_use_liger_kernel"), ("grpo", "trl.use_liger_loss")):
        if config.value("trainer") == name and config.flag(key):
            trainer.fused_loss(config, key)
    set_kernels = [key for key in _LORA_KERNELS if config.said(key) is not None]
    if any(config.flag(key) for key in set_kernels) and (
        _is_at_least_0_21(config) or not config.number("lora_dropout")
    ):
        fused.append("lora")
        keys += [key for key in set_kernels if config.flag(key)]
    elif not set_kernels and config.said("rl") is None and _turns_kernels_on(config):
        fused.append("lora")
        keys.append("adapter")
    if fused:
        why = "LoRA kernels turn themselves on" if keys == ["adapter"] else ""
        config.set("kernels.fused", list(dict.fromkeys(fused)), *keys, why=why)


def _turns_kernels_on(config: Config) -> bool:
    """Whether LoRA's kernels are on without a key: `lora_kernels_auto_enable`.

    Before 0.21 they refuse dropout, and the check for it sees the file's value rather than the default.
    """
    if config.said("adapter") is None or (config.flag("load_in_8bit") and config.get("adapter") == "lora"):
        return False
    if not _is_at_least_0_21(config):
        return config.said("lora_dropout") is not None and not config.number("lora_dropout")
    return not config.flag("trust_remote_code") and not config.flag("nvfp4_merge_aware")


def _is_at_least_0_21(config: Config) -> bool:
    return version_number(config.title.rpartition(" ")[2]) >= (0, 21)


def _checkpointing(config: Config) -> None:
    offloads = config.get("activation_offloading")
    value = config.get("gradient_checkpointing")
    if value in ("offload", "offload_disk", "unsloth"):  # unsloth: as in 0.8.1
        config.set("kernels.checkpointing", "offload", "gradient_checkpointing")
        config.get("activation_offloading")
        return
    trainer.checkpointing(config)
    is_on = config.value("kernels.checkpointing") != "none"
    if offloads not in (None, False, "false"):
        if not is_on:
            raise config.error("activation_offloading", "Axolotl needs gradient_checkpointing with it")
        config.set("kernels.checkpointing", "offload", "activation_offloading")
        config.found.pop("kernels.reentrant", None)
    if config.get("selective_checkpointing") and is_on:
        raise config.refuse("selective_checkpointing", "gradient_checkpointing alone")


def _parallelism(config: Config) -> None:
    if config.said("fsdp_config") is not None and config.section("fsdp_config") is not None:
        version = config.whole("fsdp_version") or (1 if config.said("fsdp") else 2)
        trainer.fsdp(config, config.section("fsdp_config"), version, " ".join(config.names("fsdp") or []))
    elif config.said("fsdp"):
        trainer.fsdp(config, None, 1, " ".join(config.names("fsdp") or []))
    if str(config.value("parallelism.strategy")).startswith("fsdp"):
        _loading(config)
    old = config.whole("sequence_parallel_degree")
    if old is not None and old > 1:
        config.set("parallelism.cp", old, "sequence_parallel_degree")
    shards = config.whole("dp_shard_size")
    if shards is not None and shards > 1:
        replicas = config.whole("dp_replicate_size") or 1
        ranks = (config.value("parallelism.tp") or 1) * (config.value("parallelism.cp") or 1)
        config.set("parallelism.world", shards * replicas * ranks, "dp_shard_size", "dp_replicate_size")
    trainer.parallelism(config)


def _loading(config: Config) -> None:
    """Every process moves the model to its GPU before FSDP divides it, unless that is skipped: loaders/model.py."""
    key, skip = "fsdp_config.cpu_ram_efficient_loading", "experimental_skip_move_to_device"
    if config.said(skip) is not None:
        config.set("parallelism.cpu_ram_efficient_loading", config.flag(skip), skip)
    elif config.said(key) is None and config.said("fsdp_config.fsdp_cpu_ram_efficient_loading") is None:
        config.set("parallelism.cpu_ram_efficient_loading", False, why=f"default of {config.title}")


def _reentrant(config: Config) -> None:
    """Checkpointing is reentrant before 0.21, and under ZeRO-3, unless the file says otherwise: normalize_config."""
    if config.value("kernels.checkpointing") == "full" and "kernels.reentrant" not in config.found:
        is_zero3 = config.value("parallelism.strategy") == "zero3"
        why = f"{config.title} sets it{' under ZeRO-3' if is_zero3 else ''}"
        config.set("kernels.reentrant", is_zero3 or not _is_at_least_0_21(config), why=why)


def _evaluation(config: Config) -> None:
    does = bool(config.number("val_set_size")) or bool(config.said("test_datasets"))
    does = does and str(config.get("eval_strategy")) not in ("no", "False")
    key = "val_set_size" if config.number("val_set_size") else "test_datasets"
    trainer.evaluation(config, does, key, "eval_batch_size")
    has_plugin = any("cut_cross_entropy" in plugin for plugin in config.names("plugins") or [])
    cuts = has_plugin and config.flag("cut_cross_entropy") and config.value("kernels.loss") == "fused"
    if cuts and "also.evaluation.micro" in config.found:
        config.set("also.evaluation.fuses", True, "plugins", why="Cut Cross-Entropy, in evaluation too")
    if does and config.flag("sample_packing") and config.get("eval_sample_packing") not in (None, True):
        config.leave("eval_sample_packing", "evaluation is counted as packed")


def _loop(config: Config) -> None:
    trainer.loop(config)
    config.set("loop.expandable_segments", True, why=f"{config.title} sets it unless PYTORCH_ALLOC_CONF is set")


def _optimizer(config: Config) -> None:
    trainer.optimizer(config, "optimizer")


RULES: Mapping[str, tuple[Rule, ...]] = {
    "axolotl": (
        *(_preference, _method, _stored, _attention, _batch, _optimizer, _kernels, _checkpointing, _loop, _parallelism),
        *(_reentrant, _precision, _evaluation),
    ),
}
