"""The files that CI systems take: their steps run as they are written, against a local repository and server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

import memplan
from memplan.cli.plain import run_plain
from memplan.report.gate.markdown import MARKER
from tests.gate.team import AXOLOTL, BUDGET, LLAMAFACTORY, edited, git, write

ROOT = Path(memplan.__file__).parents[1]
ACTION: Any = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
STEPS: Mapping[str, Any] = {step["id"]: step for step in ACTION["runs"]["steps"]}
SCHEMAS = {
    "action.yml": "vendor.github-actions",
    "templates/memplan.gitlab-ci.yml": "vendor.gitlab-ci",
    ".github/workflows/ci.yml": "vendor.github-workflows",
    ".github/workflows/release.yml": "vendor.github-workflows",
}
LARGE = edited(AXOLOTL, micro_batch_size=64)


class Comments(BaseHTTPRequestHandler):
    """The part of GitHub's API that lists, creates and updates the comments of a pull request."""

    listed: list[dict[str, Any]]
    calls: list[tuple[str, str]]
    page = 2

    def _answer(self, values: object, status: int = 200) -> None:
        text = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _body(self) -> dict[str, Any]:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def do_GET(self) -> None:
        assert self.headers["Authorization"] == "Bearer secret"
        number = int(re.findall(r"[?&]page=(\d+)", self.path)[0])
        self._answer(self.listed[(number - 1) * self.page : number * self.page])

    def do_POST(self) -> None:
        self.calls.append(("POST", self.path))
        self.listed.append({"id": len(self.listed) + 1, **self._body()})
        self._answer(self.listed[-1], 201)

    def do_PATCH(self) -> None:
        self.calls.append(("PATCH", self.path))
        next(each for each in self.listed if self.path.endswith(f"/{each['id']}")).update(self._body())
        self._answer({})

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def api() -> Iterator[str]:
    Comments.listed, Comments.calls = [], []
    with HTTPServer(("127.0.0.1", 0), Comments) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


class Runner:
    """A job of GitHub Actions in a local repository: its environment, and the outputs of its steps."""

    def __init__(self, folder: Path, event: Mapping[str, Any], inputs: Mapping[str, str], api: str = "") -> None:
        self.folder = folder
        self.temporary = folder.parent / "temporary"
        self.temporary.mkdir(exist_ok=True)
        self.expressions = {
            **{f"inputs.{name}": each.get("default", "") for name, each in ACTION["inputs"].items()},
            **{f"inputs.{name}": text for name, text in inputs.items()},
            **{f"github.event.{name}": text for name, text in event.items()},
            "github.api_url": api,
            "github.repository": "a/b",
            "inputs.token": "secret",
        }
        commands = write(folder.parent / "bin", {"memplan": f'#!/bin/sh\nexec "{sys.executable}" -m memplan "$@"\n'})
        (commands / "memplan").chmod(0o755)
        self.path = f"{commands}:{os.environ['PATH']}"

    def value(self, text: str) -> str:
        return re.sub(r"\$\{\{ *(.+?) *\}\}", lambda match: str(self.expressions.get(match[1], "")), str(text))

    def run(self, step: str) -> subprocess.CompletedProcess[str]:
        """Run a step as the runner's bash does, and keep its outputs."""
        files = {name: str(self.temporary / name) for name in ("GITHUB_OUTPUT", "GITHUB_PATH", "GITHUB_STEP_SUMMARY")}
        variables = {name: self.value(text) for name, text in STEPS[step]["env"].items()}
        environment = {
            "PATH": self.path,
            "HOME": str(self.temporary),
            "PYTHONPATH": str(ROOT),
            "LANG": "C.UTF-8",
            "RUNNER_TEMP": str(self.temporary),
            **files,
            **variables,
        }
        words = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEPS[step]["run"]]
        done = subprocess.run(words, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        output = Path(files["GITHUB_OUTPUT"])
        for line in output.read_text("utf-8").splitlines() if output.exists() else ():
            name, _, text = line.partition("=")
            self.expressions[f"steps.{step}.outputs.{name}"] = text
        output.unlink(missing_ok=True)
        return done

    def outputs(self) -> dict[str, str]:
        return {name: self.value(each["value"]) for name, each in ACTION["outputs"].items()}

    def comments(self) -> bool:
        """Whether the condition of the step that comments holds."""
        condition = "inputs.comment == 'true' && github.event.pull_request.number && steps.check.outputs.report"
        assert STEPS["comment"]["if"] == condition
        names = re.findall(r"[\w.]+\.[\w.]+", condition)
        return self.expressions[names[0]] == "true" and all(self.expressions.get(name) for name in names[1:])


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = write(tmp_path / "repository", {"memplan.toml": BUDGET, "configs/a.yaml": AXOLOTL, "b.yaml": LLAMAFACTORY})
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "base")
    return folder


