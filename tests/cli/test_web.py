"""The web page's engine: it answers a question with the bytes of the command, and reads nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from memplan.cli import web
from memplan.cli.page import VIEWS, answer, form
from memplan.core.errors import MemplanError
from memplan.planning.fitting import fits
from memplan.report.svg import verdict_class
from memplan.serve import page
from memplan.serve.page import Page
from memplan.spec.options import OPTIONS
from memplan.spec.run import RunSpec


def ask(*words: str, **files: str) -> dict[str, Any]:
    return json.loads(answer(json.dumps({"words": words, "files": files})))


RUN = """\
base_model: Qwen/Qwen2-7B
adapter: qlora
load_in_4bit: true
lora_target_linear: true
lora_r: 16
micro_batch_size: 1
sequence_len: 2048
"""


OOM = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.68 GiB of which 1.31 GiB is free."
)


@pytest.mark.parametrize(
    "words",
    [
        ("qwen2-7b", "--method=qlora", "--gpu=3090", "--format=html"),
        ("fit", "gpt2", "--gpu=3090", "--format=html"),
        ("buy", "gpt2", "--format=json"),
        ("explain", "oom.log", "gpt2", "--gpu=3090", "--format=html"),
        ("run.yaml", "--gpu=3090", "--format=csv"),
        ("gpt2é", "--format=html"),
        ("gpt2", "--batch-size=many", "--no-padded", "--format=html"),
    ],
)
def test_an_answer_has_the_bytes_of_the_command(words: tuple[str, ...], tmp_path: Path) -> None:
    files = {"run.yaml": RUN, "oom.log": OOM}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    ran = subprocess.run([sys.executable, "-m", "memplan", *words], cwd=tmp_path, capture_output=True, check=False)
    expected = {"code": ran.returncode, "out": ran.stdout.decode(), "err": ran.stderr.decode()}
    assert ask(*words, **files) == expected


def of_part(part: str, *words: str) -> dict[str, Any]:
    return json.loads(answer(json.dumps({"words": words, "files": {}, "part": part})))


def test_a_part_of_the_page_says_what_the_command_says() -> None:
    words = ("gpt2", "--method=lora", "--gpu=t4", "--batch-size=4")
    page, bar = ask(*words, "--format=html")["out"], of_part("bar", *words)["out"]
    assert all(line in page for line in bar.splitlines())
    assert bar.startswith('<h1 class="fits">fits: ')
    limits = json.loads(ask("max", *words, "--format=json")["out"])["map"]
    cells = re.findall(r'<td class="n ?(\w*)', of_part("map", *words)["out"])
    assert cells == [verdict_class(verdict) for row in limits["verdict"] for verdict in row]
    run = RunSpec(model="gpt2", method="lora", batch={"micro": 4, "sequence": 1024})  # pyright: ignore[reportArgumentType]
    cards = re.findall(
        r'<td>([\w.-]+)</td><td class="n">.*?<td class="\w+">([\w ]+)</td>', of_part("cards", *words)["out"]
    )
    assert set(cards) == {(fit.gpu.name, fit.answer) for fit in fits(run)}
    assert "<td>transformers-5</td>" in of_part("stacks", *words)["out"]


@pytest.mark.parametrize(
    ("part", "words", "line"),
    [
        ("bar", ("gpt2", "--batch-size=many"), "--batch-size: must be a whole number, not 'many'"),
        ("map", ("gpt2",), "gpu: needed to tell what fits; name one"),
        ("maps", ("gpt2",), "part: unknown name 'maps'; did you mean map"),
    ],
)
def test_a_part_that_has_no_answer_says_why_in_a_line(part: str, words: tuple[str, ...], line: str) -> None:
    said = of_part(part, *words)
    assert (said["code"], said["out"]) == (2, "")
    assert said["err"].startswith(f"memplan: {line}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("gpt2", "--output=/tmp/x"), "--output: not an option of the page; its form lists them"),
        (("gpt2", "--online"), "--online: not an option of the page; its form lists them"),
        (("gpt2", "--spec=-"), "--spec: not an option of the page; its form lists them"),
        (("--", "trl", "sft"), "--: not an option of the page; its form lists them"),
        (("-h",), "-h: not an option of the page; its form lists them"),
        (("web",), "command: unknown name 'web'; did you mean"),
        (("help", "plan"), "command: unknown name 'help'; did you mean"),
        (("/etc/passwd",), "model: the page reads only files that are dropped or pasted"),
        (("gpt2", "--deepspeed=../ds.json"), "--deepspeed: the page reads only files that are dropped or pasted"),
        (("~/config.json",), "model: the page reads only files that are dropped or pasted"),
    ],
)
def test_a_question_names_only_its_own_files_and_options(words: tuple[str, ...], line: str) -> None:
    said = ask(*words)
    assert (said["code"], said["out"]) == (2, "")
    assert said["err"].startswith(f"memplan: {line}")


@pytest.mark.parametrize("name", ["../x", "/x", "", ".x", "a b", "x\n", "é"])
def test_a_file_has_a_plain_name(name: str) -> None:
    assert ask("gpt2", **{name: "text"})["err"].endswith("is no name of a file; use letters, digits, . and -\n")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"words": 1, "files": {}}', '{"words": [1], "files": {}}', "[" * 9999]
)
def test_what_is_no_question_is_one_line(text: str) -> None:
    assert json.loads(answer(text)) == {
        "code": 2,
        "out": "",
        "err": 'memplan: question: not JSON as {"words": ["qwen2-7b", "--gpu=3090"], "files": {}}\n',
    }


def test_a_config_that_is_not_json_is_one_line() -> None:
    said = ask("config.json", "--gpu=3090", **{"config.json": "<script>alert(1)</script>"})
    assert said["err"] == "memplan: config.json: not JSON (Expecting value, line 1, column 1)\n"


def test_script_in_a_models_name_is_text() -> None:
    config = json.loads(ask("gpt2", "--format=json")["out"])["run"]
    run = json.dumps({**config, "model": {"config": {"model_type": "<script>alert(1)</script>"}}})
    assert "<script>alert" not in ask("run.json", "--format=html", **{"run.json": run})["out"]


def test_the_form_has_the_options_that_name_no_file() -> None:
    shown = form()
    names = {row["name"] for rows in shown["headings"].values() for row in rows}
    assert {name for group in OPTIONS.values() for name in group} - names == {"model", "deepspeed", "accelerate"}
    assert set(shown["views"]) == set(VIEWS)
    assert shown["models"]["qwen2-7b"] == "Qwen/Qwen2-7B-Instruct"
    assert json.loads(json.dumps(shown))["version"]


def test_every_choice_of_the_form_is_one_that_its_option_takes() -> None:
    wrong = "memplan: --{}: "
    for rows in form()["headings"].values():
        for row in rows:
            for choice in row["choices"] if row["closed"] else ():
                flag = row["name"].replace("_", "-")
                assert not ask("gpt2", f"--{flag}={choice}", "--format=csv")["err"].startswith(wrong.format(flag)), (
                    choice
                )


# --- `memplan web` -----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadingHTTPServer]:
    (tmp_path / "index.html").write_text("<p>page")
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), web.handler(Page({"/index.html": tmp_path / "index.html"}, form, answer))
    ) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def send(
    server: ThreadingHTTPServer, method: str, path: str, body: str | None = None, **headers: str
) -> tuple[int, str]:
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    with closing(HTTPConnection("127.0.0.1", server.server_port, timeout=60)) as connection:
        connection.request(method, path, body, named)
        response = connection.getresponse()
        assert "default-src 'none'" in (response.getheader("Content-Security-Policy") or "")
        return response.status, response.read().decode()


def test_the_server_has_the_page_the_form_and_answers(server: ThreadingHTTPServer) -> None:
    assert send(server, "GET", "/") == (200, "<p>page")
    assert json.loads(send(server, "GET", "/engine/engine.json")[1])["engine"] == "native"
    assert json.loads(send(server, "GET", "/engine/form.json")[1])["views"] == list(VIEWS)
    question = json.dumps({"words": ["gpt2", "--gpu=3090", "--format=csv"], "files": {}})
    status, text = send(server, "POST", "/engine/answer", question, Content_Type="application/json")
    assert (status, text) == (200, answer(question))


def test_the_server_answers_only_its_own_page(server: ThreadingHTTPServer) -> None:
    page, json_ = f"http://127.0.0.1:{server.server_port}", {"Content_Type": "application/json"}
    ask = ("POST", "/engine/answer", '{"words": [], "files": {}}')
    assert send(server, "GET", "/../pyproject.toml")[0] == 404
    assert send(server, "GET", "/", Host="evil.example")[0] == 403
    assert send(server, "GET", "/", Origin=page)[0] == 200
    assert send(server, *ask, **json_, Origin=page)[0] == 200
    assert send(server, *ask, **json_, Origin="http://evil.example")[0] == 403
    assert send(server, *ask, Content_Type="text/plain")[0] == 403
    assert send(server, "POST", "/", "{}", **json_)[0] == 404
    assert send(server, "POST", "/engine/answer", None, **json_, Content_Length=str(2**30))[0] == 413


def test_an_installation_without_the_page_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(page, "data_path", lambda name: tmp_path / name)
    with pytest.raises(MemplanError, match=r"^web: this installation has no page; run `npm ci && npm run build` in "):
        web.web({})


@pytest.mark.parametrize("port", [-1, 2**16])
def test_a_port_is_one(port: int) -> None:
    with pytest.raises(MemplanError, match=f"port: must be at least 0 and at most 65,535, not {port:,}"):
        web.web({"port": port})
