"""The formats of the gate: each is what its reader takes, and the same bytes on every machine."""

from __future__ import annotations

import json
import locale
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.main import get_command

import memplan
from memplan.cli.app import app
from memplan.gate.budget import Problem
from memplan.gate.difference import Changes, RunChange, difference
from memplan.gate.origin import Place
from memplan.gate.rows import Check, CheckedRun, Deciding
from memplan.report.gate import OF_CHANGES, render
from memplan.report.gate.markdown import MARKER, MOST
from memplan.report.text import Screen
from tests.gate.team import AXOLOTL, BUDGET, LLAMAFACTORY, edited, write

COMMAND = get_command(app)
# What a change may be, by the status of its head.
KINDS_OF = {
    "over": ("broken", "new, over", "over"),
    "wrong": ("wrong", "unknown"),
    "unknown": ("unknown",),
    **dict.fromkeys(("near", "fits"), ("fixed", "changed", "new", "unchanged")),
}
GPUS = ("rtx-3090", "a100-sxm-40gb", "h100-sxm")


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    files = {
        "memplan.toml": BUDGET + '\n[[budget]]\nruns = ["missing.yaml"]\ngpu = "3090"\n',
        "configs/fits.yaml": AXOLOTL,
        "configs/over.yaml": edited(AXOLOTL, micro_batch_size=64),
        "configs/unknown.yaml": edited(AXOLOTL, base_model="nobody/nothing"),
        "configs/wrong.yaml": "base_model: [\n",
    }
    return write(tmp_path, files)


def rows_drawn() -> st.SearchStrategy[CheckedRun]:
    names = st.text(min_size=1, max_size=30) | st.just('<&>|`\n::error::,%"')
    bytes_ = st.integers(1, 2**40)
    place = st.tuples(names, st.integers(1, 99), names).map(Place._make)
    return st.builds(
        lambda **fields: CheckedRun(**fields),  # noqa: PLW0108 (hypothesis reads a constructor's types)
        run=names,
        gpu=st.sampled_from(GPUS),
        gpus=st.integers(1, 8),
        status=st.sampled_from(("over", "wrong", "unknown", "near", "fits")),
        peak=bytes_,
        high=bytes_,
        limit=bytes_,
        warn=st.sampled_from((0, 2**30)),
        deciding=st.none() | st.tuples(place, st.integers() | names, bytes_).map(Deciding._make),
        error=names,
        left_out=st.lists(names, max_size=2).map(tuple),
    )


def drawn() -> st.SearchStrategy[Check | Changes]:
    problems = st.lists(st.text(min_size=1, max_size=40).map(Problem), max_size=2).map(tuple)
    change = rows_drawn().flatmap(
        lambda head: st.builds(
            lambda kind, base, renamed: RunChange(kind, base, head, (), renamed),
            st.sampled_from(KINDS_OF[head.status]),
            st.none() | rows_drawn(),
            st.sampled_from(("", "old|`name`.yaml")),
        )
    )
    checks = st.tuples(st.lists(rows_drawn(), max_size=5).map(tuple), problems)
    changes = st.tuples(st.lists(change, max_size=5).map(tuple), problems)
    return checks.map(lambda each: Check(*each)) | changes.map(lambda each: Changes(*each))


@given(found=drawn())
def test_every_format_can_be_read_whatever_a_file_is_called(found: Check | Changes) -> None:
    """XML and JSON are read, annotations are one line each, and Markdown's rows have as many cells as their heads."""
    for format in ("json", *(("junit", "sarif", "gitlab") if isinstance(found, Check) else ())):
        (ElementTree.fromstring if format == "junit" else json.loads)(render(format, found, Screen()))
    for screen in (Screen(), Screen(80), Screen(100, terminal=True)):
        assert render("table", found, screen)
    for line in render("github", found, Screen()).splitlines():
        assert re.fullmatch(r"::(error|warning)( [^:]*)?::.*", line)
    cells = heads = 0
    for line in render("markdown", found, Screen()).splitlines():
        if line.startswith("|"):
            cells = len(re.findall(r"(?<!\\)\|", line))
            heads = cells if line.startswith("| run |") else heads
            assert cells == heads


