"""The lock: an answer needs no network, and what moved is told by name; and the budgets that init writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.gate.lock import Lock, lock_of, read_lock
from memplan.models.cards import facts_of
from tests.gate.team import AXOLOTL, BUDGET, LLAMAFACTORY, OWN, TRL, Ran, edited, write

FETCHED = edited(AXOLOTL, base_model="a-team/a-model")


def changed(team: Path, change: Callable[[Any], object]) -> None:
    """Change the lock of a team."""
    values = json.loads((team / "memplan.lock").read_text())
    change(values)
    (team / "memplan.lock").write_text(json.dumps(values))


def test_a_lock_holds_the_facts_of_each_run(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "lock").code == 0
    lock = read_lock()
    assert lock is not None
    rows = memplan.check().rows
    assert {key: run.peak for key, run in lock.runs.items()} == {(row.run, row.gpu, row.gpus): row.peak for row in rows}
    assert lock.models["qwen2-1.5b"].config is None  # the card is memplan's own
    assert lock.text() == lock_of(memplan.check()).text()
    assert Ran(capsys, "check", "--locked").code == 0


def test_a_locked_config_needs_no_cache_and_no_network(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(team, {"configs/a.yaml": FETCHED})
    assert {row.status for row in memplan.check().rows} == {"unknown"}
    config = dict(facts_of("qwen2.5-0.5b").config)
    write(team, {"configs/a.yaml": edited(AXOLOTL, base_model="qwen2.5-0.5b")})
    expected = [row.peak for row in memplan.check().rows]
    assert Ran(capsys, "lock").code == 0

    def with_config(values: Any) -> None:
        locked = values["models"].pop("qwen2.5-0.5b")
        values["models"]["a-team/a-model"] = {**locked, "config": config}
        for run in values["runs"]:
            run["model"] = "a-team/a-model"

    changed(team, with_config)
    write(team, {"configs/a.yaml": FETCHED})
    assert [row.peak for row in memplan.check().rows] == expected
    ran = Ran(capsys, "check", "--locked", "--json")
    assert json.loads(ran.out)["moved"] == []
    assert Ran(capsys, "check", "--locked").code == 0


def test_a_fact_that_moved_fails_with_its_name(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, text in (
        (lambda values: values["models"]["qwen2-1.5b"].update(sha256="0"), "qwen2-1.5b: another config.json"),
        (lambda values: values["runs"][0].update(profile="axolotl-0.12"), "profile axolotl-0.12 is now axolotl-0.21"),
        (lambda values: values["models"].clear(), "qwen2-1.5b is not in memplan.lock"),
        (lambda values: values["runs"].clear(), "configs/a.yaml on rtx-3090 is not in memplan.lock"),
    ):
        assert Ran(capsys, "lock").code == 0
        changed(team, change)
        ran = Ran(capsys, "check", "--locked")
        assert ran.code == 3
        assert text in " ".join(ran.out.split())
        assert Ran(capsys, "check").code == 0  # a note


def test_another_memplans_bytes_are_a_warning_with_both(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "lock").code == 0

    def older(values: Any) -> None:
        values["memplan"] = "0.0.1"
        values["runs"][0]["peak"] = 5 * 2**30

    changed(team, older)
    ran = Ran(capsys, "check", "--locked")
    assert ran.code == 0
    assert "5.00 GiB by memplan 0.0.1" in " ".join(ran.out.split())
    assert "::warning title=memplan%3A note::" in Ran(capsys, "check", "--format", "github").out


def test_a_changed_run_is_no_moved_fact(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Ran(capsys, "lock").code == 0
    write(team, {"configs/a.yaml": edited(AXOLOTL, sequence_len=4096)})
    assert Ran(capsys, "check", "--locked").code == 0


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"schema_version": 2}', "memplan.lock: has schema 2, and this memplan reads 1: run memplan lock"),
        ("{}", "memplan.lock: is not a lock that memplan wrote; run memplan lock"),
        ("[", "memplan.lock: is not a lock that memplan wrote; run memplan lock"),
        (None, "locked: there is no memplan.lock; memplan lock writes it"),
    ],
)
def test_a_lock_that_cannot_be_read_is_one_line(
    text: str | None, line: str, team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (team / "memplan.lock").write_text(text)
    ran = Ran(capsys, "check", "--locked")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert line.partition(": ")[2] in ran.err


def test_a_lock_of_a_run_without_facts_is_refused(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(team, {"configs/b.yaml": edited(AXOLOTL, base_model="nobody/nothing")})
    ran = Ran(capsys, "lock")
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert not (team / "memplan.lock").exists()


def test_a_lock_reads_back_as_it_was_written() -> None:
    lock = Lock("1.0", {}, {})
    assert json.loads(lock.text()) == {"schema_version": 1, "memplan": "1.0", "models": {}, "runs": []}


def test_init_writes_a_budget_that_every_run_fits(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (team / "memplan.toml").unlink()
    files = {
        "configs/b.yaml": edited(AXOLOTL, micro_batch_size=1),
        "other/own.yaml": OWN,
        "other/values.yaml": "replicas: 3\n",
        "run.sh": TRL,
        "node_modules/x.yaml": AXOLOTL,
        "package.json": '{"name": "x"}',
        "llama.yaml": LLAMAFACTORY,
    }
    write(team, files)
    ran = Ran(capsys, "init")
    assert (ran.code, ran.err) == (0, "")
    check = memplan.check()
    assert {row.run for row in check.rows} == {
        "configs/a.yaml",
        "configs/b.yaml",
        "other/own.yaml",
        "run.sh",
        "llama.yaml",
    }
    assert check.exit_code() == 0
    assert check.problems == ()
    ran = Ran(capsys, "init")
    assert (ran.code, ran.err.count("\n")) == (2, 1)


def test_init_takes_the_gpus_that_are_named(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(team, {"configs/b.yaml": LLAMAFACTORY})
    ran = Ran(capsys, "init", "--gpu", "4090", "--gpu", "h100", "--output", "-")
    assert 'runs = ["configs/*.yaml"]' in ran.out
    assert 'runs = ["configs/b.yaml"]' in Ran(capsys, "init", "configs/b.yaml", "--output", "-").out
    assert 'gpu = ["rtx-4090", "h100-sxm"]' in ran.out
    assert 'gpu = ["rtx-3090"]\ngpus = 2\n' in Ran(capsys, "init", "--gpu", "2x3090", "--output", "-").out
    assert (team / "memplan.toml").read_text() == BUDGET


def test_init_without_run_files_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = Ran(capsys, "init")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert not (tmp_path / "memplan.toml").exists()
