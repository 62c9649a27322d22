"""Putting sizes into lowered moments: a model's numbers once, then batch and sequence in microseconds.

The bytes of every moment are linear in a few variables: the rounded sizes that depend on the run. A moment that is
never larger than another one of its phase is left out; the rest are those that can be the peak of some run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import accumulate, islice
from math import prod
from operator import ge, mul, sub
from typing import Any

from memplan.core.arithmetic import Size
from memplan.core.ir import AT_LEAST
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE, rounded
from memplan.engine.moments import Fields, Moment


class Variable(NamedTuple):
    """A size that depends on the run, in bytes rounded up to 512.

    axes      axes of the run, multiplied
    factor    elements per unit of that product
    itemsize  bytes per element; 0 for the plain product of `axes`, if its coefficient is a multiple of 512 bytes
    per       elements of the shape per element of the storage
    """

    axes: tuple[str, ...]
    factor: int = 1
    itemsize: int = 0
    per: int = 1


ONE = Variable(())


class Term(NamedTuple):
    """The bytes of one moment, as coefficients of a program's variables, and its index."""

    coefficients: tuple[int, ...]
    moment: int


def size(shape: str, dtype: str, axes: Mapping[str, int]) -> tuple[Variable, int]:
    """Return the bytes of a storage as a variable and its multiple; axes that are not in `axes` depend on the run.

    A dtype `x/n` is one x per n elements, rounded up; likewise an axis `x*y/n` of the model.
    """
    name, _, block = dtype.partition("/")
    per, itemsize = int(block or 1), ITEMSIZE[name]
    factor = 1
    free: list[str] = []
    for token in shape.split():
        if token.isdigit():
            factor *= int(token)
        elif token in axes:
            factor *= axes[token]
        elif "/" in token:
            factor *= shared(token, axes)
        else:
            free.append(token)
    if not free:
        return ONE, rounded(-(-factor // per) * itemsize)
    free.sort()
    if per == 1 and factor * itemsize % 512 == 0:
        return Variable(tuple(free)), factor * itemsize
    return Variable(tuple(free), factor, itemsize, per), 1


def shared(axis: str, axes: Mapping[str, int]) -> int:
    """Return the size of an axis `x*y/n`: the product over n, rounded up.

    >>> shared("a*d/128", {"a": 9, "d": 64})
    5
    """
    names, _, per = axis.partition("/")
    return -(-prod(int(name) if name.isdigit() else axes[name] for name in names.split("*")) // int(per))


def alive(moment: Moment, runs: Sequence[tuple[str, int]], axes: Mapping[str, int]) -> dict[int, int]:
    """Return the number of live storages of each size at a moment, with all copies of repeated blocks."""
    out = moment.counts
    for run, counts in moment.per_copy.items():
        axis, counted = runs[run]
        copies = axes[axis] - counted
        for key, n in counts.items():
            out[key] = out.get(key, 0) + n * copies
    return out


def counts_at_each(
    moments: Iterable[Fields], runs: Sequence[tuple[str, int]], axes: Mapping[str, int], sizes: Sequence[int]
) -> Iterator[dict[int, int]]:
    """Yield how many storages of each size in bytes are alive at every moment, given the bytes of each size."""
    distinct = [*dict.fromkeys(sizes)]
    index = {bytes_: i for i, bytes_ in enumerate(distinct)}
    for totals in _totals(moments, runs, axes, [(index[bytes_], 1) for bytes_ in sizes], len(distinct)):
        yield dict(zip(distinct, totals, strict=True))


def bytes_at_each(
    moments: Iterable[Fields], runs: Sequence[tuple[str, int]], axes: Mapping[str, int], sizes: Sequence[int]
) -> Iterator[int]:
    """Yield the bytes alive at every moment, given the bytes of a storage of each size."""
    changes = [*sizes, *(-bytes_ for bytes_ in reversed(sizes))]  # of each event: a free is a negative index
    copies = [axes[axis] - counted for axis, counted in runs]

    known: dict[int, tuple[Mapping[int, int], int]] = {}  # many moments share the counts: by their id, which they keep

    def bytes_of(counts: Mapping[int, int]) -> int:
        if id(counts) not in known:
            known[id(counts)] = counts, sum(sizes[size] * n for size, n in counts.items())
        return known[id(counts)][1]

    last_shared = last_events = last_per_copy = None
    upto, held, repeated = [0], 0, 0  # after each event, of what no event allocates, and of the other copies of runs
    for _, _, shared, events, at, per_copy in moments:
        if events is not last_events:
            last_events, upto = events, [*accumulate(map(changes.__getitem__, events), initial=0)]
        if shared is not last_shared:
            last_shared, held = shared, bytes_of(shared)
        if per_copy is not last_per_copy:
            last_per_copy = per_copy
            repeated = sum(copies[run] * bytes_of(counts) for run, counts in per_copy.items())
        yield upto[at] + held + repeated


def kinds_at_each(
    moments: Iterable[Fields],
    runs: Sequence[tuple[str, int]],
    axes: Mapping[str, int],
    sizes: Sequence[int],
    kinds: Sequence[str],
) -> Iterator[Counter[str]]:
    """Yield the bytes of each kind alive at every moment, given the bytes and the kind of a storage of each size."""
    distinct = [*dict.fromkeys(kinds)]
    places = [(distinct.index(kind), bytes_) for kind, bytes_ in zip(kinds, sizes, strict=True)]
    for totals in _totals(moments, runs, axes, places, len(distinct)):
        yield Counter(dict(zip(distinct, totals, strict=True)))


def rows(
    moments: Iterable[Fields],
    runs: Sequence[tuple[str, int]],
    axes: Mapping[str, int],
    sizes: Sequence[tuple[Variable, int]],
    variables: Sequence[Variable],
) -> Iterator[tuple[int, ...]]:
    """Yield the bytes alive at every moment as coefficients of `variables`, with all copies of repeated blocks."""
    index = {v: i for i, v in enumerate(variables)}
    places = [(index[v], n) for v, n in sizes]
    return map(tuple, _totals(moments, runs, axes, places, len(variables)))


def _totals(
    moments: Iterable[Fields],
    runs: Sequence[tuple[str, int]],
    axes: Mapping[str, int],
    places: Sequence[tuple[int, int]],
    width: int,
) -> Iterator[list[int]]:
    """Yield sums over the live storages at every moment, with all copies of repeated blocks.

    places  for each size, which of the sums its storages add to, and how much
    width   the number of sums
    """
    totals = [0] * width  # one list, changed from moment to moment
    steps = [*places, *((i, -n) for i, n in reversed(places))]  # of each event: a free is a negative index
    copies = [axes[axis] - counted for axis, counted in runs]

    def add(counts: Mapping[int, int], times: int) -> None:
        for size, count in counts.items():
            i, n = places[size]
            totals[i] += n * count * times

    last_shared: Mapping[int, int] = {}
    last_events: Sequence[int] = ()
    last_at = 0
    last_per_copy: Mapping[int, Mapping[int, int]] = {}
    for _, _, shared, events, at, per_copy in moments:
        if shared is not last_shared:
            add(last_shared, -1)
            add(shared, 1)
            last_shared = shared
        if per_copy is not last_per_copy:
            for run in {*last_per_copy, *per_copy}:
                old, new = last_per_copy.get(run, {}), per_copy.get(run, {})
                if new is not old:
                    add(old, -copies[run])
                    add(new, copies[run])
            last_per_copy = per_copy
        if events is not last_events:
            for event in last_events[:last_at]:
                i, n = steps[event]
                totals[i] -= n
            last_events, last_at = events, 0
        for event in events[last_at:at]:
            i, n = steps[event]
            totals[i] += n
        for event in events[at:last_at]:  # a moment of a copy that was run before the last one
            i, n = steps[event]
            totals[i] -= n
        last_at = at
        yield totals


@lru_cache(maxsize=64)
def chain(variables: tuple[Variable, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the longest chain of the variables' products of axes, largest first: each is always at least the next.

    For example b s s >= b s >= s >= 1, and s rounded up is at least s. Among chains of equal length, the one with the
    most variables is taken.
    """
    counts = Counter(v.axes for v in variables)

    def rank(products: tuple[tuple[str, ...], ...]) -> tuple[int, int]:
        return len(products), sum(counts[axes] for axes in products)

    best: dict[tuple[str, ...], tuple[tuple[str, ...], ...]] = {}
    for axes in sorted(counts, key=lambda p: (len(p), sum(map(_height, p)), p)):
        below = [best[other] for other in best if _at_most(other, axes)]
        best[axes] = (axes, *max(below, key=rank, default=()))
    return max(best.values(), key=rank)


def _height(axis: str) -> int:
    """Return the number of axes known to be at most this one, including itself."""
    return 1 + _height(AT_LEAST[axis]) if axis in AT_LEAST else 0


_AT_ONCE = 2048  # candidates that are compared at a time: all those of some models would take 30 MB


def prune(
    candidates: Iterable[tuple[tuple[int, ...], int]],
    variables: tuple[Variable, ...],
    along: Sequence[tuple[str, ...]] | None = None,
) -> tuple[Term, ...]:
    """Return the candidates (rows, and their moments) that can be the largest for some run.

    Leaves out every candidate that is never larger than another one, or that lies midway between two others. Along a
    chain of products, running sums of coefficients are compared, from the largest product down; the chain is the
    variables' own unless `along` is given. A rounded size is its product plus at most 511 bytes.
    """
    products = {axes: i for i, axes in enumerate(chain(variables) if along is None else along)}
    kept, each = tuple[Term, ...](), iter(candidates)
    while more := [*islice(each, _AT_ONCE)]:
        kept = _pruned((*kept, *more), variables, products)
    return kept


def _pruned(
    candidates: Iterable[tuple[tuple[int, ...], int]],
    variables: tuple[Variable, ...],
    products: Mapping[tuple[str, ...], int],
) -> tuple[Term, ...]:
    """Return which of a few candidates `prune` keeps; `products` numbers those of the chain."""
    chained = [v.axes in products and v.per == 1 for v in variables]
    rounds = [i for i, v in enumerate(variables) if v.itemsize and chained[i]]
    others = [i for i, is_chained in enumerate(chained) if not is_chained]
    multiples = [(i, products[v.axes], v.factor * (v.itemsize or 1)) for i, v in enumerate(variables) if chained[i]]
    first: dict[tuple[int, ...], int] = {}
    for row, moment in candidates:
        first.setdefault(row, moment)
    left = without_midpoints(_local_maxima(first, others))
    columns = _transposed(left, len(variables))
    by_product = [[0] * len(left) for _ in products]
    for i, product, multiple in multiples:
        by_product[product] = [n + count * multiple for n, count in zip(by_product[product], columns[i], strict=True)]
    sums = [tuple(accumulate(each)) for each in _transposed(by_product, len(left))]
    apart, rounding = (_transposed([columns[i] for i in wanted], len(left)) for wanted in (others, rounds))
    by_sums = sorted(map(_Candidate, sums, apart, rounding, left), key=_sums, reverse=True)
    kept: list[Term] = []
    larger: list[_Candidate] = []  # those kept; the last one found to be larger is tried first, as it often is again
    for candidate in by_sums:
        for at, other in enumerate(larger):
            if _always_at_least(other, candidate):
                larger.insert(0, larger.pop(at))
                break
        else:
            kept.append(Term(candidate.row, first[candidate.row]))
            larger.append(candidate)
    return tuple(kept)


def _local_maxima(rows: Iterable[tuple[int, ...]], others: Sequence[int]) -> list[tuple[int, ...]]:
    """Leave out rows of which no coefficient is larger than that of the row before or after, as while memory rises.

    Of two rows that can be equal, the first is kept: if the second has more of `others` only, which can be zero.
    """
    out: list[tuple[int, ...]] = []
    totals: list[int] = []
    for row in rows:
        total = sum(row)
        while out and total > totals[-1] and all(map(ge, row, out[-1])) and all(row[i] == out[-1][i] for i in others):
            out.pop()
            totals.pop()
        if not (out and total <= totals[-1] and all(map(ge, out[-1], row))):
            out.append(row)
            totals.append(total)
    return out


def without_midpoints(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Leave out rows that lie midway between an earlier and a later row: they are never larger than both.

    A loop over experts makes hundreds of such rows, because every iteration adds the same. The differences between
    consecutive rows repeat with the number of rows per iteration.

    >>> without_midpoints([(0, 9), (1, 7), (2, 8), (3, 6), (4, 7), (5, 5)])
    [(0, 9), (1, 7), (2, 8), (4, 7), (5, 5)]
    """
    out = [*rows[:1]]
    totals = [*map(sum, rows)]  # compared first, as they tell most
    last: dict[tuple[int, ...], int] = {}  # difference -> the last row after it
    period = 0
    for i in range(1, len(rows)):
        step = tuple(map(sub, rows[i], rows[i - 1]))
        for length in (period, i - last.get(step, i)):
            before, after = i - length, i + length
            if (
                length
                and after < len(rows)
                and 2 * totals[i] == totals[before] + totals[after]
                and _midway(rows[before], rows[i], rows[after])
            ):
                period = length
                break
        else:
            out.append(rows[i])
        last[step] = i
    return out


def _midway(before: tuple[int, ...], row: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return all(2 * n == low + high for low, n, high in zip(before, row, after, strict=True))


class _Candidate(NamedTuple):
    """A row, and what `_always_at_least` compares.

    sums      running sums of its coefficients along the chain
    apart     coefficients of variables outside the chain
    rounding  coefficients of rounded variables
    row       all coefficients
    """

    sums: tuple[int, ...]
    apart: tuple[int, ...]
    rounding: tuple[int, ...]
    row: tuple[int, ...]


def _transposed(rows: Sequence[Sequence[int]], columns: int) -> list[tuple[int, ...]]:
    """Return the columns of a table, whose number says how many empty ones a table without rows has."""
    return [*zip(*rows, strict=True)] if rows else [()] * columns


def _sums(candidate: _Candidate) -> tuple[int, ...]:
    return candidate.sums


def _always_at_least(large: _Candidate, small: _Candidate) -> bool:
    """Whether one candidate is at least as large as the other for every run. Cheap comparisons come first."""
    if large.sums[-1] < small.sums[-1]:
        return False
    if not all(map(ge, large.apart, small.apart)) or not all(map(ge, large.sums, small.sums)):
        return False
    slack = 511 * sum(n - m for n, m in zip(small.rounding, large.rounding, strict=True) if n > m)
    return large.sums[-1] >= small.sums[-1] + slack


def _at_most(small: tuple[str, ...], large: tuple[str, ...]) -> bool:
    left = list(large)
    for axis in small:
        match = next((a for a in left if a == axis), None) or next((a for a in left if AT_LEAST.get(a) == axis), None)
        if match is None:
            return False
        left.remove(match)
    return True


def values(variables: Sequence[Variable], axes: Mapping[str, Size]) -> list[Size]:
    """Return the variables' values for a run, or for many runs at once.

    Because variables are sorted by axes, each product is computed once. Without axes the product is the number 1, also
    for many runs.
    """
    out: list[Any] = []
    known: tuple[str, ...] = ()
    product: Any = 1
    for names, factor, itemsize, per in variables:
        if names != known:
            known, product = names, 1
            for name in names:
                product = product * axes[name]
        if not itemsize:
            out.append(product)
        elif per == 1:
            out.append((product * (factor * itemsize) + 511) & -512)
        else:
            out.append(rounded(-(-product * factor // per) * itemsize))
    return out


def largest(terms: Sequence[Term], values: Sequence[int]) -> tuple[int, int]:
    """Return the most bytes of any term, and the moment of the first that takes them."""
    sums = [sum(map(mul, term.coefficients, values)) for term in terms]
    most = max(sums)
    return most, terms[sums.index(most)].moment
