"""Write DeepSpeed's JSON config, for `deepspeed --deepspeed_config` and transformers' Trainer, without `auto`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import FileFormat, FileKey, Nodes, nested, of_run, only_if, sequences
from memplan.spec.run import RunSpec


def _is_stage_3(run: RunSpec) -> bool:
    return shared_keys.stage(run) == 3


def _half_precision(dtype: str) -> FileKey:
    return FileKey(f"{dtype}.enabled", of_run(lambda run: run.precision.weights == dtype))


def _zero(name: str) -> FileKey:
    """A key of `zero_optimization`, whose field in memplan has DeepSpeed's name; None leaves it to DeepSpeed."""
    return FileKey(f"zero_optimization.{name}", of_run(lambda run: getattr(run.parallelism.zero, name)))


def _zero_stage_3(name: str) -> FileKey:
    key = _zero(name)
    return key._replace(value=only_if(_is_stage_3, key.value))


def _offload(moved: str, part: str, *nvme_fields: str) -> FileKey:
    """A key with the device and buffers of an offloaded part; `nvme_fields` are written only for NVMe."""

    def value(run: RunSpec) -> Value:
        if not getattr(run.parallelism.offload, moved):
            return None
        settings = getattr(run.parallelism.zero, part)
        more = nvme_fields if settings.device == "nvme" else ()
        return {name: getattr(settings, name) for name in ("device", "pin_memory", *more)}

    return FileKey(f"zero_optimization.{part}", of_run(value))


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    """Return the JSON. It has no comments, so remarks are left out."""
    return json.dumps(nested(values), indent=2) + "\n"


DEEPSPEED = FileFormat(
    "deepspeed",
    "DeepSpeed",
    "DeepSpeed 0.19.8 runtime/config.py, runtime/constants.py, runtime/zero/config.py",
    ("zero1", "zero2", "zero3"),
    ("tp", "pp", "cp", "ep", "etp"),
    (
        FileKey("train_batch_size", of_run(sequences)),
        FileKey("train_micro_batch_size_per_gpu", of_run(lambda run: run.batch.micro)),
        FileKey("gradient_accumulation_steps", of_run(lambda run: run.batch.accumulation)),
        FileKey("gradient_clipping", of_run(shared_keys.clip)),
        _half_precision("bf16"),
        _half_precision("fp16"),
        FileKey("zero_optimization.stage", of_run(shared_keys.stage)),
        # Written even if they are DeepSpeed's defaults, so that transformers' `auto` does not replace them.
        _zero("reduce_bucket_size"),
        _zero("allgather_bucket_size"),
        _zero("overlap_comm"),
        _zero("contiguous_gradients"),
        FileKey(
            "zero_optimization.round_robin_gradients",
            of_run(lambda run: None if _is_stage_3(run) else run.parallelism.zero.round_robin_gradients),
        ),
        _zero_stage_3("stage3_prefetch_bucket_size"),
        _zero_stage_3("stage3_param_persistence_threshold"),
        _zero_stage_3("stage3_max_live_parameters"),
        _zero_stage_3("stage3_max_reuse_distance"),
        _zero_stage_3("sub_group_size"),
        _offload("optimizer", "offload_optimizer", "buffer_count"),
        _offload("parameters", "offload_param", "buffer_count", "buffer_size", "max_in_cpu"),
    ),
    (),
    _write,
)
