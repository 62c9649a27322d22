"""The comment on a pull request: a marker to find it by, one table of what a reviewer needs, and the rest folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.version import __version__
from memplan.gate.difference import Changes, RunChange
from memplan.gate.rows import Check, CheckedRun
from memplan.report.gate import changes as of_changes
from memplan.report.gate import wording as words
from memplan.report.markdown import plain

MARKER = "<!-- memplan -->"
# GitHub takes comments of 65,536 characters, and counts a character outside of the basic plane as two; the summary of a
# step may have 1024 KiB, and GitLab's comments a million characters.
MOST = 60_000
_HEADS = "| run | GPU | peak | limit | change | |\n|---|---|--:|--:|--:|---|"
_CHECKED = "| run | GPU | peak | limit | |\n|---|---|--:|--:|---|"


class _Page(NamedTuple):
    """A page's parts: rows of the first table, rows that are folded, and sentences about rows of the first."""

    title: str
    heads: str
    first: Sequence[str]
    folded: Sequence[str]
    details: Sequence[str]
    mistakes: Sequence[str]
    fold: str


def render(found: Check | Changes) -> str:
    return _page(_of_check(found) if isinstance(found, Check) else _of_changes(found))


def _page(page: _Page) -> str:
    """Return the page, as much of it as a comment may have."""
    lines = [MARKER, f"### memplan: {page.title}"]
    lines += ["", *_cut([], [f"- {printable(text)}" for text in page.mistakes], MOST // 6)] if page.mistakes else []
    lines += ["", *_cut([page.heads], page.first, MOST * 2 // 3)] if page.first else []
    used = sum(map(len, lines))
    if page.details:
        lines += ["", "<details><summary>What each change takes</summary>", ""]
        lines += _cut([], page.details, (MOST - used) // 2)
        lines += ["", "</details>"]
    if page.folded:
        used = sum(map(len, lines))
        lines += ["", f"<details><summary>{page.fold}</summary>", ""]
        lines += _cut([page.heads], page.folded, MOST - used - 200)
        lines += ["", "</details>"]
    return "\n".join([*lines, "", f"<sub>memplan {__version__}; bytes of one GPU</sub>"]) + "\n"


def _cut(start: Sequence[str], rows: Sequence[str], most: int) -> list[str]:
    """Return as many rows as there is room for, and how many are left out."""
    out, used = [*start], 0
    for number, row in enumerate(rows):
        used += len(row) + 1
        if used > most:
            return [*out, "", f"and {len(rows) - number} more, which there is no room for here"]
        out.append(row)
    return out


def _of_check(check: Check) -> _Page:
    first = [_checked(row) for row in check.rows if row.status != "fits"]
    folded = [_checked(row) for row in check.rows if row.status == "fits"]
    mistakes = [f"❌ {plain(text)}" for text in (*(each.text for each in check.problems), *check.moved)]
    mistakes += [plain(note) for note in check.notes]
    count = f"{len(folded)} that {'fits' if len(folded) == 1 else 'fit'}"
    return _Page(words.headline(check), _CHECKED, first, folded, [], mistakes, count)


def _checked(row: CheckedRun) -> str:
    text = plain(row.error) if row.status in ("unknown", "wrong") else _in_cell(words.reasons(row, "`"))
    return _row(row.run, row, f"{words.MARKS[row.status]} {text}{_left_out(row)}".rstrip())


def _row(run: str, row: CheckedRun, *more: str) -> str:
    cells = code(run), plain(words.on_gpu(row)), words.size(row.peak), words.size(row.limit), *more
    return printable(f"| {' | '.join(cells)} |")


def _left_out(row: CheckedRun) -> str:
    return f" (not counted: {plain(', '.join(row.left_out))})" if row.left_out else ""


def _of_changes(changes: Changes) -> _Page:
    first = [each for each in changes.changes if each.kind not in of_changes.FOLDED]
    folded = [each for each in changes.changes if each.kind in of_changes.FOLDED]
    mistakes = [f"❌ {plain(problem.text)}" for problem in changes.problems] + [plain(note) for note in changes.notes]
    details = [line for each in first for line in _details(each)]
    fold = f"{len(folded)} unchanged, or over the limit before"
    return _Page(
        of_changes.headline(changes),
        _HEADS,
        [_changed(each) for each in first],
        [_changed(each) for each in folded],
        details,
        mistakes,
        fold,
    )


def _changed(each: RunChange) -> str:
    why = of_changes.why(each, "`")
    why = plain(why) if each.head is not None and each.row.status in ("unknown", "wrong") else _in_cell(why)
    word = of_changes.WORDS[each.kind] if each.kind in ("fixed", "new", "removed", "over") else ""
    text = ": ".join(filter(None, (word, why)))
    cells = of_changes.change(each), f"{of_changes.mark(each)} {text}{_left_out(each.row)}".rstrip()
    return _row(each.row.run, each.head or CheckedRun(each.row.run, each.row.gpu, each.row.gpus), *cells)


def _details(each: RunChange) -> Iterator[str]:
    """Yield a line on how sure the figure is, and one per cause if there are several."""
    row = each.head
    if row is None or not row.limit:
        return
    before = f", {words.size(each.base.peak)} before" if each.base is not None and each.base.limit else ""
    where = f"- {code(row.run)} on {plain(words.on_gpu(row))}, read as {plain(row.title)}"
    yield f"{where}: {words.size(row.peak)}{before}; expected range {words.tenths(row.low)} to {words.size(row.high)}"
    if len(each.causes) > 1:
        yield from (f"  - {_in_cell(of_changes.cause_text(cause, row.run, '`', True))}" for cause in each.causes)


def code(text: str) -> str:
    """Return a text as code, in a cell of a table."""
    return plain(text) if "`" in text or not text.isprintable() else f"`{text.replace('|', chr(92) + '|')}`"


def _in_cell(text: str) -> str:
    """Return a text with code in it for a cell of a table."""
    parts = text.split("`")
    return "".join(code(part) if n % 2 and part else plain(part) for n, part in enumerate(parts))
