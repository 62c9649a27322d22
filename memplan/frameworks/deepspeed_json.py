"""Write DeepSpeed's JSON config, for `deepspeed --deepspeed_config` and transformers' Trainer, without `auto`."""

from __future__ import annotations

import json
from collections.abc import Mapping

from memplan.catalogue.parallelism.sharding import STAGES
from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import FileFormat, Nodes, nested, sequences
from memplan.spec.parallelism import OffloadedOptimizer, OffloadedParameters
from memplan.spec.run import RunSpec

# Fields of `Zero`, which have DeepSpeed's names. They are written even if they are DeepSpeed's defaults, so that
# transformers' `auto` does not replace them; None leaves one to DeepSpeed.
_EVERY_STAGE = ("reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients")
_STAGE_3 = (
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "sub_group_size"),
)


def _keys(run: RunSpec, nodes: Nodes) -> Mapping[str, Value]:
    stage, zero, offload = shared_keys.stage(run), run.parallelism.zero, run.parallelism.offload
    names = (*_EVERY_STAGE, *(_STAGE_3 if stage == 3 else ("round_robin_gradients",))) if stage else ()
    keys: dict[str, Value] = {
        "train_batch_size": sequences(run),
        "train_micro_batch_size_per_gpu": run.batch.micro,
        "gradient_accumulation_steps": run.batch.accumulation,
        "gradient_clipping": shared_keys.clip(run),
        "bf16.enabled": run.precision.weights == "bf16",
        "fp16.enabled": run.precision.weights == "fp16",
        "zero_optimization.stage": stage,
        **{f"zero_optimization.{name}": getattr(zero, name) for name in names},
    }
    if offload.optimizer:
        keys["zero_optimization.offload_optimizer"] = _offload(zero.offload_optimizer, "buffer_count")
    if offload.parameters:
        buffers = ("buffer_count", "buffer_size", "max_in_cpu")
        keys["zero_optimization.offload_param"] = _offload(zero.offload_param, *buffers)
    return keys


def _offload(part: OffloadedOptimizer | OffloadedParameters, *buffers: str) -> Value:
    """Return the device of an offloaded part, and its buffers if it is NVMe."""
    return {name: getattr(part, name) for name in ("device", "pin_memory", *(buffers if part.device == "nvme" else ()))}


def _remarks(run: RunSpec) -> tuple[str, ...]:
    """Return no remarks: JSON has no comments."""
    return ()


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    return json.dumps(nested(values), indent=2) + "\n"


DEEPSPEED = FileFormat(
    "deepspeed",
    "DeepSpeed",
    "DeepSpeed 0.19.8 runtime/config.py, runtime/constants.py, runtime/zero/config.py",
    tuple(STAGES),
    ("tp", "pp", "cp", "ep", "etp"),
    _keys,
    _remarks,
    _write,
)
