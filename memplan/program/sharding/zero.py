"""What a rank holds under DeepSpeed's ZeRO, and when, on its GPU and in host memory.

Weights that train are flattened, and each rank has an fp32 copy of its partition of them, which the optimizer works on.
Gradients are copied into a bucket as they come, and reduced when it is full. With the optimizer offloaded, that copy,
its gradient and the states are in host memory, and a reduced gradient goes there as it comes.

Left out: transformers' Trainer has two groups of parameters, with weight decay and without, each with its own padding.

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
from memplan.program.graph import Graph, Held, built, elements, parameters_of, weights_of
from memplan.program.loading import EMPTIED, in_order, loading
from memplan.program.sharding.ranks import Ranks, beside, numbers_of
from memplan.program.sharding.zero3_prefetch import Gathering, gathered, whole

NORM_CHUNK = 250_000_000  # numbers whose norm is taken at once at stage 3: _constant_buffered_norm2


def stage(ranks: Ranks) -> int:
    """1, 2 or 3; 0 where DeepSpeed divides nothing."""
    return STAGES.get(ranks.strategy, 0) if ranks.world > 1 else 0


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


@lru_cache(maxsize=128)
def _each(graph: Graph) -> tuple[int, ...]:
    """How many numbers each weight that trains has, in the model's order."""
    _, axes = built(graph)
    of: dict[int, int] = {}
    return tuple(of.setdefault(id(w), elements(w, axes)) for w in in_order(graph) if w.trains)


class _Reduced(NamedTuple):
    """What reducing takes, in numbers.

    owned    at stages 1 and 2: of all weights that a rank's partition has any of, of the rank with most: their
             gradients are kept whole
    waiting  the gradients that wait outside of a bucket until it is reduced, and the copy that is reduced, at the
             moment when both are most
    waits    the gradients alone, when they are most; `copied`, the copy
    """

    owned: int
    waiting: int
    waits: int
    copied: int


@lru_cache(maxsize=256)
def _reduced(graph: Graph, ranks: Ranks) -> _Reduced:
    """Run the buckets on the gradients: they come last weight first."""
    sizes, knobs, world = _each(graph), ranks.knobs, ranks.world
    if stage(ranks) == 3:
        flushes = _fills(range(len(sizes))[::-1], sizes, knobs.reduce_bucket)
        return _most_reduced(0, [_scattered(f, sizes, ranks) for f in flushes])
    laid = range(len(sizes))
    if knobs.round_robin:
        laid = [i for rank in range(min(world, len(sizes))) for i in range(rank, len(sizes), world)]
    starts = dict(zip(laid, (0, *accumulate(sizes[i] for i in laid)), strict=False))
    own = partition(graph, ranks)
    flushes = _fills(range(len(sizes))[::-1], sizes, knobs.reduce_bucket)
    found: list[tuple[int, int]] = []
    for flush in flushes:
        numbers = sum(sizes[i] for i in flush)
        alone = numbers > knobs.reduce_bucket
        waits = numbers if stage(ranks) == 2 and (alone or not knobs.contiguous) else 0
        if not knobs.contiguous:  # all of a bucket together
            copied = numbers if len(flush) > 1 else 0
        else:
            copied = _copied(((starts[i], sizes[i]) for i in flush), own, knobs.reduce_bucket)
        found.append((waits, copied))
    return _most_reduced(_most_owned(starts, sizes, own), found)


def _most_reduced(owned: int, each: list[tuple[int, int]]) -> _Reduced:
    """Of what waits and is copied each time that a bucket is reduced."""
    return _Reduced(owned, max(map(sum, each)), max(waits for waits, _ in each), max(copied for _, copied in each))


