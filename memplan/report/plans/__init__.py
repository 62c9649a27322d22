"""Reports of `memplan plan`, one module per mode: text for people, JSON and CSV for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from memplan.core.version import __version__
from memplan.estimate.answer import SCHEMA_VERSION, Estimate
from memplan.report.assumptions import assumptions, question
from memplan.report.blocks import Block, Facts, Fold, Heading, Text
from memplan.report.display import display
from memplan.report.stamp import Stamp
from memplan.report.text import Screen

if TYPE_CHECKING:
    from memplan.frameworks.reading.config import FieldOrigin
    from memplan.report.plans.advice import AdviceReport
    from memplan.report.plans.cluster import ClusterReport
    from memplan.report.plans.inference import Places, QuestionsReport
    from memplan.report.plans.ladder import LadderReport
    from memplan.report.plans.levers import Levers
    from memplan.report.plans.offers import OffersReport
    from memplan.report.plans.reach import ReachReport

    InRows: TypeAlias = ReachReport | LadderReport | OffersReport | ClusterReport | Places
    Planned: TypeAlias = InRows | Levers | AdviceReport | QuestionsReport

FORMATS = ("table", "json", "markdown", "html", "svg")
IN_ROWS = ("max", "ladder", "buy", "nodes")  # modes that have a CSV format


def render(
    format: str,
    planned: Planned,
    explain: bool,
    to: Screen,
    stamp: Stamp | None = None,
    origins: Sequence[FieldOrigin] = (),
) -> str:
    """Return the answer in one of `FORMATS`, or as csv; a table fits the screen `to`, and a page shows the `stamp`.

    origins  where the values of a run's file are from; JSON has them
    """
    match format:
        case "json":
            return json.dumps(dump(planned, origins), indent=2, ensure_ascii=False) + "\n"
        case "csv":
            from memplan.report.csv import written

            return written(*cast("InRows", planned).rows())
        case "markdown":
            from memplan.report.markdown import page

            return page(_page(planned, explain, stamp or Stamp()))
        case "html":
            return _html(planned, explain, stamp)
        case "svg":
            from memplan.report import svg

            return svg.page(_title(planned), _named(planned), stamp)
        case _:
            return display(planned.blocks(explain), to)


_MOST_DRAWN = 12  # runs with a bar


def _page(planned: Planned, explain: bool, stamp: Stamp) -> Iterator[Block]:
    """Yield the answer, a table of the run as given and of those found, and everything else in one fold."""
    from memplan.report.markdown import stamped, verdicts

    first, *blocks = planned.blocks(explain)
    yield first
    yield verdicts(_named(planned), "run")
    yield Fold("What each changes and costs, and how to write it", [*blocks, stamped(stamp)])


def _html(planned: Planned, explain: bool, stamp: Stamp | None) -> str:
    """Return a page: the answer, bars of the run as given and of those found, and the blocks of the report."""
    from memplan.report import html

    first, *blocks = planned.blocks(explain)
    title, style = (first.text, first.style) if isinstance(first, Text) else (_title(planned), "")
    parts: list[html.Part] = [html.bars(_named(planned)), *blocks, Heading("Through the step, as asked")]
    assumed = Fold("Assumed of the run as asked", [Facts("", assumptions(planned.answer))])
    return html.page(title, [*parts, html.timeline(planned.answer), assumed], stamp, html.class_of(style))


def _title(planned: Planned) -> str:
    return f"A plan for {question(planned.answer)}"


def _named(planned: Planned) -> list[tuple[str, Estimate]]:
    """Return the run as given and those found, with what the report calls them."""
    return [("as asked", planned.answer), *planned.named[:_MOST_DRAWN]]


def dump(planned: Planned, origins: Sequence[FieldOrigin] = ()) -> dict[str, Any]:
    """Return the answer as a dict that follows its published schema, with the origins of a run's file."""
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
        **({"origins": [origin._asdict() for origin in origins]} if origins else {}),
        **planned.dump(),
    }
