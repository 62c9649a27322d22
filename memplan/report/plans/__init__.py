"""Reports of `memplan plan`, one module per mode: text for people, JSON and CSV for programs."""

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
from memplan.report.plans.advice import AdviceReport
from memplan.report.plans.cluster import ClusterReport
from memplan.report.plans.inference import Places, QuestionsReport
from memplan.report.plans.ladder import LadderReport
from memplan.report.plans.levers import Levers
from memplan.report.plans.offers import OffersReport
from memplan.report.plans.reach import ReachReport
from memplan.report.text import Screen

Planned: TypeAlias = (
    Levers | ReachReport | LadderReport | OffersReport | AdviceReport | ClusterReport | QuestionsReport | Places
)

FORMATS = ("table", "json", "markdown")
IN_ROWS = ("max", "ladder", "buy", "nodes")  # modes that have a CSV format


def render(format: str, planned: Planned, explain: bool, to: Screen) -> str:
    """Return the answer as table, json, markdown or csv; a table fits the screen `to`."""
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
        case ReachReport():
            return reach.blocks(planned, explain)
        case LadderReport():
            return ladder.blocks(planned, explain)
        case OffersReport():
            return offers.blocks(planned, explain)
        case AdviceReport():
            return advice.blocks(planned, explain)
        case ClusterReport():
            return cluster.blocks(planned, explain)
        case QuestionsReport():
            return inference.blocks(planned, explain)
        case Places():
            return inference.place_blocks(planned)


def dump(planned: Planned) -> dict[str, Any]:
    """Return the answer as a dict that follows its published schema."""
    match planned:
        case Levers():
            return {**_common("levers", planned.plan.answer, planned.plan.demand), **levers.dump(planned)}
        case ReachReport():
            return {**_common("max", planned.answer, planned.demand), **reach.dump(planned)}
        case LadderReport():
            return {**_common("ladder", planned.answer, planned.demand), **ladder.dump(planned)}
        case OffersReport():
            return {**_common("buy", planned.answer, planned.demand), **offers.dump(planned)}
        case AdviceReport():
            return {**_common("advice", planned.answer, planned.demand), **advice.dump(planned)}
        case ClusterReport():
            return {**_common("nodes", planned.cluster.asked, planned.demand), **cluster.dump(planned)}
        case QuestionsReport():
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
    """Return column titles and rows."""
    match planned:
        case ReachReport():
            rows = reach.rows(planned)
        case LadderReport():
            rows = ladder.rows(planned)
        case OffersReport():
            return offers.rows(planned)
        case ClusterReport():
            return cluster.rows(planned)
        case Places():
            return inference.titles(), inference.rows(planned)
        case Levers() | AdviceReport() | QuestionsReport():
            raise AssertionError("this mode has no CSV format")
    return list(rows[0]), rows


def _csv(titles: list[str], rows: list[dict[str, object]]) -> str:
    out = StringIO()
    writer = csv.DictWriter(out, titles, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
