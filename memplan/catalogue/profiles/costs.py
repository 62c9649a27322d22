"""Costs of memory-saving changes, `costs.toml`: in quality, and in time if counting operations does not tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from memplan.core.errors import UnknownNameError
from memplan.core.records import NamedTuple
from memplan.core.toml import read_tables


class LeverCost(NamedTuple):
    """The cost of one change, as `costs.toml` explains.

    low   lower end of the step time, as a multiple of the time without it; None if operations are counted
    high  upper end, likewise
    """

    lever: str
    time_source: str
    quality: str
    quality_source: str
    severity: int
    low: float | None
    high: float | None
    basis: Literal["derived", "measured", "assumed"]


def _costs() -> Iterator[LeverCost]:
    tables = read_tables(Path(__file__).with_name("costs.toml"))
    for lever, row in tables["lever"].items():
        time, source = (row[key].format_map(tables["sources"]) for key in ("time", "quality_source"))
        low, high = row.get("times", (None, None))
        yield LeverCost(lever, time, row["quality"], source, row["severity"], low, high, row.get("basis", "derived"))


COSTS = tuple(_costs())
_BY_LEVER = {cost.lever: cost for cost in COSTS}


def cost_of(lever: str) -> LeverCost:
    """Return the cost of a lever. Raises UnknownNameError with the nearest names."""
    cost = _BY_LEVER.get(lever)
    if cost is None:
        raise UnknownNameError("lever", lever, _BY_LEVER)
    return cost