def pull(folder: Path) -> dict[str, str]:
    return {"pull_request.base.sha": git(folder, "rev-parse", "HEAD"), "pull_request.number": "7"}


def test_a_push_is_checked(repository: Path) -> None:
    job = Runner(repository, {}, {})
    done = job.run("check")
    assert done.returncode == 0, done.stderr
    assert job.outputs()["fits"] == "true"
    assert int(job.outputs()["peak-bytes"]) > 2**30
    assert Path(job.outputs()["report"]).read_text("utf-8").startswith(MARKER)
    assert (job.temporary / "GITHUB_STEP_SUMMARY").read_text("utf-8").startswith(MARKER)
    assert job.run("result").returncode == 0


def test_a_pull_request_that_no_longer_fits_fails_with_its_line(repository: Path) -> None:
    event = pull(repository)
    write(repository, {"configs/a.yaml": LARGE})
    job = Runner(repository, event, {})
    done = job.run("check")
    assert done.returncode == 0
    assert "::error file=configs/a.yaml,line=8," in done.stdout
    assert "micro_batch_size 2 → 64 (line 8)" in done.stdout
    assert job.outputs()["fits"] == "false"
    assert job.run("result").returncode == 1


def test_the_base_of_a_shallow_clone_is_fetched(repository: Path, tmp_path: Path) -> None:
    event = pull(repository)
    write(repository, {"configs/a.yaml": LARGE})
    git(repository, "commit", "--quiet", "--all", "--message", "head")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repository}", str(clone))
    git(repository, "config", "uploadpack.allowAnySHA1InWant", "true")
    job = Runner(clone, event, {})
    assert "::error file=configs/a.yaml" in job.run("check").stdout
    assert job.run("result").returncode == 1


def test_files_and_gpus_replace_the_budgets(repository: Path) -> None:
    inputs = {"files": "configs/*.yaml\nb.yaml", "gpu": "4090,h100", "fail-above": "1%"}
    job = Runner(repository, {}, inputs)
    job.run("check")
    report = Path(job.outputs()["report"]).read_text("utf-8")
    assert report.count("❌") == 4
    assert job.run("result").returncode == 1
    job = Runner(repository, pull(repository), inputs)  # they did not fit before either
    job.run("check")
    assert job.run("result").returncode == 0


def test_a_comment_is_created_once_and_updated_afterwards(repository: Path, api: str) -> None:
    Comments.listed = [{"id": n, "body": f"comment {n}"} for n in (1, 2, 3)]  # more than a page
    event = pull(repository)
    for text, method in ((LARGE, "POST"), (edited(AXOLOTL, lora_r=32), "PATCH"), (AXOLOTL, "PATCH")):
        write(repository, {"configs/a.yaml": text})
        job = Runner(repository, event, {"comment": "true"}, api)
        job.run("check")
        assert job.comments()
        done = job.run("comment")
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert Comments.calls[-1][0] == method
        assert Comments.listed[3]["body"] == Path(job.outputs()["report"]).read_text("utf-8")
    assert len(Comments.listed) == 4
    assert Comments.calls[0] == ("POST", "/repos/a/b/issues/7/comments")
    assert Comments.calls[1] == ("PATCH", "/repos/a/b/issues/comments/4")


