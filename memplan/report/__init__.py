"""Reports of answers for people and for programs: one module per format, imported on demand."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.report.text import Screen

FORMATS = ("table", "json", "markdown", "csv", "html")


def render(
    format: str, answers: Sequence[Estimate], explain: bool = False, to: Screen | None = None, ranks: bool = False
) -> str:
    """Return the answers, one per GPU, as text in one of `FORMATS`.

    explain   also show the ledger at the peak
    to        the screen that a table fits; standard output by default
    ranks     also show every rank that differs
    """
    report = import_module(f"memplan.report.{format}")
    if format == "table":
        return report.render(answers, explain, to, ranks)
    return report.render(answers, explain, ranks)
