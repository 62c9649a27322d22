"""Axolotl's keys."""

from __future__ import annotations

from memplan.frameworks import shared_keys as words
from memplan.frameworks.change_table import Framework, Key, Remark, Value, is_
from memplan.frameworks.shared_keys import DTYPES, FORMAT, HOST, KIND, PARALLEL, PRECISION, RESHARD, of_adapters
from memplan.spec.run import RunSpec

_KERNELS = {
    "liger_rope": "rope",
    "liger_rms_norm": "rms_norm",
    "liger_glu_activation": "swiglu",
    "liger_cross_entropy": "cross_entropy",
    "lora_mlp_kernel": "lora",
    "lora_qkv_kernel": "lora",
    "lora_o_kernel": "lora",
}


def _adapter(run: RunSpec) -> Value:
    """qlora is 4 bits alone: adapters of 8-bit weights are a lora."""
    return ("qlora" if words.bits(run) == 4 else "lora") if words.adapted(run) else None


def _bnb(run: RunSpec) -> Value:
    """What is not Axolotl's own nf4 with double quantisation."""
    q = run.method.quantization
    if q is None or words.bits(run) is None:
        return None
    kwargs: dict[str, Value] = {}
    if words.bits(run) == 4 and q.format != "nf4":
        kwargs["bnb_4bit_quant_type"] = q.format
    if words.bits(run) == 4 and not q.double_quant:
        kwargs["bnb_4bit_use_double_quant"] = False
    if words.bits(run) == 4 and q.storage != "uint8":
        kwargs["bnb_4bit_quant_storage"] = DTYPES[q.storage]
    if q.skip is not None:
        kwargs["llm_int8_skip_modules"] = q.skip
    return kwargs or None


def _linear(run: RunSpec) -> Value:
    return run.method.targets == "all-linear"


def _modules(run: RunSpec) -> Value:
    return None if run.method.targets == "all-linear" else run.method.targets


def _upcasts(run: RunSpec) -> Value:
    return None if run.method.adapter_dtype is None else run.method.adapter_dtype == "fp32"


def _reentrant(run: RunSpec) -> Value:
    if run.kernels.reentrant is None or words.checkpoints(run) is False:
        return None
    return {"use_reentrant": run.kernels.reentrant}


def _offloading(run: RunSpec) -> Value:
    if run.kernels.checkpointing == "offload":
        return "hidden_states"
    return run.parallelism.offload.activations


def _fsdp(run: RunSpec) -> Value:
    if words.fsdp(run) is None:
        return None
    return {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": words.resharding(run) if words.fsdp(run) == 2 else True,
        "offload_params": run.parallelism.offload.parameters,
    }


def _launch(run: RunSpec) -> Value:
    world = run.parallelism.world
    return "axolotl train run.yaml" + (f" --launcher torchrun -- --nproc_per_node={world}" if world > 1 else "")


def _segments(run: RunSpec) -> Value:
    on = run.loop.expandable_segments
    return "unset PYTORCH_ALLOC_CONF" if on else "export PYTORCH_ALLOC_CONF=expandable_segments:False"


def _segments_alone(run: RunSpec) -> str:
    return "Axolotl turns expandable segments on where the variable is not set"


def _casts(run: RunSpec) -> str:
    p = run.precision
    if p.weights == "fp32":
        amp = "fp32 weights under autocast have no key" if p.autocast else ""
        return amp and f"Axolotl loads the weights in the dtype it computes in: {amp}"
    return "" if p.autocast else f"Axolotl autocasts to {p.weights} over {p.weights} weights"


def _preparation(run: RunSpec) -> str:
    return "Axolotl prepares quantised models itself, and casts norms and embeddings back where there is an adapter"


def _plugins(run: RunSpec) -> str:
    return "plugins is one list: add to what yours has" if words.liger(run) else ""


def _plugin(run: RunSpec) -> Value:
    return ("axolotl.integrations.liger.LigerPlugin",) if words.liger(run) else None


def _selective(run: RunSpec) -> Value:
    return run.kernels.checkpointing == "selective" or None


def _optimizer(run: RunSpec) -> Value:
    return "muon" if run.optimizer.name == "muon" else words.optimizer(run)


