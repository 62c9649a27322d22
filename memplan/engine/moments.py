"""`Moment`: the number of live storages of each size at one point of a pass. Structure only: no sizes, no depth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

Counts = dict[int, int]  # size -> number of live storages


class Moment(NamedTuple):
    """The number of live storages of each size at one point of a pass.

    phase     phase of the pass
    where     the operation
    shared    live storages in the copies that are run, a dict that many moments share
    changes   differences from `shared`
    per_copy  storages added by each copy of a run beyond the first, also shared by many moments
    """

    phase: str
    where: str
    shared: Counts
    changes: Counts
    per_copy: Mapping[int, Counts]

    @property
    def counts(self) -> Counts:
        """The number of live storages of each size in the copies that are run."""
        return _total(self.shared, self.changes)

    def less(self, other: Moment) -> Moment:
        """Return the storages alive at this moment but not at the other."""
        per_copy = {run: _negative(counts) for run, counts in other.per_copy.items()}
        return next(add_to_each((self,), other._replace(shared=_negative(other.counts), changes={}, per_copy=per_copy)))


def add_to_each(moments: Iterable[Moment], other: Moment) -> Iterator[Moment]:
    """Yield the moments, each with the storages of `other` added."""
    before: Moment | None = None
    shared: Counts = {}
    per_copy: Mapping[int, Counts] = {}
    for moment in moments:
        if before is None or moment.shared is not before.shared:
            shared = _total(moment.shared, other.counts)
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
