"""What a run must not say: what is not supported yet, and what could change nothing beside what else it says.

No field is ever ignored: one that could not do what it says is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast, get_args

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.optimizers.optimizers import ON_HOST, OPTIMIZERS
from memplan.catalogue.parallelism.sharding import ELEMENTWISE, MEGATRON, OF_FLAT_PARTS, OF_SLICES, STAGES, STRATEGIES
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
    """Raise SpecError for what the run as a whole must not say."""
    if run.task != "generate":
        if run.batch.new_tokens:
            raise SpecError("batch.new_tokens: only task generate makes new tokens", "batch.new_tokens")
        if run.generation != Generation():
            raise SpecError("generation: is of task generate", "generation")
    if run.task != "train" and run.also != Also():
        raise SpecError(f"also: is of training, and with task {run.task} nothing trains", "also")
    if run.serving.cache_dtype is not None:
        raise SpecError(
            f"serving.cache_dtype: {run.profile} keeps keys and values in the model's dtype, unless its cache is "
            "quantized: say generation.cache_implementation quantized, and cache_config.backend quanto, hqq or fp8; "
            "engines that serve have a cache_dtype (vllm, sglang, tgi, llama.cpp: memplan profiles)",
            "serving.cache_dtype",
        )
    if run.serving != Serving():
        raise SpecError(f"serving: is of the engines that memplan profiles lists, not {run.profile}", "serving")
    if run.parallelism != _ONE_GPU:
        for refused in (*_parallelism(run.parallelism), *_offloaded(run)):
            raise refused
    if run.parallelism.device_map is not None and run.task == "train":
        raise SpecError(
            "parallelism.device_map: is of task forward and generate; --pp with transformers' profiles trains so",
            "parallelism.device_map",
        )


def refuse_also(run: RunSpec, graph: Graph) -> None:
    """Raise SpecError for what a run must not say of what it does beside its steps."""
    also, degrees = run.also, graph.degrees
    divided = next((name for name in ("pp", "cp", "ep") if getattr(run.parallelism, name) > 1), None)
    if divided is not None:
        raise _later(
            "also", f"beside {divided} {getattr(run.parallelism, divided)}", "ranks that divide weights or data"
        )
    tp = run.parallelism.tp
    for part in ("saving", "merging"):
        if tp > 1 and getattr(also, part) is not None:
            raise _later(f"also.{part}", f"beside tp {tp}", "evaluation alone")
    if tp > 1 and also.evaluation is not None and also.evaluation.kept_batches:
        raise _later("also.evaluation.kept_batches", f"{also.evaluation.kept_batches} beside tp {tp}", "0")
    if graph.code != "transformers" or degrees.style != "transformers" or graph.model.model_type == "megatron_gpt":
        raise SpecError(f"also: what {run.profile} does beside its steps is not supported yet", "also")
    if also.evaluation is not None:
        for refused in _evaluation(run, also.evaluation):
            raise refused
    if also.merging is not None:
        if run.method.kind not in ADAPTERS:
            raise SpecError(f"also.merging: method {run.method.kind} has no adapters to merge", "also.merging")
        if also.merging.model == "trained" and also.merging.dtype is not None:
            raise SpecError(
                "also.merging.dtype: the model that was trained has one already; it is of a reloaded one",
                "also.merging.dtype",
            )
        if also.merging.model == "trained" and run.parallelism.world > 1:
            raise _later("also.merging.model", f"trained on {run.parallelism.world} GPUs", "reloaded on one")


KEPT_BATCHES = 32_768  # whose logits are on the GPU at once: each is an allocation of its own to replay
_WHOLE_WEIGHTS = ("ddp", "zero1", "zero2")  # strategies whose ranks have all weights, and generate each by itself


def _evaluation(run: RunSpec, e: Evaluation) -> Iterator[SpecError]:
    loss = run.kernels.loss or "hf"
    if e.kept_batches and loss not in ("hf", "fused"):
        yield SpecError(
            f"also.evaluation.kept_batches: loss {loss} never has all logits at once; hf and fused have, in evaluation",
            "also.evaluation.kept_batches",
        )
    for field in ("accumulation", "preprocess", "batch_metrics", "concatenates"):
        if not e.kept_batches and getattr(e, field) != getattr(Evaluation(), field):
            name = f"also.evaluation.{field}"
            yield SpecError(f"{name}: no logits are kept; say also.evaluation.kept_batches too", name)
    if e.batch_metrics and (e.accumulation is not None or not e.concatenates):
        name = f"also.evaluation.{'accumulation' if e.accumulation is not None else 'concatenates'}"
        yield SpecError(f"{name}: with batch_metrics nothing is kept of a batch", name)
    kept = 0 if e.batch_metrics else min(e.kept_batches, e.accumulation or e.kept_batches)
    if kept > KEPT_BATCHES:
        name = f"also.evaluation.{'kept_batches' if e.accumulation is None else 'accumulation'}"
        yield SpecError(
            f"{name}: keeps the logits of {kept:,} batches on the GPU at once, and at most {KEPT_BATCHES:,} are "
            "counted; say a smaller also.evaluation.accumulation (--eval-accumulation-steps)",
            name,
        )
    if e.new_tokens and e.kept_batches:
        name = "also.evaluation.kept_batches"
        yield SpecError(f"{name}: with new_tokens it is tokens that are kept, and no logits; leave it out", name)
    p = run.parallelism
    if e.new_tokens and replicas(p) > 1 and p.strategy not in _WHOLE_WEIGHTS:
        yield _later(
            "also.evaluation.new_tokens",
            e.new_tokens,
            f"0 with {p.strategy}, whose ranks gather weights; ddp, zero1 and zero2 have them, and tp alone",
        )


def refuse_untrained(run: RunSpec, what: str) -> None:
    """Raise SpecError for `what` is only of training, where nothing trains."""
    if run.task != "train":
        raise SpecError(f"task: {what} of task {run.task} is not supported yet; supported: train", "task")


def refuse_of_inference(run: RunSpec) -> None:
    """Raise SpecError for what is said of training where nothing trains, or is not supported yet."""
    task, method, loop = run.task, run.method, run.loop
    for refused in _of_running(run.parallelism, task):
        raise refused
    if run.generation.assisted and run.parallelism != _ONE_GPU:
        field = "parallelism.tp" if run.parallelism.tp > 1 else "parallelism.device_map"
        raise SpecError(f"{field}: is not supported yet beside an assistant; supported: one GPU", field)
    if method.kind == "freeze" or method.frozen or method.modules_to_save:
        field = "kind" if method.kind == "freeze" else "frozen" if method.frozen else "modules_to_save"
        raise SpecError(f"method.{field}: says what trains, and with task {task} nothing does", f"method.{field}")
    for field in ("grads", "master"):
        if getattr(run.precision, field) is not None:
            raise SpecError(
                f"precision.{field}: is of training, and with task {task} nothing trains", f"precision.{field}"
            )
    if run.batch.accumulation > 1:
        raise SpecError(
            f"batch.accumulation: is of training, and with task {task} nothing trains", "batch.accumulation"
        )
    if run.kernels.checkpointing not in (None, "none") or run.kernels.reentrant:
        raise SpecError(f"kernels.checkpointing: task {task} has no backward pass", "kernels.checkpointing")
    if run.kernels.loss is not None:
        raise SpecError(f"kernels.loss: task {task} has no loss", "kernels.loss")
    if run.kernels.fused:
        raise _later("kernels.fused", ", ".join(run.kernels.fused), f"none with task {task}")
    if run.kernels.compile:
        raise _later("kernels.compile", True, "false")
    if task == "generate" and loop.use_cache is False:
        raise _later("loop.use_cache", False, "true with task generate")
    for field in ("hold_outputs", "grad_scaler", "trainer"):
        if getattr(loop, field):
            raise SpecError(f"loop.{field}: is of training, and with task {task} nothing trains", f"loop.{field}")


def _of_running(p: Parallelism, task: str) -> Iterator[SpecError]:
    """Several GPUs, where they divide something else than matrices or layers."""
    for field in ("dp", "cp", "ep"):
        if getattr(p, field) > 1:
            yield _later(
                f"parallelism.{field}", getattr(p, field), f"tp (--tp) or a device_map (--device-map) with task {task}"
            )
    if p.tp > 1 and p.device_map is not None:
        yield SpecError(
            f"parallelism.device_map: {p.device_map} is one process, and tp {p.tp} is of several; say one of them",
            "parallelism.device_map",
        )
    if p.tp > 1 and p.pp > 1:
        yield SpecError(
            f"parallelism.pp: a device_map is one process on pp {p.pp} GPUs, and tp {p.tp} is of several; say one of "
            "them",
            "parallelism.pp",
        )
    if p.schedule not in (None, "device_map"):
        yield SpecError(
            f"parallelism.schedule: {p.schedule} is of training; with task {task} layers are placed by a device_map",
            "parallelism.schedule",
        )
    for field in ("virtual_stages", "first_stage_layers", "last_stage_layers", "ends_as_layers", "strategy", "offload"):
        if getattr(p, field) != getattr(_ONE_GPU, field):
            yield SpecError(
                f"parallelism.{field}: is of training, and with task {task} nothing trains", f"parallelism.{field}"
            )


def refuse_parts(
    method: Method,
    precision: Precision,
    optimizer: Optimizer,
    kernels: Kernels,
    storages: tuple[str, ...] = ("uint8",),
    selects: bool = False,
    runs: tuple[str, ...] = (),
) -> None:
    """Raise SpecError for what the parts of a run must not say, each as it was asked. `storages`: what 4-bit weights
    may be stored in; `selects`: the model's code can recompute attention alone; `runs`: formats that it runs in."""
    if kernels.checkpointing == "selective" and not selects:
        raise _later("kernels.checkpointing", kernels.checkpointing, "none, full, offload")
    if kernels.compile:
        raise _later("kernels.compile", True, "false")
    for refused in (
        *_method(method, storages, runs),
        *_precision(precision, method.quantization),
        *_optimizer(optimizer),
    ):
        raise refused


