"""Blocks as text: rich renders for a terminal; a pipe, a file or a terminal without colours gets plain lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from operator import itemgetter
from textwrap import wrap
from typing import Any

from memplan.core.errors import printable
from memplan.report.blocks import (
    GAP,
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
    fit,
    spaced,
)
from memplan.report.text import Screen


def display(blocks: Iterable[Block], to: Screen) -> str:
    """Return the blocks as text for a screen. Importing rich takes longer than any answer for a pipe may."""
    if to.terminal:
        from memplan.report.terminal import render

        return render(blocks, to)
    return "".join(f"{line}\n" for line in plain(blocks, to))


def plain(blocks: Iterable[Block], to: Screen) -> Iterator[str]:
    """Yield the lines of the blocks without styles. Patches and commands are as they were given."""
    for is_apart, block in spaced(blocks):
        if is_apart:
            yield ""
        lines = _lines(block, to)
        yield from lines if isinstance(block, Verbatim) else map(printable, lines)


def _lines(block: Block, to: Screen) -> Iterator[str]:
    match block:
        case Text(text, _, indent) | Heading(text, indent):
            yield from paragraph(text, to.width, indent)
        case Pairs(rows):
            yield from _facts([("", *row) for row in rows], to.width)
        case Facts(title, rows, _):
            yield from (title,) if title else ()
            yield from _facts(rows, to.width)
        case Notes(texts, title):
            yield from (title,) if title else ()
            for text in texts:
                yield from paragraph(f"- {text}", to.width)
        case Table(columns):
            yield from table(columns, block.cells(), to.width)
        case Paste(title, lines, note):
            yield from paragraph(f"  {title}", to.width)
            for text in (*lines, *([f"({note})"] if note else [])):
                yield from paragraph(f"    {text}", to.width, "      ")
        case Verbatim(lines):
            yield from lines
        case Drawing(draw):
            yield from ("".join(text for text, _ in line).rstrip() for line in draw(to))
        case Fold():
            raise AssertionError("unfolded by `spaced`")


def paragraph(text: str, width: int, indent: str = "  ") -> list[str]:
    """Wrap `text`, indenting all lines but the first."""
    return wrap(text, width, subsequent_indent=indent, break_on_hyphens=False)


def _facts(rows: Sequence[Sequence[str]], width: int) -> Iterator[str]:
    """Yield rows of texts; all columns but the first wrap."""
    n = max(map(len, rows), default=0)
    columns: list[Column[Any]] = [Column("", itemgetter(i), wraps=i > 0) for i in range(n)]
    return table(columns, Table(columns, rows).cells(), width)


def table(columns: Sequence[Column[Any]], cells: Sequence[Sequence[Styled]], width: int) -> Iterator[str]:
    """Yield the lines of a table."""
    widths = fit(columns, cells, width)
    titles = [(column.title, "") for column in columns]
    for row in (*([titles] if any(column.title for column in columns) else []), *cells):
        wrapped = (_wrapped(row[i][0], most) for i, most in widths.items())
        for line in zip_longest(*wrapped, fillvalue=""):
            aligned = (
                text.rjust(most) if columns[i].right else text.ljust(most)
                for text, (i, most) in zip(line, widths.items(), strict=True)
            )
            yield (" " * GAP).join(aligned).rstrip()


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_on_hyphens=False) if len(text) > width else [text]
