"""The screen that a report is shown on, and stand-ins for characters that an encoding does not have."""

from __future__ import annotations

import os
import shutil
import sys

from memplan.core.records import NamedTuple

WIDEST = 120  # lines longer than this are hard to read, however wide the terminal is
_PIPE = 100  # columns without a terminal


class Screen(NamedTuple):
    """Where text is shown: its width in columns, whether it is a terminal, which rich renders for, and its colour."""

    width: int = _PIPE
    terminal: bool = False
    colour: bool = False


def screen() -> Screen:
    """Return standard output: its width, and whether to use colour (https://no-color.org)."""
    terminal = sys.stdout is not None and sys.stdout.isatty()  # pyright: ignore[reportUnnecessaryComparison] (if closed)
    dumb = os.environ.get("TERM") == "dumb" or (sys.platform == "win32" and "WT_SESSION" not in os.environ)
    width = shutil.get_terminal_size((_PIPE, 24)).columns
    return Screen(max(20, min(width, WIDEST)), terminal and not dumb, terminal and not dumb and not _no_colour())


def _no_colour() -> bool:
    return bool(os.environ.get("NO_COLOR"))


# Replacements of the same width for encodings without these characters.
ASCII = str.maketrans("█▓▒░µ│├┤─·×←–", "#+:.u|[]-.x<-")
