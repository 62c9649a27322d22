"""JUnit's XML, which Jenkins, GitLab and others show: one test case per run and GPU."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

from memplan.gate.rows import Check, CheckedRun
from memplan.report.gate import wording as words


def render(check: Check) -> str:
    cases = [*map(_case, check.rows), *(_problem(problem.text, problem.file) for problem in check.problems)]
    cases += [_problem(text, "memplan.lock") for text in check.moved]
    over = sum(row.status == "over" for row in check.rows)
    wrong = sum(row.status == "wrong" for row in check.rows) + len(check.problems) + len(check.moved)
    unknown = sum(row.status == "unknown" for row in check.rows)
    counts = f'tests="{len(cases)}" failures="{over}" errors="{wrong}" skipped="{unknown}"'
    suite = f'<testsuite name="memplan" {counts}>\n{"".join(cases)}</testsuite>'
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<testsuites>\n{suite}\n</testsuites>\n'


def _case(row: CheckedRun) -> str:
    tags = {"over": "failure", "wrong": "error", "unknown": "skipped"}
    text = _printable(words.sentence(row))
    start = f"<testcase classname={quoteattr(_printable(row.run))} name={quoteattr(words.on_gpu(row) or 'memplan')}"
    if row.status not in tags:
        return f"{start}><system-out>{escape(text)}</system-out></testcase>\n"
    return f"{start}><{tags[row.status]} message={quoteattr(text)}/></testcase>\n"


def _problem(text: str, file: str) -> str:
    name = quoteattr(_printable(file or "memplan"))
    return f'<testcase classname={name} name="budgets"><error message={quoteattr(_printable(text))}/></testcase>\n'


def _printable(text: str) -> str:
    """Return a text without characters that XML does not have."""
    return "".join(c if c.isprintable() else "?" for c in text)
