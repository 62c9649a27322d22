"""Memory of a rank under Megatron's distributed optimizer.

Weights and main gradients are whole, each in one buffer that exists throughout. Weights are placed last first, each
aligned to 64 elements, and the end is padded so that all ranks have equal parts. The fp32 master weights and the
optimizer states cover a rank's part of the buffer. Gradients are reduced and weights gathered in place.

Gradient reduction does not overlap with backward (`overlap_grad_reduce` is off, the default), so there is one bucket
and one padding.

Source: megatron-core 0.16.1 core/distributed/param_and_grad_buffer.py, distributed_data_parallel.py,
core/optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from math import lcm
from typing import NamedTuple

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.parallelism.sharding import BUCKET_END, MEGATRON, PARAMETER_START, part
from memplan.engine.walk import size
from memplan.program.graph import Graph, TensorGroup, elements, operations_of, parameters_of
from memplan.program.loading import in_order, loading
from memplan.program.sharding.ranks import Ranks


def divides(ranks: Ranks) -> bool:
    """Whether ranks shard optimizer states with Megatron's distributed optimizer."""
    return ranks.strategy == MEGATRON and ranks.world > 1


class Buffer(NamedTuple):
    """One buffer of weights or gradients.

    what     suffix of its name
    numbers  elements, with padding
    weights  elements, without padding
    ranks    ranks that have the same weights
    """

    what: str
    numbers: int
    weights: int
    ranks: int


@lru_cache(maxsize=256)
def buffers(graph: Graph, ranks: Ranks) -> tuple[Buffer, ...]:
    """Return the buffers of weights; those of gradients are equal. Experts that fewer ranks share have a buffer of
    their own."""
    _, axes = operations_of(graph)
    trained = [w for w in in_order(graph) if w.trains]
    groups = [("", trained, ranks.world)]
    if ranks.experts:
        others, experts = [w for w in trained if not w.chosen], [w for w in trained if w.chosen]
        groups = [("", others, ranks.world), (" of experts", experts, ranks.experts)]
    out: list[Buffer] = []
    for what, weights, replicas in groups:
        end = 0
        for numbers in reversed([elements(w, axes) for w in weights]):
            end = _padded(end, PARAMETER_START) + numbers
        unpadded = sum(elements(w, axes) for w in weights)
        out.append(Buffer(what, _padded(end, lcm(replicas, BUCKET_END)), unpadded, replicas))
    return tuple(out)


def buffer(graph: Graph, ranks: Ranks) -> int:
    """Return the elements of all buffers of weights, which equals those of gradients."""
    return sum(b.numbers for b in buffers(graph, ranks))


def _padded(numbers: int, step: int) -> int:
    return part(numbers, step) * step


def _dtype(graph: Graph) -> str:
    return next(w.dtype for w in in_order(graph) if w.trains)


def parameters(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield weights, buffers, and the padding of the weight buffers."""
    yield from parameters_of(graph)
    for b in buffers(graph, ranks):
        if b.numbers > b.weights:
            what = f"padding of the buffer of weights{b.what}"
            yield _held("parameter", what, b.numbers - b.weights, _dtype(graph), ranks)


def gradients(graph: Graph, ranks: Ranks, dtype: str) -> Iterator[TensorGroup]:
    """Yield the main gradients, which stay from step to step."""
    for b in buffers(graph, ranks):
        yield _held("gradient", f"main gradients{b.what}", b.numbers, dtype, ranks)


def trained(graph: Graph, ranks: Ranks) -> list[Parameter]:
    """Return the parameters passed to the optimizer: the rank's part of each buffer."""
    return [Parameter(f"part{b.what}", (b.numbers // b.ranks,), _dtype(graph)) for b in buffers(graph, ranks)]


def loading_events(graph: Graph, ranks: Ranks, dtype: str) -> Iterator[tuple[int, int]]:
    """Yield what loading allocates and frees (see `memplan.program.loading.loading`): after loading, both buffers are
    allocated, and every weight is copied into its buffer."""
    alive: dict[int, int] = {}
    last = 0
    for last, bytes_ in loading(graph):
        yield last, bytes_
        if bytes_:
            alive[last] = bytes_
        else:
            del alive[last]
    numbers = itertools.count(last + 1)
    whole = buffer(graph, ranks)
    main = next(numbers)
    yield next(numbers), size(str(whole), _dtype(graph), {})[1]
    yield main, size(str(whole), dtype, {})[1]
    for number in alive:
        yield number, 0
    for held in parameters_of(graph):
        if held.kind == "buffer":
            yield next(numbers), held.bytes * held.copies
    yield main, 0  # from here on it is counted as gradients


def _held(kind: str, what: str, numbers: int, dtype: str, ranks: Ranks) -> TensorGroup:
    return TensorGroup(kind, what, "", str(numbers), dtype, 1, size(str(numbers), dtype, {})[1], ranks.row.source)
