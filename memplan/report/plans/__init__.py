"""Reports of `memplan plan`, one module per mode: text for people, JSON and CSV for programs."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

from memplan.core.version import __version__
from memplan.estimate.answer import SCHEMA_VERSION
from memplan.report.csv import written
from memplan.report.display import display
from memplan.report.markdown import page
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
            assert not isinstance(planned, (Levers, AdviceReport, QuestionsReport)), "this mode has no CSV format"
            return written(*planned.rows())
        case "markdown":
            return page(planned.blocks(explain))
        case _:
            return display(planned.blocks(explain), to)


def dump(planned: Planned) -> dict[str, Any]:
    """Return the answer as a dict that follows its published schema."""
    answer = planned.answer
    return {
        "schema_version": SCHEMA_VERSION,
        "memplan_version": __version__,
        "mode": planned.mode,
        "run": answer.run.model_dump(mode="json"),
        "bytes": answer.bytes.as_dict(),
        "gpu": answer.gpu._asdict() if answer.gpu else None,
        "verdict": answer.verdict.as_dict(),
        "demand": planned.demand._asdict(),
        **planned.dump(),
    }
