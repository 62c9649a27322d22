"""Reports of answers for people and for programs: one module per format, imported on demand."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.report.overview import CommandLine
    from memplan.report.stamp import Stamp
    from memplan.report.text import Screen

FORMATS = ("table", "json", "markdown", "csv", "html", "svg")


def render(
    format: str,
    answers: Sequence[Estimate],
    explain: bool = False,
    to: Screen | None = None,
    ranks: bool = False,
    stamp: Stamp | None = None,
    details: bool = True,
    line: CommandLine | None = None,
) -> str:
    """Return the answers, one per GPU, as text in one of `FORMATS`.

    explain   also show the ledger at the peak
    to        the screen that a table fits; standard output by default
    ranks     also show every rank that differs
    stamp     the command and the date that a page shows
    details   whether a table has categories, phases and assumptions
    line      the command, of which a table makes the next ones
    """
    report = import_module(f"memplan.report.{format}")
    if format == "table":
        return report.render(answers, explain, to, ranks, details, line)
    pages = () if format in ("json", "csv") else (stamp,)
    return report.render(answers, explain, ranks, *pages)
