"""Reading and replacing files that a user names: those of this machine, or only those that came with a question."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from io import BytesIO
from pathlib import Path
from stat import S_IMODE
from typing import BinaryIO

_SHELLS = ("/dev/", "/proc/")  # where a shell's own pipes are: `<(command)` and /dev/stdin


# Name -> text of the files that may be read; None for those of this machine.
_GIVEN: ContextVar[Mapping[str, str] | None] = ContextVar("_GIVEN", default=None)


@contextmanager
def given_files(files: Mapping[str, str]) -> Generator[None]:
    """Read the texts in `files` by their names, and no file of this machine: a stranger may name any path."""
    token = _GIVEN.set({os.path.normpath(name): text for name, text in files.items()})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def are_given() -> bool:
    """Whether only given texts are read."""
    return _GIVEN.get() is not None


def is_file(path: Path) -> bool:
    """Whether there is a file. Raises OSError or ValueError for a path that cannot be one."""
    given = _GIVEN.get()
    return path.is_file() if given is None else os.path.normpath(path) in given


def exists(path: Path) -> bool:
    """Whether there is a file or a folder. Raises OSError or ValueError for a path that cannot be one."""
    return path.exists() if not are_given() else is_file(path)


def is_folder(path: Path) -> bool:
    """Whether there is a folder; given texts have none. Raises OSError or ValueError for a path that cannot be one."""
    return not are_given() and path.is_dir()


def expanded(name: str) -> Path:
    """Return the path of a name, with the user's home in place of `~`; as it is written if there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError, also for a named pipe, which nobody may ever write to."""
    given = _GIVEN.get()
    if given is not None:
        if not is_file(path):
            raise FileNotFoundError(errno.ENOENT, "its text was not given", str(path))
        return BytesIO(given[os.path.normpath(path)].encode("utf-8", "surrogatepass"))
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
            part.chmod(S_IMODE(target.stat().st_mode))
        part.replace(target)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def _refuse_pipe(path: Path) -> None:
    if path.is_fifo() and not str(path).startswith(_SHELLS):
        raise OSError(errno.EINVAL, "it is a named pipe", str(path))
