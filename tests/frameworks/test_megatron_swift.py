"""Commands and files of Megatron-SWIFT are read as the runs that they start over Megatron-core's layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.frameworks.reading.run_file import RunFile, read_run

LORA = """
PYTORCH_CUDA_ALLOC_CONF='expandable_segments:True' \\
NPROC_PER_NODE=2 \\
megatron sft --model Qwen/Qwen2.5-7B-Instruct --tuner_type lora --lora_rank 8 --target_modules all-linear \\
    --tensor_model_parallel_size 2 --sequence_parallel true --micro_batch_size 16 --global_batch_size 16 \\
    --recompute_granularity full --recompute_method uniform --recompute_num_layers 1 --max_length 2048 \\
    --cross_entropy_loss_fusion true --dataset 'AI-ModelScope/alpaca-gpt4-data-en#500' --lr 1e-4
"""
FILE = "model: Qwen/Qwen2.5-7B\nmax_length: 4096\nmicro_batch_size: 2\n"


def read(tmp_path: Path, text: str, name: str = "run.yaml", gpus: int | None = None) -> RunFile:
    (tmp_path / name).write_text(text, "utf-8")
    return read_run(str(tmp_path / name), None, {}, {"parallelism.world": gpus} if gpus else {})


def values(file: RunFile) -> dict[str, Any]:
    estimate(RunSpec(**file.fields))
    return {origin.field: origin.value for origin in file.origins}


def test_a_command_is_the_run_over_megatron_cores_layers(tmp_path: Path) -> None:
    file = read(tmp_path, LORA, "train.sh")
    found = values(file)
    assert (file.title, file.unread) == ("Megatron-SWIFT 4.6", ())
    assert found["profile"] == "megatron-swift"
    method = {"kind": "lora", "rank": 8, "alpha": 32, "dropout": 0.05, "targets": "all-linear"}
    assert {field: found[f"method.{field}"] for field in method} == method
    assert {field: found[f"precision.{field}"] for field in ("weights", "grads", "master")} == {
        "weights": "bf16",
        "grads": "fp32",
        "master": "fp32",
    }
    assert (found["parallelism.world"], found["parallelism.tp"], found["parallelism.dp"]) == (2, 2, 1)
    assert found["parallelism.sequence_parallel"] is True
    assert "parallelism.strategy" not in found
    assert (found["batch.micro"], found["batch.sequence"], found["batch.accumulation"]) == (16, 2048, 1)
    assert (found["kernels.checkpointing"], found["kernels.attention"]) == ("full", "flash_attention_2")
    assert "kernels.fused" not in found  # the profile's, compiled_cross_entropy
    assert (found["optimizer.name"], found["loop.expandable_segments"]) == ("adamw_torch_fused", True)


CASES: dict[str, dict[str, Any]] = {
    "": {"method.kind": "full", "kernels.checkpointing": "selective", "parallelism.world": None},
    "recompute_granularity: none\nattention_backend: fused": {
        "kernels.checkpointing": "none",
        "kernels.attention": None,
    },
    "cross_entropy_fusion_impl: te": {"kernels.fused": ["cross_entropy"]},
    "cross_entropy_loss_fusion: false": {"kernels.fused": []},
    "pipeline_model_parallel_size: 2\nvirtual_pipeline_model_parallel_size: 2": {
        "parallelism.pp": 2,
        "parallelism.virtual_stages": 2,
    },
    "tensor_model_parallel_size: 2\ntrain_type: lora\ntarget_modules: [linear_qkv]": {
        "method.targets": ["linear_qkv"],
        "parallelism.sequence_parallel": None,
    },
    "packing: true\npacking_length: 8192": {"batch.sequence": 8192},
    "torch_dtype: float16": {"precision.weights": "fp16"},
    "context_parallel_size: 2\ncp_comm_type: a2a": {
        "parallelism.context": "ulysses",
        "kernels.checkpointing": "none",
        "parallelism.strategy": "megatron_dist_opt",
    },
}


@pytest.mark.parametrize(("text", "expected"), CASES.items())
def test_keys_of_megatron_swift_are_fields(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    file = read(tmp_path, FILE + text)
    assert file.headline == "run.yaml: Megatron-SWIFT 4.6, by model and micro_batch_size"
    found = values(file)
    assert {field: found.get(field) for field in expected} == expected


def test_replicas_share_the_optimizer_and_the_global_batch(tmp_path: Path) -> None:
    found = values(read(tmp_path, f"{FILE}tensor_model_parallel_size: 2\nglobal_batch_size: 32", gpus=8))
    assert (found["parallelism.dp"], found["parallelism.strategy"]) == (4, "megatron_dist_opt")
    assert found["batch.accumulation"] == 32 // (2 * 4)
    apart = values(read(tmp_path, f"{FILE}use_distributed_optimizer: false", gpus=2))
    assert apart["parallelism.strategy"] == "ddp"


def test_experts_without_a_number_of_gpus_have_the_fewest(tmp_path: Path) -> None:
    text = "model: Qwen/Qwen3-30B-A3B\nmax_length: 2048\nmicro_batch_size: 1\nexpert_model_parallel_size: 8\n"
    file = read(tmp_path, f"{text}pipeline_model_parallel_size: 2")
    found = values(file)
    assert (found["parallelism.world"], found["parallelism.dp"], found["parallelism.etp"]) == (16, 8, 1)
    world = next(origin for origin in file.origins if origin.field == "parallelism.world")
    assert world.why == "assumed: as few GPUs as the degrees need; add --gpus"


REFUSED = {
    "rlhf_type: dpo": "run.yaml:4: rlhf_type: preference and reinforcement learning with Megatron-SWIFT",
    "task_type: seq_cls": "task_type: 'seq_cls' is not supported yet; supported: causal_lm",
    "tuner_type: lora_llm": "tuner_type: 'lora_llm' is not supported; supported: full, lora",
    "optimizer: dist_muon": "optimizer: 'dist_muon' is not supported yet; supported: adam, sgd",
    "fp8_format: hybrid": "fp8_format: 'hybrid' is not supported yet; leave it out",
    "use_megatron_fsdp: true": "use_megatron_fsdp: true is not supported yet",
    "attention_backend: flash_3": "attention_backend: 'flash_3' is not supported yet; supported: flash, flash_2, ",
    "global_batch_size: 7": "run.yaml:4: global_batch_size: 7 is no multiple of micro_batch_size times the replicas, 2",
}


@pytest.mark.parametrize(("text", "expected"), REFUSED.items())
def test_what_is_not_read_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(SpecError) as error:
        read(tmp_path, FILE + text)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_not_counted_is_named(tmp_path: Path) -> None:
    text = "recompute_granularity: full\nrecompute_method: block\noptimizer_cpu_offload: true\nexp_avg_dtype: bf16\n"
    assert read(tmp_path, FILE + text).notes == (
        "recompute_num_layers (run.yaml): every layer is counted as recomputed by itself",
        "optimizer_cpu_offload (run.yaml:6): memory that moves to the host, not supported yet",
        "exp_avg_dtype (run.yaml:7): fp32 is counted",
    )
