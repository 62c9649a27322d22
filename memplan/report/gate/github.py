"""Annotations of GitHub Actions, on the line of the file that decides.

Source: GitHub's documentation of workflow commands (escaped characters; ten annotations of a kind per step).
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.errors import printable
from memplan.gate.difference import Changes
from memplan.gate.rows import Check
from memplan.report.gate import wording as words
from memplan.report.gate.changes import findings_of
from memplan.report.gate.findings import Finding, findings

_MOST = 10  # of a kind are shown


def render(found: Check | Changes) -> str:
    of_kind: dict[str, list[Finding]] = {}
    for finding in findings(found) if isinstance(found, Check) else findings_of(found):
        of_kind.setdefault(words.LEVELS[finding.status], []).append(finding)
    lines = [line for kind, listed in of_kind.items() for line in _annotations(kind, listed)]
    return "".join(f"{line}\n" for line in lines)


def _annotations(kind: str, listed: list[Finding]) -> Iterator[str]:
    shown = listed if len(listed) <= _MOST else listed[: _MOST - 1]
    for finding in shown:
        where = {"file": finding.file, "line": finding.line, "title": f"memplan: {words.TITLES[finding.status]}"}
        properties = ",".join(f"{name}={_property(str(each))}" for name, each in where.items() if each)
        yield f"::{kind} {properties}::{_escaped(finding.text)}"
    if len(shown) < len(listed):
        yield f"::{kind} title=memplan::and {len(listed) - len(shown)} more, in the summary and the log"


def _escaped(text: str) -> str:
    return printable(text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A"))


def _property(text: str) -> str:
    return _escaped(text).replace(":", "%3A").replace(",", "%2C")
