"""A DeepSpeed config as the fields of a run.

What takes memory and is not modelled is refused by name, and so is a key that is not known; `auto` is left to the run.
Source: DeepSpeed 0.19.8 runtime/config.py, runtime/zero/config.py, offload_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import SpecError, printable
from memplan.spec.file import read_spec

# Keys of zero_optimization that are fields of `memplan.spec.parallelism.Zero`; of several the name without stage3_ is
# another's.
_SIZES = {
    "reduce_bucket_size": "reduce_bucket_size",
    "allgather_bucket_size": "allgather_bucket_size",
    "sub_group_size": "sub_group_size",
    "overlap_comm": "overlap_comm",
    "contiguous_gradients": "contiguous_gradients",
    "round_robin_gradients": "round_robin_gradients",
    "prefetch_bucket_size": "stage3_prefetch_bucket_size",
    "param_persistence_threshold": "stage3_param_persistence_threshold",
    "max_live_parameters": "stage3_max_live_parameters",
    "max_reuse_distance": "stage3_max_reuse_distance",
}
_STAGE_3 = (
    "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "sub_group_size",
)

# What takes no memory in a step, whatever it says.
_FREE = frozenset(
    (
        *("allgather_partitions", "gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
        *("load_from_fp32_weights", "elastic_checkpoint", "ignore_unused_parameters", "legacy_stage1"),
        *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "memory_efficient_linear"),
        *("pipeline_loading_checkpoint", "cpu_offload_use_pin_memory", "save_muon_momentum_buffer_in_memory"),
    )
)
_OF_DEVICES = frozenset(("nvme_path", "pipeline_read", "pipeline_write", "fast_init", "cpuadam_cores_perc"))
_ELSEWHERE = frozenset(
    (
        *("scheduler", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "dump_state"),
        *(
            "zero_force_ds_cpu_optimizer",
            "aio",
            "comms_logger",
            "flops_profiler",
            "tensorboard",
            "wandb",
            "csv_monitor",
        ),
        *("checkpoint", "memory_breakdown", "seed", "disable_allgather"),
    )
)

# What is known and modelled only as it is by default.
_DEFAULTS: dict[str, object] = {
    "reduce_scatter": True,
    "use_multi_rank_bucket_allreduce": True,
    "compute_grad_norm": True,
    "parameter_alignment": False,
    "zero_hpz_partition_size": 1,
    "zero_quantized_weights": False,
    "zero_quantized_nontrainable_weights": False,
    "zero_quantized_gradients": False,
    "use_all_reduce_for_fetch_params": False,
    "allgather_sequential": False,
    "module_granularity_threshold": 0,
    "zenflow": None,
    "leaf_module": None,
}
_OFFLOADED: dict[str, object] = {"ratio": 1.0, "super_offload": False}
_PRECISION: dict[str, object] = {
    "fp16_master_weights_and_grads": False,
    "bf16_master_weights_and_grads": False,
    "bf16_optimizer_states": False,
    "immediate_grad_update": True,
}
_TOP: dict[str, object] = {
    "communication_data_type": None,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "data_types": None,
    "torch_autocast": None,
    "sparse_gradients": False,
}
_OPTIMIZERS = {"adam": "adamw_torch_fused", "adamw": "adamw_torch_fused", "adagrad": "adagrad"}


def read(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The parts of a run that a DeepSpeed config says, by their names. Raises SpecError with the key."""
    out: dict[str, dict[str, Any]] = {}
    for key, value in config.items():
        if value == "auto" or key in _ELSEWHERE:
            continue
        match key:
            case "zero_optimization":
                out["parallelism"] = _zero(_mapping(value, key))
            case "bf16" | "fp16":
                _precision(key, _mapping(value, key), out)
            case "train_micro_batch_size_per_gpu":
                out.setdefault("batch", {})["micro"] = value
            case "gradient_accumulation_steps":
                out.setdefault("batch", {})["accumulation"] = value
            case "train_batch_size":
                parts = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
                if not all(isinstance(config.get(part), int) for part in parts):
                    raise _refused(key, f"is divided among GPUs; say {' and '.join(parts)}")
            case "gradient_clipping":
                out["loop"] = {"clip_grad_norm": value or None}
            case "optimizer":
                out["optimizer"] = {"name": _optimizer(_mapping(value, key))}
            case "activation_checkpointing":
                for name, said in _mapping(value, key).items():
                    if name in ("partition_activations", "cpu_checkpointing") and said:
                        raise _refused(f"{key}.{name}", "is not supported yet; supported: false")
            case _:
                _as_by_default(key, value, _TOP, "")
    return out


