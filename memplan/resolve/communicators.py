"""The communicators that a run's ranks are in: one for every way in which ranks divide the work.

Where those are several, torch's default group has one of its own, of all ranks: for barriers and the loss. Groups that
a library makes and never sends through have none: NCCL makes them at the first collective.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.hardware.overhead import Communicator
from memplan.resolve.parallelism import replicas
from memplan.spec.parallelism import Parallelism

NODE = 8  # GPUs of a node, where nothing says how many


def communicators(p: Parallelism) -> tuple[Communicator, ...]:
    """Those of a run whose every GPU is a process; none of one GPU. The innermost ranks are in one node."""
    node = p.gpus_per_node or NODE
    groups = list(_groups(p))
    if len(groups) > 1 and all(ranks != p.world for _, ranks, _ in groups):
        groups.append(("world", p.world, p.world))
    return tuple(Communicator(what, ranks, span > node) for what, ranks, span in groups)


def _groups(p: Parallelism) -> Iterator[tuple[str, int, int]]:
    """What each group of ranks divides, how many they are, and how far apart the first and last of them."""
    alike = replicas(p)
    inner = p.tp
    if p.tp > 1:
        yield "tp", p.tp, p.tp
    if p.cp > 1:
        yield "cp", p.cp, inner * p.cp
    if p.ep > 1:
        yield "ep", p.ep, inner * p.ep
    group = p.shard_group
    if group is not None and 1 < group < alike:
        yield "shard", group, inner * group
        yield "replicate", alike // group, inner * alike
    elif alike > 1 and (p.dp > 1 or p.strategy != "none"):
        yield "dp" if p.cp == 1 else "dp-cp", alike, inner * alike
    if p.pp > 1:
        yield "pp", p.pp, inner * alike * p.pp
