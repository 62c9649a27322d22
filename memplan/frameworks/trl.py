"""The table of TRL's config keys, for `trl sft --config`; most are fields of transformers' TrainingArguments."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Framework, Key, Remark, Value, field, is_
from memplan.frameworks.shared_keys import (
    DTYPES,
    FORMAT,
    HOST,
    KIND,
    PARALLEL,
    PRECISION,
    RESHARD,
    of_4_bits,
    of_adapters,
)
from memplan.models.peft_methods import PEFT_METHODS
from memplan.spec.run import RunSpec


def _dtype(run: RunSpec) -> Value:
    return DTYPES[run.precision.weights]


def _sharded(run: RunSpec) -> Value:
    return shared_keys.fsdp(run) is not None


def _momentum(run: RunSpec) -> Value:
    return f"momentum={run.optimizer.momentum}" if run.optimizer.momentum else None


def _packs(run: RunSpec) -> bool:
    return run.batch.packing not in (None, "padding_free")


def _strategy(run: RunSpec) -> Value:
    return run.batch.packing if _packs(run) else None


def _checkpointing(run: RunSpec) -> Value:
    kernels = run.kernels
    kwargs: dict[str, Value] = {} if kernels.reentrant is None else {"use_reentrant": kernels.reentrant}
    if kernels.checkpointing == "offload":
        kwargs["offload"] = True
    return kwargs if kwargs and shared_keys.checkpoints(run) is not False else None


def _liger(run: RunSpec) -> Value:
    """The switches of Liger's kernels. The fused loss is on by default, and TRL 1.16 refuses its key."""
    if not shared_keys.liger(run):
        return None
    fused = run.kernels.fused or ()
    kinds: dict[str, Value] = {name: name in fused for name in ("rope", "rms_norm", "swiglu")}
    if run.kernels.loss != "fused":
        kinds |= {"fused_linear_cross_entropy": False, "cross_entropy": "cross_entropy" in fused}
    return kinds


def _fsdp(run: RunSpec) -> Value:
    version = shared_keys.fsdp(run)
    if version is None:
        return None
    offload = run.parallelism.offload.parameters
    return {"version": version, "reshard_after_forward": shared_keys.resharding(run), "cpu_offload": offload}


def _skip(run: RunSpec) -> Value:
    q = run.method.quantization
    return None if q is None or q.skip is None else f"BitsAndBytesConfig(..., llm_int8_skip_modules={list(q.skip)})"


def _preparation(run: RunSpec) -> Value:
    q = run.method.quantization
    prepared = q is not None and q.kbit_preparation is True
    return "model = peft.prepare_model_for_kbit_training(model)" if prepared else None


def _adapter_dtype(run: RunSpec) -> Value:
    if not shared_keys.uses_adapters(run) or run.method.adapter_dtype in (None, "fp32"):
        return None
    return "get_peft_model(model, config, autocast_adapter_dtype=False)"


def _freeze(run: RunSpec) -> Value:
    if run.method.kind != "freeze":
        return None
    last = f"model.model.layers[-{run.method.trainable_layers}:]"
    return f"model.requires_grad_(False); {last}.requires_grad_(True)"


_LOSSES = {
    "fused": "SFTTrainer of TRL 1.16 never makes full logits and needs no key for that; Trainer and older TRL do",
    "chunked": "SFTTrainer of TRL 1.16 chunks its loss without a key; Trainer and older TRL cannot",
    "hf": "SFTTrainer of TRL 1.16 never makes full logits; Trainer and older TRL do",
    "tiled_lm_head": "the default from TRL 1.15 on",
    "fused_chunks": "Unsloth's own loss",
    "chunked_nll": "the default of TRL 1.13 and 1.14; later ones tile the head instead",
    "chunked_nll_fp32": "the default of TRL 1.6 to 1.12; later ones do not cast the head",
}


def _remarks(run: RunSpec) -> Iterator[Remark]:
    yield from shared_keys.remarks(run)
    if run.reference == "adapters":
        yield Remark(("reference",), "the trainer disables the adapters for its reference: pass no ref_model")
    if str(run.kernels.loss) in _LOSSES:
        yield Remark(("kernels.loss",), _LOSSES[str(run.kernels.loss)])
    q, kind = run.method.quantization, run.method.kind
    if q is not None and q.kbit_preparation not in (None, True):
        how = "pass the model without calling prepare_model_for_kbit_training"
        if q.kbit_preparation:
            by_trl = "SFTTrainer prepares a quantised model this way by itself up to TRL 0.24"
            how = by_trl if q.kbit_preparation == "trl" else "only Axolotl prepares a model this way"
        yield Remark(("method.quantization.kbit_preparation",), how)
    if shared_keys.fsdp(run) == 1:
        yield Remark(("parallelism.strategy",), "transformers deprecates FSDP 1")
    if "lora" in (run.kernels.fused or ()):
        yield Remark(("kernels.fused",), "fused LoRA kernels are Unsloth's")
    if kind in PEFT_METHODS:
        how = f"only LoRA has keys: pass get_peft_model(model, config) with peft's own config of {kind}"
        yield Remark((KIND, "method.options"), how)
    if run.optimizer.name == "muon":
        how = "transformers has no muon: pass torch.optim.Muon as optimizers"
        yield Remark(("optimizer.name",), how)