def test_nothing_is_posted_unless_asked_for(repository: Path, api: str) -> None:
    for inputs, event in (({}, pull(repository)), ({"comment": "true"}, {})):
        job = Runner(repository, event, inputs, api)
        job.run("check")
        assert not job.comments()
    assert Comments.calls == []


def test_a_token_that_may_not_comment_is_a_warning(repository: Path) -> None:
    job = Runner(repository, pull(repository), {"comment": "true"}, "http://127.0.0.1:1")
    job.run("check")
    done = job.run("comment")
    assert done.returncode == 0
    assert done.stdout.startswith("::warning title=memplan::the comment cannot be written")


@pytest.mark.parametrize(("version", "requirement"), [("", "memplan"), ("0.1.0", "memplan==0.1.0")])
def test_the_version_that_is_asked_for_is_installed(version: str, requirement: str, repository: Path) -> None:
    job = Runner(repository, {}, {"version": version})
    pip = '#!/bin/sh\necho "$@" > "$RUNNER_TEMP/pip"\n'
    fake = f'#!/bin/sh\nmkdir -p "$3/bin"\nprintf \'%s\' \'{pip}\' > "$3/bin/pip"\nchmod +x "$3/bin/pip"\n'
    commands = write(repository.parent / "fake", {"python3": fake})
    (commands / "python3").chmod(0o755)
    job.path = f"{commands}:{job.path}"
    done = job.run("install")
    assert done.returncode == 0, done.stderr
    assert (job.temporary / "pip").read_text().split()[-1] == requirement
    assert (job.temporary / "GITHUB_PATH").read_text().strip() == str(job.temporary / "memplan/bin")


def test_the_pre_commit_hook_takes_changed_files(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [hook] = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text("utf-8"))
    assert hook["id"] == "memplan-check"
    assert hook["language"] == "python"
    assert set(hook["types_or"]) == {"yaml", "toml"}
    monkeypatch.chdir(repository)
    words = hook["entry"].split()[1:]
    assert run_plain([*words, "configs/a.yaml", "b.yaml"]) == 0
    write(repository, {"configs/a.yaml": LARGE})
    assert run_plain([*words, "configs/a.yaml"]) == 1
    assert run_plain([*words, "memplan.toml"]) == 1
    assert run_plain([*words, "b.yaml"]) == 0


def test_gitlabs_job_runs_as_it_is_written(repository: Path) -> None:
    job: Any = yaml.safe_load((ROOT / "templates/memplan.gitlab-ci.yml").read_text("utf-8"))["memplan"]
    runner = Runner(repository, {}, {})
    base = git(repository, "rev-parse", "HEAD")
    write(repository, {"configs/a.yaml": LARGE})
    environment = {"PATH": runner.path, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8", "HOME": str(repository.parent)}
    for variables, code in (({}, 1), ({"CI_MERGE_REQUEST_DIFF_BASE_SHA": base}, 1)):
        script = "\n".join(["set -eo pipefail", *job["script"]])
        env = {**environment, **variables}
        done = subprocess.run(["bash", "-c", script], cwd=repository, env=env, capture_output=True, check=False)
        assert done.returncode == code
        for name in (*job["artifacts"]["paths"], *job["artifacts"]["reports"].values()):
            assert (repository / name).stat().st_size > 0
            (repository / name).unlink()


@pytest.mark.parametrize("name", SCHEMAS)
def test_ci_files_follow_their_schemas(name: str) -> None:
    pytest.importorskip("check_jsonschema")
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", SCHEMAS[name], str(ROOT / name)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
