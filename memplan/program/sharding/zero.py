"""Memory of a rank under DeepSpeed ZeRO, on its GPU and in host memory.

Trained weights are flattened, and each rank has an fp32 copy of its partition of them, which the optimizer updates.
Gradients are copied into a bucket as they are computed, and reduced when it is full. If the optimizer is offloaded, the
fp32 copy, its gradient and the states are in host memory, and each reduced gradient is copied there at once.

Left out: transformers' Trainer has two parameter groups, with and without weight decay, each with its own padding.

Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py, stage3.py, partition_parameters.py and
partitioned_param_coordinator.py, comm/coalesced_collectives.py, swap_tensor/.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from memplan.catalogue.optimizers.parameter_rules import Parameter
from memplan.catalogue.optimizers.states import State
from memplan.catalogue.parallelism.sharding import ALIGNMENT, STAGES, part
from memplan.core.ir import Weight
from memplan.core.units import ITEMSIZE, gib
from memplan.engine.lower import COMPUTING, GATHERING, REDUCING
from memplan.engine.walk import size
from memplan.program.graph import Graph, TensorGroup, elements, operations_of, parameters_of, weights_of
from memplan.program.loading import EMPTIED, in_order, loading
from memplan.program.sharding.ranks import Ranks, is_scale, numbers_of
from memplan.program.sharding.zero3_prefetch import Gathering, gathered, gathered_peak

NORM_CHUNK = 250_000_000  # elements of one norm computation in stage 3: _constant_buffered_norm2


def stage(ranks: Ranks) -> int:
    """Return the ZeRO stage: 1, 2 or 3, or 0 if DeepSpeed shards nothing."""
    return STAGES.get(ranks.strategy, 0) if ranks.world > 1 else 0


def partition(graph: Graph, ranks: Ranks) -> int:
    """Return the number of elements of a rank's partition of the trained weights, with padding."""
    _, axes = operations_of(graph)
    sizes = [(elements(w, axes), copies) for w, copies, _ in weights_of(graph) if w.trains]
    if stage(ranks) == 3:
        return sum(part(numbers, ranks.world) * copies for numbers, copies in sizes)
    return ALIGNMENT * part(sum(n * copies for n, copies in sizes), ALIGNMENT * ranks.world)


def _trained_elements(graph: Graph) -> tuple[int, str]:
    """Return the number of trained elements, and their dtype. DeepSpeed casts the entire model to one dtype."""
    _, axes = operations_of(graph)
    weights = [(elements(w, axes) * copies, w.dtype) for w, copies, _ in weights_of(graph) if w.trains]
    return sum(n for n, _ in weights), weights[0][1]


@lru_cache(maxsize=128)
def _weight_sizes(graph: Graph) -> tuple[int, ...]:
    """Return the number of elements of each trained weight, in the model's order."""
    _, axes = operations_of(graph)
    cached: dict[int, int] = {}
    return tuple(cached.setdefault(id(w), elements(w, axes)) for w in in_order(graph) if w.trains)


class _Reduction(NamedTuple):
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


@lru_cache(maxsize=256)
def _reduction(graph: Graph, ranks: Ranks) -> _Reduction:
    """Return the memory for reducing gradients, by filling buckets with the gradients from the last weight on."""
    sizes, knobs, world = _weight_sizes(graph), ranks.knobs, ranks.world
    if stage(ranks) == 3:
        flushes = _fills(range(len(sizes))[::-1], sizes, knobs.reduce_bucket)
        return _peaks(0, [_scattered(f, sizes, ranks) for f in flushes])
    order = range(len(sizes))
    if knobs.round_robin:
        order = [i for rank in range(min(world, len(sizes))) for i in range(rank, len(sizes), world)]
    starts = dict(zip(order, (0, *accumulate(sizes[i] for i in order)), strict=False))
    partition_size = partition(graph, ranks)
    flushes = _fills(range(len(sizes))[::-1], sizes, knobs.reduce_bucket)
    of_flushes: list[tuple[int, int]] = []
    for flush in flushes:
        numbers = sum(sizes[i] for i in flush)
        is_oversized = numbers > knobs.reduce_bucket
        waits = numbers if stage(ranks) == 2 and (is_oversized or not knobs.contiguous) else 0
        if not knobs.contiguous:  # all gradients of a bucket together
            copied = numbers if len(flush) > 1 else 0
        else:
            copied = _copied(((starts[i], sizes[i]) for i in flush), partition_size, knobs.reduce_bucket)
        of_flushes.append((waits, copied))
    return _peaks(_most_owned(starts, sizes, partition_size), of_flushes)


