"""Which weights are whole at once in ZeRO stage 3: DeepSpeed's parameter coordinator, simulated on a pass of the graph.

Every module fetches its weights before it runs, prefetches the next ones up to a bucket, and releases its own
afterwards unless they are used again soon. An all-gather of several weights writes one tensor, which exists until the
last of them has been requested, as each is copied out of it.

Source: DeepSpeed 0.19.8 runtime/zero/partitioned_param_coordinator.py, partition_parameters.py (all_gather_coalesced).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import accumulate, count

from memplan.catalogue.parallelism.sharding import ZeroSettings
from memplan.core.ir import Op, Stack
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.engine.storages import COMPUTING, GATHERING
from memplan.program.graph import Graph, operations_of, other_models
from memplan.program.sharding.ranks import Ranks, numbers_of
from memplan.program.sharding.sharding import Gathering


class Whole(NamedTuple):
    """Bytes at a phase's peak: of whole weights, and of all-gather outputs."""

    weights: int
    written: int


class _Visit(NamedTuple):
    """One run of a module in a phase, and the indices of the weights it reads; or of a model with a coordinator of its
    own."""

    phase: str
    weights: tuple[int, ...]
    model: Graph | None = None


@lru_cache(maxsize=256)
def gathered_peak(graph: Graph, ranks: Ranks) -> dict[str, Whole]:
    """Return the peak of gathered weights by phase, without weights that are always whole.

    A fused loss reads the output projection outside of its module: DeepSpeed attributes it to the model itself, so it
    stays gathered throughout.
    """
    coordinator, outer = _run(graph, ranks.storage, ranks.knobs)
    held = sum(outer)
    return {phase: Whole(most.weights + held, most.written) for phase, most in coordinator.most.items()}


@lru_cache(maxsize=256)
def gathered(graph: Graph, ranks: Ranks) -> Gathering:
    """Return what a pass gathers, in order. A single weight is gathered in place; several are gathered into one tensor
    and copied out of it."""
    coordinator, outer = _run(graph, ranks.storage, ranks.knobs)
    events = [*((-1 - i, bytes_) for i, bytes_ in enumerate(outer)), *coordinator.events]
    alive: dict[int, int] = {}
    live = peak = most = 0
    for at, (number, bytes_) in enumerate(events, 1):
        if bytes_:
            alive[number] = bytes_
        live += bytes_ or -alive.pop(number)
        if live > peak:
            peak, most = live, at
    stream = GATHERING if ranks.knobs.overlaps else COMPUTING
    return Gathering(stream, (*events, *((number, 0) for number in alive)), most, peak)


@lru_cache(maxsize=64)
def _run(graph: Graph, storage: str, knobs: ZeroSettings) -> tuple[_Coordinator, tuple[int, ...]]:
    """Return the coordinator after a pass, and the bytes of the weights that the model itself fetches."""
    order = _Order(graph, storage)
    sizes = [n for n, _ in order.sizes]
    bytes_ = [n * item for n, item in order.sizes]
    always = frozenset(i for i, n in enumerate(sizes) if knobs.in_place or n <= knobs.persistent)
    outer = frozenset(order.of_loss) - always if graph.loss == "fused" else frozenset[int]()
    coordinator = _Coordinator(order.visits, sizes, bytes_, always | outer, knobs)
    coordinator.run(storage)
    return coordinator, tuple(bytes_[i] for i in sorted(outer))


