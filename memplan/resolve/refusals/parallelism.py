"""Degrees, strategies and offloading that contradict each other, whatever the model."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.parallelism.sharding import STRATEGIES
from memplan.core.errors import SpecError, refused
from memplan.resolve.parallelism import FSDP, ZERO, check_product, is_wrapped, replicas
from memplan.resolve.refusals.refuse import not_yet
from memplan.spec.parallelism import Parallelism, Zero
from memplan.spec.run import RunSpec

ONE_GPU = Parallelism()


def parallelism(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for degrees, strategy and offloading that contradict each other."""
    yield from _pipeline(p)
    wrong = check_product(p)
    if wrong is not None:
        yield wrong
    if p.sequence_parallel and p.tp == 1:
        yield refused("parallelism.sequence_parallel", "needs tensor parallelism; set tp too")
    if p.context != ONE_GPU.context and p.cp == 1:
        yield refused("parallelism.context", f"{p.context} needs context parallelism, and cp is 1")
    if replicas(p) > 1 and p.strategy == "none":
        yield refused("parallelism.strategy", f"is needed with {replicas(p)} GPUs; choose {', '.join(STRATEGIES)}")
    yield from _strategy_settings(p)
    offloads = (*FSDP, "zero3")
    if p.offload.parameters and not (p.strategy in offloads and is_wrapped(p)):
        strategies = ", ".join(offloads)
        yield not_yet("parallelism.offload", "parameters", f"optimizer; parameters with {strategies}")
    if p.offload.optimizer and is_wrapped(p) and p.strategy in FSDP and not p.offload.parameters:
        yield refused(
            "parallelism.offload", "FSDP offloads parameters, gradients and states together; set parameters too"
        )
    elif p.offload.optimizer and (p.world > 1 or p.strategy == ZERO[0]) and p.strategy not in (*FSDP, *ZERO[1:]):
        shards = ", ".join(ZERO[1:])
        yield not_yet("parallelism.offload", "optimizer", f"none with {p.world} GPUs, except with {shards}")
    yield from _zero(p)
    if p.gpus_per_node is not None and p.world == 1:
        yield refused("parallelism.gpus_per_node", "only applies to several GPUs")
    elif p.gpus_per_node is not None and p.world > p.gpus_per_node and p.world % p.gpus_per_node:
        yield refused("parallelism.gpus_per_node", f"{p.world} GPUs do not divide into nodes of {p.gpus_per_node}")


