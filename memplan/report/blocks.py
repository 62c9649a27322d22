"""The blocks of a report, as data: a terminal, a pipe and a markdown page render the same blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from memplan.core.records import NamedTuple
from memplan.report.text import Screen

GAP = 2  # columns between the columns of a table
_MIN_WIDTH = 8  # narrowest column that wrapping leaves
_MIN_READABLE = 32  # narrower optional columns are dropped instead of wrapped

T = TypeVar("T")
Styled: TypeAlias = tuple[str, str]  # a text and its style, in rich's words: "bold red"


class Text(NamedTuple):
    """A paragraph; in a pipe all lines but the first are indented."""

    text: str
    style: str = ""
    indent: str = "  "


class Heading(NamedTuple):
    text: str
    indent: str = "  "


class Pairs(NamedTuple):
    """Indented pairs of a name and a text. An empty name continues the one above."""

    rows: Sequence[tuple[str, str]]


class Facts(NamedTuple):
    """A name and one or two texts per row. An empty title is left out; a page also shows the columns' `heads`."""

    title: str
    rows: Sequence[Sequence[str]]
    heads: Sequence[str] = ("",)


class Notes(NamedTuple):
    """A list of sentences. An empty title is left out."""

    texts: Sequence[str]
    title: str = "Notes"


class Column(Generic[T]):
    """A column of a table.

    If a table is too wide, `optional` columns are dropped from the right, then others wrap. An optional column that
    wraps stays as long as it is readable.

    cell    the text of a row
    right   whether it is aligned to the right
    style   the style of a row's cell, or of all cells
    """

    def __init__(
        self,
        title: str,
        cell: Callable[[T], str],
        right: bool = False,
        wraps: bool = False,
        optional: bool = False,
        style: Callable[[T], str] | str = "",
    ) -> None:
        self.title, self.cell, self.style = title, cell, style
        self.right, self.wraps, self.optional = right, wraps, optional


class Table(NamedTuple, Generic[T]):
    columns: Sequence[Column[T]]
    rows: Sequence[T]

    def cells(self) -> list[list[Styled]]:
        """Return each row's texts and styles."""
        return [
            [(c.cell(row), c.style if isinstance(c.style, str) else c.style(row)) for c in self.columns]
            for row in self.rows
        ]


def styled(i: int, title: str = "", *, right: bool = False, wraps: bool = False) -> Column[Sequence[Styled]]:
    """Return column `i` of rows that are made of styled texts."""
    return Column(title, lambda row: row[i][0], right, wraps, style=lambda row: row[i][1])


class Paste(NamedTuple):
    """Lines to paste into a file, and a note on them."""

    title: str
    lines: Sequence[str]
    note: str = ""
    language: str = "yaml"


class Verbatim(NamedTuple):
    """Lines that are neither wrapped nor indented, as a patch."""

    lines: Sequence[str]
    language: str


class Drawing(NamedTuple):
    """A drawing made of text; `draw` returns its lines for a screen. An HTML page has a table and a caption instead."""

    draw: Callable[[Screen], Iterable[Sequence[Styled]]]
    as_table: Callable[[], Table[Any]] | None = None
    caption: str = ""


class Fold(NamedTuple):
    """Blocks that a page folds under a title, unless it `is_open`. Without pages the title is a heading."""

    title: str
    blocks: Sequence[Block]
    is_open: bool = False


Block: TypeAlias = Text | Heading | Pairs | Facts | Notes | Table[Any] | Paste | Verbatim | Drawing | Fold


def _unfolded(blocks: Iterable[Block]) -> Iterator[Block]:
    for block in blocks:
        yield from (Heading(block.title), *_unfolded(block.blocks)) if isinstance(block, Fold) else (block,)


def spaced(blocks: Iterable[Block]) -> Iterator[tuple[bool, Block]]:
    """Yield each block and whether a blank line precedes it: not below headings, nor between texts."""
    before: Block | None = None
    for block in _unfolded(blocks):
        continues = type(before) is type(block) and isinstance(block, (Text, Paste))
        yield before is not None and not isinstance(before, Heading) and not continues, block
        before = block


def fit(columns: Sequence[Column[Any]], cells: Sequence[Sequence[Styled]], width: int) -> dict[int, int]:
    """Return the width of each column that is shown, by its number."""
    widths = {i: max([len(c.title), *(len(row[i][0]) for row in cells)]) for i, c in enumerate(columns)}

    def excess() -> int:
        return sum(widths.values()) + GAP * (len(widths) - 1) - width

    def spare() -> int:
        return sum(max(0, widths[i] - _MIN_READABLE) for i in widths if columns[i].optional and columns[i].wraps)

    while excess() > spare() and (optional := [i for i in widths if columns[i].optional]):
        del widths[optional[-1]]
    wrapping = [i for i in widths if columns[i].wraps]
    while excess() > 0 and any(widths[i] > _MIN_WIDTH for i in wrapping):
        widths[max(wrapping, key=lambda i: widths[i])] -= 1
    return widths
