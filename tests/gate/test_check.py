"""Runs against their budgets: what fits, what does not, what cannot be said, and what is wrong."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.cli.check import Progress
from memplan.cli.plain import run_plain
from memplan.gate.budget import files_of, limit_of
from memplan.gate.rows import Check, CheckedRun
from tests.gate.team import AXOLOTL, BUDGET, LLAMAFACTORY, OWN, TRL, Ran, edited, write

LARGE = edited(AXOLOTL, micro_batch_size=64)
UNKNOWN = edited(AXOLOTL, base_model="nobody/nothing")
USABLE = memplan.find_gpu("3090").usable


def by_run(check: Check) -> dict[tuple[str, str], CheckedRun]:
    return {(row.run, row.gpu): row for row in check.rows}


def test_every_run_is_checked_on_every_gpu_the_worst_first(team: Path) -> None:
    write(team, {"configs/large.yaml": LARGE, "configs/b.yaml": LLAMAFACTORY})
    check = memplan.check()
    found = [(row.run, row.gpu, row.status) for row in check.rows]
    assert len(found) == 6
    assert found[:2] == [("configs/large.yaml", "rtx-3090", "over"), ("configs/large.yaml", "a100-sxm-40gb", "over")]
    assert {status for _, _, status in found[2:]} == {"fits"}
    assert check.exit_code() == 1
    shares = [row.peak / row.limit for row in check.rows]
    assert shares == sorted(shares, reverse=True)


def test_a_rows_figures_are_those_of_the_estimate_of_its_file(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = by_run(memplan.check())["configs/a.yaml", "rtx-3090"]
    answer = json.loads(Ran(capsys, "configs/a.yaml", "--gpu", "3090", "--json").out)
    assert (row.peak, row.low, row.high) == (answer["bytes"]["used"], answer["band"]["low"], answer["band"]["high"])
    assert (row.usable, row.verdict) == (answer["gpu"]["usable"], answer["verdict"]["answer"])
    assert row.limit == USABLE


@pytest.mark.parametrize("gpus", [2, 4])
@pytest.mark.parametrize("text", [AXOLOTL, OWN, TRL])
def test_budgets_of_several_gpus_answer_as_the_command_does(
    gpus: int, text: str, team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "train.sh" if text is TRL else "run.yaml"
    write(team, {name: text})
    [row] = memplan.check([name], gpu="3090", gpus=gpus).rows
    answer = json.loads(Ran(capsys, name, "--gpu", "3090", "--gpus", str(gpus), "--json").out)
    assert (row.peak, row.gpus) == (answer["bytes"]["used"], gpus)


def test_a_limit_is_a_share_of_the_usable_bytes_or_bytes() -> None:
    assert limit_of("90%", "fail").of(1000) == 900
    assert limit_of("12.5 %", "fail").of(1000) == 125
    assert limit_of("22 GiB", "fail").of(1000) == 22 * 2**30


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ('fail = "1 GiB"', "over"),
        ('fail = "10%"', "over"),
        ('fail = "100%"\nwarn = "1 GiB"', "near"),
        ('warn = "99%"\nband = "high"', "fits"),
        ("", "fits"),
    ],
)
def test_a_status_follows_the_limits(lines: str, status: str, team: Path) -> None:
    write(team, {"memplan.toml": f"{BUDGET}{lines}\n"})
    assert memplan.check().rows[0].status == status


def test_the_high_end_of_the_range_is_compared_if_asked(team: Path) -> None:
    usual = by_run(memplan.check())["configs/a.yaml", "rtx-3090"]
    write(team, {"memplan.toml": f'{BUDGET}band = "high"\nfail = "{usual.peak}"\n'})
    high = by_run(memplan.check())["configs/a.yaml", "rtx-3090"]
    assert (high.peak, high.status) == (usual.high, "over")


def test_one_gpu_of_any_is_enough(team: Path) -> None:
    write(team, {"configs/a.yaml": edited(AXOLOTL, micro_batch_size=8)})
    for gpus, status, gpu in ((["rtx-4060", "h100"], "fits", "h100-sxm"), (["rtx-4060"], "over", "rtx-4060")):
        write(team, {"memplan.toml": f'[[budget]]\nruns = "configs/*.yaml"\nany = {json.dumps(gpus)}\n'})
        [row] = memplan.check().rows
        assert (row.status, row.gpu) == (status, gpu)
        assert row.any_of[0] == "rtx-4060"
        assert (row.deciding is not None) == (status == "over")


def test_the_value_that_takes_most_is_named_with_its_line(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(team, {"configs/a.yaml": edited(AXOLOTL, micro_batch_size=64, gradient_accumulation_steps=2)})
    row = by_run(memplan.check())["configs/a.yaml", "rtx-3090"]
    assert row.deciding is not None
    assert (row.deciding.place.key, row.deciding.place.line) == ("micro_batch_size", 8)
    assert row.deciding.value == 64
    explained = json.loads(Ran(capsys, "explain", "configs/a.yaml", "--gpu", "3090", "--json").out)
    assert row.deciding.bytes == next(each["bytes"] for each in explained if each["field"] == "batch.micro")


def test_one_run_that_cannot_be_answered_does_not_hide_the_others(team: Path) -> None:
    write(team, {"configs/b.yaml": UNKNOWN, "configs/c.yaml": "base_model: [\n", "configs/d.yaml": LARGE})
    found = {row.run: row for row in reversed(memplan.check().rows)}
    assert {name: row.status for name, row in found.items()} == {
        "configs/a.yaml": "fits",
        "configs/b.yaml": "unknown",
        "configs/c.yaml": "wrong",
        "configs/d.yaml": "over",
    }
    assert (found["configs/b.yaml"].error_code, found["configs/b.yaml"].line) == (3, 1)
    assert "ask the Hub with memplan lock --online" in found["configs/b.yaml"].error
    assert found["configs/c.yaml"].line == 2


@pytest.mark.parametrize(
    ("files", "words", "code"),
    [
        ({}, (), 0),
        ({"configs/b.yaml": LARGE}, (), 1),
        ({"configs/b.yaml": "base_model: ["}, (), 2),
        ({"configs/b.yaml": LARGE, "configs/c.yaml": "base_model: ["}, (), 2),
        ({"configs/b.yaml": UNKNOWN}, (), 0),
        ({"configs/b.yaml": UNKNOWN}, ("--unknown", "ignore"), 0),
        ({"configs/b.yaml": UNKNOWN}, ("--unknown", "fail"), 3),
        ({"configs/b.yaml": UNKNOWN, "configs/c.yaml": LARGE}, ("--unknown", "fail"), 1),
        ({"configs/b.yaml": edited(AXOLOTL, unheard_of="1")}, (), 0),
        ({"configs/b.yaml": edited(AXOLOTL, unheard_of="1")}, ("--strict",), 4),
        ({"configs/b.yaml": edited(AXOLOTL, plugins="[axolotl.integrations.x]", rl="ipo")}, (), 0),
        ({"configs/accelerate.yaml": "compute_environment: LOCAL_MACHINE\ndistributed_type: NO\n"}, (), 0),
    ],
)
def test_exit_codes(
    files: dict[str, str], words: tuple[str, ...], code: int, team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(team, files)
    ran = Ran(capsys, "check", *words)
    assert ran.code == code, ran.out
    assert run_plain(["check", *words]) == code
    assert ran.err == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[[budget]]\nruns = ["no/*.yaml"]\ngpu = "3090"\n', "memplan.toml:2: runs: there is no file no/*.yaml"),
        ('[[budget]]\ngpu = "3090"\n', "memplan.toml:1: runs: must be a list of names, which is not empty"),
        ('[[budget]]\nruns = ["../x.yaml"]\ngpu = "3090"\n', "memplan.toml:2: runs: ../x.yaml is outside"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = ["rtx 309"]\n', "memplan.toml:3: gpu: unknown name 'rtx 309'"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\n', "memplan.toml:1: gpu: name the GPUs"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nany = ["3090"]\n', "memplan.toml:3: gpu: name the GPUs"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nfail = "much"\n', "memplan.toml:4: fail: 'much' is no "),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nfail = 90\n', "memplan.toml:4: fail: must be text"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\ngpus = 0\n', "memplan.toml:4: gpus: must be a number"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nwarn = "110%"\n', "memplan.toml:4: warn: 110% is above"),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nband = "low"\n', "memplan.toml:4: band: 'low' is "),
        ('[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nlimt = "9"\n', "memplan.toml:4: limt: unknown key"),
        (
            '[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nframework = "axolotel"\n',
            "memplan.toml:4: framework: unknown name 'axolotel'; did you mean axolotl",
        ),
        ("budgets = 1\n", "memplan.toml: budgets is not a key of it; write a [[budget]] with runs and gpu"),
        (
            f'{BUDGET}\n[[budget]]\nruns = ["configs/a.yaml"]\ngpu = "3090"\nfail = "50%"\n',
            "memplan.toml:5: runs: configs/a.yaml on rtx-3090 has other limits than in memplan.toml:1",
        ),
    ],
)
def test_a_mistake_in_a_budget_is_one_line_with_its_place(
    text: str, line: str, team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(team, {"memplan.toml": f'{text}\n[[budget]]\nruns = ["b.yaml"]\ngpu = "h100"\n', "b.yaml": LLAMAFACTORY})
    if "[[budget]]" not in text:
        write(team, {"memplan.toml": text})
    check = memplan.check()
    assert [problem.text for problem in check.problems] != []
    assert check.problems[0].text.startswith(line)
    assert check.exit_code() == 2
    assert ("b.yaml" in {row.run for row in check.rows}) == ("[[budget]]" in text)
    assert "\n" not in check.problems[0].text
    assert Ran(capsys, "check").code == 2


def test_a_file_that_is_no_toml_is_one_line(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(team, {"memplan.toml": "runs = ["})
    ran = Ran(capsys, "check")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("memplan: memplan.toml: is not TOML")
    (team / "memplan.toml").unlink()
    ran = Ran(capsys, "check")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "memplan init writes it" in ran.err


def test_budgets_stand_in_pyproject_too(team: Path) -> None:
    (team / "memplan.toml").unlink()
    budget = BUDGET.replace("[[budget]]", "[[tool.memplan.budget]]")
    write(team, {"pyproject.toml": f'[project]\nname = "x"\n\n{budget}'})
    assert [row.status for row in memplan.check().rows] == ["fits", "fits"]
    write(team, {"pyproject.toml": '[[tool.memplan.budget]]\nruns = ["configs/*.yaml"]\ngpu = ["rtx 309"]\n'})
    assert memplan.check().problems[0].text.startswith("pyproject.toml:3: gpu: unknown name")


def test_budgets_are_found_from_a_folder_below(
    team: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(team / "configs")
    ran = Ran(capsys, "check", "a.yaml", "--json", "--output", "out.json")
    assert ran.code == 0
    found: Any = json.loads((team / "configs/out.json").read_text())
    assert {row["run"] for row in found["runs"]} == {"configs/a.yaml"}


def test_named_files_are_checked_alone(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(team, {"configs/b.yaml": LARGE, "other.yaml": AXOLOTL})
    check = memplan.check(["configs/a.yaml", "other.yaml"])
    assert {row.run for row in check.rows} == {"configs/a.yaml"}
    assert check.notes == ("other.yaml: in no budget of memplan.toml",)
    assert Ran(capsys, "check", "configs/a.yaml", "other.yaml").code == 0
    assert Ran(capsys, "check", "memplan.toml").code == 1  # all of its runs
    for words, text in ((["gone.yaml"], "there is no file: gone.yaml"), (["--", "trl", "sft"], "name its GPU")):
        ran = Ran(capsys, "check", *words)
        assert ran.code == 2
        assert text in ran.out


def test_a_typed_budget_replaces_those_of_the_file(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "check", "configs/a.yaml", "--gpu", "3090", "--fail-above", "10%").code == 1
    assert Ran(capsys, "check", "configs/a.yaml", "--gpu", "3090", "--warn-above", "1GiB").code == 0
    ran = Ran(capsys, "check", "--fail-above", "10%")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "fail-above: only applies with --gpu" in ran.err
    for words in (["--gpu", "2x3090,2x4090"], ["--gpu", "3090,4090", "--gpus", "2"]):
        rows = json.loads(Ran(capsys, "check", "configs/a.yaml", *words, "--json").out)["runs"]
        assert {(row["gpu"], row["gpus"]) for row in rows} == {("rtx-3090", 2), ("rtx-4090", 2)}
    for words, numbers in ((["--gpu", "2x3090,4090"], "1 and 2"), (["--gpu", "2x3090", "--gpus", "4"], "2 and 4")):
        ran = Ran(capsys, "check", "configs/a.yaml", *words)
        assert (ran.code, ran.err.count("\n")) == (2, 1)
        assert f"a run is on one number of cards, not on {numbers}" in ran.err
    assert "gpus: must be at least 1" in Ran(capsys, "check", "configs/a.yaml", "--gpu", "3090", "--gpus", "0").err
    ran = Ran(capsys, "check", "missing.yaml", "--gpu", "3090")
    assert ran.code == 2
    assert "there is no file missing.yaml" in ran.out


def test_a_command_is_checked(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["trl", "sft", "--model_name_or_path", "qwen2-1.5b", "--use_peft", "--max_length", "1024"]
    ran = Ran(capsys, "check", "--gpu", "3090", "--json", "--", *line)
    [row] = json.loads(ran.out)["runs"]
    assert (row["run"], row["status"]) == (f"-- {' '.join(line)}", "fits")
    write(team, {"memplan.toml": f'[[budget]]\nruns = ["-- {" ".join(line)}"]\ngpu = "3090"\n'})
    assert memplan.check().rows[0].peak == row["peak"]


def test_patterns_find_files_below_the_folder_only(team: Path) -> None:
    write(team, {"configs/deep/b.yml": OWN})
    assert files_of("configs/**/*.y*ml", team) == ["configs/a.yaml", "configs/deep/b.yml"]
    assert files_of("configs", team) == ["configs"]
    assert files_of("nothing/*", team) == files_of("x" * 5000, team) == files_of("a\x00*", team) == []


def test_files_of_a_typed_budget_may_be_anywhere(
    team: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(team / "configs")
    for name in (str(team / "configs/a.yaml"), "../configs/*.yaml"):
        [row] = memplan.check([name], gpu="3090").rows
        assert row.status == "fits"
    ran = Ran(capsys, "diff", str(team), str(team), "--gpu", "3090", "--runs", str(team / "configs/a.yaml"))
    assert "- runs: " in ran.out  # the same file in both would be no comparison
    assert ran.code == 2


def test_progress_is_said_only_on_a_terminal(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[int, int]] = []
    memplan.check(progress=lambda done, of: calls.append((done, of)))
    assert calls == [(0, 1)]
    assert Ran(capsys, "check").err == ""


def test_progress_is_said_after_a_second_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    seconds = [0.0]
    monkeypatch.setattr("memplan.cli.check.time.monotonic", lambda: seconds[0])
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Progress() as say:
        assert say is not None
        say(1, 3)
        assert sys.stderr.getvalue() == ""  # pyright: ignore[reportAttributeAccessIssue]
        seconds[0] = 1.5
        say(2, 3)
        assert "memplan: 2 of 3 runs" in sys.stderr.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert sys.stderr.getvalue().endswith("\r\033[K")  # pyright: ignore[reportAttributeAccessIssue]