def refuse_of_megatron(profile: str, method: Method, precision: Precision, kernels: Kernels, loop: Loop) -> None:
    """Raise SpecError for what a model of Megatron-core's own layers is not run with."""
    if profile != "megatron-core":
        raise SpecError(
            f"profile: megatron_gpt is of Megatron-core's layers; say megatron-core, not {profile}", "profile"
        )
    if method.kind != "full":
        raise _later("method.kind", method.kind, "full with megatron_gpt")
    if precision.autocast:
        raise SpecError("precision.autocast: Megatron-core casts the model itself, not by autocast", "precision")
    if kernels.loss != "hf":
        raise _later("kernels.loss", kernels.loss, "hf with megatron_gpt, which is Megatron-core's own")
    if kernels.fused:
        raise _later(
            "kernels.fused", ", ".join(kernels.fused), "none with megatron_gpt, whose kernels are fused anyway"
        )
    if kernels.checkpointing == "offload":
        raise _later("kernels.checkpointing", kernels.checkpointing, "none, full, selective with megatron_gpt")
    if loop.padded:
        raise _later("loop.padded", True, "false with megatron_gpt")


def refuse_parts_of_experts(p: Parallelism, experts: int, width: int) -> None:
    """Raise SpecError for what ranks that divide `experts`, each so wide, cannot do as Megatron-core has them.
    `experts` is 0 of models that have none."""
    for field in ("ep", "etp"):
        if not experts and getattr(p, field) not in (1, _ONE_GPU.etp):
            value = getattr(p, field)
            raise SpecError(
                f"parallelism.{field}: {value} ranks divide experts, and the model has none", f"parallelism.{field}"
            )
    if not experts:
        return
    if p.expert_imbalance != 1:
        raise _later(
            "parallelism.expert_imbalance", p.expert_imbalance, "1 with megatron_gpt; moe_capacity_factor says it"
        )
    etp = p.tp if p.etp is None else p.etp
    if experts % p.ep:
        raise SpecError(f"parallelism.ep: {p.ep} does not divide {experts} experts", "parallelism.ep")
    if width % etp:
        raise SpecError(f"parallelism.etp: {etp} does not divide {width} of an expert's width", "parallelism.etp")
    ranks = p.dp * p.tp * p.cp
    if ranks % (p.ep * etp):
        raise SpecError(
            f"parallelism.ep: ep {p.ep} x etp {etp} does not divide dp {p.dp} x tp {p.tp} x cp {p.cp} = {ranks}",
            "parallelism.ep",
        )
    if p.tp > 1 and not p.sequence_parallel:
        raise SpecError(
            "parallelism.sequence_parallel: Megatron-core trains mixtures of experts on tensor-parallel ranks only "
            "with it; say true",
            "parallelism.sequence_parallel",
        )


