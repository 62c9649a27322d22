"""Reviews of pods for a Kubernetes API server, as AdmissionReview v1: allow, warn, deny, or fill in the memory.

Source: k8s.io/api/admission/v1 types.go (AdmissionRequest, AdmissionResponse), RFC 6902 for patches.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import MemplanError, SpecError, UnknownNameError, printable
from memplan.core.files import given_files
from memplan.core.records import NamedTuple
from memplan.core.units import MIB, gib
from memplan.estimate.answer import Estimate
from memplan.frameworks.reading.manifests import containers
from memplan.frameworks.reading.run_file import RunFile, read_container, read_run
from memplan.resolve.request import errors_of, spec_of
from memplan.serve.problems import RequestError
from memplan.serve.settings import ReviewPolicy
from memplan.spec.run import RunSpec

VERSION = "admission.k8s.io/v1"
RUN, GPU = "memplan.dev/run", "memplan.dev/gpu"  # annotations with a run as JSON or YAML, and with its cards
PEAK, MARGIN = "memplan.dev/peak-mib", "memplan.dev/margin-mib"
_PRODUCT = "nvidia.com/gpu.product"  # label of a node; Source: NVIDIA/gpu-feature-discovery README
_TYPES = "nvidia.com/use-gputype"  # annotation for HAMi and Volcano; Source: as of `MEMORY_FIELDS`
_OF_GPUS = ("nvidia.com/", "amd.com/gpu", "volcano.sh/vgpu")  # beginnings of the resources of a pod with GPUs


class MemoryField(NamedTuple):
    """Where a system reads the memory of each GPU, a container's `limits` or the pod's `annotations`, and its unit.

    Source: Project-HAMi/HAMi pkg/device/nvidia/device.go; volcano-sh/devices docs; KAI-Scheduler docs/gpu-sharing.
    """

    place: str
    unit: int = MIB


MEMORY_FIELDS = {
    "nvidia.com/gpumem": MemoryField("limits"),
    "volcano.sh/vgpu-memory": MemoryField("limits", 10**6),
    "gpu-memory": MemoryField("annotations"),
}
_MOST_WARNING = 256  # characters that the API server passes on
_TEMPLATES = (("spec", "jobTemplate", "spec", "template"), ("spec", "template"), ())


class ReviewedPod(NamedTuple):
    """A pod, or the template of one, inside an object: the path to it, and its parts."""

    path: tuple[str, ...]
    metadata: Mapping[str, Any]
    spec: Mapping[str, Any]

    @property
    def annotations(self) -> Mapping[str, Any]:
        return _mapping(self.metadata, "annotations")


def reviewed(
    body: Mapping[str, Any], policy: ReviewPolicy, estimated: Callable[[RunSpec], Estimate], query: str = ""
) -> dict[str, Any]:
    """Return the review of an object: a pod, or one with a pod's template. Raises RequestError if it is no review.

    query  the request's, in which the API server says its timeout; the server that calls has heeded it
    """
    del query
    request = request_of(body)
    try:
        response = _reviewed(request, policy, estimated)
    except MemplanError as error:
        response = _as_told(policy.unreadable, f"memplan cannot answer: {error}", 422)
    return response_of(request, response)


def request_of(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the request of a review. Raises RequestError."""
    request = _mapping(body, "request")
    if body.get("apiVersion") != VERSION or body.get("kind") != "AdmissionReview":
        raise RequestError(400, "invalid_review", f"apiVersion: must be an AdmissionReview of {VERSION}", "apiVersion")
    if not isinstance(request.get("uid"), str) or not request["uid"]:
        raise RequestError(400, "invalid_review", "request.uid: must be the review's id", "request.uid")
    return request


def response_of(request: Mapping[str, Any], response: Mapping[str, Any]) -> dict[str, Any]:
    return {"apiVersion": VERSION, "kind": "AdmissionReview", "response": {"uid": request["uid"], **response}}


def unanswered(request: Mapping[str, Any], policy: ReviewPolicy, reason: str) -> dict[str, Any]:
    """Return the review of a pod that was not answered, as the policy has it."""
    return response_of(request, _as_told(policy.unreadable, f"memplan cannot answer: {reason}", 503))


