"""A check, or the changes between two, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.gate.difference import Changes
from memplan.gate.rows import Check, CheckedRun
from memplan.report.blocks import Block, Column, Table
from memplan.report.display import display
from memplan.report.gate import wording as words
from memplan.report.text import Screen

_STYLES = {"over": "bold red", "wrong": "bold red", "unknown": "yellow", "near": "yellow", "fits": "green"}
_WORDS = {"over": "does not fit", "wrong": "mistake", "unknown": "cannot say", "near": "nearly", "fits": "fits"}


def render(found: Check | Changes, to: Screen) -> str:
    if isinstance(found, Check):
        return display(_check(found), to)
    from memplan.report.gate.changes import blocks

    return display(blocks(found), to)


def _check(check: Check) -> Iterator[Block]:
    columns: list[Column[CheckedRun]] = [
        Column("run", lambda row: row.run),
        Column("GPU", words.on_gpu),
        Column("peak", lambda row: words.size(row.peak), right=True),
        Column("limit", lambda row: words.size(row.limit), right=True),
        Column("answer", lambda row: _WORDS[row.status], style=lambda row: _STYLES[row.status]),
        Column("why", _why, wraps=True),
    ]
    if check.rows:
        yield Table(columns, check.rows)
    yield from words.ending(words.headline(check), check.rows, check)


def _why(row: CheckedRun) -> str:
    left_out = f"not counted: {', '.join(row.left_out)}" if row.left_out else ""
    return "; ".join(filter(None, (words.reasons(row), left_out)))
