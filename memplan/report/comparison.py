"""Report of runs side by side: a column per run, or, if they do not fit, a row per run and numbered columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter

from memplan.estimate.answer import Estimate
from memplan.planning.comparison import Comparison
from memplan.report import differences
from memplan.report import wording as words
from memplan.report.blocks import GAP, Block, Column, Facts, Fold, Heading, Notes, Styled, Table, Text, styled
from memplan.report.csv import facts, written
from memplan.report.differences import NUMBER, ComparisonHeading, Group, Row, SharedText, signed, together
from memplan.report.display import display
from memplan.report.markdown import page, stamped
from memplan.report.stamp import Stamp
from memplan.report.text import Screen

FORMATS = ("table", "json", "markdown", "csv", "html", "svg")


def render(format: str, comparison: Comparison, to: Screen, stamp: Stamp | None = None) -> str:
    """Return the comparison in one of `FORMATS`; a table fits the screen `to`, and a page shows the `stamp`."""
    match format:
        case "json":
            return comparison.model_dump_json(indent=2) + "\n"
        case "csv":
            return _csv(comparison)
        case "markdown":
            *blocks, fold = _page(comparison)
            assert isinstance(fold, Fold)
            return page([*blocks, fold._replace(blocks=[*fold.blocks, stamped(stamp or Stamp())])])
        case "html":
            return _html(comparison, stamp)
        case "svg":
            from memplan.report import svg

            return svg.page(_title(comparison), _named(comparison), stamp)
        case _:
            return display(_table(comparison, to), to)


def _label(row: Row) -> str:
    return f"  {row.label}" if row.kind in words.CATEGORIES else row.label


def _note(told: SharedText, called: Sequence[str]) -> str:
    return told.text if len(told.runs) == len(called) else f"{told.text} ({together(told, called)})"


def _sentences(comparison: Comparison, called: Sequence[str]) -> Iterator[str]:
    """Yield why the runs differ, and the moments of their peaks."""
    yield from differences.reasons(comparison, called)
    moments = differences.moments(comparison.answers)
    for told in moments:
        yield f"The peak{f' of {together(told, called)}' if len(moments) > 1 else ''} is {told.text}."


def _assumed(answers: Sequence[Estimate], called: Sequence[str], *, on_page: bool) -> Iterator[Block]:
    """Yield the assumptions that differ, those that do not, and notes; a page repeats the names of assumptions."""
    apart = [
        ("" if n and not on_page else label, together(told, called), told.text)
        for label, texts in differences.differ(answers)
        for n, told in enumerate(texts)
    ]
    if apart:
        yield Facts("What else differs", apart, ("of", ""))
    yield Facts("Same for all", differences.same(answers))
    notes = differences.notes(answers)
    if notes:
        yield Notes([_note(told, called) for told in notes])


# --- the terminal ------------------------------------------------------------------------------------------

_MAX_HEAD_WIDTH = 16  # longer names at the head of a column wrap
_SUMS = ("GiB used", "allocated")


def _table(comparison: Comparison, to: Screen) -> Iterator[Block]:
    answers = comparison.answers
    heads, groups, called = differences.headings(answers), differences.groups(answers), differences.names(answers)
    if _fits(heads, groups, to):
        yield _side_by_side(heads, groups)
    else:
        called = [f"{NUMBER} {n}" for n, _ in enumerate(answers, 1)]
        yield _summary(heads, groups[0].rows)
        yield from _numbered(groups, to)
    yield from map(Text, _sentences(comparison, called))
    yield from _assumed(answers, called, on_page=False)


def _fits(heads: Sequence[ComparisonHeading], groups: Sequence[Group], to: Screen) -> bool:
    """Whether the screen has room for a column per run, and one for its differences."""
    rows = [row for group in groups for row in group.rows]
    labels = [*(head.title for head in heads), *(group.title for group in groups), *map(_label, rows)]
    width = max(map(len, labels))
    for run, _ in enumerate(rows[0].cells):
        figures = max(len(row.cells[run]) for row in rows)
        names = max((len(head.cells[run]) for head in heads), default=0)
        changes = max((len(signed(row.changes[run])) for row in rows if row.changes), default=0)
        width += GAP + max(figures, min(names, _MAX_HEAD_WIDTH)) + (GAP + changes if changes else 0)
    return width <= to.width


def _side_by_side(heads: Sequence[ComparisonHeading], groups: Sequence[Group]) -> Table[Sequence[Styled]]:
    rows = [row for group in groups for row in group.rows]
    runs = range(len(rows[0].cells))
    most = [differences.largest(rows, run) for run in runs]
    blank = [("", "")] * 2 * len(runs)
    lines: list[list[Styled]] = []
    for head in heads:
        lines.append([(head.title, "dim"), *_paired([(cell, "bold") for cell in head.cells], blank)])
    for n, group in enumerate(groups):
        lines += [blank] if n else []
        lines += [[(group.title, "dim"), *blank[1:]]] if group.title else []
        for row in group.rows:
            style = "bold" if row.label in _SUMS else ""
            cells = [(cell, words.COLOURS.get(cell, style)) for cell in row.cells]
            changes = [(signed(n), _style(row, run, most[run])) for run, n in enumerate(row.changes)] or blank
            lines.append([(_label(row), style), *_paired(cells, changes)])
    columns = [styled(0), styled(1, right=True, wraps=True)]
    for i in range(2, 2 * len(runs), 2):
        columns += [styled(i, right=True, wraps=True), styled(i + 1, right=True)]
    return Table(columns, lines)


def _paired(cells: Sequence[Styled], changes: Sequence[Styled]) -> list[Styled]:
    """Return each run's cell followed by its difference, which the first run has not."""
    return [text for n, pair in enumerate(zip(cells, changes, strict=False)) for text in (pair if n else pair[:1])]


