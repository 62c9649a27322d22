"""Files that a user names: pipes are refused, and a file is replaced at once or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from memplan.core.files import open_file, replace_file

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")


@needs_pipes
def test_a_named_pipe_is_neither_read_nor_written(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a named pipe"):
        open_file(tmp_path / "pipe")
    with pytest.raises(OSError, match="it is a named pipe"):
        replace_file(tmp_path / "pipe", "text")


@needs_pipes
def test_a_shells_pipe_is_read_and_written() -> None:
    reading, writing = os.pipe()
    replace_file(Path(f"/dev/fd/{writing}"), "text")
    os.close(writing)
    with open_file(Path(f"/dev/fd/{reading}")) as file:
        assert file.read() == b"text"
    os.close(reading)


def test_a_file_is_replaced_with_its_permissions_through_links(tmp_path: Path) -> None:
    file, link = tmp_path / "a.txt", tmp_path / "link"
    replace_file(file, "old")
    file.chmod(0o640)
    link.symlink_to(file)
    replace_file(link, "new \ud800")
    assert (file.read_text(), link.is_symlink(), file.stat().st_mode & 0o777) == ("new \\ud800", True, 0o640)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt", "link"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")

    def fail(path: Path, text: str, *_: str) -> None:
        with path.open("w") as opened:
            opened.write(text[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(OSError, match="No space left"):
        replace_file(file, "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.txt", "old")]
