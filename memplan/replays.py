"""Passes of inference replayed through a model of torch's allocator: what it holds beside what is allocated."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from memplan.cached_property import cached_property
from memplan.catalogue import compressed_tokens, quantized_caches
from memplan.engine.allocator import SMALL_REQUEST, Allocator, Block, OutOfMemoryError
from memplan.engine.lower import COMPUTING
from memplan.engine.record import FREED, Recorded, unrolled
from memplan.engine.walk import alive, size
from memplan.graph import (
    Graph,
    Held,
    inferred,
    loading,
    parameters_of,
    recorded_inference,
)
from memplan.passes import Step, bytes_of, compresses, numbers_of, token_after
from memplan.segments import replay_loading, replay_stretches

if TYPE_CHECKING:
    from memplan.inference import Walked


class Unreplayed:
    """A run whose passes are listed when a replay is asked for: that takes longer than their peaks."""

    is_long = False  # the passes of long ones are thinned

    def __init__(self, walked: Walked, expandable: bool) -> None:
        self._of = walked, expandable

    @cached_property
    def _replay(self) -> Replay:
        return replay(*self._of)

    def reserved(self, capacity: int | None = None) -> int | None:
        return self._replay.reserved(capacity)

    def apart(self) -> int:
        return 0

    def beside(self) -> int:
        return 0


_FEWEST, _MOST = 8, 32  # passes that are replayed of those that decode
PREFILL_EVENTS = 400_000  # allocations and frees that are replayed of the passes that read a prompt


def replay(walked: Walked, expandable: bool) -> Replay:
    """The run's passes for a replay: of those that decode some, evenly spread.

    What torch holds of caches that grow by a token, each in a block of its own, depends on how often they do. A block
    has up to 1 MiB more than was asked for; a cache that outgrows it takes another, and none needs one that small
    again. So often a pass is replayed, but 32 times at most: replays of 32 of 511 passes held within 1.4 % what those
    of all did.
    """
    steps = walked.steps
    if walked.decided.assistant is not None:
        from memplan import assisted

        steps = assisted.steps_of(walked.decided, replayed=True)
    reading = [step for step in steps if step.phase == "prefill"]
    if len(reading) > 2 * _FEWEST and walked.decided.assistant is None:
        kept = {id(step) for step in _spread(reading)}
        steps = tuple(step for step in steps if step.phase != "prefill" or id(step) in kept)
    decoding = [step for step in steps if step.phase == "decode"]
    if walked.decided.assistant is None and len(decoding) > 1:
        first, last = decoding[0], decoding[-1]
        often = min(_MOST, max(_FEWEST, _growth(walked) // SMALL_REQUEST + 2))
        count = min(often, last.past - first.past + 1)
        between = [first.past + (last.past - first.past) * i // (count - 1) for i in range(1, count - 1)]
        now = last.graph.inference
        anew = now is not None and now.stored is not None
        if anew or compresses(last.graph):  # some of them quantise all anew, or fill a window
            pasts = sorted({*between, *(step.past for step in decoding)})
            some = [token_after(past, walked.decided) for past in pasts]
        else:
            window = walked.decided.structure.graph.model.sliding_window or last.past + 1
            some = [last._replace(past=n, past_window=min(n, window), window=min(n + 1, window)) for n in between]
            some = [first, *some, last]
        steps = (*(step for step in steps if step.phase != "decode"), *some)
    axes = tuple(tuple(numbers_of(step, walked.decided).items()) for step in steps)
    return Replay(walked.models, steps, axes, walked.workspace, expandable)


def _spread(reading: list[Step]) -> list[Step]:
    """The passes that read a prompt; if replaying all takes long, the first and the last, and some between."""
    events = sum(recorded_inference(step.graph).length for step in reading)
    count = max(_FEWEST, PREFILL_EVENTS * len(reading) // events)
    first, between, last = reading[:2], reading[2:-2], reading[-2:]
    if count >= len(between):
        return reading
    return [*first, *(between[i * len(between) // count] for i in range(count)), *last]


def _growth(walked: Walked) -> int:
    """By how many bytes the largest tensor of a cache grows from the first pass that decodes to the last."""
    first, *_, last = (step for step in walked.steps if step.phase == "decode")
    low = inferred(last.graph)
    at_first = last._replace(past=first.past, past_window=first.past_window, window=first.window)
    then, now = (bytes_of(low, numbers_of(step, walked.decided)) for step in (at_first, last))
    return max((now[key] - then[key] for key in alive(low.left, low.runs, walked.axes[-1])), default=0)


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
