"""Refuse runs that ask for what is not supported yet, or set what would have no effect.

No field is ever ignored: one that cannot do what it says is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast, get_args

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.optimizers.optimizers import ON_HOST, OPTIMIZERS
from memplan.catalogue.parallelism.sharding import (
    ALLOWED_ON_FLAT_PARTITIONS,
    ALLOWED_ON_SLICES,
    ELEMENTWISE,
    MEGATRON,
    STAGES,
    STRATEGIES,
)
from memplan.catalogue.quantization.quantization import FP8_BLOCK, WHOLE
from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.program.graph import Graph
from memplan.resolve.parallelism import check_product, replicas
from memplan.spec.formats import Quantization, TrainedOver
from memplan.spec.generation import Generation
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import RunSpec
from memplan.spec.serving import Serving
from memplan.spec.training import Also, Evaluation, Kernels, Loop, Method, Optimizer, Precision

_ONE_GPU = Parallelism()
_PLAIN = Method()


def refuse(run: RunSpec) -> None:
    """Raise SpecError for settings that contradict each other across the parts of a run."""
    if run.task != "generate":
        if run.batch.new_tokens:
            raise SpecError("batch.new_tokens: only task generate makes new tokens", "batch.new_tokens")
        if run.generation != Generation():
            raise SpecError("generation: only applies to task generate", "generation")
    if run.task != "train" and run.also != Also():
        raise SpecError(f"also: only applies to training, not to task {run.task}", "also")
    if run.serving.cache_dtype is not None:
        raise SpecError(
            f"serving.cache_dtype: only applies to serving engines (vllm, sglang, tgi, llama.cpp); with {run.profile} "
            "use generation.cache_implementation quantized, and cache_config.backend quanto, hqq or fp8",
            "serving.cache_dtype",
        )
    if run.serving != Serving():
        raise SpecError(
            f"serving: only applies to serving engines, not {run.profile}; memplan profiles lists them", "serving"
        )
    if run.parallelism != _ONE_GPU:
        for refused in (*_parallelism(run.parallelism), *_offloaded(run)):
            raise refused
    if run.parallelism.device_map is not None and run.task == "train":
        raise SpecError(
            "parallelism.device_map: only applies to tasks forward and generate; to train, set pp (--pp) with a "
            "transformers profile",
            "parallelism.device_map",
        )


def refuse_also(run: RunSpec, graph: Graph) -> None:
    """Raise SpecError for side tasks (evaluation, saving, merging) that the run cannot do."""
    also, degrees = run.also, graph.degrees
    degree = next((name for name in ("pp", "cp", "ep") if getattr(run.parallelism, name) > 1), None)
    if degree is not None:
        raise _not_yet_with("also", f"{degree} {getattr(run.parallelism, degree)}", "data parallelism, sharding and tp")
    tp = run.parallelism.tp
    for part in ("saving", "merging"):
        if tp > 1 and getattr(also, part) is not None:
            raise _not_yet_with(f"also.{part}", f"tp {tp}", "also.evaluation")
    if tp > 1 and also.evaluation is not None and also.evaluation.kept_batches:
        raise _not_yet_with("also.evaluation.kept_batches", f"tp {tp}", "0")
    if graph.code != "transformers" or degrees.style != "transformers" or graph.model.model_type == "megatron_gpt":
        raise SpecError(f"also: is not supported yet with {run.profile}", "also")
    if also.evaluation is not None:
        for refused in _evaluation(run, also.evaluation):
            raise refused
    if also.merging is not None:
        if run.method.kind not in ADAPTERS:
            raise SpecError(f"also.merging: method {run.method.kind} has no adapters to merge", "also.merging")
        if also.merging.model == "trained" and also.merging.dtype is not None:
            raise SpecError(
                "also.merging.dtype: only applies to a reloaded model (also.merging.model reloaded)",
                "also.merging.dtype",
            )
        if also.merging.model == "trained" and run.parallelism.world > 1:
            raise _not_yet_with("also.merging.model", f"{run.parallelism.world} GPUs", "reloaded")


KEPT_BATCHES = 32_768  # whose logits are on the GPU at once: each is a separate allocation to replay
_WHOLE_WEIGHTS = ("ddp", "zero1", "zero2")  # strategies whose ranks each hold all weights and generate alone


def _evaluation(run: RunSpec, e: Evaluation) -> Iterator[SpecError]:
    loss = run.kernels.loss or "hf"
    if e.kept_batches and loss not in ("hf", "fused"):
        yield SpecError(
            f"also.evaluation.kept_batches: loss {loss} never holds all logits at once; use hf or fused",
            "also.evaluation.kept_batches",
        )
    for field in ("accumulation", "preprocess", "batch_metrics", "concatenates"):
        if not e.kept_batches and getattr(e, field) != getattr(Evaluation(), field):
            name = f"also.evaluation.{field}"
            yield SpecError(f"{name}: no logits are kept; set also.evaluation.kept_batches too", name)
    if e.batch_metrics and (e.accumulation is not None or not e.concatenates):
        name = f"also.evaluation.{'accumulation' if e.accumulation is not None else 'concatenates'}"
        yield SpecError(f"{name}: with batch_metrics nothing of a batch is kept; leave it out", name)
    kept = 0 if e.batch_metrics else min(e.kept_batches, e.accumulation or e.kept_batches)
    if kept > KEPT_BATCHES:
        name = f"also.evaluation.{'kept_batches' if e.accumulation is None else 'accumulation'}"
        yield SpecError(
            f"{name}: keeps the logits of {kept:,} batches on the GPU at once, and memplan counts at most "
            f"{KEPT_BATCHES:,}; use a smaller also.evaluation.accumulation (--eval-accumulation-steps)",
            name,
        )
    if e.new_tokens and e.kept_batches:
        name = "also.evaluation.kept_batches"
        yield SpecError(f"{name}: with new_tokens tokens are kept, not logits; leave it out", name)
    p = run.parallelism
    if e.new_tokens and replicas(p) > 1 and p.strategy not in _WHOLE_WEIGHTS:
        yield _not_yet(
            "also.evaluation.new_tokens",
            e.new_tokens,
            f"0 with {p.strategy}, whose ranks gather weights; or strategy ddp, zero1 or zero2, or tp alone",
        )


def refuse_unless_training(run: RunSpec, what: str) -> None:
    """Raise SpecError if the run does not train and `what` is only supported in training."""
    if run.task != "train":
        raise SpecError(f"task: {what} of task {run.task} is not supported yet; supported: train", "task")


def refuse_training_settings(run: RunSpec) -> None:
    """Raise SpecError for training settings of a run that does not train, and for what is not supported yet."""
    task, method, loop = run.task, run.method, run.loop
    for refused in _inference_parallelism(run.parallelism, task):
        raise refused
    if run.generation.assisted and run.parallelism != _ONE_GPU:
        field = "parallelism.tp" if run.parallelism.tp > 1 else "parallelism.device_map"
        raise SpecError(f"{field}: is not supported yet with an assistant; supported: one GPU", field)
    if method.kind == "freeze" or method.frozen or method.modules_to_save:
        field = "kind" if method.kind == "freeze" else "frozen" if method.frozen else "modules_to_save"
        raise SpecError(f"method.{field}: only applies to training, not to task {task}", f"method.{field}")
    for field in ("grads", "master"):
        if getattr(run.precision, field) is not None:
            raise SpecError(f"precision.{field}: only applies to training, not to task {task}", f"precision.{field}")
    if run.batch.accumulation > 1:
        raise SpecError(f"batch.accumulation: only applies to training, not to task {task}", "batch.accumulation")
    if run.kernels.checkpointing not in (None, "none") or run.kernels.reentrant:
        raise SpecError(f"kernels.checkpointing: task {task} has no backward pass", "kernels.checkpointing")
    if run.kernels.loss is not None:
        raise SpecError(f"kernels.loss: task {task} has no loss", "kernels.loss")
    if run.kernels.fused:
        raise _not_yet("kernels.fused", ", ".join(run.kernels.fused), f"none with task {task}")
    if run.kernels.compile:
        raise _not_yet("kernels.compile", True, "false")
    if task == "generate" and loop.use_cache is False:
        raise _not_yet("loop.use_cache", False, "true with task generate")
    for field in ("hold_outputs", "grad_scaler", "trainer"):
        if getattr(loop, field):
            raise SpecError(f"loop.{field}: only applies to training, not to task {task}", f"loop.{field}")


def _inference_parallelism(p: Parallelism, task: str) -> Iterator[SpecError]:
    """Yield errors for GPUs that divide anything other than matrices or layers."""
    for field in ("dp", "cp", "ep"):
        if getattr(p, field) > 1:
            yield _not_yet(
                f"parallelism.{field}", getattr(p, field), f"tp (--tp) or a device_map (--device-map) with task {task}"
            )
    if p.tp > 1 and p.device_map is not None:
        yield SpecError(
            f"parallelism.device_map: {p.device_map} runs one process, but tp {p.tp} needs several; set only one of "
            "them",
            "parallelism.device_map",
        )
    if p.tp > 1 and p.pp > 1:
        yield SpecError(
            f"parallelism.pp: pp {p.pp} runs one process with a device_map, but tp {p.tp} needs several; set only one "
            "of them",
            "parallelism.pp",
        )
    if p.schedule not in (None, "device_map"):
        yield SpecError(
            f"parallelism.schedule: {p.schedule} only applies to training; task {task} places layers with a device_map",
            "parallelism.schedule",
        )
    for field in ("virtual_stages", "first_stage_layers", "last_stage_layers", "ends_as_layers", "strategy", "offload"):
        if getattr(p, field) != getattr(_ONE_GPU, field):
            yield SpecError(
                f"parallelism.{field}: only applies to training, not to task {task}", f"parallelism.{field}"
            )


def refuse_parts(
    method: Method,
    precision: Precision,
    optimizer: Optimizer,
    kernels: Kernels,
    storages: tuple[str, ...] = ("uint8",),
    recomputes_attention: bool = False,
    run_formats: tuple[str, ...] = (),
) -> None:
    """Raise SpecError for settings that a run's parts do not support.

    storages  dtypes that 4-bit weights may be stored in
    selects   whether the model's code can recompute attention alone
    runs      formats in which the run's weights can run
    """
    if kernels.checkpointing == "selective" and not recomputes_attention:
        raise _not_yet("kernels.checkpointing", kernels.checkpointing, "none, full, offload")
    if kernels.compile:
        raise _not_yet("kernels.compile", True, "false")
    for refused in (
        *_method(method, storages, run_formats),
        *_precision(precision, method.quantization),
        *_optimizer(optimizer),
    ):
        raise refused


def refuse_for_megatron(profile: str, method: Method, precision: Precision, kernels: Kernels, loop: Loop) -> None:
    """Raise SpecError for what Megatron-core's own layers do not support."""
    if profile != "megatron-core":
        raise SpecError(
            f"profile: megatron_gpt needs Megatron-core's layers; use megatron-core, not {profile}", "profile"
        )
    if method.kind != "full":
        raise _not_yet("method.kind", method.kind, "full with megatron_gpt")
    if precision.autocast:
        raise SpecError(
            "precision.autocast: Megatron-core casts the model itself; use precision without autocast", "precision"
        )
    if kernels.loss != "hf":
        raise _not_yet("kernels.loss", kernels.loss, "hf with megatron_gpt (Megatron-core's own loss)")
    if kernels.fused:
        raise _not_yet(
            "kernels.fused", ", ".join(kernels.fused), "none with megatron_gpt (its kernels are fused anyway)"
        )
    if kernels.checkpointing == "offload":
        raise _not_yet("kernels.checkpointing", kernels.checkpointing, "none, full, selective with megatron_gpt")
    if loop.padded:
        raise _not_yet("loop.padded", True, "false with megatron_gpt")


