"""What the tables of all frameworks say of a run alike: each a function of the run, None where it is not there."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import MemplanError
from memplan.frameworks.change_table import Key, Remark, Value, field, value_of
from memplan.models.cards import find_model
from memplan.spec.run import RunSpec

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BITS = {"nf4": 4, "fp4": 4, "int8": 8}  # what bitsandbytes quantises while it loads
FORMAT = "method.quantization.format"
KIND = "method.kind"
PRECISION = ("precision.weights", "precision.compute", "precision.autocast")
PARALLEL = ("parallelism.world", "parallelism.dp", "parallelism.strategy")
RESHARD = "parallelism.reshard_after_forward"
HOST = ("parallelism.offload.optimizer", "parallelism.offload.parameters")


def model(run: RunSpec) -> Value:
    """The model as the Hub knows it, or as it was typed; None for one given by its config."""
    if not isinstance(run.model, str):
        return None
    try:
        return str(find_model(run.model).card.get("hf_id", run.model))
    except MemplanError:  # not bundled: the framework will look for it itself
        return run.model


def adapted(run: RunSpec) -> bool:
    return run.method.kind in ADAPTERS


def of_adapters(value: Callable[[RunSpec], Value]) -> Callable[[RunSpec], Value]:
    """The same of a run with adapters, None of another."""
    return lambda run: value(run) if adapted(run) else None


RANK, DROPOUT, TARGETS = (of_adapters(field(f"method.{name}")) for name in ("rank", "dropout", "targets"))


def alpha(run: RunSpec) -> Value:
    """Whole where it is: frameworks take it as an int."""
    given = run.method.alpha
    return int(given) if given is not None and given == int(given) else given


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
    """Whether bitsandbytes quantises to so many bits."""
    return lambda run: bits(run) == wanted


def of_4_bits(name: str) -> Callable[[RunSpec], Value]:
    """A field of a 4-bit quantisation by bitsandbytes, None of another run."""
    return lambda run: getattr(run.method.quantization, name) if bits(run) == 4 else None


def computes(run: RunSpec) -> str:
    """The dtype that the run computes in."""
    p = run.precision
    return p.compute or ("bf16" if p.autocast and p.weights == "fp32" else p.weights)


def storage(run: RunSpec) -> Value:
    """The dtype that packed 4-bit weights are kept in, where it is not the usual one."""
    q = run.method.quantization
    return None if q is None or bits(run) != 4 else DTYPES.get(q.storage)


def casts_to(dtype: str) -> Callable[[RunSpec], bool]:
    """Whether mixed precision computes in the dtype: autocast does, or DeepSpeed, which keeps fp32 masters."""
    return lambda run: (run.precision.autocast or run.precision.master is not None) and computes(run) == dtype


def checkpoints(run: RunSpec) -> bool | None:
    """None where the profile decides."""
    kind = run.kernels.checkpointing
    return None if kind is None else kind != "none"


def optimizer(run: RunSpec) -> Value:
    """A name of transformers' OptimizerNames."""
    return run.optimizer.name if run.optimizer.name not in ("none", "muon") else None


def clip(run: RunSpec) -> Value:
    return run.loop.clip_grad_norm or 0.0


def attention(run: RunSpec) -> str:
    """As `attn_implementation` names it: which of sdpa's kernels runs is torch's choice."""
    kind = run.kernels.attention
    return "sdpa" if kind.startswith("sdpa") else kind


def stage(run: RunSpec) -> int | None:
    """DeepSpeed's."""
    return {"zero1": 1, "zero2": 2, "zero3": 3}.get(run.parallelism.strategy)


def deepspeed(run: RunSpec) -> Value:
    """A whole DeepSpeed config, in which what the framework knows already is left to it."""
    if stage(run) is None:
        return None
    said = run.parallelism.zero.model_dump(exclude_defaults=True, exclude={"zero3_init_flag"})
    zero: dict[str, Value] = {"stage": stage(run), **said}
    for what, moved in (("offload_optimizer", "optimizer"), ("offload_param", "parameters")):
        if getattr(run.parallelism.offload, moved):
            zero[what] = {"device": "cpu", **said.get(what, {})}
    return {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
    }


def fsdp(run: RunSpec) -> int | None:
    """The version of torch's FSDP."""
    return {"fsdp": 1, "fsdp2": 2}.get(run.parallelism.strategy)


def liger(run: RunSpec) -> bool:
    """Whether anything is Liger's."""
    return run.kernels.loss == "fused" or bool(set(run.kernels.fused or ()) - {"lora"})