def _style(row: Row, run: int, most: Row | None) -> str:
    change = row.changes[run]
    if not change:
        return ""
    colour = "green" if (change > 0) == row.better else "red"
    return f"bold {colour}" if row is most else colour


def _summary(heads: Sequence[ComparisonHeading], verdicts: Sequence[Row]) -> Table[tuple[str, ...]]:
    """Return a table with a row per run: what it is, and whether it fits."""
    shown: list[ComparisonHeading | Row] = [*(head for head in heads if head.title != NUMBER), *verdicts]
    columns: list[Column[tuple[str, ...]]] = [Column(NUMBER, itemgetter(0), right=True)]
    for n, part in enumerate(shown, 1):
        if isinstance(part, ComparisonHeading):
            columns.append(Column(part.title, itemgetter(n), wraps=True))
        elif part.label == "answer":
            columns.append(Column(part.label, itemgetter(n), wraps=True, style=partial(_verdict_colour, n)))
        else:
            columns.append(
                Column(part.label, itemgetter(n), right=bool(part.changes), optional=part.label not in _SUMS)
            )
    by_run = zip(*(part.cells for part in shown), strict=True)
    return Table(columns, [(str(n), *cells) for n, cells in enumerate(by_run, 1)])


def _verdict_colour(column: int, row: Sequence[str]) -> str:
    return words.COLOURS.get(row[column], "")


