"""HTML: one self-contained page per report, light or dark, on paper or a phone. Nothing is loaded from elsewhere.

A page has a header with the answer and the command, drawings (`memplan.report.svg`), and the blocks of the report.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeAlias

from memplan.core.units import GIB
from memplan.estimate.answer import Estimate
from memplan.report import assumptions as assumptions_
from memplan.report import svg
from memplan.report import wording as words
from memplan.report.blocks import (
    Block,
    Column,
    Drawing,
    Facts,
    Fold,
    Heading,
    Notes,
    Pairs,
    Paste,
    Styled,
    Table,
    Text,
    Verbatim,
)
from memplan.report.markdown import next_steps, verdicts
from memplan.report.markup import Markup, element, joined
from memplan.report.stamp import Stamp
from memplan.report.text import Screen

Part: TypeAlias = Block | Markup
_MOST_LINES = 200  # of a ledger
MOST_MOMENTS = 800  # drawn on a page
_CLASSES = {"green": "fits", "yellow": "tight", "red": "nofit", "bold": "b", "dim": "soft"}  # of rich's words
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False, stamp: Stamp | None = None) -> str:
    first, question = answers[0], assumptions_.question(answers[0])
    title = words.verdict(first) if len(answers) == 1 else assumptions_.title(answers)
    of_one = svg.verdict_class(first.verdict.answer) if len(answers) == 1 else ""
    return page(title, _answers(answers, explain, ranks), stamp, of_one, question if len(answers) == 1 else "")


def page(title: str, parts: Iterable[Part], stamp: Stamp | None = None, verdict: str = "", question: str = "") -> str:
    """Return a page: the header, then the parts. `verdict` is the class of the title."""
    stamp, style = stamp or Stamp(), Path(__file__).parent / "style"
    css, script = ((style / name).read_text("utf-8") for name in ("palette.css", "page.js"))
    css += (style / "page.css").read_text("utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"memplan: {title}"),
        element("style", Markup(f"\n{css}")),
    )
    header = [*_title(title, verdict, question)]
    header += [element("pre", element("code", stamp.command), class_="command")] if stamp.command else []
    header.append(element("p", stamp.line, class_="made"))
    main = element("main", Markup("\n"), fragment(parts))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n{head}\n<body>\n{element("header", *header)}\n{main}\n'
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def fragment(parts: Iterable[Part]) -> Markup:
    """Return parts of a page without the page."""
    return joined(*(line for part in parts for line in (_html(part), "\n")))


def summary(answer: Estimate) -> Iterator[Part]:
    """Yield the top of a page about one run: verdict, question and bar."""
    question = assumptions_.question(answer)
    yield from _title(words.verdict(answer), svg.verdict_class(answer.verdict.answer), question)
    yield bars([("", answer)])


def _title(title: str, verdict: str, question: str) -> Iterator[Markup]:
    yield element("h1", title, class_=verdict or None)
    if question:
        yield element("p", question)


def _answers(answers: Sequence[Estimate], explain: bool, ranks: bool) -> Iterator[Part]:
    """Yield the parts of a page about one run: on one card, on several, or without one."""
    named = [*zip(assumptions_.names(answers), answers, strict=True)]
    if len(answers) > 1:
        yield verdicts(named)
    yield bars(named)
    for name, answer in named:
        yield from next_steps(answer, name)
    yield from assumptions_.of_lengths(answers)
    distinct = [next(group) for _, group in groupby(named, key=lambda run: (words.asked(run[1]), words.moment(run[1])))]
    for name, answer in distinct:
        on = name and f" on {name}" if assumptions_.is_one_question(answers) else f": {name}"
        yield Heading(f"Through the step{on}" if answer.run.task == "train" else f"Through the run{on}")
        yield Text(words.summary(answer))
        yield timeline(answer, MOST_MOMENTS // len(distinct))
        yield Heading(f"At the peak{on}")
        yield _parts(answer)
        yield Heading(f"By phase{on}")
        yield words.phase_table(answer)
        if answer.serving is not None:
            from memplan.report.serving import pool

            yield Facts("Keys and values", pool(answer))
    for name, answer in named if ranks else ():
        if answer.ranks:
            yield Heading(f"{name and f'{name}: '}{words.ranks_title(answer)}")
            yield words.ranks_table(answer)
    for title, facts in assumptions_.assumed(answers):
        yield Fold(title, [Facts("", facts)], is_open=True)
    yield Notes(words.notes(answers))
    for name, answer in distinct:
        yield ledger(answer, explain, name)


def bars(runs: Sequence[svg.Labelled]) -> Markup:
    """Return a figure of the runs' bars. Named ones have a legend, as no table gives the colours of their parts."""
    told = ", ".join(f"{label} {words.tenths(answer.bytes.used)} GiB".strip() for label, answer in runs)
    drawn = element("svg", svg.bars(runs), role="img", aria_label=f"Used memory: {told}", height=svg.height(runs))
    names = svg.parts_of([answer for _, answer in runs]) if any(label for label, _ in runs) else {}
    legend = [element("li", element("i", class_=f"swatch {key}"), label) for key, label in names.items()]
    return element("figure", drawn, *((element("ul", *legend, class_="legend"),) if legend else ()))


