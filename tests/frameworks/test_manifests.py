"""Docker Compose files and Kubernetes manifests: the command of a container is the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memplan.core.errors import SpecError
from memplan.frameworks.reading.run_file import RunFile, read_run

SERVED = """
services:
  proxy:
    image: nginx
    command: ["nginx", "-g", "daemon off;"]
  llm:
    image: vllm/vllm-openai:v0.12.0
    command: >
      --model Qwen/Qwen2-7B
      --max-model-len 8192
"""
TRAINED = """
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
---
apiVersion: batch/v1
kind: Job
spec:
  template:
    spec:
      containers:
        - {name: side, image: busybox, command: [sleep, "1"]}
        - name: train
          image: me/train:1
          env: [{name: LEN, value: "512"}, {name: TOKEN, valueFrom: {secretKeyRef: {name: a, key: b}}}]
          command: ["/bin/bash", "-c"]
          args:
            - |
              pip install trl
              accelerate launch --num_processes 2 sft.py --model_name_or_path Qwen/Qwen2-7B \\
                --dataset_name mine --max_length $(LEN) --lora_r ${RANK}
"""


def read(tmp_path: Path, text: str, name: str = "compose.yaml") -> RunFile:
    (tmp_path / name).write_text(text, "utf-8")
    return read_run(str(tmp_path / name))


def test_a_service_is_the_run_that_it_starts(tmp_path: Path) -> None:
    file = read(tmp_path, SERVED)
    assert file.headline == "compose.yaml: vLLM 0.12.0, by compose.yaml:8 vllm serve"
    assert file.fields["profile"] == "vllm-0.11"  # the newest that is not newer than the image
    other = SERVED.replace("command: >", "entrypoint: trl sft\n    command: >").replace(
        "model Qwen", "model_name_or_path Qwen"
    )
    assert read(tmp_path, other.replace("max-model-len", "dataset_name a --max_length")).headline.startswith(
        "compose.yaml: TRL 1.16"
    )
    assert file.fields["serving"] == {"max_model_len": 8192}
    assert {o.field: o.why for o in file.origins}["serving.max_model_len"] == "compose.yaml:8 max_model_len"


def test_a_container_of_a_manifest_is_the_run_that_it_starts(tmp_path: Path) -> None:
    file = read(tmp_path, TRAINED, "job.yml")
    assert (file.framework, file.fields["batch"]["sequence"], file.fields["parallelism"]["world"]) == ("trl", 512, 2)
    assert file.notes == ("--lora_r (job.yml:16): a variable that is not set",)


def test_variables_of_files_are_part_of_the_environment(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MODEL=Qwen/Qwen2-7B\nLEN=512\n", "utf-8")
    (tmp_path / "more.env").write_text("SEQS=8\nUTIL=0.5\n", "utf-8")
    file = read(
        tmp_path,
        "services:\n  a:\n    image: vllm/vllm-openai\n    env_file: [more.env, {path: none.env, required: false}]\n"
        "    environment: {LONGEST: '${LEN}', UTIL: 0.7}\n    command: --model $MODEL --max-model-len ${LONGEST} "
        "--max-num-seqs $SEQS --gpu-memory-utilization $UTIL\n",
    )
    serving = {"max_model_len": 512, "max_num_seqs": 8, "memory_utilization": 0.7}
    assert (file.fields["model"], file.fields["serving"], file.unread) == ("Qwen/Qwen2-7B", serving, ())


CASES: dict[str, dict[str, Any]] = {
    "services:\n  a:\n    image: ghcr.io/huggingface/text-generation-inference:3\n    environment: {MODEL_ID: a, "
    "MAX_TOTAL_TOKENS: 4096}\n    deploy: {resources: {reservations: {devices: [{count: 2}]}}}": {
        "parallelism.tp": 2,
        "serving.max_model_len": 4096,
    },
    "services:\n  a:\n    image: ghcr.io/ggml-org/llama.cpp:server-cuda\n    command: -m a -c 2048 -np 1\n    "
    "environment: [LLAMA_ARG_UBATCH_SIZE=128]": {
        "serving.max_model_len": 2048,
        "serving.max_num_batched_tokens": 128,
    },
    "services:\n  a:\n    image: b\n    entrypoint: [vllm, serve]\n    command: [a, --max-num-seqs, '8']": {
        "serving.max_num_seqs": 8
    },
    "apiVersion: v1\nspec: {containers: [{image: 'vllm/vllm-openai', args: [--model, a, -tp, '2'], "
    "resources: {limits: {nvidia.com/gpu: 2}}}]}": {"parallelism.tp": 2, "parallelism.world": 2},
}

_SFT = "sft.py, --model_name_or_path, Qwen/Qwen2-7B, --dataset_name, mine"
_LIMITS = "{limits: {nvidia.com/gpu: 4}}"
CASES |= {
    "apiVersion: v1\nkind: PyTorchJob\nspec: {pytorchReplicaSpecs: {Worker: {replicas: 2}, Master: {replicas: 1, "
    f"template: {{spec: {{containers: [{{command: [torchrun, {_SFT}], resources: {_LIMITS}}}]}}}}}}}}}}": {
        "parallelism.world": 3 * 4
    },
    "apiVersion: trainer.kubeflow.org/v1alpha1\nkind: TrainJob\nspec: {trainer: {numNodes: 2, numProcPerNode: 2, "
    f"command: [torchrun, {_SFT}], resourcesPerNode: {_LIMITS}}}}}": {"parallelism.world": 2 * 2},
    "apiVersion: ray.io/v1\nkind: RayJob\nspec: {entrypoint: 'torchrun --nproc_per_node 2 sft.py --dataset_name mine "
    "--model_name_or_path Qwen/Qwen2-7B'}": {"parallelism.world": 2},
    "resources: {accelerators: 'H100:4'}\nnum_nodes: 2\nenvs: {LEN: 512}\nrun: |\n  cd a\n  torchrun --nnodes "
    "$SKYPILOT_NUM_NODES --nproc_per_node $SKYPILOT_NUM_GPUS_PER_NODE sft.py --model_name_or_path Qwen/Qwen2-7B "
    "--dataset_name mine --max_length $LEN": {"parallelism.world": 2 * 4, "batch.sequence": 512},
    "resources: {accelerators: {A100-80GB: 8}}\nrun: vllm serve a -tp $SKYPILOT_NUM_GPUS_PER_NODE": {
        "parallelism.tp": 8
    },
    "type: task\nenv: [MODEL=Qwen/Qwen2-7B]\ncommands:\n  - pip install trl\n  - accelerate launch sft.py "
    "--model_name_or_path $MODEL --dataset_name mine\nresources: {gpu: '24GB:2'}": {"parallelism.world": 2},
    "resources: {gpu: {name: H100, memory: 80GB, count: 4}}\ncommands: [vllm serve a -tp $DSTACK_GPUS_PER_NODE]": {
        "parallelism.tp": 4
    },
    "resources: {instance_type: p4d.24xlarge}\nrun: vllm serve a -tp $SKYPILOT_NUM_GPUS_PER_NODE": {
        "parallelism.tp": 8
    },
    "resources: {accelerators: [A100:8, 'H100:8']}\nrun: vllm serve a -tp $SKYPILOT_NUM_GPUS_PER_NODE": {
        "parallelism.tp": 8
    },
    "apiVersion: kubeai.org/v1\nkind: Model\nspec: {url: 'hf://Qwen/Qwen2-7B', engine: VLLM, "
    "args: [--max-num-seqs, '8']}": {
        "model": "Qwen/Qwen2-7B",
        "serving.max_num_seqs": 8,
    },
    f"services: {{a: {{gpus: [{{count: 2}}], command: [accelerate, launch, {_SFT}]}}}}": {"parallelism.world": 2},
    f"services: {{a: {{environment: {{NVIDIA_VISIBLE_DEVICES: '1,3'}}, command: [accelerate, launch, {_SFT}]}}}}": {
        "parallelism.world": 2
    },
}


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_images_and_environments_are_part_of_the_command(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    found = {origin.field: origin.value for origin in read(tmp_path, text).origins}
    assert {field: found.get(field) for field in expected} == expected


def test_all_gpus_are_said_not_to_be_known(tmp_path: Path) -> None:
    devices = "deploy: {resources: {reservations: {devices: [{count: all}]}}}"
    note = "several GPUs, and no number of processes: one is counted; add --gpus"
    text = f"services:\n  a:\n    command: [accelerate, launch, {_SFT}]\n    {devices}"
    assert read(tmp_path, text).notes == (f"NVIDIA_VISIBLE_DEVICES (compose.yaml:3): {note}",)
    counted = f"services: {{a: {{{devices}, command: [accelerate, launch, --num_processes, 2, {_SFT}]}}}}"
    assert read(tmp_path, counted).notes == ()


REFUSED = {
    "services: {a: {image: nginx}}": "spec: compose.yaml has no container with a command, or with an image",
    "resources: {}\nrun: [1]": "compose.yaml does not train or serve",
    "resources: 3\nrun: {a: 1}": "spec: compose.yaml has no container",
    "services: 3": "spec: compose.yaml has no container",
    "services:\n  a:\n    command: sleep 1": "compose.yaml does not train or serve; accelerate launch, ",
    "services:\n  a:\n    command: trl ppo": "compose.yaml:3: trl ppo is not supported yet; supported: trl sft",
    "services:\n  a:\n    command: trl 'sft": "compose.yaml:1: a quote is not closed",
    "services:\n  a: &a [*a]": "contains itself",
    "services:\n  a: {b: 1, b: 2}": "the key 'b' appears twice, again in line 2",
    "services: !!python/object:os.system {}": "is not YAML",
    f"services: !{'a' * 300} b": "constructor for the tag '!aaa",
    "services:\n  a: [": "is not YAML",
    "services:\n  a: {{ b }}": "it is a template: render it first",
}


@pytest.mark.parametrize(("text", "error"), REFUSED.items())
def test_a_manifest_that_is_not_read_is_one_line(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(SpecError) as raised:
        read(tmp_path, text)
    assert error in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400
