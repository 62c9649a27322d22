"""Reading and replacing files that a user names."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from shutil import copymode
from typing import BinaryIO

_SHELLS = ("/dev/", "/proc/")  # where a shell's own pipes are: `<(command)` and /dev/stdin


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for a named pipe, which nobody may ever write to."""
    _refuse_pipe(path)
    return path.open("rb")


def replace_file(path: Path, text: str) -> None:
    """Write a file at once: if that fails, for example as the disk is full, an older file stays. Raises OSError."""
    _refuse_pipe(path)
    target = Path(os.path.realpath(path))
    is_new = not path.exists()
    if not is_new and (not path.is_file() or not os.access(target.parent, os.W_OK)):  # a device; a folder of others
        path.write_text(text, "utf-8", "backslashreplace")
        return
    part = target.with_name(f".memplan-{os.getpid()}.part")
    try:
        part.write_text(text, "utf-8", "backslashreplace")
        if not is_new:
            copymode(target, part)
        part.replace(target)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _refuse_pipe(path: Path) -> None:
    if path.is_fifo() and not str(path).startswith(_SHELLS):
        raise OSError(errno.EINVAL, "it is a named pipe", str(path))
