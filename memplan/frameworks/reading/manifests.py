"""Commands of containers and tasks: of Docker Compose's services, Kubernetes' pods, KubeAI's models, and SkyPilot's and
dstack's tasks.

Source: Kubeflow's training-operator and trainer; KubeAI's Model of kubeai.org/v1; SkyPilot 0.14.1 utils/schemas.py,
skylet/constants.py; dstack 0.22.5 core/models/configurations.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import SpecError
from memplan.core.machines import find_machine
from memplan.core.records import NamedTuple
from memplan.frameworks.reading.container_images import entry_point, image_version
from memplan.frameworks.reading.shell import Launched, Programs, launched, visible
from memplan.frameworks.reading.shell_commands import resolved, variables_of
from memplan.spec.file import documents_of

_EXPANSION = re.compile(r"\$\((\w+)\)")  # as Kubernetes writes ${NAME}
_GPU = "/gpu"  # nvidia.com/gpu, amd.com/gpu
_TRAIN_JOB = ("spec", "trainer")
_COUNT = re.compile(r":\s*[\"']?(\d{1,4})\b(?![.\w])")  # H100:8, {H100: 8}, 24GB:2, 8


class Container(NamedTuple):
    """The command of a container.

    text       its command, as a shell's
    variables  its environment
    line       line of the command
    path       path of the container in its document
    document   number of the document in its file
    """

    text: str
    variables: Mapping[str, str]
    line: int
    path: tuple[str, ...] = ()
    document: int = 0


def command_of(text: str, name: str, programs: Programs, folder: Path | None = None) -> tuple[Launched, Container]:
    """Return the first command in a file that trains or serves, and its container. Raises SpecError if there is none.

    name    the file's name in messages
    folder  where `.env` and other files of variables are
    """
    skipped: SpecError | None = None
    for document, (values, lines) in enumerate(documents_of(text, name)):
        for container in containers(values, lines, folder):
            try:
                command = launched(container.text, name, programs, container.variables, container.line)
            except SpecError as error:
                skipped = skipped or error
                continue
            return command, container._replace(document=document)
    raise skipped or SpecError(f"spec: {name} has no container with a command, or with an image that is known", "spec")


def containers(
    values: Mapping[str, Any], lines: Mapping[tuple[str, ...], int], folder: Path | None = None
) -> Iterator[Container]:
    """Yield the commands in a document, in its order. A Compose file's variables are those of `.env` in its folder."""
    shared: dict[str, str] | None = None
    script = _script(values)
    if script:
        line = next((lines[(key,)] for key in ("run", "commands") if (key,) in lines), 0)
        yield Container(script, _of_task(values), line)
    for path, inner in _mappings(values, ()):
        is_service = len(path) > 1 and path[-2] == "services"
        is_pod = (len(path) > 1 and path[-2] == "containers") or (
            path == _TRAIN_JOB and values.get("kind") == "TrainJob"
        )
        if path == ("spec",) and values.get("kind") == "Model" and inner.get("engine") == "VLLM":
            name = str(inner.get("url")).removeprefix("hf://")
            yield Container(f"vllm serve {shlex.quote(name)} {_text(inner.get('args'))}", {}, lines.get(path, 0), path)
        if path == ("spec",) and values.get("kind") == "RayJob":
            yield Container(_text(inner.get("entrypoint")), {}, lines.get((*path, "entrypoint"), 0), path)
        if not (is_service or is_pod):
            continue
        entry = inner.get("entrypoint" if is_service else "command")
        first = shlex.join(entry_point(str(inner.get("image", "")))) if entry is None else _text(entry)
        text = f"{first} {_text(inner.get('command' if is_service else 'args'))}".strip()
        keys = ("command", "args", "entrypoint", "image")
        line = next((lines[(*path, key)] for key in keys if (*path, key) in lines and inner.get(key) is not None), 0)
        text = text.replace("$$", "$") if is_service else text  # as Compose writes a variable of the container
        if text:
            shared = variables_of(".env", folder) if shared is None and is_service and folder is not None else shared
            own = {name: " ".join(resolved(value, shared or {})) for name, value in _environment(inner, folder).items()}
            own |= image_version(str(inner.get("image", "")))
            yield Container(text, {**(shared or {}), **_of_operator(values), **own}, line, path)


def _script(values: Mapping[str, Any]) -> str:
    """Return the script of a SkyPilot or dstack task, which asks for resources; empty if it is none."""
    said: object = values.get("run", values.get("commands")) if "resources" in values else None
    if isinstance(said, list):
        return "\n".join(map(str, cast("list[Any]", said)))
    return said if isinstance(said, str) else ""


