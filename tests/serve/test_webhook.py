"""Reviews of pods, as the API server asks for them: allowed, warned, denied, or with the memory filled in."""

from __future__ import annotations

import base64
import copy
import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

import memplan
from benchmarks.serve import server
from memplan.serve.settings import ReviewPolicy
from memplan.serve.webhook import MEMORY_FIELDS, reviewed, unanswered
from memplan.spec.run import RunSpec

HERE = Path(__file__).parent
LORA = {"model": "qwen2-0.5b", "method": "lora"}
FULL = {"model": "qwen2-7b", "method": "full"}
SERVES = ["--model", "Qwen/Qwen2-7B-Instruct", "--max-model-len", "4096"]


def pod(run: object = None, *, gpus: int = 1, **more: Any) -> dict[str, Any]:
    """Return a pod with a run in its annotation, if there is one."""
    container: dict[str, Any] = {"name": "main", "image": "python:3.12", "resources": {}}
    if gpus:
        container["resources"] = {"limits": {"nvidia.com/gpu": str(gpus)}}
    metadata: dict[str, Any] = {"name": "train", "namespace": "team"}
    if run is not None:
        metadata["annotations"] = {"memplan.dev/run": run if isinstance(run, str) else json.dumps(run)}
    spec = {"containers": [{**container, **more.pop("container", {})}], **more}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def review(asked: dict[str, Any], operation: str = "CREATE") -> dict[str, Any]:
    """Return a review as the API server sends it."""
    kind = {"group": "", "version": "v1", "kind": asked["kind"]}
    request = {
        "uid": "705ab4f5-6393-11e8-b7cc-42010a800002",
        "kind": kind,
        "resource": {"group": "", "version": "v1", "resource": "pods"},
        "requestKind": kind,
        "name": asked["metadata"]["name"],
        "namespace": "team",
        "operation": operation,
        "userInfo": {"username": "admin", "groups": ["system:masters"]},
        "object": None if operation == "DELETE" else asked,
        "oldObject": asked if operation == "DELETE" else None,
        "dryRun": False,
        "options": {"kind": "CreateOptions", "apiVersion": "meta.k8s.io/v1"},
    }
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": request}


def on(card: str, asked: dict[str, Any]) -> dict[str, Any]:
    asked["metadata"].setdefault("annotations", {})["memplan.dev/gpu"] = card
    return asked


def answered(client: httpx.Client, asked: dict[str, Any], **more: str) -> dict[str, Any]:
    """Return the response of a review over HTTP, which must be one for the API server."""
    found = client.post("/review", params={"timeout": "30s"}, json=review(asked, **more))
    assert found.status_code == 200, found.text
    body = found.json()
    assert {name: body[name] for name in ("apiVersion", "kind")} == {
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
    }
    response = body["response"]
    assert response.pop("uid") == "705ab4f5-6393-11e8-b7cc-42010a800002"
    return response