def timeline(answer: Estimate, most: int = MOST_MOMENTS, full: int = 0, title: str = "") -> Markup:
    """Return a figure of the step: the drawing, a slider that chooses a moment, and the bytes at that moment."""
    moments = svg.drawn_moments(answer, min(most, svg.MOST_DRAWN))
    kinds = [kind for kind in words.CATEGORIES if any(moment.kinds.get(kind) for moment in moments)]
    places = list(dict.fromkeys(map(svg.moment_name, moments)))
    number = {place: n for n, place in enumerate(places)}
    top = max(range(len(moments)), key=lambda n: (moments[n].bytes, n))
    data = {
        "kinds": [(kind, words.CATEGORIES[kind]) for kind in kinds],
        "places": places,
        "moments": [
            [round(m.start, 2), number[svg.moment_name(m)], *map(_gib, (m.bytes, *(m.kinds.get(k, 0) for k in kinds)))]
            for m in moments
        ],
    }
    label = f"Memory allocated through the {'step' if answer.run.task == 'train' else 'run'}{title and f' of {title}'}"
    drawn = {"role": "img", "aria_label": f"{label}; the peak is {words.moment(answer)}", "height": svg.HEIGHT}
    chooses = {"min": 0, "max": len(moments) - 1, "value": top, "aria_label": f"{label}: a moment", "hidden": ""}
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return element(
        "figure",
        element("figcaption", _caption(answer, title)),
        element("svg", svg.timeline(answer, full, moments), **drawn),
        element("input", type="range", **chooses),
        element("output"),
        element("script", Markup(text), type="application/json"),
        class_="timeline",
    )


def _caption(answer: Estimate, title: str) -> str:
    later = ", in later steps if they differ from the first" if answer.run.task == "train" else ""
    what = f"{title}: allocated" if title else "Allocated"
    return f"{what} whenever memory is about to fall{later}. Of equal layers, the first and the last are drawn."


def _gib(n: int) -> float:
    return max(round(n / GIB, 3), 0.001) if n else 0  # the page shows less than a hundredth as that, not as nothing


def _parts(answer: Estimate) -> Table[words.MemoryPart]:
    """Return the parts of the used memory, each behind its colour in the drawings."""
    table = words.part_table(answer)
    first: Column[words.MemoryPart] = Column(
        "part", lambda part: part.label, style=lambda part: f"swatch {part.key}" if part.key else "bold"
    )
    return Table([first, *table.columns[1:]], table.rows)


