"""Which weights are whole at once under ZeRO's stage 3: DeepSpeed's coordinator, run on a pass of the graph.

Every module asks for its weights before it runs, then for the next ones up to a bucket, and lets go of its own
afterwards, unless they are used again soon. What several weights are gathered into at once is there until the last of
them has been asked for: each is copied out of it.

Source: DeepSpeed 0.19.8 runtime/zero/partitioned_param_coordinator.py, partition_parameters.py (all_gather_coalesced).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from memplan.catalogue.parallelism.sharding import Knobs
from memplan.core.ir import Op
from memplan.core.units import ITEMSIZE
from memplan.program.graph import Graph, built
from memplan.program.sharding.ranks import Ranks, numbers_of


class Whole(NamedTuple):
    """Bytes at the moment of a phase when most are there: of whole weights, and of what all-gathers wrote."""

    weights: int
    written: int


class Gathering(NamedTuple):
    """The allocations and frees of a pass on the stream that gathers: a number and bytes, which are 0 of a free. Most
    are there after the first `most` of them: `bytes`."""

    events: tuple[tuple[int, int], ...]
    most: int
    bytes: int


class _Visit(NamedTuple):
    """A module that is run, forward or backward, and the weights that it reads: their places in a list of sizes."""

    phase: str
    weights: tuple[int, ...]


@lru_cache(maxsize=256)
def whole(graph: Graph, ranks: Ranks) -> dict[str, Whole]:
    """The most that is whole beside the weights that always are, by phase.

    A loss that multiplies by the output projection itself reads a weight that is no module's own: DeepSpeed has the
    model ask for it, which runs throughout.
    """
    ran, outer = _ran(graph, ranks)
    held = sum(outer)
    return {phase: Whole(most.weights + held, most.written) for phase, most in ran.most.items()}


@lru_cache(maxsize=256)
def gathered(graph: Graph, ranks: Ranks) -> Gathering:
    """What is gathered, in order: a weight by itself into what it is then in, several into one tensor, from which each
    is copied."""
    ran, outer = _ran(graph, ranks)
    events = [*((-1 - i, bytes_) for i, bytes_ in enumerate(outer)), *ran.events]
    alive: dict[int, int] = {}
    there = best = most = 0
    for at, (number, bytes_) in enumerate(events, 1):
        if bytes_:
            alive[number] = bytes_
        there += bytes_ or -alive.pop(number)
        if there > best:
            best, most = there, at
    return Gathering((*events, *((number, 0) for number in alive)), most, best)


@lru_cache(maxsize=64)
def _ran(graph: Graph, ranks: Ranks) -> tuple[_Coordinator, tuple[int, ...]]:
    """The coordinator after a pass, and the bytes of the weights that the model itself asks for."""
    knobs = ranks.knobs
    order = _Order(graph, ranks.storage)
    sizes = [n for n, _ in order.sizes]
    bytes_ = [n * item for n, item in order.sizes]
    always = frozenset(i for i, n in enumerate(sizes) if n <= knobs.persistent)
    outer = frozenset(order.of_loss) - always if graph.loss == "fused" else frozenset[int]()
    coordinator = _Coordinator(order.visits, sizes, bytes_, always | outer, knobs)
    coordinator.run()
    return coordinator, tuple(bytes_[i] for i in sorted(outer))


class _Order:
    """The modules in the order that a pass runs them: forward, and on the way back, of a checkpointed block, again."""

    def __init__(self, graph: Graph, storage: str) -> None:
        stack, self._axes = built(graph)
        self._storage = storage
        self.sizes: list[tuple[int, int]] = []
        self._outside: dict[str, int] = {}
        forward: list[_Visit] = []
        back: list[list[_Visit]] = []

        def run(ops: Iterable[Op], known: dict[str, int], phase: str, again: bool) -> None:
            modules = [tuple(places) for places in self._modules(ops, known)]
            forward.extend(_Visit(phase, places) for places in modules)
            way = [_Visit("backward", places) for places in modules]
            back.append([*(way if again else ()), *reversed(way)])

        run(stack.before, self._outside, "forward", again=False)
        for one in stack.runs:
            run(one.before, self._outside, "forward", again=False)
            for _ in range(self._axes[one.times]):
                for block in one.blocks:
                    run(block.ops, {}, "forward", graph.checkpoint and not block.lasting)
        run(stack.after, self._outside, "forward", again=False)
        loss = [op for op in stack.loss if any(w.group != "buffer" for w in op.weights)]
        run(loss, self._outside, "loss", again=False)
        names = {w.name for op in loss for w in op.weights if w.group != "buffer"}
        self.of_loss = [self._outside[name] for name in names]
        self.visits = [*forward, *(visit for visits in reversed(back) for visit in visits)]

    def _modules(self, ops: Iterable[Op], known: dict[str, int]) -> Iterator[list[int]]:
        """The weights of one module after the other."""
        last = ""
        places: list[int] = []
        for op in ops:
            for w in op.weights:
                if w.group == "buffer":
                    continue
                module = w.name.rpartition(".")[0]
                if places and module != last:
                    yield places
                    places = []
                last = module
                if w.name not in known:
                    known[w.name] = len(self.sizes)
                    numbers, dtype = numbers_of(w, self._axes, self._storage)
                    self.sizes.append((numbers, ITEMSIZE[dtype]))
                if known[w.name] not in places:
                    places.append(known[w.name])
        if places:
            yield places


class _Coordinator:
    """One pass, once the order of modules is known: from the third on."""

    def __init__(
        self, visits: list[_Visit], sizes: list[int], bytes_: list[int], always: frozenset[int], knobs: Knobs
    ) -> None:
        self.visits, self.sizes, self.bytes, self.always, self.knobs = visits, sizes, bytes_, always, knobs
        self.traversed = [0, *accumulate(sum(sizes[i] for i in visit.weights) for visit in visits)]
        self.uses: dict[int, list[int]] = {}
        for step, visit in enumerate(visits):
            for i in visit.weights:
                self.uses.setdefault(i, []).append(step)
        self.queue = deque((i, step) for step, visit in enumerate(visits) for i in sorted(visit.weights))
        self.fetched_for: dict[int, int] = {}
        self.there: set[int] = set()
        self.flying: dict[int, int] = {}  # a weight that is asked for, and the all-gather that brings it
        self.groups: list[list[int]] = []
        self.waiting: dict[int, set[int]] = {}  # of an all-gather of several, those not yet asked for
        self.weights = self.written = self.numbers = 0
        self.most: dict[str, Whole] = {}  # that is whole, by phase
        self.events: list[tuple[int, int]] = []  # see Gathering
        self._made: dict[int, int] = {}  # the number of what a weight is in; of what an all-gather wrote, from sizes on

    def run(self) -> None:
        """One pass."""
        for step, visit in enumerate(self.visits):
            self._fetch(step, visit)
            self._prefetch(step, visit)
            self._note(visit.phase)
            self._release(step, visit)
            if visit.phase == "forward":
                left = Whole(self.weights, self.written)
                self.most["loss"] = left  # what the loss finds, unless it asks for more

    def _born(self, what: int, bytes_: int) -> None:
        self._made[what] = len(self.events)
        self.events.append((self._made[what], bytes_))

    def _gone(self, what: int) -> None:
        self.events.append((self._made.pop(what), 0))

    def _note(self, phase: str) -> None:
        now = Whole(self.weights, self.written)
        self.most[phase] = max(self.most.get(phase, now), now, key=sum)

    def _gather(self, some: list[int]) -> None:
        """One weight is gathered in place; of several the all-gather writes one tensor."""
        group = len(self.groups)
        self.groups.append(some)
        self.numbers += sum(self.sizes[i] for i in some)
        bytes_ = sum(self.bytes[i] for i in some)
        if len(some) > 1:
            self.waiting[group] = set(some)
            self.written += bytes_
            self._born(len(self.sizes) + group, bytes_)
        else:
            self.weights += bytes_
            self._born(some[0], bytes_)
        self.flying.update(dict.fromkeys(some, group))

    def _fetch(self, step: int, visit: _Visit) -> None:
        asked = [i for i in visit.weights if i not in self.always]
        missing = [i for i in asked if i not in self.there and i not in self.flying]
        if missing:
            self._gather(missing)
        for i in asked:
            if i in self.flying:
                self._wait(i, visit.phase)

    def _wait(self, i: int, phase: str) -> None:
        group = self.flying.pop(i)
        if i not in self.there:
            self.there.update(self.groups[group])
            if group in self.waiting:
                self.weights += sum(self.bytes[j] for j in self.groups[group])
                for j in self.groups[group]:
                    self._born(j, self.bytes[j])
        self._note(phase)
        if group in self.waiting:
            self.waiting[group].discard(i)
            if not self.waiting[group]:
                del self.waiting[group]
                self.written -= sum(self.bytes[j] for j in self.groups[group])
                self._gone(len(self.sizes) + group)

    def _prefetch(self, step: int, visit: _Visit) -> None:
        fresh = sum(self.fetched_for.get(i, -1) < step for i in visit.weights)
        for _ in range(min(fresh, len(self.queue))):
            i, used = self.queue.popleft()
            self.fetched_for[i] = used
        most = min(self.knobs.live - self.numbers, self.knobs.prefetch)
        some: list[int] = []
        numbers = 0
        while self.queue and numbers < most:
            i, used = self.queue.popleft()
            self.fetched_for[i] = max(self.fetched_for.get(i, -1), used)
            if i not in self.always and i not in self.there and i not in self.flying and i not in some:
                some.append(i)
                numbers += self.sizes[i]
        if some:
            self._gather(some)

    def _release(self, step: int, visit: _Visit) -> None:
        for i in visit.weights:
            if i in self.always or i not in self.there or self.fetched_for.get(i, -1) > step:
                continue
            uses = self.uses[i]
            following = bisect_left(uses, step + 1)
            if following < len(uses):
                distance = self.traversed[uses[following]] - self.traversed[step + 1]
                if distance < self.knobs.reuse:
                    continue
            self.there.discard(i)
            self._gone(i)
            self.weights -= self.bytes[i]
            self.numbers -= self.sizes[i]
