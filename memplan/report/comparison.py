"""Report of runs side by side: a column per run, or, if they do not fit, a row per run and numbered columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import StringIO

from memplan.estimate.answer import Estimate
from memplan.planning.comparison import Comparison
from memplan.report import differences
from memplan.report import wording as words
from memplan.report.csv import facts
from memplan.report.differences import NUMBER, ComparisonHeading, Group, Row, SharedText, signed, together
from memplan.report.markdown import plain
from memplan.report.markdown import table as markdown_table
from memplan.report.table import COLOURS
from memplan.report.text import Column, Screen, paragraph, table

FORMATS = ("table", "json", "markdown", "csv")


def render(format: str, comparison: Comparison, to: Screen) -> str:
    """Return the comparison in one of `FORMATS`; a table fits the screen `to`."""
    match format:
        case "json":
            return comparison.model_dump_json(indent=2) + "\n"
        case "csv":
            return _csv(comparison)
        case "markdown":
            return "\n".join(_markdown(comparison)) + "\n"
        case _:
            return "\n".join(_table(comparison, to)) + "\n"


def _label(row: Row) -> str:
    return f"  {row.label}" if row.kind in words.CATEGORIES else row.label


def _note(told: SharedText, called: Sequence[str]) -> str:
    return told.text if len(told.runs) == len(called) else f"{told.text} ({together(told, called)})"


def _moments(answers: Sequence[Estimate], called: Sequence[str]) -> Iterator[str]:
    moments = differences.moments(answers)
    for told in moments:
        yield f"The peak{f' of {together(told, called)}' if len(moments) > 1 else ''} is {told.text}."


# --- the terminal ------------------------------------------------------------------------------------------

_MAX_HEAD_WIDTH = 16  # longer names at the head of a column wrap
_GAP = 2
_SUMS = ("GiB used", "allocated")


def _table(comparison: Comparison, to: Screen) -> Iterator[str]:
    answers = comparison.answers
    heads, groups, called = differences.headings(answers), differences.groups(answers), differences.names(answers)
    if _fits(heads, groups, to):
        yield from _side_by_side(heads, groups, to)
    else:
        called = [f"{NUMBER} {n}" for n, _ in enumerate(answers, 1)]
        yield from _summary(heads, groups[0].rows, to)
        yield from _numbered(groups, to)
    yield ""
    for text in (*differences.reasons(comparison, called), *_moments(answers, called)):
        yield from paragraph(text, to, "  ")
    apart = differences.differ(answers)
    if apart:
        yield ""
        yield to.paint("What else differs", "bold")
        rows = [
            ("" if n else label, together(told, called), told.text)
            for label, texts in apart
            for n, told in enumerate(texts)
        ]
        yield from table([Column(""), Column("", wraps=True), Column("", wraps=True)], rows, to, ["dim||"] * len(rows))
    alike = differences.same(answers)
    yield ""
    yield to.paint("Same for all", "bold")
    yield from table([Column(""), Column("", wraps=True)], alike, to, ["dim|"] * len(alike))
    notes = differences.notes(answers)
    if notes:
        yield ""
        yield to.paint("Notes", "bold")
        for told in notes:
            yield from paragraph(f"- {_note(told, called)}", to, "  ")


def _fits(heads: Sequence[ComparisonHeading], groups: Sequence[Group], to: Screen) -> bool:
    """Whether the screen has room for a column per run, and one for its differences."""
    rows = [row for group in groups for row in group.rows]
    labels = [*(head.title for head in heads), *(group.title for group in groups), *map(_label, rows)]
    width = max(map(len, labels))
    for run, _ in enumerate(rows[0].cells):
        figures = max(len(row.cells[run]) for row in rows)
        names = max((len(head.cells[run]) for head in heads), default=0)
        changes = max((len(signed(row.changes[run])) for row in rows if row.changes), default=0)
        width += _GAP + max(figures, min(names, _MAX_HEAD_WIDTH)) + (_GAP + changes if changes else 0)
    return width <= to.width


def _side_by_side(heads: Sequence[ComparisonHeading], groups: Sequence[Group], to: Screen) -> Iterator[str]:
    rows = [row for group in groups for row in group.rows]
    runs = range(len(rows[0].cells))
    columns = [Column("")]
    for run in runs:
        columns += [Column("", right=True, wraps=True), *([Column("", right=True)] if run else [])]
    lines: list[tuple[str, ...]] = [(head.title, *_paired(head.cells, [""] * len(runs))) for head in heads]
    styles = ["dim" + "|bold" * (len(columns) - 1)] * len(heads)
    most = [differences.largest(rows, run) for run in runs]
    for n, group in enumerate(groups):
        if n:
            lines += [("",) * len(columns), *([(group.title, *[""] * (len(columns) - 1))] if group.title else [])]
            styles += ["", *(["dim"] if group.title else [])]
        for row in group.rows:
            changes = [signed(n) for n in row.changes] or [""] * len(runs)
            lines.append((_label(row), *_paired(row.cells, changes)))
            painted = [_style(row, run, row is most[run]) for run in runs]
            style = "bold" if row.label in _SUMS else ""
            cells = [COLOURS.get(cell, style) for cell in row.cells]
            styles.append("|".join((style, *_paired(cells, painted))))
    yield from table(columns, lines, to, styles)


def _paired(cells: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return each run's cell followed by its difference, which the first run has not."""
    return [text for n, pair in enumerate(zip(cells, changes, strict=True)) for text in (pair if n else pair[:1])]