def refuse_parts_of_whole_experts(
    p: Parallelism, method: Method, precision: Precision, loop: Loop, profile: str, style: str, accumulates: bool
) -> None:
    """Raise SpecError for what ranks that each have some of the experts whole cannot do as transformers has them, or
    memplan not yet."""
    if p.etp not in (1, _ONE_GPU.etp):
        raise _later("parallelism.etp", p.etp, "1, but of megatron_gpt configs with experts")
    field = "parallelism.ep"
    if p.ep == 1:
        if p.expert_imbalance != 1:
            field = "parallelism.expert_imbalance"
            raise SpecError(f"{field}: {p.expert_imbalance:g} is of ranks that divide experts, and ep is 1", field)
        return
    if style != "transformers":
        raise _later(
            field, p.ep, f"1 with profile {profile}; profile transformers-5 has more, and megatron_gpt configs"
        )
    wrong = [f"a multiple of tp {p.tp}"] * bool(p.ep % p.tp)
    wrong += [f"a divisor of dp {p.dp} x tp {p.tp} = {p.dp * p.tp}"] * bool(p.dp * p.tp % p.ep)
    if wrong:
        raise SpecError(
            f"{field}: {p.ep} is not {', nor '.join(wrong)}, as transformers has ranks divide experts", field
        )
    for other in ("cp", "pp"):
        if getattr(p, other) > 1:
            raise _later(f"parallelism.{other}", getattr(p, other), "1 with expert parallelism of transformers' models")
    if p.dp == 1:
        return
    if p.tp > 1 or p.ep < p.dp:
        field = "parallelism.tp" if p.tp > 1 else field
        value, other = (p.tp, f"1 with ep {p.ep} and dp {p.dp}") if p.tp > 1 else (p.ep, f"1 or {p.dp}, as many as dp")
        raise _later(field, value, other)
    if p.strategy != "fsdp2":
        raise SpecError(
            f"parallelism.strategy: {p.strategy} does not divide what expert parallelism has divided; fsdp2 does",
            "parallelism.strategy",
        )
    for name in ("shard_group", "reshard_after_forward"):
        if getattr(p, name) != getattr(_ONE_GPU, name):
            raise _later(f"parallelism.{name}", getattr(p, name), f"{getattr(_ONE_GPU, name)} with expert parallelism")
    if p.offload.parameters:
        raise _later("parallelism.offload", "parameters", "none with expert parallelism and fsdp2")
    if method.kind != "full":
        raise _later("method.kind", method.kind, "full with expert parallelism and fsdp2")
    if precision.autocast:
        raise _later("precision.autocast", True, "false with expert parallelism and fsdp2")
    if loop.trainer and accumulates:
        raise _later("batch.accumulation", "more", "1 with expert parallelism, fsdp2 and loop.trainer")


