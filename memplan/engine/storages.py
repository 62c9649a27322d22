"""`LiveStorages`: which storages are alive, and a moment whenever memory is about to fall.

A repeated block is run once; what every further copy adds is counted per copy. Structure only: no sizes, no depth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from memplan.core.errors import InternalError
from memplan.core.ir import Op, Tensor
from memplan.core.records import NamedTuple
from memplan.engine.moments import Counts, Moment, PassMoments, after, negative, total

Way = Literal["past", "forward", "backward"]  # past: the allocations left by the previous pass
_NOTHING: Counts = {}

# The streams that a process allocates on, each with its own allocator pools: for computing, and for FSDP and DeepSpeed
# gathering weights, casting a rank's shard before that, and reducing gradients. A LENT storage is allocated for
# computing and read for reducing.
COMPUTING, GATHERING, CASTING, REDUCING, LENT = range(5)
GRADIENT_OF = "gradient of "  # before a tensor's name: its gradient's


class Storage:
    """One live storage.

    size    index of its shape and dtype
    refs    number of references
    fresh   whether autograd may add into it in place
    number  its index among all storages, if events are recorded
    shared  made outside of a run and used by all its copies
    run     the run whose every copy has a storage like it
    at      number of allocations and frees before its last reference was dropped
    """

    __slots__ = ("at", "fresh", "number", "refs", "run", "shared", "size")

    def __init__(self, size: int, fresh: bool, refs: int = 1) -> None:
        self.size = size
        self.refs = refs
        self.fresh = fresh
        self.number = -1
        self.shared = False
        self.run: int | None = None


class EventsOfBlock(NamedTuple):
    """The allocations and frees of a block, to be repeated.

    events  as in `Moment`
    last    the operation of the last allocation, if there is one
    falls   number of events before each moment
    names   the operation of each moment, without its layer
    left    number of storages of each size that it leaves, less those that it finds and frees; once it has `of_sizes`
    """

    events: list[int]
    last: Op | None
    falls: list[int]
    names: list[str]
    left: Counts

    @classmethod
    def of(cls, events: list[int], operations: Iterable[Op]) -> EventsOfBlock:
        """Return the events of a block, given the operation of each allocation."""
        falls, names, allocating = list[int](), list[str](), iter(operations)
        rising, last = False, None
        for at, event in enumerate(events):
            if event >= 0:
                rising, last = True, next(allocating)
            elif rising:
                assert last is not None
                rising = False
                falls.append(at)
                names.append(last.name)
        return cls(events, last, falls, names, _NOTHING)

    def of_sizes(self, events: list[int]) -> EventsOfBlock:
        """Return the events of a block that allocates and frees in the same order, in other sizes."""
        return self._replace(events=events, left=total(_NOTHING, after(events, _NOTHING)))


class LiveStorages:
    """Counts the live storages by size, and collects moments.

    `labelled`: count tensors not only by shape and dtype, but also by kind, block, operation, name and source.
    """

    def __init__(self, labelled: bool = False) -> None:
        self.sizes: dict[tuple[str, ...], int] = {}
        self.phase = "forward"
        self.stream = COMPUTING  # stream of new allocations
        self._labelled = labelled
        self._changes: list[int] = []  # allocations and frees, as `Moment.events`
        self.moments = PassMoments(self._changes)
        self._counted: tuple[int, Counts] = 0, {}  # how many of them are in the counts, and the counts
        self._per_copy: Mapping[int, Counts] = {}  # never changed in place, because moments share it
        self._rising = False
        self._layer = ""  # of the current operation, as its name begins
        self._block = ""
        self._op = Op("")
        self._in_run: int | None = None
        self.made: list[Storage] = []  # in order
        # Of each allocation: how its operation's name begins, and the operation.
        self.origins: list[tuple[str, Op]] = [("", self._op)]

    def alloc(self, tensor: Tensor, kind: str, fresh: bool = True, of: str = "") -> Storage:
        (name, shape, dtype), op, sizes = tensor, self._op, self.sizes
        key = (shape, dtype, kind, self._block, op.name, of + name, op.source) if self._labelled else (shape, dtype)
        size = sizes.setdefault(key, len(sizes))
        storage = Storage(size, fresh)
        self._changes.append(size)
        self._rising = True
        self.origins.append((self._layer, op))
        self.made.append(storage)
        return storage

    def alloc_buffers(self, tensors: Iterable[Tensor], kind: str, stream: int = COMPUTING) -> list[Storage]:
        """Allocate the buffers of a collective on its stream."""
        self.stream = stream
        storages = [self.alloc(t, kind) for t in tensors]
        self.stream = COMPUTING
        return storages

    def drop(self, storage: Storage) -> None:
        refs = storage.refs = storage.refs - 1
        storage.at = len(self._changes)
        if refs > 0:
            return
        if refs < 0:
            raise self._freed_twice([*self.sizes][storage.size])
        if self._is_deferred(storage):
            self._deferred.append(storage)
            return
        if self._rising:
            self.note()
        self._changes.append(~storage.size)
        if storage.run is not None and storage.run != self._in_run:
            self._count_in_copies(storage.run, storage.size, -1)
            if self._per_copy[storage.run][storage.size] < 0:
                raise self._freed_twice([*self.sizes][storage.size])

    def _is_deferred(self, storage: Storage) -> bool:
        """Whether only the last copy of the run frees the storage, because all copies use it."""
        return storage.shared and self._in_run is not None

    def _freed_twice(self, size: tuple[str, ...]) -> InternalError:
        shape, dtype, *labels = size
        name = " ".join(filter(None, (shape, dtype, *labels[3:4])))
        return InternalError(f"a tensor ({name}) is freed twice, in {self.phase} at {self._layer}{self._op.name}")

    @property
    def _counts(self) -> Counts:
        """The number of live storages of each size in the copies that are run; not to be changed."""
        known, counts = self._counted
        if known < len(self._changes):
            counts = total(counts, after(self._changes[known:], _NOTHING))
            self._counted = len(self._changes), counts
        return counts

    def _count_in_copies(self, run: int, size: int, n: int) -> None:
        copies = self._per_copy.get(run, {})
        self._per_copy = {**self._per_copy, run: {**copies, size: copies.get(size, 0) + n}}

    def of_copies(self, storage: Storage, run: int) -> None:
        """Count a storage made outside of a run once per copy of the run."""
        storage.run = run
        self._count_in_copies(run, storage.size, 1)

    def recall(self, blocks: Iterable[tuple[str, Iterable[Op]]], run: int | None = None) -> list[dict[str, Storage]]:
        """Allocate what the previous pass left for each block (a name and operations); once per copy if in a `run`."""
        pasts: list[dict[str, Storage]] = []
        for name, ops in blocks:
            pasts.append({})
            for op in ops:
                self._block, self._op = name, op
                for t in op.past:
                    pasts[-1][t.name] = storage = self.alloc(t, "activation")
                    if run is not None:
                        self.of_copies(storage, run)
        return pasts

    def note(self) -> None:
        """Record the moment, if memory rose since the last one."""
        if self._rising:
            self._rising = False
            layer, op = self.origins[-1]
            at = len(self._changes)
            self.moments.extend((self.phase,), (layer,), (op.name,), (_NOTHING,), (at,), (self._per_copy,))

    def repeat(self, part: EventsOfBlock, layer: str) -> None:
        """Allocate and free again what a block did, in another layer, and note the same moments."""
        if part.events and part.events[0] < 0:
            self.note()
        before, count = len(self._changes), len(part.falls)
        columns = [self.phase] * count, [layer] * count, part.names, [_NOTHING] * count
        self.moments.extend(*columns, [before + at for at in part.falls], [self._per_copy] * count)
        if part.events:
            counts = total(self._counts, part.left)
            self._changes += part.events
            self._counted = len(self._changes), counts
            self._rising = part.events[-1] >= 0
        self.origins.append(self.origins[-1] if part.last is None else (layer, part.last))

    def snapshot(self) -> Moment:
        """Return the storages alive now."""
        return Moment(self.phase, f"{self._layer}{self._op.name}", self._counts, (), 0, self._per_copy)

    # copies of equal blocks, and runs of them

    def enter_copy(self, number: int, way: Way, skipped: int, times: str) -> None:
        """Called before a copy is run; `number` is its index, and `skipped` equal copies after it are not run, of as
        many as the axis `times` says."""

    def leave_copy(self) -> None:
        """Called after a copy was run."""

    def enter_run(self, run: int, first: Mapping[str, str]) -> None:
        """Begin the one copy that stands for all copies of a run.

        `first` maps the names of the last copy's layers to those of the first copy.
        """
        self.note()
        self._in_run = run
        self._first = first
        self._made_before = len(self.made)
        self._deferred: list[Storage] = []
        self._entered_at, self._alive_before = len(self._changes), self._counts
        self._first_moment = len(self.moments)

    def leave_run(self, *passed_on: Storage) -> None:
        """End the copy: count what it left once per further copy, except the storages `passed_on` to the next one."""
        self.note()
        run = self._in_run
        assert run is not None
        old = self._per_copy.get(run, {})
        new = dict(sorted(total(total(old, self._counts), negative(self._alive_before)).items()))
        keys, freed = list(self.sizes), Counter[tuple[str, ...]]()  # by shape and dtype, without labels
        for counts, sign in ((old, 1), (new, -1)) if old else ():
            for k, n in counts.items():
                freed[keys[k][:2]] += sign * n
        frees_past = any(freed[keys[k][:2]] > 0 for k in old)  # frees what the previous pass left: the first may peak
        born = {storage for storage in self.made[self._made_before :] if storage.refs > 0}
        renamed = self._renamed(new, filter(born.__contains__, passed_on))
        moments, of_run = self.moments, slice(self._first_moment, None)
        phases, layers, names = moments.phases[of_run], moments.layers[of_run], moments.names[of_run]
        shared, at, known = moments.shared[of_run], moments.at[of_run], moments.per_copy[of_run]
        in_first = [self._first.get(layer, layer) for layer in layers]
        others = [*self._as_last(zip(at, shared, strict=True), renamed)] if renamed else shared
        if self.phase == "backward":
            moments.extend(phases, in_first, names, others, at, _with_run(known, run, new))
        else:  # every copy leaves more alive, so the last one peaks
            moments.shared[of_run], moments.per_copy[of_run] = others, _with_run(known, run, new)
            if frees_past:
                moments.extend(phases, in_first, names, shared, at, _with_run(known, run, old))
        missing = next((key for key, n in new.items() if n < 0), None)
        if missing is not None:
            raise self._freed_twice(keys[missing])
        self._per_copy = {**self._per_copy, run: new}
        for storage in born:
            storage.run = run
        for storage in passed_on:  # exists once, not once per copy
            storage.run = None
        self._in_run = None
        for storage in self._deferred:
            storage.refs += 1
            self.drop(storage)

    def _renamed(self, left: Counts, passed_on: Iterable[Storage]) -> dict[int, int]:
        """Map the sizes of a run's inputs to those of its outputs if only their labels differ.

        From the second copy on, the input is the previous copy's output. Both are removed from what each copy `left`.
        """
        out: dict[int, int] = {}
        if min(left.values(), default=0) >= 0:
            return out
        keys = list(self.sizes)
        for storage in passed_on:
            entered = next((k for k, n in left.items() if n < 0 and keys[k][:2] == keys[storage.size][:2]), None)
            if entered is not None:
                out[entered] = storage.size
                left[entered] += 1
                left[storage.size] = left.get(storage.size, 0) - 1
        return out

    def _as_last(self, moments: Iterable[tuple[int, Counts]], renamed: Mapping[int, int]) -> Iterator[Counts]:
        """Yield what `shared` of the run's moments, given with `at`, is in the last of several copies."""
        at = self._entered_at
        alive = {entered: self._alive_before.get(entered, 0) for entered in renamed}
        known: dict[tuple[int, ...], Counts] = {}  # moments share equal counts
        for moment_at, shared in moments:
            for event in self._changes[at:moment_at]:
                if event in alive:
                    alive[event] += 1
                elif ~event in alive:
                    alive[~event] -= 1
            at, key = moment_at, (id(shared), *alive.values())
            if key not in known:
                known[key] = out = dict(shared)
                for entered, name in renamed.items():
                    n = alive[entered] - self._counts.get(entered, 0)
                    out[entered] = out.get(entered, 0) - n
                    out[name] = out.get(name, 0) + n
            yield known[key]


def _with_run(per_copy: Sequence[Mapping[int, Counts]], run: int, counts: Counts) -> list[Mapping[int, Counts]]:
    """Return for each moment what copies add, with other counts for one run. Moments that share it share the result."""
    changed = {id(each): {**each, run: counts} for each in {id(each): each for each in per_copy}.values()}
    return [changed[id(each)] for each in per_copy]
