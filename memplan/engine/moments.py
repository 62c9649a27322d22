"""`Moment`: the number of live storages of each size at one point of a pass. Structure only: no sizes, no depth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from itertools import repeat
from typing import overload

from memplan.core.records import NamedTuple
from memplan.engine.events import packed

Counts = dict[int, int]  # size -> number of live storages


class Moment(NamedTuple):
    """The number of live storages of each size at one point of a pass.

    phase     phase of the pass
    where     the operation
    shared    live storages that `events` do not allocate, a dict that many moments share
    events    the pass in the copies that are run: the size of each allocation, `~size` for a free; all moments share it
    at        number of events before the moment
    per_copy  storages added by each copy of a run beyond the first, also shared by many moments
    """

    phase: str
    where: str
    shared: Counts
    events: Sequence[int]
    at: int
    per_copy: Mapping[int, Counts]

    @property
    def counts(self) -> Counts:
        """The number of live storages of each size in the copies that are run."""
        return after(self.events[: self.at], self.shared)

    def less(self, other: Moment) -> Moment:
        """Return the storages alive at this moment but not at the other."""
        per_copy = {run: negative(counts) for run, counts in other.per_copy.items()}
        gone = Moment(other.phase, other.where, negative(other.counts), (), 0, per_copy)
        return next(add_to_each((self,), gone))


Fields = tuple[str, str, Counts, Sequence[int], int, Mapping[int, Counts]]  # of a moment


class PassMoments(Sequence[Moment]):
    """The moments of a pass, which share its events. They are in columns, because they are many and live long.

    Names of operations are only made for the moments that are looked at.

    events  the events
    phases, shared, at, per_copy  a field of each moment
    layers, names  the two parts of each moment's `where`, as it was before it was `renamed`
    """

    def __init__(self, events: Sequence[int] = ()) -> None:
        self.events, self.phases = events, list[str]()
        self.layers, self.names = list[str](), list[str]()
        self.shared, self.per_copy = list[Counts](), list[Mapping[int, Counts]]()
        self.at: Sequence[int] = []
        self._name: Callable[[str], str] = str

    def extend(
        self,
        phases: Iterable[str],
        layers: Iterable[str],
        names: Iterable[str],
        shared: Iterable[Counts],
        at: Iterable[int],
        per_copy: Iterable[Mapping[int, Counts]],
    ) -> None:
        """Append moments, given a column of each field."""
        assert isinstance(self.at, list)
        self.phases += phases
        self.layers += layers
        self.names += names
        self.shared += shared
        self.at += at
        self.per_copy += per_copy

    def packed(self) -> PassMoments:
        """Return the moments, to which none will be appended."""
        self.events, self.at = packed(self.events), packed(self.at)
        return self

    def __len__(self) -> int:
        return len(self.phases)

    def __iter__(self) -> Iterator[Moment]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Moment: ...
    @overload
    def __getitem__(self, index: slice) -> list[Moment]: ...
    def __getitem__(self, index: int | slice) -> Moment | list[Moment]:
        if isinstance(index, slice):
            return [*map(self.__getitem__, range(len(self))[index])]
        where = self._name(self.layers[index] + self.names[index])
        return Moment(self.phases[index], where, self.shared[index], self.events, self.at[index], self.per_copy[index])

    @property
    def unnamed(self) -> Iterator[Fields]:
        """The moments' fields, to be counted: of `where` there is only the operation's name."""
        columns = self.phases, self.names, self.shared, repeat(self.events), self.at, self.per_copy
        return zip(*columns, strict=False)  # the events are one for all

    def renamed(self, names: Callable[[str], str]) -> PassMoments:
        """Return the moments with other names of their operations."""
        other = copy(self)
        other._name = lambda where: names(self._name(where))
        return other


def after(events: Iterable[int], counts: Counts) -> Counts:
    """Return the number of live storages of each size after the events, given those before them."""
    out = dict(counts)
    for event, n in Counter(events).items():
        size, change = (event, n) if event >= 0 else (~event, -n)
        out[size] = out.get(size, 0) + change
    return out


def add_to_each(moments: Iterable[Moment], other: Moment) -> Iterator[Moment]:
    """Yield the moments, each with the storages of `other` added."""
    before: Moment | None = None
    shared: Counts = {}
    per_copy: Mapping[int, Counts] = {}
    others = other.counts
    for moment in moments:
        if before is None or moment.shared is not before.shared:
            shared = total(moment.shared, others)
        if before is None or moment.per_copy is not before.per_copy:
            runs = {*moment.per_copy, *other.per_copy}
            per_copy = {run: total(moment.per_copy.get(run, {}), other.per_copy.get(run, {})) for run in runs}
        before = moment
        yield moment._replace(shared=shared, per_copy=per_copy)


def total(a: Counts, b: Counts) -> Counts:
    """Return the sums that are not zero."""
    out = dict(a)
    for size, n in b.items():
        out[size] = out.get(size, 0) + n
        if not out[size]:
            del out[size]
    return out


def negative(counts: Counts) -> Counts:
    return {size: -n for size, n in counts.items()}
