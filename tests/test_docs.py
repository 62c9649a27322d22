"""The documentation is correct: every example in it runs, and prints the shown output."""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
from typer.main import get_command

from benchmarks import accuracy, manual
from memplan.cli.app import app
from memplan.cli.estimate import ESTIMATE_OPTIONS
from memplan.spec.options import flag
from tests.sampling import ALL, sampled

COMMAND = get_command(app)
ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "memplan").rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


class Block(NamedTuple):
    """A fenced block: its language, its lines, and the text block with its output, if one follows."""

    page: str
    language: str
    text: str
    printed: str | None


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    after = [*found, ("", "")][1:]
    return [
        Block(page.name, language, text, following[1] if following[0] == "text" else None)
        for (language, text), following in zip(found, after, strict=True)
    ]


SHELL = [b for page in PAGES for b in blocks(page) if b.language == "sh"]
COMMANDS = sampled([b for b in SHELL if b.page == "README.md"]) + sampled([b for b in SHELL if b.page != "README.md"])


# First, because they take longest: other processes run the rest of this file meanwhile.


@ALL
def test_the_readme_says_how_right_the_program_is() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert "\n".join(accuracy.summary()) in text


@ALL
def test_the_accuracy_page_equals_the_programs_answers() -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        accuracy.main()
    assert (ROOT / "docs" / "accuracy.md").read_text("utf-8") == out.getvalue()


@pytest.mark.parametrize("page", sampled(PAGES, every=5), ids=lambda page: page.stem)
def test_the_examples_of_a_page_run_as_written(page: Path) -> None:
    options = doctest.NORMALIZE_WHITESPACE
    assert doctest.testfile(str(page), module_relative=False, encoding="utf-8", optionflags=options).failed == 0


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run_as_written(module: str) -> None:
    assert doctest.testmod(import_module(module)).failed == 0


def words_of(line: str) -> list[str]:
    """Return the arguments after `memplan` in a line of a shell block; CI runs full lines, including `pip install`."""
    name, *words = shlex.split(line.rpartition("&&")[2], comments=True)
    assert name == "memplan", line
    return words


def test_the_readmes_first_command_prints_its_quoted_output(tmp_path: Path) -> None:
    block = COMMANDS[0]
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, "-m", "memplan", *words_of(block.text)],
        check=True,
        cwd=tmp_path,
        env={**env, "COLUMNS": "100", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert (done.stdout, done.stderr) == (block.printed, "")


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: f"{block.page}: {block.text.splitlines()[0][:60]}")
def test_a_shell_block_gives_the_pages_output(
    block: Block, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    config = tmp_path / "path" / "to" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text(
        '{"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, '
        '"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}',
        "utf-8",
    )
    (tmp_path / "run.yaml").write_text("model: qwen2-7b\nmethod: qlora\ngpu: 3090\n", "utf-8")
    page = (ROOT / block.page if block.page == "README.md" else ROOT / "docs" / block.page).read_text("utf-8")
    for name, text in re.findall(r"^```yaml\n(?=# (\S+)$)(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text, "utf-8")
    (tmp_path / "run.json").write_text('{"model": "qwen2-7b", "method": "qlora", "gpu": "3090"}', "utf-8")
    printed = ""
    for line in block.text.splitlines():
        if line.endswith("pytest"):
            assert line == "pip install '.[test]' && pytest"  # .ci/run reads and runs this line, which runs this test
            continue
        with pytest.raises(SystemExit) as left:
            COMMAND.main(words_of(line))
        out, err = capsys.readouterr()
        assert (left.value.code in (0, 1), err) == (True, "")
        printed += out
    if block.printed is not None:
        assert printed == block.printed


def test_ci_runs_the_two_commands_of_the_readme() -> None:
    patterns = re.findall(r"readme_command '(.*)'\)", (ROOT / ".ci" / "run").read_text("utf-8"))
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert [[line for line in lines if re.match(p, line)] for p in patterns] == [
        ["pip install . && memplan qwen2-7b --method qlora --gpu 3090"],
        ["pip install '.[test]' && pytest"],
    ]


def test_every_runtime_dependency_has_a_lower_bound_that_ci_can_install() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert [d for d in project["dependencies"] if not re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?", d)] == []


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 120


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_manual_has_the_help_of_the_commands() -> None:
    page = manual.PAGE.read_text("utf-8")
    assert manual.written(page) == page
    missing = [flag(name) for group in ESTIMATE_OPTIONS.values() for name in group if f"  {flag(name)} " not in page]
    assert missing == ["--model"]
