"""`PeakFunction`: the moments that can be the peak of a run, compared at any lengths by one compiled function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from memplan.core.expression import Argument, compiled
from memplan.core.records import NamedTuple
from memplan.engine.largest import RowGroups
from memplan.estimate.answer import Phase

Lengths = tuple[int, int, int | None]  # the micro-batch, the sequence and the decoder's


class MomentRows(NamedTuple):
    """Moments over the same variables.

    values  the variables' values: expressions of the lengths, and ints
    rows    the moments as coefficients of the variables
    phases  of each moment: its phase, its step, and its operation or what finds it
    """

    values: Sequence[Any]
    rows: Sequence[tuple[int, ...]]
    phases: Sequence[tuple[str, int | None, str | Callable[[], str]]]


class PeakFunction:
    """The moments that can be the peak of a run, the last of equals first. `lengths` are the run's, which the values
    are expressions of."""

    def __init__(self, each: Sequence[MomentRows], lengths: Iterable[Argument]) -> None:
        values = [value for moments in each for value in moments.values]
        rows: list[tuple[int, ...]] = []
        before = 0
        for moments in each:
            after = len(values) - before - len(moments.values)
            rows += ((*(0,) * before, *row, *(0,) * after) for row in moments.rows)
            before += len(moments.values)
        used = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
        self._values = compiled([values[i] for i in used], *lengths)
        self._rows = RowGroups([[tuple(row[i] for i in used) for row in rows]])
        self._phases = [phase for moments in each for phase in moments.phases]

    def largest(self, lengths: Lengths) -> Phase | None:
        """Return the phase of the peak; None if these lengths decide otherwise, without the compiled library, and
        beyond 64 bits."""
        values = self._values(*lengths)
        best = values and self._rows.largest(values)
        if not best:
            return None
        phase, step, where = self._phases[best[0]]
        return Phase(phase, step, best[1], where if isinstance(where, str) else where())