class _Order:
    """The order in which a pass runs modules: forward, then backward, with the recomputation of checkpointed blocks."""

    def __init__(self, graph: Graph, storage: str) -> None:
        stack, self._axes = operations_of(graph)
        self._storage, self._graph = storage, graph
        self.sizes: list[tuple[int, int]] = []
        self._size_of: dict[int, tuple[int, int]] = {}  # by the weight's id: layers have the same weights
        self._outside: dict[str, int] = {}
        self._layers: dict[int, dict[str, int]] = {}
        forward: list[_Visit] = []
        backward: list[list[_Visit]] = []

        def add(ops: Iterable[Op], known: dict[str, int], phase: str, recomputes: bool) -> None:
            modules = [tuple(weights) for weights in self._modules(ops, known)]
            forward.extend(_Visit(phase, weights) for weights in modules)
            visits = [_Visit("backward", weights) for weights in modules]
            backward.append([*(visits if recomputes else ()), *reversed(visits)])

        forward += self._other_models(stack.before)
        for ops, known, recomputes in self._in_order(stack):
            add(ops, known, "forward", recomputes)
        loss = [op for op in stack.loss if any(w.group != "buffer" for w in op.weights)]
        add(loss, self._outside, "loss", recomputes=False)
        forward += self._other_models(stack.loss)
        names = {w.name for op in loss for w in op.weights if w.group != "buffer"}
        self.of_loss = [self._outside[name] for name in names]
        if graph.inference is not None or (graph.trainer is not None and graph.trainer.is_reference):
            backward.clear()
        self.visits = [*forward, *(visit for visits in reversed(backward) for visit in visits)]

    def _other_models(self, ops: Iterable[Op]) -> Iterator[_Visit]:
        """Yield the visits of models that run without gradients: the model's own ones, in order, or those of another
        model, which has a coordinator of its own."""
        others = dict(other_models(self._graph))
        for op in ops:
            if op.model is None:
                continue
            if op.name in others:
                yield _Visit(op.name, (), others[op.name])
                continue
            for ops_, known, _ in self._in_order(op.model):
                yield from (_Visit(op.name, tuple(weights)) for weights in self._modules(ops_, known))

    def _in_order(self, stack: Stack) -> Iterator[tuple[tuple[Op, ...], dict[str, int], bool]]:
        """Yield the operations of each block and of each part outside of blocks, with the indices of the weights that
        are known there, and whether a checkpoint recomputes them."""
        layers = count()
        yield stack.before, self._outside, False
        for run in stack.runs:
            yield run.before, self._outside, False
            for _ in range(self._axes[run.times]):
                for block in run.blocks:
                    known = self._layers.setdefault(next(layers), {})
                    yield block.ops, known, self._graph.checkpoint and not block.never_checkpointed
        yield stack.after, self._outside, False

    def _modules(self, ops: Iterable[Op], known: dict[str, int]) -> Iterator[list[int]]:
        """Yield the indices of each module's weights."""
        last = ""
        weights: list[int] = []
        for op in ops:
            for w in op.weights:
                if w.group == "buffer":
                    continue
                module = w.name.rpartition(".")[0]
                if weights and module != last:
                    yield weights
                    weights = []
                last = module
                name = w.name.replace(".base_layer", "")  # a model without its adapters has the same weights
                if name not in known:
                    known[name] = len(self.sizes)
                    if id(w) not in self._size_of:
                        numbers, dtype = numbers_of(w, self._axes, self._storage)
                        self._size_of[id(w)] = numbers, ITEMSIZE[dtype]
                    self.sizes.append(self._size_of[id(w)])
                if known[name] not in weights:
                    weights.append(known[name])
        if weights:
            yield weights


