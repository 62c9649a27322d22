"""What a rank holds under DeepSpeed's ZeRO, and when.

Weights that train are flattened, and each rank has an fp32 copy of its partition of them, which the optimizer works on.
Gradients are copied into a bucket as they come, and reduced when it is full. Sizes that a DeepSpeed config sets are
DeepSpeed's own defaults, as accelerate has them without a config file.

Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and
partitioned_param_coordinator.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.catalogue.parallel import (
    ALIGNMENT,
    PERSISTENT,
    PREFETCH,
    REDUCE_BUCKET,
    REUSE,
    SUB_GROUP,
    part,
)
from memplan.catalogue.parameters import Parameter
from memplan.engine.walk import size
from memplan.graph import Graph, Held, built, elements, loading, parameters_of, weights_of
from memplan.ranks import Ranks


def stage(ranks: Ranks) -> int:
    """1, 2 or 3; 0 where DeepSpeed divides nothing."""
    if ranks.world == 1 or ranks.row.gathers:
        return 0
    return ranks.row.states + ranks.row.gradients + ranks.row.parameters


def partition(graph: Graph, ranks: Ranks) -> int:
    """How many numbers a rank's partition of what trains has, with its padding."""
    _, axes = built(graph)
    sizes = [(elements(w, axes), copies) for w, copies, _ in weights_of(graph) if w.trains]
    if stage(ranks) == 3:
        return sum(part(numbers, ranks.world) * copies for numbers, copies in sizes)
    return ALIGNMENT * part(sum(n * copies for n, copies in sizes), ALIGNMENT * ranks.world)


def _trained(graph: Graph) -> tuple[int, str]:
    """How many numbers train, and their dtype: DeepSpeed casts the whole model to one."""
    _, axes = built(graph)
    found = [(elements(w, axes) * copies, w.dtype) for w, copies, _ in weights_of(graph) if w.trains]
    return sum(n for n, _ in found), found[0][1]


def parameters(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """Weights and buffers, and the fp32 partition of weights. At stage 3 small ones stay whole beside their part."""
    source = ranks.row.source
    if stage(ranks) < 3:
        yield from parameters_of(graph)
    else:
        yield from _parts(graph, ranks)
        yield from (held for held in parameters_of(graph) if held.kind == "buffer")
    yield _held("parameter", "fp32 partition of the weights", "", partition(graph, ranks), "fp32", 1, source)


def _parts(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    _, axes = built(graph)
    for w, copies, block in weights_of(graph):
        if w.group == "buffer":
            continue
        whole = elements(w, axes)
        kinds = [(f"one of {ranks.world} parts", part(whole, ranks.world))]
        if whole <= PERSISTENT:
            kinds.append(("whole", whole))
        for kind, numbers in kinds:
            what = f"{w.name}, {kind}"
            yield _held("parameter", what, block.rstrip("."), numbers, w.dtype, copies, ranks.row.source)


def trained(graph: Graph, ranks: Ranks) -> list[Parameter]:
    """What the optimizer is given: the partition."""
    return [Parameter("partition", (partition(graph, ranks),), "fp32")]


def in_sub_group(graph: Graph, ranks: Ranks) -> int:
    """How many numbers a step of the optimizer takes: at stage 3 a sub-group after the other."""
    whole = partition(graph, ranks)
    return min(whole, SUB_GROUP) if stage(ranks) == 3 else whole


def stepping(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The gradients that the optimizer's step reads."""
    numbers = in_sub_group(graph, ranks)
    yield _held("gradient", "fp32 gradient of the partition", "", numbers, "fp32", 1, ranks.row.source)


def converting(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """What is there beside those while they are made: gradients as they were reduced, and flattened."""
    _, dtype = _trained(graph)
    flat = in_sub_group(graph, ranks)
    if stage(ranks) < 3:
        yield _held("gradient", "reduced gradients", "", partition(graph, ranks), dtype, 1, ranks.row.source)
    if dtype != "fp32":
        yield _held("temp", "reduced gradients, flattened", "", flat, dtype, 1, ranks.row.source)


def accumulated(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The gradients that a later micro-batch finds: at stage 2 those of the partition, at stage 3 none but `reducing`.
    At stage 1 they are whole."""
    if stage(ranks) == 2:
        _, dtype = _trained(graph)
        yield _held("gradient", "reduced gradients", "", partition(graph, ranks), dtype, 1, ranks.row.source)


def reducing(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """What is there throughout: at stage 3 the gradients' partition and the bucket they are copied into."""
    if stage(ranks) == 3:
        _, dtype = _trained(graph)
        yield _held("gradient", "reduced gradients", "", partition(graph, ranks), dtype, 1, ranks.row.source)
        yield _held("other", "bucket of gradients", "", REDUCE_BUCKET, dtype, 1, ranks.row.source)


def passing(graph: Graph, ranks: Ranks, phase: str) -> Iterator[Held]:
    """What is there in a phase of a pass.

    A bucket is copied once to be reduced. At stage 1 that is when backward is over, at the others as soon as it is
    full, and the reduced gradients of the rank whose layers come last are there early.

    At stage 3 a weight stays whole that is used again within so many numbers, and never more are whole than are live
    at most: at the turn from forward to backward that is half of it.
    """
    source = ranks.row.source
    numbers, dtype = _trained(graph)
    mine = partition(graph, ranks)
    if stage(ranks) == 3:
        _, axes = built(graph)
        sizes = [(elements(w, axes), n) for w, n, _ in weights_of(graph) if w.group != "buffer"]
        large = [(whole, n) for whole, n in sizes if whole > PERSISTENT]
        most = max((whole for whole, _ in large), default=0)
        live = min(sum(whole * n for whole, n in large), max(REUSE // 2, most) + PREFETCH)
        sent = graph.recipe.weights
        yield _held("parameter", "gathered weights", "", live, sent, 1, source)
        fetched = min(live, max(PREFETCH, most))
        yield _held("temp", "weights as the all-gather writes them", "", fetched, sent, 1, source)
    if phase != "backward":
        return
    if stage(ranks) < 3:
        yield _held("other", "bucket of gradients", "", REDUCE_BUCKET, dtype, 1, source)
        yield _held("gradient", "reduced gradients", "", mine, dtype, 1, source)
    copied = min(numbers, REDUCE_BUCKET)
    yield _held("temp", "bucket as it is reduced", "", copied, dtype, 1, source)


def loading_events(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int]]:
    """What loading allocates and frees, see `memplan.graph.loading`: below stage 3 the weights that train are
    flattened; at stage 3 every weight is divided as it is loaded."""
    number = 0
    if stage(ranks) < 3:
        for number, bytes_ in loading(graph):
            yield number, bytes_
        numbers, dtype = _trained(graph)
        flat = size(str(numbers), dtype, {})[1]
        yield number + 1, flat
        yield number + 1, 0
        number += 2
        yield number, size(str(partition(graph, ranks)), "fp32", {})[1]
        return
    _, axes = built(graph)
    for w, copies, _ in weights_of(graph):
        whole = elements(w, axes)
        kept = whole if w.group == "buffer" else part(whole, ranks.world) + (whole if whole <= PERSISTENT else 0)
        for _ in range(copies):
            yield number, size(str(whole), w.dtype, {})[1]
            yield number + 1, size(str(kept), w.dtype, {})[1]
            yield number, 0
            number += 2
    yield number, size(str(partition(graph, ranks)), "fp32", {})[1]


def _held(kind: str, what: str, where: str, numbers: int, dtype: str, copies: int, source: str) -> Held:
    return Held(kind, what, where, str(numbers), dtype, copies, size(str(numbers), dtype, {})[1], source)