def _most_owned(starts: Mapping[int, int], sizes: Sequence[int], own: int) -> int:
    """The numbers of all weights that a partition of `own` numbers has any of, of the rank with most."""
    owned: dict[int, int] = {}
    for i, start in starts.items():  # ranks between the first and the last that have some of a weight have no other
        for rank in {start // own, (start + sizes[i] - 1) // own}:
            owned[rank] = owned.get(rank, 0) + sizes[i]
    return max(owned.values())


def _fills(order: Iterable[int], sizes: tuple[int, ...], bucket: int) -> list[list[int]]:
    """The gradients that are reduced together: a bucket that the next one does not fit into. A larger one is alone."""
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
    """What waits outside of a bucket at stage 3, and the copy that is reduced: one weight that divides has none."""
    numbers = sum(sizes[i] for i in flush)
    waits = numbers if numbers > ranks.knobs.reduce_bucket or not ranks.knobs.contiguous else 0
    if len(flush) == 1 and not numbers % ranks.world:
        return waits, 0
    return waits, sum(part(sizes[i], ranks.world) for i in flush) * ranks.world


def _copied(weights: Iterable[tuple[int, int]], own: int, bucket: int) -> int:
    """What a filled bucket is copied into to be reduced, at stages 1 and 2: slices of one rank after the other, as many
    as make a bucket. One slice alone is reduced where it is."""
    slices: list[list[int]] = []  # a rank, the numbers of its slice, and how many ranks from it on have as many
    for start, numbers in weights:
        at, end = start, start + numbers
        while at < end:
            rank, ranks = at // own, 1 if at % own else max(1, (end - at) // own)
            until = min(end, (rank + ranks) * own)
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
                full = bucket // numbers + 1  # every further bucket of equal slices is as this one
                left = min(left, full + left % full)
    return most


def parameters(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """Weights and buffers, and the fp32 partition of weights. At stage 3 small ones stay whole beside their part; the
    scales of 4-bit ones do too, which are no parameters."""
    source, knobs = ranks.row.source, ranks.knobs
    if stage(ranks) < 3:
        yield from parameters_of(graph)
    else:
        yield from _parts(graph, ranks)
        yield from (held for held in parameters_of(graph) if held.kind == "buffer" or beside(held))
    if not knobs.optimizer:
        yield _held("parameter", "fp32 partition of the weights", "", partition(graph, ranks), "fp32", 1, source)


def _parts(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    _, axes = built(graph)
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
    """What the optimizer is given: the partition."""
    return [Parameter("partition", (partition(graph, ranks),), "fp32")]


def in_sub_group(graph: Graph, ranks: Ranks) -> int:
    """How many numbers a step of the optimizer takes: at stage 3 a sub-group after the other."""
    return max(_sub_groups(graph, ranks)) if stage(ranks) == 3 else partition(graph, ranks)


def stepping(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The gradients that the optimizer's step reads, where it steps on the GPU."""
    if not ranks.knobs.optimizer:
        numbers = in_sub_group(graph, ranks)
        yield _held("gradient", "fp32 gradient of the partition", "", numbers, "fp32", 1, ranks.row.source)


def converting(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """What is there beside those while they are made: gradients as they were reduced, and flattened."""
    _, dtype = _trained(graph)
    if ranks.knobs.optimizer:
        return
    flat = in_sub_group(graph, ranks)
    if stage(ranks) < 3:
        owned = _reduced(graph, ranks).owned
        yield _held("gradient", "reduced gradients", "", owned, dtype, 1, ranks.row.source)
    if dtype != "fp32":
        yield _held("temp", "reduced gradients, flattened", "", flat, dtype, 1, ranks.row.source)


def accumulated(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """The gradients that a later micro-batch finds: at stage 2 the reduced ones, at stage 3 none but `reducing`. At
    stage 1 they are whole. Offloaded, they wait in host memory."""
    if stage(ranks) == 2 and not ranks.knobs.optimizer:
        _, dtype = _trained(graph)
        owned = _reduced(graph, ranks).owned
        yield _held("gradient", "reduced gradients", "", owned, dtype, 1, ranks.row.source)


def reducing(graph: Graph, ranks: Ranks) -> Iterator[Held]:
    """What is there throughout: at stage 3 the gradients' partition and the bucket they are copied into; with the
    optimizer offloaded, below it, a buffer of the largest gradient."""
    _, dtype = _trained(graph)
    knobs, source = ranks.knobs, ranks.row.source
    if stage(ranks) == 3:
        if not knobs.optimizer:
            yield _held("gradient", "reduced gradients", "", partition(graph, ranks), dtype, 1, source)
        if knobs.contiguous:
            yield _held("other", "bucket of gradients", "", knobs.reduce_bucket, dtype, 1, source)
    elif knobs.optimizer:
        yield _held("other", "buffer of the largest gradient", "", max(_each(graph)), dtype, 1, source)


def passing(graph: Graph, ranks: Ranks, phase: str) -> Iterator[Held]:
    """What is there in a phase of a pass.

    A bucket is copied once to be reduced. At stage 1 that is when backward is over, at the others as soon as it is
    full, and the reduced gradients of the rank whose layers come last are there early. At stage 3 weights are whole
    that are in use, or soon will be (`memplan.program.sharding.zero3_prefetch`).
    """
    source, knobs = ranks.row.source, ranks.knobs
    _, dtype = _trained(graph)
    if stage(ranks) == 3:
        found = whole(graph, ranks)[phase]
        yield _in_bytes("parameter", "gathered weights", found.weights, source)
        yield _in_bytes("temp", "weights as the all-gather writes them", found.written, source)
    if phase != "backward":
        return
    reduced = _reduced(graph, ranks)
    if stage(ranks) < 3:
        if knobs.contiguous or knobs.optimizer:
            count = 1 + knobs.overlaps
            yield _held("other", "bucket of gradients", "", knobs.reduce_bucket, dtype, count, source)
        if not knobs.optimizer:
            yield _held("gradient", "reduced gradients", "", reduced.owned, dtype, 1, source)
    yield _held("temp", "bucket as it is reduced", "", reduced.waiting, dtype, 1, source)
    if knobs.optimizer:
        yield _in_bytes("temp", "a reduced gradient on its way to the host", _leaving(graph, ranks, dtype), source)


def on_streams(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int]]:
    """What `passing` has in backward beside gathered weights, by the stream it is allocated on: stream and bytes.

    With `overlap_comm` gradients are reduced on a stream of its own, and at stage 2 what comes of it is kept in its
    pools; a gradient that waits was allocated where it was computed.
    """
    knobs, at = ranks.knobs, stage(ranks)
    _, dtype = _trained(graph)
    reduced, item = _reduced(graph, ranks), ITEMSIZE[dtype]
    reducing = REDUCING if knobs.overlaps else COMPUTING
    if at < 3:
        if knobs.contiguous or knobs.optimizer:
            yield from [(COMPUTING, knobs.reduce_bucket * item)] * (1 + knobs.overlaps)
        if not knobs.optimizer:
            yield (reducing if at == 2 else COMPUTING), reduced.owned * item
    yield COMPUTING, _waiting(graph, ranks, reduced.waits) * item
    yield reducing, reduced.copied * item
    if knobs.optimizer:
        yield reducing, _leaving(graph, ranks, dtype)


def late(graph: Graph, ranks: Ranks) -> frozenset[str]:
    """The weights outside of blocks whose gradients no bucket holds: each waits where it was made, until the next one
    comes and has it reduced."""
    if stage(ranks) < 2 or not ranks.knobs.contiguous:
        return frozenset()
    _, axes = built(graph)
    large = (w for w, _, block in weights_of(graph) if w.trains and not block)
    return frozenset(w.name for w in large if elements(w, axes) > ranks.knobs.reduce_bucket)


def _waiting(graph: Graph, ranks: Ranks, waits: int) -> int:
    """How many numbers wait of gradients that are not `late`."""
    if not ranks.knobs.contiguous:
        return waits
    _, axes = built(graph)
    inside = (elements(w, axes) for w, _, block in weights_of(graph) if w.trains and block)
    return max((numbers for numbers in inside if numbers > ranks.knobs.reduce_bucket), default=0)


def gathering(graph: Graph, ranks: Ranks) -> tuple[int, Gathering] | None:
    """At stage 3 the stream that weights are gathered on, and what is allocated there in a pass."""
    if stage(ranks) < 3:
        return None
    return (GATHERING if ranks.knobs.overlaps else COMPUTING), gathered(graph, ranks)


def _leaving(graph: Graph, ranks: Ranks, dtype: str) -> int:
    """Bytes that take a reduced gradient to the host: its norm is taken in fp64. At stage 3 it is copied to the host
    and back first."""
    if stage(ranks) == 3:
        largest = part(max(_each(graph)), ranks.world)
        return largest * ITEMSIZE[dtype] + max(8 * min(largest, NORM_CHUNK), 4 * largest)
    return 8 * min(max(_each(graph)), partition(graph, ranks))


def loading_events(graph: Graph, ranks: Ranks) -> Iterator[tuple[int, int]]:
    """What loading allocates and frees, see `memplan.program.loading.loading`: below stage 3 the weights that train are
    flattened; at stage 3 every weight is divided as it is loaded, or once the whole model is on the GPU, and then the
    parts of those that train are laid together by way of the host."""
    numbers = itertools.count()
    _, dtype = _trained(graph)
    if stage(ranks) == 3:
        yield from _dividing(graph, ranks, numbers)
        if not ranks.knobs.parameters:
            yield next(numbers), size(str(partition(graph, ranks)), dtype, {})[1]
    else:
        last, ends = 0, dict[int, Weight]()
        for last, bytes_ in loading(graph, ends):
            yield last, bytes_
        numbers = itertools.count(last + 1)
        gone = [(number, 0) for number, w in ends.items() if w.trains]
        flat = (next(numbers), size(str(partition(graph, ranks) * ranks.world), dtype, {})[1])
        yield EMPTIED, 0
        yield from [flat, *gone] if ranks.knobs.flattens else [*gone, (EMPTIED, 0), flat]
    yield from _masters(graph, ranks, numbers)


def _masters(graph: Graph, ranks: Ranks, numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """The fp32 partition is made of a copy: below stage 3 of one in the weights' dtype, at stage 3 of one in fp32, a
    sub-group after the other. To begin with the optimizer is given gradients of zeros."""
    _, dtype = _trained(graph)
    here, at = not ranks.knobs.optimizer, stage(ranks)
    groups = _sub_groups(graph, ranks) if at == 3 else (partition(graph, ranks),)

    def bytes_of(count: int, kind: str = "fp32") -> int:
        return size(str(count), kind, {})[1]

    for count in groups:
        copied = next(numbers)
        if at < 3 or here:
            yield copied, bytes_of(count, "fp32" if at == 3 else dtype)
        if here:
            yield next(numbers), bytes_of(count)
        if at < 3 or here:
            yield copied, 0
    if here:
        zeros = next(numbers)
        yield zeros, bytes_of(max(groups))
        yield zeros, 0


def flattens(graph: Graph, room: int) -> bool:
    """Whether a GPU with so many bytes has room for the weights and, of those that train, another copy.

    Source: DeepSpeed 0.19.8 runtime/zero/stage_1_and_2.py (flatten_on_accelerator).
    """
    trained, dtype = _trained(graph)
    return sum(h.bytes * h.copies for h in parameters_of(graph)) + trained * ITEMSIZE[dtype] <= room


def _dividing(graph: Graph, ranks: Ranks, numbers: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Every weight whole, and the rank's part of it; at last, parts that train are gone to the host."""
    _, axes = built(graph)
    knobs = ranks.knobs
    weights = list(in_order(graph))
    there: dict[int, int] = {}

    def bring(i: int, w: Weight) -> Iterator[tuple[int, int]]:
        scales = [t for t in w.stored if t.name != "packed"]
        for t in scales:
            yield next(numbers), size(t.shape, t.dtype, axes)[1]
        there[i] = next(numbers)
        count, dtype = numbers_of(w, axes, ranks.storage)
        yield there[i], size(str(count), dtype, {})[1]

    if not knobs.divides_loading:
        for i, w in enumerate(weights):
            yield from bring(i, w)
    leaving: list[int] = []
    for i, w in enumerate(weights):
        count, dtype = numbers_of(w, axes, ranks.storage)
        if i not in there:
            yield from bring(i, w)
        if w.group == "buffer":
            continue
        if not knobs.parameters:
            own = next(numbers)
            yield own, size(str(part(count, ranks.world)), dtype, {})[1]
            if w.trains:
                leaving.append(own)
        if count <= knobs.persistent:
            yield next(numbers), size(str(count), dtype, {})[1]
        yield there[i], 0
    for own in leaving:
        yield own, 0
    yield EMPTIED, 0


def in_host_memory(graph: Graph, ranks: Ranks, states: Iterable[State], accumulates: bool) -> Iterator[Held]:
    """What a rank has in host memory, with the optimizer's `states`, rounded as it is allocated.

    torch rounds pinned memory up to a power of two. The fp32 partition is pinned below stage 3 only, states nowhere.
    Source also: torch 2.13 ATen/core/CachingHostAllocator.h; DeepSpeed ops/adam/cpu_adam.py.
    """
    knobs, source = ranks.knobs, ranks.row.source
    pinned, pinned_parameters = knobs.pins
    numbers, (_, dtype) = partition(graph, ranks), _trained(graph)
    count, buffers, buffer, in_memory = knobs.swaps
    if knobs.optimizer and stage(ranks) == 3:
        yield _on_host("reduced gradients", numbers, dtype, pinned, source)
        if knobs.optimizer == "nvme":
            each = in_sub_group(graph, ranks)
            yield _on_host("buffer of a sub-group on NVMe", each, "fp32", False, source)._replace(copies=count)
        else:
            for group in _sub_groups(graph, ranks):
                yield _on_host("fp32 gradient of a sub-group", group, "fp32", pinned, source)
            yield _on_host("fp32 partition of the weights", numbers, "fp32", False, source)
    elif knobs.optimizer:
        yield _on_host("fp32 partition of the weights", numbers, "fp32", pinned, source)
        yield _on_host("fp32 gradient of the partition", numbers, "fp32", pinned, source)
        yield _on_host("partition as it goes back to the GPU", numbers, dtype, pinned, source)
        yield _on_host("buffer of the largest gradient", max(_each(graph)), dtype, pinned, source)
        if accumulates:
            owned = _reduced(graph, ranks).owned
            yield _on_host("gradients of earlier micro-batches", owned, dtype, pinned, source)
    if knobs.optimizer and knobs.optimizer != "nvme":
        for state in states:
            bytes_ = ITEMSIZE[state.dtype] * numbers if state.shape else 0
            if bytes_:
                yield Held("optstate", state.what, "", str(numbers), state.dtype, state.count, bytes_, source)
    if knobs.parameters:
        _, axes = built(graph)
        frozen = [(w, n) for w, n, _ in weights_of(graph) if not w.trains and w.group != "buffer"]
        kept = min(numbers, in_memory) if knobs.parameters == "nvme" else numbers
        if kept:
            yield _on_host("weights' parts", kept, dtype, True, source)
        if knobs.parameters == "nvme":
            yield _on_host("buffers of parts on NVMe", buffers * buffer, dtype, True, source)
        else:
            for w, n in frozen:
                own = part(elements(w, axes), ranks.world)
                found = _on_host(f"{w.name}, one of {ranks.world} parts", own, w.dtype, pinned_parameters, source)
                yield found._replace(copies=n)


@lru_cache(maxsize=256)
def _sub_groups(graph: Graph, ranks: Ranks) -> tuple[int, ...]:
    """How many numbers each sub-group has: of so many weights' parts as reach its size."""
    numbers, most = partition(graph, ranks), ranks.knobs.sub_group
    if most >= numbers:
        return (numbers,)
    out, filled = list[int](), 0
    for each in _each(graph):
        filled += part(each, ranks.world)
        if filled >= most:
            out.append(filled)
            filled = 0
    return (*out, filled) if filled else tuple(out)


def host_notes(ranks: Ranks, held: Iterable[Held], node: int) -> Iterator[str]:
    """What is in host memory under DeepSpeed and FSDP: the ranks of a `node` share it. Nothing of a run on one GPU."""
    node = min(ranks.world, node)
    rows = sorted(held, key=lambda h: -h.bytes * h.copies)
    if rows:
        of: dict[str, int] = {}
        for h in rows:
            what = h.what if stage(ranks) else _KINDS[h.kind]
            of[what] = of.get(what, 0) + h.bytes * h.copies
        total = sum(of.values())
        said = "; ".join(f"{what} {gib(bytes_)}" for what, bytes_ in [*of.items()][:5])
        yield f"host memory: {gib(total)} a rank, {gib(node * total)} for {node} ranks of a node: {said}"


_KINDS = {
    "parameter": "parts of weights, pinned",
    "gradient": "parts of gradients, pinned",
    "optstate": "the optimizer's states",
    "temp": "what the update makes",
}


def _on_host(what: str, numbers: int, dtype: str, pinned: bool, source: str) -> Held:
    bytes_ = numbers * ITEMSIZE[dtype]
    if pinned:
        bytes_ = 1 << (bytes_ - 1).bit_length()
    return Held("other", f"{what}, pinned" if pinned else what, "", str(numbers), dtype, 1, bytes_, source)


def _held(kind: str, what: str, where: str, numbers: int, dtype: str, copies: int, source: str) -> Held:
    return Held(kind, what, where, str(numbers), dtype, copies, size(str(numbers), dtype, {})[1], source)


def _in_bytes(kind: str, what: str, bytes_: int, source: str) -> Held:
    return _held(kind, what, "", bytes_, "uint8", 1, source)
