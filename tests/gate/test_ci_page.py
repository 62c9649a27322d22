"""The page on CI: its commands print what it quotes, with the files that it shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import memplan
from memplan.cli.app import app
from tests.gate.team import git, write

ROOT = Path(memplan.__file__).parents[1]
PAGE = (ROOT / "docs/guides/ci.md").read_text("utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    named = [re.match(r"# (\S+)\n", text) for _, text in BLOCKS]
    files = {match[1]: text for match, (_, text) in zip(named, BLOCKS, strict=True) if match is not None}
    assert files.keys() == {"memplan.toml", "qlora.yaml", "lora.yaml"}
    return write(tmp_path, files)


def test_the_pages_commands_print_what_it_quotes(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in (text for language, text in BLOCKS if language == "console"):
        command, _, printed = text.partition("\n")
        with pytest.raises(SystemExit):
            get_command(app).main(command.split()[2:])
        assert capsys.readouterr().out == printed


def test_the_line_that_the_page_explains_is_that_of_its_run(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get_command(app).main(["check", "--format", "github"])
    [line] = re.findall(r"`(needs [^`]+ of it)`", PAGE)
    assert f"::{line}\n" in capsys.readouterr().out


def test_the_pages_yaml_is_yaml() -> None:
    for language, text in BLOCKS:
        if language == "yaml":
            assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not installed (.ci/run installs it)")
def test_the_pages_workflow_passes_actionlint(tmp_path: Path) -> None:
    [workflow] = [text for _, text in BLOCKS if "uses: memplan/memplan@" in text]
    local = re.sub(r"memplan/memplan@\w+", "./", workflow)  # of which actionlint knows the inputs
    write(tmp_path, {".github/workflows/memplan.yml": local, "action.yml": (ROOT / "action.yml").read_text("utf-8")})
    git(tmp_path, "init", "--quiet")
    found = subprocess.run(["actionlint", "-no-color"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_jenkins_and_make_lines_are_commands_of_memplan(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for language, text in BLOCKS if language in ("groovy", "make") for line in text.splitlines()]
    found = [match[1] for line in lines if (match := re.search(r"memplan (check[^';]*)", line))]
    assert len(found) == len(lines)
    for words in found:
        with pytest.raises(SystemExit) as left:
            get_command(app).main(words.split())
        assert left.value.code == 1
    assert (team / "memplan.xml").exists()
    capsys.readouterr()
