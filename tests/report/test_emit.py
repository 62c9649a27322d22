"""Documents for schedulers: every system's document is that of the golden file, in its units, or a line that refuses.

The golden files are read by eye and checked against what each system has: `kubernetes-validate` and `dstack` where they
are installed (a test each, skipped without them).
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from yaml import safe_load, safe_load_all

from memplan import MemplanError, RunSpec, estimate, find_gpu
from memplan.catalogue.hardware.gpus import all_gpus
from memplan.cli.app import app
from memplan.cli.estimate import SYSTEMS as NAMED
from memplan.core.units import MIB
from memplan.report.emit import SYSTEMS, emit
from memplan.report.emit.products import PRODUCTS

GOLDEN = Path(__file__).parents[1] / "golden" / "emit"
RUN = RunSpec(model="qwen2-7b", method="qlora")
SERVED = RunSpec(model="qwen3-8b", task="generate", profile="vllm")
GPUS = ("3090", "l4", "a100-80gb")
ANSWERS = [estimate(RUN, gpu=gpu) for gpu in GPUS]
LIMIT = -(-max(answer.most for answer in ANSWERS) // MIB)
KUBERNETES = ("kubernetes", "dra", "hami", "volcano", "kai", "runai", "kueue")
YAML = (*KUBERNETES, "production-stack", "kaito", "skypilot", "dstack")


def written(system: str, **how: Any) -> str:
    return emit(system, [estimate(SERVED, gpu="h100")] if system == "production-stack" else ANSWERS, **how)


def command(*words: str) -> int:
    """Return the exit code of a command line."""
    with pytest.raises(SystemExit) as left:
        get_command(app).main(list(words))
    assert isinstance(left.value.code, int)
    return left.value.code


def cases() -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name, system in SYSTEMS.items():
        found += [(name, {}), (name, {"patch": True})]
        found += [(name, {"share": True})] if system.shares else []
    return found


@pytest.mark.parametrize(("system", "how"), cases(), ids=str)
def test_what_a_system_takes_is_the_golden_file(system: str, how: dict[str, Any]) -> None:
    text = written(system, **how)
    golden = GOLDEN / ("-".join([system, *how]) + ".txt")
    assert text == golden.read_text("utf-8")
    assert text.endswith("\n")
    assert "&id" not in text


def test_every_system_is_an_option() -> None:
    assert tuple(SYSTEMS) == NAMED
    assert {path.stem for path in GOLDEN.iterdir()} == {"-".join([system, *how]) for system, how in cases()}


@pytest.mark.parametrize("system", YAML)
def test_peak_and_margin_of_one_gpu_are_written(system: str) -> None:
    text = written(system)
    answers = [estimate(SERVED, gpu="h100")] if system == "production-stack" else ANSWERS
    most = max(answers, key=lambda answer: answer.most)
    peak = -(-most.bytes.used // MIB)
    assert re.search(rf"peak(-mib: '| ){peak}\b", text)
    assert re.search(r"margin(-mib: '| )\d+\b", text)
    assert list(safe_load_all(text))


def test_memory_is_in_each_systems_unit_and_an_integer() -> None:
    [hami] = safe_load_all(written("hami"))
    limits = hami["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpumem"] == LIMIT
    [volcano] = safe_load_all(written("volcano"))
    limits = volcano["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["volcano.sh/vgpu-memory"] == -(-LIMIT * MIB // 10**6)
    [kai] = safe_load_all(written("kai", share=True))
    assert kai["spec"]["template"]["metadata"]["annotations"]["gpu-memory"] == str(LIMIT)
    claim, job = safe_load_all(written("dra"))
    [request] = claim["spec"]["spec"]["devices"]["requests"]
    assert f"quantity('{LIMIT}Mi')" in request["exactly"]["selectors"][0]["cel"]["expression"]
    assert (
        job["spec"]["template"]["spec"]["resourceClaims"][0]["resourceClaimTemplateName"] == claim["metadata"]["name"]
    )
    options = ast.literal_eval(written("ray", share=True).partition("OPTIONS = ")[2])
    smallest = min(find_gpu(gpu).usable for gpu in GPUS)
    assert options["num_gpus"] * smallest >= LIMIT * MIB > (options["num_gpus"] - 0.01) * smallest
    assert isinstance(options["memory"], int)


def test_gpus_are_named_and_only_those_that_hold_the_run() -> None:
    [job] = safe_load_all(emit("kubernetes", [estimate(RUN)]))
    affinity = job["spec"]["template"]["spec"]["affinity"]["nodeAffinity"]
    [term] = affinity["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    products, memory = term["matchExpressions"]
    assert products["values"]
    for product in products["values"]:
        assert estimate(RUN, gpu=product).verdict.answer == "fits", product
    assert memory["operator"] == "Gt"
    for system, share in (("hami", False), ("volcano", False), ("dra", False), ("kai", True), ("runai", True)):
        text = " ".join(emit(system, [estimate(RUN)], share=share).split()).replace("-", " ")
        assert all(product.replace("-", " ") in text for product in products["values"]), system
    big = [RunSpec(model="qwen2-7b", method="lora", batch={"micro": 8}).model_copy(update={"gpu": "a100-80gb"})]
    assert safe_load(emit("skypilot", [estimate(big[0])]))["resources"]["accelerators"] == {"A100-80GB": 1}


def test_a_label_names_its_gpu() -> None:
    known = {gpu.name for gpu in all_gpus()}
    for name, row in PRODUCTS.items():
        assert name in known
        assert find_gpu(row.label).name == find_gpu(row.nvml).name == name
        assert re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])", row.label)


def test_a_mig_instance_is_a_resource_of_its_own() -> None:
    answer = estimate(RUN, gpu="a100-80gb:3g.40gb")
    [job] = safe_load_all(emit("kubernetes", [answer]))
    pod = job["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/mig-3g.40gb"] == 1
    assert "affinity" not in pod
    claim, _ = safe_load_all(emit("dra", [answer]))
    assert "'3g.40gb'" in str(claim)


def test_a_site_names_its_types_and_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site = {"types": {"a100-80gb": "a100"}, "features": {"3090": "gpu24", "l4": "gpu24"}}
    assert "--gpus-per-node=a100:1\n" in emit("slurm", ANSWERS[2:], site=site)
    assert '--constraint="gpu24"\n' in emit("slurm", ANSWERS[:2], site=site)
    file = tmp_path / "cluster.toml"
    file.write_text('[types]\n"a100-80gb" = "a100"\n')
    asked = "qwen2-7b", "--method", "qlora", "--gpu", "a100-80gb", "--emit", "slurm", "--site", str(file)
    assert command(*asked) == 0
    file.write_text("types = [")
    assert command(*asked) == 2
    assert "cannot be read (Invalid value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "run", "how", "line"),
    [
        ("hami", {"gpu": "mi300x"}, {}, "emit: hami asks for NVIDIA's GPUs, and mi300x is AMD's; use slurm or ray"),
        ("kubernetes", RUN, {"share": True}, "share: kubernetes cannot ask for part of a GPU; hami, volcano, kai"),
        (
            "modal",
            {"gpu": "rtx-2080-ti", "method": "qlora", "model": "qwen2-0.5b"},
            {},
            "emit: modal has no name known",
        ),
        ("hami", {"gpu": "a100:3g.40gb"}, {}, "emit: hami cannot ask for a MIG instance; kubernetes, dra, slurm can"),
        ("kubernetes", {"method": "full"}, {}, "emit: the run does not surely fit rtx-3090: it needs up to 63.18 GiB"),
        ("production-stack", {}, {}, "emit: production-stack serves with vLLM, not transformers-5; set --profile vllm"),
        ("kaito", {"model": "qwen2-0.5b", "method": "full"}, {}, "emit: kaito tunes with lora and qlora only"),
        ("k8s", {}, {}, "emit: unknown name 'k8s'; did you mean"),
        ("slurm", {}, {"site": {"types": {"h100": "h"}}}, "site: names none of the GPUs that hold the run: rtx-3090"),
        ("slurm", {}, {"site": {"types": "h"}}, "site.types: must be a table of names"),
        (
            "kai",
            {"method": "lora", "parallelism": {"world": 2, "strategy": "fsdp2"}},
            {"share": True},
            "share: applies to one GPU, and the run is on 2",
        ),
        (
            "hami",
            {"method": "lora", "parallelism": {"world": 16, "strategy": "fsdp2"}},
            {},
            "emit: a pod has the GPUs of one machine, and 16 need several of 8",
        ),
    ],
)
def test_what_a_system_cannot_say_is_refused_in_a_line(system: str, run: Any, how: Any, line: str) -> None:
    run = RUN.model_validate({**dict(RUN), "gpu": "3090", **dict(run)}) if isinstance(run, dict) else run
    with pytest.raises(MemplanError) as caught:
        emit(system, [estimate(run)], **how)
    assert str(caught.value).startswith(line)


def _patched(document: dict[str, Any]) -> dict[str, Any]:
    """Return an object, or the Deployment or ConfigMap that a patch is of."""
    if "kind" in document:
        return document
    if "data" in document:
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "run"}, **document}
    document["spec"]["template"]["spec"]["containers"][0]["image"] = "image"
    spec = {**document["spec"], "selector": {"matchLabels": {"app": "run"}}}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "run"}, "spec": spec}


@pytest.mark.parametrize("patch", [False, True])
def test_objects_follow_the_schema_of_kubernetes(patch: bool) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for system in (*KUBERNETES, "kaito"):
        for document in safe_load_all(written(system, patch=patch)):
            if "kueue" in document.get("apiVersion", ""):
                continue  # a custom resource, of which Kubernetes has no schema
            validate.validate(_patched(document), "1.37", strict=True)


def test_a_task_is_read_by_dstack() -> None:
    configurations = pytest.importorskip("dstack._internal.core.models.configurations")
    task = configurations.parse_run_configuration(safe_load(written("dstack")))
    assert task.resources.gpu.count.min == 1


def test_the_command_writes_a_plans_first_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("plan", "qwen2-7b", "--gpu", "3090", "--emit", "hami", "--patch") == 0
    limits = safe_load(capsys.readouterr().out)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpumem"] * MIB <= find_gpu("3090").usable
    assert command("qwen2-7b", "--gpu", "3090", "--patch") == 2
    assert "patch (--patch): only applies with --emit" in capsys.readouterr().err
    assert command("qwen2-7b", "--gpu", "3090", "--emit", "hami") == 1