def _as_told(action: str, text: str, code: int) -> dict[str, Any]:
    """Return a response that denies, warns, or does neither."""
    if action == "deny":
        return {"allowed": False, "status": {"status": "Failure", "code": code, "message": text}}
    return {"allowed": True, **({"warnings": [_short(text)]} if action == "warn" else {})}


def _short(text: str) -> str:
    return text if len(text) <= _MOST_WARNING else f"{text[: _MOST_WARNING - 3]}..."


def _reviewed(
    request: Mapping[str, Any], policy: ReviewPolicy, estimated: Callable[[RunSpec], Estimate]
) -> dict[str, Any]:
    pod = _pod_in(_mapping(request, "object"))
    if pod is None or request.get("operation") == "DELETE":
        return {"allowed": True}
    fields = _run_of(pod)
    if fields is None:
        return {"allowed": True}
    cards = tuple(_cards_of(pod, fields, policy))
    if not cards:
        text = f"gpu: no card is named; annotate the pod with {GPU}, or select {_PRODUCT}"
        raise SpecError(text, "gpu")
    answers = [estimated(RunSpec.model_validate({**fields, "gpu": card})) for card in cards]
    response = _judged(answers, policy)
    patches = [*_patched(pod, answers, policy)] if response["allowed"] else []
    if patches:
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(json.dumps(patches).encode()).decode()}
    return response


def _pod_in(kubernetes_object: Mapping[str, Any]) -> ReviewedPod | None:
    """Return the pod that an object is, or makes; None if it makes none."""
    for path in _TEMPLATES:
        inner = _mapping(kubernetes_object, *path)
        spec = _mapping(inner, "spec")
        if isinstance(spec.get("containers"), list):
            return ReviewedPod(path, _mapping(inner, "metadata"), spec)
    return None


def _run_of(pod: ReviewedPod) -> dict[str, Any] | None:
    """Return the fields of a pod's run: of its annotation, or of the command of a container with GPUs.

    None if it has no annotation, and no such container trains or serves.
    """
    said: object = pod.annotations.get(RUN)
    if said is not None:
        if not isinstance(said, str):
            raise SpecError(f"{RUN}: must be text, a run as JSON or YAML", RUN)
        name = f"{RUN}.json" if said.lstrip().startswith("{") else f"{RUN}.yaml"
        with given_files({name: said}):
            return _fields_of(read_run(name))
    with_gpus = (each for each in _mappings(pod.spec, "containers") if _has_gpu(each))
    for container in containers({"containers": {str(n): each for n, each in enumerate(with_gpus)}}, {}):
        file = read_container(container, "the container's command")
        if file is not None:
            return _fields_of(file)
    return None


def _fields_of(file: RunFile) -> dict[str, Any]:
    with errors_of(file):
        return spec_of({}, file.fields, keeps_strategy=not file.is_own)


def _has_gpu(container: Mapping[str, Any]) -> bool:
    return any(name.startswith(_OF_GPUS) for name in _mapping(container, "resources", "limits"))


def _cards_of(pod: ReviewedPod, fields: Mapping[str, Any], policy: ReviewPolicy) -> Iterator[str]:
    """Yield the cards that the pod may run on: of its annotation, its run, those it selects, or the policy."""
    said: object = pod.annotations.get(GPU, fields.get("gpu"))
    if said is not None:
        yield from (find_gpu(name.strip()).name for name in str(said).split(",") if name.strip())
        return
    products = [*_products(pod.spec), *filter(None, map(str.strip, str(pod.annotations.get(_TYPES, "")).split(",")))]
    unknown: UnknownNameError | None = None
    known: list[str] = []
    for product in products:
        try:
            known.append(find_gpu(product).name)
        except UnknownNameError as error:
            unknown = error
    if unknown is not None and not known:
        raise unknown
    yield from dict.fromkeys(known or policy.gpus)