def patched(asked: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    """Return the object with the patch of a response applied; it only adds."""
    out = copy.deepcopy(asked)
    assert response["patchType"] == "JSONPatch"
    for operation in json.loads(base64.b64decode(response["patch"])):
        *path, last = (step.replace("~1", "/").replace("~0", "~") for step in operation["path"].split("/")[1:])
        inner: Any = out
        for step in path:
            inner = inner[int(step) if isinstance(inner, list) else step]
        assert operation["op"] == "add"
        inner[last] = operation["value"]
    return out


def test_a_run_that_fits_is_allowed_and_its_memory_filled_in(client: httpx.Client) -> None:
    asked = on("rtx-3090", pod(LORA))
    response = answered(client, asked)
    found = patched(asked, response)
    answer = memplan.estimate(memplan.RunSpec.model_validate({**LORA, "gpu": "3090"}))
    peak, top = -(-answer.bytes.used // 2**20), -(-answer.band.high // 2**20)
    assert (response["allowed"], "warnings" in response) == (True, False)
    limits = found["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"nvidia.com/gpu": "1", "nvidia.com/gpumem": top}
    annotations = found["metadata"]["annotations"]
    assert [annotations[f"memplan.dev/{name}-mib"] for name in ("peak", "margin")] == [str(peak), str(top - peak)]


def test_a_run_that_does_not_fit_is_denied(client: httpx.Client) -> None:
    response = answered(client, on("rtx-3090", pod(FULL)))
    assert (response["allowed"], response["status"]["code"], "patch" in response) == (False, 403, False)
    assert "does not fit rtx-3090; it takes" in response["status"]["message"]


def test_the_run_of_a_command_is_read(client: httpx.Client) -> None:
    image = {"image": "vllm/vllm-openai:v0.11.0", "args": SERVES}
    assert answered(client, pod(container=image))["allowed"]  # on the cluster's card, an L4
    sized = {**image, "args": [*SERVES, "--max-model-len", "32768", "--dtype", "float32"]}
    response = answered(client, pod(container=sized))
    assert not response["allowed"]
    assert "l4" in response["status"]["message"]


def test_the_cards_that_a_pod_may_run_on_are_those_it_selects(client: httpx.Client) -> None:
    product = "nvidia.com/gpu.product"
    assert not answered(client, pod(FULL, nodeSelector={product: "NVIDIA-L4"}))["allowed"]
    assert answered(client, pod(FULL, nodeSelector={product: "NVIDIA-B200"}))["allowed"]
    terms = [{"matchExpressions": [{"key": product, "operator": "In", "values": ["NVIDIA-L4", "NVIDIA-B200"]}]}]
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    by_type = pod(FULL)
    by_type["metadata"]["annotations"]["nvidia.com/use-gputype"] = "NVIDIA L4,NVIDIA B200"
    for asked in (pod(FULL, affinity={"nodeAffinity": required}), by_type):
        response = answered(client, asked)
        assert response["allowed"]
        assert ["does not fit l4" in text and "fits on b200" in text for text in response["warnings"]] == [True]


@pytest.mark.parametrize(
    "asked",
    [
        pod(),
        pod(gpus=0, container={"command": ["python", "app.py"]}),
        pod(container={"command": ["sleep", "infinity"]}),
        pod(container={"command": "not a list"}),
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}, "spec": {"ports": []}},
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [None, 1, {}]}},
    ],
)
def test_what_has_no_run_is_none_of_its_business(client: httpx.Client, asked: dict[str, Any]) -> None:
    assert answered(client, asked) == {"allowed": True}


def test_what_is_deleted_is_none_of_its_business(client: httpx.Client) -> None:
    assert answered(client, pod(FULL), operation="DELETE") == {"allowed": True}


@pytest.mark.parametrize("kind", ["Deployment", "Job", "CronJob"])
def test_the_template_of_pods_is_reviewed(client: httpx.Client, kind: str) -> None:
    template = on("rtx-3090", pod(LORA))
    asked: dict[str, Any] = {"template": {name: template[name] for name in ("metadata", "spec")}}
    asked = {"jobTemplate": {"spec": asked}} if kind == "CronJob" else asked
    asked = {"apiVersion": "batch/v1", "kind": kind, "metadata": {"name": "a"}, "spec": asked}
    found: Any = patched(asked, answered(client, asked))["spec"]
    inner = found["jobTemplate"]["spec"] if kind == "CronJob" else found
    assert inner["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpumem"] > 0


def test_what_a_person_wrote_stays(client: httpx.Client) -> None:
    asked = on("rtx-3090", pod(LORA, container={"resources": {"limits": {"nvidia.com/gpumem": 5}}}))
    assert patched(asked, answered(client, asked))["spec"] == asked["spec"]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"model": "qwen2-7x"}, "model: unknown name 'qwen2-7x'"),
        ({"model": "/etc/passwd"}, "is a path"),
        ({"model": {"config": {}}}, "model_type"),
        ("{", "not JSON"),
        ("- a\n- b", "must be a mapping"),
        ("base_model: Qwen/Qwen2-7B\nmicro_batch_size: 1\ndeepspeed: /etc/passwd\n", "there is no file"),
    ],
)
def test_a_run_that_cannot_be_read_is_told(client: httpx.Client, run: object, said: str) -> None:
    response = answered(client, on("rtx-3090", pod(run)))
    assert response["allowed"]
    assert [said in warning and len(warning) <= 256 for warning in response["warnings"]] == [True]


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"apiVersion": "admission.k8s.io/v1beta1", "kind": "AdmissionReview", "request": {"uid": "a"}},
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview"},
        {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {"uid": 3}},
    ],
)
def test_what_is_no_review_is_refused(client: httpx.Client, body: dict[str, Any]) -> None:
    found = client.post("/review", json=body)
    assert (found.status_code, found.json()["code"]) == (400, "invalid_review")


