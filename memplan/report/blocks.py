"""Blocks of a report, each defined once and shown in a terminal or as markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from memplan.report import markdown
from memplan.report.text import Column, Screen, paragraph, table


class Text(NamedTuple):
    """A paragraph; `style` has names from `memplan.report.text.STYLES`."""

    text: str
    style: str = ""


class Heading(NamedTuple):
    text: str
    style: str = "bold"


class Pairs(NamedTuple):
    """Pairs of a name and a text. An empty name continues the one above."""

    rows: Sequence[tuple[str, str]]


class Table(NamedTuple):
    """A table; `styles` are those of `memplan.report.text.table`."""

    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]
    styles: Sequence[str] = ()


class Paste(NamedTuple):
    """Lines to paste into a file, and a note on them."""

    title: str
    lines: Sequence[str]
    note: str = ""
    language: str = "yaml"


class Drawing(NamedTuple):
    """A drawing made of text; `draw` returns its lines for a screen."""

    draw: Callable[[Screen], Iterable[str]]


Block: TypeAlias = Text | Heading | Pairs | Table | Paste | Drawing


def terminal(blocks: Iterable[Block], to: Screen) -> Iterator[str]:
    """Yield the lines on a screen, with a blank line between blocks except below headings and between texts."""
    before: Block | None = None
    for block in blocks:
        continues = type(before) is type(block) and isinstance(block, (Text, Paste))
        if before is not None and not isinstance(before, Heading) and not continues:
            yield ""
        yield from _on_screen(block, to)
        before = block


def _on_screen(block: Block, to: Screen) -> Iterator[str]:
    match block:
        case Text() | Heading():
            yield from (to.paint(line, block.style) for line in paragraph(block.text, to, "  "))
        case Pairs():
            rows = [("", *row) for row in block.rows]
            yield from table(
                [Column(""), Column("", wraps=True), Column("", wraps=True)], rows, to, ["|dim|"] * len(rows)
            )
        case Table():
            yield from table(block.columns, block.rows, to, block.styles)
        case Paste():
            yield from (to.paint(line, "dim") for line in paragraph(f"  {block.title}", to, "  "))
            for text in (*block.lines, *([f"({block.note})"] if block.note else [])):
                yield from paragraph(f"    {text}", to, "      ")
        case Drawing():
            yield from block.draw(to)


def page(blocks: Iterable[Block]) -> Iterator[str]:
    """Yield the lines of a markdown page."""
    before: Block | None = None
    for block in blocks:
        lines = list(_on_page(block))
        if lines and before is not None:
            yield ""
        yield from lines
        before = block if lines else before


def _on_page(block: Block) -> Iterator[str]:
    plain = markdown.plain
    match block:
        case Text():
            yield f"**{plain(block.text)}**" if "bold" in block.style else plain(block.text)
        case Heading():
            yield f"**{plain(block.text)}**"
        case Pairs():
            for name, text in block.rows:
                yield f"- {plain(name)}: {plain(text)}" if name else f"  - {plain(text)}"
        case Table():
            shown = [n for n, column in enumerate(block.columns) if column.title]
            titles = [plain(block.columns[n].title) for n in shown]
            align = "".join("r" if block.columns[n].right else "l" for n in shown)
            yield from markdown.table(titles, [[row[n] for n in shown] for row in block.rows], align)
        case Paste():
            yield f"{plain(block.title)}:{f' {plain(block.note)}' if block.note else ''}"
            if block.lines:
                yield ""
                yield from (f"```{block.language}", *block.lines, "```")
        case Drawing():
            yield from ("```text", *block.draw(Screen()), "```")