def ledger(answer: Estimate, is_open: bool = False, name: str = "") -> Fold:
    """Return the tensors at the peak, the largest of very many, folded. `name` is the answer's, of several."""
    table = words.ledger_table(answer)
    *lines, total = table.rows
    left = lines[_MOST_LINES:]
    if left:
        rest = sum(line.bytes for line in left)
        lines = [*lines[:_MOST_LINES], total._replace(what=f"{len(left):,} smaller ones", bytes=rest)]
    on = f" on {answer.run.gpu}" if answer.gpu else ""
    on = f" of {name}" if name not in ("", str(answer.run.gpu)) else on
    title = f"Every tensor at the peak{on}: {len(answer.ledger):,} kinds, {words.tenths(answer.bytes.allocated)} GiB"
    return Fold(title, [Table(table.columns, [*lines, total])], is_open)


# --- blocks ------------------------------------------------------------------------------------------------


def _html(part: Part) -> Markup:
    return part if isinstance(part, Markup) else joined(*_elements(part))


def _elements(block: Block) -> Iterator[Markup]:
    match block:
        case Text(text, style):
            if text:
                yield element("p", text, class_=class_of(style) or None)
        case Heading(text, _):
            yield element("h2", text)
        case Pairs(rows):
            yield _pairs(rows)
        case Facts(title, rows, heads):
            yield from (element("h2", title),) if title else ()
            if len(heads) == 1:
                yield _pairs(rows)
            else:
                columns = [Column[Any](head, itemgetter(n)) for n, head in enumerate(("", *heads))]
                yield _table(Table(columns, rows))
        case Notes(texts, title):
            if texts:
                yield from (element("h2", title),) if title else ()
                yield element("ul", *(element("li", text) for text in texts))
        case Table():
            yield _table(block)
        case Paste(title, lines, note):
            yield element("p", title, class_="soft")
            yield from (_code(lines),) if lines else ()
            yield from (element("p", note, class_="soft"),) if note else ()
        case Verbatim(lines):
            yield _code(lines)
        case Fold(title, blocks, is_open):
            content = (element("summary", title), *map(_html, blocks))
            yield element("details", *content, open="" if is_open else None)
        case Drawing(draw, as_table, caption):
            if as_table is None:
                yield _code(["".join(text for text, _ in line) for line in draw(Screen())])
            else:
                yield _table(as_table(), "map")
                yield element("p", caption, class_="soft")


def class_of(style: str) -> str:
    """Return the classes of a style in rich's words."""
    return " ".join(_CLASSES.get(word, word) for word in style.split())


def _code(lines: Iterable[str]) -> Markup:
    return element("pre", element("code", "\n".join(lines)), tabindex=0)


def _pairs(rows: Iterable[Sequence[str]]) -> Markup:
    """Return names and texts; a text without a name belongs to the name before."""
    out: list[Markup] = []
    for name, text in rows:
        out += [element("dt", name.strip() or " ")] if name.strip() or not out else []
        out.append(element("dd", text))
    return element("dl", *out)


def _table(table: Table[Any], name: str = "") -> Markup:
    """Return a table. A first column without a title, or of a map, heads the rows; others without one are left out,
    unless none has one."""
    first = table.columns[0]
    titled = any(column.title for column in table.columns)
    shown = [n for n, column in enumerate(table.columns) if column.title or not (n and titled)]
    heads = (_head(table.columns[n], "col") if n or first.title else element("td") for n in shown)
    names_rows = not first.title or name == "map"
    rows = (
        element("tr", *(_data(row[n], table.columns[n].right, not n and names_rows) for n in shown), Markup("\n"))
        for row in table.cells()
    )
    head = (element("thead", element("tr", *heads)),) if titled else ()
    parts = (*head, element("tbody", Markup("\n"), *rows))
    return element("div", element("table", *parts, class_=name or None), class_="scroll", tabindex=0)


def _head(column: Column[Any], scope: str) -> Markup:
    return element("th", column.title, class_="n" if column.right else None, scope=scope)


def _data(cell: Styled, is_right: bool, is_head: bool) -> Markup:
    text, style = cell
    if style.startswith("swatch "):
        return element("td", element("i", class_=style), text, class_="k")
    classes = " ".join(filter(None, ("n" if is_right else "", class_of(style)))) or None
    if is_head:
        return element("th", text, class_=classes, scope="row")
    content = element("span", text) if "quarter" in style else text
    return element("td", content, class_=classes)
