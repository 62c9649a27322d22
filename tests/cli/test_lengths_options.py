"""`--lengths` and `--batching` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.main import get_command

from memplan.cli.app import app

RUN = ("smollm2-135m", "--method", "lora", "--gpu", "t4", "--seq-len", "512")


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        get_command(app).main([*RUN, *words])
    out = capsys.readouterr()
    return int(left.value.code or 0), out.out, out.err


def test_the_answer_is_for_the_longest_and_says_how_soon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("100\n200\n300\n", "utf-8")
    code, out, err = printed(capsys, "--lengths", str(path))
    assert (code, err) == (0, "")
    assert "1 x 300 tokens" in out
    assert "Typical" in out
    assert f"memplan max smollm2-135m --method lora --seq-len 512 --lengths {path} --gpu t4" in out.replace("\n", " ")


def test_json_has_the_lengths_next_to_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "--lengths", "p50=100,p99=400", "--json")
    data = json.loads(out)
    assert (code, data["lengths"]["longest"], data["run"]["batch"]["sequence"]) == (0, 400, 400)


@pytest.mark.parametrize("format", ["table", "html", "markdown"])
def test_every_card_has_its_typical_batch(format: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = printed(capsys, "--gpu", "3090", "--lengths", "p50=100,p99=400", "--format", format)
    assert out.count("Typical") == 2


def test_a_runs_own_file_has_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: smollm2-135m\nbatch: {sequence: 512, lengths: 'p50=100,max=300', batching: grouped}\n", "utf-8"
    )
    with pytest.raises(SystemExit):
        get_command(app).main([str(path), "--gpu", "t4", "--json"])
    data = json.loads(capsys.readouterr().out)
    assert (data["lengths"]["batching"], data["run"]["batch"]["sequence"]) == ("grouped", 300)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("group_by_length: true", "grouped by length"),
        ("sample_packing: true", "packed into full rows"),
        ("pad_to_sequence_len: true", "padded to the maximum"),
        ("group_by_length: false", "random batches"),
    ],
)
def test_a_runs_file_says_how_it_batches(
    key: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "axolotl.yml"
    keys = ("base_model: HuggingFaceTB/SmolLM2-135M", "sequence_len: 512", "micro_batch_size: 1", "adapter: lora")
    path.write_text("\n".join((*keys, "lora_target_linear: true", key, "")), "utf-8")
    with pytest.raises(SystemExit):
        get_command(app).main([str(path), "--gpu", "t4", "--lengths", "p50=100,p99=400"])
    assert said in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--batching", "random"), "batch.batching (--batching): only applies with batch.lengths"),
        (("--lengths", "max", "--batching", "sorted"), "batching"),
        (("--lengths", "no-such-file"), "cannot be read"),
    ],
)
def test_bad_input_is_one_line(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, *words)
    assert (code, out) == (2, "")
    assert said in err