def _numbered(groups: Sequence[Group], to: Screen) -> Iterator[Table[Sequence[Styled]]]:
    """Yield the figures of the runs in tables that fit the screen, with differences below the figures."""
    rows = [row for group in groups for row in group.rows if row.changes and row.label not in ("usable", "headroom")]
    titles = {group.rows[0].label: group.title for group in groups if group.title}
    runs = range(len(rows[0].cells))
    most = [differences.largest(rows, run) for run in runs]
    width = max(len(text) for row in rows for text in (*row.cells, *map(signed, row.changes)))
    per_table = max(1, (to.width - max(len(_label(row)) for row in rows)) // (width + GAP))
    for start in range(0, len(runs), per_table):
        shown = runs[start : start + per_table]
        lines: list[list[Styled]] = []
        for row in rows:
            style = "bold" if row.label in _SUMS else ""
            if row.label in titles:
                lines.append([(titles[row.label], "dim"), *[("", "")] * len(shown)])
            lines.append([(_label(row), style), *((row.cells[run].rjust(width), style) for run in shown)])
            if any(row.changes[run] for run in shown):
                lines.append([("", ""), *((signed(row.changes[run]), _style(row, run, most[run])) for run in shown)])
        columns = [styled(n, f"{NUMBER} {run + 1}", right=True) for n, run in enumerate(shown, 1)]
        yield Table([styled(0), *columns], lines)


# --- pages and CSV -----------------------------------------------------------------------------------------

_MAX_COLUMNS = 6  # runs; with more, rows and columns are swapped


def _page(comparison: Comparison) -> Iterator[Block]:
    """Yield the runs side by side, why they differ, and in one fold what is the same."""
    answers, called = comparison.answers, differences.names(comparison.answers)
    groups = differences.groups(answers)
    rows = [row for group in groups for row in group.rows]
    most = [differences.largest(rows, run) for run, _ in enumerate(answers)]
    heads = differences.headings(answers)
    cells: list[Sequence[Styled]] = [[(text, "") for text in ("", *called)]]
    if heads[0].title == NUMBER:
        cells += [[(text, "") for text in (head.title, *head.cells)] for head in heads[1:]]
    for group in groups:
        for row in group.rows:
            label = f"{row.label} ({group.title})" if row is group.rows[0] and group.title else row.label
            cells.append([(label, ""), *(_figure(row, run, row is most[run]) for run, _ in enumerate(answers))])
    titles, *lines = list(zip(*cells, strict=True)) if len(answers) > _MAX_COLUMNS else cells
    columns = [styled(n, title, right=n > 0) for n, (title, _) in enumerate(titles)]
    yield Table(columns, lines)
    yield Notes(list(_sentences(comparison, called)), "Why they differ")
    yield Fold("What else differs, what is the same, and notes", list(_assumed(answers, called, on_page=True)))


def _figure(row: Row, run: int, most: bool) -> Styled:
    """Return a figure and its difference, in bold if it is the run's largest or the verdict."""
    change = signed(row.changes[run]) if row.changes else ""
    text = f"{row.cells[run]} ({change})" if change else row.cells[run]
    colour = words.COLOURS.get(text, "")
    return text, f"bold {colour}" if most or row.label == "answer" else ""


def _named(comparison: Comparison) -> list[tuple[str, Estimate]]:
    return list(zip(differences.names(comparison.answers), comparison.answers, strict=True))


def _title(comparison: Comparison) -> str:
    names = [name for name, _ in _named(comparison)]
    return f"{len(names)} runs side by side: {', '.join(names)}"


def _html(comparison: Comparison, stamp: Stamp | None) -> str:
    """Return a page: the bars of the runs, the runs side by side, and the step of each, all to one scale."""
    from memplan.report import html, svg

    named = _named(comparison)
    few, most = named[:_MAX_COLUMNS], html.MOST_MOMENTS // min(len(named), _MAX_COLUMNS)
    full = max(svg.extent(answer) for _, answer in few)
    blocks = list(_page(comparison))
    parts: list[html.Part] = [html.bars(named), *blocks[:-1], Heading("Through the step")]
    parts += [html.timeline(answer, most, full, name) for name, answer in few]
    return html.page(_title(comparison), [*parts, blocks[-1]], stamp)


def _csv(comparison: Comparison) -> str:
    """Return a row per run, with its differences from the first in bytes; the first run's are 0."""
    changes = [{**d.bytes, **d.categories} for d in comparison.differences]
    changes.insert(0, dict.fromkeys(changes[0], 0))
    return written(
        [
            {NUMBER: n, **facts(answer), **{f"{name}_difference": change for name, change in by_name.items()}}
            for n, (answer, by_name) in enumerate(zip(comparison.answers, changes, strict=True), 1)
        ]
    )
