"""Values, keys and remarks shared by the frameworks' tables. A value is a function of the run; None writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.kernels.trl_losses import TRL_LOSSES
from memplan.catalogue.methods.methods import LORA
from memplan.catalogue.parallelism.sharding import STAGES
from memplan.core.errors import MemplanError
from memplan.frameworks.change_table import Key, Remark, Value, field, pairs, value_of
from memplan.models.cards import find_model
from memplan.spec.parallelism import Zero
from memplan.spec.run import RunSpec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BITS = {"nf4": 4, "fp4": 4, "int8": 8}  # formats that bitsandbytes quantises to while loading
FORMAT = "method.quantization.format"
KIND = "method.kind"
PACKING = "batch.packing"
PRECISION = ("precision.weights", "precision.compute", "precision.autocast")
PARALLEL = ("parallelism.world", "parallelism.dp", "parallelism.strategy")
RESHARD = "parallelism.reshard_after_forward"
HOST = ("parallelism.offload.optimizer", "parallelism.offload.parameters")


def model(run: RunSpec) -> Value:
    """The model's id on the Hub, or the name as typed; None for a model given by its config."""
    if not isinstance(run.model, str):
        return None
    try:
        return str(find_model(run.model).card.get("hf_id", run.model))
    except MemplanError:  # not bundled: the framework looks it up itself
        return run.model


def uses_adapters(run: RunSpec) -> bool:
    """Whether the run trains LoRA's adapters, the only ones that the frameworks have keys for."""
    return run.method.kind in LORA


def of_adapters(value: Callable[[RunSpec], Value]) -> Callable[[RunSpec], Value]:
    """Return `value` for runs with adapters, else None."""
    return lambda run: value(run) if uses_adapters(run) else None


RANK, DROPOUT, TARGETS = (of_adapters(field(f"method.{name}")) for name in ("rank", "dropout", "targets"))


def alpha(run: RunSpec) -> Value:
    """LoRA's alpha, as an int if it is whole, because frameworks expect one."""
    value = run.method.alpha
    return int(value) if value is not None and value == int(value) else value


def dora(run: RunSpec) -> bool:
    return run.method.kind in ("dora", "qdora")


def rslora(run: RunSpec) -> Value:
    return run.method.options.get("use_rslora")


def likeliest(run: RunSpec) -> Value:
    if value_of(run, "also.evaluation.preprocess") is None:
        return None
    return "trainer = SFTTrainer(..., preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1))"


def saved(run: RunSpec) -> Value:
    return run.method.modules_to_save or None


def bits(run: RunSpec) -> int | None:
    q = run.method.quantization
    return None if q is None else BITS.get(q.format)


def quantised_to(wanted: int) -> Callable[[RunSpec], bool]:
    """Return a function that tells whether bitsandbytes quantises to the `wanted` bits."""
    return lambda run: bits(run) == wanted


def of_4_bits(name: str) -> Callable[[RunSpec], Value]:
    """Return a field of the quantisation if it is bitsandbytes' 4-bit one, else None."""
    return lambda run: getattr(run.method.quantization, name) if bits(run) == 4 else None


def computes(run: RunSpec) -> str:
    """The dtype that the run computes in."""
    p = run.precision
    return p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)


def storage(run: RunSpec) -> Value:
    """The storage dtype of packed 4-bit weights, if it is not the default."""
    q = run.method.quantization
    return None if q is None or bits(run) != 4 else DTYPES.get(q.storage)


def casts_to(dtype: str) -> Callable[[RunSpec], bool]:
    """Return a function that tells whether mixed precision (autocast, or fp32 master weights) computes in the dtype."""
    return lambda run: (run.precision.autocast or run.precision.master is not None) and computes(run) == dtype


def checkpoints(run: RunSpec) -> bool | None:
    """Whether the run uses gradient checkpointing; None leaves it to the profile."""
    kind = run.kernels.checkpointing
    return None if kind is None else kind != "none"


def optimizer(run: RunSpec) -> Value:
    """A name of transformers' OptimizerNames."""
    return run.optimizer.name if run.optimizer.name not in ("none", "muon") else None


def clip(run: RunSpec) -> Value:
    return run.loop.clip_grad_norm or 0.0


def attention(run: RunSpec) -> str | None:
    """The name for `attn_implementation`; None leaves it to the library. torch chooses among sdpa's kernels."""
    kind = run.kernels.attention
    return "sdpa" if kind is not None and kind.startswith("sdpa") else kind


def stage(run: RunSpec) -> int | None:
    """DeepSpeed's ZeRO stage, if the run uses one."""
    return STAGES.get(run.parallelism.strategy)


