"""Two revisions, folders or checks: what is wrong with one is a line, and the other runs are still reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import memplan
from memplan.core.workers import mapped, processes_for
from memplan.gate.difference import difference
from tests.gate.team import AXOLOTL, BUDGET, LLAMAFACTORY, OWN, Ran, edited, git, write


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files = {"memplan.toml": BUDGET, "configs/a.yaml": AXOLOTL, "configs/b.yaml": LLAMAFACTORY}
    folder = write(tmp_path / "repository", files)
    git(folder, "init", "--quiet")
    commit(folder)
    monkeypatch.chdir(folder)
    return folder


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "x")


def kinds(base: str, head: str = ".") -> dict[tuple[str, str], str]:
    return {(each.row.run, each.row.gpu): each.kind for each in difference(base, head).changes}


def test_revisions_folders_and_checks_say_the_same(repository: Path, tmp_path: Path) -> None:
    git(repository, "worktree", "add", "--quiet", str(tmp_path / "old"), "HEAD")
    (tmp_path / "base.json").write_text(json.dumps(memplan.check().model_dump()))
    write(repository, {"configs/a.yaml": edited(AXOLOTL, sequence_len=4096)})
    expected = kinds("HEAD")
    assert set(expected.values()) == {"changed", "unchanged"}
    commit(repository)
    (tmp_path / "head.json").write_text(json.dumps(memplan.check().model_dump()))
    for base in ("HEAD~1", str(tmp_path / "old"), str(tmp_path / "base.json")):
        for head in ("HEAD", ".", str(tmp_path / "head.json")):
            assert kinds(base, head) == expected
            causes = [each.causes[0].changes[0].key for each in difference(base, head).changes if each.causes]
            assert causes == ["sequence_len"] * 2


def test_the_working_directory_and_the_index_are_left_alone(repository: Path) -> None:
    write(repository, {"configs/a.yaml": edited(AXOLOTL, lora_r=32)})
    before = git(repository, "status", "--porcelain"), Path.cwd()
    kinds("HEAD")
    assert (git(repository, "status", "--porcelain"), Path.cwd()) == before


def test_a_folder_below_the_repositorys_is_compared_with_itself(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    team = write(repository / "team", {"memplan.toml": BUDGET, "configs/c.yaml": OWN})
    commit(repository)
    monkeypatch.chdir(team)
    assert kinds("HEAD") == {("configs/c.yaml", gpu): "unchanged" for gpu in ("rtx-3090", "a100-sxm-40gb")}


def test_sides_are_named_from_a_folder_below_the_budgets(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(repository, {"configs/base.json": json.dumps(memplan.check().model_dump())})
    monkeypatch.chdir(repository / "configs")
    for base in ("base.json", "HEAD"):
        ran = Ran(capsys, "diff", base)
        assert (ran.code, ran.err) == (0, "")
        monkeypatch.chdir(repository / "configs")


def test_a_base_without_budgets_is_checked_by_the_heads(repository: Path) -> None:
    (repository / "memplan.toml").unlink()
    commit(repository)
    write(repository, {"memplan.toml": BUDGET})
    assert set(kinds("HEAD").values()) == {"unchanged"}


def test_a_command_of_a_script_finds_its_files_in_either_revision(repository: Path) -> None:
    budget = '[[budget]]\nruns = ["run.sh"]\ngpu = "3090"\n'
    trl = "model_name_or_path: qwen2-1.5b\nuse_peft: true\nmax_length: 1024\n"
    write(repository, {"memplan.toml": budget, "run.sh": "trl sft --config conf/trl.yaml\n", "conf/trl.yaml": trl})
    commit(repository)
    write(repository, {"conf/trl.yaml": trl.replace("1024", "4096")})
    [change] = difference("HEAD").changes
    assert [cause.changes[0].key for cause in change.causes] == ["max_length"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "nothing: is no revision of this repository, no folder and no check's JSON"),
        (["--", "--upload-pack=x"], "--upload-pack=x: is no revision of this repository"),
        (["HEAD", "HEAD", "HEAD"], "revisions: name two, not 3"),
        (["wrong.json"], "wrong.json: is not the JSON of memplan check"),
        (["later.json"], "later.json: has schema 9, not 1: run memplan check --json again"),
        (["HEAD", "--gpu", "3090"], "runs: name the files to check on these GPUs"),
        (["HEAD", "--gpus", "2"], "gpu: name the GPUs of the runs that are given"),
        (["empty"], "no memplan.toml in"),
    ],
)
def test_a_side_that_is_none_is_one_line(
    words: list[str], line: str, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(repository, {"wrong.json": "[1]", "later.json": '{"schema_version": 9}', "empty/x": ""})
    if words == ["empty"]:
        (repository / "memplan.toml").unlink()
    ran = Ran(capsys, "diff", *words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert line in ran.err


def test_a_shallow_clone_without_the_base_says_how_to_fetch_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = git(repository, "rev-parse", "HEAD")
    commit(repository)
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", "clone")
    monkeypatch.chdir(tmp_path / "clone")
    ran = Ran(capsys, "diff", base)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert f"shallow and does not have it; run git fetch --depth=1 origin {base}" in ran.err


def test_outside_of_a_repository_a_revision_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write(tmp_path, {"memplan.toml": BUDGET, "configs/a.yaml": AXOLOTL}))
    ran = Ran(capsys, "diff", "main")
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert "this is no git repository" in ran.err


def test_a_run_file_deleted_in_the_head_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(repository, {"memplan.toml": '[[budget]]\nruns = ["configs/a.yaml", "configs/b.yaml"]\ngpu = "3090"\n'})
    commit(repository)
    (repository / "configs/b.yaml").unlink()
    found = difference("HEAD")
    [problem] = found.problems
    line = "memplan.toml:2: runs: there is no file configs/b.yaml: it is deleted; take it out of runs"
    assert (problem.text, found.exit_code()) == (line, 2)
    assert {each.row.run: each.kind for each in found.changes} == {
        "configs/a.yaml": "unchanged",
        "configs/b.yaml": "removed",
    }
    assert Ran(capsys, "diff", "HEAD").code == 2


def test_a_mistake_that_the_base_has_too_does_not_fail(repository: Path) -> None:
    write(repository, {"configs/c.yaml": "base_model: [\n"})
    assert difference("HEAD").exit_code() == 2
    commit(repository)
    write(repository, {"configs/a.yaml": edited(AXOLOTL, lora_r=32)})
    assert difference("HEAD").exit_code() == 0


def test_a_new_run_that_does_not_fit_fails(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(repository, {"configs/c.yaml": edited(AXOLOTL, micro_batch_size=64)})
    assert kinds("HEAD")["configs/c.yaml", "rtx-3090"] == "new, over"
    ran = Ran(capsys, "diff", "HEAD")
    assert ran.code == 1
    assert "1 new run does not fit" in ran.out


def test_several_processes_answer_as_one(repository: Path) -> None:
    for number in range(9):
        write(repository, {f"configs/{number}.yaml": edited(AXOLOTL, sequence_len=256 * (number + 1))})
    assert memplan.check(processes=3) == memplan.check()
    progress: list[tuple[int, int]] = []
    memplan.check(processes=2, progress=lambda done, of: progress.append((done, of)))
    assert progress[-1] == (11, 11)


def test_items_are_mapped_in_order_and_few_in_this_process() -> None:
    assert mapped(lambda n: n * n, range(20), 3) == [n * n for n in range(20)]
    assert processes_for(3) == 1
    with pytest.raises(RuntimeError):
        mapped(lambda n: 1 // n, range(-4, 4), 2)
