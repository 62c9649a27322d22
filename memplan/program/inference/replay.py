"""Passes of inference replayed through a model of torch's allocator: what it holds beside what is allocated."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import NamedTuple

from memplan.catalogue.attention import compressed_tokens
from memplan.catalogue.inference import quantized_caches
from memplan.engine.allocator import Allocator, Block, OutOfMemoryError
from memplan.engine.lower import COMPUTING
from memplan.engine.record import FREED, Recorded, unrolled
from memplan.engine.walk import size
from memplan.program.graph import Graph, Held, parameters_of, recorded_inference
from memplan.program.inference.passes import Step
from memplan.program.loading import loading
from memplan.program.training.replay import replay_loading, replay_stretches


class Replay(NamedTuple):
    """What decides the allocations of a run: its models, its passes, their axes, cuBLAS's workspace, how the allocator
    works."""

    models: tuple[Graph, ...]
    steps: tuple[Step, ...]
    axes: tuple[tuple[tuple[str, int], ...], ...]
    workspace: int
    expandable: bool

    def reserved(self, capacity: int | None = None) -> int | None:
        return _reserved(self, capacity)


@lru_cache(maxsize=1024)
def _reserved(replay: Replay, capacity: int | None) -> int | None:
    """The peak of what torch reserves, on a card with `capacity` bytes for it; None where it runs out of memory."""
    allocator = Allocator(replay.expandable, capacity)
    try:
        for graph in replay.models:
            load(graph, allocator)
        allocator.alloc(replay.workspace)
        left: dict[bool, list[Left]] = {False: [], True: []}  # the model's, the assistant's
        beside: dict[tuple[Held, int], Block] = {}
        for step, axes in zip(replay.steps, replay.axes, strict=True):
            there = {(h, i) for h in step.beside for i in range(h.copies)}
            for gone in [key for key in beside if key not in there]:
                allocator.free(beside.pop(gone))
            beside |= {key: allocator.alloc(key[0].bytes) for key in sorted(there - beside.keys())}
            whose = step.assists
            left[whose] = replayed(recorded_inference(step.graph), dict(axes), allocator, left[whose])
    except OutOfMemoryError:
        return None
    return allocator.peak_reserved


def load(graph: Graph, allocator: Allocator) -> None:
    """Replay loading, from one block for many weights where the version makes that first."""
    warms = graph.inference.loaded.warms if graph.inference else ""
    if warms:
        total = sum(h.bytes * h.copies for h in parameters_of(graph))
        allocator.free(allocator.alloc(total if warms == "all" else total // 2))
    replay_loading(loading(graph), allocator)


class Left(NamedTuple):
    """A tensor that one pass leaves for the next: its size as axes and as bytes, and the block that it is in."""

    key: tuple[str, ...]
    bytes: int
    block: Block


def replayed(recording: Recorded, axes: Mapping[str, int], allocator: Allocator, left: Iterable[Left]) -> list[Left]:
    """Replay a pass, which begins with what the one before `left`, in order; returns what it leaves itself."""
    bytes_ = [size(key[0], key[1], axes)[1] for key in recording.sizes]
    blocks: dict[int, Block] = {}
    given = _Given(left)
    stretches = deque(recording.forward)
    while given.remaining and stretches:  # what was left comes first, as it is
        for number, event in unrolled((stretches.popleft(),)):
            if event == FREED:
                allocator.free(blocks.pop(number))
            elif given.remaining:
                blocks[number] = given.take(recording.sizes[event], bytes_[event])
            else:
                blocks[number] = allocator.alloc(bytes_[event])
    replay_stretches(stretches, bytes_, [COMPUTING] * len(bytes_), allocator, blocks)
    keys = {number + shift: key for events, shift, _ in recording.forward for number, key in events if key != FREED}
    return [Left(recording.sizes[keys[number]], bytes_[keys[number]], block) for number, block in blocks.items()]


class _Given:
    """The tensors a pass begins with, each to be taken once: the first that is alike and as large, else the first
    that is alike, else the first."""

    def __init__(self, left: Iterable[Left]) -> None:
        self._left = list(left)
        self._taken: set[int] = set()
        self._queues: dict[object, deque[int]] = {}
        for i, one in enumerate(self._left):
            alike = _left(one.key)
            for kind in ((alike, one.bytes), alike, None):
                self._queues.setdefault(kind, deque()).append(i)

    @property
    def remaining(self) -> int:
        return len(self._left) - len(self._taken)

    def take(self, key: tuple[str, ...], bytes_: int) -> Block:
        alike = _left(key)
        for kind in ((alike, bytes_), alike, None):
            queue = self._queues.get(kind, ())
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
def _left(key: tuple[str, ...]) -> tuple[str, ...]:
    """What a tensor is known by that one pass leaves and the next finds: its shape, however many tokens it has, and
    its dtype."""
    return (" ".join(_TOKENS.get(axis, axis) for axis in key[0].split()), *key[1:])
