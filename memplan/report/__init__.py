"""Answers for people and for programs: one module a format, imported when it is asked for."""

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
    """The answers, one for each GPU asked, as text in one of `FORMATS`; with `explain`, the ledger at the peak, with
    `ranks`, every rank that differs.

    A table fits the screen `to`, which is standard output if none is given.
    """
    report = import_module(f"memplan.report.{format}")
    if format == "table":
        return report.render(answers, explain, to, ranks)
    return report.render(answers, explain, ranks)
