"""Memory of a rank under DeepSpeed ZeRO, on its GPU and in host memory. Stage 3 is in `zero3`.

Trained weights are flattened, and each rank has an fp32 copy of its partition of them, which the optimizer updates.
Gradients are copied into a bucket as they are computed, and reduced when it is full. If the optimizer is offloaded, the
fp32 copy, its gradient and the states are in host memory, and each reduced gradient is copied there at once.

Left out: transformers' Trainer has two parameter groups, with and without weight decay, each with its own padding.

Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py, swap_tensor/.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import OptimizerMemory
from memplan.catalogue.parallelism.sharding import ALIGNMENT, STAGES, part
from memplan.core.cached_property import cached_property
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.storages import COMPUTING, REDUCING
from memplan.program.graph import Graph, TensorGroup, operations_of, tensor_group, total_bytes, weights_of
from memplan.program.loading import LoadingTape, in_order, load
from memplan.program.sharding.ranks import Ranks, pinned_bytes
from memplan.program.sharding.sharding import Sharding, stepped_on_host
from memplan.program.structure import Structure
from memplan.program.weight_sizes import elements


class Reduction(NamedTuple):
    """Memory for reducing gradients, in elements.

    owned    stages 1 and 2: all weights that overlap a rank's partition, for the rank with most, as their gradients are
             kept whole
    waiting  peak of gradients waiting outside the bucket and of the copy being reduced, together
    waits    peak of gradients waiting outside the bucket
    copied   peak of the copy being reduced
    """

    owned: int
    waiting: int
    waits: int
    copied: int


@lru_cache(maxsize=128)
def weight_sizes(graph: Graph) -> tuple[int, ...]:
    """Return the number of elements of each trainable weight, in the model's order."""
    _, axes = operations_of(graph)
    cached: dict[int, int] = {}
    return tuple(cached.setdefault(id(w), elements(w, axes)) for w in in_order(graph) if w.requires_grad)


@lru_cache(maxsize=128)
def gradient_order(graph: Graph) -> tuple[int, ...]:
    """Return the numbers of the weights that get a gradient among the trainable ones, the last weight first.

    A group's flat partition has idle weights too, whose gradients are zeros at the end of backward.
    Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py get_all_grad_tensors.
    """
    trainable = [w.trains for w in in_order(graph) if w.requires_grad]
    return tuple(i for i, trains in enumerate(trainable) if trains)[::-1]


@lru_cache(maxsize=256)
def _reduction(graph: Graph, ranks: Ranks, partition: int) -> Reduction:
    """Return the memory for reducing gradients, by filling buckets with the gradients from the last weight on."""
    sizes, knobs = weight_sizes(graph), ranks.knobs
    order = range(len(sizes))
    if knobs.round_robin:
        order = [i for rank in range(min(ranks.world, len(sizes))) for i in range(rank, len(sizes), ranks.world)]
    starts = dict(zip(order, (0, *accumulate(sizes[i] for i in order)), strict=False))
    of_flushes: list[tuple[int, int]] = []
    for flush in fills(gradient_order(graph), sizes, knobs.reduce_bucket):
        numbers = sum(sizes[i] for i in flush)
        is_oversized = numbers > knobs.reduce_bucket
        waits = numbers if STAGES[ranks.strategy] == 2 and (is_oversized or not knobs.contiguous) else 0
        if not knobs.contiguous:  # all gradients of a bucket together
            copied = numbers if len(flush) > 1 else 0
        else:
            copied = _copied(((starts[i], sizes[i]) for i in flush), partition, knobs.reduce_bucket)
        of_flushes.append((waits, copied))
    return reduction_of(_most_owned(starts, sizes, partition), of_flushes)


def reduction_of(owned: int, flushes: list[tuple[int, int]]) -> Reduction:
    """Return the peaks over all flushes, each given as waiting and copied elements."""
    peak = max(map(sum, flushes))
    return Reduction(owned, peak, max(waits for waits, _ in flushes), max(copied for _, copied in flushes))


