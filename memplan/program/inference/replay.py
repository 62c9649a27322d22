"""Inference passes replayed through a model of torch's allocator, to estimate what it reserves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import islice

from memplan.catalogue.attention import compressed_tokens
from memplan.catalogue.inference import quantized_caches
from memplan.core.collection import without_collection
from memplan.core.ir import Division
from memplan.core.once import once
from memplan.core.records import NamedTuple
from memplan.engine.allocator import Allocator, Block, OutOfMemoryError
from memplan.engine.capacities import ReservedPeak, by_capacity
from memplan.engine.events import FREED, Event
from memplan.engine.native import exact, new_allocator
from memplan.engine.sized_events import KeySizes, SizedEvents
from memplan.engine.walk import size
from memplan.program.graph import NO_AXES, Graph, TensorGroup, parameters_of, recorded_inference
from memplan.program.inference.passes import SizedPass, fixed_axes
from memplan.program.loading import loading
from memplan.program.training.replay import append_loading


class InferenceReplay(NamedTuple):
    """Everything that decides the allocations of an inference run.

    models      graphs of the models, in the order they are loaded
    passes      passes to replay
    workspace   bytes of cuBLAS's workspace
    expandable  expandable segments are on
    """

    models: tuple[Graph, ...]
    passes: tuple[SizedPass, ...]
    workspace: int
    expandable: bool


@by_capacity
@exact
@once
@without_collection
def reserved(replay: InferenceReplay, capacity: int | None) -> ReservedPeak:
    """Return the peak bytes that torch reserves."""
    allocator = new_allocator(replay.expandable, capacity)
    try:
        for graph in replay.models:
            load(graph, allocator)
        allocator.alloc(replay.workspace)
        left: dict[bool, LeftTensors] = {False: NOTHING, True: NOTHING}  # by whether the assistant's pass left them
        loop: dict[tuple[TensorGroup, int], Block] = {}  # tensors that the generation loop holds
        for each in replay.passes:
            step = each.step
            needed = {(h, i) for h in step.loop_tensors for i in range(h.copies)}
            for released in [key for key in loop if key not in needed]:
                allocator.free(loop.pop(released))
            loop |= {key: allocator.alloc(key[0].bytes) for key in sorted(needed - loop.keys())}
            model = step.assists
            left[model] = replay_pass(each, allocator, left[model])
    except OutOfMemoryError:
        return ReservedPeak.of([allocator], survived=False)
    return ReservedPeak.of([allocator], survived=True)


def load(graph: Graph, allocator: Allocator) -> None:
    """Replay loading. Versions of transformers that warm up the allocator first allocate one block for many weights."""
    _loading(graph).replay(allocator, NO_AXES)


@lru_cache(maxsize=64)
def _loading(graph: Graph) -> SizedEvents:
    events = SizedEvents()
    warms = graph.inference.loaded.warms if graph.inference else ""
    if warms:
        total = sum(h.bytes * h.copies for h in parameters_of(graph))
        events.free([events.alloc(total if warms == "all" else total // 2)])
    append_loading(loading(graph), events)
    return events


class Storages:
    """Storages of a pass: their numbers, the keys of their sizes, and their kinds.

    A kind is the same in every pass: the shape in axes, regardless of the number of tokens, and the dtype.
    """

    def __init__(self, sizes: Sequence[tuple[str, ...]], allocations: Iterable[Event]) -> None:
        """`sizes` are the shape and dtype of each key."""
        events = list(allocations)
        self.numbers = [number for number, _ in events]
        self.keys = [key for _, key in events]
        self.distinct_keys = tuple(dict.fromkeys(self.keys))
        self.kinds = [_kind(sizes[key]) for key in self.keys]


class LeftTensors(NamedTuple):
    """Tensors that one pass leaves for the next: their storages and blocks, and the bytes of the pass's keys."""

    storages: Storages
    blocks: list[Block]
    sizes: list[int]


NOTHING = LeftTensors(Storages((), ()), [], [])


def replay_pass(each: SizedPass, allocator: Allocator, left: LeftTensors) -> LeftTensors:
    """Replay a pass that begins with the tensors `left` by the previous one. Return the tensors it leaves itself."""
    one = _recorded(each.step.graph, each.step.division)
    sizes = one.sizes.in_run(each.sizes)
    live = allocator.live_blocks(one.recording.storages)
    first = one.first(len(left.blocks))
    alike: dict[int, int] = {}  # bytes -> a number in place of them
    then = tuple(alike.setdefault(left.sizes[key], len(alike)) for key in left.storages.distinct_keys)
    now = tuple(alike.setdefault(sizes[key], len(alike)) for key in first.distinct_keys)
    for number, place in zip(first.numbers, _places(left.storages, then, first, now), strict=True):
        live[number] = left.blocks[place]
    allocator.replay(one.recording, sizes, live)
    return LeftTensors(one.left, [live[number] for number in one.left.numbers], sizes)


class _RecordedPass:
    """The recording of a pass, the sizes of its keys, and the storages that it leaves."""

    def __init__(self, graph: Graph, division: Division | None) -> None:
        self.recording, fixed = recorded_inference(graph, division), fixed_axes(graph)
        self.sizes = KeySizes([size(shape, dtype, fixed) for shape, dtype, *_ in self.recording.sizes])
        self.left = Storages(self.recording.sizes, self.recording.left)
        self._first = NOTHING.storages

    def first(self, count: int) -> Storages:
        """Return the first `count` storages, which the previous pass left."""
        first = self._first
        if len(first.numbers) != count:
            allocations = (event for event in self.recording.unrolled() if event[1] != FREED)
            first = self._first = Storages(self.recording.sizes, islice(allocations, count))
        return first


_recorded = lru_cache(maxsize=64)(_RecordedPass)


@lru_cache(maxsize=64)
def _places(left: Storages, sizes: tuple[int, ...], wanted: Storages, sizes_wanted: tuple[int, ...]) -> list[int]:
    """Return for each of the `wanted` tensors which of those `left` it is, each once. KeySizes are of distinct keys.

    The first tensor of the same kind and size is preferred, then the first of the same kind, then the first.
    """
    size_of, size_wanted = (
        dict(zip(storages.distinct_keys, numbers, strict=True))
        for storages, numbers in ((left, sizes), (wanted, sizes_wanted))
    )
    queues: dict[object, deque[int]] = {}
    for i, (kind, key) in enumerate(zip(left.kinds, left.keys, strict=True)):
        for match in ((kind, size_of[key]), kind, None):
            queues.setdefault(match, deque()).append(i)
    taken: dict[int, None] = {}
    for kind, key in zip(wanted.kinds, wanted.keys, strict=True):
        for match in ((kind, size_wanted[key]), kind, None):
            queue = queues.get(match, deque())
            while queue and queue[0] in taken:
                queue.popleft()
            if queue:
                taken[queue.popleft()] = None
                break
    return list(taken)


_TOKENS: dict[str, str] = {
    **dict.fromkeys(("s", "kv", "past", "kv_window", "past_window", quantized_caches.QUANTIZED), "kv"),
    quantized_caches.AFTER: quantized_caches.RESIDUAL,
    **compressed_tokens.LEFT,
}


@lru_cache(maxsize=1024)
def _kind(key: tuple[str, ...]) -> tuple[str, ...]:
    """Return a key that matches a tensor across passes: its shape regardless of the number of tokens, and its dtype."""
    return (" ".join(_TOKENS.get(axis, axis) for axis in key[0].split()), *key[1:])