def refuse_for_megatron_experts(p: Parallelism, experts: int, width: int) -> None:
    """Raise SpecError for expert parallelism that Megatron-core does not support.

    `experts` is the number of experts, 0 for a dense model; `width` is the width of one.
    """
    for field in ("ep", "etp"):
        if not experts and getattr(p, field) not in (1, _ONE_GPU.etp):
            value = getattr(p, field)
            raise SpecError(
                f"parallelism.{field}: {value} needs a model with experts, and this one has none",
                f"parallelism.{field}",
            )
    if not experts:
        return
    if p.expert_imbalance != 1:
        raise _not_yet(
            "parallelism.expert_imbalance",
            p.expert_imbalance,
            "1 with megatron_gpt; set moe_capacity_factor in its config",
        )
    etp = p.tp if p.etp is None else p.etp
    if experts % p.ep:
        raise SpecError(f"parallelism.ep: {p.ep} does not divide {experts} experts", "parallelism.ep")
    if width % etp:
        raise SpecError(f"parallelism.etp: {etp} does not divide an expert's width of {width}", "parallelism.etp")
    ranks = p.dp * p.tp * p.cp
    if ranks % (p.ep * etp):
        raise SpecError(
            f"parallelism.ep: ep {p.ep} x etp {etp} does not divide dp {p.dp} x tp {p.tp} x cp {p.cp} = {ranks}",
            "parallelism.ep",
        )
    if p.tp > 1 and not p.sequence_parallel:
        raise SpecError(
            "parallelism.sequence_parallel: Megatron-core needs it to train mixtures of experts with tensor "
            "parallelism; set it to true",
            "parallelism.sequence_parallel",
        )