def _most_owned(starts: Mapping[int, int], sizes: Sequence[int], partition_size: int) -> int:
    """Return the elements of all weights that overlap a partition of `own` elements, for the rank with most."""
    owned: dict[int, int] = {}
    for i, start in starts.items():  # a rank strictly inside a weight overlaps no other weight
        for rank in {start // partition_size, (start + sizes[i] - 1) // partition_size}:
            owned[rank] = owned.get(rank, 0) + sizes[i]
    return max(owned.values())


def fills(order: Iterable[int], sizes: tuple[int, ...], bucket: int) -> list[list[int]]:
    """Return the gradients reduced together, bucket by bucket: a bucket is reduced when the next gradient does not fit.
    A gradient larger than the bucket is reduced by itself."""
    out: list[list[int]] = []
    filled = 0
    for i in order:
        if not out or filled + sizes[i] > bucket:
            out.append([])
            filled = 0
        out[-1].append(i)
        filled += sizes[i]
    return out


def _copied(weights: Iterable[tuple[int, int]], partition_size: int, bucket: int) -> int:
    """Return the most elements copied at once when a full bucket is reduced in stages 1 and 2.

    Slices are copied rank by rank until they fill a bucket. A single slice is reduced in place.
    """
    slices: list[list[int]] = []  # first rank, elements of its slice, number of consecutive ranks with equal slices
    for start, numbers in weights:
        at, end = start, start + numbers
        while at < end:
            rank, ranks = at // partition_size, 1 if at % partition_size else max(1, (end - at) // partition_size)
            until = min(end, (rank + ranks) * partition_size)
            if slices and slices[-1][0] == rank:
                slices[-1][1] += until - at
            else:
                slices.append([rank, (until - at) // ranks, ranks])
            at = until
    most = held = count = 0
    for _, numbers, times in slices:
        left = times
        while left:
            added = min(left, (bucket - held) // numbers + 1)  # until the bucket is full
            held, count, left = held + added * numbers, count + added, left - added
            most = max(most, held if count > 1 else 0)
            if held > bucket:
                held = count = 0
                full = bucket // numbers + 1  # further buckets of equal slices are like this one
                left = min(left, full + left % full)
    return most


class ZeroSharding(Sharding):
    """One of the ranks that DeepSpeed shards a run among; here stages 1 and 2, which keep all weights on every rank."""

    replaces_gradients: ClassVar[bool] = True
    saves_from_host: ClassVar[bool] = True

    def __init__(self, run: Structure) -> None:
        super().__init__(run)
        self.knobs = run.ranks.knobs
        self.stage = STAGES[run.ranks.strategy]
        self.sends_gradients = self.stage > 1

    @cached_property
    def dtype(self) -> str:
        """The dtype of trained weights: DeepSpeed casts the entire model to one."""
        return next(w.dtype for w, _, _ in weights_of(self.graph) if w.trains)

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """The elements of each trainable weight, and the number of layers that have one like it."""
        _, axes = operations_of(self.graph)
        return [(elements(w, axes), copies) for w, copies, _ in weights_of(self.graph) if w.requires_grad]

    @cached_property
    def partition(self) -> int:
        """The elements of the rank's partition of the trained weights, with padding."""
        return ALIGNMENT * part(sum(n * copies for n, copies in self.sizes), ALIGNMENT * self.ranks.world)

    @property
    def updated_at_once(self) -> int:
        """The elements that the optimizer updates at once."""
        return self.partition

    @cached_property
    def reduction(self) -> Reduction:
        """The memory for reducing gradients."""
        return _reduction(self.graph, self.ranks, self.partition)

    def group(self, kind: str, what: str, numbers: int, dtype: str, where: str = "", copies: int = 1) -> TensorGroup:
        """Return a group of tensors of `numbers` elements."""
        return tensor_group(kind, what, numbers, dtype, self.ranks.row.source, where, copies)

    def weights(self) -> Iterator[TensorGroup]:
        """Yield weights, buffers and the fp32 partition of the weights."""
        yield from super().weights()
        yield from self.master()

    def master(self) -> Iterator[TensorGroup]:
        """Yield the fp32 partition of the weights."""
        if not self.knobs.optimizer:
            yield self.group("parameter", "fp32 partition of the weights", self.partition, "fp32")

    def trained(self) -> list[Parameter]:
        """Return the parameter passed to the optimizer: the partition."""
        return [Parameter("partition", (self.partition,), "fp32")]

    def gradients(self) -> Iterator[TensorGroup]:
        """Yield the gradients that the optimizer step reads, if it runs on the GPU."""
        if not self.knobs.optimizer:
            yield self.group("gradient", "fp32 gradient of the partition", self.updated_at_once, "fp32")

    def reduced_gradients(self) -> Iterator[TensorGroup]:
        """Yield the reduced gradients that are whole, if they stay on the GPU."""
        if not self.knobs.optimizer:
            yield self.group("gradient", "reduced gradients", self.reduction.owned, self.dtype)

    def gradient_conversion(self) -> Iterator[TensorGroup]:
        """Yield the reduced gradients and their flattened copy while the fp32 gradient partition is built."""
        yield from self.reduced_gradients()
        if self.dtype != "fp32" and not self.knobs.optimizer:
            yield self.group("temp", "reduced gradients, flattened", self.updated_at_once, self.dtype)

    def accumulated(self) -> Iterator[TensorGroup]:
        """Yield the gradients that a later micro-batch finds: whole in stage 1, reduced in stage 2. Offloaded reduced
        gradients are in host memory."""
        return Sharding.gradients(self) if self.stage == 1 else self.reduced_gradients()

    def optimizer(self) -> OptimizerMemory:
        memory = super().optimizer()
        return stepped_on_host(memory) if self.knobs.optimizer else memory

    def clipping(self) -> int:
        return sum(h.bytes for h in self.gradient_conversion())

    def reduction_buffers(self) -> Iterable[TensorGroup]:
        return super().reduction_buffers() or self._buffers()

    def _buffers(self) -> Iterator[TensorGroup]:
        """Yield what gradient reduction holds throughout: with the optimizer offloaded, a buffer for the largest
        gradient."""
        if self.knobs.optimizer:
            yield self.group("other", "buffer of the largest gradient", max(weight_sizes(self.graph)), self.dtype)

    def held_in(self, phase: str) -> Iterator[TensorGroup]:
        """Yield what exists during a phase of a pass.

        A bucket is copied once to be reduced. Stage 1 does that when backward is over, other stages as soon as the
        bucket is full, so the reduced gradients of the rank with the last layers exist early.
        """
        if phase != "backward":
            return
        yield from self._buckets()
        yield self.group("temp", "bucket as it is reduced", self.reduction.waiting, self.dtype)
        if self.knobs.optimizer:
            yield self.group("temp", "a reduced gradient on its way to the host", self._offload_temporaries(), "uint8")

    def _buckets(self) -> Iterator[TensorGroup]:
        knobs = self.knobs
        if knobs.contiguous or knobs.optimizer:
            copies = 1 + knobs.overlaps
            yield self.group("other", "bucket of gradients", knobs.reduce_bucket, self.dtype, copies=copies)
        yield from self.reduced_gradients()

    def reduction_streams(self) -> Iterator[tuple[int, int]]:
        """Yield the stream and bytes of each tensor that `held_in` yields for backward, without gathered weights.

        With `overlap_comm` gradients are reduced on a separate stream, and in stage 2 the results stay in that stream's
        pool. A waiting gradient was allocated on the compute stream.
        """
        item, reducing = ITEMSIZE[self.dtype], REDUCING if self.knobs.overlaps else COMPUTING
        for held in self._buckets():
            stream = reducing if held.kind == "gradient" and self.stage == 2 else COMPUTING
            yield from [(stream, int(held.shape) * item)] * held.copies
        yield COMPUTING, self._waiting_elements() * item
        yield reducing, self.reduction.copied * item
        if self.knobs.optimizer:
            yield reducing, self._offload_temporaries()

    def late_gradients(self) -> frozenset[str]:
        """Return the names of weights outside of blocks whose gradients exceed the bucket. Each gradient waits where it
        was computed until the next one triggers its reduction."""
        if self.stage < 2 or not self.knobs.contiguous:
            return frozenset()
        _, axes = operations_of(self.graph)
        large = (w for w, _, block in weights_of(self.graph) if w.trains and not block)
        return frozenset(w.name for w in large if elements(w, axes) > self.knobs.reduce_bucket)

    def _waiting_elements(self) -> int:
        """Return the waiting elements of gradients that are not late."""
        if not self.knobs.contiguous:
            return self.reduction.waits
        _, axes = operations_of(self.graph)
        inside = (elements(w, axes) for w, _, block in weights_of(self.graph) if w.trains and block)
        return max((numbers for numbers in inside if numbers > self.knobs.reduce_bucket), default=0)

    def idle_in_streams(self) -> int:
        gathering = self.gathering()
        gathered = gathering.bytes if gathering.stream else 0
        return gathered + sum(bytes_ for stream, bytes_ in self.reduction_streams() if stream)

    def _offload_temporaries(self) -> int:
        """Return the temporary bytes to offload a reduced gradient, whose norm is computed in fp64."""
        return 8 * min(max(weight_sizes(self.graph)), self.partition)

    def own_loading_events(self, together: bool) -> Iterable[tuple[int, int]]:
        """Return what loading allocates and frees: loaded trained weights are flattened."""
        tape = LoadingTape(operations_of(self.graph)[1])
        whole = [number for number, w in load(self.graph, tape).items() if w.requires_grad]
        tape.empty_cache()
        if self.knobs.flattens:
            tape.alloc(self.partition * self.ranks.world, self.dtype)
            tape.free(*whole)
        else:
            tape.free(*whole)
            tape.empty_cache()
            tape.alloc(self.partition * self.ranks.world, self.dtype)
        self.record_masters(tape, (self.partition,), self.dtype)
        return tape.events

    def record_masters(self, tape: LoadingTape, groups: Sequence[int], dtype: str) -> None:
        """Record that the fp32 partition is made from a copy, group by group, and the optimizer is initialised with
        zero gradients."""
        for numbers in groups:
            copied = tape.alloc(numbers, dtype)
            if not self.knobs.optimizer:
                tape.alloc(numbers, "fp32")
            tape.free(copied)
        if not self.knobs.optimizer:
            tape.free(tape.alloc(max(groups), "fp32"))

    def on_gpu(self, room: int) -> Structure:
        """Return the run on GPUs with `room` usable bytes: weights are flattened there if it can hold a second copy of
        the trained ones, else on the host.

        Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py (flatten_on_accelerator).
        """
        copy = sum(n * copies for n, copies in self.sizes) * ITEMSIZE[self.dtype]
        flattens = total_bytes(super().weights()) + copy <= room
        return self.run._replace(ranks=self.ranks._replace(knobs=self.knobs._replace(flattens=flattens)))

    def host(self) -> Iterator[TensorGroup]:
        """Yield what a rank holds in host memory, including the optimizer's states, rounded as torch allocates it.

        torch rounds pinned memory up to a power of two. The fp32 partition is pinned only below stage 3; states never
        are. Source also: DeepSpeed ops/adam/cpu_adam.py.
        """
        if not self.knobs.optimizer:
            return
        yield from self._optimizer_on_host()
        for state in self.memory_of(self.trained()).states if self.knobs.optimizer != "nvme" else ():
            bytes_ = ITEMSIZE[state.dtype] * self.partition if state.shape else 0
            if bytes_:
                shape, source = str(self.partition), self.ranks.row.source
                yield TensorGroup("optstate", state.what, "", shape, state.dtype, state.count, bytes_, source)

    def _optimizer_on_host(self) -> Iterator[TensorGroup]:
        pinned, dtype = self.knobs.pins[0], self.dtype
        yield self.on_host("fp32 partition of the weights", self.partition, "fp32", pinned)
        yield self.on_host("fp32 gradient of the partition", self.partition, "fp32", pinned)
        yield self.on_host("partition as it goes back to the GPU", self.partition, dtype, pinned)
        yield self.on_host("buffer of the largest gradient", max(weight_sizes(self.graph)), dtype, pinned)
        if self.run.accumulates:
            yield self.on_host("gradients of earlier micro-batches", self.reduction.owned, dtype, pinned)

    def on_host(self, what: str, numbers: int, dtype: str, pinned: bool, copies: int = 1) -> TensorGroup:
        """Return a group of tensors of `numbers` elements in host memory."""
        bytes_, source = numbers * ITEMSIZE[dtype], self.ranks.row.source
        if pinned:
            what, bytes_ = f"{what}, pinned", pinned_bytes(bytes_)
        return TensorGroup("other", what, "", str(numbers), dtype, copies, bytes_, source)