def _pipeline(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for pipeline settings without a pipeline, and for what its stages reject."""
    for field in ("virtual_stages", "schedule", "first_stage_layers", "last_stage_layers", "ends_as_layers"):
        if p.pp == 1 and getattr(p, field) != getattr(ONE_GPU, field):
            value = getattr(p, field)
            yield refused(f"parallelism.{field}", f"{value} needs a pipeline, and pp is 1")
    count = p.pp if p.device_map is None else p.world
    if p.stage is not None and p.stage >= count:
        stages = "use 0" if count == 1 else f"choose 0 to {count - 1}"
        what = f"pp {count}" if p.device_map is None else f"{p.device_map} on {count} GPUs"
        yield refused("parallelism.stage", f"{what} has no stage {p.stage}; {stages}")
    if p.pp > 1 and p.strategy in ("zero0", "zero2", "zero3"):
        yield refused(
            "parallelism.strategy", f"DeepSpeed only supports ZeRO 1 with pp {p.pp}, not {p.strategy}; use zero1"
        )
    if p.pp > 1 and p.strategy == "fsdp":
        yield refused(
            "parallelism.strategy",
            f"torch.distributed.pipelining (pp {p.pp}) reduces gradients with fsdp2 and ddp, not fsdp; use fsdp2",
        )
    if p.pp > 1 and p.strategy == "fsdp2" and p.reshard_after_forward:
        yield not_yet("parallelism.reshard_after_forward", True, f"false with pp {p.pp}, like torchtitan")
    for part in ("optimizer", "parameters"):
        if p.pp > 1 and getattr(p.offload, part):
            yield not_yet("parallelism.offload", part, f"none with pp {p.pp}")


SETTINGS_OF_STRATEGIES = {
    "shard_group": ("fsdp", "fsdp2"),
    "reshard_after_forward": ("fsdp", "fsdp2"),
    "cpu_ram_efficient_loading": ("fsdp", "fsdp2"),
    "forward_prefetch": ("fsdp",),
    "backward_prefetch": ("fsdp",),
    "bucket_view": ("ddp",),
    "static_graph": ("ddp",),
    "find_unused_parameters": ("ddp",),
}


def _strategy_settings(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for settings of another strategy, and for shard groups that do not divide the GPUs."""
    for field, strategies in SETTINGS_OF_STRATEGIES.items():
        if getattr(p, field) != getattr(ONE_GPU, field) and p.strategy not in strategies:
            have = " and ".join(strategies)
            yield refused(f"parallelism.{field}", f"only applies to strategy {have}, not {p.strategy}")
    group = p.shard_group
    if group is not None and replicas(p) % group:
        yield refused("parallelism.shard_group", f"{replicas(p)} GPUs do not divide into groups of {group}")
    if (
        group == 1
        and replicas(p) > 1
        and (p.strategy == "fsdp2" or p.offload.parameters or p.reshard_after_forward is False)
    ):
        yield refused(
            "parallelism.shard_group",
            "a group of one shards nothing, which only FSDP1 supports (NO_SHARD), and only without offloading or "
            "reshard_after_forward false; use strategy ddp",
        )
    elif p.world == 1 and p.strategy == "fsdp" and p.offload.parameters:
        yield refused(
            "parallelism.offload",
            "FSDP1 on one GPU keeps the weights there; add --gpus if there are more, or use fsdp2 or zero3",
        )


def _zero(p: Parallelism) -> Iterator[SpecError]:
    """Yield errors for DeepSpeed settings without DeepSpeed, or that it rejects."""
    if p.zero != ONE_GPU.zero and p.strategy not in ZERO[1:]:
        strategies = ", ".join(ZERO[1:])
        yield refused("parallelism.zero", f"configures ZeRO, whose strategies are {strategies}, not {p.strategy}")
    for part, moved in (("offload_optimizer", p.offload.optimizer), ("offload_param", p.offload.parameters)):
        field = f"parallelism.zero.{part}"
        if getattr(p.zero, part) != getattr(ONE_GPU.zero, part) and not moved:
            yield refused(field, "has no effect without parallelism.offload")
        elif moved and getattr(p.zero, part).device == "nvme" and p.strategy != "zero3":
            yield refused(f"{field}.device", f"nvme needs zero3, not {p.strategy}")
    for name in [name for name in Zero.model_fields if name.startswith(("stage3_", "sub_group_", "zero3_"))]:
        field = f"parallelism.zero.{name}"
        if getattr(p.zero, name) != getattr(ONE_GPU.zero, name) and p.strategy in ZERO and p.strategy != "zero3":
            yield refused(field, f"only applies to zero3, not {p.strategy}")
    if p.zero.round_robin_gradients and p.strategy == "zero3":
        field = "parallelism.zero.round_robin_gradients"
        yield refused(field, "only applies to zero1 and zero2, not zero3")


def offloaded_parameters(run: RunSpec) -> Iterator[SpecError]:
    """Yield errors for what FSDP cannot do with offloaded parameters, or memplan does not support yet.

    Source: torch 2.13 distributed/fsdp/fully_sharded_data_parallel.py, on gradients accumulated outside of no_sync().
    """
    p = run.parallelism
    if not p.offload.parameters or p.strategy not in FSDP:
        return
    reduces_once = run.loop.trainer and not run.loop.sync_each_batch
    if p.strategy == "fsdp" and run.batch.accumulation > 1 and not reduces_once:
        yield refused(
            "batch.accumulation",
            "with offloaded parameters FSDP1 overwrites the gradients of earlier micro-batches; use fsdp2, which "
            "adds them up, or transformers' Trainer (loop.trainer), which reduces once",
        )
    if run.loop.grad_scaler:
        yield not_yet("loop.grad_scaler", True, f"false with parameters offloaded under {p.strategy}")
    if p.tp > 1:
        yield not_yet("parallelism.offload", "parameters", "none with tensor parallelism")
