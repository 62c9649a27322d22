"""The communicators that a run's ranks are in: one for each way in which ranks divide the work.

With several of them, torch's default group (all ranks, for barriers and the loss) is one more. Groups that a library
creates but never uses take nothing: NCCL makes a communicator at the first collective.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.hardware.overhead import Communicator
from memplan.resolve.parallelism import replicas
from memplan.spec.parallelism import Parallelism

NODE = 8  # GPUs per node, unless parallelism.gpus_per_node says otherwise


def communicators(p: Parallelism) -> tuple[Communicator, ...]:
    """Return the communicators of a run with one process per GPU; none on one GPU.

    The innermost ranks share a node.
    """
    node = p.gpus_per_node or NODE
    groups = list(_groups(p))
    if len(groups) > 1 and all(ranks != p.world for _, ranks, _ in groups):
        groups.append(("world", p.world, p.world))
    return tuple(Communicator(what, ranks, span > node) for what, ranks, span in groups)


def _groups(p: Parallelism) -> Iterator[tuple[str, int, int]]:
    """Yield for each group of ranks what it divides, its size, and the span from its first to its last rank."""
    copies = replicas(p)
    inner = p.tp
    if p.tp > 1:
        yield "tp", p.tp, p.tp
    if p.cp > 1:
        yield "cp", p.cp, inner * p.cp
    if p.ep > 1:
        yield "ep", p.ep, inner * p.ep
    group = p.shard_group
    if group is not None and 1 < group < copies:
        yield "shard", group, inner * group
        yield "replicate", copies // group, inner * copies
    elif copies > 1 and (p.dp > 1 or p.strategy != "none"):
        yield "dp" if p.cp == 1 else "dp-cp", copies, inner * copies
    if p.pp > 1:
        yield "pp", p.pp, inner * copies * p.pp
