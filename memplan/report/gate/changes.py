"""The changes between two checks: their words, their table, and their findings."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.gate.cause import Cause, ValueChange
from memplan.gate.difference import FAILS, Changes, RunChange
from memplan.gate.rows import COMMAND
from memplan.report.blocks import Block, Column, Table
from memplan.report.gate import wording as words
from memplan.report.gate.findings import Finding

WORDS = {
    "broken": "no longer fits",
    "new, over": "new, does not fit",
    "wrong": "mistake",
    "unknown": "cannot say",
    "over": "still over",
    "fixed": "fits again",
    "changed": "fits",
    "new": "new, fits",
    "removed": "removed",
    "unchanged": "fits, unchanged",
}
MARKS = {
    **dict.fromkeys(("broken", "new, over", "wrong"), "❌"),
    **dict.fromkeys(("fixed", "changed", "new", "unchanged"), "✅"),
    "unknown": "❔",
    "over": "⚠️",
    "removed": "➖",
}
_STYLES = {"❌": "bold red", "✅": "green", "❔": "yellow", "⚠️": "yellow", "➖": ""}
FOLDED = ("over", "unchanged")  # what a reviewer of the change need not read
_MOST_CAUSES = 2
_NOTABLE = 20  # a further cause is named if it is at least a 20th of the first


def blocks(changes: Changes) -> Iterator[Block]:
    """Yield the changes as a report's blocks."""
    columns: list[Column[RunChange]] = [
        Column("run", lambda each: each.row.run),
        Column("GPU", lambda each: words.on_gpu(each.row)),
        Column("peak", lambda each: words.size(each.head.peak) if each.head else "", right=True),
        Column("limit", lambda each: words.size(each.head.limit) if each.head else "", right=True),
        Column("change", change, right=True),
        Column("answer", lambda each: WORDS[each.kind], style=lambda each: _STYLES[mark(each)]),
        Column("cause", lambda each: "" if _is_error(each) else why(each), wraps=True),
    ]
    shown = [each for each in changes.changes if each.kind != "unchanged"]
    if shown:
        yield Table(columns, shown)
    same = len({each.row.run for each in changes.changes}) - len({each.row.run for each in shown})
    text = headline(changes) + (f"; {same} unchanged" if same else "")
    yield from words.ending(text, [each.head for each in shown if each.head is not None], changes)


def findings_of(changes: Changes) -> Iterator[Finding]:
    """Yield what is to look at; a run that did not fit before either is a warning, and one that is as near its limit
    as before is nothing to say about the change."""
    for problem in changes.problems:
        yield Finding("wrong", problem.file, problem.line, problem.text)
    for each in changes.changes:
        row = each.head
        if row is None or row.status == "fits" or each.kind == "unchanged":
            continue
        status = row.status
        if status in ("over", "wrong") and each.kind in ("over", "unknown"):
            status = "near" if each.kind == "over" else "unknown"
        line, text = words.line_of(row), words.sentence(row)
        if each.kind in FAILS and each.causes:
            first = each.causes[0].changes[0]
            line = first.line if first.file == row.run and first.line else line
            text = f"{words.sentence(row._replace(deciding=None))}; {change(each)} by {why(each)}"
        elif each.kind == "over":
            text = f"{text}; it did not fit before either"
        yield Finding(status, "" if row.run.startswith(COMMAND) else row.run, line, text, row.gpu)


def mark(each: RunChange) -> str:
    """Return a sign for a change; a run that is near its limit is no plain success."""
    is_near = each.head is not None and each.head.status == "near"
    return "⚠️" if is_near and MARKS[each.kind] == "✅" else MARKS[each.kind]


def change(each: RunChange) -> str:
    both = each.base is not None and each.head is not None and each.base.limit and each.head.limit
    return words.change(each.bytes) if both else ""


def _is_error(each: RunChange) -> bool:
    return each.head is not None and each.head.status in ("unknown", "wrong")


def why(each: RunChange, code: str = "") -> str:
    """Return the causes of a change; of a run that cannot be answered the error. `code` is put around keys."""
    row = each.row
    if _is_error(each):
        return row.error
    least = abs(each.causes[0].bytes) // _NOTABLE if each.causes else 0
    shown = [cause for cause in each.causes if abs(cause.bytes) >= least][:_MOST_CAUSES]
    texts = [cause_text(cause, row.run, code, len(shown) > 1) for cause in shown]
    renamed = [f"renamed from {code}{each.renamed}{code}"] if each.renamed else []
    takes = [words.takes_most(row, code)] if each.kind == "new, over" and row.deciding is not None else []
    reason = [row.reason] if row.reason and each.kind in FAILS else []
    near = [words.nearness(row)] if mark(each) == "⚠️" and row.status == "near" else []
    return "; ".join([*reason, *texts, *renamed, *takes, *near])


def cause_text(cause: Cause, run: str, code: str = "", with_bytes: bool = False) -> str:
    """Return a cause: `sequence_len 2048 → 4096 (line 14)`."""
    if cause.kind in ("framework", "memplan"):
        [each] = cause.changes
        start = "" if cause.kind == "framework" else "memplan "
        text = f"{start}{each.before} → {each.after}"
    elif cause.kind == "limit":
        text = f"limit {cause.changes[0].before} → {cause.changes[0].after}"
        return f"{text} ({words.change(cause.bytes)})" if with_bytes else text
    else:
        text = ", ".join(_value_change(each, code, run) for each in cause.changes)
    return f"{text}: {words.change(cause.bytes)}" if with_bytes else text


def _value_change(each: ValueChange, code: str, run: str) -> str:
    key = f"{code}{each.key}{code}"
    where = f" (line {each.line}{'' if each.file in ('', run) else f' of {each.file}'})" if each.line else ""
    if each.before is None and each.after is not None:
        return f"{key} {words.value(each.after)} is new{where}"
    if each.after is None:
        return f"{key} {words.value(each.before)} is gone{where and where.replace('(line', '(was line')}"
    return f"{key} {words.value(each.before)} → {words.value(each.after)}{where}"


def headline(changes: Changes) -> str:
    """Return how many runs no longer fit, in a sentence."""
    runs = {each.row.run for each in changes.changes if each.kind != "removed"}

    def of(*kinds: str) -> int:
        return len({each.row.run for each in changes.changes if each.kind in kinds})

    broken, new, over = of("broken"), of("new, over"), of("over")
    unknown, wrong, fixed = of("unknown"), of("wrong") + len(changes.problems), of("fixed")
    parts = [f"{words.share(broken, len(runs))} no longer {'fits' if broken == 1 else 'fit'}"] if broken else []
    parts += [f"{new} new {'run does' if new == 1 else 'runs do'} not fit"] if new else []
    if not parts and not wrong:
        all_of = "no runs are checked" if not runs else "no run is newly over its budget"
        parts = [f"all {len(runs)} runs fit" if runs and not over and not unknown and len(runs) > 1 else all_of]
        parts = ["the run fits"] if len(runs) == 1 and not over and not unknown else parts
    parts += [f"{wrong} {'has a mistake' if wrong == 1 else 'have mistakes'}"] if wrong else []
    parts += [f"{unknown} cannot be answered"] if unknown else []
    parts += [f"{over} did not fit before either"] if over else []
    parts += [f"{fixed} {'fits' if fixed == 1 else 'fit'} again"] if fixed else []
    return "; ".join(parts)
