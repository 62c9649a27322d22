"""The documentation is correct: every example in it runs, and prints the shown output."""

from __future__ import annotations

import doctest
import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from benchmarks import accuracy, examples, manual
from memplan.cli.estimate import ESTIMATE_OPTIONS
from memplan.spec.options import flag
from tests.sampling import ALL, sampled

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = examples.PAGES
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "memplan").rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


SHELL = [example for page in PAGES for example in examples.examples_of(page) if example.language == "sh"]
COMMANDS = sampled([e for e in SHELL if e.page == README]) + sampled([e for e in SHELL if e.page != README])


# First, because they take longest: other processes run the rest of this file meanwhile.


@ALL
def test_the_accuracy_pages_equal_the_programs_answers() -> None:
    assert [path.name for path, text in accuracy.pages() if path.read_text("utf-8") != text] == []


@pytest.mark.parametrize("page", sampled(PAGES, every=5), ids=lambda page: str(page.relative_to(ROOT)))
def test_the_examples_of_a_page_run_as_written(page: Path) -> None:
    options = doctest.NORMALIZE_WHITESPACE
    assert doctest.testfile(str(page), module_relative=False, encoding="utf-8", optionflags=options).failed == 0


@pytest.mark.parametrize("module", MODULES)
def test_the_examples_in_docstrings_run_as_written(module: str) -> None:
    assert doctest.testmod(import_module(module)).failed == 0


@pytest.mark.parametrize("example", COMMANDS, ids=str)
def test_a_shell_block_gives_the_pages_output(example: examples.Example, tmp_path: Path) -> None:
    ran = examples.printed(example, tmp_path)
    assert (set(ran.codes) <= {0, 1}, ran.err) == (True, "")
    assert example.quoted in (None, ran.out)


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


def test_the_readme_fits_on_one_and_a_half_screens() -> None:
    assert len(README.read_text("utf-8").splitlines()) <= 75


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_reference_is_what_the_program_says() -> None:
    assert [path.name for path, text in manual.pages() if path.read_text("utf-8") != text] == []


def test_the_manual_has_every_option() -> None:
    page = manual.PAGE.read_text("utf-8")
    missing = [flag(name) for group in ESTIMATE_OPTIONS.values() for name in group if f"  {flag(name)} " not in page]
    assert missing == ["--model"]
