"""The table of ms-swift's arguments."""

from __future__ import annotations

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Framework, Key, Value, is_
from memplan.frameworks.shared_keys import FORMAT, HOST, KIND, PACKING, PARALLEL, of_4_bits, of_adapters
from memplan.spec.run import RunSpec


def _tuner(run: RunSpec) -> str:
    return "lora" if shared_keys.uses_adapters(run) else run.method.kind


def _quantises(run: RunSpec) -> Value:
    return "bnb" if shared_keys.bits(run) is not None else None


def _attention(run: RunSpec) -> Value:
    return "flash_attn" if run.kernels.attention == "flash_attention_2" else shared_keys.attention(run)


def _sleep_level(run: RunSpec) -> int:
    return int(bool(run.serving.sleep))


def _deepspeed(run: RunSpec) -> Value:
    """One of ms-swift's own configs by its name: `zero3_offload` moves optimizer and weights to the host."""
    stage = shared_keys.stage(run)
    return None if stage is None else f"zero{stage}{'_offload' * run.parallelism.offload.optimizer}"


SWIFT = Framework(
    "ms-swift",
    "ms-swift",
    "ms-swift 4.6.0 arguments/sft_args.py, tuner_args.py; arguments/base_args/{model,quant,template}_args.py",
    (
        Key("tuner_type", (KIND,), _tuner),
        Key("quant_method", (KIND, FORMAT), _quantises),
        Key("quant_bits", (KIND, FORMAT), shared_keys.bits),
        Key("bnb_4bit_quant_type", (FORMAT,), of_4_bits("format")),
        Key("bnb_4bit_use_double_quant", ("method.quantization.double_quant",), of_4_bits("double_quant")),
        Key("lora_rank", ("method.rank",), shared_keys.RANK, same=True),
        Key("lora_alpha", ("method.alpha",), of_adapters(shared_keys.alpha), same=True),
        Key("lora_dropout", ("method.dropout",), shared_keys.DROPOUT, same=True),
        Key("target_modules", ("method.targets",), shared_keys.TARGETS),
        Key("modules_to_save", ("method.modules_to_save",), of_adapters(shared_keys.saved)),
        Key("use_dora", (KIND,), shared_keys.dora),
        Key("use_rslora", ("method.options",), of_adapters(shared_keys.rslora)),
        Key("per_device_train_batch_size", ("batch.micro",)),
        Key("gradient_accumulation_steps", ("batch.accumulation",)),
        Key("max_length", ("batch.sequence",)),
        Key("packing", (PACKING,), is_(PACKING, "binpack")),
        Key("padding_free", (PACKING,), is_(PACKING, "padding_free")),
        *shared_keys.EVALUATION,
        Key("sleep_level", ("serving.sleep",), _sleep_level),
        *shared_keys.generation(vllm_max_model_length="vllm_max_model_len"),
        Key("gradient_checkpointing", ("kernels.checkpointing",), shared_keys.checkpoints),
        Key("attn_impl", ("kernels.attention",), _attention),
        Key("use_liger_kernel", ("kernels.loss", "kernels.fused"), shared_keys.liger),
        Key("optim", ("optimizer.name",), shared_keys.optimizer),
        *(key for key in shared_keys.TRAINER_KEYS if key.key != "deepspeed"),
        Key("deepspeed", (*PARALLEL, *HOST), _deepspeed),
        shared_keys.SEGMENTS,
    ),
    shared_keys.remarks,
)