def _zero(config: Mapping[str, Any]) -> dict[str, Any]:
    stage = config.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise _refused("zero_optimization.stage", f"ZeRO has stages 0 to 3, not {stage!r:.40}")
    zero: dict[str, Any] = {}
    offload: dict[str, bool] = {}
    for key, value in config.items():
        plain = key.removeprefix("stage3_")
        if key == "stage" or key in _FREE or plain in _FREE:
            continue
        if plain in _SIZES:
            if stage == 3 or _SIZES[plain] not in _STAGE_3:  # DeepSpeed takes them at every stage, and uses them at 3
                zero[_SIZES[plain]] = value
        elif key in ("offload_optimizer", "offload_param"):
            found = _offloaded(f"zero_optimization.{key}", _mapping(value or {}, key))
            if found is not None:
                zero[key] = found
                offload["optimizer" if key == "offload_optimizer" else "parameters"] = True
        elif key in ("cpu_offload", "cpu_offload_param"):
            offload["optimizer" if key == "cpu_offload" else "parameters"] = bool(value)
        elif plain == "model_persistence_threshold":
            raise _refused(f"zero_optimization.{key}", "is not supported yet; leave it out")
        else:
            _as_by_default(plain if plain in _DEFAULTS else key, value, _DEFAULTS, "zero_optimization.")
    if not stage:
        return {}
    return {"strategy": f"zero{stage}", "zero": zero, "offload": offload}


def _offloaded(field: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """DeepSpeed's device and its buffers; None where nothing is offloaded."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"):
            out[key] = value
        elif key not in _OF_DEVICES:
            _as_by_default(key, value, _OFFLOADED, f"{field}.")
    return out if out.get("device", "none") != "none" else None


def _precision(dtype: str, config: Mapping[str, Any], out: dict[str, dict[str, Any]]) -> None:
    if config.get("enabled") is True:
        for key in _PRECISION.keys() & config.keys():
            _as_by_default(key, config[key], _PRECISION, f"{dtype}.")
        if "precision" in out:
            raise _refused(dtype, "bf16 and fp16 exclude each other")
        out["precision"] = {"weights": dtype, "grads": dtype, "master": "fp32"}


def _optimizer(config: Mapping[str, Any]) -> str:
    name = str(config.get("type", ""))
    if name.lower() not in _OPTIMIZERS:
        raise _refused(
            "optimizer.type", f"{printable(name)!r:.60} is not supported yet; supported: AdamW, Adam, Adagrad"
        )
    return _OPTIMIZERS[name.lower()]


def _as_by_default(key: str, value: object, defaults: Mapping[str, object], where: str) -> None:
    """Raise SpecError for a key that is not known, or says something else than its default."""
    if key not in defaults:
        raise _refused(f"{where}{printable(key)[:80]}", "is no key that is known to take no memory; leave it out")
    if value not in (defaults[key], None):
        raise _refused(f"{where}{key}", f"{value!r:.40} is not supported yet; supported: {defaults[key]!r}")


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refused(key, f"is a mapping, not {value!r:.40}")
    return cast(Mapping[str, Any], value)


def _refused(key: str, why: str) -> SpecError:
    return SpecError(f"deepspeed: {key}: {why}", "parallelism.zero")


def read_deepspeed(name: str) -> dict[str, dict[str, Any]]:
    """The parts of a run in a DeepSpeed config. Raises SpecError or ConfigError, in one line."""
    try:
        config = read_spec(name)
    except SpecError as error:
        raise SpecError(f"deepspeed{str(error).removeprefix('spec')}", "parallelism.zero") from None
    return read(config)