def refuse_on_host(optimizer: str) -> None:
    """Raise SpecError for an optimizer whose update the host does not compute."""
    if optimizer in OPTIMIZERS and optimizer not in ON_HOST:
        raise SpecError(
            f"parallelism.offload: optimizer.name {optimizer} does not step on the host; {', '.join(ON_HOST)} do",
            "parallelism.offload",
        )


def refuse_on_deepspeeds_host(p: Parallelism, optimizer: str, trainer: bool) -> None:
    """Raise SpecError for what DeepSpeed does not offload, or not configure."""
    if p.offload.optimizer and optimizer not in _CPU_OPTIMIZERS:
        raise SpecError(
            f"parallelism.offload: optimizer.name {optimizer} has no step of DeepSpeed's on the host; "
            f"{', '.join(_CPU_OPTIMIZERS)} have",
            "parallelism.offload",
        )
    for name, value in p.zero:
        if value == "auto" and not trainer:
            field = f"parallelism.zero.{name}"
            raise SpecError(f"{field}: auto is transformers' Trainer's to fill in (loop.trainer)", field)


_CPU_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adagrad")  # DeepSpeedCPUAdam, DeepSpeedCPUAdagrad


def _later(field: str, value: object, supported: str) -> SpecError:
    shown = "true" if value is True else repr(value)
    return SpecError(f"{field}: {shown} is not supported yet; supported: {supported}", field)


def _parallelism(p: Parallelism) -> Iterator[SpecError]:
    """Several GPUs, named by what divides the work among them where something else than data does."""
    yield from _pipeline(p)
    wrong = check_product(p)
    if wrong is not None:
        yield wrong
    if p.sequence_parallel and p.tp == 1:
        yield SpecError(
            "parallelism.sequence_parallel: divides tokens among the ranks that divide matrices; say tp too",
            "parallelism.sequence_parallel",
        )
    if p.context != _ONE_GPU.context and p.cp == 1:
        yield SpecError(
            f"parallelism.context: {p.context} is of ranks that divide sequences, and cp is 1", "parallelism.context"
        )
    if replicas(p) > 1 and p.strategy == "none":
        yield SpecError(
            f"parallelism.strategy: says how {replicas(p)} GPUs divide the run: {', '.join(STRATEGIES)}",
            "parallelism.strategy",
        )
    yield from _knobs(p)
    offloads = (*FSDP, "zero3")
    if p.offload.parameters and not (p.strategy in offloads and p.world > 1):
        those = ", ".join(offloads)
        yield _later("parallelism.offload", "parameters", f"optimizer; parameters too with several GPUs under {those}")
    if p.offload.optimizer and p.world > 1 and p.strategy in FSDP and not p.offload.parameters:
        yield SpecError(
            "parallelism.offload: FSDP keeps parameters, gradients and states on the host together; say parameters",
            "parallelism.offload",
        )
    elif p.offload.optimizer and p.world > 1 and p.strategy not in (*FSDP, *ZERO):
        yield _later("parallelism.offload", "optimizer", f"none with {p.world} GPUs but under {', '.join(ZERO)}")
    yield from _zero(p)
    if p.gpus_per_node is not None and p.world == 1:
        yield SpecError("parallelism.gpus_per_node: one GPU shares its host's memory with none", _PER_NODE)
    elif p.gpus_per_node is not None and p.world > p.gpus_per_node and p.world % p.gpus_per_node:
        yield SpecError(f"{_PER_NODE}: {p.world} GPUs are not nodes of {p.gpus_per_node}", _PER_NODE)


_PER_NODE = "parallelism.gpus_per_node"


def _offloaded(run: RunSpec) -> Iterator[SpecError]:
    """What FSDP does not do with its parts on the host, or memplan not yet.

    Source: torch 2.13 distributed/fsdp/fully_sharded_data_parallel.py, of gradients accumulated outside of no_sync().
    """
    p = run.parallelism
    if not p.offload.parameters or p.strategy not in FSDP:
        return
    if p.strategy == "fsdp" and run.batch.accumulation > 1 and not run.loop.trainer:
        yield SpecError(
            "batch.accumulation: with its parts on the host FSDP1 writes each micro-batch's gradients over those "
            "before; under transformers' Trainer (loop.trainer) they are reduced once, and fsdp2 adds them up",
            "batch.accumulation",
        )
    if run.loop.grad_scaler:
        yield _later("loop.grad_scaler", True, f"false with parameters offloaded under {p.strategy}")
    if p.tp > 1:
        yield _later("parallelism.offload", "parameters", "none with tensor parallelism")


