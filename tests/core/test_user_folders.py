"""Folders that the user may not read or write, as in containers, change no answer and fail no run."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import constants
from typer.main import get_command

from memplan.cli.app import app
from memplan.core import user_folders
from memplan.core.errors import FactsMissingError, MemplanError
from memplan.core.user_folders import caches, calibrations
from memplan.estimate.calibration import file_of
from memplan.models.cards import find_model

pytestmark = pytest.mark.skipif(not hasattr(os, "setresuid"), reason="needs permission bits")
COMMAND = get_command(app)
NOBODY = 65534
RUN = ("qwen2-0.5b", "--method", "lora", "--gpu", "3090")


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Run as nobody if the user is root, who may read and write everything."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Remove all permissions from `path`."""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with obeying_permissions():
            yield
    finally:
        path.chmod(mode)


@pytest.fixture
def open_path() -> Iterator[Path]:
    """Return a temporary folder that every user can access, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def home(open_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home folder with an invalid profile for RUN's card, so that reading it fails."""
    if os.getuid() == 0 and not all(folder.stat().st_mode & 0o001 for folder in Path(user_folders.__file__).parents):
        pytest.skip("the user nobody cannot read the checkout")  # as in /root; a run reads memplan's cards
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(open_path / "home"))
    (open_path / "home").mkdir()
    calibrations().mkdir(parents=True)
    file_of("rtx-3090").write_text("{}")
    return open_path / "home"


@pytest.fixture
def memplan(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*args: str) -> Ran:
        with pytest.raises(SystemExit) as left:
            COMMAND.main(list(args))
        captured = capsys.readouterr()
        return Ran(int(left.value.code or 0), captured.out, captured.err)

    run(*RUN, "--no-calibration")  # imports what a run needs while it may be read
    return run


def uncalibrated(memplan: Callable[..., Ran]) -> Ran:
    """Return what a command prints without a profile, and without the option for that in the next commands."""
    ran = memplan(*RUN, "--no-calibration")
    return ran._replace(out=ran.out.replace(" --no-calibration", ""))


@pytest.mark.parametrize("inside", ["", ".config", ".config/memplan/calibration"])
def test_a_home_of_another_user_holds_no_profiles(memplan: Callable[..., Ran], home: Path, inside: str) -> None:
    plain = uncalibrated(memplan)
    assert memplan(*RUN).code == 2  # as long as the file can be read
    with locked(home / inside):
        assert memplan(*RUN) == plain
    assert (plain.code, plain.err) == (0, "")


def test_a_home_below_a_file_holds_no_profiles(
    memplan: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "file" / "config"))
    assert memplan(*RUN) == uncalibrated(memplan)


def test_without_a_home_there_are_no_profiles(memplan: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert memplan(*RUN) == uncalibrated(memplan)


def test_a_profile_that_cannot_be_read_is_left_out_with_a_warning(memplan: Callable[..., Ran], home: Path) -> None:
    plain = uncalibrated(memplan)
    file = file_of("rtx-3090")
    with locked(file):
        ran = memplan(*RUN)
    assert (ran.code, ran.out) == (plain.code, plain.out)
    reason = f"{file} cannot be read (Permission denied)"
    assert ran.err == f"memplan: this machine's profile of rtx-3090 is ignored: {reason}\n"


@pytest.mark.parametrize("mode", [0o000, 0o200, 0o400, 0o600])
def test_a_cache_folder_that_cannot_be_used_is_replaced(
    open_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(open_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(open_path / "tmp"))
    (open_path / "tmp").mkdir()
    (open_path / "tmp").chmod(0o777)
    kept = caches()
    assert kept == open_path / "cache" / "memplan"
    if os.getuid() == 0:
        os.chown(kept, NOBODY, -1)
    kept.chmod(mode)
    with obeying_permissions():
        assert caches() == open_path / "tmp" / f"memplan-{os.getuid()}"
    kept.chmod(0o700)


def test_without_any_folder_for_a_cache_the_error_says_what_to_set(
    open_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (open_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(open_path / "file" / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(open_path / "file"))
    with pytest.raises(MemplanError) as caught:
        caches()
    assert str(caught.value) == (
        "cache: no folder can be written (Not a directory); set XDG_CACHE_HOME to a folder of your own"
    )


def test_a_hub_token_of_another_user_is_one_line(open_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token = open_path / "token"
    token.write_text("hf_x")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(token))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FactsMissingError):
        find_model("some/model", online=True)  # imports what it needs while it may be read
    with locked(token), pytest.raises(FactsMissingError) as caught:
        find_model("some/model", online=True)
    assert str(caught.value) == (
        f"model: 'some/model' could not be fetched: '{token}' cannot be used (permission denied); "
        "set HF_HOME to a folder of yours"
    )
