"""Kubernetes, and what schedules on it: a Job that asks for GPUs, or the patch of a workload's pod template.

Sources, read at the commits named: kubernetes 1.37 (resource.k8s.io/v1); NVIDIA/k8s-dra-driver-gpu@22407113
test/e2e (memory and productName by CEL); Project-HAMi/HAMi@4707fb02 pkg/device/nvidia/device.go (plain integers of MiB,
and GPUs whose name contains one of those listed); volcano-sh/devices docs (vgpu-memory in MB), volcano-sh/volcano
pkg/scheduler/api/devices/nvidia/vgpu (the same list of GPUs); kai-scheduler/KAI-Scheduler@72de64fc docs/gpu-sharing
(annotation in MiB).
"""

from __future__ import annotations

from typing import Any

from memplan.core.errors import refused
from memplan.core.units import MIB
from memplan.report.emit import Ask
from memplan.report.emit.products import names_in
from memplan.resolve.communicators import NODE

_IMAGE = "REGISTRY/IMAGE"  # of the training script, which memplan does not know
_MOST_INT32 = 2**31 - 1


def kubernetes(asked: Ask) -> str:
    """Whole GPUs of the products that hold the run, or a MIG instance, which is a resource of its own."""
    if asked.mig:
        return _written(asked, {f"nvidia.com/mig-{asked.mig}": asked.count})
    return _written(asked, {"nvidia.com/gpu": asked.count}, spec=_affinity(asked))


def hami(asked: Ask) -> str:
    """A GPU's memory in whole MiB, which HAMi holds the container to."""
    if asked.limit > _MOST_INT32:
        raise refused("emit", f"nvidia.com/gpumem is at most {_MOST_INT32:,} MiB, not {asked.limit:,}")
    return _written(asked, {"nvidia.com/gpu": asked.count, "nvidia.com/gpumem": asked.limit}, notes=_types(asked))


def volcano(asked: Ask) -> str:
    """A GPU's memory in MB."""
    megabytes = -(-asked.limit * MIB // 10**6)
    resources = {"volcano.sh/vgpu-number": asked.count, "volcano.sh/vgpu-memory": megabytes}
    return _written(asked, resources, notes=_types(asked), spec={"schedulerName": "volcano"})


def _types(asked: Ask) -> dict[str, str]:
    """Return the annotation that names the GPUs: another one may take more, and the container is held to the memory."""
    names = names_in("nvml", asked.gpus)
    return {"nvidia.com/use-gputype": ",".join(names)} if names else {}


def kai(asked: Ask) -> str:
    """Whole GPUs, or a GPU's memory in an annotation, which KAI does not hold the container to."""
    return _by_annotation(asked, "kai-scheduler", {"kai.scheduler/queue": "default"})


def runai(asked: Ask) -> str:
    """The same annotation for Run:ai's scheduler."""
    return _by_annotation(asked, "runai-scheduler", {})


def _by_annotation(asked: Ask, scheduler: str, labels: dict[str, str]) -> str:
    spec = {"schedulerName": scheduler, **_affinity(asked)}
    if asked.shared:
        return _written(asked, {}, notes={"gpu-memory": str(asked.limit)}, labels=labels, spec=spec)
    return _written(asked, {"nvidia.com/gpu": asked.count}, labels=labels, spec=spec)


def kueue(asked: Ask) -> str:
    """A suspended Job for a queue, and a flavor for each product that holds it."""
    labels = {"kueue.x-k8s.io/queue-name": "default"}
    job = _written(asked, {"nvidia.com/gpu": asked.count}, labels=labels, suspend=True)
    flavors = [
        {
            "apiVersion": "kueue.x-k8s.io/v1beta1",
            "kind": "ResourceFlavor",
            "metadata": {"name": product.lower()},
            "spec": {"nodeLabels": {"nvidia.com/gpu.product": product}},
        }
        for product in names_in("label", asked.gpus)
    ]
    return job if asked.patch else "---\n".join([*map(_yaml, flavors), job])


def dra(asked: Ask) -> str:
    """A claim template for GPUs with that much memory, and a Job that claims from it."""
    if asked.mig:
        selectors = [f"device.attributes['gpu.nvidia.com'].profile == '{asked.mig}'"]
        device = "mig.nvidia.com"
    else:
        memory = f"quantity('{asked.limit}Mi')"
        selectors = [f"device.capacity['gpu.nvidia.com'].memory.compareTo({memory}) >= 0"]
        names = names_in("nvml", asked.gpus)
        selectors += [f"device.attributes['gpu.nvidia.com'].productName in {list(names)}"] if names else []
        device = "gpu.nvidia.com"
    exactly = {
        "deviceClassName": device,
        "allocationMode": "ExactCount",
        "count": asked.count,
        "selectors": [{"cel": {"expression": expression}} for expression in selectors],
    }
    claim = {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "ResourceClaimTemplate",
        "metadata": {"name": asked.name, "annotations": asked.notes},
        "spec": {"spec": {"devices": {"requests": [{"name": "gpu", "exactly": exactly}]}}},
    }
    spec = {"resourceClaims": [{"name": "gpu", "resourceClaimTemplateName": asked.name}]}
    job = _written(asked, {}, spec=spec, claims=[{"name": "gpu"}])
    return f"{_yaml(claim)}---\n{job}"


def _affinity(asked: Ask) -> dict[str, Any]:
    """Return the node affinity for GPUs by name: sizes as sold do not tell a GPU of 22.2 GiB from one of 23.7."""
    products = names_in("label", asked.gpus)
    terms: list[dict[str, Any]] = [{"key": "nvidia.com/gpu.memory", "operator": "Gt", "values": [str(asked.limit)]}]
    if products:
        terms.insert(0, {"key": "nvidia.com/gpu.product", "operator": "In", "values": list(products)})
    selector = {"nodeSelectorTerms": [{"matchExpressions": terms}]}
    return {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": selector}}}


def _written(
    asked: Ask,
    resources: dict[str, int],
    *,
    notes: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    spec: dict[str, Any] | None = None,
    claims: list[dict[str, str]] | None = None,
    suspend: bool = False,
) -> str:
    """Return a Job, or the patch of a workload with a pod template and a container `main`.

    Raises SpecError for more GPUs than a machine has: a Job's pod runs on one.
    """
    most = asked.answer.run.parallelism.gpus_per_node or NODE
    if asked.count > most:
        raise refused("emit", f"a pod has the GPUs of one machine, and {asked.count:,} need several of {most:,}")
    limits = {**resources, "memory": f"{asked.host}Mi"}
    container: dict[str, Any] = {"name": "main"}
    if not asked.patch:
        container["image"] = _IMAGE
    claimed = {"claims": claims} if claims else {}
    container["resources"] = {"limits": limits, "requests": {"memory": limits["memory"]}, **claimed}
    metadata = {"annotations": {**asked.notes, **(notes or {})}, **({"labels": labels} if labels else {})}
    pod: dict[str, Any] = {**(spec or {}), "containers": [container]}
    if asked.patch:
        return _yaml({"spec": {"template": {"metadata": metadata, "spec": pod}}})
    job = {"suspend": True} if suspend else {}
    named: dict[str, Any] = {"name": asked.name, **({"labels": labels} if labels else {})}
    template = {"metadata": metadata, "spec": {"restartPolicy": "Never", **pod}}
    return _yaml(
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": named, "spec": {**job, "template": template}},
    )


def _yaml(document: dict[str, Any]) -> str:
    from yaml import SafeDumper, dump

    class Dumper(SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return dump(document, Dumper=Dumper, sort_keys=False, width=120)
