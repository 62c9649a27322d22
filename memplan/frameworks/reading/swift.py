"""ms-swift's rules.

Source: ms-swift 4.6.0 arguments/{sft,rlhf,tuner}_args.py, base_args/{base,model,quant,template}_args.py; cli/main.py;
trainers/arguments.py, mixin.py; rlhf_trainers/args_mixin.py; pipelines/train/{tuner,rlhf}.py; config/*.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from memplan.catalogue.optimizers.parameter_rules import RANK
from memplan.frameworks.reading import trainer
from memplan.frameworks.reading.config import Config, Rule, Typed, shown, version_number
from memplan.frameworks.reading.document import Document

_BUCKETS = {"allgather_bucket_size": 2e8, "reduce_bucket_size": 2e8}
_AUTO = dict.fromkeys(
    ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"), "auto"
)
_HOST = {"device": "cpu"}
_NO_OVERLAP = (3, 2, 2)  # the first version whose DeepSpeed configs say overlap_comm: false
# Names of its own DeepSpeed configs -> what memory depends on in them.
_DEEPSPEED: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0, **_BUCKETS},
    "zero1": {"stage": 1, **_BUCKETS},
    "zero2": {"stage": 2, **_BUCKETS},
    "zero2_offload": {"stage": 2, **_BUCKETS, "offload_optimizer": _HOST},
    "zero3": {"stage": 3, **_AUTO},
    "zero3_offload": {"stage": 3, **_AUTO, "offload_optimizer": _HOST, "offload_param": _HOST},
}
# Other tuners of peft: its rank or settings -> the key, and ms-swift's default.
_TUNERS = {
    "adalora": {"rank": ("adalora_init_r", 12)},
    "boft": {"boft_block_size": ("boft_block_size", 4), "boft_block_num": ("boft_block_num", 0)},
    "fourierft": {"n_frequency": ("fourier_n_frequency", 2000)},
}
_SAMPLES = 16
_OBJECTIVES = {"seq_cls": "sequence_classification", "embedding": "feature_extraction"}
_FSDP2 = {"fsdp_version": 2, "reshard_after_forward": True, "activation_checkpointing": True}


_GENERATION = {
    "max_prompt_length": "max_length",
    "vllm_max_model_length": "vllm_max_model_len",
}
_TRAINERS = {"rm": "reward", **{name: name for name in ("dpo", "kto", "cpo", "simpo", "orpo", "grpo", "gkd", "ppo")}}


def _program(config: Config) -> None:
    task = config.word("task_type", "causal_lm", *_OBJECTIVES)
    if task in _OBJECTIVES:
        config.set("objective", _OBJECTIVES[task], "task_type")
    if task == "embedding":
        config.leave("task_type", "the loss of embeddings is not counted")
    if config.said("rlhf_type") is not None or config.command.endswith("rlhf"):
        _trainer(config)


def _trainer(config: Config) -> None:
    """`swift rlhf`: DPO, unless its type is set. SimPO is CPO's trainer unless cpo_alpha is 0."""
    config.defaults = {**config.defaults, "rlhf_type": "dpo"}
    kind = str(config.text("rlhf_type"))
    if kind not in _TRAINERS:
        raise config.refuse("rlhf_type", ", ".join(_TRAINERS))
    name = _TRAINERS[kind]
    if name == "ppo":
        trainer.ppo(config, "reward_model", "response_length", "rlhf_type")
    elif name != "grpo":
        name = "cpo" if name == "simpo" and config.number("cpo_alpha") else name
        if config.names("loss_type") not in (None, ["sigmoid"]):  # DPO's default
            config.leave("loss_type", "the loss, not supported yet")
        trainer.preference(config, name, "rlhf_type")
        if name == "gkd":
            _teacher(config)
    else:
        config.get("loss_type")  # arithmetic of a few numbers per token
        config.defaults = {**config.defaults, "beta": 0.04}
        adapts = config.get("tuner_type") != "full"
        trainer.generation(config, name, "rlhf_type", adapts=adapts, **_GENERATION)
        models = config.names("reward_model") or [None]
        trainer.role(config, "reward", models[0], "reward_model")
        if models[1:]:
            config.leave("reward_model", f"only the first of {len(models)} reward models is counted")
        if config.value("rollout") == "colocate" and config.whole("sleep_level"):
            config.set("serving.sleep", True, "sleep_level")
        if config.value("rollout") == "colocate" and config.flag("vllm_enforce_eager"):
            config.set("serving.cuda_graphs", False, "vllm_enforce_eager")


