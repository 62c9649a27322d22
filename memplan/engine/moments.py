"""`Moment`: the number of live storages of each size at one point of a pass. Structure only: no sizes, no depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, overload

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
        per_copy = {run: _negative(counts) for run, counts in other.per_copy.items()}
        gone = Moment(other.phase, other.where, _negative(other.counts), (), 0, per_copy)
        return next(add_to_each((self,), gone))


Fields = tuple[str, str, Counts, Sequence[int], int, Mapping[int, Counts]]  # of a moment


class PassMoments(Sequence[Moment]):
    """The moments of a pass. They are stored in columns, because they are many and live long.

    Names of operations are only made for the moments that are looked at.
    """

    def __init__(self, moments: Iterable[Moment]) -> None:
        *columns, events, at, per_copy = [*zip(*moments, strict=True)] or [()] * len(Moment._fields)
        arrays = {number: packed(each) for number, each in {id(each): each for each in events}.items()}
        events = [arrays[id(each)] for each in events]
        self._columns: tuple[Sequence[Any], ...] = *columns, events, packed(at), per_copy
        self._name: Callable[[str], str] = str

    def __len__(self) -> int:
        return len(self._columns[0])

    def __iter__(self) -> Iterator[Moment]:
        return (moment._replace(where=self._name(moment.where)) for moment in map(Moment._make, self.unnamed))

    @overload
    def __getitem__(self, index: int) -> Moment: ...
    @overload
    def __getitem__(self, index: slice) -> PassMoments: ...
    def __getitem__(self, index: int | slice) -> Moment | PassMoments:
        if isinstance(index, slice):
            return PassMoments([*self][index])
        moment = Moment._make(column[index] for column in self._columns)
        return moment._replace(where=self._name(moment.where))

    @property
    def unnamed(self) -> Iterator[Fields]:
        """The moments' fields, to be counted: `where` is as it was before they were `renamed`."""
        return zip(*self._columns, strict=True)

    @property
    def phases(self) -> Sequence[str]:
        """The phase of each moment."""
        return self._columns[0]

    def renamed(self, names: Callable[[str], str]) -> PassMoments:
        """Return the moments with other names of their operations."""
        other = PassMoments(())
        other._columns, other._name = self._columns, lambda where: names(self._name(where))
        return other


def after(events: Iterable[int], counts: Counts) -> Counts:
    """Return the number of live storages of each size after the events, given those before them."""
    out = dict(counts)
    for event in events:
        if event >= 0:
            out[event] = out.get(event, 0) + 1
        else:
            out[~event] = out.get(~event, 0) - 1
    return out


def add_to_each(moments: Iterable[Moment], other: Moment) -> Iterator[Moment]:
    """Yield the moments, each with the storages of `other` added."""
    before: Moment | None = None
    shared: Counts = {}
    per_copy: Mapping[int, Counts] = {}
    others = other.counts
    for moment in moments:
        if before is None or moment.shared is not before.shared:
            shared = _total(moment.shared, others)
        if before is None or moment.per_copy is not before.per_copy:
            runs = {*moment.per_copy, *other.per_copy}
            per_copy = {run: _total(moment.per_copy.get(run, {}), other.per_copy.get(run, {})) for run in runs}
        before = moment
        yield moment._replace(shared=shared, per_copy=per_copy)


def _total(a: Counts, b: Counts) -> Counts:
    out = dict(a)
    for size, n in b.items():
        out[size] = out.get(size, 0) + n
    return out


def _negative(counts: Counts) -> Counts:
    return {size: -n for size, n in counts.items()}