def refuse_saved_on_host(
    p: Parallelism, method: Method, kernels: Kernels, model: ModelSpec, profile: str, saves: str, images: bool
) -> None:
    """Raise SpecError for runs whose saved tensors memplan does not put on the host yet; `saves` says what does it."""
    field = "parallelism.offload"
    if not saves:
        raise _later(field, "activations", f"optimizer, and kernels.checkpointing offload, with profile {profile}")
    if any(layer.mixer in ("mamba", "linear_attention") for layer in model.layers):
        raise _later(field, "activations", f"none with layers without attention, as {model.model_type} has")
    for name in ("tp", "cp", "ep", "pp"):
        if getattr(p, name) > 1:
            raise _later(f"parallelism.{name}", getattr(p, name), "1 with activations offloaded")
    if p.world > 1 and p.strategy not in ("ddp", "fsdp2"):
        raise _later("parallelism.strategy", p.strategy, "ddp, fsdp2 with activations offloaded")
    if method.quantization is not None and method.quantization.format not in ("nf4", "fp4"):
        raise _later("method.quantization.format", method.quantization.format, "nf4, fp4 with activations offloaded")
    if images:
        raise _later("batch.images", "images", "none with activations offloaded")
    if kernels.fused:
        raise _later("kernels.fused", ", ".join(kernels.fused), "none with activations offloaded")
    if kernels.loss == "chunked_lm_head":
        raise _later("kernels.loss", kernels.loss, "hf, chunked, fused with activations offloaded")


def _zero(p: Parallelism) -> Iterator[SpecError]:
    """How DeepSpeed is configured, where it is not there, or does not take it."""
    if p.zero != _ONE_GPU.zero and p.strategy not in ZERO:
        yield SpecError(
            f"parallelism.zero: configures DeepSpeed, whose strategies are {', '.join(ZERO)}, not {p.strategy}",
            "parallelism.zero",
        )
    for part, moved in (("offload_optimizer", p.offload.optimizer), ("offload_param", p.offload.parameters)):
        field = f"parallelism.zero.{part}"
        if getattr(p.zero, part) != getattr(_ONE_GPU.zero, part) and not moved:
            yield SpecError(f"{field}: parallelism.offload moves none of it to the host", field)
        elif moved and getattr(p.zero, part).device == "nvme" and p.strategy != "zero3":
            yield SpecError(f"{field}.device: nvme is for zero3, not {p.strategy}", f"{field}.device")
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
            yield SpecError(f"{field}: is for zero3, not {p.strategy}", field)
    if p.zero.round_robin_gradients and p.strategy == "zero3":
        field = "parallelism.zero.round_robin_gradients"
        yield SpecError(f"{field}: is for zero1 and zero2, not zero3", field)


def _pipeline(p: Parallelism) -> Iterator[SpecError]:
    """What is said of a pipeline that is none, or has not so many stages."""
    for field in ("virtual_stages", "schedule", "first_stage_layers", "last_stage_layers", "ends_as_layers"):
        if p.pp == 1 and getattr(p, field) != getattr(_ONE_GPU, field):
            value = getattr(p, field)
            yield SpecError(f"parallelism.{field}: {value} is of a pipeline, and pp is 1", f"parallelism.{field}")
    most = p.pp if p.device_map is None else p.world
    if p.stage is not None and p.stage >= most:
        stages = "0 is the only one" if most == 1 else f"they are 0 to {most - 1}"
        what = f"pp {most}" if p.device_map is None else f"{p.device_map} on {most} GPUs"
        yield SpecError(f"parallelism.stage: {what} has no stage {p.stage}; {stages}", "parallelism.stage")
    if p.pp > 1 and p.strategy in ("zero2", "zero3"):
        yield SpecError(
            f"parallelism.strategy: DeepSpeed runs pp {p.pp} stages under ZeRO 1 alone, and refuses {p.strategy}; say "
            "zero1",
            "parallelism.strategy",
        )
    if p.pp > 1 and p.strategy == "fsdp":
        yield SpecError(
            f"parallelism.strategy: torch.distributed.pipelining has the gradients of pp {p.pp} stages reduced under "
            "fsdp2 and ddp, not fsdp; say fsdp2",
            "parallelism.strategy",
        )
    if p.pp > 1 and p.strategy == "fsdp2" and p.reshard_after_forward:
        yield _later("parallelism.reshard_after_forward", True, f"false with pp {p.pp}, as torchtitan has it")
    for part in ("optimizer", "parameters"):
        if p.pp > 1 and getattr(p.offload, part):
            yield _later("parallelism.offload", part, f"none with pp {p.pp}")