def _of_task(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a SkyPilot or dstack task: its own, and those that say its nodes and their GPUs."""
    resources = _section(values, "resources")
    asked: object = resources.get("accelerators", resources.get("gpu"))
    machine = find_machine(str(resources.get("instance_type")))
    # the fewest, if several kinds of GPUs will do
    gpus = machine.cards if machine else min(map(int, _COUNT.findall(f":{asked}")), default=1)
    nodes, ranks = str(values.get("num_nodes", values.get("nodes", 1))), str(gpus)
    own = {**_environment({"env": values.get("env", values.get("envs"))}, None), **visible(gpus)}
    names = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NUM_GPUS_PER_NODE": ranks, "DSTACK_NODES_NUM": nodes}
    return {**own, **names, "DSTACK_GPUS_PER_NODE": ranks}


def _of_operator(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables that Kubeflow sets in each pod of a job for torchrun.

    Source: Kubeflow's training-operator for PyTorchJob; its trainer's torch plugin, EnforceMLPolicy, for TrainJob.
    """
    spec = _section(values, "spec")
    trainer = _section(spec, "trainer" if values.get("kind") == "TrainJob" else "")
    replicas = _section(spec, "pytorchReplicaSpecs")
    counts: list[Any] = [_section(replicas, name).get("replicas", 1) for name in replicas]
    counts += [trainer.get("numNodes", 1)] if trainer else []
    if not counts or not all(isinstance(count, int) for count in counts):
        return {}
    pods, ranks = str(sum(counts)), str(spec.get("nprocPerNode", trainer.get("numProcPerNode", "auto")))
    return {"PET_NNODES": pods, "PET_NPROC_PER_NODE": ranks, "NNODES": pods, "WORLD_SIZE": pods}


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value: object = values.get(name)
    return cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {}


def _mappings(inner: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield each mapping inside, and its path."""
    if isinstance(inner, Mapping):
        mapping = cast("Mapping[str, Any]", inner)
        yield path, mapping
        for key, value in mapping.items():
            yield from _mappings(value, (*path, key))
    elif isinstance(inner, list):
        for index, value in enumerate(cast("list[Any]", inner)):
            yield from _mappings(value, (*path, str(index)))


def _text(words: object) -> str:
    """Return a command as a shell's: it is written as text, or as a list of words."""
    if isinstance(words, list):
        words = shlex.join(str(word) for word in cast("list[Any]", words))
    return _EXPANSION.sub(r"${\1}", words) if isinstance(words, str) else ""


def _environment(container: Mapping[str, Any], folder: Path | None) -> dict[str, str]:
    """Return the variables of a container, those of its files first, with the GPUs it gets as those that it sees."""
    said: object = container.get("environment", container.get("env"))
    files: object = container.get("env_file")
    out: dict[str, str] = {}
    for file in cast("list[Any]", files) if isinstance(files, list) else [files]:
        path = cast("Mapping[str, Any]", file).get("path") if isinstance(file, Mapping) else file
        out |= variables_of(path, folder) if isinstance(path, str) and folder is not None else {}
    if isinstance(said, Mapping):
        out |= {str(name): str(value) for name, value in cast("Mapping[str, Any]", said).items() if value is not None}
    for item in cast("list[Any]", said) if isinstance(said, list) else ():
        if isinstance(item, Mapping):
            pair = cast("Mapping[str, Any]", item)
            out |= {str(pair["name"]): str(pair["value"])} if {"name", "value"} <= pair.keys() else {}
        else:
            name, equals, value = str(item).partition("=")
            out |= {name: value} if equals else {}
    if any(inner.get("count") == "all" for path, inner in _mappings(container, ()) if "devices" in path):
        out.setdefault("NVIDIA_VISIBLE_DEVICES", "all")
    ids = out.get("NVIDIA_VISIBLE_DEVICES", "").split(",")
    gpus = next((count for count in _gpus(container) if count > 0), len(ids) * all(map(str.isdecimal, ids)))
    return {**visible(gpus), **out}


def _gpus(container: Mapping[str, Any]) -> Iterator[int]:
    """Yield how many GPUs a container gets, as a manifest and as a Compose file write it."""
    for path, inner in _mappings(container, ()):
        if path[-1:] in (("limits",), ("requests",)):
            yield from (int(count) for key, count in inner.items() if key.endswith(_GPU) and str(count).isdecimal())
        if len(path) > 1 and path[-2] in ("devices", "gpus"):
            ids: object = inner.get("device_ids")
            yield len(cast("list[Any]", ids)) if isinstance(ids, list) else 0
            yield int(inner["count"]) if str(inner.get("count", "")).isdecimal() else 0
