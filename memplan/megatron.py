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

from memplan.catalogue.parallel import BUCKET_END, MEGATRON, PARAMETER_START, part
from memplan.catalogue.parameters import Parameter
from memplan.engine.walk import size
from memplan.graph import Graph, Held, built, elements, in_order, loading, parameters_of
from memplan.ranks import Ranks


def divides(ranks: Ranks) -> bool:
    """Whether ranks divide their states as Megatron does."""
    return ranks.strategy == MEGATRON and ranks.world > 1


@lru_cache(maxsize=256)
def buffer(graph: Graph, ranks: Ranks) -> int:
    """How many numbers the buffer of weights has, and that of gradients, with the padding."""
    _, axes = built(graph)
    end = 0
    for numbers in reversed([elements(w, axes) for w in in_order(graph) if w.trains]):
        end = _padded(end, PARAMETER_START) + numbers
    return _padded(end, lcm(ranks.world, BUCKET_END))


def _padded(numbers: int, step: int) -> int:
    return part(numbers, step) * step


def _dtype(graph: Graph) -> str:
    return next(w.dtype for w in in_order(graph) if w.trains)


def parameters(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """Weights and buffers, and what the buffer of weights has beside them."""
    yield from parameters_of(graph)
    _, axes = built(graph)
    weights = sum(elements(w, axes) for w in in_order(graph) if w.trains)
    padding = buffer(graph, ranks) - weights
    if padding:
        yield _held("parameter", "padding of the buffer of weights", padding, _dtype(graph), ranks)


def gradients(graph: Graph, ranks: Ranks, dtype: str) -> Iterator[Held]:
    """The main gradients, which stay from step to step."""
    yield _held("gradient", "main gradients", buffer(graph, ranks), dtype, ranks)


def trained(graph: Graph, ranks: Ranks) -> list[Parameter]:
    """What the optimizer is given: the rank's part of the buffer."""
    return [Parameter("part", (buffer(graph, ranks) // ranks.world,), _dtype(graph))]


def loading_events(graph: Graph, ranks: Ranks, dtype: str) -> Iterator[tuple[int, int]]:
    """What loading allocates and frees, see `memplan.graph.loading`: both buffers, and then every weight is copied
    into its own."""
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
