"""Memory of a rank under DeepSpeed without ZeRO (stage 0), which divides nothing.

In 16 bits every trained weight has an fp32 master, whose states are made when DeepSpeed starts. After backward,
gradients are copied into a bucket to be reduced; the update converts all of them to fp32, next to those of the passes.

Source: DeepSpeed 0.19.8 runtime/fp16/unfused_optimizer.py, runtime/engine.py _do_optimizer_sanity_check,
buffered_allreduce_fallback; the same in 0.17.6 and 0.18.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import ClassVar

from memplan.catalogue.optimizers.parameter_rules import Parameter, bytes_of
from memplan.catalogue.optimizers.states import OptimizerMemory
from memplan.program.graph import TensorGroup, operations_of, tensor_group, weights_of
from memplan.program.loading import LoadingTape, load
from memplan.program.sharding.sharding import Sharding
from memplan.program.sharding.zero import weight_sizes

BUCKET = 500_000_000  # elements of gradients after which a bucket is reduced: MEMORY_OPT_ALLREDUCE_SIZE


class UndividedSharding(Sharding):
    """One of the ranks that DeepSpeed runs without ZeRO."""

    saves_from_host: ClassVar[bool] = True

    def _masters(self) -> list[Parameter]:
        """Return the fp32 masters of the weights that train; none if these are in fp32."""
        parameters = self._parameters(lambda w: w.requires_grad)
        return [p._replace(dtype="fp32", embedding=False) for p in parameters if p.dtype != "fp32"]

    def weights(self) -> Iterator[TensorGroup]:
        yield from super().weights()
        _, axes = operations_of(self.graph)
        for w, count, where in weights_of(self.graph):
            if w.requires_grad and w.dtype != "fp32":
                held = ("parameter", f"{w.name} master", w.shape, "fp32", self.ranks.row.source)
                yield tensor_group(*held, where.rstrip("."), count, axes)

    def trained(self) -> list[Parameter]:
        return self._masters() or super().trained()

    def optimizer(self) -> OptimizerMemory:
        """Return the optimizer's memory, with fp32 gradients and the zeros of weights that got no gradient."""
        memory, masters = super().optimizer(), self._masters()
        if not masters:
            return memory
        made = [(bytes_of(p.shape, p.dtype), p.copies) for p in (*masters, *self._parameters(lambda w: w.idle))]
        update = memory.later + sum(bytes_ * copies for bytes_, copies in made)
        scratch = ", and ".join(filter(None, ("gradients in fp32", memory.scratch)))
        lists = (*made, *memory.foreach_lists)
        return memory._replace(first=update, later=update, foreach_lists=lists, scratch=scratch, at_once=True)

    def gradient_conversion(self) -> Iterable[TensorGroup]:
        """Return the largest bucket of gradients as it is reduced."""
        most = filled = 0
        for numbers in weight_sizes(self.graph):
            filled += numbers
            most, filled = max(most, filled), filled if filled <= BUCKET else 0
        dtype = next(w.dtype for w, _, _ in weights_of(self.graph) if w.requires_grad)
        return (tensor_group("temp", "bucket of gradients as it is reduced", most, dtype, self.ranks.row.source),)

    def clipping(self) -> int:
        return max(super().clipping(), *(h.bytes for h in self.gradient_conversion()))

    def own_loading_events(self, together: bool) -> Iterable[tuple[int, int]]:
        """Return what loading allocates and frees: a master is made from a copy of its weight."""
        tape = LoadingTape(operations_of(self.graph)[1])
        for w in load(self.graph, tape).values():
            if w.requires_grad and w.dtype != "fp32":
                copied = tape.alloc(w.shape, w.dtype)
                tape.alloc(w.shape, "fp32")
                tape.free(copied)
        return tape.events
