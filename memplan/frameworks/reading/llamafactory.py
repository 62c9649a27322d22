"""LLaMA-Factory's rules.

Source: llamafactory 0.9.3 and 0.9.5 hparams/parser.py, finetuning_args.py, model_args.py, data_args.py;
model/adapter.py init_adapter, model/loader.py, model/model_utils; train/{dpo,kto,rm,ppo}.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.catalogue.optimizers.parameter_rules import RANK
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule

_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_BITSANDBYTES = ("bnb", "bitsandbytes")
# Switch -> optimizer -> the name of it in transformers.
_OPTIMIZERS = {"use_galore": "galore", "use_apollo": "apollo"}
_RANK = 16  # of both, unless it is set
_STAGES = {"dpo": "dpo", "kto": "kto", "rm": "reward"}  # stages with a trainer of their own
# Source: train/ppo/trainer.py.
_PPO = (
    "ppo is not supported yet: its own trainer takes trl 0.8.6 to 0.9.6 only, not the 0.18 to 0.24 that it is "
    "installed with; memplan MODEL --trainer ppo counts TRL's of 0.24 and later; supported: sft, pt, rm, dpo, kto"
)


# Keys of files for llamafactory-cli chat and export, and of runs that only evaluate or predict.
_WITHOUT_TRAINING = ("export_dir", "infer_backend", "do_predict", "do_eval")


def _method(config: Config) -> None:
    key = next((key for key in _WITHOUT_TRAINING if config.said(key)), None)
    if key is not None and not config.flag("do_train"):
        raise config.error(
            key, "nothing trains without do_train: true; memplan MODEL --method generate counts inference"
        )
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"):
        if config.said(key) is not None:
            raise config.error(
                key, "LLaMA-Factory with Megatron is not supported yet; memplan MODEL --tp counts its core"
            )
    stage = config.get("stage")
    if stage == "ppo":
        raise config.error("stage", _PPO)
    if config.word("stage", "sft", "pt", *_STAGES) in _STAGES:
        loss = config.get("pref_loss") if stage == "dpo" else None
        trainer.preference(config, loss if loss in ("orpo", "simpo") else _STAGES[stage], "stage", "pref_loss")
        if config.text("ref_model") is not None and loss not in ("orpo", "simpo"):
            config.set("reference", "copy", "ref_model", why="counted as large as the policy")
    kind = config.word("finetuning_type", "lora", "oft", "freeze", "full") or "lora"
    bits = config.whole("quantization_bit")
    if bits is not None:
        if kind not in ("lora", "oft"):
            raise config.error("quantization_bit", f"LLaMA-Factory does not quantise under {kind}; use lora")
        if bits not in (4, 8) or config.get("quantization_method") not in _BITSANDBYTES:
            raise config.refuse("quantization_bit", "4 and 8 with bitsandbytes")
        if bits == 4:
            config.set("method.quantization.format", config.word("quantization_type", "nf4", "fp4"), "quantization_bit")
            key = "double_quantization"
            config.set("method.quantization.double_quant", config.flag(key), key)
        else:
            config.set("method.quantization.format", "int8", "quantization_bit")
    trainer.adapter(config, kind == "lora", config.flag("use_dora"), "finetuning_type", "use_dora")
    if kind == "freeze":
        config.set("method.kind", "freeze", "finetuning_type")
        layers = config.whole("freeze_trainable_layers") or 2
        if layers < 0:
            config.leave("freeze_trainable_layers", "the first layers train: the last are counted instead")
        config.set("method.trainable_layers", abs(layers), "freeze_trainable_layers")
    if kind in ("lora", "oft"):
        _adapters(config, kind)
    model = trainer.model_of(config)
    if model is not None and model.has_tower and config.said("image_max_pixels") is not None:
        config.leave("image_max_pixels", "no images are counted; add --images")
    trainer.frozen(config, "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")


def _parts_that_train(config: Config) -> None:
    """Name what the file trains and is not counted so."""
    kind = config.value("method.kind")
    if kind == "freeze" and config.names("freeze_trainable_modules") not in (None, ["all"]):
        config.leave("freeze_trainable_modules", "all modules of these layers are counted as training")
    trains_adapter = kind not in ("full", "freeze") and not config.flag("create_new_adapter")
    if trains_adapter and config.said("adapter_name_or_path") is not None:
        config.leave("adapter_name_or_path", "the rank and the targets of the file are counted, not the adapter's")


def _adapters(config: Config, kind: str) -> None:
    if kind == "oft":
        config.set("method.kind", "oft", "finetuning_type")
        names = {"r": "oft_rank", "oft_block_size": "oft_block_size", "module_dropout": "module_dropout"}
        whole = {name: config.whole(key) for name, key in [*names.items()][:2]}
        settings = {**whole, "module_dropout": config.number("module_dropout")}
        for field in ("rank", "alpha", "dropout"):
            config.found.pop(f"method.{field}", None)
        config.set("method.options", {name: value for name, value in settings.items() if value}, *names.values())
    elif config.said("lora_alpha") is None and config.value("method.rank"):
        config.set("method.alpha", 2 * config.value("method.rank"), "lora_rank", why="twice the rank")
    targets = config.names("lora_target") or ["all"]
    config.set("method.targets", "all-linear" if targets == ["all"] else targets, "lora_target")
    if config.names("additional_target"):
        config.set("method.modules_to_save", config.names("additional_target"), "additional_target")
    if config.flag("use_rslora"):
        config.set("method.options", {"use_rslora": True}, "use_rslora")


def _precision(config: Config) -> None:
    """Trainable weights are fp32, unless pure_bf16 is set or ZeRO-3 has fp32 weights of its own."""
    pure = config.flag("pure_bf16")
    casts = "bf16" if config.flag("bf16") else "fp16" if config.flag("fp16") else None
    key = "pure_bf16" if pure else casts or "bf16"
    if pure:
        trainer.lower_precision(config, "bf16", casts, "pure_bf16")
        if config.value("method.kind") not in ("full", "freeze"):
            config.set("method.adapter_dtype", "bf16", "pure_bf16")
        return
    trains_all = config.value("method.kind") in ("full", "freeze")
    weights = "fp32" if trains_all else casts or "bf16"
    trainer.lower_precision(config, weights, casts, key)
    if trains_all and "precision.master" not in config.found:
        origin = config.found["precision.weights"]
        config.found["precision.weights"] = origin._replace(why=f"trainable weights are cast to fp32: {origin.why}")


def _batch(config: Config) -> None:
    if config.gpus is None and (config.whole("ray_num_workers") or 1) > 1:  # train/tuner.py, with USE_RAY
        config.set("parallelism.world", config.whole("ray_num_workers"), "ray_num_workers")
    if config.get("stage") == "pt":  # rows of a text without ends
        trainer.padding(config, config.get("packing") is None or config.flag("packing"))
    else:
        keys = [key for key in ("neat_packing", "packing") if config.flag(key)]
        names = {"neat_packing": "neat_packing", "packing": "knapsack"}
        trainer.packing(config, names[keys[0]] if keys else None, *keys)


def _kernels(config: Config) -> None:
    name = config.text("flash_attn")
    if name in _ATTENTION:
        config.set("kernels.attention", _ATTENTION[name], "flash_attn")
    elif name not in (None, "auto"):
        raise config.error("flash_attn", f"must be auto, disabled, sdpa, fa2 or fa3, not {name!r:.40}")
    if config.flag("enable_liger_kernel"):
        trainer.fused_loss(config, "enable_liger_kernel")
        config.set("kernels.fused", ["rope", "rms_norm", "swiglu"], "enable_liger_kernel")
    off = "disable_gradient_checkpointing"
    kind = "none" if config.flag(off) else "offload" if config.flag("use_unsloth_gc") else "full"
    config.set("kernels.checkpointing", kind, "use_unsloth_gc" if kind == "offload" else off)
    if kind != "full":
        config.found.pop("kernels.reentrant", None)


def _optimizer(config: Config) -> None:
    trainer.optimizer(config)
    for key, name in _OPTIMIZERS.items():
        if config.flag(key):
            if config.value("method.kind") not in ("full", "freeze"):
                raise config.error(key, "LLaMA-Factory does not combine it with adapters; set one of the two")
            layerwise = "_layerwise" if config.flag(f"{name}_layerwise") else ""
            eight_bits = "_8bit" if "8bit" in str(config.get("optim")) and name == "galore" else ""
            config.set("optimizer.name", f"{name}_adamw{eight_bits}{layerwise}", key)
            if (config.whole(f"{name}_rank") or _RANK) != RANK:
                config.leave(f"{name}_rank", f"rank {RANK} is counted, transformers' default")
    if config.flag("use_muon"):
        config.set("optimizer.name", "muon", "use_muon")


def _evaluation(config: Config) -> None:
    does = str(config.get("eval_strategy")) not in ("no", "None", "False")
    does = does and (bool(config.number("val_size")) or config.said("eval_dataset") is not None)
    trainer.evaluation(config, does, "eval_strategy", "per_device_eval_batch_size")
    if does and config.flag("compute_accuracy") and config.value("trainer") in (None, "sft"):
        config.set("also.evaluation.preprocess", "argmax", "compute_accuracy")
        config.set("also.evaluation.kept_batches", 1, "compute_accuracy", why="assumed: one batch")


RULES: Mapping[str, tuple[Rule, ...]] = {
    "llamafactory": (
        _method,
        _parts_that_train,
        _batch,
        _kernels,
        _optimizer,
        trainer.loop,
        trainer.parallelism,
        _precision,
        _evaluation,
    ),
}
