"""`RepeatingTape`: a tape that runs a block once, and repeats its allocations and frees for blocks that run alike.

A model has few kinds of blocks, but the copies of a kind are run apart if anything around them differs: the first one,
the last ones, all those of a model whose layers alternate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial
from itertools import chain
from operator import itemgetter

from memplan.core.identity import Identity
from memplan.core.ir import Op
from memplan.core.records import NamedTuple
from memplan.engine.dtypes import ResolvedOps
from memplan.engine.frames import Frame
from memplan.engine.likeness import ALIKE, Likeness
from memplan.engine.operation_facts import Ops, names_read
from memplan.engine.storages import GRADIENT_OF, EventsOfBlock, Storage
from memplan.engine.tape import Tape


class BlockRepeat(NamedTuple):
    """The allocations and frees of a block.

    Its storages are numbered: first those that were there before it, then those that it made and left.

    events      its allocations and frees, as the tape notes them
    operations  the operation of each allocation
    last        the last operation
    allocated   the numbers of the storages that it allocated, if the tape numbers storages
    made        index among them, size, freshness and references of each storage that it made and left
    references  how many references to each earlier storage it took, less those that it dropped
    dropped     when it dropped its last reference to an earlier storage, last first: the number of events before,
                whether the next event was that it is free, and the storage's number
    result      name -> number of the storage that it returned under the name
    names       name -> number of the storage that is known by it
    kept        numbers of the storages that each node of its graph keeps
    held        what holds them -> numbers of storages that its operations hold from now on
    known       the events by what is noted for each storage of `dropped`
    orders      events in the same order, by whether each storage of `dropped` is freed: of all blocks that are alike
    like        how its operations differ from the first that they are like
    keys        what its sizes stand for, as in `LiveStorages.sizes`; empty until another block is like it
    """

    events: list[int]
    operations: list[Op]
    last: Op
    allocated: range
    made: list[tuple[int, int, bool, int]]
    references: list[int]
    dropped: list[tuple[int, bool, int]]
    result: dict[str, int]
    names: dict[str, int]
    kept: list[list[int]]
    held: dict[str, list[int]]
    known: dict[tuple[int, ...], EventsOfBlock]
    orders: dict[tuple[bool, ...], EventsOfBlock]
    like: Likeness
    keys: dict[int, tuple[str, ...]]

    def frees(self, earlier: list[Storage], freed: Callable[[Storage], int]) -> tuple[int, ...]:
        """Return what the tape notes for each storage of `dropped`: that it is `freed`, or 0 if something holds it."""
        dropped = [(earlier[n], earlier[n].refs + self.references[n]) for _, _, n in self.dropped]
        return tuple([0 if refs else freed(storage) for storage, refs in dropped])

    def with_frees(self, events: list[int], frees: tuple[int, ...]) -> list[int]:
        """Return the events with these frees of earlier storages."""
        events = [*events]
        for (at, was_freed, _), free in zip(self.dropped, frees, strict=True):
            events[at : at + was_freed] = [free] if free else []
        return events

    def among(self, frees: tuple[int, ...]) -> EventsOfBlock:
        """Return the events with these frees of earlier storages."""
        if frees not in self.known:
            events = self.with_frees(self.events, frees)
            order = tuple(map(bool, frees))
            if order not in self.orders:
                self.orders[order] = EventsOfBlock.of(events, self.operations)
            self.known[frees] = self.orders[order].of_sizes(events)
        return self.known[frees]


class RepeatingTape(Tape):
    """A tape that repeats blocks whose operations are alike."""

    def __init__(self, grads_exist: bool, labelled: bool, updates: Mapping[str, int]) -> None:
        super().__init__(grads_exist, labelled, updates)
        # Of blocks that are alike, by block:
        self._repeats: dict[tuple[object, ...], dict[Identity[Ops], BlockRepeat]] = {}

    def _runs_alike(self, frame: Frame) -> bool:
        """Whether the block's allocations depend on nothing but its operations and the storages that it finds."""
        differs = self.saves or self.module or self.nested or self.hooks or self.waiting is not None
        own = frame.saves or frame.shares or frame.named or frame.to_host
        return bool(frame.block) and not (differs or own) and _are_alike(Identity(frame.ops))

    def _run(
        self,
        frame: Frame,
        part: range,
        exported: Collection[str],
        owned: Mapping[str, Storage],
        keep: bool,
        holds: dict[str, list[Storage]],
    ) -> dict[str, Storage]:
        run = partial(super()._run, frame, part, exported, owned, keep, holds)
        if owned or (keep and (frame.recomputed or frame.reentrant)) or not self._runs_alike(frame):
            return run()
        if self._depends_on_run({*frame.past.values()}):
            return run()
        number, found = _numbered([], {**frame.past, **(frame.outer if keep else {})})
        first_name = _like(frame.ops)[1].inverse().name
        flows = _flows(frame, first_name) if keep else None
        key = ("forward", flows, *map(first_name, exported), *_renamed(found, first_name))
        return self._repeated(key, frame, [*number], run, holds)

    def _depends_on_run(self, dropped: Collection[Storage]) -> bool:
        """Whether it depends on the run of blocks what happens if a block drops the last references to storages."""
        if self._in_run is not None and any(s.run not in (None, self._in_run) for s in dropped):
            return True  # the run's other copies have storages like it
        return sum(map(self._is_deferred, dropped)) > 1  # they are freed in the order in which it drops them

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        run = partial(super().backward, frame, grads)
        if frame.recomputed or frame.reentrant or frame.past or not self._runs_alike(frame):
            run()
            return
        by_node, made = ((), {}) if frame.checkpointed else (frame.kept, frame.names)
        kept = [*frame.checkpoint, *chain.from_iterable(by_node)]
        own = Counter((*grads.values(), *kept))  # references that the block drops
        alone = {storage for storage, n in own.items() if storage.refs == n}  # nothing else holds them
        if self._depends_on_run(alone):
            run()
            return
        read = {name: frame.outer[name] for name in names_read(Identity(frame.ops)) if name in frame.outer}
        number, found = _numbered(own, read)
        inside = {name: number[storage] for name, storage in made.items() if storage in number}
        first_name = _like(frame.ops)[1].inverse().name
        gradients = {name: number[storage] for name, storage in grads.items()}
        names = [_renamed(each, first_name) for each in (gradients, found, inside)]
        summed = (*grads.values(), *chain.from_iterable(by_node))  # storages to which a gradient can be added
        in_place = tuple([storage.fresh and storage in alone for storage in summed])
        keeps = (*map(len, by_node), *map(number.__getitem__, kept))
        key = (frame.checkpointed, frame.whole, _flows(frame, first_name), *names, in_place, keeps)

        def result() -> dict[str, Storage]:
            run()
            return grads

        after = {**self._repeated(key, frame, [*number], result, {})}
        frame.checkpoint, frame.kept = [], ()
        grads.clear()
        grads.update(after)

    def _repeated(
        self,
        key: tuple[object, ...],
        frame: Frame,
        earlier: list[Storage],
        run: Callable[[], dict[str, Storage]],
        holds: dict[str, list[Storage]],
    ) -> dict[str, Storage]:
        """Run the block with `run`, or repeat what one like it did with the same key; return what `run` returns.

        `earlier` are the storages that it finds. What it holds is added to `holds`.
        """
        first, like = _like(frame.ops)
        repeats = self._repeats.setdefault((Identity(first), frame.block, *key), {})  # of blocks that are alike
        repeat = repeats.get(Identity(frame.ops))
        if repeat is None and repeats:
            repeat = repeats[Identity(frame.ops)] = self._as_in(like, next(iter(repeats.values())))
        if repeat is None:
            before = len(self._changes), len(self.origins), len(self.made)
            references, held = [storage.refs for storage in earlier], {name: len(each) for name, each in holds.items()}
            result = run()
            now = {name: each[held.get(name, 0) :] for name, each in holds.items()}
            repeats[Identity(frame.ops)] = self._done(frame, earlier, references, result, now, *before)
            return result
        made = self._run_again(repeat, earlier, frame.where)
        self.enter(frame, repeat.last)
        self.made += made
        for storage, change in zip(earlier, repeat.references, strict=True):
            storage.refs += change
            if change and not storage.refs and self._is_deferred(storage):
                self._deferred.append(storage)
        storages = [*earlier, *made]
        if repeat.kept:
            frame.names.update((name, storages[number]) for name, number in repeat.names.items())
            frame.kept = [[storages[number] for number in numbers] for numbers in repeat.kept]
        for name, numbers in repeat.held.items():
            holds.setdefault(name, []).extend([storages[number] for number in numbers])
        return {name: storages[number] for name, number in repeat.result.items()}

    def _run_again(self, repeat: BlockRepeat, earlier: list[Storage], layer: str) -> list[Storage]:
        """Allocate and free again what a block did, and return the storages that it makes and leaves."""
        self.repeat(repeat.among(repeat.frees(earlier, self._free)), layer)
        return [Storage(size, fresh, refs) for _, size, fresh, refs in repeat.made]

    def _free(self, storage: Storage) -> int:
        """Return what is noted if a block drops the last reference to a storage: nothing (0) if that is deferred."""
        return 0 if self._is_deferred(storage) else ~storage.size

    def _as_in(self, like: Likeness, repeat: BlockRepeat) -> BlockRepeat:
        """Return what a block does, given what another one did that is like it."""
        here = like.after(repeat.like)
        if not repeat.keys:
            keys = [*self.sizes]
            repeat.keys.update((size, keys[size]) for size in dict.fromkeys(repeat.events) if size >= 0)
        own: dict[int, int] = {}  # sizes that the other block allocates -> the block's own, if it is another
        for size, (shape, dtype, *labels) in repeat.keys.items():  # a recorder's only label is the stream
            if len(labels) > 1 and (name := labels[3].removeprefix(GRADIENT_OF)) in here.names:
                labels[3] = labels[3].removesuffix(name) + here.names[name]
            elif shape not in here.shapes:
                continue
            own[size] = self.sizes.setdefault((here.shapes.get(shape, shape), dtype, *labels), len(self.sizes))
        return repeat._replace(
            events=self._in_sizes(repeat.events, own),
            made=[(index, own.get(size, size), fresh, refs) for index, size, fresh, refs in repeat.made],
            keys={},
            result={here.name(name): number for name, number in repeat.result.items()},
            names={here.name(name): number for name, number in repeat.names.items()},
            known={},
            like=like,
        )

    def _in_sizes(self, events: list[int], own: Mapping[int, int]) -> list[int]:
        """Return the events with other sizes, of those that are `own`."""
        both = {**own, **{~size: ~other for size, other in own.items()}}
        return [*map(both.get, events, events)]

    def _done(
        self,
        frame: Frame,
        earlier: list[Storage],
        references: list[int],
        result: Mapping[str, Storage],
        held: Mapping[str, list[Storage]],
        events: int,
        origins: int,
        made: int,
    ) -> BlockRepeat:
        """Return what a block did, given the references before it, what it returned and holds, and the numbers of
        events, origins and storages before it."""
        allocated = self.made[made:]
        first_number = allocated[0].number if allocated else 0
        left = [(index, storage) for index, storage in enumerate(allocated) if storage.refs > 0]
        number = {storage: i for i, storage in enumerate((*earlier, *[storage for _, storage in left]))}
        kept = [[number[storage] for storage in each] for each in frame.kept] if any(frame.kept) else []
        changes = [storage.refs - before for storage, before in zip(earlier, references, strict=True)]
        dropped = [
            (s.at - events, not s.refs and not self._is_deferred(s), i) for i, s in enumerate(earlier) if changes[i] < 0
        ]
        return BlockRepeat(
            self._changes[events:],
            [op for _, op in self.origins[origins:]],
            self._op,
            range(first_number, first_number + len(allocated)),
            [(index, storage.size, storage.fresh, storage.refs) for index, storage in left],
            changes,
            sorted(dropped, key=itemgetter(0, 1), reverse=True),
            {name: number[storage] for name, storage in result.items()},
            {name: number[storage] for name, storage in frame.names.items() if storage in number} if kept else {},
            kept,
            {name: [number[storage] for storage in each] for name, each in held.items() if each},
            {},
            {},
            _like(frame.ops)[1],
            {},
        )