def _peaks(owned: int, flushes: list[tuple[int, int]]) -> _Reduction:
    """Return the peaks over all flushes, each given as waiting and copied elements."""
    peak = max(map(sum, flushes))
    return _Reduction(owned, peak, max(waits for waits, _ in flushes), max(copied for _, copied in flushes))


def _most_owned(starts: Mapping[int, int], sizes: Sequence[int], partition_size: int) -> int:
    """Return the elements of all weights that overlap a partition of `own` elements, for the rank with most."""
    owned: dict[int, int] = {}
    for i, start in starts.items():  # a rank strictly inside a weight overlaps no other weight
        for rank in {start // partition_size, (start + sizes[i] - 1) // partition_size}:
            owned[rank] = owned.get(rank, 0) + sizes[i]
    return max(owned.values())


def _fills(order: Iterable[int], sizes: tuple[int, ...], bucket: int) -> list[list[int]]:
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


def _scattered(flush: list[int], sizes: tuple[int, ...], ranks: Ranks) -> tuple[int, int]:
    """Return the elements waiting outside the bucket in stage 3, and those of the copy being reduced. A single weight
    that divides evenly is reduced without a copy."""
    numbers = sum(sizes[i] for i in flush)
    waits = numbers if numbers > ranks.knobs.reduce_bucket or not ranks.knobs.contiguous else 0
    if len(flush) == 1 and not numbers % ranks.world:
        return waits, 0
    return waits, sum(part(sizes[i], ranks.world) for i in flush) * ranks.world


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


def parameters(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield weights, buffers and the fp32 partition of the weights.

    In stage 3 small weights stay whole in addition to their part. The scales of 4-bit weights are not parameters and
    stay whole too.
    """
    source, knobs = ranks.row.source, ranks.knobs
    if stage(ranks) < 3:
        yield from parameters_of(graph)
    else:
        yield from _stage_3_weights(graph, ranks)
        yield from (held for held in parameters_of(graph) if held.kind == "buffer" or is_scale(held))
    if not knobs.optimizer:
        yield _held("parameter", "fp32 partition of the weights", "", partition(graph, ranks), "fp32", 1, source)


def _stage_3_weights(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    _, axes = operations_of(graph)
    for w, copies, block in weights_of(graph):
        if w.group == "buffer":
            continue
        numbers, dtype = numbers_of(w, axes, ranks.storage)
        kinds = [] if ranks.knobs.parameters else [(f"one of {ranks.world} parts", part(numbers, ranks.world))]
        if numbers <= ranks.knobs.persistent:
            kinds.append(("whole", numbers))
        for kind, count in kinds:
            what = f"{w.name}, {kind}"
            yield _held("parameter", what, block.rstrip("."), count, dtype, copies, ranks.row.source)


def trained(graph: Graph, ranks: Ranks) -> list[Parameter]:
    """Return the parameter passed to the optimizer: the partition."""
    return [Parameter("partition", (partition(graph, ranks),), "fp32")]


def in_sub_group(graph: Graph, ranks: Ranks) -> int:
    """Return the elements that the optimizer updates at once: the partition, or in stage 3 a sub-group of it."""
    return max(_sub_groups(graph, ranks)) if stage(ranks) == 3 else partition(graph, ranks)


def stepping(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield the gradients that the optimizer step reads, if it runs on the GPU."""
    if not ranks.knobs.optimizer:
        numbers = in_sub_group(graph, ranks)
        yield _held("gradient", "fp32 gradient of the partition", "", numbers, "fp32", 1, ranks.row.source)


def converting(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield the temporaries while the fp32 gradient partition is built: the reduced gradients and their flattened
    copy."""
    _, dtype = _trained_elements(graph)
    if ranks.knobs.optimizer:
        return
    flat = in_sub_group(graph, ranks)
    if stage(ranks) < 3:
        owned = _reduction(graph, ranks).owned
        yield _held("gradient", "reduced gradients", "", owned, dtype, 1, ranks.row.source)
    if dtype != "fp32":
        yield _held("temp", "reduced gradients, flattened", "", flat, dtype, 1, ranks.row.source)


def accumulated(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield the gradients that a later micro-batch finds: in stage 2 the reduced gradients.

    In stage 3 they are in `reducing`. In stage 1 they are whole, and not counted here. Offloaded, they are in host
    memory.
    """
    if stage(ranks) == 2 and not ranks.knobs.optimizer:
        _, dtype = _trained_elements(graph)
        owned = _reduction(graph, ranks).owned
        yield _held("gradient", "reduced gradients", "", owned, dtype, 1, ranks.row.source)


def reducing(graph: Graph, ranks: Ranks) -> Iterator[TensorGroup]:
    """Yield what gradient reduction holds throughout: in stage 3 the partition of gradients and the bucket; in lower
    stages with the optimizer offloaded, a buffer for the largest gradient."""
    _, dtype = _trained_elements(graph)
    knobs, source = ranks.knobs, ranks.row.source
    if stage(ranks) == 3:
        if not knobs.optimizer:
            yield _held("gradient", "reduced gradients", "", partition(graph, ranks), dtype, 1, source)
        if knobs.contiguous:
            yield _held("other", "bucket of gradients", "", knobs.reduce_bucket, dtype, 1, source)
    elif knobs.optimizer:
        yield _held("other", "buffer of the largest gradient", "", max(_weight_sizes(graph)), dtype, 1, source)


def held_in_phase(graph: Graph, ranks: Ranks, phase: str) -> Iterator[TensorGroup]:
    """Yield what exists during a phase of a pass.

    A bucket is copied once to be reduced. Stage 1 does that when backward is over, other stages as soon as the bucket
    is full, so the reduced gradients of the rank with the last layers exist early. In stage 3 the weights in use and
    the prefetched ones are whole (`memplan.program.sharding.zero3_prefetch`).
    """
    source, knobs = ranks.row.source, ranks.knobs
    _, dtype = _trained_elements(graph)
    if stage(ranks) == 3:
        peak = gathered_peak(graph, ranks)[phase]
        yield _in_bytes("parameter", "gathered weights", peak.weights, source)
        yield _in_bytes("temp", "weights as the all-gather writes them", peak.written, source)
    if phase != "backward":
        return
    reduction = _reduction(graph, ranks)
    if stage(ranks) < 3:
        if knobs.contiguous or knobs.optimizer:
            count = 1 + knobs.overlaps
            yield _held("other", "bucket of gradients", "", knobs.reduce_bucket, dtype, count, source)
        if not knobs.optimizer:
            yield _held("gradient", "reduced gradients", "", reduction.owned, dtype, 1, source)
    yield _held("temp", "bucket as it is reduced", "", reduction.waiting, dtype, 1, source)
    if knobs.optimizer:
        copied = _offload_temporaries(graph, ranks, dtype)
        yield _in_bytes("temp", "a reduced gradient on its way to the host", copied, source)


def on_streams(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int]]:
    """Yield the stream and bytes of each tensor that `passing` yields in backward, without gathered weights.

    With `overlap_comm` gradients are reduced on a separate stream, and in stage 2 the results stay in that stream's
    pool. A waiting gradient was allocated on the compute stream.
    """
    knobs, at = ranks.knobs, stage(ranks)
    _, dtype = _trained_elements(graph)
    reduction, item = _reduction(graph, ranks), ITEMSIZE[dtype]
    reducing = REDUCING if knobs.overlaps else COMPUTING
    if at < 3:
        if knobs.contiguous or knobs.optimizer:
            yield from [(COMPUTING, knobs.reduce_bucket * item)] * (1 + knobs.overlaps)
        if not knobs.optimizer:
            yield (reducing if at == 2 else COMPUTING), reduction.owned * item
    yield COMPUTING, _waiting_elements(graph, ranks, reduction.waits) * item
    yield reducing, reduction.copied * item
    if knobs.optimizer:
        yield reducing, _offload_temporaries(graph, ranks, dtype)


def late(graph: Graph, ranks: Ranks) -> frozenset[str]:
    """Return the names of weights outside of blocks whose gradients exceed the bucket. Each gradient waits where it was
    computed until the next one triggers its reduction."""
    if stage(ranks) < 2 or not ranks.knobs.contiguous:
        return frozenset()
    _, axes = operations_of(graph)
    large = (w for w, _, block in weights_of(graph) if w.trains and not block)
    return frozenset(w.name for w in large if elements(w, axes) > ranks.knobs.reduce_bucket)


def _waiting_elements(graph: Graph, ranks: Ranks, waits: int) -> int:
    """Return the waiting elements of gradients that are not `late`."""
    if not ranks.knobs.contiguous:
        return waits
    _, axes = operations_of(graph)
    inside = (elements(w, axes) for w, _, block in weights_of(graph) if w.trains and block)
    return max((numbers for numbers in inside if numbers > ranks.knobs.reduce_bucket), default=0)


def gathering(graph: Graph, ranks: Ranks) -> tuple[int, Gathering] | None:
    """Return the stream that stage 3 gathers weights on, and its allocations in a pass; None in other stages."""
    if stage(ranks) < 3:
        return None
    return (GATHERING if ranks.knobs.overlaps else COMPUTING), gathered(graph, ranks)


def _offload_temporaries(graph: Graph, ranks: Ranks, dtype: str) -> int:
    """Return the temporary bytes to offload a reduced gradient, whose norm is computed in fp64. Stage 3 copies it to
    the host and back first."""
    if stage(ranks) == 3:
        largest = part(max(_weight_sizes(graph)), ranks.world)
        return largest * ITEMSIZE[dtype] + max(8 * min(largest, NORM_CHUNK), 4 * largest)
    return 8 * min(max(_weight_sizes(graph)), partition(graph, ranks))


def loading_events(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int]]:
    """Yield what loading allocates and frees (see `memplan.program.loading.loading`).

    Below stage 3 trained weights are flattened. In stage 3 each weight is sharded as it is loaded, or once the entire
    model is on the GPU; then the parts of trained weights are flattened via the host.
    """
    numbers = itertools.count()
    _, dtype = _trained_elements(graph)
    if stage(ranks) == 3:
        yield from _sharding_events(graph, ranks, numbers)
        if not ranks.knobs.parameters:
            yield next(numbers), size(str(partition(graph, ranks)), dtype, {})[1]
    else:
        last, ends = 0, dict[int, Weight]()
        for last, bytes_ in loading(graph, ends):
            yield last, bytes_
        numbers = itertools.count(last + 1)
        frees = [(number, 0) for number, w in ends.items() if w.trains]
        flat = (next(numbers), size(str(partition(graph, ranks) * ranks.world), dtype, {})[1])
        yield EMPTIED, 0
        yield from [flat, *frees] if ranks.knobs.flattens else [*frees, (EMPTIED, 0), flat]
    yield from _masters(graph, ranks, numbers)


def _masters(graph: Graph, ranks: Ranks, numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Yield the events that create the fp32 partition and initialise the optimizer with zero gradients.

    The partition is made from a copy: below stage 3 in the weights' dtype, in stage 3 in fp32, one sub-group after
    another.
    """
    _, dtype = _trained_elements(graph)
    on_gpu, at = not ranks.knobs.optimizer, stage(ranks)
    groups = _sub_groups(graph, ranks) if at == 3 else (partition(graph, ranks),)

    def bytes_of(count: int, kind: str = "fp32") -> int:
        return size(str(count), kind, {})[1]

    for count in groups:
        copied = next(numbers)
        if at < 3 or on_gpu:
            yield copied, bytes_of(count, "fp32" if at == 3 else dtype)
        if on_gpu:
            yield next(numbers), bytes_of(count)
        if at < 3 or on_gpu:
            yield copied, 0
    if on_gpu:
        zeros = next(numbers)
        yield zeros, bytes_of(max(groups))
        yield zeros, 0


def flattens(graph: Graph, room: int) -> bool:
    """Whether a GPU with `room` bytes can hold the weights and a second copy of the trained ones.

    Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py (flatten_on_accelerator).
    """
    trained, dtype = _trained_elements(graph)
    return sum(h.bytes * h.copies for h in parameters_of(graph)) + trained * ITEMSIZE[dtype] <= room


def _sharding_events(graph: Graph, ranks: Ranks, numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Yield the events that load each weight and cut out the rank's part. Trained parts move to the host at the end."""
    _, axes = operations_of(graph)
    knobs = ranks.knobs
    weights = list(in_order(graph))
    loaded: dict[int, int] = {}

    def load(i: int, w: Weight) -> Iterator[tuple[int, int]]:
        scales = [t for t in w.stored if t.name != "packed"]
        for t in scales:
            yield next(numbers), size(t.shape, t.dtype, axes)[1]
        loaded[i] = next(numbers)
        count, dtype = numbers_of(w, axes, ranks.storage)
        yield loaded[i], size(str(count), dtype, {})[1]

    if not knobs.divides_loading:
        for i, w in enumerate(weights):
            yield from load(i, w)
    trained_parts: list[int] = []
    for i, w in enumerate(weights):
        count, dtype = numbers_of(w, axes, ranks.storage)
        if i not in loaded:
            yield from load(i, w)
        if w.group == "buffer":
            continue
        if not knobs.parameters:
            local = next(numbers)
            yield local, size(str(part(count, ranks.world)), dtype, {})[1]
            if w.trains:
                trained_parts.append(local)
        if count <= knobs.persistent:
            yield next(numbers), size(str(count), dtype, {})[1]
        yield loaded[i], 0
    for local in trained_parts:
        yield local, 0
    yield EMPTIED, 0


def in_host_memory(graph: Graph, ranks: Ranks, states: Iterable[State], accumulates: bool) -> Iterator[TensorGroup]:
    """Yield what a rank holds in host memory, including the optimizer's `states`, rounded as torch allocates it.

    torch rounds pinned memory up to a power of two. The fp32 partition is pinned only below stage 3; states never are.
    Source also: torch 2.13 ATen/core/CachingHostAllocator.h; DeepSpeed ops/adam/cpu_adam.py.
    """
    knobs, source = ranks.knobs, ranks.row.source
    pinned, pinned_parameters = knobs.pins
    numbers, (_, dtype) = partition(graph, ranks), _trained_elements(graph)
    count, buffers, buffer, in_memory = knobs.swaps
    if knobs.optimizer and stage(ranks) == 3:
        yield _on_host("reduced gradients", numbers, dtype, pinned, source)
        if knobs.optimizer == "nvme":
            sub_group = in_sub_group(graph, ranks)
            yield _on_host("buffer of a sub-group on NVMe", sub_group, "fp32", False, source)._replace(copies=count)
        else:
            for group in _sub_groups(graph, ranks):
                yield _on_host("fp32 gradient of a sub-group", group, "fp32", pinned, source)
            yield _on_host("fp32 partition of the weights", numbers, "fp32", False, source)
    elif knobs.optimizer:
        yield _on_host("fp32 partition of the weights", numbers, "fp32", pinned, source)
        yield _on_host("fp32 gradient of the partition", numbers, "fp32", pinned, source)
        yield _on_host("partition as it goes back to the GPU", numbers, dtype, pinned, source)
        yield _on_host("buffer of the largest gradient", max(_weight_sizes(graph)), dtype, pinned, source)
        if accumulates:
            owned = _reduction(graph, ranks).owned
            yield _on_host("gradients of earlier micro-batches", owned, dtype, pinned, source)
    if knobs.optimizer and knobs.optimizer != "nvme":
        for state in states:
            bytes_ = ITEMSIZE[state.dtype] * numbers if state.shape else 0
            if bytes_:
                yield TensorGroup("optstate", state.what, "", str(numbers), state.dtype, state.count, bytes_, source)
    if knobs.parameters:
        _, axes = operations_of(graph)
        frozen = [(w, n) for w, n, _ in weights_of(graph) if not w.trains and w.group != "buffer"]
        kept = min(numbers, in_memory) if knobs.parameters == "nvme" else numbers
        if kept:
            yield _on_host("weights' parts", kept, dtype, True, source)
        if knobs.parameters == "nvme":
            yield _on_host("buffers of parts on NVMe", buffers * buffer, dtype, True, source)
        else:
            for w, n in frozen:
                local = part(elements(w, axes), ranks.world)
                held = _on_host(f"{w.name}, one of {ranks.world} parts", local, w.dtype, pinned_parameters, source)
                yield held._replace(copies=n)


@lru_cache(maxsize=256)
def _sub_groups(graph: Graph, ranks: Ranks) -> tuple[int, ...]:
    """Return the elements of each sub-group, which takes weights' parts until it reaches its size."""
    numbers, most = partition(graph, ranks), ranks.knobs.sub_group
    if most >= numbers:
        return (numbers,)
    out, filled = list[int](), 0
    for weight in _weight_sizes(graph):
        filled += part(weight, ranks.world)
        if filled >= most:
            out.append(filled)
            filled = 0
    return (*out, filled) if filled else tuple(out)


def host_notes(ranks: Ranks, held: Iterable[TensorGroup], node: int) -> Iterator[str]:
    """Yield a note on host memory under DeepSpeed or FSDP, which the `node` ranks of a node share, if any is used."""
    node = min(ranks.world, node)
    rows = sorted(held, key=lambda h: -h.bytes * h.copies)
    if rows:
        by_name: dict[str, int] = {}
        for h in rows:
            what = h.what if stage(ranks) else _KINDS[h.kind]
            by_name[what] = by_name.get(what, 0) + h.bytes * h.copies
        total = sum(by_name.values())
        largest = "; ".join(f"{what} {gib(bytes_)}" for what, bytes_ in [*by_name.items()][:5])
        yield f"host memory: {gib(total)} a rank, {gib(node * total)} for {node} ranks of a node: {largest}"


_KINDS = {
    "parameter": "parts of weights, pinned",
    "gradient": "parts of gradients, pinned",
    "optstate": "the optimizer's states",
    "temp": "what the update makes",
}


def _on_host(what: str, numbers: int, dtype: str, pinned: bool, source: str) -> TensorGroup:
    bytes_ = numbers * ITEMSIZE[dtype]
    if pinned:
        bytes_ = 1 << (bytes_ - 1).bit_length()
    return TensorGroup("other", f"{what}, pinned" if pinned else what, "", str(numbers), dtype, 1, bytes_, source)


def _held(kind: str, what: str, where: str, numbers: int, dtype: str, copies: int, source: str) -> TensorGroup:
    return TensorGroup(kind, what, where, str(numbers), dtype, copies, size(str(numbers), dtype, {})[1], source)


def _in_bytes(kind: str, what: str, bytes_: int, source: str) -> TensorGroup:
    return _held(kind, what, "", bytes_, "uint8", 1, source)
