"""Reports of the gate, for people, for CI systems and for programs: one module per format, imported on demand."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memplan.gate.difference import Changes
    from memplan.gate.rows import Check
    from memplan.report.text import Screen

FORMATS = ("table", "markdown", "json", "github", "gitlab", "junit", "sarif", "openmetrics")
OF_CHANGES = ("table", "markdown", "json", "github")


def render(format: str, found: Check | Changes, to: Screen) -> str:
    """Return a check in one of FORMATS, or the changes between two in one of OF_CHANGES; a table fits the screen."""
    report = import_module(f"memplan.report.gate.{format}")
    return report.render(found, to) if format == "table" else report.render(found)