def _teacher(config: Config) -> None:
    """GKD's teacher, which is a model of its own. Completions are generated for a share `lmbda` of the steps."""
    name, itself = config.text("teacher_model"), config.said("model")
    if name is None and config.said("teacher_model_server") is not None:
        text = "gkd against the top logits of a server is not supported yet; name a teacher_model"
        raise config.error("teacher_model_server", text)
    if name is None or (name == itself and config.get("tuner_type") == "lora" and not config.said("teacher_adapters")):
        key = "rlhf_type" if name is None else "teacher_model"
        raise config.error(key, "gkd without a teacher_model of its own is not supported yet; name one")
    trainer.role(config, "teacher", name, "teacher_model")
    if config.number("sft_alpha"):
        config.leave("sft_alpha", "the model's own loss, next to the divergence, is not counted")
    if config.number("lmbda") == 1:
        config.leave("lmbda", "completions are counted as rows of max_length tokens, all of them labelled")
    if config.flag("use_vllm") and config.text("vllm_mode") == "colocate":
        config.leave("vllm_mode", "the engine's share of the GPUs is not counted")


def _method(config: Config) -> None:
    kind = config.word("tuner_type", "lora", "full", *_TUNERS) or "lora"
    method, bits = config.text("quant_method"), config.whole("quant_bits")
    if method == "bnb" and bits in (4, 8):
        name = config.word("bnb_4bit_quant_type", "nf4", "fp4") if bits == 4 else "int8"
        config.set("method.quantization.format", name, "quant_bits", "quant_method")
        if bits == 4:
            key = "bnb_4bit_use_double_quant"
            config.set("method.quantization.double_quant", config.flag(key), key)
    elif method not in (None, "awq", "gptq", "gptq_v2"):
        raise config.refuse("quant_method", "bnb with quant_bits 4 or 8")
    if "method.quantization.format" in config.found and kind == "full":
        raise config.error("quant_method", "quantised weights train only under adapters; set tuner_type: lora")
    trainer.adapter(config, kind == "lora", config.flag("use_dora"), "tuner_type", "use_dora")
    if kind in _TUNERS:
        config.set("method.kind", kind, "tuner_type")
        for field in ("rank", "alpha", "dropout"):
            config.found.pop(f"method.{field}", None)
        said = {name: config.whole(key) or default for name, (key, default) in _TUNERS[kind].items()}
        keys = (key for key, _ in _TUNERS[kind].values())
        rank = said.get("rank")
        config.set("method.rank" if rank else "method.options", rank or said, *keys)
    if kind != "full":
        _adapters(config)
    trainer.frozen(config, "freeze_vit", "freeze_aligner", "freeze_llm")


def _other_models(config: Config) -> None:
    """PPO's value model, like the reward model, gets adapters as the model does, and all are loaded in its format:
    pipelines/train/rlhf.py _prepare_single_model."""
    method = {field: origin.value for field, origin in config.found.items() if field.startswith("method.")}
    if config.value("trainer") != "ppo" or method["method.kind"] == "full":
        return
    config.set("roles.value.model", config.value("roles.reward.model"), why=f"{config.title} trains the reward model's")
    for field, value in method.items():
        stored = field.removeprefix("method.")
        config.set(f"roles.value.{field}", value, why="as the model's")
        if stored.startswith("quantization."):
            config.set(f"roles.reward.{stored}", value, why="as the model's")


def adapted_modules(config: Config) -> None:
    """Set the modules with adapters, and those that train whole."""
    targets = config.names("target_modules") or ["all-linear"]
    others = [name for name in targets if name != "all-linear"]
    if len(others) not in (0, len(targets)):
        config.leave("target_modules", f"{shown(' '.join(others))} next to all-linear: not counted")
    config.set("method.targets", "all-linear" if "all-linear" in targets else targets, "target_modules")
    if config.names("modules_to_save"):
        config.set("method.modules_to_save", config.names("modules_to_save"), "modules_to_save")


def _adapters(config: Config) -> None:
    adapted_modules(config)
    if config.flag("use_rslora"):
        config.set("method.options", {"use_rslora": True}, "use_rslora")
    dtype = config.text("lora_dtype")
    if dtype is not None:
        if dtype not in trainer.DTYPES:
            raise config.error("lora_dtype", "must be float16, bfloat16 or float32")
        config.set("method.adapter_dtype", trainer.DTYPES[dtype], "lora_dtype")


def _batch(config: Config) -> None:
    if config.get("max_length") is None:
        trainer.assume_length(config, "max_length")
    packs = [key for key in ("packing", "padding_free") if config.flag(key)]
    if packs and "flash" not in str(config.get("attn_impl")):
        raise config.error(packs[0], "needs flash attention; set attn_impl: flash_attn")
    name = "binpack" if packs[:1] == ["packing"] else "padding_free" if packs else None
    trainer.packing(config, name, *packs)
    if name == "binpack" and config.whole("packing_length"):  # arguments/base_args/base_args.py: else max_length
        config.set("batch.sequence", config.whole("packing_length"), "packing_length")


def _kernels(config: Config) -> None:
    if config.get("attn_impl") == "flash_attn":
        config.set("kernels.attention", "flash_attention_2", "attn_impl")
    else:
        trainer.attention(config, "attn_impl")
    trainer.checkpointing(config)
    towers = config.get("vit_gradient_checkpointing")
    if towers is not None and config.flag("vit_gradient_checkpointing") != config.flag("gradient_checkpointing"):
        config.leave("vit_gradient_checkpointing", "the tower is counted as gradient_checkpointing says")
    if config.flag("use_liger_kernel"):
        trainer.fused_loss(config, "use_liger_kernel")
        config.set("kernels.fused", ["rope", "rms_norm", "swiglu"], "use_liger_kernel")


