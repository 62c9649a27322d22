"""Walking: sizes put into lowered moments. One model's numbers once, then batch and sequence in microseconds.

The bytes of every moment are linear in a few variables: the rounded sizes that depend on the run. A moment that
another of its phase never falls below is left out; the others are those that can be the peak for some run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import ge, mul, sub
from typing import Any, NamedTuple

from memplan.core.arithmetic import Size
from memplan.core.ir import AT_LEAST
from memplan.core.units import ITEMSIZE, rounded
from memplan.engine.lower import Moment


class Variable(NamedTuple):
    """A size that the run decides: `factor` elements for every point of `axes`, in rounded bytes.

    With `itemsize` 0 it is the plain product of `axes`: a factor that makes every multiple one of 512 bytes stands
    in the coefficient instead.
    """

    axes: tuple[str, ...]
    factor: int = 1
    itemsize: int = 0
    per: int = 1


ONE = Variable(())
Bytes = dict[Variable, int]  # a linear combination


class Term(NamedTuple):
    """The bytes of one moment, as coefficients over a program's variables.

    `at_least` are coefficients over the products of a chain (see `chain`) whose sum the moment never falls below, and
    never exceeds by more than `slack`; None where it has variables outside the chain.
    """

    coefficients: tuple[int, ...]
    at_least: tuple[int, ...]
    slack: int | None
    moment: int


def size(shape: str, dtype: str, axes: Mapping[str, int]) -> tuple[Variable, int]:
    """The bytes of a storage as a multiple of one variable; axes that are not in `axes` belong to the run.

    A dtype `x/n` is one x for every n elements, rounded up; so is an axis `x*y/n` of the model's.
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
    """How many blocks of n an axis `x*y/n` has.

    >>> shared("a*d/128", {"a": 9, "d": 64})
    5
    """
    names, _, per = axis.partition("/")
    return -(-prod(int(name) if name.isdigit() else axes[name] for name in names.split("*")) // int(per))


def alive(moment: Moment, runs: Sequence[tuple[str, int]], axes: Mapping[str, int]) -> dict[int, int]:
    """How many storages of each size are alive at a moment, all copies of repeated blocks counted."""
    out = dict(moment.counts)
    for run, counts in moment.per_copy.items():
        axis, counted = runs[run]
        copies = axes[axis] - counted
        for key, n in counts.items():
            out[key] = out.get(key, 0) + n * copies
    return out


def moment_bytes(counts: Mapping[int, int], sizes: Sequence[tuple[Variable, int]]) -> Bytes:
    """The bytes alive at a moment."""
    out: Bytes = {}
    for key, count in counts.items():
        if count:
            variable, n = sizes[key]
            out[variable] = out.get(variable, 0) + n * count
    return out


def rows(
    moments: Iterable[Moment],
    runs: Sequence[tuple[str, int]],
    axes: Mapping[str, int],
    sizes: Sequence[tuple[Variable, int]],
    variables: Sequence[Variable],
) -> list[tuple[int, ...]]:
    """The bytes alive at every moment, as coefficients over `variables`, all copies of repeated blocks counted."""
    index = {v: i for i, v in enumerate(variables)}
    place = [(index[v], n) for v, n in sizes]
    copies = [axes[axis] - counted for axis, counted in runs]

    def add(counts: Mapping[int, int], row: list[int], times: int = 1) -> None:
        for key, count in counts.items():
            i, n = place[key]
            row[i] += n * count * times

    shared: Mapping[int, int] = {}
    further: Mapping[int, Mapping[int, int]] = {}  # what copies beyond the first add
    common = [0] * len(variables)  # the row of those two
    out: list[tuple[int, ...]] = []
    for moment in moments:
        if moment.shared is not shared:
            add(shared, common, -1)
            shared = moment.shared
            add(shared, common)
        if moment.per_copy is not further:
            for run in {*further, *moment.per_copy}:
                old, new = further.get(run, {}), moment.per_copy.get(run, {})
                if new is not old:
                    add(old, common, -copies[run])
                    add(new, common, copies[run])
            further = moment.per_copy
        row = list(common)
        add(moment.changes, row)
        out.append(tuple(row))
    return out


def chain(variables: Sequence[Variable]) -> list[tuple[str, ...]]:
    """The longest chain of products of axes among the variables, largest first: each is at least the next, always. Of
    several, one that most variables are of.

    1 <= s <= b s <= b s s, and s rounded up is at least s.
    """
    of = Counter(v.axes for v in variables)

    def reach(products: list[tuple[str, ...]]) -> tuple[int, int]:
        return len(products), sum(of[axes] for axes in products)

    best: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for axes in sorted(of, key=lambda p: (len(p), sum(map(_height, p)), p)):
        below = [best[other] for other in best if _at_most(other, axes)]
        best[axes] = [axes, *max(below, key=reach, default=())]
    return max(best.values(), key=reach)


def _height(axis: str) -> int:
    """How many axes are known to be no larger than this one."""
    return 1 + _height(AT_LEAST[axis]) if axis in AT_LEAST else 0


def prune(
    candidates: Iterable[tuple[tuple[int, ...], int]],
    variables: Sequence[Variable],
    along: Sequence[tuple[str, ...]] | None = None,
) -> tuple[Term, ...]:
    """Return the candidates, rows of moments, that can be the largest for some run.

    Leaves out every candidate that is never larger than a certain other one, or that lies midway between two others.
    Along a chain of products what counts is the sum of coefficients from the largest down: the variables' own, or the
    one to go `along`. A rounded size is its product plus at most 511 bytes.
    """
    products = {axes: i for i, axes in enumerate(chain(variables) if along is None else along)}
    chained = [v.axes in products and v.per == 1 for v in variables]
    rounds = [i for i, v in enumerate(variables) if v.itemsize and chained[i]]
    others = [i for i, inside in enumerate(chained) if not inside]
    multiples = [(i, products[v.axes], v.factor * (v.itemsize or 1)) for i, v in enumerate(variables) if chained[i]]
    first: dict[tuple[int, ...], int] = {}
    for row, moment in candidates:
        first.setdefault(row, moment)
    found: list[_Candidate] = []
    for row in without_midpoints(list(first)):
        linear = [0] * len(products)
        for i, product, multiple in multiples:
            linear[product] += row[i] * multiple
        rounding, apart = [row[i] for i in rounds], [row[i] for i in others]
        slack = None if any(apart) else 511 * sum(rounding)
        term = Term(row, tuple(linear), slack, first[row])
        sums = [*accumulate(linear)]
        found.append(_Candidate(sums, sums[-1], sum(apart), apart, rounding, term))
    found.sort(key=_sums, reverse=True)
    kept: list[Term] = []
    larger: list[_Candidate] = []  # those kept, the one last found larger first: it often is again
    for one in found:
        for at, other in enumerate(larger):
            if _always_at_least(other, one):
                larger.insert(0, larger.pop(at))
                break
        else:
            kept.append(one.term)
            larger.append(one)
    return tuple(kept)


def without_midpoints(rows: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Leave out rows that lie midway between an earlier and a later one: no run makes them larger than both.

    A loop over experts makes hundreds of them, since each iteration adds the same. The steps from one row to the next
    repeat after as many rows as an iteration has.

    >>> without_midpoints([(0, 9), (1, 7), (2, 8), (3, 6), (4, 7), (5, 5)])
    [(0, 9), (1, 7), (2, 8), (4, 7), (5, 5)]
    """
    out = [*rows[:1]]
    last: dict[tuple[int, ...], int] = {}  # the row that a step led to last
    period = 0
    for i in range(1, len(rows)):
        step = tuple(map(sub, rows[i], rows[i - 1]))
        for length in (period, i - last.get(step, i)):
            if length and i + length < len(rows) and _midway(rows[i - length], rows[i], rows[i + length]):
                period = length
                break
        else:
            out.append(rows[i])
        last[step] = i
    return out


def _midway(before: tuple[int, ...], row: tuple[int, ...], after: tuple[int, ...]) -> bool:
    return all(2 * n == low + high for low, n, high in zip(before, row, after, strict=True))


class _Candidate(NamedTuple):
    """A term, the sums of its coefficients along the chain and their `total`, those of variables outside it (`whole`:
    all together), and those of variables that are rounded."""

    sums: list[int]
    total: int
    whole: int
    apart: list[int]
    rounding: list[int]
    term: Term


def _sums(candidate: _Candidate) -> list[int]:
    return candidate.sums


def _always_at_least(large: _Candidate, small: _Candidate) -> bool:
    """Whether one is at least as large as the other for every run. Numbers are compared before lists: most differ."""
    if large.total < small.total or large.whole < small.whole:
        return False
    if not all(map(ge, large.apart, small.apart)) or not all(map(ge, large.sums, small.sums)):
        return False
    slack = 511 * sum(n - m for n, m in zip(small.rounding, large.rounding, strict=True) if n > m)
    return large.total >= small.total + slack


def _at_most(small: tuple[str, ...], large: tuple[str, ...]) -> bool:
    left = list(large)
    for axis in small:
        match = next((a for a in left if a == axis), None) or next((a for a in left if AT_LEAST.get(a) == axis), None)
        if match is None:
            return False
        left.remove(match)
    return True


def values(variables: Sequence[Variable], axes: Mapping[str, Size]) -> list[Size]:
    """The variables' values for a run, or for many. Sorted by axes, as they are, each product is made once.

    What stands for no axis is the number 1, also for many runs.
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
            out.append((product * factor * itemsize + 511) & -512)
        else:
            out.append(rounded(-(-product * factor // per) * itemsize))
    return out


def largest(terms: Sequence[Term], values: Sequence[int], products: Sequence[int]) -> tuple[int, int]:
    """The most bytes of any term, and its moment. `products` are the values of the chain's products."""
    floors = [sum(map(mul, term.at_least, products)) for term in terms]
    highest = max(floors)
    found: tuple[int, int] | None = None  # less than nothing, where what is there throughout is counted apart
    for term, floor in zip(terms, floors, strict=True):
        if term.slack is None or floor + term.slack >= highest:
            total = sum(map(mul, term.coefficients, values))
            if found is None or total > found[0]:
                found = total, term.moment
    assert found is not None
    return found