def _style(row: Row, run: int, most: bool) -> str:
    change = row.changes[run] if row.changes else None
    if not change:
        return ""
    colour = "green" if (change > 0) == row.better else "red"
    return f"bold {colour}" if most else colour


def _summary(heads: Sequence[ComparisonHeading], verdicts: Sequence[Row], to: Screen) -> Iterator[str]:
    """Yield a row per run: what it is, and whether it fits."""
    heads = [head for head in heads if head.title != NUMBER]
    columns = [Column(NUMBER, right=True), *(Column(head.title, wraps=True) for head in heads)]
    for row in verdicts:
        if row.label == "answer":
            columns.append(Column(row.label, wraps=True))
        else:
            columns.append(Column(row.label, right=bool(row.changes), optional=row.label not in _SUMS))
    by_run = zip(*(head.cells for head in heads), *(row.cells for row in verdicts), strict=True)
    rows = [(str(n), *cells) for n, cells in enumerate(by_run, 1)]
    styles = ["|".join(COLOURS.get(cell, "") for cell in row) for row in rows]
    yield from table(columns, rows, to, styles)


def _numbered(groups: Sequence[Group], to: Screen) -> Iterator[str]:
    """Yield the figures of the runs in tables that fit the screen, with differences below the figures."""
    rows = [row for group in groups for row in group.rows if row.changes and row.label not in ("usable", "headroom")]
    titles = {group.rows[0].label: group.title for group in groups if group.title}
    runs = range(len(rows[0].cells))
    most = [differences.largest(rows, run) for run in runs]
    width = max(len(text) for row in rows for text in (*row.cells, *map(signed, row.changes)))
    per_table = max(1, (to.width - max(len(_label(row)) for row in rows)) // (width + _GAP))
    for start in range(0, len(runs), per_table):
        shown = runs[start : start + per_table]
        lines: list[tuple[str, ...]] = []
        styles: list[str] = []
        for row in rows:
            if row.label in titles:
                lines.append((titles[row.label], *[""] * len(shown)))
                styles.append("dim")
            lines.append((_label(row), *(row.cells[run].rjust(width) for run in shown)))
            styles.append("bold" if row.label in _SUMS else "")
            changes = [signed(row.changes[run]) for run in shown]
            if any(changes):
                lines.append(("", *changes))
                styles.append("|".join(("", *(_style(row, run, row is most[run]) for run in shown))))
        yield ""
        columns = [Column(""), *(Column(f"{NUMBER} {run + 1}", right=True) for run in shown)]
        yield from table(columns, lines, to, styles)


# --- markdown and CSV --------------------------------------------------------------------------------------

_MAX_COLUMNS = 6  # runs; with more, rows and columns are swapped


def _markdown(comparison: Comparison) -> Iterator[str]:
    answers, called = comparison.answers, differences.names(comparison.answers)
    groups = differences.groups(answers)
    rows = [row for group in groups for row in group.rows]
    most = [differences.largest(rows, run) for run, _ in enumerate(answers)]
    heads = differences.headings(answers)
    cells = [("", *called)]
    if heads[0].title == NUMBER:
        cells += [(head.title, *head.cells) for head in heads[1:]]
    for group in groups:
        for row in group.rows:
            label = f"{row.label} ({group.title})" if row is group.rows[0] and group.title else row.label
            cells.append((label, *(_figure(row, run, row is most[run]) for run, _ in enumerate(answers))))
    if len(answers) > _MAX_COLUMNS:
        cells = list(zip(*cells, strict=True))
    yield from markdown_table(list(map(plain, cells[0])), cells[1:], "l" + "r" * (len(cells[0]) - 1))
    yield ""
    for text in (*differences.reasons(comparison, called), *_moments(answers, called)):
        yield f"- {plain(text)}"
    differing = differences.differ(answers)
    apart = [(label, together(told, called), told.text) for label, texts in differing for told in texts]
    if apart:
        yield ""
        yield from markdown_table(("what else differs", "of", ""), apart, "lll")
    yield ""
    yield from markdown_table(("same for all", ""), differences.same(answers), "ll")
    notes = differences.notes(answers)
    if notes:
        yield ""
        yield from (f"- {plain(_note(told, called))}" for told in notes)


def _figure(row: Row, run: int, most: bool) -> str:
    """Return a figure and its difference, in bold if it is the run's largest."""
    change = signed(row.changes[run]) if row.changes else ""
    cell = f"**{row.cells[run]}**" if row.label == "answer" and row.cells[run] else row.cells[run]
    return f"{cell} {f'(**{change}**)' if most else f'({change})'}" if change else cell


def _csv(comparison: Comparison) -> str:
    """Return a row per run, with its differences from the first in bytes; the first run's are 0."""
    answers = comparison.answers
    changes = [{**d.bytes, **d.categories} for d in comparison.differences]
    changes.insert(0, dict.fromkeys(changes[0], 0))
    rows = [
        {NUMBER: n, **facts(answer), **{f"{name}_difference": change for name, change in by_name.items()}}
        for n, (answer, by_name) in enumerate(zip(answers, changes, strict=True), 1)
    ]
    out = StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