def refuse_staged(p: Parallelism, method: Method, loop: Loop, objective: str, images: bool) -> None:
    """Raise SpecError for what a pipeline's stages cannot do, or memplan not yet."""
    if objective != "causal_lm":
        raise _later("parallelism.pp", p.pp, f"1 for {objective}")
    if images:
        raise _later("batch.images", "images", f"none with pp {p.pp}")
    if method.kind == "freeze" or method.frozen:
        raise SpecError(
            f"method.kind: {method.kind} with frozen parts is not supported yet with pp {p.pp}", "method.kind"
        )
    if loop.hold_outputs:
        raise _later("loop.hold_outputs", loop.hold_outputs, f"false with pp {p.pp}")


def _knobs(p: Parallelism) -> Iterator[SpecError]:
    """What only one strategy has, said of another."""
    for field, strategies in _KNOBS.items():
        if getattr(p, field) != getattr(_ONE_GPU, field) and p.strategy not in strategies:
            have = " and ".join(strategies)
            yield SpecError(f"parallelism.{field}: is for strategy {have}, not {p.strategy}", f"parallelism.{field}")
    group = p.shard_group
    if group is not None and replicas(p) % group:
        yield SpecError(
            f"parallelism.shard_group: {replicas(p)} GPUs are not groups of {group}", "parallelism.shard_group"
        )
    if (
        group == 1
        and replicas(p) > 1
        and (p.strategy == "fsdp2" or p.offload.parameters or p.reshard_after_forward is False)
    ):
        yield SpecError(
            "parallelism.shard_group: a group of one divides nothing, which FSDP1 alone knows (NO_SHARD), without "
            "parts on the host or that stay whole; say strategy ddp",
            "parallelism.shard_group",
        )


_KNOBS = {
    "shard_group": ("fsdp", "fsdp2"),
    "reshard_after_forward": ("fsdp", "fsdp2"),
    "cpu_ram_efficient_loading": ("fsdp", "fsdp2"),
    "forward_prefetch": ("fsdp",),
    "backward_prefetch": ("fsdp",),
    "bucket_view": ("ddp",),
    "static_graph": ("ddp",),
}


# What FSDP and DeepSpeed divide rightly.
FSDP = tuple(name for name, row in STRATEGIES.items() if row.gathers)
ZERO = tuple(STAGES)
_METHODS = {
    "fsdp": ("full", "freeze", "lora", "qlora"),  # peft 0.21's DoRA asks for the shape of what FSDP1 has flat
    "fsdp2": ("full", "freeze", "lora", "qlora", "dora"),
    **dict.fromkeys(("zero1", "zero2"), ("full", "freeze", "lora", "qlora", "dora", "qdora")),
    "zero3": ("full", "freeze", "lora", "qlora"),  # DoRA's norms are of weights that another module gathers
    MEGATRON: ("full",),
}
_FLOATS = ("bf16", "fp16", "fp32")


def refuse_divided(p: Parallelism, method: Method, precision: Precision, optimizer: Optimizer, loop: Loop) -> None:
    """Raise SpecError for what several GPUs cannot do with the parts of a run, or memplan not yet."""
    row = OPTIMIZERS.get(str(optimizer.name))
    if optimizer.in_backward:
        raise _later("optimizer.in_backward", True, f"false with {p.strategy}")
    if row is not None and row.frees_gradients:
        raise SpecError(
            f"optimizer.name: {optimizer.name} steps in backward, which is not supported yet with {p.strategy}",
            "optimizer.name",
        )
    if p.strategy not in _METHODS:
        return
    if method.kind not in _METHODS[p.strategy]:
        raise _later("method.kind", method.kind, f"{', '.join(_METHODS[p.strategy])} with {p.strategy}")
    if method.modules_to_save:
        raise _later("method.modules_to_save", ", ".join(method.modules_to_save), f"none with {p.strategy}")
    takes = (*ELEMENTWISE, *OF_FLAT_PARTS) if p.strategy in ZERO else ELEMENTWISE
    if p.strategy == "fsdp" and not p.offload.parameters:
        takes = (*ELEMENTWISE, *OF_SLICES)
    if p.strategy == "fsdp2" and optimizer.name in OF_SLICES:
        raise SpecError(
            f"optimizer.name: bitsandbytes' {optimizer.name} does not step on DTensors, which fsdp2's parts are; "
            f"{', '.join(ELEMENTWISE)} do, or say strategy fsdp",
            "optimizer.name",
        )
    if row is not None and optimizer.name not in takes:
        raise _later("optimizer.name", optimizer.name, f"{', '.join(takes)} with {p.strategy}")
    if p.strategy == MEGATRON:
        if precision.autocast:
            raise SpecError(
                "precision.autocast: Megatron computes in the weights' dtype; say precision mixed", "precision.autocast"
            )
        if loop.grad_scaler:
            raise SpecError("loop.grad_scaler: Megatron scales the loss itself", "loop.grad_scaler")
        return
    if precision.grads not in (None, precision.weights):
        raise _later("precision.grads", precision.grads, f"{precision.weights}, as the weights, with {p.strategy}")
    if p.strategy in ZERO:
        if precision.autocast:
            raise SpecError(
                "precision.autocast: DeepSpeed casts the model itself, with fp32 masters; say precision mixed",
                "precision.autocast",
            )
        if method.quantization is not None and method.quantization.kbit_preparation:
            field = "method.quantization.kbit_preparation"
            raise SpecError(f"{field}: DeepSpeed casts back what it makes fp32; say false", field)
        if method.quantization is not None and p.offload.parameters:
            raise _later("parallelism.offload", "parameters", f"optimizer with {method.kind}")
        if loop.grad_scaler:
            raise SpecError("loop.grad_scaler: DeepSpeed scales the loss itself", "loop.grad_scaler")
    elif precision.master is not None:
        raise SpecError("precision.master: FSDP's mixed precision is autocast's; say precision amp", "precision.master")
    q = method.quantization
    if q is not None and q.format not in ("nf4", "fp4"):
        raise _later("method.quantization.format", q.format, f"nf4, fp4 with {p.strategy}")