def segments(run: RunSpec) -> Value:
    on = run.loop.expandable_segments
    return f"export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:{on}"


def uses(kernel: str) -> Callable[[RunSpec], bool]:
    """Whether the kernel is among the fused ones."""
    return lambda run: kernel in (run.kernels.fused or ())


def kernel_of_sdpa(run: RunSpec) -> Value:
    """A line around the training that leaves torch one kernel of its attention."""
    backend = {"sdpa_math": "MATH", "sdpa_efficient": "EFFICIENT_ATTENTION"}.get(run.kernels.attention)
    return backend and f"with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.{backend}): trainer.train()"


TRAINER_KEYS = (
    Key("max_grad_norm", ("loop.clip_grad_norm",), clip),
    Key("torch_compile", ("kernels.compile",)),
    Key("deepspeed", (*PARALLEL, *HOST), deepspeed),
)
EVALUATION = (
    Key("per_device_eval_batch_size", ("also.evaluation.micro",)),
    Key("eval_accumulation_steps", ("also.evaluation.accumulation",)),
)
SDPA = Key("sdpa_kernel", ("kernels.attention",), kernel_of_sdpa, "Python")
SEGMENTS = Key("PYTORCH_CUDA_ALLOC_CONF", ("loop.expandable_segments",), segments, "shell")


def _gpu(run: RunSpec) -> str:
    if run.gpu is None:
        return "no GPU is named"
    try:
        return f"run it on {find_gpu(run.gpu).title}"
    except MemplanError:
        return f"run it on {run.gpu}"


def _profile(run: RunSpec) -> str:
    return f"{run.profile} is a version of the framework, not a key"


def _in_backward(run: RunSpec) -> str:
    if not run.optimizer.in_backward:
        return "let the optimizer step after the backward pass, not in it"
    return (
        "no key has the optimizer step in backward: give each parameter an optimizer of its own and step it in "
        "register_post_accumulate_grad_hook; nothing is clipped or accumulated then"
    )


def _master(run: RunSpec) -> str:
    if run.precision.master is None:
        return ""
    return f"fp32 masters beside {run.precision.weights} weights are DeepSpeed's, under any of its stages"


def _layers(run: RunSpec) -> str:
    name = str(run.optimizer.name)
    return f"{name} also needs its layers under optim_target_modules" if name.startswith(("galore", "apollo")) else ""


def _ready_quantised(run: RunSpec) -> str:
    q = run.method.quantization
    if q is None or bits(run) is not None:
        return ""
    return f"{q.format} is the checkpoint's own: name a model that was published so"


def _untrained(run: RunSpec) -> str:
    return "no key trains without an optimizer" if run.optimizer.name == "none" else ""


def _others_alone(run: RunSpec) -> str:
    """Kernels that are one tool's own."""
    if run.kernels.loss == "chunked_lm_head":
        return "a head that is computed in chunks is LitGPT's"
    return ""


def _foreach(run: RunSpec) -> str:
    if run.optimizer.foreach is None:
        return ""
    return f"no key: hand the optimizer over as optimizer_cls_and_kwargs, with foreach={run.optimizer.foreach}"


def resharding(run: RunSpec) -> bool | str:
    """accelerate's `reshard_after_forward`: of FSDP1 its sharding strategy, by which groups may be replicas, too."""
    p = run.parallelism
    if p.strategy == "fsdp2":
        return p.reshard_after_forward is not False
    whole = p.reshard_after_forward is False
    kept = "_zero2" if whole else ""
    grouped = p.shard_group not in (None, p.world)
    return f"hybrid_shard{kept}" if grouped else "shard_grad_op" if whole else "full_shard"


def _fsdp_offload(run: RunSpec) -> str:
    o = run.parallelism.offload
    if fsdp(run) is None or o.parameters or not o.optimizer:
        return ""
    return "FSDP keeps parameters, gradients and states on the host together, or none of them"


REMARKS = (
    Remark(("gpu",), _gpu),
    Remark(("profile",), _profile),
    Remark(("optimizer.in_backward",), _in_backward),
    Remark(("optimizer.foreach",), _foreach),
    Remark(("optimizer.name",), _layers),
    Remark(("optimizer.name",), _untrained),
    Remark(("precision.master", "precision.grads"), _master),
    Remark(("kernels.loss",), _others_alone),
    Remark((FORMAT,), _ready_quantised),
    Remark(HOST, _fsdp_offload),
)