TRL = Framework(
    "trl",
    "Hugging Face / TRL",
    "trl 1.16.0 trainer/sft_config.py, trainer/model_config.py, scripts/sft.py; transformers 5.24.0 training_args.py; "
    "peft 0.21.2",
    (
        Key("model_name_or_path", ("model",), shared_keys.model),
        Key("dtype", ("precision.weights",), _dtype),
        Key("bf16", PRECISION, shared_keys.casts_to("bf16")),
        Key("fp16", (*PRECISION, "loop.grad_scaler"), shared_keys.casts_to("fp16")),
        Key("load_in_4bit", (KIND, FORMAT), shared_keys.quantised_to(4)),
        Key("load_in_8bit", (KIND, FORMAT), shared_keys.quantised_to(8)),
        Key("bnb_4bit_quant_type", (FORMAT,), of_4_bits("format")),
        Key("use_bnb_nested_quant", ("method.quantization.double_quant",), of_4_bits("double_quant")),
        Key("bnb_4bit_quant_storage", ("method.quantization.storage",), shared_keys.storage),
        Key("llm_int8_skip_modules", ("method.quantization.skip",), _skip, "Python"),
        Key("prepare_model_for_kbit_training", ("method.quantization.kbit_preparation",), _preparation, "Python"),
        Key("use_peft", (KIND,), shared_keys.uses_adapters),
        Key("lora_r", ("method.rank",), shared_keys.RANK, same=True),
        Key("lora_alpha", ("method.alpha",), of_adapters(shared_keys.alpha), same=True),
        Key("lora_dropout", ("method.dropout",), shared_keys.DROPOUT, same=True),
        Key("lora_target_modules", ("method.targets",), shared_keys.TARGETS),
        Key("lora_modules_to_save", ("method.modules_to_save",), of_adapters(shared_keys.saved)),
        Key("use_dora", (KIND,), shared_keys.dora),
        Key("use_rslora", ("method.options",), of_adapters(shared_keys.rslora)),
        Key("autocast_adapter_dtype", ("method.adapter_dtype",), _adapter_dtype, "Python"),
        Key("requires_grad_", (KIND, "method.trainable_layers"), _freeze, "Python"),
        Key("per_device_train_batch_size", ("batch.micro",)),
        Key("gradient_accumulation_steps", ("batch.accumulation",)),
        Key("max_length", ("batch.sequence",)),
        Key("packing", (shared_keys.PACKING,), _packs),
        Key("packing_strategy", (shared_keys.PACKING,), _strategy),
        Key("padding_free", (shared_keys.PACKING,), is_(shared_keys.PACKING, "padding_free")),
        *shared_keys.EVALUATION,
        *shared_keys.generation(),
        Key("vllm_enable_sleep_mode", ("serving.sleep",), field("serving.sleep")),
        Key("precompute_ref_log_probs", ("reference",), is_("reference", "precomputed")),
        Key("preprocess_logits_for_metrics", ("also.evaluation.preprocess",), shared_keys.likeliest, "Python"),
        Key("gradient_checkpointing", ("kernels.checkpointing",), shared_keys.checkpoints),
        Key("gradient_checkpointing_kwargs", ("kernels.checkpointing", "kernels.reentrant"), _checkpointing),
        Key("activation_offloading", ("parallelism.offload.activations",)),
        Key("attn_implementation", ("kernels.attention",), shared_keys.attention),
        shared_keys.SDPA,
        Key("use_liger_kernel", ("kernels.loss", "kernels.fused"), shared_keys.liger),
        Key("liger_kernel_config", ("kernels.loss", "kernels.fused"), _liger),
        Key("optim", ("optimizer.name",), shared_keys.optimizer),
        Key("optim_args", ("optimizer.momentum",), _momentum),
        *shared_keys.TRAINER_KEYS,
        Key("fsdp", PARALLEL, _sharded),
        Key("fsdp_config", (*PARALLEL, *HOST, RESHARD), _fsdp),
        Key("num_processes", PARALLEL),
        shared_keys.SEGMENTS,
    ),
    _remarks,
)
