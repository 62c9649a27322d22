"""How a command ends: its exit code, its output, and one line for errors that the user can fix."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar

from memplan.core.errors import InternalError, MemplanError, printable

TYPED: ContextVar[tuple[str, ...]] = ContextVar("TYPED", default=())  # the words of the command line
_OF_THE_FILE = ("--output", "--date")  # options that decide nothing in a report


def command_line() -> str:
    """Return the command as it was typed, without the options that say where and when it is written."""
    import shlex

    words: list[str] = []
    rest = iter(TYPED.get())
    for word in rest:
        if word in _OF_THE_FILE:
            next(rest, None)
        elif word.partition("=")[0] not in _OF_THE_FILE:
            words.append(word)
    return shlex.join(("memplan", *words))


def fail(line: str, code: int) -> int:
    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        with suppress(OSError):
            sys.stderr.write(f"memplan: {printable(line)}\n")
    return code


def warn(line: str) -> None:
    fail(line, 0)


def unwritten(error: OSError) -> str:
    """Return a line that says why standard output cannot be written, and keep the flush at exit from failing again."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return f"standard output cannot be written ({error.strerror or error})"


def run_and_report(work: Callable[[], int], given: Iterable[str] = ()) -> int:
    """Run `work` and return its exit code; errors become one line on standard error and their own code."""
    try:
        return work()
    except MemplanError as error:
        from memplan.spec.failures import line_of

        return fail(line_of(error, given), error.exit_code)
    except RecursionError:
        return fail("spec: nested too deeply to be a run or a model", 2)
    except OSError as error:
        return fail(f"{error.strerror or error}: {str(error.filename or '')[:200]!r}", 2)
    except Exception as error:
        return fail(_unexpected(error), 2)


def _unexpected(error: Exception) -> str:
    """Return a line about an unexpected error, or raise it if MEMPLAN_TRACEBACK is set."""
    from traceback import extract_tb

    if os.environ.get("MEMPLAN_TRACEBACK"):
        raise error
    frame = extract_tb(error.__traceback__)[-1]
    message = f"{type(error).__name__} {printable(str(error), 80)}"
    return str(InternalError(f"{message} in {frame.filename.rpartition('memplan/')[2]}:{frame.lineno} ({frame.name})"))


def show(text: str, format: str = "table", output: str | None = None) -> None:
    """Write to a file or standard output, which may be closed. A broken pipe is ignored."""
    if output is not None:
        from pathlib import Path

        from memplan.core.files import replace_file

        try:
            replace_file(Path(output), text)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or error
            raise MemplanError(f"output: {output!r:.200} cannot be written ({reason})", "output") from None
        return
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        return
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = _in_ascii(text, format)
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError as error:
        unwritten(error)
    except OSError as error:
        raise MemplanError(unwritten(error)) from None


def _in_ascii(text: str, format: str) -> str:
    """Return the text for an encoding that does not have all of its characters."""
    if format in ("html", "svg"):
        return text.encode("ascii", "xmlcharrefreplace").decode()
    if format == "json":
        import json

        return "".join(c if c.isascii() else json.dumps(c)[1:-1] for c in text)
    from memplan.report.text import ASCII

    return text.translate(ASCII).encode("ascii", "replace").decode()