def refuse_parts_of_matrices(
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
    """Raise SpecError for what ranks that divide matrices cannot do, or memplan not yet. `style`: the profile's;
    `own`: the model is of the library's own layers."""
    if style == "":
        raise SpecError(
            f"parallelism.tp: {p.tp} is not supported yet with profile {profile}; supported: transformers-5, "
            "megatron-core, torchtitan",
            "parallelism.tp",
        )
    if style == "litgpt" and trains:
        raise SpecError(f"parallelism.tp: profile {profile} has {p.tp} only in generation", "parallelism.tp")
    if style in ("megatron", "torchtitan", "litgpt") and method.kind != "full":
        raise _later("method.kind", method.kind, f"full with tensor parallelism and profile {profile}")
    if style == "megatron":
        if p.dp > 1 and not own:
            raise _later(
                "parallelism.dp", p.dp, f"1 with tensor parallelism and profile {profile}, but of megatron_gpt configs"
            )
        if precision.autocast:
            raise SpecError("precision.autocast: Megatron-core casts the model itself, not by autocast", "precision")
    elif p.sequence_parallel and style == "transformers":
        raise SpecError(
            f"parallelism.sequence_parallel: profile {profile} divides no tokens beside matrices; megatron-core and "
            "torchtitan do",
            "parallelism.sequence_parallel",
        )
    if p.dp > 1 and p.strategy != "fsdp2" and not own:
        raise SpecError(
            f"parallelism.strategy: {p.strategy} does not divide what tensor parallelism has divided; fsdp2 does",
            "parallelism.strategy",
        )
    if style not in ("megatron", "litgpt") and method.quantization is not None:
        if method.kind == "full":  # nothing trains
            field = "method.quantization.format"
            raise _later(field, method.quantization.format, "weights in 16 or 32 bits with tensor parallelism")
        raise SpecError(
            f"method.kind: transformers 5.24 does not run {method.kind} on tensor-parallel ranks: it makes DTensors of "
            "bitsandbytes' weights, whose layers then fail in the first pass; full, freeze and lora run",
            "method.kind",
        )
    if method.kind not in ("full", "freeze", "lora"):
        raise _later("method.kind", method.kind, "full, freeze, lora with tensor parallelism")
    if method.modules_to_save:
        raise _later("method.modules_to_save", ", ".join(method.modules_to_save), "none with tensor parallelism")
    if optimizer.name not in ELEMENTWISE:
        raise _later("optimizer.name", optimizer.name, f"{', '.join(ELEMENTWISE)} with tensor parallelism")
    if optimizer.in_backward:
        raise _later("optimizer.in_backward", True, "false with tensor parallelism")
    if kernels.loss == "fused" and style != "megatron":
        raise SpecError(
            "kernels.loss: fused kernels (Liger's) take the head's matrix, which is a part in a DTensor on each of "
            f"{p.tp} ranks, and do not run; say hf",
            "kernels.loss",
        )
    if kernels.loss != "hf":
        raise _later("kernels.loss", kernels.loss, "hf with tensor parallelism")
    if kernels.fused:
        raise _later("kernels.fused", ", ".join(kernels.fused), "none with tensor parallelism")


def refuse_parts_of_sequences(
    p: Parallelism, kernels: Kernels, loop: Loop, profile: str, style: str, own: bool = False
) -> None:
    """Raise SpecError for what ranks that divide sequences cannot do, or memplan not yet. `style`: of the profile's
    tensor parallelism, by which it is known which library it has; `own`: the model is of that library's own layers."""
    field = "parallelism.cp"
    if own and p.context != "ring":
        raise _later("parallelism.context", p.context, "ring with megatron_gpt")
    if own:
        if kernels.attention == "eager" or kernels.checkpointing == "selective":
            raise SpecError(
                f"{field}: {p.cp} ranks pass keys and values around only under fused attention (kernels.attention "
                "sdpa, flash_attention_2), which is not recomputed alone",
                field,
            )
        return
    if style != "transformers":
        raise _later(field, p.cp, f"1 with profile {profile}; profile transformers-5 has more")
    if p.tp > 1:
        raise SpecError(
            f"{field}: accelerate 1.15 does not run cp {p.cp} beside tp {p.tp} with transformers 5.24: under FSDP2 it "
            "imports ReplicateParallel, which transformers has no more",
            field,
        )
    if p.context == "ulysses" and p.strategy not in ZERO:
        raise SpecError(
            f"parallelism.strategy: Ulysses is DeepSpeed's, under {', '.join(ZERO)}, not {p.strategy}",
            "parallelism.strategy",
        )
    if p.context == "ring" and p.strategy != "fsdp2":
        raise SpecError(
            "parallelism.strategy: accelerate's context parallelism divides weights by FSDP2; say fsdp2",
            "parallelism.strategy",
        )
    if kernels.loss != "hf":
        raise _later("kernels.loss", kernels.loss, "hf with context parallelism")
    if loop.padded:
        raise SpecError("loop.padded: accelerate's context parallelism takes no masks", "loop.padded")


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
            yield SpecError(f"{field}: DoRA is a method of its own; write method.kind dora or qdora", field)
        elif name != "use_rslora" or not isinstance(value, bool):
            yield _later(field, value, "use_rslora true or false, which changes no memory")
    if m.quantization is not None:
        yield from _quantization(m.quantization, storages, runs)


def no_adapters(kind: str, field: str) -> SpecError:
    """`field` says something about adapters, and the method has none."""
    return SpecError(f"{field}: method.kind {kind} has no adapters; {', '.join(ADAPTERS)} have", field)


def only_freeze(kind: str) -> SpecError:
    """Layers were counted that train, and the method is another than freezing the others."""
    field = "method.trainable_layers"
    return SpecError(f"{field}: is for method.kind freeze, not {kind}", field)


_GROUPED = ("gptq-int4", "gptq-int8", "awq-int4")
_WHOLE = (*_GROUPED, "fp8", "int8")


def _quantization(q: Quantization, storages: tuple[str, ...], runs: tuple[str, ...]) -> Iterator[SpecError]:
    field = "method.quantization"
    trained = cast(tuple[str, ...], get_args(TrainedOver))
    if q.format in runs and q.format not in trained:
        return
    if q.format not in trained:
        there = "others where a model runs, as w4a16; GGUF types by engines that serve it"
        yield _later(f"{field}.format", q.format, f"{', '.join((*trained, *runs))}; {there}")
    if q.block_size < (16 if q.format in _GROUPED else 32) and not (q.block_size == WHOLE and q.format in _WHOLE):
        size = "one scale a column" if q.block_size == WHOLE else f"blocks of {q.block_size}"
        yield SpecError(f"{field}.block_size: {q.format} has no {size}", f"{field}.block_size")
    if q.format == "fp8" and q.block_size not in (WHOLE, FP8_BLOCK):
        yield _later(f"{field}.block_size", q.block_size, f"{FP8_BLOCK}, or {WHOLE} for one scale a matrix")
    if q.storage not in storages:
        those = f"{', '.join(storages)}: FSDP divides no integers" if "uint8" not in storages else ", ".join(storages)
        if storages == ("uint8",):
            those += f"; {', '.join(_FLOATS)} under FSDP"
        yield _later(f"{field}.storage", q.storage, those)
    if q.format == "int8" and q.block_size != Quantization().block_size:
        yield SpecError(f"{field}.block_size: int8 has no blocks; nf4 and fp4 have", f"{field}.block_size")


def _precision(p: Precision, quantization: Quantization | None) -> Iterator[SpecError]:
    if p.compute in ("fp8", "float8"):
        yield _later("precision.compute", p.compute, "bf16, fp16, fp32")
    elif p.autocast and p.compute == "fp32":
        yield SpecError("precision.compute: autocast computes in bf16 or fp16, not fp32", "precision.compute")
    elif not p.autocast and quantization is None and p.compute not in (None, p.weights):
        yield SpecError(
            f"precision.compute: without autocast layers compute in the dtype of their weights, {p.weights}, "
            f"not {p.compute}",
            "precision.compute",
        )
    if p.master is not None and (p.master != "fp32" or p.weights == "fp32"):
        yield SpecError(
            f"precision.master: masters are fp32 beside bf16 or fp16 weights, not {p.master} beside {p.weights}",
            "precision.master",
        )


def _optimizer(o: Optimizer) -> Iterator[SpecError]:
    row = OPTIMIZERS.get(str(o.name))
    if row is None:
        return  # an unknown name is refused by the catalogue, with the nearest
    states = [rule for rule in (*row.states, *row.projector) if o.momentum or not rule.momentum]
    if o.momentum and not any(rule.momentum for rule in states):
        have = ", ".join(name for name, other in OPTIMIZERS.items() if any(rule.momentum for rule in other.states))
        yield SpecError(f"optimizer.momentum: {o.name} has none to set; {have} have", "optimizer.momentum")
    if o.state_dtype is not None and not any(rule.dtype == "moment" for rule in states):
        yield SpecError(
            f"optimizer.state_dtype: {o.name} has no states whose dtype can be set", "optimizer.state_dtype"
        )
