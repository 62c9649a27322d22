"""A line on standard error while a command takes longer than half a second: what it is doing, and for how long."""

from __future__ import annotations

import sys
from collections.abc import Callable

from memplan.core.doing import now
from memplan.core.errors import printable

_PATIENCE = 0.5  # seconds without a line, and between its changes


def shown_while(work: Callable[[], int]) -> int:
    """Run `work`. On a terminal, a line on standard error says what it does once it takes long, and goes at its end."""
    if sys.stderr is None or not sys.stderr.isatty():  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        return work()
    import os
    from threading import Event, Thread
    from time import monotonic

    done = Event()
    start, least = monotonic(), now()[1]

    def show() -> None:
        while not done.wait(_PATIENCE):
            text, count = now()
            of = f", {count - least:,} runs" if count - least > 1 else ""
            line = printable(f"memplan: {text or 'estimating'}{of}, {monotonic() - start:.0f} s")
            os.write(2, f"\r{line[:_WIDTH]:{_WIDTH}}".encode("ascii", "replace"))

    thread = Thread(target=show, daemon=True)
    thread.start()
    try:
        return work()
    finally:
        done.set()
        thread.join()
        if monotonic() - start > _PATIENCE:
            os.write(2, f"\r{'':{_WIDTH}}\r".encode())


_WIDTH = 79