def refuse_for_expert_parallel(
    p: Parallelism, method: Method, precision: Precision, loop: Loop, profile: str, style: str, accumulates: bool
) -> None:
    """Raise SpecError for expert parallelism that transformers, or memplan so far, does not support.

    Each rank has some of the experts, undivided.
    """
    if p.etp not in (1, _ONE_GPU.etp):
        raise _not_yet("parallelism.etp", p.etp, "1, except for megatron_gpt configs with experts")
    field = "parallelism.ep"
    if p.ep == 1:
        if p.expert_imbalance != 1:
            field = "parallelism.expert_imbalance"
            raise SpecError(f"{field}: {p.expert_imbalance:g} only applies to expert parallelism, and ep is 1", field)
        return
    if style != "transformers":
        raise _not_yet(
            field, p.ep, f"1 with profile {profile}; more with profile transformers-5 or megatron_gpt configs"
        )
    wrong = [f"a multiple of tp {p.tp}"] * bool(p.ep % p.tp)
    wrong += [f"a divisor of dp {p.dp} x tp {p.tp} = {p.dp * p.tp}"] * bool(p.dp * p.tp % p.ep)
    if wrong:
        raise SpecError(f"{field}: transformers needs {' and '.join(wrong)}, not {p.ep}", field)
    for other in ("cp", "pp"):
        if getattr(p, other) > 1:
            raise _not_yet(
                f"parallelism.{other}", getattr(p, other), "1 with expert parallelism of transformers' models"
            )
    if p.dp == 1:
        return
    if p.tp > 1 or p.ep < p.dp:
        field = "parallelism.tp" if p.tp > 1 else field
        value, other = (p.tp, f"1 with ep {p.ep} and dp {p.dp}") if p.tp > 1 else (p.ep, f"1 or {p.dp} (dp)")
        raise _not_yet(field, value, other)
    if p.strategy != "fsdp2":
        raise SpecError(
            f"parallelism.strategy: {p.strategy} cannot be combined with expert parallelism; use fsdp2",
            "parallelism.strategy",
        )
    for name in ("shard_group", "reshard_after_forward"):
        if getattr(p, name) != getattr(_ONE_GPU, name):
            raise _not_yet(
                f"parallelism.{name}", getattr(p, name), f"{getattr(_ONE_GPU, name)} with expert parallelism"
            )
    if p.offload.parameters:
        raise _not_yet("parallelism.offload", "parameters", "none with expert parallelism and fsdp2")
    if method.kind != "full":
        raise _not_yet("method.kind", method.kind, "full with expert parallelism and fsdp2")
    if precision.autocast:
        raise _not_yet("precision.autocast", True, "false with expert parallelism and fsdp2")
    if loop.trainer and accumulates:
        raise _not_yet_with("batch.accumulation", "expert parallelism, fsdp2 and loop.trainer", "1")


