"""Degrees of parallelism: their product must be the world's size."""

from __future__ import annotations

from memplan.catalogue.degrees import WHOLE, Degrees
from memplan.catalogue.parallelism.sharding import STAGES, STRATEGIES
from memplan.catalogue.profiles.behaviour import ShardingBehaviour
from memplan.core.errors import SpecError, refused
from memplan.spec.parallelism import Parallelism

# Strategies of FSDP and of DeepSpeed, which begin with that without ZeRO, and those whose ranks hold all weights.
FSDP = tuple(name for name, row in STRATEGIES.items() if row.gathers)
ZERO = tuple(STAGES)
WHOLE_WEIGHTS = ("ddp", *ZERO[:3])


def degrees_of(p: Parallelism, library: ShardingBehaviour) -> Degrees:
    """Return the degrees of a rank, given the profile's style of tensor parallelism."""
    style, divides_rank = (
        (library.tensor_parallel, library.divides_rank) if p.tp > 1 else (WHOLE.style, WHOLE.divides_rank)
    )
    etp = p.tp if p.etp is None else p.etp
    imbalance = round(1000 * p.expert_imbalance)
    return Degrees(
        tp=p.tp,
        sequence_parallel=p.sequence_parallel,
        cp=p.cp,
        context=p.context,
        ep=p.ep,
        etp=etp,
        imbalance=imbalance,
        style=style,
        divides_rank=divides_rank,
    )


def check_product(p: Parallelism) -> SpecError | None:
    """Return the error if the world size is not the product of its degrees, else None. It names every degree."""
    product = p.dp * p.tp * p.pp * p.cp
    if p.world == product or (product == 1 and p.device_map is not None):  # a device_map uses all GPUs
        return None
    field = "parallelism.world" if p.world > 1 else "parallelism.dp"
    degrees = " x ".join(f"{name} {getattr(p, name)}" for name in ("dp", "tp", "pp", "cp"))
    return refused(field, f"a world of {p.world} GPUs is not {degrees} = {product}")


def replicas(p: Parallelism) -> int:
    """Return how many ranks hold the same part of the model, and may shard its weights, gradients and states.

    Ranks of context parallelism count: each has all the weights.
    """
    return p.dp * p.cp


def is_wrapped(p: Parallelism) -> bool:
    """Return whether the strategy's library holds the model.

    FSDP and DeepSpeed do on one GPU, too; accelerate wraps a model in DDP only for several processes.

    Source: accelerate 1.15 accelerator.py prepare_model, multi_device.
    """
    return p.strategy != "none" and (replicas(p) > 1 or (p.world == 1 and p.strategy in (*FSDP, *ZERO)))


def divides_weights(p: Parallelism) -> bool:
    """Return whether FSDP holds the weights, and shards them over the ranks."""
    return is_wrapped(p) and p.strategy in FSDP