def _like(ops: Ops) -> tuple[Ops, Likeness]:
    """Return the first operations that a block's are like, and how they differ from those."""
    return (ops.first, ops.like) if isinstance(ops, ResolvedOps) and ops.first else (ops, ALIKE)


def _flows(frame: Frame, first_name: Callable[[str], str]) -> frozenset[str]:
    """Return the names of the tensors that enter a frame and need a gradient."""
    return frozenset(map(first_name, frame.flow.entering if frame.flow is not None else ()))


def _numbered(own: Iterable[Storage], named: Mapping[str, Storage]) -> tuple[dict[Storage, int], dict[str, int]]:
    """Number storages, the `own` ones first; return the numbers of the storages, and of those with names."""
    number = {storage: i for i, storage in enumerate(dict.fromkeys((*own, *named.values())))}
    return number, {name: number[storage] for name, storage in named.items()}


def _renamed(numbers: Mapping[str, int], first_name: Callable[[str], str]) -> tuple[tuple[str, int], ...]:
    return tuple([(first_name(name), number) for name, number in numbers.items()])


@lru_cache(maxsize=64)
def _are_alike(ops: Identity[Ops]) -> bool:
    """Whether the operations of a block let go nothing that others hold, and run no other model."""
    return not any(
        op.releases or op.captures or op.requires_gradient or op.wraps or op.model is not None for op in ops.value
    )
