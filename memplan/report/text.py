"""Text that fits a screen: columns, wrapping and colour. Every character is assumed to be one column wide."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import NamedTuple

WIDEST = 120  # lines longer than this are hard to read, however wide the terminal is
_PIPE = 100  # columns without a terminal
_GAP = 2
_MIN_WIDTH = 8  # narrowest column that wrapping leaves
_MIN_READABLE = 32  # narrower optional columns are dropped instead of wrapped

STYLES = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
    "white": "37",
    "grey": "90",
}


class Screen(NamedTuple):
    """The width in columns of what text is printed on, and whether it shows colour."""

    width: int = _PIPE
    colour: bool = False

    def paint(self, text: str, style: str) -> str:
        """Return `text` in the given `STYLES`, if the screen shows colour."""
        if not self.colour or not style or not text.strip():
            return text
        return f"\x1b[{';'.join(STYLES[word] for word in style.split())}m{text}\x1b[0m"


def screen() -> Screen:
    """Return standard output's width, and whether to use colour (https://no-color.org)."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison] (if closed)
    dumb = os.environ.get("TERM") == "dumb" or (sys.platform == "win32" and "WT_SESSION" not in os.environ)
    width = shutil.get_terminal_size((_PIPE, 24)).columns
    return Screen(max(20, min(width, WIDEST)), terminal and not dumb and not os.environ.get("NO_COLOR"))


class Column(NamedTuple):
    """A column of a table.

    If a table is too wide, `optional` columns are dropped from the right, then others wrap. An optional column that
    wraps stays as long as it is readable.
    """

    title: str
    right: bool = False
    wraps: bool = False
    optional: bool = False


def table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], to: Screen, styles: Sequence[str] = ()
) -> Iterator[str]:
    """Yield the lines of a table. `styles` has one style per row, or one per column separated by `|`."""
    shown = list(range(len(columns)))
    widths = [max([len(c.title), *(len(row[i]) for row in rows)]) for i, c in enumerate(columns)]

    def excess() -> int:
        return sum(widths[i] + _GAP for i in shown) - _GAP - to.width

    def spare() -> int:
        return sum(max(0, widths[i] - _MIN_READABLE) for i in shown if columns[i].optional and columns[i].wraps)

    while excess() > spare() and any(columns[i].optional for i in shown):
        shown.remove(max(i for i in shown if columns[i].optional))
    wrapping = [i for i in shown if columns[i].wraps]
    while excess() > 0 and any(widths[i] > _MIN_WIDTH for i in wrapping):
        widest = max(wrapping, key=lambda i: widths[i])
        widths[widest] -= 1

    def line(cells: Sequence[str], style: str, as_title: bool) -> Iterator[str]:
        by_column = style.split("|") if "|" in style else [style] * len(columns)
        parts = {i: _wrapped(cells[i], widths[i]) for i in shown}
        for n in range(max(map(len, parts.values()))):
            out: list[str] = []
            for i in shown:
                text = parts[i][n] if n < len(parts[i]) else ""
                if columns[i].right:
                    text = text.rjust(widths[i])
                elif i != shown[-1]:
                    text = text.ljust(widths[i])
                out.append(to.paint(text, "bold" if as_title else by_column[i]))
            yield (" " * _GAP).join(out).rstrip()

    if any(c.title for c in columns):
        yield from line([c.title for c in columns], "", True)
    for n, row in enumerate(rows):
        yield from line(row, styles[n] if n < len(styles) else "", False)


def _wrapped(text: str, width: int) -> list[str]:
    return wrap(text, width, break_on_hyphens=False) if len(text) > width else [text]


def paragraph(text: str, to: Screen, indent: str = "") -> list[str]:
    """Wrap `text`, indenting all lines but the first."""
    return wrap(text, to.width, subsequent_indent=indent, break_on_hyphens=False)


def hanging(label: str, words: Iterable[str], to: Screen, width: int) -> list[str]:
    """Return `label` followed by `words`, separated by two spaces and wrapped to the right of the label."""
    lines = [label.ljust(width)]
    for word in words:
        if len(lines[-1]) + 2 + len(word) > to.width and lines[-1].strip():
            lines.append(" " * width)
        lines[-1] += f"  {word}"
    return lines


# Replacements of the same width for encodings without these characters.
ASCII = str.maketrans(
    {
        "█": "#",
        "▓": "+",
        "▒": ":",
        "░": ".",
        "µ": "u",
        "│": "|",
        "├": "[",
        "┤": "]",
        "─": "-",
        "·": ".",
        "×": "x",
        "←": "<",
        "–": "-",
    }
)
