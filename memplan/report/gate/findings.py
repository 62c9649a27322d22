"""Findings of a check, for a machine's report: one for each run that is not within its budget."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.core.records import NamedTuple
from memplan.gate.rows import COMMAND, Check
from memplan.report.gate import wording as words


class Finding(NamedTuple):
    """Something to look at: a run's status, a fact that `moved` or a `note`; where; a sentence. `file` may be empty."""

    status: str
    file: str
    line: int | None
    text: str
    gpu: str = ""


def findings(found: Check) -> Iterator[Finding]:
    """Yield what is to look at, the worst first."""
    for problem in found.problems:
        yield Finding("wrong", problem.file, problem.line, problem.text)
    yield from (Finding("moved", "memplan.lock", None, text) for text in found.moved)
    for row in found.rows:
        if row.status != "fits":
            file = "" if row.run.startswith(COMMAND) else row.run
            yield Finding(row.status, file, words.line_of(row), words.sentence(row), row.gpu)
    yield from (Finding("note", "", None, text) for text in found.notes)