class _Coordinator:
    """DeepSpeed's coordinator in one pass, from the third pass on, when it knows the order of modules."""

    def __init__(
        self, visits: list[_Visit], sizes: list[int], bytes_: list[int], always: frozenset[int], knobs: ZeroSettings
    ) -> None:
        self.visits, self.sizes, self.bytes, self.always, self.knobs = visits, sizes, bytes_, always, knobs
        self.traversed = [0, *accumulate(sum(sizes[i] for i in visit.weights) for visit in visits)]
        self.uses: dict[int, list[int]] = {}
        for step, visit in enumerate(visits):
            for i in visit.weights:
                self.uses.setdefault(i, []).append(step)
        self.queue = deque((i, step) for step, visit in enumerate(visits) for i in sorted(visit.weights))
        self.fetched_for: dict[int, int] = {}
        self.gathered: set[int] = set()
        self.in_flight: dict[int, int] = {}  # a weight being gathered, and the index of its all-gather
        self.groups: list[list[int]] = []
        self.waiting: dict[int, set[int]] = {}  # weights of an all-gather that have not been requested yet
        self.weights = self.written = self.numbers = 0
        self.most: dict[str, Whole] = {}  # peak by phase
        self.events: list[tuple[int, int]] = []  # see Gathering
        self._numbers: dict[int, int] = {}  # storage number of a weight, or of all-gather i at index len(sizes) + i

    def run(self, storage: str) -> None:
        """Run one pass. Packed weights of another model are stored in `storage`."""
        for step, visit in enumerate(self.visits):
            if visit.model is not None:
                self._run_other(visit, storage)
                continue
            self._fetch(step, visit)
            self._prefetch(step, visit)
            self._note(visit.phase)
            self._release(step, visit)
            if visit.phase == "forward":
                self.most["loss"] = Whole(self.weights, self.written)  # unless the loss fetches more

    def _run_other(self, visit: _Visit, storage: str) -> None:
        """Run a model that has a coordinator of its own, which frees everything in the end."""
        assert visit.model is not None
        other, _ = _run(visit.model, storage, self.knobs)
        most = max(other.most.values(), key=sum)
        self.most[visit.phase] = Whole(self.weights + most.weights, self.written + most.written)
        first = len(self.events)
        self.events += ((number + first, bytes_) for number, bytes_ in (*other.events, *other.left()))

    def left(self) -> Iterator[tuple[int, int]]:
        """Yield the events that free what is still gathered."""
        alive = dict(event for event in self.events if event[1])
        for number, bytes_ in self.events:
            if not bytes_:
                del alive[number]
        yield from ((number, 0) for number in alive)

    def _allocate(self, index: int, bytes_: int) -> None:
        self._numbers[index] = len(self.events)
        self.events.append((self._numbers[index], bytes_))

    def _free(self, index: int) -> None:
        self.events.append((self._numbers.pop(index), 0))

    def _note(self, phase: str) -> None:
        now = Whole(self.weights, self.written)
        self.most[phase] = max(self.most.get(phase, now), now, key=sum)

    def _gather(self, weights: list[int]) -> None:
        """Start an all-gather: of one weight in place, of several into one tensor."""
        group = len(self.groups)
        self.groups.append(weights)
        self.numbers += sum(self.sizes[i] for i in weights)
        bytes_ = sum(self.bytes[i] for i in weights)
        if len(weights) > 1:
            self.waiting[group] = set(weights)
            self.written += bytes_
            self._allocate(len(self.sizes) + group, bytes_)
        else:
            self.weights += bytes_
            self._allocate(weights[0], bytes_)
        self.in_flight.update(dict.fromkeys(weights, group))

    def _fetch(self, step: int, visit: _Visit) -> None:
        requested = [i for i in visit.weights if i not in self.always]
        missing = [i for i in requested if i not in self.gathered and i not in self.in_flight]
        if missing:
            self._gather(missing)
        for i in requested:
            if i in self.in_flight:
                self._wait(i, visit.phase)

    def _wait(self, i: int, phase: str) -> None:
        group = self.in_flight.pop(i)
        if i not in self.gathered:
            self.gathered.update(self.groups[group])
            if group in self.waiting:
                self.weights += sum(self.bytes[j] for j in self.groups[group])
                for j in self.groups[group]:
                    self._allocate(j, self.bytes[j])
        self._note(phase)
        if group in self.waiting:
            self.waiting[group].discard(i)
            if not self.waiting[group]:
                del self.waiting[group]
                self.written -= sum(self.bytes[j] for j in self.groups[group])
                self._free(len(self.sizes) + group)

    def _prefetch(self, step: int, visit: _Visit) -> None:
        fresh = sum(self.fetched_for.get(i, -1) < step for i in visit.weights)
        for _ in range(min(fresh, len(self.queue))):
            i, used = self.queue.popleft()
            self.fetched_for[i] = used
        most = min(self.knobs.live - self.numbers, self.knobs.prefetch)
        weights: list[int] = []
        numbers = 0
        while self.queue and numbers < most:
            i, used = self.queue.popleft()
            self.fetched_for[i] = max(self.fetched_for.get(i, -1), used)
            if i not in self.always and i not in self.gathered and i not in self.in_flight and i not in weights:
                weights.append(i)
                numbers += self.sizes[i]
        if weights:
            self._gather(weights)

    def _release(self, step: int, visit: _Visit) -> None:
        for i in visit.weights:
            if i in self.always or i not in self.gathered or self.fetched_for.get(i, -1) > step:
                continue
            uses = self.uses[i]
            following = bisect_left(uses, step + 1)
            if following < len(uses):
                distance = self.traversed[uses[following]] - self.traversed[step + 1]
                if distance < self.knobs.reuse:
                    continue
            self.gathered.discard(i)
            self._free(i)
            self.weights -= self.bytes[i]
            self.numbers -= self.sizes[i]