def _products(spec: Mapping[str, Any]) -> Iterator[str]:
    """Yield the products that a pod selects by its nodes' labels."""
    said: object = _mapping(spec, "nodeSelector").get(_PRODUCT)
    if isinstance(said, str):
        yield said
    required = _mapping(spec, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    for term in _mappings(required, "nodeSelectorTerms"):
        for expression in _mappings(term, "matchExpressions"):
            if expression.get("key") == _PRODUCT and expression.get("operator") == "In":
                values: object = expression.get("values")
                yield from (str(value) for value in cast(list[Any], values if isinstance(values, list) else []))


def _judged(answers: list[Estimate], policy: ReviewPolicy) -> dict[str, Any]:
    """Return the response: denied if no card holds the run, warned if one of several does not."""
    order = ("fits", "tight", "does not fit", "does not start")
    best = min(answers, key=lambda answer: order.index(answer.verdict.answer or "fits"))
    worst = max(answers, key=lambda answer: order.index(answer.verdict.answer or "fits"))
    action = {"fits": "allow", "tight": policy.tight}.get(best.verdict.answer or "fits", policy.does_not_fit)
    if action == "allow" and worst.verdict.answer != best.verdict.answer and len(answers) > 1:
        return _as_told("warn", f"{_sentence(worst)}; it {best.verdict.answer} on {_name(best)}", 403)
    return _as_told(action, _sentence(best), 403)


def _name(answer: Estimate) -> str:
    assert answer.gpu is not None
    return f"{answer.gpu.count} x {answer.gpu.name}" if answer.gpu.count > 1 else answer.gpu.name


def _sentence(answer: Estimate) -> str:
    """Return the verdict in words: what it needs of each GPU, and what the card has."""
    assert answer.gpu is not None
    verdict = answer.verdict
    if verdict.reason is not None:
        return f"memplan: the run does not start on {_name(answer)}: {printable(verdict.reason, 160)}"
    needs = f"it takes {gib(answer.bytes.used)} of each GPU's {gib(answer.gpu.usable)}"
    words = {"fits": "the run fits", "tight": "the run may run out of memory on"}
    return f"memplan: {words.get(verdict.answer or '', 'the run does not fit')} {_name(answer)}; {needs}"


def _patched(pod: ReviewedPod, answers: list[Estimate], policy: ReviewPolicy) -> Iterator[dict[str, Any]]:
    """Yield the operations of a patch that fills in the memory: the upper end of the expected range, on any card."""
    if not policy.memory:
        return
    top = max(answers, key=lambda answer: answer.band.high)
    peak = -(-top.bytes.used // MIB)
    needed = -(-max(top.band.high, top.bytes.used) // MIB)
    said = {PEAK: str(peak), MARGIN: str(needed - peak)}
    field = MEMORY_FIELDS[policy.memory]
    amount = -(-needed * MIB // field.unit)
    if field.place == "annotations":
        said[policy.memory] = str(amount)
    yield from _filled((*pod.path, "metadata"), pod.metadata, "annotations", said)
    if field.place != "limits":
        return
    for index, container in enumerate(cast(list[Any], pod.spec["containers"])):
        if isinstance(container, Mapping) and _has_gpu(cast(Mapping[str, Any], container)):
            limits = _mapping(cast(Mapping[str, Any], container), "resources", "limits")
            if policy.memory not in limits:  # what a person wrote stays
                yield _added(
                    (*pod.path, "spec", "containers", str(index), "resources", "limits", policy.memory), amount
                )
            return


def _filled(
    path: tuple[str, ...], within: Mapping[str, Any], name: str, values: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the operations that add values to a mapping, which may not be there."""
    if not isinstance(within.get(name), Mapping):
        yield _added((*path, name), dict(values))
        return
    yield from (_added((*path, name, key), value) for key, value in values.items())


def _added(path: tuple[str, ...], value: object) -> dict[str, Any]:
    steps = (step.replace("~", "~0").replace("/", "~1") for step in path)
    return {"op": "add", "path": f"/{'/'.join(steps)}", "value": value}


def _mapping(value: object, *path: str) -> Mapping[str, Any]:
    """Return a mapping inside; an empty one if it is not there, or something else."""
    for name in path:
        value = cast(Mapping[str, Any], value).get(name) if isinstance(value, Mapping) else None
    return cast(Mapping[str, Any], value) if isinstance(value, Mapping) else {}


def _mappings(value: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    items: object = value.get(name)
    for item in cast(list[Any], items) if isinstance(items, list) else ():
        if isinstance(item, Mapping):
            yield cast(Mapping[str, Any], item)
