"""The table of LLaMA-Factory's config keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Framework, Key, Remark, Value, is_
from memplan.frameworks.shared_keys import FORMAT, HOST, KIND, PARALLEL, PRECISION, of_4_bits, of_adapters
from memplan.spec.run import RunSpec

_LIGER = {"rope", "rms_norm", "swiglu"}  # enabled together, along with the fused loss


def _trainable_dtype(run: RunSpec) -> str:
    """The dtype of trainable parameters: adapters are cast to fp32 unless the run sets another."""
    return (run.method.adapter_dtype or "fp32") if shared_keys.uses_adapters(run) else run.precision.weights


def _pure(run: RunSpec) -> bool:
    p = run.precision
    mixed = p.autocast or p.master is not None
    return not mixed and shared_keys.computes(run) == "bf16" and _trainable_dtype(run) == "bf16"


def _casts(run: RunSpec) -> bool:
    return shared_keys.computes(run) == "bf16" and not _pure(run)


def _computes_in_fp16(run: RunSpec) -> bool:
    return shared_keys.computes(run) == "fp16"


def _kind(run: RunSpec) -> str:
    return "lora" if shared_keys.uses_adapters(run) else run.method.kind


def _saved(run: RunSpec) -> Value:
    return ",".join(run.method.modules_to_save) or None


def _frozen(run: RunSpec) -> Value:
    return run.method.trainable_layers if run.method.kind == "freeze" else None


def _disabled(run: RunSpec) -> Value:
    on = shared_keys.checkpoints(run)
    return None if on is None else not on


def _attention(run: RunSpec) -> str:
    return {"eager": "disabled", "flash_attention_2": "fa2", "flash_attention_3": "fa3"}.get(
        str(run.kernels.attention), "sdpa"
    )


def _targets(run: RunSpec) -> Value:
    targets = run.method.targets
    return "all" if targets == "all-linear" else targets if isinstance(targets, str) else ",".join(targets)


def _freezes(part: str) -> Callable[[RunSpec], Value]:
    """Whether a part of a vision-language model is frozen. LLaMA-Factory freezes tower and projector by default."""
    return lambda run: part in run.method.frozen if run.method.frozen or run.batch.sees else None


def _launch(run: RunSpec) -> Value:
    world, version = run.parallelism.world, shared_keys.fsdp(run)
    if version is not None:
        offload = str(run.parallelism.offload.parameters).lower()
        return (
            f"accelerate launch --num_processes {world} --use_fsdp --fsdp_version {version} "
            f"--fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP --fsdp_offload_params {offload} src/train.py run.yaml"
        )
    several = f"FORCE_TORCHRUN=1 NPROC_PER_NODE={world} " if world > 1 else ""
    return f"{several}llamafactory-cli train run.yaml"


def _remarks(run: RunSpec) -> Iterator[Remark]:
    yield from shared_keys.remarks(run)
    p, casts = run.precision, ""
    if p.weights == "fp16" and not p.autocast and _trainable_dtype(run) == "fp16":
        casts = "LLaMA-Factory has no pure fp16: trainable parameters are cast to fp32"
    elif _pure(run) and shared_keys.stage(run) == 3:
        casts = "LLaMA-Factory refuses pure_bf16 with DeepSpeed stage 3"
    elif p.weights == "fp32" and shared_keys.uses_adapters(run):
        casts = "frozen weights are loaded in the checkpoint's dtype"
    if casts:
        yield Remark((*PRECISION[::2], "parallelism.strategy"), casts)
    on = set(run.kernels.fused or ()) - {"lora"}
    if run.kernels.loss == "chunked":
        yield Remark(("kernels.loss", "kernels.fused"), "LLaMA-Factory has no chunked loss")
    elif shared_keys.liger(run) and (on != _LIGER or run.kernels.loss != "fused"):
        together = "enable_liger_kernel turns on RoPE, RMSNorm, SwiGLU and the fused loss together"
        yield Remark(("kernels.loss", "kernels.fused"), together)
    norms = "LLaMA-Factory casts only the norms of a quantised model, with upcast_layernorm"
    yield Remark(("method.quantization.kbit_preparation",), norms)
    if "lora" in (run.kernels.fused or ()):
        yield Remark(("kernels.fused",), "fused LoRA kernels are Unsloth's: set use_unsloth")


LLAMAFACTORY = Framework(
    "llamafactory",
    "LLaMA-Factory",
    "llamafactory 0.9.5 hparams/model_args.py, finetuning_args.py, data_args.py, model/adapter.py, "
    "model/model_utils/quantization.py, attention.py, launcher.py",
    (
        Key("model_name_or_path", ("model",), shared_keys.model),
        Key("bf16", PRECISION, _casts),
        Key("pure_bf16", (*PRECISION, "method.adapter_dtype"), _pure),
        Key("fp16", (*PRECISION, "loop.grad_scaler"), _computes_in_fp16),
        Key("finetuning_type", (KIND,), _kind),
        Key("freeze_trainable_layers", (KIND, "method.trainable_layers"), _frozen),
        Key("freeze_vision_tower", ("method.frozen", "batch.images"), _freezes("vision")),
        Key("freeze_multi_modal_projector", ("method.frozen", "batch.images"), _freezes("projector")),
        Key("freeze_language_model", ("method.frozen",), _freezes("language")),
        Key("quantization_bit", (KIND, FORMAT), shared_keys.bits),
        Key("quantization_type", (FORMAT,), of_4_bits("format")),
        Key("double_quantization", ("method.quantization.double_quant",), of_4_bits("double_quant")),
        Key("lora_rank", ("method.rank",), shared_keys.RANK, same=True),
        Key("lora_alpha", ("method.alpha",), of_adapters(shared_keys.alpha), same=True),
        Key("lora_dropout", ("method.dropout",), shared_keys.DROPOUT, same=True),
        Key("lora_target", ("method.targets",), of_adapters(_targets)),
        Key(
            "additional_target",
            ("method.modules_to_save",),
            of_adapters(_saved),
        ),
        Key("use_dora", (KIND,), shared_keys.dora),
        Key("use_rslora", ("method.options",), of_adapters(shared_keys.rslora)),
        Key("per_device_train_batch_size", ("batch.micro",)),
        Key("gradient_accumulation_steps", ("batch.accumulation",)),
        Key("cutoff_len", ("batch.sequence",)),
        Key("packing", (shared_keys.PACKING,), is_(shared_keys.PACKING, "knapsack")),
        Key("neat_packing", (shared_keys.PACKING,), is_(shared_keys.PACKING, "neat_packing")),
        *shared_keys.EVALUATION,
        Key("compute_accuracy", ("also.evaluation.preprocess",), is_("also.evaluation.preprocess", "argmax")),
        Key("disable_gradient_checkpointing", ("kernels.checkpointing",), _disabled),
        Key("use_unsloth_gc", ("kernels.checkpointing",), is_("kernels.checkpointing", "offload")),
        Key("use_reentrant_gc", ("kernels.reentrant",)),
        Key("flash_attn", ("kernels.attention",), _attention),
        shared_keys.SDPA,
        Key("enable_liger_kernel", ("kernels.loss", "kernels.fused"), shared_keys.liger),
        Key("optim", ("optimizer.name",), shared_keys.optimizer),
        Key("use_muon", ("optimizer.name",), is_("optimizer.name", "muon")),
        *shared_keys.TRAINER_KEYS,
        Key("train", (*PARALLEL, *HOST), _launch, "shell"),
        shared_keys.SEGMENTS,
    ),
    _remarks,
)
