"""Walking: sizes put into lowered moments. One model's numbers once, then batch and sequence in microseconds.

The bytes of every moment are linear in a few variables: the rounded sizes that depend on the run. A moment that
another of its phase never falls below is left out; the others are those that can be the peak for some run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import ge, mul
from typing import Any, NamedTuple

from memplan.engine.lower import Moment
from memplan.ir import AT_LEAST
from memplan.sizes import Size
from memplan.units import ITEMSIZE, rounded


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
    further: Mapping[int, Mapping[int, int]] = {}  # what copies beyond the first add, which many moments share
    added = none = [0] * len(variables)
    out: list[tuple[int, ...]] = []
    for moment in moments:
        if moment.per_copy != further:
            further, added = moment.per_copy, list(none)
            for run, counts in further.items():
                for key, count in counts.items():
                    i, n = place[key]
                    added[i] += n * count * copies[run]
        row = list(added)
        for key, count in moment.counts.items():
            i, n = place[key]
            row[i] += n * count
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
    """The candidates, rows of moments, that no other is at least as large as for every run.

    Along a chain of products what counts is the sum of coefficients from the largest down: the variables' own, or the
    one to go `along`. A rounded size is its product plus at most 511 bytes.
    """
    products = {axes: i for i, axes in enumerate(chain(variables) if along is None else along)}
    chained = [v.axes in products and v.per == 1 for v in variables]
    rounds = [i for i, v in enumerate(variables) if v.itemsize and chained[i]]
    others = [i for i, inside in enumerate(chained) if not inside]
    multiples = [(i, products[v.axes], v.factor * (v.itemsize or 1)) for i, v in enumerate(variables) if chained[i]]
    found: dict[tuple[int, ...], _Candidate] = {}
    for row, moment in candidates:
        if row in found:
            continue
        linear = [0] * len(products)
        for i, product, multiple in multiples:
            linear[product] += row[i] * multiple
        rounding, apart = [row[i] for i in rounds], [row[i] for i in others]
        slack = None if any(apart) else 511 * sum(rounding)
        term = Term(row, tuple(linear), slack, moment)
        found[row] = _Candidate([*accumulate(linear)], sum(apart), apart, rounding, term)
    kept: list[Term] = []
    larger: list[_Candidate] = []  # those kept, the one last found larger first: it often is again
    for one in sorted(found.values(), key=_sums, reverse=True):
        sums, whole, apart, rounding, _ = one
        for at, (other_sums, other_whole, other_apart, other_rounding, _) in enumerate(larger):
            if other_whole >= whole and all(map(ge, other_apart, apart)) and all(map(ge, other_sums, sums)):
                slack = 511 * sum(n - m for n, m in zip(rounding, other_rounding, strict=True) if n > m)
                if other_sums[-1] >= sums[-1] + slack:
                    larger.insert(0, larger.pop(at))
                    break
        else:
            kept.append(one.term)
            larger.append(one)
    return tuple(kept)


class _Candidate(NamedTuple):
    """A term, the sums of its coefficients along the chain, those of variables outside it (`whole`: all together), and
    those of variables that are rounded."""

    sums: list[int]
    whole: int
    apart: list[int]
    rounding: list[int]
    term: Term


def _sums(candidate: _Candidate) -> list[int]:
    return candidate.sums


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
