"""`memplan explain LOG [RUN]`: a log is told apart from a run's file, and bad input gets one line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from typer.main import get_command

from benchmarks import messages
from memplan.cli.app import app

LOG = messages.TRACEBACK + messages.TORCH + "\n"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "job.log"
    path.write_text(LOG, "utf-8")
    return path


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        get_command(app).main(["explain", *map(str, words)])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_a_log_alone_is_explained(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, log)
    assert (code, err) == (0, "")
    assert "name the model to factorise it" in out


def test_a_log_with_a_runs_file_ends_with_its_patch(
    log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run.yaml"
    fields = ("model: llama-3.1-8b", "method: {kind: qlora}", "batch: {micro: 2, sequence: 18000}", "gpu: t4")
    run.write_text("\n".join((*fields, "profile: unsloth-2025", "")), "utf-8")
    code, out, _ = printed(capsys, log, run)
    assert code == 0
    assert "128,256 x 4: logits" in out
    assert "-batch: {micro: 2, sequence: 18000}" in out


def test_a_runs_file_alone_has_its_values_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    run.write_text("model: smollm2-135m\nmethod: lora\n", "utf-8")
    code, out, _ = printed(capsys, run)
    assert code == 0
    assert out.startswith("field")


def test_a_message_is_read_from_standard_input_and_from_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(LOG))
    for words in (("-",), (messages.TORCH,)):
        code, out, _ = printed(capsys, *words, "--json")
        assert code == 0
        assert json.loads(out)["message"]["values"]["total"]["text"] == "14.75 GiB"


def test_a_log_of_windows_in_utf_16_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "job.txt"
    path.write_bytes(LOG.replace("\n", "\r\n").encode("utf-16"))
    code, out, _ = printed(capsys, path)
    assert code == 0
    assert "9.47 GiB" in out


def test_an_unknown_model_is_said_and_the_message_explained(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, log, "no-such-model")
    assert code == 0
    assert "unknown name 'no-such-model'" in out
    assert "the head and the loss" in out


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("loss 0.1\n", (), "there is no out-of-memory message in it"),
        ("java.lang.OutOfMemoryError: heap\n", (), "Java's own out-of-memory message"),
        (LOG, ("--format", "csv"), "an explained log cannot be csv"),
        (LOG, ("smollm2-135m", "--gpu", "t4", "--gpu", "3090"), "explain is for one card"),
    ],
)
def test_bad_input_is_one_line(
    text: str, words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "job.log"
    path.write_text(text, "utf-8")
    code, out, err = printed(capsys, path, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
