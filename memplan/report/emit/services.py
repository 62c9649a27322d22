"""Schedulers outside Kubernetes' own objects: Slurm, Ray, SkyPilot, dstack, Modal, and the values of two charts.

Sources: slurm 25.05 sbatch(1); ray 2.48 remote_function options; skypilot 0.14.1 utils/schemas.py; dstack 0.22.5
_internal/core/models/resources.py; Modal 1.6.4 `function(gpu=, memory=)`; vllm-project/production-stack
helm/values.schema.json; kaito-project/kaito@056b8280b api/v1beta1/tuning_config_validation.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import refused
from memplan.core.units import GIB, MIB
from memplan.report.emit import Ask, nothing_named
from memplan.report.emit.products import names_in
from memplan.resolve.communicators import NODE

_GB = 10**9


def _comment(asked: Ask) -> str:
    margin = asked.limit - asked.peak
    return f"# Per GPU: peak {asked.peak} MiB, margin {margin} MiB. memplan.\n"


def _host_gb(asked: Ask) -> int:
    return -(-asked.host * MIB // _GB)


def slurm(asked: Ask) -> str:
    """The lines of an sbatch header. Types and features are a site's own, from its file."""
    nodes = -(-asked.count // (asked.answer.run.parallelism.gpus_per_node or NODE))
    each = -(-asked.count // nodes)
    types, features = _section(asked, "types"), _section(asked, "features")
    of_type = dict.fromkeys(types[gpu.name] for gpu in asked.gpus if gpu.name in types)
    with_feature = dict.fromkeys(features[gpu.name] for gpu in asked.gpus if gpu.name in features)
    if (types or features) and not of_type and not with_feature:
        raise refused("site", f"names none of the GPUs that hold the run: {', '.join(g.name for g in asked.gpus[:4])}")
    typed = f"{next(iter(of_type))}:" if len(of_type) == 1 else ""
    lines = [f"--nodes={nodes}", f"--gpus-per-node={typed}{each}", f"--mem={asked.host}M"]
    if with_feature and not typed:
        lines.append(f'--constraint="{"|".join(with_feature)}"')
    lines.append(f"--comment=memplan:peak={asked.peak}MiB/gpu,margin={asked.limit - asked.peak}MiB/gpu")
    note = "" if types or features else f"# GPUs that hold it: {', '.join(gpu.name for gpu in asked.gpus)}\n"
    return ("" if asked.patch else "#!/bin/bash\n") + "".join(f"#SBATCH {line}\n" for line in lines) + note


def _section(asked: Ask, name: str) -> Mapping[str, str]:
    """Return a section of the site's file, by ids of the table. Raises SpecError, UnknownNameError."""
    from memplan.catalogue.hardware.gpus import find_gpu

    section: object = asked.site.get(name, {})
    values = cast(Mapping[str, object], section) if isinstance(section, Mapping) else None
    if values is None or not all(isinstance(value, str) for value in values.values()):
        raise refused(f"site.{name}", 'must be a table of names, as in "a100-80gb" = "a100"')
    return {find_gpu(gpu).name: str(value) for gpu, value in values.items()}


def ray(asked: Ask) -> str:
    """Options of a task or an actor; a fraction is of the smallest GPU, and nothing enforces it."""
    fraction = -(-asked.limit * MIB * 100 // min(gpu.usable for gpu in asked.gpus)) / 100
    options: dict[str, Any] = {"num_gpus": fraction if asked.shared else asked.count, "memory": asked.host * MIB}
    names = names_in("ray", asked.gpus, asked.limit * MIB)
    if len(names) == 1:
        options["accelerator_type"] = names[0]
    note = "" if len(names) == 1 else f"# GPUs that hold it: {', '.join(names or [gpu.name for gpu in asked.gpus])}\n"
    body = "".join(f"    {name!r}: {value!r},\n" for name, value in options.items()).replace("'", '"')
    use = "" if asked.patch else "# @ray.remote(**OPTIONS)\n"
    return f"{_comment(asked)}{note}{use}OPTIONS = {{\n{body}}}\n"


def skypilot(asked: Ask) -> str:
    names = names_in("sky", asked.gpus, asked.limit * MIB)
    if not names:
        raise nothing_named("skypilot", asked)
    resources = {"accelerators": dict.fromkeys(names, asked.count), "memory": f"{-(-asked.host * MIB // GIB)}+"}
    return _commented(asked, {"resources": resources} if asked.patch else _named(asked, {"resources": resources}))


def dstack(asked: Ask) -> str:
    names = names_in("dstack", asked.gpus)
    if not names:
        raise nothing_named("dstack", asked)
    least = min(int(gpu.memory_gb) for gpu in asked.gpus)
    gpu = {"vendor": "nvidia", "name": list(names), "memory": f"{least}GB..", "count": asked.count}
    resources = {"gpu": gpu, "memory": f"{_host_gb(asked)}GB.."}
    task = {"type": "task", "name": asked.name, "commands": ["python train.py"], "resources": resources}
    return _commented(asked, {"resources": resources} if asked.patch else task)


def modal(asked: Ask) -> str:
    names = names_in("modal", asked.gpus, asked.limit * MIB)
    if not names:
        raise nothing_named("modal", asked)
    wanted = [f"{name}:{asked.count}" if asked.count > 1 else name for name in names]
    gpu = f'"{wanted[0]}"' if len(wanted) == 1 else "[" + ", ".join(f'"{name}"' for name in wanted) + "]"
    head = "" if asked.patch else f'import modal\n\napp = modal.App("{asked.name}")\n\n\n'
    call = f"@app.function(gpu={gpu}, memory={asked.host})\n"
    return f"{_comment(asked)}{head}{call}" + ("" if asked.patch else "def train() -> None: ...\n")


def production_stack(asked: Ask) -> str:
    """Helm values of vLLM's production stack."""
    run = asked.answer.run
    if not run.profile.startswith("vllm"):
        raise refused("emit", f"production-stack serves with vLLM, not {run.profile}; set --profile vllm")
    s = run.serving
    engine: dict[str, object] = {
        "gpuMemoryUtilization": s.memory_utilization,
        "maxModelLen": s.max_model_len,
        "maxNumSeqs": s.max_num_seqs,
        "tensorParallelSize": run.parallelism.tp,
        "dtype": {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[run.precision.weights],
    }
    model: dict[str, Any] = {
        "name": asked.name,
        "modelURL": asked.repository,
        "replicaCount": 1,
        "requestMemory": f"{asked.host}Mi",
        "requestGPU": asked.count,
        "annotations": asked.notes,
        **({"requestGPUMem": str(asked.limit)} if asked.shared else {}),
        "vllmConfig": {name: value for name, value in engine.items() if value is not None},
    }
    return _commented(asked, {"servingEngineSpec": {"modelSpec": [model]}})


def kaito(asked: Ask) -> str:
    """The MiB of one GPU by method and model, as KAITO's `TuningPerGPUMemoryRequirement` has them, in a ConfigMap."""
    run = asked.answer.run
    if run.task != "train" or run.method.kind not in ("lora", "qlora"):
        raise refused("emit", "kaito tunes with lora and qlora only; set --method to one of them")
    from yaml import safe_dump

    table = safe_dump({run.method.kind: {str(asked.answer.asked.model): asked.limit}})
    data = {"tuning-per-gpu-memory-mib": table}
    if asked.patch:
        return _commented(asked, {"data": data})
    metadata = {"name": "memplan-tuning-memory", "annotations": asked.notes}
    return _commented(asked, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data})


def _named(asked: Ask, task: dict[str, Any]) -> dict[str, Any]:
    return {"name": asked.name, **task, "run": "python train.py"}


def _commented(asked: Ask, document: dict[str, Any]) -> str:
    from yaml import safe_dump

    return _comment(asked) + safe_dump(document, sort_keys=False, width=120)
