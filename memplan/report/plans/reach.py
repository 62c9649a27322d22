"""Report of a run's limits: the largest values that fit, what limits each, and a map over batch and sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.reach import Frontier, Reach
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Facts, Heading, Table, Text
from memplan.report.csv import CsvRows
from memplan.report.heat import drawing
from memplan.report.plans.changes import conditions, figures, state


class ReachReport(NamedTuple):
    """The estimate of the run, the largest value of an axis, and the frontier if the axis is batch or sequence."""

    answer: Estimate
    demand: Demand
    reach: Reach
    frontier: Frontier | None

    mode = "max"

    @property
    def found(self) -> list[Estimate]:
        return [] if self.reach.answer is None else [self.reach.answer]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(value(self.reach), answer) for answer in self.found]

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        reach = self.reach
        gpu = words.card(self.answer)
        where = f"{f' on {gpu.title}' if gpu else ''}{conditions(self.demand, 'with ')}"
        if reach.answer is None:
            yield Text(f"{_NONE[reach.axis].capitalize()} fits{where}.", "bold red")
            if reach.beyond is not None:
                why = printable(reach.beyond.verdict.reason or "")
                yield Text(f"The nearest: {_next(reach)} {_missed(reach.beyond)}{why and f': {why}'}.")
            return
        yield Text(f"at most {value(reach)}{where}: {state(reach.answer)}", f"bold {words.colour(reach.answer)}")
        yield Text(f"Limited by {limit_text(reach)}.")
        yield Text(f"The peak is {words.moment(reach.answer)}. {words.headroom(reach.answer)}")
        if self.frontier is not None:
            yield Heading("Longest sequence for every batch")
            yield Table(_FRONTIER, self.frontier.longest)
            yield drawing(self.frontier)
        if explain:
            yield Facts("Assumed", assumptions_.assumptions(reach.answer))

    def dump(self) -> dict[str, Any]:
        return {
            "reach": [reach_dump(self.reach)],
            "frontier": [{"batch": b, "sequence": s} for b, s in self.frontier.longest] if self.frontier else [],
            "map": _map(self.frontier) if self.frontier else None,
        }

    def rows(self) -> CsvRows:
        """Return the frontier, or the single value."""
        if self.frontier is not None:
            return CsvRows([{"batch": b, "sequence": s} for b, s in self.frontier.longest])
        reach, answer = self.reach, self.reach.answer
        row = {
            "axis": reach.axis,
            "value": reach.value or "",
            "binds": reach.binds,
            "used": answer.bytes.used if answer else "",
            "headroom": answer.verdict.headroom if answer else "",
            "verdict": answer.verdict.answer if answer else "",
        }
        return CsvRows([row])


_FRONTIER: tuple[Column[tuple[int, int]], ...] = (
    Column("batch", lambda pair: f"{pair[0]:,}", right=True),
    Column("tokens", lambda pair: f"{pair[1]:,}" if pair[1] else "none", right=True),
    Column("tokens per pass", lambda pair: f"{pair[0] * pair[1]:,}", right=True),
)

_NONE = {
    "batch": "no batch",
    "sequence": "no sequence",
    "rank": "no rank",
    "completion": "no completion",
    "generations": "no group of completions",
    "model": "no bundled model",
}
_ENDS = {
    "positions": "the model's number of positions",
    "rank": "the dimensions of the matrices",
    "models": "the bundled models: none is larger",
    "nothing": "nothing: it takes no memory",
}


def value(reach: Reach) -> str:
    """Return the largest value as text ("batch 2", "5,293 tokens"), or that there is none."""
    if not reach.value:
        return _NONE[reach.axis]
    return _with_unit(reach.axis, reach.value)


def _with_unit(axis: str, value: int | str) -> str:
    if isinstance(value, str):
        return value
    if axis in ("sequence", "completion"):
        return f"{value:,} token{'s' if value > 1 else ''}{' of a completion' if axis == 'completion' else ''}"
    if axis == "generations":
        return f"{value:,} completions of a prompt"
    return f"{axis} {value:,}"


def limit_text(reach: Reach) -> str:
    """Return what limits the value: "memory: batch 3 would not fit, 2.76 GiB too much"."""
    if reach.binds != "memory":
        return _ENDS[reach.binds]
    if reach.beyond is None:
        return "memory"
    return f"memory: {_next(reach)} {_missed(reach.beyond)}"


def _next(reach: Reach) -> str:
    assert reach.beyond is not None
    if reach.axis == "model":
        return words.model(reach.beyond)
    return _with_unit(reach.axis, int(reach.value) + reach.step)


def _missed(answer: Estimate) -> str:
    headroom = answer.verdict.headroom or 0
    by = f"{gib(headroom)} free" if headroom >= 0 else f"{gib(-headroom)} too much"
    if answer.verdict.reason:
        return "would not start"
    would = {"does not fit": "not fit", "tight": "be tight"}.get(str(answer.verdict.answer), "fit")
    return f"would {would}, {by}"


def limits_table(reached: Sequence[Reach]) -> Table[Reach]:
    """Return a table with a row per axis."""
    return Table(_LIMITS, reached)


_LIMITS: tuple[Column[Reach], ...] = (
    Column("at most", value),
    Column("GiB used", lambda reach: words.tenths(reach.answer.bytes.used) if reach.answer else "", right=True),
    Column("limited by", limit_text, wraps=True),
)


def reach_dump(reach: Reach) -> dict[str, Any]:
    return {
        "axis": reach.axis,
        "value": reach.value or None,
        "binds": reach.binds,
        "at": figures(reach.answer) if reach.answer else None,
        "beyond": figures(reach.beyond) if reach.beyond else None,
    }


def _map(frontier: Frontier) -> dict[str, Any]:
    around = frontier.around
    return {
        "batch": [batch for batch, _ in frontier.longest],
        "sequence": list(frontier.sequences),
        "allocated": [[-1 if answer is None else answer.bytes.allocated for answer in row] for row in around],
        "verdict": [[answer and answer.verdict.answer for answer in row] for row in around],
    }
