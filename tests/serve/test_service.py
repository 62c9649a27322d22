"""The service, over HTTP: its answers are the library's, and what is wrong has a status, a code and a field."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import httpx
import jsonschema
import pytest

import memplan
from benchmarks.serve import Served, attack, hostile, server
from memplan.cli import page
from memplan.cli.plain import run_plain
from memplan.core.errors import MemplanError
from memplan.report import listing
from memplan.report.schema import run_schema
from memplan.serve import operations
from memplan.serve import server as starting
from memplan.serve.app import Service
from memplan.serve.endpoints import ENDPOINTS
from memplan.serve.messages import Question
from memplan.serve.openapi import openapi
from memplan.serve.page import Page
from memplan.serve.settings import ServerSettings
from memplan.serve.workers import Workers
from tests.sampling import examples

RUN = {"model": "qwen2-7b", "method": "qlora", "gpu": "3090"}
AXOLOTL = "base_model: Qwen/Qwen2-7B\nmicro_batch_size: 1\nsequence_len: 1024\n"


def test_an_answer_is_the_librarys(client: httpx.Client) -> None:
    answered = client.post("/v1/estimate", json=RUN)
    assert (answered.status_code, answered.headers["content-type"]) == (200, "application/json")
    assert answered.json() == json.loads(memplan.estimate(memplan.RunSpec.model_validate(RUN)).model_dump_json())
    assert client.post("/v1/estimate", json=RUN).content == answered.content


def test_parts_and_figures_of_an_answer_are_asked_for_alone(client: httpx.Client) -> None:
    full = client.post("/v1/estimate", json=RUN).json()
    parts = client.post("/v1/estimate?fields=verdict.answer,bytes.allocated,parameters", json=RUN).json()
    assert parts == {
        "verdict": {"answer": full["verdict"]["answer"]},
        "bytes": {"allocated": full["bytes"]["allocated"]},
        "parameters": full["parameters"],
    }


def test_each_of_many_runs_has_its_answer_or_its_problem(client: httpx.Client) -> None:
    found = client.post("/v1/estimates", json={"runs": [RUN, {"model": "qwen2-7x"}, 3, RUN]}).json()["answers"]
    assert [each.get("problem", {}).get("field") for each in found] == [None, "model", "run", None]
    assert found[0] == found[3] == client.post("/v1/estimate", json=RUN).json()


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/v1/estimate", {"model": "qwen2-7x"}, (422, "unknown_name", "model")),
        ("/v1/estimate", {**RUN, "gpu": "3091"}, (422, "unknown_name", "gpu")),
        ("/v1/estimate", {**RUN, "batch": {"micro": "one"}}, (422, "invalid_value", "batch.micro")),
        ("/v1/estimate", {**RUN, "batchsize": 1}, (422, "unknown_field", "batchsize")),
        ("/v1/estimate", {}, (422, "missing_field", "model")),
        ("/v1/estimate", {"model": "/etc/passwd"}, (422, "unreadable", "model")),
        ("/v1/estimate", {"model": "./config.json"}, (422, "unreadable", "model")),
        ("/v1/estimate", {"model": "an-owner/a-model"}, (422, "model_not_available", "model")),
        ("/v1/estimate", {"model": {"config": {"model_type": "nope"}}}, (422, "unsupported_model", "model_type")),
        ("/v1/estimate?fields=verdct", RUN, (422, "unknown_name", "fields")),
        ("/v1/estimates", {"run": RUN}, (422, "invalid_run", "runs")),
        ("/v1/estimates", {"runs": [RUN] * 1001}, (422, "invalid_run", "runs")),
        ("/v1/plan", {"run": {"model": "qwen2-7b"}}, (422, "invalid_run", "run.gpu")),
        ("/v1/plan", {"run": RUN, "mode": "fits"}, (422, "invalid_value", "mode")),
        ("/v1/plan", {"run": RUN, "mode": "nodes", "nodes": 2}, (422, "invalid_run", "gpus")),
        ("/v1/plan", {"run": {**RUN, "batch": {"micro": 0}}}, (422, "invalid_value", "run.batch.micro")),
        ("/v1/check", {"files": {}, "gpu": ["3090"]}, (422, "invalid_run", "files")),
        ("/v1/check", {"files": {"a.yaml": AXOLOTL}, "gpu": []}, (422, "invalid_run", "gpu")),
        ("/v1/check", {"files": {"a.yaml": AXOLOTL}, "gpu": ["3090"], "runs": ["b"]}, (422, "unknown_name", "runs")),
        ("/v1/fits", {"run": RUN, "pool": ["3091"]}, (422, "unknown_name", "pool")),
        ("/v1/place", {"jobs": [RUN], "pool": []}, (422, "invalid_run", "pool")),
        ("/v1/place", {"jobs": [RUN], "pool": [{"gpu": "t4", "count": 2**40}]}, (422, "invalid_run", "pool")),
        ("/v1/place", {"jobs": [RUN] * 1001, "pool": ["t4"]}, (422, "invalid_run", "jobs")),
        ("/v1/place", {"jobs": [{}], "pool": ["t4"]}, (422, "missing_field", "jobs.0.run")),
        ("/v1/place", {"jobs": [RUN, {"run": RUN, "gpu": 1}], "pool": ["t4"]}, (422, "unknown_field", "jobs.1.gpu")),
        (
            "/v1/place",
            {"jobs": [RUN], "pool": ["t4", {"gpu": "t4", "count": 0}]},
            (422, "invalid_value", "pool.1.count"),
        ),
        ("/v1/nothing", RUN, (404, "no_such_address", None)),
        ("/v1/gpus", RUN, (405, "wrong_method", None)),
    ],
)
def test_what_is_wrong_has_a_status_a_code_and_a_field(
    client: httpx.Client, path: str, body: object, expected: tuple[int, str, str | None]
) -> None:
    answered = client.post(path, json=body)
    problem = answered.json()
    assert (answered.status_code, problem["code"], problem.get("field")) == expected
    assert answered.headers["content-type"] == "application/problem+json"
    assert problem["status"] == answered.status_code
    assert "\n" not in problem["detail"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"{", (400, "invalid_json")),
        (b"", (400, "invalid_json")),
        (b"[1]", (400, "invalid_json")),
        (b"\xff", (400, "invalid_json")),
        (b'{"model": "a", "model": "b"}', (400, "invalid_json")),
        (b'{"model": NaN}', (400, "invalid_json")),
        (b'{"model": 1%b}' % (b"0" * 5000), (400, "invalid_json")),
        (b'{"model":' * 65 + b"1" + b"}" * 65, (400, "too_deep")),
        (b"[" * 100_000, (400, "invalid_json")),
        (b" " * (2**20 + 1), (413, "too_large")),
    ],
)
def test_a_body_that_is_no_question_is_refused(client: httpx.Client, content: bytes, expected: tuple[int, str]) -> None:
    answered = client.post("/v1/estimate", content=content, headers={"content-type": "application/json"})
    assert (answered.status_code, answered.json()["code"]) == expected


def test_a_body_of_another_type_is_refused(client: httpx.Client) -> None:
    answered = client.post("/v1/estimate", data={"model": "qwen2-7b"})
    assert (answered.status_code, answered.json()["code"]) == (415, "not_json")


def test_which_gpus_hold_a_run_and_where_jobs_go(client: httpx.Client) -> None:
    run = {"model": "qwen2-7b", "method": "qlora"}
    found = client.post("/v1/fits", json={"run": run, "pool": ["t4", "3090"]}).json()
    assert found["fits"] == [
        {"gpu": fit.gpu.name, "answer": fit.answer, "refusal": fit.refusal}
        for fit in memplan.fits(memplan.RunSpec.model_validate(run), ["t4", "3090"])
    ]
    _follows("/v1/fits", found)
    assert len(client.post("/v1/fits", json={"run": run}).json()["fits"]) == len(memplan.all_gpus())
    jobs, pool = [{"run": run, "name": "a"}, {**run, "method": "full"}], ["2x 3090", {"gpu": "l4", "shared": True}]
    placed = client.post("/v1/place", json={"jobs": jobs, "pool": pool}).json()
    assert placed == json.loads(json.dumps(memplan.place(jobs, pool).as_dict()))
    assert ([job["name"] for job in placed["placed"]], [job["job"] for job in placed["pending"]]) == (["a"], [1])
    _follows("/v1/place", placed)


@pytest.mark.parametrize("mode", ["fit", "max", "ladder", "advise", "buy", "nodes"])
def test_a_plan_of_every_mode_follows_its_schema(client: httpx.Client, mode: str) -> None:
    run = {"model": "qwen2-0.5b", "method": "lora", "gpu": None if mode == "buy" else "3090"}
    cluster = {"nodes": 2, "gpus": 2} if mode == "nodes" else {}
    answered = client.post("/v1/plan", json={"run": run, "mode": mode, "most": 3, **cluster})
    assert answered.status_code == 200, answered.text
    _follows("/v1/plan", answered.json())


def test_a_serving_run_is_planned(client: httpx.Client) -> None:
    run = {"model": "qwen2-0.5b", "task": "generate", "profile": "vllm", "gpu": "l4"}
    _follows("/v1/plan", client.post("/v1/plan", json={"run": run}).json())


def test_files_are_checked_as_they_are_given(client: httpx.Client) -> None:
    files = {"a.yaml": f"{AXOLOTL}deepspeed: ds/zero.json\n", "ds/zero.json": '{"zero_optimization": {"stage": 3}}'}
    found = client.post("/v1/check", json={"files": files, "gpu": ["3090", "h100"], "gpus": 8}).json()
    assert [(row["run"], row["gpu"], row["status"]) for row in found["runs"]] == [
        ("a.yaml", "rtx-3090", "over"),
        ("a.yaml", "h100-sxm", "fits"),
    ]
    assert found["runs"][0]["fields"]["parallelism"]["strategy"] == "zero3"
    _follows("/v1/check", found)


@pytest.mark.parametrize("name", ["/etc/hostname", "../pyproject.toml", "pyproject.toml"])
def test_a_file_of_this_machine_is_never_read(client: httpx.Client, name: str) -> None:
    files = {"a.yaml": f"{AXOLOTL}deepspeed: {name}\n", "b.sh": f"trl sft --config {name}\n", "c.json": '{"model": 1}'}
    found = client.post("/v1/check", json={"files": files, "gpu": ["3090"], "runs": ["a.yaml", "b.sh"]}).json()
    assert [row["status"] for row in found["runs"]] == ["wrong", "wrong"]
    assert not found["fits"]
    assert all("there is no file" in row["error"] for row in found["runs"])


def test_lists_and_schemas_are_the_commands(client: httpx.Client) -> None:
    for name, text, listed in (("gpus", "3090", listing.cards), ("models", "qwen3", listing.models)):
        assert client.get(f"/v1/{name}", params={"text": text}).json() == json.loads(listed(text, True))
    assert client.get("/v1/schema", params={"of": "run"}).json() == run_schema()


described = cache(openapi)


def _follows(path: str, answer: object, method: str = "post") -> None:
    """Check an answer by the schema that OpenAPI has for it."""
    content = described()["paths"][path][method]["responses"]["200"]["content"]["application/json"]
    jsonschema.Draft202012Validator({**content["schema"], "components": described()["components"]}).validate(answer)


def test_openapi_describes_what_is_served(client: httpx.Client) -> None:
    assert client.get("/v1/openapi.json").json() == described()
    assert described()["paths"].keys() == {each.path for each in ENDPOINTS}
    for schema in described()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    _follows("/v1/estimate", client.post("/v1/estimate", json=RUN).json())
    _follows("/v1/estimates", client.post("/v1/estimates", json={"runs": [RUN, {}]}).json())
    method = described()["components"]["schemas"]["RunSpec"]["properties"]["method"]
    assert method["anyOf"][1] == run_schema()["properties"]["method"]["anyOf"][1]


def test_the_page_is_served_next_to_the_api(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>page")
    settings = ServerSettings(page=Page({"/index.html": tmp_path / "index.html"}, page.form, page.answer))
    text = json.dumps({"words": ["config.json", "--format=csv"], "files": {"config.json": "{}"}})
    reply = operations.answer(Question("page", "", text.encode()), settings)
    assert json.loads(reply.content) == json.loads(page.answer(text))
    workers = Workers(lambda question: operations.answer(question, settings), 1, 1, True)

    async def got(path: str) -> httpx.Response:
        transport = httpx.ASGITransport(Service(settings, workers).app())
        async with httpx.AsyncClient(transport=transport, base_url="http://memplan") as client:
            return await client.get(path)

    sent = asyncio.run(got("/"))
    assert (sent.text, sent.headers["content-type"]) == ("<p>page", "text/html; charset=utf-8")
    assert "default-src 'none'" in sent.headers["content-security-policy"]
    assert asyncio.run(got("/engine/engine.json")).json()["engine"] == "native"
    assert asyncio.run(got("/engine/answer")).status_code == 405


def test_health_readiness_and_metrics(client: httpx.Client) -> None:
    client.post("/v1/estimate", json={"model": "no"})
    assert [client.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    metrics = client.get("/metrics").text
    for line in (
        'memplan_requests_total{endpoint="/v1/estimate",status="422"}',
        'memplan_problems_total{code="unknown_name"}',
        'memplan_worker_restarts{reason="late"}',
    ):
        assert line in metrics


def test_the_log_has_no_bodies(served: Served, client: httpx.Client) -> None:
    client.post("/v1/estimate", json={"model": "a-secret-name"})
    client.get("/a-secret-path?key=a-secret-key")
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    last = [line for line in lines if line["event"] == "request"][-2:]
    assert [(line["path"], line["status"], line.get("code")) for line in last] == [
        ("/v1/estimate", 422, "unknown_name"),
        ("other", 404, "no_such_address"),
    ]
    assert "secret" not in served.log.read_text()


def test_hostile_requests_get_no_5xx_and_no_trace(served: Served, client: httpx.Client) -> None:
    statuses = [(each.kind, attack(served.port, each)) for each in hostile(examples(110), seed=1)]
    assert [(kind, status) for kind, status in statuses if status >= 500] == []
    assert "Traceback" not in served.log.read_text()
    assert client.post("/v1/estimate", json=RUN).status_code == 200


def test_a_question_that_takes_too_long_costs_only_its_own_process() -> None:
    with server("--workers", "1", "--seconds", "0.3") as served:
        address = f"http://127.0.0.1:{served.port}"
        runs = [
            {"model": "qwen2-7b", "method": "full", "gpu": "h100", "batch": {"sequence": n}} for n in range(1, 1001)
        ]
        late = httpx.post(f"{address}/v1/estimates", json={"runs": runs}, timeout=60)
        assert (late.status_code, late.json()["code"]) == (422, "time_limit")
        small = httpx.post(f"{address}/v1/estimate?fields=parameters", json={"model": "qwen2-7b"}, timeout=60)
        assert small.status_code == 200
        assert 'memplan_worker_restarts{reason="late"} 1.0' in httpx.get(f"{address}/metrics").text


def test_what_was_asked_is_answered_before_the_server_ends() -> None:
    runs = [{"model": "qwen2-7b", "method": "full", "gpu": "h100", "batch": {"sequence": n}} for n in range(1, 301)]
    with server("--workers", "1", "--warm", "qwen2-7b") as served, ThreadPoolExecutor(2) as asking:
        address = f"http://127.0.0.1:{served.port}"
        asked = [
            asking.submit(httpx.post, f"{address}/v1/estimates", json={"runs": part}, timeout=60)
            for part in (runs[:200], runs[200:])
        ]
        while "memplan_waiting_requests 1.0" not in httpx.get(f"{address}/metrics").text:
            assert not all(each.done() for each in asked)
        os.kill(served.pid, signal.SIGTERM)
        assert [each.result().status_code for each in asked] == [200, 200]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("serve", "--workers", "0"), "must be at least 1 and at most 1,024, not 0"),
        (("serve", "--seconds", "0"), "must be more than 0 and at most 3,600, not 0"),
        (("serve", "--port", "70000"), "must be at least 0 and at most 65,535, not 70,000"),
        (("serve", "--key", "a.pem"), "--certificate and --key need each other"),
        (("serve", "--host", "256.1.1.1"), "256.1.1.1:8808 cannot be listened on"),
        (("serve", "--port", "0", "--warm", "qwen2-7x"), "unknown name 'qwen2-7x'"),
        (("webhook", "--tight", "maybe"), "unknown name 'maybe'"),
        (("webhook", "--gpu", "3091"), "unknown name '3091'"),
    ],
)
def test_a_wrong_setting_is_one_line(words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, printed = run_plain(words), capsys.readouterr()
    assert (code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert line in printed.err


def test_without_the_extra_a_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("uvicorn", "memplan.serve.app", "memplan.serve.connection"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MemplanError, match=r"uvicorn is not installed: pip install 'memplan\[serve\]'"):
        starting.serve(ServerSettings())


def test_nothing_but_the_server_imports_the_extra() -> None:
    code = (
        "import sys, memplan; from memplan.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*{'starlette', 'uvicorn', 'httptools', 'prometheus_client', 'memplan.serve'} & sys.modules.keys())"
    )
    words = [sys.executable, "-c", code, "qwen2-7b", "--json"]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == ""
