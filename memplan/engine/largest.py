"""The largest moments of several phases at once, for the sizes of a run."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from operator import mul

from memplan.engine.native import address_of, library
from memplan.engine.walk import Term, Variable, largest, values

_MOST = 2**62  # a sum of products below it does not overflow 64 bits


class PhaseTerms:
    """The moments of several phases that can be their peaks, over the same variables.

    The compiled library compares them; `memplan.engine.walk.largest` does without it, and beyond 64 bits.

    phases    the moments of each phase; a phase may have none
    products  the variables of the chain (see `memplan.engine.walk.chain`)
    """

    def __init__(self, phases: Sequence[Sequence[Term]], products: Sequence[Variable]) -> None:
        self._phases, self._products = phases, products
        coefficients = [term.coefficients for terms in phases for term in terms]
        self._widest = [max(1, *map(abs, column)) for column in zip(*coefficients, strict=True)]
        self._total = sum(self._widest)
        self._is_compiled = library() is not None and 0 < self._total < _MOST
        if not self._is_compiled:
            return
        self._rows = array("q", chain.from_iterable(coefficients))
        self._ends = array("q", accumulate(map(len, phases)))
        self._moments = [term.moment for terms in phases for term in terms]
        self._moments.append(-1)  # of a phase without moments
        self._best = array("q", (0,)) * (2 * len(self._ends))
        self._arguments = address_of(self._rows), address_of(self._ends), len(self._ends)

    def largest(self, numbers: list[int], axes: Mapping[str, int]) -> list[tuple[int, int]]:
        """Return the most bytes of each phase and its moment: 0 and -1 for a phase without moments.

        numbers  the variables' values
        axes     the axes that their products are of
        """
        if not self._is_compiled or not self._is_exact(numbers):
            products = values(self._products, axes)
            return [largest(terms, numbers, products) if terms else (0, -1) for terms in self._phases]
        of_run, best = array("q", numbers), self._best[:]
        library().largest(*self._arguments, address_of(of_run), len(numbers), address_of(best))
        moments, pairs = self._moments, iter(best)
        return [(most, moments[row]) for row, most in zip(pairs, pairs, strict=True)]

    def _is_exact(self, numbers: list[int]) -> bool:
        """Return whether 64 bits hold every sum of products."""
        bound = self._total * max(*numbers, -min(numbers))  # which is quicker
        return bound < _MOST or sum(map(mul, self._widest, map(abs, numbers))) < _MOST
