"""Memory of a rank under DeepSpeed ZeRO stage 3, which also shards the weights.

Each weight is gathered when a module needs it (`zero3_prefetch`). The optimizer updates one sub-group of the partition
after another.

Source: DeepSpeed 0.19.8 runtime/zero/stage3.py, partition_parameters.py, comm/coalesced_collectives.py,
runtime/engine.py _zero3_consolidated_16bit_state_dict.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import OptimizerMemory
from memplan.catalogue.parallelism.sharding import part
from memplan.core.cached_property import cached_property
from memplan.core.ir import Weight
from memplan.core.units import ITEMSIZE
from memplan.program.graph import (
    Graph,
    TensorGroup,
    operations_of,
    parameters_of,
    reference_of,
    tensor_group,
    weights_of,
)
from memplan.program.loading import LoadingTape, in_order
from memplan.program.sharding.ranks import Ranks, is_scale, numbers_of
from memplan.program.sharding.sharding import Gathering, Saved
from memplan.program.sharding.zero import Reduction, ZeroSharding, fills, gradient_order, reduction_of, weight_sizes
from memplan.program.sharding.zero3_prefetch import gathered, gathered_peak
from memplan.program.structure import Structure
from memplan.program.weight_sizes import elements

NORM_CHUNK = 250_000_000  # elements of one norm computation: _constant_buffered_norm2
_SAVING = "DeepSpeed 0.19.8 runtime/engine.py _zero3_consolidated_16bit_state_dict"


@lru_cache(maxsize=256)
def _reduction(graph: Graph, ranks: Ranks) -> Reduction:
    """Return the memory for reducing gradients, by filling buckets with the gradients from the last weight on."""
    sizes = weight_sizes(graph)
    flushes = fills(gradient_order(graph), sizes, ranks.knobs.reduce_bucket)
    return reduction_of(0, [_scattered(flush, sizes, ranks) for flush in flushes])


def _scattered(flush: list[int], sizes: tuple[int, ...], ranks: Ranks) -> tuple[int, int]:
    """Return the elements waiting outside the bucket and those of the copy being reduced. A single weight
    that divides evenly is reduced without a copy."""
    numbers = sum(sizes[i] for i in flush)
    waits = numbers if numbers > ranks.knobs.reduce_bucket or not ranks.knobs.contiguous else 0
    if len(flush) == 1 and not numbers % ranks.world:
        return waits, 0
    return waits, sum(part(sizes[i], ranks.world) for i in flush) * ranks.world


@lru_cache(maxsize=256)
def _sub_groups(graph: Graph, ranks: Ranks, partition: int) -> tuple[int, ...]:
    """Return the elements of each sub-group, which takes weights' parts until it reaches its size."""
    most = ranks.knobs.sub_group
    if most >= partition:
        return (partition,)
    out, filled = list[int](), 0
    for weight in weight_sizes(graph):
        filled += part(weight, ranks.world)
        if filled >= most:
            out.append(filled)
            filled = 0
    return (*out, filled) if filled else tuple(out)


