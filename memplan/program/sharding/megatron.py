"""What a rank holds under Megatron's distributed optimizer.

Weights and their main gradients are whole, each in one buffer throughout: weights are laid there last first, each from
a multiple of 64 numbers on, and the end is padded so that all ranks have as much of it. The fp32 masters and the
optimizer's states are of a rank's part of that buffer. Gradients are reduced, and weights gathered, where they are.

Gradients are not reduced while others are computed (`overlap_grad_reduce` is off, as by default): there is one bucket,
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
from memplan.program.graph import Graph, Held, built, elements, parameters_of
from memplan.program.loading import in_order, loading
from memplan.program.sharding.ranks import Ranks


def divides(ranks: Ranks) -> bool:
    """Whether ranks divide their states as Megatron does."""
    return ranks.strategy == MEGATRON and ranks.world > 1


class Buffer(NamedTuple):
    """`numbers` that a buffer has, with the padding, for `ranks` that have the same weights."""

    what: str
    numbers: int
    weights: int
    ranks: int


@lru_cache(maxsize=256)
def buffers(graph: Graph, ranks: Ranks) -> tuple[Buffer, ...]:
    """The buffers of weights, and those of gradients alike: experts have one of their own, where fewer ranks have the
    same."""
    _, axes = built(graph)
    trained = [w for w in in_order(graph) if w.trains]
    groups = [("", trained, ranks.world)]
    if ranks.experts:
        others, experts = [w for w in trained if not w.chosen], [w for w in trained if w.chosen]
        groups = [("", others, ranks.world), (" of experts", experts, ranks.experts)]
    found: list[Buffer] = []
    for what, weights, alike in groups:
        end = 0
        for numbers in reversed([elements(w, axes) for w in weights]):
            end = _padded(end, PARAMETER_START) + numbers
        own = sum(elements(w, axes) for w in weights)
        found.append(Buffer(what, _padded(end, lcm(alike, BUCKET_END)), own, alike))
    return tuple(found)


def buffer(graph: Graph, ranks: Ranks) -> int:
    """How many numbers the buffers of weights have together, and those of gradients."""
    return sum(b.numbers for b in buffers(graph, ranks))


def _padded(numbers: int, step: int) -> int:
    return part(numbers, step) * step


def _dtype(graph: Graph) -> str:
    return next(w.dtype for w in in_order(graph) if w.trains)


def parameters(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """Weights and buffers, and what the buffer of weights has beside them."""
    yield from parameters_of(graph)
    for b in buffers(graph, ranks):
        if b.numbers > b.weights:
            what = f"padding of the buffer of weights{b.what}"
            yield _held("parameter", what, b.numbers - b.weights, _dtype(graph), ranks)


def gradients(graph: Graph, ranks: Ranks, dtype: str) -> Iterator[Held]:
    """The main gradients, which stay from step to step."""
    for b in buffers(graph, ranks):
        yield _held("gradient", f"main gradients{b.what}", b.numbers, dtype, ranks)


def trained(graph: Graph, ranks: Ranks) -> list[Parameter]:
    """What the optimizer is given: the rank's part of each buffer."""
    found = buffers(graph, ranks)
    return [Parameter(f"part{b.what}", (b.numbers // b.ranks,), _dtype(graph)) for b in found]


def loading_events(graph: Graph, ranks: Ranks, dtype: str) -> Iterator[tuple[int, int]]:
    """What loading allocates and frees, see `memplan.program.loading.loading`: both buffers, and then every weight is
    copied into its own."""
    there: dict[int, int] = {}
    last = 0
    for last, bytes_ in loading(graph):
        yield last, bytes_
        if bytes_:
            there[last] = bytes_
        else:
            del there[last]
    numbers = itertools.count(last + 1)
    whole = buffer(graph, ranks)
    main = next(numbers)
    yield next(numbers), size(str(whole), _dtype(graph), {})[1]
    yield main, size(str(whole), dtype, {})[1]
    for number in there:
        yield number, 0
    for held in parameters_of(graph):
        if held.kind == "buffer":
            yield next(numbers), held.bytes * held.copies
    yield main, 0  # counted with the gradients from here on


def _held(kind: str, what: str, numbers: int, dtype: str, ranks: Ranks) -> Held:
    return Held(kind, what, "", str(numbers), dtype, 1, size(str(numbers), dtype, {})[1], ranks.row.source)
