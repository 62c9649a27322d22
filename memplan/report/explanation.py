"""Why a run ran out of memory, as text, markdown or JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

from memplan.core.errors import printable
from memplan.core.units import gib
from memplan.explain.findings import QUESTIONS, Explanation, MemoryFinding, MemoryRow
from memplan.explain.message import Amount
from memplan.report.blocks import Block, Column, Heading, Notes, Table, Text, Verbatim
from memplan.report.display import display
from memplan.report.markdown import page
from memplan.report.stamp import Stamp
from memplan.report.text import Screen

FORMATS = ("table", "json", "markdown", "html")


def render(format: str, found: Explanation, to: Screen, patch: str = "", stamp: Stamp | None = None) -> str:
    """Return an explanation in one of `FORMATS`; `patch` is the change of the run's file as a diff."""
    match format:
        case "json":
            return json.dumps({**found.as_dict(), "patch": patch or None}, indent=2, ensure_ascii=False) + "\n"
        case "markdown":
            return page(_blocks(found, patch))
        case "html":
            from memplan.report.html import page as html_page

            first, *others = _blocks(found, patch)
            assert isinstance(first, Text)
            return html_page(first.text, others, stamp)
        case _:
            return display(_blocks(found, patch), to)


def _blocks(found: Explanation, patch: str) -> Iterator[Block]:
    message = found.message
    said = ", ".join(
        f"{name.replace('_', ' ')} {value.text if isinstance(value, Amount) else value}"
        for name, value in sorted(message.values.items(), key=lambda item: _ORDER.get(item[0], len(_ORDER)))
    )
    place = f"line {message.line}" + (f", {message.times} times" if message.times > 1 else "")
    yield Text(
        f"Out of memory ({message.form.library}, {message.form.cause}), {place}: {said}".rstrip(": "), "bold", ""
    )
    for line in found.contradictions:
        yield Text(printable(line), "bold", "")
    for question in QUESTIONS:
        findings = found.of(question)
        if findings:
            yield Heading(question, "")
            yield Table(_FINDINGS, findings)
    if found.rows:
        yield Heading("Memory at the failure", "")
        yield Table(_ROWS, found.rows)
    if patch:
        yield Heading("The file's patch", "")
        yield Verbatim(patch.splitlines(), "diff")
    if found.notes:
        yield Notes([printable(note) for note in found.notes])


_ORDER = {
    name: n for n, name in enumerate(("request", "total", "free", "in_use", "allocated", "reserved", "unallocated"))
}
_FINDINGS: list[Column[MemoryFinding]] = [
    Column("", lambda finding: finding.certainty, style="dim"),
    Column("", lambda finding: printable(finding.text), wraps=True),
    Column("", lambda finding: printable(finding.why), wraps=True, style="dim"),
]
_ROWS: list[Column[MemoryRow]] = [
    Column("", lambda row: row.what),
    Column("measured", lambda row: "" if row.measured is None else gib(row.measured), right=True),
    Column("predicted", lambda row: "" if row.predicted is None else gib(row.predicted), right=True),
]