def test_a_policy_decides_what_is_denied() -> None:
    def response(run: object, card: str, **policy: Any) -> dict[str, Any]:
        asked = review(on(card, pod(run)))
        return reviewed(asked, ReviewPolicy(**policy), memplan.estimate)["response"]

    tight = {"model": "qwen2-7b", "method": "qlora", "batch": {"sequence": _tight()}}
    for run, name in ((FULL, "does_not_fit"), (tight, "tight"), ({"model": "nope"}, "unreadable")):
        found = {action: response(run, "rtx-3090", **{name: action}) for action in ("deny", "warn", "allow")}
        assert [each["allowed"] for each in found.values()] == [False, True, True]
        assert ["warnings" in each for each in found.values()] == [False, True, False]
    assert response(LORA, "3090")["allowed"]


def _tight() -> int:
    """Return a sequence length with which QLoRA of Qwen2-7B is tight on an RTX 3090."""
    low, high = 512, 65_536
    while low < high:
        middle = (low + high) // 2
        run = RunSpec.model_validate(
            {"model": "qwen2-7b", "method": "qlora", "gpu": "3090", "batch": {"sequence": middle}}
        )
        answer = memplan.estimate(run).verdict.answer
        if answer == "tight":
            return middle
        low, high = (middle + 1, high) if answer == "fits" else (low, middle)
    raise AssertionError("no length is tight")


def test_every_field_for_the_memory_is_filled_in() -> None:
    answer = memplan.estimate(memplan.RunSpec.model_validate({**LORA, "gpu": "3090"}))
    for name, field in MEMORY_FIELDS.items():
        asked = on("3090", pod(LORA))
        response = reviewed(review(asked), ReviewPolicy(memory=name), memplan.estimate)["response"]
        found = patched(asked, response)
        limits, annotations = found["spec"]["containers"][0]["resources"]["limits"], found["metadata"]["annotations"]
        said = limits.get(name, annotations.get(name))
        assert (name in limits, name in annotations) == (field.place == "limits", field.place == "annotations")
        assert 0 <= int(said) * field.unit - answer.band.high < 2 * 2**20


def test_a_review_without_an_answer_is_open_or_closed() -> None:
    request = review(pod(FULL))["request"]
    found = {
        action: unanswered(request, ReviewPolicy(unreadable=action), "late")["response"] for action in ("deny", "warn")
    }
    assert found["warn"] == {"uid": request["uid"], "allowed": True, "warnings": ["memplan cannot answer: late"]}
    assert (found["deny"]["allowed"], found["deny"]["status"]["code"]) == (False, 503)


def test_reviews_over_tls_are_answered_in_time_and_fail_closed() -> None:
    files = ("--certificate", str(HERE / "certificate.pem"), "--key", str(HERE / "key.pem"))
    trusted = ssl.create_default_context(cafile=str(HERE / "certificate.pem"))
    with server(*files, "--unreadable", "deny", "--workers", "1", command="webhook") as served:
        with httpx.Client(base_url=f"https://127.0.0.1:{served.port}", verify=trusted, timeout=60) as client:
            assert answered(client, on("rtx-3090", pod(LORA)))["allowed"]
            slow = on(
                ",".join(gpu.name for gpu in memplan.all_gpus()[:60]), pod({"model": "kimi-k3", "method": "full"})
            )
            late = client.post("/review", params={"timeout": "0.02s"}, json=review(slow)).json()["response"]
            assert (late["allowed"], late["status"]["code"]) == (False, 503)
            assert "no answer within" in late["status"]["message"]
        assert "Traceback" not in served.log.read_text()
