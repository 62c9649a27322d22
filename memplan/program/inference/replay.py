"""Inference passes replayed through a model of torch's allocator, to estimate what it reserves."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from memplan.catalogue.attention import compressed_tokens
from memplan.catalogue.inference import quantized_caches
from memplan.engine.allocator import FREED, Allocator, Block, OutOfMemoryError
from memplan.engine.native import exact, new_allocator
from memplan.engine.record import unrolled
from memplan.engine.storages import COMPUTING
from memplan.engine.walk import size
from memplan.program.graph import Graph, TensorGroup, parameters_of, recorded_inference
from memplan.program.inference.passes import SizedPass
from memplan.program.loading import loading
from memplan.program.training.replay import replay_loading, replay_stretches


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


@lru_cache(maxsize=1024)
@exact
def reserved(replay: InferenceReplay, capacity: int | None = None) -> int | None:
    """Return the peak bytes that torch reserves, or None if they exceed `capacity`."""
    allocator = new_allocator(replay.expandable, capacity)
    try:
        for graph in replay.models:
            load(graph, allocator)
        allocator.alloc(replay.workspace)
        left: dict[bool, list[InheritedTensor]] = {False: [], True: []}  # by whether the assistant's pass left them
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
        return None
    return allocator.peak_reserved


def load(graph: Graph, allocator: Allocator) -> None:
    """Replay loading. Versions of transformers that warm up the allocator first allocate one block for many weights."""
    warms = graph.inference.loaded.warms if graph.inference else ""
    if warms:
        total = sum(h.bytes * h.copies for h in parameters_of(graph))
        allocator.free(allocator.alloc(total if warms == "all" else total // 2))
    replay_loading(loading(graph), allocator)


class InheritedTensor(NamedTuple):
    """A tensor that one pass leaves for the next.

    key    its shape in axes, and its dtype
    bytes  its size
    block  the block it is in
    """

    key: tuple[str, ...]
    bytes: int
    block: Block


def replay_pass(each: SizedPass, allocator: Allocator, left: Iterable[InheritedTensor]) -> list[InheritedTensor]:
    """Replay a pass that begins with the tensors `left` by the previous one. Return the tensors it leaves itself."""
    recording = recorded_inference(each.step.graph, each.step.division)
    bytes_ = [size(key[0], key[1], each.axes)[1] for key in recording.sizes]
    blocks = allocator.live_blocks()
    inherited = _Inherited(left)
    stretches = deque(recording.forward)
    while inherited.remaining and stretches:  # the first allocations are the inherited tensors
        for number, event in unrolled((stretches.popleft(),)):
            if event == FREED:
                allocator.free(blocks.pop(number))
            elif inherited.remaining:
                blocks[number] = inherited.take(recording.sizes[event], bytes_[event])
            else:
                blocks[number] = allocator.alloc(bytes_[event])
    replay_stretches(stretches, bytes_, [COMPUTING] * len(bytes_), allocator, blocks)
    alive: dict[int, int] = {}  # number -> index of its size
    for events, shift, _ in recording.forward:
        for number, key in events:
            if key == FREED:
                del alive[number + shift]
            else:
                alive[number + shift] = key
    return [InheritedTensor(recording.sizes[key], bytes_[key], blocks.pop(number)) for number, key in alive.items()]


class _Inherited:
    """The tensors a pass begins with, each taken once.

    `take` prefers the first tensor of the same kind and size, then the first of the same kind, then the first.
    """

    def __init__(self, left: Iterable[InheritedTensor]) -> None:
        self._left = list(left)
        self._taken: set[int] = set()
        self._queues: dict[object, deque[int]] = {}
        for i, tensor in enumerate(self._left):
            kind = _kind(tensor.key)
            for match in ((kind, tensor.bytes), kind, None):
                self._queues.setdefault(match, deque()).append(i)

    @property
    def remaining(self) -> int:
        return len(self._left) - len(self._taken)

    def take(self, key: tuple[str, ...], bytes_: int) -> Block:
        kind = _kind(key)
        for match in ((kind, bytes_), kind, None):
            queue = self._queues.get(match, ())
            while queue:
                i = queue.popleft()
                if i not in self._taken:
                    self._taken.add(i)
                    return self._left[i].block
        raise IndexError("nothing is left to take")


_TOKENS: dict[str, str] = {
    **dict.fromkeys(("s", "kv", "past", "kv_window", "past_window", quantized_caches.QUANTIZED), "kv"),
    quantized_caches.AFTER: quantized_caches.RESIDUAL,
    **compressed_tokens.LEFT,
}


@lru_cache(maxsize=1024)
def _kind(key: tuple[str, ...]) -> tuple[str, ...]:
    """Return a key that matches a tensor across passes: its shape regardless of the number of tokens, and its dtype."""
    return (" ".join(_TOKENS.get(axis, axis) for axis in key[0].split()), *key[1:])
