"""`--deepspeed FILE`: a DeepSpeed config as the fields of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from memplan.cli.runs import runs_of
from memplan.core.errors import SpecError
from memplan.frameworks.deepspeed import read
from memplan.frameworks.shared_keys import deepspeed
from memplan.spec.parallelism import Zero
from memplan.spec.run import RunSpec

# From transformers' documentation: ZeRO-3 with everything on the host.
TRAINERS: dict[str, Any] = {
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {}},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": False},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "wall_clock_breakdown": False,
}


def asked(tmp_path: Path, config: dict[str, Any], **given: Any) -> RunSpec:
    file = tmp_path / "ds_config.json"
    file.write_text(json.dumps(config), "utf-8")
    return runs_of({"model": "llama-3.2-1b", "deepspeed": str(file), **given})[0]


def test_a_config_of_the_trainer_is_read_whole(tmp_path: Path) -> None:
    run = asked(tmp_path, TRAINERS, gpus=8)
    p = run.parallelism
    assert (p.world, p.dp, p.strategy) == (8, 8, "zero3")
    assert (p.offload.optimizer, p.offload.parameters) == (True, True)
    assert p.zero == Zero.model_validate(
        {
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
            "overlap_comm": True,
            "offload_param": {"pin_memory": False},
        }
    )
    assert (run.batch.micro, run.batch.accumulation) == (2, 4)
    assert run.optimizer.name == "adamw_torch_fused"
    assert (run.precision.weights, run.precision.master) == ("bf16", "fp32")


def test_options_override_the_deepspeed_config(tmp_path: Path) -> None:
    run = asked(tmp_path, TRAINERS, gpus=2, zero=2, optimizer="adamw_torch")
    assert run.parallelism.strategy == "zero2"
    assert run.optimizer.name == "adamw_torch"


def test_names_without_their_stage_and_deprecated_ones_mean_the_same() -> None:
    old = {"stage": 3, "prefetch_bucket_size": 5, "max_live_parameters": 7, "cpu_offload": True}
    found = read({"zero_optimization": old})["parallelism"]
    assert found["zero"] == {"stage3_prefetch_bucket_size": 5, "stage3_max_live_parameters": 7}
    assert found["offload"] == {"optimizer": True}


def test_settings_of_stage_three_are_dropped_for_other_stages() -> None:
    found = read({"zero_optimization": {"stage": 2, "sub_group_size": 5, "stage3_max_live_parameters": 7}})
    assert found["parallelism"] == {"strategy": "zero2", "zero": {}, "offload": {}}


def test_settings_that_are_auto_or_off_get_no_note() -> None:
    config = {"bf16": {"enabled": "auto"}, "fp16": {"enabled": False}}
    without = {"strategy": "zero0", "zero": {}, "offload": {}}
    assert read({**config, "zero_optimization": {"stage": 0, "reduce_bucket_size": 5}}) == {"parallelism": without}
    assert read(config) == {"parallelism": {"strategy": "zero0"}}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"zero_optimization": {"stage": 4}}, "stages 0 to 3"),
    ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
    ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
    ({"zero_optimization": {"stage": 2, "reduce_scater": True}}, "reduce_scater"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}}, "ratio"),
    ({"zero_optimization": [2]}, "mapping"),
    ({"optimizer": {"type": "OneBitAdam"}}, "AdamW"),
    ({"optimizer": {"type": "AdamW"}}, "without ZeRO"),
    ({"train_batch_size": 64}, "train_micro_batch_size_per_gpu"),
    ({"activation_checkpointing": {"partition_activations": True}}, "partition_activations"),
    ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel"),
    ({"data_types": {"grad_accum_dtype": "fp32"}}, "data_types"),
    ({"bf16": {"enabled": "maybe"}}, "bf16.enabled: must be true, false or auto, not 'maybe'"),
    ({"zero_optimization": {"stage": 2, "cpu_offload": "yes"}}, "zero_optimization.cpu_offload: must be"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
]


@pytest.mark.parametrize(("config", "word"), REFUSED)
def test_unmodelled_settings_that_take_memory_are_refused_by_key(config: dict[str, Any], word: str) -> None:
    with pytest.raises(SpecError, match=r"^deepspeed: ") as caught:
        read(config)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^deepspeed: .*cannot be read"):
        runs_of({"model": "llama-3.2-1b", "deepspeed": str(tmp_path / "none.json")})


def test_a_run_is_written_as_the_config_it_was_read_from(tmp_path: Path) -> None:
    run = asked(tmp_path, TRAINERS, gpus=8)
    written = cast(dict[str, Any], deepspeed(run))
    assert read(written)["parallelism"]["offload"] == {"optimizer": True, "parameters": True}
    again = asked(tmp_path, written, gpus=8)
    assert again.parallelism == run.parallelism
