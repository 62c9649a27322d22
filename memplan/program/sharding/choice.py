"""The choice of a run's sharding: the only place that asks for its strategy."""

from __future__ import annotations

from memplan.catalogue.parallelism.sharding import MEGATRON
from memplan.program.sharding.sharding import DataParallel, Sharding
from memplan.program.structure import Structure


def sharding_of(run: Structure) -> Sharding:
    """Return how the run's ranks shard it. A strategy's module is imported for a run that uses it."""
    match run.ranks.strategy:
        case "none":
            return Sharding(run)
        case "zero3":
            from memplan.program.sharding.zero3 import Zero3Sharding

            return Zero3Sharding(run)
        case "zero0":
            from memplan.program.sharding.zero0 import UndividedSharding

            return UndividedSharding(run)
        case "zero1" | "zero2":
            from memplan.program.sharding.zero import ZeroSharding

            return ZeroSharding(run)
        case "fsdp" | "fsdp2" if run.pipe.engine:
            from memplan.program.sharding.fsdp_pipeline import ShardedStage

            return ShardedStage(run)
        case "fsdp" | "fsdp2":
            from memplan.program.sharding.fsdp import FullySharded

            return FullySharded(run)
        case strategy if strategy == MEGATRON:
            from memplan.program.sharding.megatron import DistributedOptimizer

            return DistributedOptimizer(run)
        case _:
            return DataParallel(run)
