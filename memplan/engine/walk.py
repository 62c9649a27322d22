"""Walking: sizes put into lowered moments. One model's numbers once, then batch and sequence in microseconds.

The bytes of every moment are linear in a few variables: the rounded sizes that depend on the run. A moment that
another of its phase never falls below is left out; the others are those that can be the peak for some run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import ge, is_not, mul
from typing import Any, NamedTuple

from memplan.engine.lower import Counts, Moment
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
    out: list[tuple[int, ...]] = []
    copied: tuple[list[Counts], list[int]] = ([], [0] * len(variables))  # moments in a row have the same copies
    for moment in moments:
        every = list(moment.per_copy.values())
        if len(every) != len(copied[0]) or any(map(is_not, every, copied[0])):
            copied = (every, [0] * len(variables))
            for run, counts in moment.per_copy.items():
                for key, count in counts.items():
                    i, n = place[key]
                    copied[1][i] += n * count * copies[run]
        row = copied[1].copy()
        for key, count in moment.counts.items():
            if count:
                i, n = place[key]
                row[i] += n * count
        out.append(tuple(row))
    return out


def chain(variables: Sequence[Variable]) -> list[tuple[str, ...]]:
    """The longest chain of products of axes among the variables, largest first: each is at least the next, always.

    1 <= s <= b s <= b s s, and s rounded up is at least s.
    """
    best: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for axes in sorted({v.axes for v in variables}, key=lambda p: (len(p), sum(a in AT_LEAST for a in p))):
        below = [best[other] for other in best if _at_most(other, axes)]
        best[axes] = [axes, *(max(below, key=len) if below else ())]
    return max(best.values(), key=len)


def prune(candidates: Iterable[tuple[tuple[int, ...], int]], variables: Sequence[Variable]) -> tuple[Term, ...]:
    """The candidates, rows of moments, that no other is at least as large as for every run.

    Along a chain of products what counts is the sum of coefficients from the largest down. A rounded size is its
    product plus at most 511 bytes.
    """
    products = {axes: i for i, axes in enumerate(chain(variables))}
    chained = [v.axes in products and v.per == 1 for v in variables]
    rounds = [i for i, v in enumerate(variables) if v.itemsize and chained[i]]
    others = [i for i, inside in enumerate(chained) if not inside]
    terms: dict[tuple[int, ...], Term] = {}
    for row, moment in candidates:
        if row in terms:
            continue
        linear = [0] * len(products)
        for v, n, inside in zip(variables, row, chained, strict=True):
            if inside:
                linear[products[v.axes]] += n * v.factor * (v.itemsize or 1)
        slack = None if any(row[i] for i in others) else 511 * sum(row[i] for i in rounds)
        terms[row] = Term(row, tuple(linear), slack, moment)
    kept: list[tuple[Term, list[int]]] = []
    downward = ((t, list(accumulate(t.at_least))) for t in terms.values())
    for term, sums in sorted(downward, key=lambda item: item[1], reverse=True):
        row = term.coefficients
        for other, other_sums in kept:
            if all(map(ge, other_sums, sums)) and all(other.coefficients[i] >= row[i] for i in others):
                slack = 511 * sum(max(0, row[i] - other.coefficients[i]) for i in rounds)
                if other_sums[-1] >= sums[-1] + slack:
                    break
        else:
            kept.append((term, sums))
    return tuple(term for term, _ in kept)


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
    most, moment = -1, -1
    for term, floor in zip(terms, floors, strict=True):
        if term.slack is None or floor + term.slack >= highest:
            total = sum(map(mul, term.coefficients, values))
            if total > most:
                most, moment = total, term.moment
    return most, moment