def refuse_for_optimizer_offload(optimizer: str) -> None:
    """Raise SpecError for an optimizer that cannot step on the host."""
    if optimizer in OPTIMIZERS and optimizer not in ON_HOST:
        raise SpecError(
            f"parallelism.offload: {optimizer} (optimizer.name) cannot step on the host; use {' or '.join(ON_HOST)}",
            "parallelism.offload",
        )


def refuse_for_deepspeed_offload(p: Parallelism, optimizer: str, trainer: bool) -> None:
    """Raise SpecError for an optimizer that DeepSpeed cannot offload, or settings it cannot resolve."""
    if p.offload.optimizer and optimizer not in _CPU_OPTIMIZERS:
        raise SpecError(
            f"parallelism.offload: DeepSpeed cannot offload {optimizer} (optimizer.name); use "
            f"{', '.join(_CPU_OPTIMIZERS)}",
            "parallelism.offload",
        )
    for name, value in p.zero:
        if value == "auto" and not trainer:
            field = f"parallelism.zero.{name}"
            raise SpecError(
                f"{field}: auto needs transformers' Trainer to fill it in; set loop.trainer or a value", field
            )


_CPU_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad")  # DeepSpeedCPUAdam, DeepSpeedCPUAdagrad


def _not_yet(field: str, value: object, supported: str) -> SpecError:
    shown = "true" if value is True else repr(value)
    return SpecError(f"{field}: {shown} is not supported yet; supported: {supported}", field)


def _not_yet_with(field: str, setting: str, supported: str) -> SpecError:
    return SpecError(f"{field}: is not supported yet with {setting}; supported: {supported}", field)


