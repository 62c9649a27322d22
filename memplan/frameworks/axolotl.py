"""The table of Axolotl's config keys."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Framework, Key, Remark, Value, is_, pairs
from memplan.frameworks.shared_keys import DTYPES, FORMAT, HOST, KIND, PARALLEL, PRECISION, RESHARD, of_adapters
from memplan.spec.run import RunSpec

_EXPERTS = "method.quantization.experts"
_KERNELS = pairs(
    "liger_rope=rope liger_rms_norm=rms_norm liger_glu_activation=swiglu liger_cross_entropy=cross_entropy "
    "lora_mlp_kernel=lora lora_qkv_kernel=lora lora_o_kernel=lora"
)


def _adapter(run: RunSpec) -> Value:
    """Axolotl's `qlora` means 4 bits; adapters over 8-bit weights are `lora`."""
    return ("qlora" if shared_keys.bits(run) == 4 else "lora") if shared_keys.uses_adapters(run) else None


def _bnb(run: RunSpec) -> Value:
    """Settings that differ from Axolotl's default, nf4 with double quantisation."""
    q = run.method.quantization
    if q is None or shared_keys.bits(run) is None:
        return None
    kwargs: dict[str, Value] = {}
    if shared_keys.bits(run) == 4 and q.format != "nf4":
        kwargs["bnb_4bit_quant_type"] = q.format
    if shared_keys.bits(run) == 4 and not q.double_quant:
        kwargs["bnb_4bit_use_double_quant"] = False
    if shared_keys.bits(run) == 4 and q.storage != "uint8":
        kwargs["bnb_4bit_quant_storage"] = DTYPES[q.storage]
    if q.skip is not None:
        kwargs["llm_int8_skip_modules"] = q.skip
    return kwargs or None


def _modules(run: RunSpec) -> Value:
    return None if run.method.targets == "all-linear" else run.method.targets


def _plugin(run: RunSpec) -> Value:
    return ("axolotl.integrations.liger.LigerPlugin",) if shared_keys.liger(run) else None


def _optimizer(run: RunSpec) -> Value:
    return "muon" if run.optimizer.name == "muon" else shared_keys.optimizer(run)


def _upcasts(run: RunSpec) -> Value:
    return None if run.method.adapter_dtype is None else run.method.adapter_dtype == "fp32"


def _reentrant(run: RunSpec) -> Value:
    if run.kernels.reentrant is None or shared_keys.checkpoints(run) is False:
        return None
    return {"use_reentrant": run.kernels.reentrant}


def _offloading(run: RunSpec) -> Value:
    if run.kernels.checkpointing == "offload":
        return "hidden_states"
    return run.parallelism.offload.activations


def _fsdp(run: RunSpec) -> Value:
    if shared_keys.fsdp(run) is None:
        return None
    return {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": shared_keys.resharding(run) if shared_keys.fsdp(run) == 2 else True,
        "offload_params": run.parallelism.offload.parameters,
        "cpu_ram_efficient_loading": run.parallelism.cpu_ram_efficient_loading,
    }


def _launch(run: RunSpec) -> Value:
    world = run.parallelism.world
    return "axolotl train run.yaml" + (f" --launcher torchrun -- --nproc_per_node={world}" if world > 1 else "")


def _segments(run: RunSpec) -> Value:
    on = run.loop.expandable_segments
    return "unset PYTORCH_ALLOC_CONF" if on else "export PYTORCH_ALLOC_CONF=expandable_segments:False"


def _remarks(run: RunSpec) -> Iterator[Remark]:
    yield from shared_keys.remarks(run)
    p = run.precision
    if p.weights == "fp32" and p.autocast:
        casts = "Axolotl loads the weights in the dtype it computes in: fp32 weights under autocast have no key"
    else:
        casts = f"Axolotl runs autocast to {p.weights} even over {p.weights} weights"
    if (p.weights == "fp32") == p.autocast:
        yield Remark(("precision.weights", "precision.autocast"), casts)
    logits = "kept logits go to the host every gradient_accumulation_steps batches, which no key changes"
    yield Remark(("also.evaluation.accumulation",), logits)
    preparation = "Axolotl prepares quantised models itself, and with an adapter casts norms and embeddings back"
    yield Remark(("method.quantization.kbit_preparation",), preparation)
    if shared_keys.liger(run):
        yield Remark(("kernels.loss", "kernels.fused"), "append to plugins if your config already has some")
    if run.method.kind == "freeze":
        yield Remark((KIND, "method.trainable_layers"), "list the trainable layers under unfrozen_parameters")
    segments = "Axolotl turns expandable segments on unless the variable is set"
    yield Remark(("loop.expandable_segments",), segments)


