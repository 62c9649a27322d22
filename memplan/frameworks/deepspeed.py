"""DeepSpeed's config, as `deepspeed --deepspeed_config` and transformers' Trainer take it: JSON, nothing left open."""

from __future__ import annotations

import json
from collections.abc import Mapping

from memplan.catalogue.parallel import PERSISTENT, PREFETCH, REDUCE_BUCKET, REUSE, SUB_GROUP
from memplan.frameworks import words
from memplan.frameworks.table import Value
from memplan.frameworks.written import Nodes, Said, Written, constant, nested, of_run, sequences, where
from memplan.spec import RunSpec


def _stage_3(run: RunSpec) -> bool:
    return words.stage(run) == 3


def _half(dtype: str) -> Said:
    return Said(f"{dtype}.enabled", of_run(lambda run: run.precision.weights == dtype))


def _host(moved: str) -> Said:
    part = {"optimizer": "offload_optimizer", "parameters": "offload_param"}[moved]
    key = f"zero_optimization.{part}"
    return Said(
        key,
        where(lambda run: getattr(run.parallelism.offload, moved), constant({"device": "cpu", "pin_memory": True})),
    )


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
        # DeepSpeed's own defaults, which memplan counts with, and so no `auto` of transformers' in their place.
        Said("zero_optimization.reduce_bucket_size", constant(REDUCE_BUCKET)),
        Said("zero_optimization.stage3_prefetch_bucket_size", where(_stage_3, constant(PREFETCH))),
        Said("zero_optimization.stage3_param_persistence_threshold", where(_stage_3, constant(PERSISTENT))),
        Said("zero_optimization.stage3_max_live_parameters", where(_stage_3, constant(REUSE))),
        Said("zero_optimization.stage3_max_reuse_distance", where(_stage_3, constant(REUSE))),
        Said("zero_optimization.sub_group_size", where(_stage_3, constant(SUB_GROUP))),
        _host("optimizer"),
        _host("parameters"),
    ),
    (),
    _write,
)