def test_github_annotations_stand_on_the_line_that_decides(team: Path) -> None:
    out = render("github", memplan.check(), Screen()).splitlines()
    over = next(line for line in out if "over.yaml" in line)
    row = next(row for row in memplan.check().rows if row.run.endswith("over.yaml"))
    needs = f"needs {row.peak / 2**30:,.1f} of {row.limit / 2**30:.1f} GiB on RTX 3090"
    assert over.startswith("::error file=configs/over.yaml,line=8,title=memplan%3A a run does not fit::")
    assert needs in over
    assert "micro_batch_size 64 costs" in over
    assert any(line.startswith("::warning file=configs/unknown.yaml,line=1,") for line in out)
    assert any(line.startswith("::error file=configs/wrong.yaml,line=2,") for line in out)
    assert any(line.startswith("::error file=memplan.toml,line=6,") for line in out)


def test_github_annotations_are_ten_at_most() -> None:
    many = Check(tuple(CheckedRun(f"{n}.yaml", "rtx-3090", status="over", peak=9, limit=3) for n in range(30)))
    lines = render("github", many, Screen()).splitlines()
    assert len(lines) == 10
    assert lines[-1] == "::error title=memplan::and 21 more, in the summary and the log"


def test_the_summary_of_a_step_is_written_within_its_limit(
    team: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(team / "summary.md"))
    with pytest.raises(SystemExit):
        COMMAND.main(["check"])
    assert not (team / "summary.md").exists()
    with pytest.raises(SystemExit):
        COMMAND.main(["check", "--format", "github"])
    text = (team / "summary.md").read_text("utf-8")
    assert text.startswith(MARKER)
    assert len(text.encode()) < 1024 * 1024
    capsys.readouterr()


def test_gitlabs_report_has_the_fields_it_needs(team: Path) -> None:
    found = json.loads(render("gitlab", memplan.check(), Screen()))
    assert all(each.keys() == {"description", "check_name", "fingerprint", "severity", "location"} for each in found)
    assert {each["severity"] for each in found} <= {"info", "minor", "major", "critical", "blocker"}
    assert len({each["fingerprint"] for each in found}) == len(found)
    over = next(each for each in found if each["check_name"] == "memplan/over")
    assert over["location"] == {"path": "configs/over.yaml", "lines": {"begin": 8}}


def test_junits_report_counts_its_cases(team: Path) -> None:
    suites = ElementTree.fromstring(render("junit", memplan.check(), Screen()))
    [suite] = suites
    cases = suite.findall("testcase")
    assert (suites.tag, suite.tag, suite.get("name")) == ("testsuites", "testsuite", "memplan")
    for name, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        assert int(suite.get(name, "0")) == sum(case.find(tag) is not None for case in cases) > 0
    assert int(suite.get("tests", "0")) == len(cases)
    assert all(case.get("name") and case.get("classname") for case in cases)
    known = {"failure", "error", "skipped", "system-out"}
    assert {child.tag for case in cases for child in case} <= known
    assert {name for case in cases for name in case.attrib} == {"name", "classname"}