class Zero3Sharding(ZeroSharding):
    """One of the ranks that DeepSpeed shards weights, gradients and states among."""

    state_dict: str = "sharded"

    def __init__(self, run: Structure) -> None:
        super().__init__(run)
        self.loads_parts = self.knobs.divides_loading

    @cached_property
    def partition(self) -> int:
        return sum(part(numbers, self.ranks.world) * copies for numbers, copies in self.sizes)

    @property
    def updated_at_once(self) -> int:
        return max(self.sub_groups)

    @property
    def sub_groups(self) -> tuple[int, ...]:
        """The elements of each part of the partition that the optimizer updates at once."""
        return _sub_groups(self.graph, self.ranks, self.partition)

    @cached_property
    def reduction(self) -> Reduction:
        return _reduction(self.graph, self.ranks)

    def stored(self, graph: Graph) -> Iterator[TensorGroup]:
        """Yield the rank's parts of a model's weights, and its buffers.

        Small weights stay whole in addition to their part. The scales of 4-bit weights are not parameters and stay
        whole too.

        Source: trl 1.16.0 models/utils.py prepare_deepspeed.
        """
        _, axes = operations_of(graph)
        for w, copies, block in weights_of(graph):
            if w.group == "buffer":
                continue
            numbers, dtype = numbers_of(w, axes, self.ranks.storage)
            kinds = [] if self.knobs.parameters else [(self._named(w), self._part(numbers))]
            if self.knobs.copies_whole(numbers):
                kinds.append((f"{w.name}, whole", numbers))
            for what, count in kinds:
                yield self.group("parameter", what, count, dtype, block.rstrip("."), copies)
        yield from (held for held in parameters_of(graph) if held.kind == "buffer" or is_scale(held))

    def _named(self, w: Weight) -> str:
        """Return what a rank's part of a weight is called."""
        return w.name if self.ranks.world == 1 else f"{w.name}, one of {self.ranks.world} parts"

    def _part(self, numbers: int) -> int:
        return part(numbers, self.ranks.world)

    def reduced_gradients(self) -> Iterator[TensorGroup]:
        """Yield nothing: reduced gradients are the rank's partition, one of the reduction buffers."""
        yield from ()

    def trained(self) -> list[Parameter]:
        """Return the parameters passed to the optimizer, one after another: the sub-groups of the partition."""
        return [Parameter("partition", (numbers,), "fp32") for numbers in self.sub_groups]

    def optimizer(self) -> OptimizerMemory:
        """Return the optimizer's memory. It steps one sub-group after another, with the scratch of one."""
        memory = super().optimizer()
        if self.knobs.optimizer:
            return memory
        of_one = self.memory_of([Parameter("", (self.updated_at_once,), "fp32")])
        return memory._replace(first=of_one.first, later=of_one.later, foreach_lists=of_one.foreach_lists)

    def _buffers(self) -> Iterator[TensorGroup]:
        """Yield what gradient reduction holds throughout: the partition of gradients and the bucket."""
        if not self.knobs.optimizer:
            yield self.group("gradient", "reduced gradients", self.partition, self.dtype)
        if self.knobs.contiguous:
            yield self.group("other", "bucket of gradients", self.knobs.reduce_bucket, self.dtype)

    def held_in(self, phase: str) -> Iterator[TensorGroup]:
        """Yield what exists during a phase of a pass: the weights in use and the prefetched ones are whole. Trainers
        that generate gather all weights first. Other models may have passes of their own.

        Source: trl 1.16.0 models/utils.py _unwrap_model_for_generation (ds3_gather_for_generation).
        """
        if phase == "generate":
            yield from self.all_gathered()
            return
        peaks = gathered_peak(self.graph, self.ranks)
        alone = dict(self.graph.roles).get(phase) or (None if phase in peaks else reference_of(self.graph))
        peak = peaks[phase] if alone is None else max(gathered_peak(alone, self.ranks).values(), key=sum)
        yield self.group("parameter", "gathered weights", peak.weights, "uint8")
        yield self.group("temp", "weights as the all-gather writes them", peak.written, "uint8")
        yield from super().held_in(phase)

    def all_gathered(self) -> Iterator[TensorGroup]:
        """Yield all weights as they are gathered at once, without those that are always whole."""
        _, axes = operations_of(self.graph)
        for w, copies, block in weights_of(self.graph) if not self.knobs.in_place else ():
            numbers, dtype = numbers_of(w, axes, self.ranks.storage)
            if w.group != "buffer" and numbers > self.knobs.persistent:
                gathered_ = self._part(numbers) * self.ranks.world
                yield self.group("parameter", f"{w.name}, gathered", gathered_, dtype, block.rstrip("."), copies)

    def pushed(self, *, merges: bool) -> Iterator[TensorGroup]:
        weights = tuple(self.all_gathered())
        if not merges:
            largest = max(weights, key=lambda weight: weight.bytes)
            weights = (largest._replace(copies=1),)
        yield from weights

    def _buckets(self) -> Iterator[TensorGroup]:
        yield from ()  # they are there throughout

    def gathering(self) -> Gathering:
        return gathered(self.graph, self.ranks)

    def _offload_temporaries(self) -> int:
        """Return the temporary bytes to offload a reduced gradient, which is copied to the host and back before its
        norm is computed in fp64."""
        largest = self._part(max(weight_sizes(self.graph)))
        return largest * ITEMSIZE[self.dtype] + max(8 * min(largest, NORM_CHUNK), 4 * largest)

    def own_loading_events(self, together: bool) -> Iterable[tuple[int, int]]:
        """Return what loading allocates and frees: each weight is sharded as it is loaded, or once the entire model is
        on the GPU; then the parts of trained weights are flattened via the host."""
        _, axes = operations_of(self.graph)
        knobs, tape = self.knobs, LoadingTape(axes)
        weights = list(in_order(self.graph))
        loaded = [] if knobs.divides_loading else [self._load(tape, w) for w in weights]
        trained: list[int] = []
        known: dict[int, tuple[int, str]] = {}  # by the weight's id: layers have the same weights
        for i, w in enumerate(weights):
            whole = loaded[i] if loaded else self._load(tape, w)
            if w.group == "buffer":
                continue
            if id(w) not in known:
                known[id(w)] = numbers_of(w, axes, self.ranks.storage)
            count, dtype = known[id(w)]
            if not knobs.parameters:
                local = tape.alloc(self._part(count), dtype)
                trained += [local] if w.requires_grad else []
            if knobs.copies_whole(count):
                tape.alloc(count, dtype)
            tape.free(whole)
        tape.free(*trained)
        tape.empty_cache()
        if not knobs.parameters:
            tape.alloc(self.partition, self.dtype)
        if not knobs.optimizer:
            self.record_masters(tape, self.sub_groups, "fp32")
        return tape.events

    def on_gpu(self, room: int) -> Structure:
        """Return the run on GPUs of any size: this stage flattens parts of weights, never whole ones."""
        return self.run

    def _load(self, tape: LoadingTape, w: Weight) -> int:
        """Load a weight and the scales of a 4-bit weight. Return the weight's storage."""
        for t in w.stored:
            if t.name != "packed":
                tape.alloc(t.shape, t.dtype)
        return tape.alloc(*numbers_of(w, operations_of(self.graph)[1], self.ranks.storage))

    def host(self) -> Iterator[TensorGroup]:
        yield from super().host()
        if not self.knobs.parameters:
            return
        _, axes = operations_of(self.graph)
        on_nvme = self.knobs.parameters == "nvme"
        _, buffers, buffer, in_memory = self.knobs.swaps
        kept = min(self.partition, in_memory) if on_nvme else self.partition
        if kept:
            yield self.on_host("weights' parts", kept, self.dtype, True)
        if on_nvme:
            yield self.on_host("buffers of parts on NVMe", buffers * buffer, self.dtype, True)
            return
        for w, copies, _ in weights_of(self.graph):
            if not w.requires_grad and w.group != "buffer":
                yield self.on_host(self._named(w), self._part(elements(w, axes)), w.dtype, self.knobs.pins[1], copies)

    def _optimizer_on_host(self) -> Iterator[TensorGroup]:
        pinned = self.knobs.pins[0]
        yield self.on_host("reduced gradients", self.partition, self.dtype, pinned)
        if self.knobs.optimizer == "nvme":
            what = "buffer of a sub-group on NVMe"
            yield self.on_host(what, self.updated_at_once, "fp32", False, self.knobs.swaps[0])
            return
        for group in self.sub_groups:
            yield self.on_host("fp32 gradient of a sub-group", group, "fp32", pinned)
        yield self.on_host("fp32 partition of the weights", self.partition, "fp32", False)

    def host_shards(self) -> int:
        _, axes = operations_of(self.graph)
        weights = ((w, copies) for w, copies, _ in weights_of(self.graph) if w.group != "buffer")
        parts = sum(self._part(elements(w, axes)) * copies * ITEMSIZE[w.dtype] for w, copies in weights)
        return parts if self.knobs.parameters else 0

    def gathers_to_save(self, states: str) -> Iterator[Saved]:
        """Yield what is gathered to save a full state dict: a module at a time."""
        _, axes = operations_of(self.graph)
        modules: dict[tuple[str, str], list[TensorGroup]] = {}
        for w, _, block in weights_of(self.graph):
            if w.group != "buffer":
                weight = tensor_group(
                    "temp", f"gathered {w.name}", elements(w, axes), w.dtype, _SAVING, block.rstrip(".")
                )
                modules.setdefault((block, w.name.rpartition(".")[0]), []).append(weight)
        yield from ((tuple(tensors), "save.gather") for tensors in modules.values())

    def saved_bytes(self, states: int) -> int:
        _, axes = operations_of(self.graph)
        weights = ((w, n) for w, n, _ in weights_of(self.graph) if w.group != "buffer")
        return sum(elements(w, axes) * n * ITEMSIZE[w.dtype] for w, n in weights)
