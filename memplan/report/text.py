"""The screen that a report is shown on, and stand-ins for characters that an encoding does not have."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from memplan.core.records import NamedTuple

WIDEST = 120  # lines longer than this are hard to read, however wide the terminal is
_PIPE = 100  # columns without a terminal


class Screen(NamedTuple):
    """Where text is shown.

    width     in columns
    terminal  whether it is a terminal, which rich renders for
    colour    whether it shows colours
    plain     whether it is read aloud, or as words alone: without bars and rules
    """

    width: int = _PIPE
    terminal: bool = False
    colour: bool = False
    plain: bool = False


def screen(plain: bool = False) -> Screen:
    """Return standard output: its width, and whether to use colour (https://no-color.org, https://force-color.org)."""
    forced = os.environ.get("FORCE_COLOR", "0") not in ("", "0")
    terminal = sys.stdout is not None and sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison] (if closed)
    dumb = os.environ.get("TERM") == "dumb" or (sys.platform == "win32" and "WT_SESSION" not in os.environ)
    drawn = (forced or (terminal and not dumb)) and not plain
    return Screen(max(20, min(_columns(), WIDEST)), drawn, drawn and not os.environ.get("NO_COLOR"), plain)


def _columns() -> int:
    """Return COLUMNS, or the terminal's columns, as `shutil.get_terminal_size` does, whose import takes long."""
    named = os.environ.get("COLUMNS", "")
    if named.isdecimal() and int(named):
        return int(named)
    with suppress(AttributeError, ValueError, OSError):  # standard output is closed, or no terminal
        return os.get_terminal_size(sys.__stdout__.fileno()).columns or _PIPE  # pyright: ignore[reportOptionalMemberAccess]
    return _PIPE


def width_of(text: str) -> int:
    """Return how many columns a text takes: letters of Chinese, Japanese and Korean take two.

    >>> width_of("qwen"), width_of("千问")
    (4, 4)
    """
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 1 + (east_asian_width(c) in "WF") for c in text)


# Replacements of the same width for encodings without these characters.
ASCII = str.maketrans("█▓▒░µ│├┤─·×←–", "#+:.u|[]-.x<-")