def _freeze(run: RunSpec) -> str:
    return "list the layers that train under unfrozen_parameters" if run.method.kind == "freeze" else ""


def _accumulation(run: RunSpec) -> str:
    return "kept logits go to the host after as many batches as gradient_accumulation_steps says, and no key changes it"


AXOLOTL = Framework(
    "axolotl",
    "Axolotl",
    "axolotl 0.19.0 utils/schemas/config.py, peft.py, training.py, fsdp.py, integrations/liger/args.py, "
    "utils/config/__init__.py resolve_dtype, utils/__init__.py, loaders/model.py, core/builders/base.py, causal.py",
    (
        Key("base_model", ("model",), words.model),
        Key("bf16", PRECISION, is_("precision.weights", "bf16")),
        Key("fp16", (*PRECISION, "loop.grad_scaler"), is_("precision.weights", "fp16")),
        Key("adapter", (KIND, FORMAT), _adapter),
        Key("load_in_4bit", (KIND, FORMAT), words.quantised_to(4)),
        Key("load_in_8bit", (KIND, FORMAT), words.quantised_to(8)),
        Key(
            "bnb_config_kwargs",
            (FORMAT, *(f"method.quantization.{name}" for name in ("double_quant", "storage", "skip"))),
            _bnb,
        ),
        Key("gptq", (FORMAT,), is_(FORMAT, "gptq-int4")),
        Key("lora_r", ("method.rank",), words.RANK),
        Key("lora_alpha", ("method.alpha",), of_adapters(words.alpha)),
        Key("lora_dropout", ("method.dropout",), words.DROPOUT),
        Key("lora_target_linear", ("method.targets",), of_adapters(_linear)),
        Key("lora_target_modules", ("method.targets",), of_adapters(_modules)),
        Key("lora_modules_to_save", ("method.modules_to_save",), of_adapters(words.saved)),
        Key("peft_use_dora", (KIND,), words.dora),
        Key("peft_use_rslora", ("method.options",), of_adapters(words.rslora)),
        Key("peft_autocast_adapter_dtype", ("method.adapter_dtype",), of_adapters(_upcasts)),
        Key("micro_batch_size", ("batch.micro",)),
        Key("gradient_accumulation_steps", ("batch.accumulation",)),
        Key("sequence_len", ("batch.sequence",)),
        Key("eval_batch_size", ("also.evaluation.micro",)),
        Key("gradient_checkpointing", ("kernels.checkpointing",), words.checkpoints),
        Key("gradient_checkpointing_kwargs", ("kernels.reentrant",), _reentrant),
        Key("selective_checkpointing", ("kernels.checkpointing",), _selective),
        Key("activation_offloading", ("kernels.checkpointing", "parallelism.offload.activations"), _offloading),
        Key("attn_implementation", ("kernels.attention",), words.attention),
        words.SDPA,
        Key("plugins", ("kernels.loss", "kernels.fused"), _plugin),
        Key("liger_fused_linear_cross_entropy", ("kernels.loss",), is_("kernels.loss", "fused")),
        Key("chunked_cross_entropy", ("kernels.loss",), is_("kernels.loss", "chunked")),
        *(Key(key, ("kernels.fused",), words.uses(kernel)) for key, kernel in _KERNELS.items()),
        Key("optimizer", ("optimizer.name",), _optimizer),
        *words.TRAINER_KEYS,
        Key("fsdp_version", PARALLEL, words.fsdp),
        Key("fsdp_config", (*PARALLEL, *HOST, RESHARD), _fsdp),
        Key("tensor_parallel_size", ("parallelism.tp",)),
        Key("context_parallel_size", ("parallelism.cp",)),
        Key("train", PARALLEL, _launch, "shell"),
        Key("PYTORCH_ALLOC_CONF", ("loop.expandable_segments",), _segments, "shell"),
    ),
    (
        *words.REMARKS,
        Remark(("precision.weights", "precision.autocast"), _casts),
        Remark(("also.evaluation.accumulation",), _accumulation),
        Remark(("method.quantization.kbit_preparation",), _preparation),
        Remark(("kernels.loss", "kernels.fused"), _plugins),
        Remark((KIND, "method.trainable_layers"), _freeze),
        Remark(("loop.expandable_segments",), _segments_alone),
    ),
)
