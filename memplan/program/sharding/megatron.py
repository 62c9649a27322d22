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

from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import lcm

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.parallelism.sharding import BUCKET_END, PARAMETER_START, part
from memplan.core.cached_property import cached_property
from memplan.core.records import NamedTuple
from memplan.program.graph import Graph, TensorGroup, operations_of, parameters_of, tensor_group
from memplan.program.loading import LoadingTape, in_order, load
from memplan.program.sharding.ranks import Ranks
from memplan.program.sharding.sharding import Sharding
from memplan.program.weight_sizes import elements


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
        others, experts = ([w for w in trained if w.name.startswith("mlp.experts.") is own] for own in (False, True))
        groups = [("", others, ranks.world), (" of experts", experts, ranks.experts)]
    out: list[Buffer] = []
    for what, weights, replicas in groups:
        end = 0
        for numbers in reversed([elements(w, axes) for w in weights]):
            end = _padded(end, PARAMETER_START) + numbers
        unpadded = sum(elements(w, axes) for w in weights)
        out.append(Buffer(what, _padded(end, lcm(replicas, BUCKET_END)), unpadded, replicas))
    return tuple(out)


def _padded(numbers: int, step: int) -> int:
    return part(numbers, step) * step


class DistributedOptimizer(Sharding):
    """One of the ranks among which Megatron's distributed optimizer shards its states."""

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """The buffers of weights, which equal those of gradients."""
        return buffers(self.graph, self.ranks)

    @cached_property
    def _dtype(self) -> str:
        return next(w.dtype for w in in_order(self.graph) if w.trains)

    def weights(self) -> Iterator[TensorGroup]:
        """Yield weights, buffers, and the padding of the weight buffers."""
        yield from super().weights()
        for b in self.buffers:
            if b.numbers > b.weights:
                what, padding = f"padding of the buffer of weights{b.what}", b.numbers - b.weights
                yield tensor_group("parameter", what, padding, self._dtype, self.ranks.row.source)

    def gradients(self) -> Iterator[TensorGroup]:
        """Yield the main gradients, which stay from step to step."""
        for b in self.buffers:
            what, dtype = f"main gradients{b.what}", str(self.run.grads)
            yield tensor_group("gradient", what, b.numbers, dtype, self.ranks.row.source)

    def trained(self) -> list[Parameter]:
        """Return the parameters passed to the optimizer: the rank's part of each buffer."""
        return [Parameter(f"part{b.what}", (b.numbers // b.ranks,), self._dtype) for b in self.buffers]

    def own_loading_events(self, together: bool) -> Iterable[tuple[int, int]]:
        """Return what loading allocates and frees: after loading, both buffers are allocated, and every weight is
        copied into its buffer."""
        tape = LoadingTape(operations_of(self.graph)[1])
        load(self.graph, tape)
        loaded = tape.alive()
        numbers = sum(b.numbers for b in self.buffers)
        tape.alloc(numbers, self._dtype)
        main = tape.alloc(numbers, str(self.run.grads))
        tape.free(*loaded)
        for held in parameters_of(self.graph):
            if held.kind == "buffer":
                tape.alloc_bytes(held.bytes * held.copies)
        tape.free(main)  # from here on it is counted as gradients
        return tape.events