def deepspeed(run: RunSpec) -> Value:
    """A complete DeepSpeed config, with `auto` for values that the framework knows."""
    if stage(run) is None:
        return None
    settings = _differing(run.parallelism.zero.model_dump(), Zero().model_dump())
    settings.pop("zero3_init_flag", None)
    zero: dict[str, Value] = {"stage": stage(run), **settings}
    for key, moved in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        if getattr(run.parallelism.offload, moved):
            zero[key] = {"device": "cpu", **settings.get(key, {})}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def _differing(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not the defaults. pydantic does this too, but takes a tenth of a plan to import."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if value != defaults[key]:
            out[key] = _differing(cast(dict[str, Any], value), defaults[key]) if isinstance(value, dict) else value
    return out


def fsdp(run: RunSpec) -> int | None:
    """The version of torch's FSDP, if the run uses it."""
    return {"fsdp": 1, "fsdp2": 2}.get(run.parallelism.strategy)


def liger(run: RunSpec) -> bool:
    """Whether the run uses any of Liger's kernels."""
    return run.kernels.loss == "fused" or bool(set(run.kernels.fused or ()) - {"lora"})


def segments(run: RunSpec) -> Value:
    on = run.loop.expandable_segments
    return f"export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:{on}"


def uses(kernel: str) -> Callable[[RunSpec], bool]:
    """Return a function that tells whether a run uses the fused kernel."""
    return lambda run: kernel in (run.kernels.fused or ())


def kernel_of_sdpa(run: RunSpec) -> Value:
    """A line of Python that restricts torch's attention to one kernel during training."""
    backend = {"sdpa_math": "MATH", "sdpa_efficient": "EFFICIENT_ATTENTION", "sdpa_cudnn": "CUDNN_ATTENTION"}.get(
        str(run.kernels.attention)
    )
    return backend and f"with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.{backend}): trainer.train()"


def _accelerator(run: RunSpec) -> Value:
    return {"gradient_accumulation_kwargs": {"sync_each_batch": True}} if run.loop.sync_each_batch else None


TRAINER_KEYS = (
    Key("max_grad_norm", ("loop.clip_grad_norm",), clip, same=True),
    Key("torch_compile", ("kernels.compile",)),
    Key("accelerator_config", ("loop.sync_each_batch",), _accelerator),
    Key("deepspeed", (*PARALLEL, *HOST), deepspeed),
)
EVALUATION = (
    Key("per_device_eval_batch_size", ("also.evaluation.micro",)),
    Key("eval_accumulation_steps", ("also.evaluation.accumulation",)),
)
_GENERATION = pairs(
    "num_generations=batch.generations max_completion_length=batch.new_tokens vllm_mode=rollout "
    "vllm_gpu_memory_utilization=serving.memory_utilization vllm_max_model_length=serving.max_model_len "
    "vllm_tensor_parallel_size=serving.tensor_parallel"
)


def generation(**named: str) -> Iterator[Key]:
    """Yield TRL's keys of a generation and of the reference; `named` has a framework's own names of some."""
    yield from (Key(named.get(name, name), (path,), field(path)) for name, path in _GENERATION.items())
    yield Key("beta", ("reference",), _beta)


def _beta(run: RunSpec) -> Value:
    return 0.0 if run.reference == "none" else None


SDPA = Key("sdpa_kernel", ("kernels.attention",), kernel_of_sdpa, "Python")
SEGMENTS = Key("PYTORCH_CUDA_ALLOC_CONF", ("loop.expandable_segments",), segments, "shell")


def resharding(run: RunSpec) -> bool | str:
    """accelerate's `reshard_after_forward`: for FSDP1 its sharding strategy, hybrid if groups are replicas."""
    p = run.parallelism
    if p.strategy == "fsdp2":
        return p.reshard_after_forward is not False
    keeps_gathered = p.reshard_after_forward is False
    suffix = "_zero2" if keeps_gathered else ""
    is_hybrid = p.shard_group not in (None, p.world)
    return f"hybrid_shard{suffix}" if is_hybrid else "shard_grad_op" if keeps_gathered else "full_shard"


def _gpu(run: RunSpec) -> str:
    """The GPU's title, or its name as typed."""
    try:
        return find_gpu(run.gpu).title if run.gpu is not None else ""
    except MemplanError:
        return str(run.gpu)


def remarks(run: RunSpec) -> Iterator[Remark]:
    """Yield the remarks that all frameworks' tables share."""
    o, q, name, loss = run.optimizer, run.method.quantization, str(run.optimizer.name), run.kernels.loss
    yield Remark(("gpu",), f"run it on {_gpu(run)}" if run.gpu is not None else "no GPU is named")
    if run.kernels.checkpointing == "selective":
        yield Remark(("kernels.checkpointing",), "no key keeps matrix products: pass a context_fn to the checkpoints")
    yield Remark(("profile",), f"{run.profile} is a version of the framework, not a key")
    in_backward = (
        "no key steps the optimizer in backward: give each parameter its own optimizer and step it in "
        "register_post_accumulate_grad_hook; gradients are then neither clipped nor accumulated"
    )
    after = "step the optimizer after the backward pass, not during it"
    yield Remark(("optimizer.in_backward",), in_backward if o.in_backward else after)
    if o.foreach is not None:
        how = f"no key: pass the optimizer as optimizer_cls_and_kwargs, with foreach={o.foreach}"
        yield Remark(("optimizer.foreach",), how)
    if name.startswith(("galore", "apollo")):
        yield Remark(("optimizer.name",), f"{name} also needs its layers under optim_target_modules")
    if name == "none":
        yield Remark(("optimizer.name",), "no key trains without an optimizer")
    if run.precision.master is not None:
        masters = f"fp32 master weights next to {run.precision.weights} weights need DeepSpeed, at any stage"
        yield Remark(("precision.master", "precision.grads"), masters)
    others = {"chunked_lm_head": "only LitGPT computes the head in chunks", "fused_chunks": "Unsloth's own loss"}
    if loss in others or loss in TRL_LOSSES:
        yield Remark(("kernels.loss",), others.get(loss, "TRL's own loss, in SFTTrainer"))
    if q is not None and bits(run) is None:
        yield Remark((FORMAT,), f"{q.format} comes from the checkpoint: choose a model published in that format")
    offload = run.parallelism.offload
    if fsdp(run) is not None and offload.optimizer and not offload.parameters:
        yield Remark(HOST, "FSDP offloads parameters, gradients and states only together")