def _optimizer(config: Config) -> None:
    """GaLore, if it is on. Even with an optimizer for each parameter, all of them step after backward."""
    trainer.optimizer(config)
    if not config.flag("use_galore"):
        return
    if config.value("method.kind") != "full":
        raise config.error("use_galore", "GaLore projects the gradients of full training; set tuner_type: full")
    if config.flag("galore_quantization"):
        raise config.error("galore_quantization", "Q-GaLore is not supported yet; leave it out")
    name = str(config.get("optim"))
    kind = "adafactor" if name == "adafactor" else "adamw_8bit" if "8bit" in name else "adamw"
    config.set("optimizer.name", f"galore_{kind}", "use_galore")
    config.read.add("galore_optim_per_parameter")
    if (config.whole("galore_rank") or RANK) != RANK:
        config.leave("galore_rank", f"rank {RANK} is counted, ms-swift's default")
    for key in ("galore_target_modules", "galore_with_embedding"):
        if config.said(key):
            config.leave(key, "all linear layers but the head are counted as projected")


def _parallelism(config: Config) -> None:
    """`deepspeed` and `fsdp` may name a config of ms-swift's own."""
    name = config.said("deepspeed")
    if isinstance(name, str) and name in _DEEPSPEED:
        overlaps = version_number(config.title.rpartition(" ")[2]) < _NO_OVERLAP
        zero = {**_DEEPSPEED[name], "overlap_comm": overlaps}
        document = Document(f"{config.title}'s {name}.json", None, {"zero_optimization": zero}, {})
        config.companions = {"deepspeed": document, **config.companions}
        config.typed = {**config.typed, "deepspeed": Typed({}, config.why("deepspeed"))}
    if config.said("fsdp") == "fsdp2":
        why = config.why("fsdp")
        config.typed = {**config.typed, "fsdp": Typed("full_shard", why), "fsdp_config": Typed(_FSDP2, why)}
    trainer.parallelism(config)
    if config.said("gradient_accumulation_steps") is None and config.value("trainer") != "grpo":
        together = (config.whole("per_device_train_batch_size") or 1) * (config.value("parallelism.world") or 1)
        config.set(
            "batch.accumulation", ceil(_SAMPLES / together), why=f"{config.title} makes it {_SAMPLES} samples a step"
        )
    if config.value("kernels.checkpointing") == "full" and "kernels.reentrant" not in config.found:
        is_ddp = config.value("parallelism.strategy") == "ddp"
        why = f"{config.title} sets it{' under DDP' if is_ddp else ''}"
        config.set("kernels.reentrant", not is_ddp, why=why)


def _precision(config: Config) -> None:
    """The weights have the checkpoint's dtype unless `torch_dtype` is set; fp16 and fp32 are cast to fp16."""
    name = config.text("torch_dtype")
    if name is not None and name not in trainer.DTYPES:
        raise config.error("torch_dtype", "must be float16, bfloat16 or float32")
    weights = trainer.DTYPES[name] if name is not None else "bf16"
    casts = "bf16" if weights == "bf16" else "fp16"
    said = [kind for kind in ("bf16", "fp16") if config.said(kind) is not None]
    if said:
        casts = next((kind for kind in said if config.flag(kind)), None)
    trainer.lower_precision(config, weights, casts, "torch_dtype", *said)
    if name is None and "precision.weights" in config.found:
        origin = config.found["precision.weights"]
        config.found["precision.weights"] = origin._replace(why="the checkpoint's dtype, assumed bf16")


def _evaluation(config: Config) -> None:
    """Parts of the training data are split off to evaluate with, by default before 3.6; not of streamed data."""
    does = str(config.said("eval_strategy") or config.said("save_strategy") or "steps") not in ("no", "False")
    keys = ("val_dataset", "eval_dataset", *(() if config.flag("streaming") else ("split_dataset_ratio",)))
    key = next((key for key in keys if str(config.get(key) or 0) not in ("0", "0.0")), "")
    trainer.evaluation(config, does and bool(key), key, "per_device_eval_batch_size")


def _environment(config: Config) -> None:
    """`ENV` sets variables of the environment."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = config.said(f"ENV.{name}")
        if value is not None:
            config.set("loop.expandable_segments", "expandable_segments:true" in str(value).lower(), f"ENV.{name}")
    processes = config.whole("ENV.NPROC_PER_NODE")
    if processes is not None:
        config.set("parallelism.world", processes * (config.whole("ENV.NNODES") or 1), "ENV.NPROC_PER_NODE")
    section = config.section("ENV")
    config.read |= {f"ENV.{name}" for name in section.values} if section is not None else set()


RULES: Mapping[str, tuple[Rule, ...]] = {
    "ms-swift": (
        *(_program, _method, _other_models, _batch, _kernels, _optimizer, trainer.loop, _environment),
        *(_parallelism, _precision, _evaluation),
    ),
}