def test_sarifs_log_has_what_its_schema_requires(team: Path) -> None:
    log: Any = json.loads(render("sarif", memplan.check(), Screen()))
    assert log["version"] == "2.1.0"
    [run] = log["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert run["tool"]["driver"]["name"] == "memplan"
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("none", "note", "warning", "error")
        assert result["message"]["text"]
        [location] = result["locations"]
        assert location["physicalLocation"]["region"]["startLine"] >= 1
        assert not location["physicalLocation"]["artifactLocation"]["uri"].startswith("/")


def test_openmetrics_lines_are_samples_with_metadata(team: Path) -> None:
    lines = render("openmetrics", memplan.check(), Screen()).splitlines()
    assert lines[-1] == "# EOF"
    sample = re.compile(r'memplan_(peak|limit)_bytes\{run="[^"]+",gpu="[^"]+",gpus="\d+"\} \d+')
    assert all(sample.fullmatch(line) for line in lines if not line.startswith("#"))
    assert lines.index("# TYPE memplan_peak_bytes gauge") == 0
    row = memplan.check().rows[0]
    assert f'memplan_peak_bytes{{run="{row.run}",gpu="{row.gpu}",gpus="1"}} {row.peak}' in lines


def test_a_comment_begins_with_its_marker_and_folds_what_fits(team: Path) -> None:
    text = render("markdown", memplan.check(), Screen())
    assert text.startswith(f"{MARKER}\n### memplan: 1 of 4 runs does not fit; 1 cannot be answered; 2 have mistakes\n")
    above, _, folded = text.partition("<details>")
    assert "configs/over.yaml" in above
    assert "configs/fits.yaml" not in above
    assert "configs/fits.yaml" in folded
    assert "`micro_batch_size`" in above
    assert "(line 8)" in above


def test_a_run_near_its_limit_says_why_in_tables_and_comments(team: Path) -> None:
    write(team, {"memplan.toml": '[[budget]]\nruns = "configs/fits.yaml"\ngpu = "3090"\nwarn = "1 GiB"\n'})
    check = memplan.check()
    for format in ("table", "markdown", "github"):
        assert "it is over the warning of 1.0 GiB" in render(format, check, Screen())
    [row] = check.rows
    for kind, is_said in (("unchanged", False), ("changed", True)):
        said = render("github", Changes((RunChange(kind, row, row),)), Screen())
        assert ("it is over the warning" in said) is is_said


def test_a_comment_of_thousands_of_runs_stays_below_githubs_limit() -> None:
    rows = [CheckedRun(f"configs/{'x' * 90}{n}.yaml", "rtx-3090", status="over", peak=9, limit=3) for n in range(5000)]
    text = render("markdown", Check(tuple(rows)), Screen())
    assert len(text) < 65_536
    assert "more, which there is no room for here" in text
    problems = tuple(Problem(f"memplan.toml:{n}: runs: there is no file {'x' * 80}.yaml") for n in range(5000))
    assert len(render("markdown", Check(tuple(rows), problems), Screen())) < 65_536
    changes = Changes(tuple(RunChange("broken", row, row) for row in rows))
    assert len(render("markdown", changes, Screen())) < MOST + 2_000


def test_an_unknown_format_or_ending_is_one_line(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["check", "--format", "xml"],
        ["diff", "a", "b", "--format", "junit"],
        ["check", "--report", "a.pdf"],
    ):
        with pytest.raises(SystemExit) as left:
            COMMAND.main(words)
        assert left.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_reports_are_written_to_files_by_their_endings(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        COMMAND.main(["check", "--report", "a.json", "--report", "a.md", "--report", "a.xml", "--report", "a.sarif"])
    check = memplan.check()
    for name, format in (("a.json", "json"), ("a.md", "markdown"), ("a.xml", "junit"), ("a.sarif", "sarif")):
        assert (team / name).read_text("utf-8") == render(format, check, Screen())
    capsys.readouterr()


def test_the_same_inputs_give_the_same_bytes_on_every_machine(tmp_path: Path) -> None:
    """No time, folder, locale, environment or order of files shows in a report."""
    large = edited(AXOLOTL, micro_batch_size=64)
    files = {"memplan.toml": BUDGET, "configs/b.yaml": large, "configs/a.yaml": LLAMAFACTORY}
    code = (
        "import memplan, sys\nfrom memplan.report.gate import FORMATS, render\nfrom memplan.report.text import Screen\n"
    )
    code += "check = memplan.check()\nfor each in FORMATS: sys.stdout.write(render(each, check, Screen()))"
    found: list[bytes] = []
    for number, order in enumerate((list(files), list(reversed(files)))):
        folder = write(tmp_path / ("deep/" * number + f"folder {number}"), {name: files[name] for name in order})
        variables = {
            **os.environ,
            "PYTHONPATH": str(Path(memplan.__file__).parents[1]),
            "PYTHONHASHSEED": str(number),
            "TZ": ("UTC", "Asia/Tokyo")[number],
            "LC_ALL": ("C.UTF-8", "de_DE.UTF-8")[number],
        }
        words = [sys.executable, "-X", "utf8", "-c", code]
        found.append(subprocess.run(words, cwd=folder, env=variables, capture_output=True, check=True).stdout)
    assert found[0] == found[1] != b""
    assert str(tmp_path).encode() not in found[0]


@pytest.mark.parametrize("format", OF_CHANGES)
def test_the_same_changes_give_the_same_bytes(format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    for name in ("one", "two"):
        base = write(tmp_path / name / "base", {"memplan.toml": BUDGET, "configs/a.yaml": AXOLOTL})
        after = {"memplan.toml": BUDGET, "configs/a.yaml": edited(AXOLOTL, sequence_len=65536)}
        head = write(tmp_path / name / "head", after)
        found.append(render(format, difference(str(base), str(head)), Screen()))
    assert found[0] == found[1]
    assert str(tmp_path) not in found[0]


def test_numbers_are_not_written_by_the_locale() -> None:
    row = CheckedRun("a.yaml", "rtx-3090", status="over", peak=5 * 2**40, limit=2**30)
    before = render("github", Check((row,)), Screen())
    previous = locale.setlocale(locale.LC_ALL)
    try:
        locale.setlocale(locale.LC_ALL, "")
        assert render("github", Check((row,)), Screen()) == before
    finally:
        locale.setlocale(locale.LC_ALL, previous)
