"""The largest moments of several phases at once, for the sizes of a run."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate, chain, pairwise
from operator import mul

from memplan.engine.native import address_of, library
from memplan.engine.walk import Term, largest

_MOST = 2**62  # a sum of products below it does not overflow 64 bits


class RowGroups:
    """Groups of rows of coefficients, which the compiled library compares."""

    def __init__(self, groups: Iterable[Sequence[Sequence[int]]]) -> None:
        groups = [*groups]
        rows = [*chain.from_iterable(groups)]
        self._widest = [max(1, *map(abs, column)) for column in zip(*rows, strict=True)]
        self._total = sum(self._widest)
        self._library = library() if 0 < self._total < _MOST else None
        if self._library is None:
            return
        self._arrays = array("q", chain.from_iterable(rows)), array("q", accumulate(map(len, groups)))
        self._addresses = (*map(address_of, self._arrays), len(groups))
        self._none = array("q", (0,)) * (2 * len(groups))

    def __reduce__(self) -> tuple[type[RowGroups], tuple[list[list[array[int]]]]]:
        """Pickle the rows, if they can be compared: the library and addresses are of this process."""
        if self._library is None:
            return RowGroups, ([],)
        (numbers, ends), width = self._arrays, len(self._widest)
        rows = [numbers[at : at + width] for at in range(0, len(numbers), width)]
        return RowGroups, ([rows[start:end] for start, end in pairwise((0, *ends))],)

    def largest(self, numbers: Sequence[int]) -> array[int] | None:
        """Return for each group the number of its first row with the largest sum, -1 without rows, and the sum. None
        without the library, and beyond 64 bits."""
        if self._library is None or not self._is_exact(numbers):
            return None
        of_run, best = array("q", numbers), self._none[:]
        self._library.largest(*self._addresses, address_of(of_run), len(of_run), address_of(best))
        return best

    def _is_exact(self, numbers: Sequence[int]) -> bool:
        """Return whether 64 bits hold every sum of products."""
        bound = self._total * max(*numbers, -min(numbers))  # which is quicker
        return bound < _MOST or sum(map(mul, self._widest, map(abs, numbers))) < _MOST


class PhaseTerms:
    """The moments of several phases that can be their peaks, over the same variables. A phase may have none."""

    def __init__(self, phases: Sequence[Sequence[Term]]) -> None:
        self._phases = phases
        self._rows = RowGroups([term.coefficients for term in terms] for terms in phases)
        self._moments = [*(term.moment for terms in phases for term in terms), -1]  # of a phase without moments

    def largest(self, numbers: Sequence[int]) -> list[tuple[int, int]]:
        """Return the most bytes of each phase and its moment, for the variables' values: 0 and -1 for a phase without
        moments."""
        best = self._rows.largest(numbers)
        if best is None:
            return [largest(terms, numbers) if terms else (0, -1) for terms in self._phases]
        moments, pairs = self._moments, iter(best)
        return [(most, moments[row]) for row, most in zip(pairs, pairs, strict=True)]