def _parallelism(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for degrees, strategy and offloading that contradict each other."""
    yield from _pipeline(p)
    wrong = check_product(p)
    if wrong is not None:
        yield wrong
    if p.sequence_parallel and p.tp == 1:
        yield SpecError(
            "parallelism.sequence_parallel: needs tensor parallelism; set tp too",
            "parallelism.sequence_parallel",
        )
    if p.context != _ONE_GPU.context and p.cp == 1:
        yield SpecError(
            f"parallelism.context: {p.context} needs context parallelism, and cp is 1", "parallelism.context"
        )
    if replicas(p) > 1 and p.strategy == "none":
        yield SpecError(
            f"parallelism.strategy: is needed with {replicas(p)} GPUs; choose {', '.join(STRATEGIES)}",
            "parallelism.strategy",
        )
    yield from _strategy_settings(p)
    offloads = (*FSDP, "zero3")
    if p.offload.parameters and not (p.strategy in offloads and p.world > 1):
        strategies = ", ".join(offloads)
        yield _not_yet("parallelism.offload", "parameters", f"optimizer; parameters with several GPUs and {strategies}")
    if p.offload.optimizer and p.world > 1 and p.strategy in FSDP and not p.offload.parameters:
        yield SpecError(
            "parallelism.offload: FSDP offloads parameters, gradients and states together; set parameters too",
            "parallelism.offload",
        )
    elif p.offload.optimizer and p.world > 1 and p.strategy not in (*FSDP, *ZERO):
        yield _not_yet("parallelism.offload", "optimizer", f"none with {p.world} GPUs, except with {', '.join(ZERO)}")
    yield from _zero(p)
    if p.gpus_per_node is not None and p.world == 1:
        yield SpecError("parallelism.gpus_per_node: only applies to several GPUs", _PER_NODE)
    elif p.gpus_per_node is not None and p.world > p.gpus_per_node and p.world % p.gpus_per_node:
        yield SpecError(f"{_PER_NODE}: {p.world} GPUs do not divide into nodes of {p.gpus_per_node}", _PER_NODE)


_PER_NODE = "parallelism.gpus_per_node"


def _offloaded(run: RunSpec) -> Iterator[SpecError]:
    """Yield errors for what FSDP cannot do with offloaded parameters, or memplan does not support yet.

    Source: torch 2.13 distributed/fsdp/fully_sharded_data_parallel.py, on gradients accumulated outside of no_sync().
    """
    p = run.parallelism
    if not p.offload.parameters or p.strategy not in FSDP:
        return
    if p.strategy == "fsdp" and run.batch.accumulation > 1 and not run.loop.trainer:
        yield SpecError(
            "batch.accumulation: with offloaded parameters FSDP1 overwrites the gradients of earlier micro-batches; "
            "use fsdp2, which adds them up, or transformers' Trainer (loop.trainer), which reduces once",
            "batch.accumulation",
        )
    if run.loop.grad_scaler:
        yield _not_yet("loop.grad_scaler", True, f"false with parameters offloaded under {p.strategy}")
    if p.tp > 1:
        yield _not_yet("parallelism.offload", "parameters", "none with tensor parallelism")


def refuse_for_activation_offload(
    p: Parallelism, method: Method, kernels: Kernels, model: ModelSpec, profile: str, saves: str, images: bool
) -> None:
    """Raise SpecError for runs whose saved tensors memplan cannot offload yet.

    `saves` names what offloads them, or is "" if the profile cannot.
    """
    field = "parallelism.offload"
    if not saves:
        raise _not_yet(field, "activations", f"optimizer, and kernels.checkpointing offload, with profile {profile}")
    if any(layer.mixer in ("mamba", "linear_attention") for layer in model.layers):
        raise _not_yet(field, "activations", f"none for models with attention-free layers, such as {model.model_type}")
    for name in ("tp", "cp", "ep", "pp"):
        if getattr(p, name) > 1:
            raise _not_yet(f"parallelism.{name}", getattr(p, name), "1 with activations offloaded")
    if p.world > 1 and p.strategy not in ("ddp", "fsdp2"):
        raise _not_yet("parallelism.strategy", p.strategy, "ddp, fsdp2 with activations offloaded")
    if method.quantization is not None and method.quantization.format not in ("nf4", "fp4"):
        raise _not_yet("method.quantization.format", method.quantization.format, "nf4, fp4 with activations offloaded")
    if images:
        raise _not_yet_with("batch.images", "offloaded activations", "0")
    if kernels.fused:
        raise _not_yet("kernels.fused", ", ".join(kernels.fused), "none with activations offloaded")
    if kernels.loss == "chunked_lm_head":
        raise _not_yet("kernels.loss", kernels.loss, "hf, chunked, fused with activations offloaded")


def _zero(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for DeepSpeed settings without DeepSpeed, or that it rejects."""
    if p.zero != _ONE_GPU.zero and p.strategy not in ZERO:
        yield SpecError(
            f"parallelism.zero: configures DeepSpeed, whose strategies are {', '.join(ZERO)}, not {p.strategy}",
            "parallelism.zero",
        )
    for part, moved in (("offload_optimizer", p.offload.optimizer), ("offload_param", p.offload.parameters)):
        field = f"parallelism.zero.{part}"
        if getattr(p.zero, part) != getattr(_ONE_GPU.zero, part) and not moved:
            yield SpecError(f"{field}: has no effect without parallelism.offload", field)
        elif moved and getattr(p.zero, part).device == "nvme" and p.strategy != "zero3":
            yield SpecError(f"{field}.device: nvme needs zero3, not {p.strategy}", f"{field}.device")
    for name in (
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "sub_group_size",
        "zero3_init_flag",
    ):
        field = f"parallelism.zero.{name}"
        if getattr(p.zero, name) != getattr(_ONE_GPU.zero, name) and p.strategy in ZERO and p.strategy != "zero3":
            yield SpecError(f"{field}: only applies to zero3, not {p.strategy}", field)
    if p.zero.round_robin_gradients and p.strategy == "zero3":
        field = "parallelism.zero.round_robin_gradients"
        yield SpecError(f"{field}: only applies to zero1 and zero2, not zero3", field)


def _pipeline(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for pipeline settings without a pipeline, and for what its stages reject."""
    for field in ("virtual_stages", "schedule", "first_stage_layers", "last_stage_layers", "ends_as_layers"):
        if p.pp == 1 and getattr(p, field) != getattr(_ONE_GPU, field):
            value = getattr(p, field)
            yield SpecError(f"parallelism.{field}: {value} needs a pipeline, and pp is 1", f"parallelism.{field}")
    count = p.pp if p.device_map is None else p.world
    if p.stage is not None and p.stage >= count:
        stages = "use 0" if count == 1 else f"choose 0 to {count - 1}"
        what = f"pp {count}" if p.device_map is None else f"{p.device_map} on {count} GPUs"
        yield SpecError(f"parallelism.stage: {what} has no stage {p.stage}; {stages}", "parallelism.stage")
    if p.pp > 1 and p.strategy in ("zero2", "zero3"):
        yield SpecError(
            f"parallelism.strategy: DeepSpeed only supports ZeRO 1 with pp {p.pp}, not {p.strategy}; use zero1",
            "parallelism.strategy",
        )
    if p.pp > 1 and p.strategy == "fsdp":
        yield SpecError(
            f"parallelism.strategy: torch.distributed.pipelining (pp {p.pp}) reduces gradients with fsdp2 and ddp, "
            "not fsdp; use fsdp2",
            "parallelism.strategy",
        )
    if p.pp > 1 and p.strategy == "fsdp2" and p.reshard_after_forward:
        yield _not_yet("parallelism.reshard_after_forward", True, f"false with pp {p.pp}, like torchtitan")
    for part in ("optimizer", "parameters"):
        if p.pp > 1 and getattr(p.offload, part):
            yield _not_yet("parallelism.offload", part, f"none with pp {p.pp}")


def refuse_for_pipeline(p: Parallelism, method: Method, loop: Loop, objective: str, images: bool) -> None:
    """Raise SpecError for what pipeline stages, or memplan so far, do not support."""
    if objective != "causal_lm":
        raise _not_yet("parallelism.pp", p.pp, f"1 for {objective}")
    if images:
        raise _not_yet_with("batch.images", f"pp {p.pp}", "0")
    if method.kind == "freeze" or method.frozen:
        raise SpecError(
            f"method.kind: {method.kind} with frozen parts is not supported yet with pp {p.pp}", "method.kind"
        )
    if loop.hold_outputs:
        raise _not_yet("loop.hold_outputs", loop.hold_outputs, f"false with pp {p.pp}")


def _strategy_settings(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for settings of another strategy, and for shard groups that do not divide the GPUs."""
    for field, strategies in _STRATEGY_SETTINGS.items():
        if getattr(p, field) != getattr(_ONE_GPU, field) and p.strategy not in strategies:
            have = " and ".join(strategies)
            yield SpecError(
                f"parallelism.{field}: only applies to strategy {have}, not {p.strategy}", f"parallelism.{field}"
            )
    group = p.shard_group
    if group is not None and replicas(p) % group:
        yield SpecError(
            f"parallelism.shard_group: {replicas(p)} GPUs do not divide into groups of {group}",
            "parallelism.shard_group",
        )
    if (
        group == 1
        and replicas(p) > 1
        and (p.strategy == "fsdp2" or p.offload.parameters or p.reshard_after_forward is False)
    ):
        yield SpecError(
            "parallelism.shard_group: a group of one shards nothing, which only FSDP1 supports (NO_SHARD), and only "
            "without offloading or reshard_after_forward false; use strategy ddp",
            "parallelism.shard_group",
        )


_STRATEGY_SETTINGS = {
    "shard_group": ("fsdp", "fsdp2"),
    "reshard_after_forward": ("fsdp", "fsdp2"),
    "cpu_ram_efficient_loading": ("fsdp", "fsdp2"),
    "forward_prefetch": ("fsdp",),
    "backward_prefetch": ("fsdp",),
    "bucket_view": ("ddp",),
    "static_graph": ("ddp",),
}


# Strategies of FSDP and of DeepSpeed, and the methods each shards correctly.
FSDP = tuple(name for name, row in STRATEGIES.items() if row.gathers)
ZERO = tuple(STAGES)
_METHODS_OF = {
    "fsdp": ("full", "freeze", "lora", "qlora"),  # peft 0.21's DoRA reads the shape of weights that FSDP1 has flattened
    "fsdp2": ("full", "freeze", "lora", "qlora", "dora"),
    **dict.fromkeys(("zero1", "zero2"), ("full", "freeze", "lora", "qlora", "dora", "qdora")),
    "zero3": ("full", "freeze", "lora", "qlora"),  # DoRA takes norms of weights that another module gathers
    MEGATRON: ("full",),
}
_FLOATS = ("bf16", "fp16", "fp32")


def refuse_for_several_gpus(  # noqa: PLR0912 (a branch for each refusal)
    p: Parallelism, method: Method, precision: Precision, optimizer: Optimizer, loop: Loop
) -> None:
    """Raise SpecError for what several GPUs, or memplan so far, do not support."""
    row = OPTIMIZERS.get(str(optimizer.name))
    if optimizer.in_backward:
        raise _not_yet("optimizer.in_backward", True, f"false with {p.strategy}")
    if row is not None and row.frees_gradients:
        raise SpecError(
            f"optimizer.name: {optimizer.name} steps in backward, which is not supported yet with {p.strategy}",
            "optimizer.name",
        )
    if p.strategy not in _METHODS_OF:
        return
    if method.kind not in _METHODS_OF[p.strategy]:
        raise _not_yet("method.kind", method.kind, f"{', '.join(_METHODS_OF[p.strategy])} with {p.strategy}")
    if method.modules_to_save:
        raise _not_yet("method.modules_to_save", ", ".join(method.modules_to_save), f"none with {p.strategy}")
    supported = (*ELEMENTWISE, *ALLOWED_ON_FLAT_PARTITIONS) if p.strategy in ZERO else ELEMENTWISE
    if p.strategy == "fsdp" and not p.offload.parameters:
        supported = (*ELEMENTWISE, *ALLOWED_ON_SLICES)
    if p.strategy == "fsdp2" and optimizer.name in ALLOWED_ON_SLICES:
        raise SpecError(
            f"optimizer.name: bitsandbytes' {optimizer.name} cannot step on fsdp2's DTensors; use strategy fsdp, or "
            f"{', '.join(ELEMENTWISE)}",
            "optimizer.name",
        )
    if row is not None and optimizer.name not in supported:
        raise _not_yet("optimizer.name", optimizer.name, f"{', '.join(supported)} with {p.strategy}")
    if p.strategy == MEGATRON:
        if precision.autocast:
            raise SpecError(
                "precision.autocast: Megatron computes in the weights' dtype; use precision mixed", "precision.autocast"
            )
        if loop.grad_scaler:
            raise SpecError("loop.grad_scaler: Megatron scales the loss itself; leave it out", "loop.grad_scaler")
        return
    if precision.grads not in (None, precision.weights):
        raise _not_yet(
            "precision.grads", precision.grads, f"{precision.weights} (the weights' dtype) with {p.strategy}"
        )
    if p.strategy in ZERO:
        if precision.autocast:
            raise SpecError(
                "precision.autocast: DeepSpeed casts the model itself, with fp32 masters; use precision mixed",
                "precision.autocast",
            )
        if method.quantization is not None and method.quantization.kbit_preparation:
            field = "method.quantization.kbit_preparation"
            raise SpecError(f"{field}: DeepSpeed casts the prepared fp32 weights back; set it to false", field)
        if method.quantization is not None and p.offload.parameters:
            raise _not_yet("parallelism.offload", "parameters", f"optimizer with {method.kind}")
        if loop.grad_scaler:
            raise SpecError("loop.grad_scaler: DeepSpeed scales the loss itself; leave it out", "loop.grad_scaler")
    elif precision.master is not None:
        raise SpecError(
            "precision.master: FSDP uses autocast for mixed precision; use precision amp", "precision.master"
        )
    q = method.quantization
    if q is not None and q.format not in ("nf4", "fp4"):
        raise _not_yet("method.quantization.format", q.format, f"nf4, fp4 with {p.strategy}")


def refuse_for_tensor_parallel(  # noqa: PLR0912 (a branch for each refusal)
    p: Parallelism,
    method: Method,
    precision: Precision,
    optimizer: Optimizer,
    kernels: Kernels,
    profile: str,
    style: str,
    own: bool,
    trains: bool = True,
) -> None:
    """Raise SpecError for what tensor parallelism, or memplan so far, does not support.

    style   the profile's tensor parallelism
    own     whether the model has the library's own layers
    trains  whether the run trains
    """
    if style == "":
        raise SpecError(
            f"parallelism.tp: {p.tp} is not supported yet with profile {profile}; supported: transformers-5, "
            "megatron-core, torchtitan",
            "parallelism.tp",
        )
    if style == "litgpt" and trains:
        raise SpecError(f"parallelism.tp: profile {profile} only supports {p.tp} for generation", "parallelism.tp")
    if style in ("megatron", "torchtitan", "litgpt") and method.kind != "full":
        raise _not_yet("method.kind", method.kind, f"full with tensor parallelism and profile {profile}")
    if style == "megatron":
        if p.dp > 1 and not own:
            raise _not_yet(
                "parallelism.dp",
                p.dp,
                f"1 with tensor parallelism and profile {profile}, except for megatron_gpt configs",
            )
        if precision.autocast:
            raise SpecError(
                "precision.autocast: Megatron-core casts the model itself; use precision without autocast", "precision"
            )
    elif p.sequence_parallel and style == "transformers":
        raise SpecError(
            f"parallelism.sequence_parallel: is not supported with profile {profile}; use megatron-core or torchtitan",
            "parallelism.sequence_parallel",
        )
    if p.dp > 1 and p.strategy != "fsdp2" and not own:
        raise SpecError(
            f"parallelism.strategy: {p.strategy} cannot be combined with tensor parallelism; use fsdp2",
            "parallelism.strategy",
        )
    if style not in ("megatron", "litgpt") and method.quantization is not None:
        if method.kind == "full":  # nothing trains
            field = "method.quantization.format"
            raise _not_yet(field, method.quantization.format, "weights in 16 or 32 bits with tensor parallelism")
        raise SpecError(
            f"method.kind: transformers 5.24 cannot run {method.kind} with tensor parallelism: it turns bitsandbytes' "
            "weights into DTensors, and their layers fail in the first pass; use full, freeze or lora",
            "method.kind",
        )
    if method.kind not in ("full", "freeze", "lora"):
        raise _not_yet("method.kind", method.kind, "full, freeze, lora with tensor parallelism")
    if method.modules_to_save:
        raise _not_yet("method.modules_to_save", ", ".join(method.modules_to_save), "none with tensor parallelism")
    if optimizer.name not in ELEMENTWISE:
        raise _not_yet("optimizer.name", optimizer.name, f"{', '.join(ELEMENTWISE)} with tensor parallelism")
    if optimizer.in_backward:
        raise _not_yet("optimizer.in_backward", True, "false with tensor parallelism")
    if kernels.loss == "fused" and style != "megatron":
        raise SpecError(
            f"kernels.loss: Liger's fused loss cannot read the head's matrix, which tp {p.tp} shards as a DTensor; use "
            "hf",
            "kernels.loss",
        )
    if kernels.loss != "hf":
        raise _not_yet("kernels.loss", kernels.loss, "hf with tensor parallelism")
    if kernels.fused:
        raise _not_yet("kernels.fused", ", ".join(kernels.fused), "none with tensor parallelism")


def refuse_for_context_parallel(
    p: Parallelism, kernels: Kernels, loop: Loop, profile: str, style: str, own: bool = False
) -> None:
    """Raise SpecError for what context parallelism, or memplan so far, does not support.

    style  the profile's tensor parallelism, which identifies its library
    own    whether the model has that library's own layers
    """
    field = "parallelism.cp"
    if own and p.context != "ring":
        raise _not_yet("parallelism.context", p.context, "ring with megatron_gpt")
    if own:
        if kernels.attention == "eager" or kernels.checkpointing == "selective":
            raise SpecError(
                f"{field}: {p.cp} needs fused attention (kernels.attention sdpa or flash_attention_2), and does not "
                "work with kernels.checkpointing selective",
                field,
            )
        return
    if style != "transformers":
        raise _not_yet(field, p.cp, f"1 with profile {profile}; more with profile transformers-5")
    if p.tp > 1:
        raise SpecError(
            f"{field}: accelerate 1.15 cannot combine cp {p.cp} with tp {p.tp} under transformers 5.24: for FSDP2 it "
            "imports ReplicateParallel, which transformers has removed",
            field,
        )
    if p.context == "ulysses" and p.strategy not in ZERO:
        raise SpecError(
            f"parallelism.strategy: Ulysses needs DeepSpeed ({', '.join(ZERO)}), not {p.strategy}",
            "parallelism.strategy",
        )
    if p.context == "ring" and p.strategy != "fsdp2":
        raise SpecError(
            "parallelism.strategy: accelerate's context parallelism needs FSDP2; use fsdp2",
            "parallelism.strategy",
        )
    if kernels.loss != "hf":
        raise _not_yet("kernels.loss", kernels.loss, "hf with context parallelism")
    if loop.padded:
        raise SpecError("loop.padded: accelerate's context parallelism does not support attention masks", "loop.padded")


def _method(m: Method, storages: tuple[str, ...], runs: tuple[str, ...]) -> Iterator[SpecError]:
    if m.kind not in ADAPTERS:
        for field in ("rank", "alpha", "targets", "dropout", "modules_to_save", "adapter_dtype", "options"):
            if getattr(m, field) != getattr(_PLAIN, field):
                yield no_adapters(m.kind, f"method.{field}")
    if m.kind != "freeze" and m.trainable_layers != _PLAIN.trainable_layers:
        yield only_freeze(m.kind)
    for name, value in m.options.items():
        field = f"method.options.{name}"
        if name == "use_dora":
            yield SpecError(f"{field}: use method.kind dora or qdora", field)
        elif name != "use_rslora" or not isinstance(value, bool):
            yield _not_yet(field, value, "use_rslora true or false, which changes no memory")
    if m.quantization is not None:
        yield from _quantization(m.quantization, storages, runs)


def no_adapters(kind: str, field: str) -> SpecError:
    """Return the error that `field` needs adapters, and the method has none."""
    return SpecError(f"{field}: method.kind {kind} has no adapters; {', '.join(ADAPTERS)} have", field)


def only_freeze(kind: str) -> SpecError:
    """Return the error that trainable_layers needs method freeze."""
    field = "method.trainable_layers"
    return SpecError(f"{field}: only applies to method.kind freeze, not {kind}", field)


_GROUPED_FORMATS = ("gptq-int4", "gptq-int8", "awq-int4")
_WHOLE_FORMATS = (*_GROUPED_FORMATS, "fp8", "int8")


def _quantization(q: Quantization, storages: tuple[str, ...], runs: tuple[str, ...]) -> Iterator[SpecError]:
    field = "method.quantization"
    trained = cast(tuple[str, ...], get_args(TrainedOver))
    if q.format in runs and q.format not in trained:
        return
    if q.format not in trained:
        elsewhere = "others, such as w4a16, for inference; GGUF types with serving engines"
        yield _not_yet(f"{field}.format", q.format, f"{', '.join((*trained, *runs))}; {elsewhere}")
    if q.block_size < (16 if q.format in _GROUPED_FORMATS else 32) and not (
        q.block_size == WHOLE and q.format in _WHOLE_FORMATS
    ):
        size = "one scale per column" if q.block_size == WHOLE else f"blocks of {q.block_size}"
        yield SpecError(f"{field}.block_size: {q.format} has no {size}", f"{field}.block_size")
    if q.format == "fp8" and q.block_size not in (WHOLE, FP8_BLOCK):
        yield _not_yet(f"{field}.block_size", q.block_size, f"{FP8_BLOCK}, or {WHOLE} for one scale per matrix")
    if q.storage not in storages:
        choices = (
            f"{', '.join(storages)}: FSDP cannot shard integers" if "uint8" not in storages else ", ".join(storages)
        )
        if storages == ("uint8",):
            choices += f"; {', '.join(_FLOATS)} with FSDP"
        yield _not_yet(f"{field}.storage", q.storage, choices)
    if q.format == "int8" and q.block_size != Quantization().block_size:
        yield SpecError(f"{field}.block_size: int8 has no blocks; nf4 and fp4 have", f"{field}.block_size")


def _precision(p: Precision, quantization: Quantization | None) -> Iterator[SpecError]:
    if p.compute in ("fp8", "float8"):
        yield _not_yet("precision.compute", p.compute, "bf16, fp16, fp32")
    elif p.autocast and p.compute == "fp32":
        yield SpecError("precision.compute: autocast computes in bf16 or fp16, not fp32", "precision.compute")
    elif not p.autocast and quantization is None and p.compute not in (None, p.weights):
        yield SpecError(
            f"precision.compute: without autocast layers compute in the weights' dtype, {p.weights}, not {p.compute}",
            "precision.compute",
        )
    if p.master is not None and (p.master != "fp32" or p.weights == "fp32"):
        yield SpecError(
            f"precision.master: master weights are fp32 copies of bf16 or fp16 weights, not {p.master} of {p.weights}",
            "precision.master",
        )


def _optimizer(o: Optimizer) -> Iterator[SpecError]:
    row = OPTIMIZERS.get(str(o.name))
    if row is None:
        return  # the catalogue refuses unknown names and suggests the nearest
    states = [rule for rule in (*row.states, *row.projector) if o.momentum or not rule.momentum]
    if o.momentum and not any(rule.momentum for rule in states):
        names = ", ".join(name for name, other in OPTIMIZERS.items() if any(rule.momentum for rule in other.states))
        yield SpecError(f"optimizer.momentum: {o.name} has no momentum; use {names}", "optimizer.momentum")
    if o.state_dtype is not None and not any(rule.dtype == "moment" for rule in states):
        yield SpecError(
            f"optimizer.state_dtype: {o.name} has no states whose dtype can be set", "optimizer.state_dtype"
        )
