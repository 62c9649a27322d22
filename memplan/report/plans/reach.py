"""Report of a run's limits: the largest values that fit, what limits each, and a map over batch and sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from memplan.core.units import gib
from memplan.estimate.answer import ANSWERS, Estimate
from memplan.estimate.demand import Demand
from memplan.planning.reach import Frontier, Reach
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.blocks import Block, Drawing, Heading, Table, Text
from memplan.report.plans.heat import heat
from memplan.report.plans.wording import conditions, figures, state
from memplan.report.table import COLOURS
from memplan.report.text import Column


class ReachReport(NamedTuple):
    """The estimate of the run, the largest value of an axis, and the frontier if the axis is batch or sequence."""

    answer: Estimate
    demand: Demand
    reach: Reach
    frontier: Frontier | None

    @property
    def found(self) -> list[Estimate]:
        return [] if self.reach.answer is None else [self.reach.answer]


_NONE = {"batch": "no batch", "sequence": "no sequence", "rank": "no rank", "model": "no bundled model"}
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
    if axis == "sequence":
        return f"{value:,} token{'s' if value > 1 else ''}"
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
    return _with_unit(reach.axis, int(reach.value) + 1)


def _missed(answer: Estimate) -> str:
    headroom = answer.verdict.headroom or 0
    by = f"{gib(headroom)} free" if headroom >= 0 else f"{gib(-headroom)} too much"
    would = {"does not fit": "not fit", "tight": "be tight"}.get(str(answer.verdict.answer), "fit")
    return f"would {would}, {by}"


def limits_table(reached: Sequence[Reach]) -> Table:
    """Return a table with a row per axis."""
    rows = [(value(r), words.tenths(r.answer.bytes.used) if r.answer else "", limit_text(r)) for r in reached]
    return Table([Column("at most"), Column("GiB used", right=True), Column("limited by", wraps=True)], rows)


def blocks(far: ReachReport, explain: bool = False) -> Iterator[Block]:
    reach = far.reach
    condition = conditions(far.demand)
    suffix = f" (with {condition})" if condition else ""
    gpu = words.card(far.answer)
    on = f" on {gpu.title}" if gpu else ""
    if reach.answer is None:
        yield Text(f"{_NONE[reach.axis].capitalize()} fits{on}{suffix}.", "bold red")
        if reach.beyond is not None:
            yield Text(f"The nearest: {_next(reach)} {_missed(reach.beyond)}.")
    else:
        style = f"bold {COLOURS.get(reach.answer.verdict.answer or '', '')}".strip()
        yield Text(f"at most {value(reach)}{on}{suffix}: {state(reach.answer)}", style)
        yield Text(f"Limited by {limit_text(reach)}.")
        yield Text(f"The peak is {words.moment(reach.answer)}. {words.headroom(reach.answer)}")
    if far.frontier is not None and reach.answer is not None:
        yield from _frontier(far.frontier)
    if explain and reach.answer is not None:
        yield Heading("Assumed")
        yield Table([Column(""), Column("", wraps=True)], assumptions_.assumptions(reach.answer))


def _frontier(frontier: Frontier) -> Iterator[Block]:
    rows = [(f"{b:,}", f"{s:,}" if s else "none", f"{b * s:,}") for b, s in frontier.longest]
    yield Heading("Longest sequence for every batch")
    columns = (Column("batch", right=True), Column("tokens", right=True), Column("tokens per pass", right=True))
    yield Table(columns, rows)
    yield Drawing(partial(heat, frontier.around))


def dump(far: ReachReport) -> dict[str, Any]:
    return {
        "reach": [reach_dump(far.reach)],
        "frontier": [{"batch": b, "sequence": s} for b, s in far.frontier.longest] if far.frontier else [],
        "map": _map(far.frontier) if far.frontier else None,
    }


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
    answers = around.answers
    assert answers is not None  # the run has a GPU
    return {
        "batch": list(around.axes["batch"]),
        "sequence": list(around.axes["sequence"]),
        "allocated": around.allocated.tolist(),
        "verdict": [[ANSWERS[code] if code >= 0 else None for code in row] for row in answers.tolist()],
    }


def rows(far: ReachReport) -> list[dict[str, object]]:
    """Return CSV rows: the frontier, or the single value."""
    if far.frontier is not None:
        return [{"batch": b, "sequence": s} for b, s in far.frontier.longest]
    answer = far.reach.answer
    return [
        {
            "axis": far.reach.axis,
            "value": far.reach.value or "",
            "binds": far.reach.binds,
            "used": answer.bytes.used if answer else "",
            "headroom": answer.verdict.headroom if answer else "",
            "verdict": answer.verdict.answer if answer else "",
        }
    ]
