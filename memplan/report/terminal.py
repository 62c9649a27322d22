"""Blocks on a terminal, rendered by rich. Texts are never read as rich's markup, and control characters are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text as Line

from memplan.core.errors import printable
from memplan.report.blocks import (
    GAP,
    Block,
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
    fit,
    spaced,
)
from memplan.report.text import Screen

_COLOURS = {"+": "green", "-": "red", "@": "dim"}  # of a patch's lines, by their first character


def render(blocks: Iterable[Block], to: Screen) -> str:
    """Return the blocks with rules below the heads of tables, and with colours if the screen shows them."""
    out = StringIO()
    console = Console(
        file=out, width=to.width, force_terminal=True, color_system="standard" if to.colour else None, highlight=False
    )
    for is_apart, block in spaced(blocks):
        if is_apart:
            console.print()
        for part in _parts(block, to):
            console.print(part, soft_wrap=isinstance(block, Verbatim))
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _parts(block: Block, to: Screen) -> Iterator[RenderableType]:
    match block:
        case Text(text, style):
            if text:
                inner = text.lstrip()
                yield Padding(_line((inner, style)), (0, 0, 0, len(text) - len(inner)))
        case Heading(text, _):
            yield _line((text, "bold"))
        case Pairs(rows):
            yield Padding(_facts(rows), (0, 0, 0, 2))
        case Facts(title, rows, _):
            yield from (_line((title, "bold")),) if title else ()
            yield _facts(rows)
        case Notes(texts, title):
            yield from (_line((title, "bold")),) if title else ()
            yield _facts([("-", text) for text in texts], gap=1)
        case Table():
            yield _table(block, to)
        case Paste(title, lines, note):
            yield Padding(_line((title, "dim")), (0, 0, 0, 2))
            for text in (*lines, *([f"({note})"] if note else [])):
                yield Padding(_line((text, "")), (0, 0, 0, 4))
        case Verbatim(lines):
            yield from (_line((text, _COLOURS.get(text[:1], ""))) for text in lines)
        case Drawing(draw):
            yield from (_line(*line) for line in draw(to))
        case Fold():
            raise AssertionError("unfolded by `spaced`")


def _line(*parts: Styled) -> Line:
    return Line.assemble(*((printable(text), style) for text, style in parts), overflow="fold")


def _facts(rows: Sequence[Sequence[str]], gap: int = 2) -> Grid:
    grid = Grid.grid(padding=(0, gap, 0, 0))
    grid.add_column(style="dim", no_wrap=True)
    for row in rows:
        grid.add_row(*(_line((text, "")) for text in row))
    return grid


def _table(table: Table[Any], to: Screen) -> Grid:
    cells = table.cells()
    widths = fit(table.columns, cells, to.width)
    grid = Grid(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, GAP - 1, 0, 0),  # and a blank between columns
        show_header=any(column.title for column in table.columns),
    )
    for i, width in widths.items():
        column = table.columns[i]
        title = _line((column.title, "bold"))
        grid.add_column(title, width=width, justify="right" if column.right else "left", overflow="fold")
    for row in cells:
        grid.add_row(*(_line(row[i]) for i in widths))
    return grid
