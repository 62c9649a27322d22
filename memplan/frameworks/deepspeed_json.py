"""DeepSpeed's config, as `deepspeed --deepspeed_config` and transformers' Trainer take it: JSON, nothing left open."""

from __future__ import annotations

import json
from collections.abc import Mapping

from memplan.frameworks import shared_keys as words
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import Nodes, Said, Written, nested, of_run, sequences, where
from memplan.spec.run import RunSpec


def _stage_3(run: RunSpec) -> bool:
    return words.stage(run) == 3


def _half(dtype: str) -> Said:
    return Said(f"{dtype}.enabled", of_run(lambda run: run.precision.weights == dtype))


def _zero(name: str) -> Said:
    """A key of `zero_optimization`, which memplan has by DeepSpeed's own name; None is left to DeepSpeed."""
    return Said(f"zero_optimization.{name}", of_run(lambda run: getattr(run.parallelism.zero, name)))


def _at_3(name: str) -> Said:
    said = _zero(name)
    return said._replace(value=where(_stage_3, said.value))


def _host(moved: str, part: str, *fields: str) -> Said:
    """What is offloaded, and how."""

    def value(run: RunSpec) -> Value:
        if not getattr(run.parallelism.offload, moved):
            return None
        how = getattr(run.parallelism.zero, part)
        more = fields if how.device == "nvme" else ()
        return {name: getattr(how, name) for name in ("device", "pin_memory", *more)}

    return Said(f"zero_optimization.{part}", of_run(value))


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    """JSON has no comments, so remarks are left out."""
    return json.dumps(nested(values), indent=2) + "\n"


DEEPSPEED = Written(
    "deepspeed",
    "DeepSpeed",
    "DeepSpeed 0.19.8 runtime/config.py, runtime/constants.py, runtime/zero/config.py",
    ("zero1", "zero2", "zero3"),
    ("tp", "pp", "cp", "ep", "etp"),
    (
        Said("train_batch_size", of_run(sequences)),
        Said("train_micro_batch_size_per_gpu", of_run(lambda run: run.batch.micro)),
        Said("gradient_accumulation_steps", of_run(lambda run: run.batch.accumulation)),
        Said("gradient_clipping", of_run(words.clip)),
        _half("bf16"),
        _half("fp16"),
        Said("zero_optimization.stage", of_run(words.stage)),
        # Written even where they are DeepSpeed's own, so that no `auto` of transformers' takes their place.
        _zero("reduce_bucket_size"),
        _zero("allgather_bucket_size"),
        _zero("overlap_comm"),
        _zero("contiguous_gradients"),
        Said(
            "zero_optimization.round_robin_gradients",
            of_run(lambda run: None if _stage_3(run) else run.parallelism.zero.round_robin_gradients),
        ),
        _at_3("stage3_prefetch_bucket_size"),
        _at_3("stage3_param_persistence_threshold"),
        _at_3("stage3_max_live_parameters"),
        _at_3("stage3_max_reuse_distance"),
        _at_3("sub_group_size"),
        _host("optimizer", "offload_optimizer", "buffer_count"),
        _host("parameters", "offload_param", "buffer_count", "buffer_size", "max_in_cpu"),
    ),
    (),
    _write,
)
