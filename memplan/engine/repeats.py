"""`RepeatingTape`: a tape that runs a block once, and repeats its allocations and frees for blocks that run alike.

A model has few kinds of blocks, but the copies of a kind are run apart if anything around them differs: the first one,
the last ones, all those of a model whose layers alternate.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from functools import lru_cache, partial
from operator import itemgetter

from memplan.core.identity import Identity
from memplan.core.ir import Op
from memplan.core.records import NamedTuple
from memplan.engine.frames import Frame
from memplan.engine.operation_facts import Ops, are_holding, names_read
from memplan.engine.storages import EventsOfBlock, Storage
from memplan.engine.tape import Tape


class _Repeat(NamedTuple):
    """The allocations and frees of a block.

    Its storages are numbered: first those that were there before it, then those that it made and left.

    events      its allocations and frees, as in `Moment`
    operations  the operation of each allocation
    last        the last operation
    made        size, freshness and references of each storage that it made and left
    references  how many references to each earlier storage it took, less those that it dropped
    dropped     when it dropped its last reference to an earlier storage, last first: the number of events before,
                whether the next event was that it is free, and the storage's number
    result      name -> number of the storage that it returned under the name
    known       the events by which of the latter storages it frees
    """

    events: list[int]
    operations: list[Op]
    last: Op
    made: list[tuple[int, bool, int]]
    references: list[int]
    dropped: list[tuple[int, bool, int]]
    result: dict[str, int]
    known: dict[tuple[int, ...], EventsOfBlock]

    def among(self, earlier: list[Storage]) -> EventsOfBlock:
        """Return the events if it finds these storages, which are freed unless something else still holds them."""
        frees = tuple(
            [~earlier[n].size if earlier[n].refs + self.references[n] == 0 else 0 for _, _, n in self.dropped]
        )
        if frees not in self.known:
            events = [*self.events]
            for (at, was_freed, _), free in zip(self.dropped, frees, strict=True):
                events[at : at + was_freed] = [free] if free else []
            self.known[frees] = EventsOfBlock.of(events, self.operations)
        return self.known[frees]


class RepeatingTape(Tape):
    """A tape that repeats blocks of equal operations, if what they keep and hold is only their checkpoint's."""

    def __init__(self, grads_exist: bool, labelled: bool, updates: Mapping[str, int]) -> None:
        super().__init__(grads_exist, labelled, updates)
        self._repeats: dict[tuple[object, ...], _Repeat] = {}

    def _runs_alike(self, frame: Frame) -> bool:
        """Whether the block's allocations depend on nothing but its operations and the storages that it finds."""
        differs = self.saves or self.module or self.nested or self.hooks or self.waiting is not None
        own = frame.past or frame.saves or frame.shares or frame.named or frame.to_host
        return bool(frame.block) and not (differs or own) and _are_alike(Identity(frame.ops))

    def _run(
        self,
        frame: Frame,
        part: range,
        exported: Container[str],
        owned: Mapping[str, Storage],
        keep: bool,
        holds: dict[str, list[Storage]],
    ) -> dict[str, Storage]:
        run = partial(super()._run, frame, part, exported, owned, keep, holds)
        if keep or owned or not self._runs_alike(frame):
            return run()
        return self._repeated((Identity(frame.ops), frame.block, exported), frame, [], run)

    def backward(self, frame: Frame, grads: dict[str, Storage]) -> None:
        run = partial(super().backward, frame, grads)
        if not frame.checkpointed or frame.reentrant or not self._runs_alike(frame):
            run()
            return
        own = [*grads.values(), *frame.checkpoint]  # each is a reference that the block drops
        found = [(name, frame.outer[name]) for name in names_read(Identity(frame.ops)) if name in frame.outer]
        earlier = [*dict.fromkeys((*own, *(storage for _, storage in found)))]
        alone = {storage for storage in own if storage.refs == own.count(storage)}  # nothing else holds them
        if self._in_run is not None and any(s.shared or s.run not in (None, self._in_run) for s in alone):
            run()  # the run's other copies need what this one would free
            return
        number = {storage: i for i, storage in enumerate(earlier)}
        names = [(name, number[storage]) for name, storage in (*grads.items(), *found)]
        in_place = [storage.fresh and storage in alone for storage in grads.values()]
        key = (Identity(frame.ops), frame.block, frame.flow, frame.whole, len(grads), *names, *in_place)

        def result() -> dict[str, Storage]:
            run()
            return grads

        after = {**self._repeated((*key, *map(number.get, frame.checkpoint)), frame, earlier, result)}
        frame.checkpoint = []
        grads.clear()
        grads.update(after)

    def _repeated(
        self, key: tuple[object, ...], frame: Frame, earlier: list[Storage], run: Callable[[], dict[str, Storage]]
    ) -> dict[str, Storage]:
        """Run the block with `run`, or repeat what one with the same key did; return what `run` returns.

        `earlier` are the storages that it finds.
        """
        repeat = self._repeats.get(key)
        if repeat is None:
            before = len(self._changes), len(self.origins), len(self.made)
            references = [storage.refs for storage in earlier]
            result = run()
            self._repeats[key] = self._done(earlier, references, result, *before)
            return result
        self.repeat(repeat.among(earlier), frame.where)
        self.enter(frame, repeat.last)
        made = [Storage(size, fresh, refs) for size, fresh, refs in repeat.made]
        self.made += made
        for storage, change in zip(earlier, repeat.references, strict=True):
            storage.refs += change
        storages = [*earlier, *made]
        return {name: storages[number] for name, number in repeat.result.items()}

    def _done(
        self,
        earlier: list[Storage],
        references: list[int],
        result: Mapping[str, Storage],
        events: int,
        origins: int,
        made: int,
    ) -> _Repeat:
        """Return what a block did given the references, and the numbers of events, origins and storages, before it."""
        left = [storage for storage in self.made[made:] if storage.refs > 0]
        number = {storage: i for i, storage in enumerate((*earlier, *left))}
        changes = [storage.refs - before for storage, before in zip(earlier, references, strict=True)]
        dropped = [(s.at - events, not s.refs, i) for i, s in enumerate(earlier) if changes[i] < 0]
        return _Repeat(
            self._changes[events:],
            [op for _, op in self.origins[origins:]],
            self._op,
            [(storage.size, storage.fresh, storage.refs) for storage in left],
            changes,
            sorted(dropped, key=itemgetter(0, 1), reverse=True),
            {name: number[storage] for name, storage in result.items()},
            {},
        )


@lru_cache(maxsize=128)
def _are_alike(ops: Identity[Ops]) -> bool:
    """Whether the operations of a block hold nothing for other blocks, and run no other model."""
    return not any(are_holding(ops.value)) and not any(op.past or op.wraps or op.model for op in ops.value)
