"""Answers of `memplan plan`, one module a mode: text for people, JSON and CSV for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from io import StringIO
from typing import Any, TypeAlias

from memplan.core.version import __version__
from memplan.estimate.answer import SCHEMA_VERSION, Estimate
from memplan.estimate.demand import Demand
from memplan.report.blocks import Block, page, terminal
from memplan.report.plans import advice, cluster, inference, ladder, levers, offers, reach
from memplan.report.plans.advice import Advised
from memplan.report.plans.cluster import Divided
from memplan.report.plans.inference import Asked, Places
from memplan.report.plans.ladder import Rungs
from memplan.report.plans.levers import Levers
from memplan.report.plans.offers import Bought
from memplan.report.plans.reach import Far
from memplan.report.text import Screen

Planned: TypeAlias = Levers | Far | Rungs | Bought | Advised | Divided | Asked | Places

FORMATS = ("table", "json", "markdown")
IN_ROWS = ("max", "ladder", "buy", "nodes")  # modes that are there as CSV too


def render(format: str, planned: Planned, explain: bool, to: Screen) -> str:
    """The answer as table, json, markdown or csv; a table fits the screen `to`."""
    match format:
        case "json":
            return json.dumps(dump(planned), indent=2, ensure_ascii=False) + "\n"
        case "csv":
            return _csv(*_rows(planned))
        case "markdown":
            return "\n".join(page(_blocks(planned, explain))) + "\n"
        case _:
            return "\n".join(terminal(_blocks(planned, explain), to)) + "\n"


def _blocks(planned: Planned, explain: bool) -> Iterator[Block]:
    match planned:
        case Levers():
            return levers.blocks(planned, explain)
        case Far():
            return reach.blocks(planned, explain)
        case Rungs():
            return ladder.blocks(planned, explain)
        case Bought():
            return offers.blocks(planned, explain)
        case Advised():
            return advice.blocks(planned, explain)
        case Divided():
            return cluster.blocks(planned, explain)
        case Asked():
            return inference.blocks(planned, explain)
        case Places():
            return inference.place_blocks(planned)


def dump(planned: Planned) -> dict[str, Any]:
    """The answer as its published schema has it."""
    match planned:
        case Levers():
            return {**_common("levers", planned.plan.answer, planned.plan.demand), **levers.dump(planned)}
        case Far():
            return {**_common("max", planned.answer, planned.demand), **reach.dump(planned)}
        case Rungs():
            return {**_common("ladder", planned.answer, planned.demand), **ladder.dump(planned)}
        case Bought():
            return {**_common("buy", planned.answer, planned.demand), **offers.dump(planned)}
        case Advised():
            return {**_common("advice", planned.answer, planned.demand), **advice.dump(planned)}
        case Divided():
            return {**_common("nodes", planned.cluster.asked, planned.demand), **cluster.dump(planned)}
        case Asked():
            return {**_common("generate", planned.answer, planned.demand), **inference.dump(planned)}
        case Places():
            return {**_common("places", planned.answer, planned.demand), **inference.place_dump(planned)}


def _common(mode: str, answer: Estimate, demand: Demand) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "memplan_version": __version__,
        "mode": mode,
        "run": answer.run.model_dump(mode="json"),
        "bytes": answer.bytes.as_dict(),
        "gpu": answer.gpu._asdict() if answer.gpu else None,
        "verdict": answer.verdict.as_dict(),
        "demand": demand._asdict(),
    }


def _rows(planned: Planned) -> tuple[list[str], list[dict[str, object]]]:
    """Titles, and rows under them."""
    match planned:
        case Far():
            rows = reach.rows(planned)
        case Rungs():
            rows = ladder.rows(planned)
        case Bought():
            return offers.rows(planned)
        case Divided():
            return cluster.rows(planned)
        case Places():
            return inference.titles(), inference.rows(planned)
        case Levers() | Advised() | Asked():
            raise AssertionError("changes have parts, and are no rows")
    return list(rows[0]), rows


def _csv(titles: list[str], rows: list[dict[str, object]]) -> str:
    out = StringIO()
    writer = csv.DictWriter(out, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