AXOLOTL = Framework(
    "axolotl",
    "Axolotl",
    "axolotl 0.19.0 utils/schemas/config.py, peft.py, training.py, fsdp.py, integrations/liger/args.py, "
    "utils/config/__init__.py resolve_dtype, utils/__init__.py, loaders/model.py, core/builders/base.py, causal.py",
    (
        Key("base_model", ("model",), shared_keys.model),
        Key("bf16", PRECISION, is_("precision.weights", "bf16")),
        Key("fp16", (*PRECISION, "loop.grad_scaler"), is_("precision.weights", "fp16")),
        Key("adapter", (KIND, FORMAT), _adapter),
        Key("load_in_4bit", (KIND, FORMAT), shared_keys.quantised_to(4)),
        Key("load_in_8bit", (KIND, FORMAT), shared_keys.quantised_to(8)),
        Key(
            "bnb_config_kwargs",
            (FORMAT, *(f"method.quantization.{name}" for name in ("double_quant", "storage", "skip"))),
            _bnb,
        ),
        Key("quantize_moe_experts", (_EXPERTS,), is_(_EXPERTS, True)),
        Key("gptq", (FORMAT,), is_(FORMAT, "gptq-int4")),
        Key("lora_r", ("method.rank",), shared_keys.RANK, same=True),
        Key("lora_alpha", ("method.alpha",), of_adapters(shared_keys.alpha), same=True),
        Key("lora_dropout", ("method.dropout",), shared_keys.DROPOUT, same=True),
        Key("lora_target_linear", ("method.targets",), of_adapters(is_("method.targets", "all-linear"))),
        Key(
            "lora_target_modules",
            ("method.targets",),
            of_adapters(_modules),
        ),
        Key("lora_modules_to_save", ("method.modules_to_save",), of_adapters(shared_keys.saved)),
        Key("peft_use_dora", (KIND,), shared_keys.dora),
        Key("peft_use_rslora", ("method.options",), of_adapters(shared_keys.rslora)),
        Key(
            "peft_autocast_adapter_dtype",
            ("method.adapter_dtype",),
            of_adapters(_upcasts),
        ),
        Key("micro_batch_size", ("batch.micro",)),
        Key("gradient_accumulation_steps", ("batch.accumulation",)),
        Key("sequence_len", ("batch.sequence",)),
        Key("sample_packing", (shared_keys.PACKING,), is_(shared_keys.PACKING, "sample_packing")),
        Key("batch_flattening", (shared_keys.PACKING,), is_(shared_keys.PACKING, "padding_free")),
        Key("eval_batch_size", ("also.evaluation.micro",)),
        Key("gradient_checkpointing", ("kernels.checkpointing",), shared_keys.checkpoints),
        Key("gradient_checkpointing_kwargs", ("kernels.reentrant",), _reentrant),
        Key("activation_offloading", ("kernels.checkpointing", "parallelism.offload.activations"), _offloading),
        Key("attn_implementation", ("kernels.attention",), shared_keys.attention),
        shared_keys.SDPA,
        Key("plugins", ("kernels.loss", "kernels.fused"), _plugin),
        Key("liger_fused_linear_cross_entropy", ("kernels.loss",), is_("kernels.loss", "fused")),
        Key("chunked_cross_entropy", ("kernels.loss",), is_("kernels.loss", "chunked")),
        *(Key(key, ("kernels.fused",), shared_keys.uses(kernel)) for key, kernel in _KERNELS.items()),
        Key("optimizer", ("optimizer.name",), _optimizer),
        *shared_keys.TRAINER_KEYS,
        Key("fsdp_version", PARALLEL, shared_keys.fsdp),
        Key("fsdp_config", (*PARALLEL, *HOST, RESHARD), _fsdp),
        Key("tensor_parallel_size", ("parallelism.tp",)),
        Key("context_parallel_size", ("parallelism.cp",)),
        Key("train", PARALLEL, _launch, "shell"),
        Key("PYTORCH_ALLOC_CONF", ("loop.expandable_segments",), _segments, "shell"),
    ),
    _remarks,
)
