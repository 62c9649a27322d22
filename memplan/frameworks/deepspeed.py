"""Read a DeepSpeed config as fields of a run.

Keys that take memory but are not supported are refused by name, as are unknown keys; `auto` is left to the run.
Source: DeepSpeed 0.19.8 runtime/config.py, runtime/zero/config.py, offload_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import SpecError, printable
from memplan.spec.file import read_spec
from memplan.spec.parallelism import Zero

# Keys of zero_optimization, without a `stage3_` prefix, and their fields in `memplan.spec.parallelism.Zero`.
_OTHER_FIELDS = ("offload_optimizer", "offload_param", "zero3_init_flag")
SIZES = {name.removeprefix("stage3_"): name for name in Zero.model_fields if name not in _OTHER_FIELDS}
STAGE_3 = (*(name for name in SIZES.values() if name.startswith("stage3_")), "sub_group_size")

# Keys that take no memory in a step, whatever their value.
_IGNORED = frozenset(
    (
        *("allgather_partitions", "gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save"),
        *("load_from_fp32_weights", "elastic_checkpoint", "ignore_unused_parameters", "legacy_stage1"),
        *("override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks", "memory_efficient_linear"),
        *("pipeline_loading_checkpoint", "cpu_offload_use_pin_memory", "save_muon_momentum_buffer_in_memory"),
    )
)
_IGNORED_IN_OFFLOAD = frozenset(("nvme_path", "pipeline_read", "pipeline_write", "fast_init", "cpuadam_cores_perc"))
_IGNORED_AT_TOP = frozenset(
    (
        *("scheduler", "steps_per_print", "wall_clock_breakdown", "zero_allow_untested_optimizer", "dump_state"),
        *("zero_force_ds_cpu_optimizer", "aio", "comms_logger", "flops_profiler", "tensorboard", "wandb"),
        *("csv_monitor", "checkpoint", "memory_breakdown", "seed", "disable_allgather"),
    )
)

# Keys that are supported only with their default values.
_DEFAULTS: dict[str, object] = {
    **dict.fromkeys(("reduce_scatter", "use_multi_rank_bucket_allreduce", "compute_grad_norm"), True),
    **dict.fromkeys(("parameter_alignment", "zero_quantized_weights", "zero_quantized_nontrainable_weights"), False),
    **dict.fromkeys(("zero_quantized_gradients", "use_all_reduce_for_fetch_params", "allgather_sequential"), False),
    "zero_hpz_partition_size": 1,
    "module_granularity_threshold": 0,
    "zenflow": None,
    "leaf_module": None,
}
_OFFLOAD_DEFAULTS: dict[str, object] = {"ratio": 1.0, "super_offload": False}
_PRECISION_DEFAULTS: dict[str, object] = {
    "fp16_master_weights_and_grads": False,
    "bf16_master_weights_and_grads": False,
    "bf16_optimizer_states": False,
    "immediate_grad_update": True,
}
_TOP_DEFAULTS: dict[str, object] = {
    "communication_data_type": None,
    "prescale_gradients": False,
    "gradient_predivide_factor": 1.0,
    "data_types": None,
    "torch_autocast": None,
    "sparse_gradients": False,
}
_OPTIMIZERS = {"adam": "adamw_torch_fused", "adamw": "adamw_torch_fused", "adagrad": "adagrad"}


def read(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the parts of a run that a DeepSpeed config sets, by name. Raises SpecError with the key."""
    out: dict[str, dict[str, Any]] = {"parallelism": {"strategy": "zero0"}}
    for key, value in config.items():
        if value == "auto" or key in _IGNORED_AT_TOP:
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
                    raise _refused(key, f"depends on the number of GPUs; set {' and '.join(parts)} instead")
            case "gradient_clipping":
                out["loop"] = {"clip_grad_norm": value or None}
            case "optimizer":
                out["optimizer"] = {"name": _optimizer(_mapping(value, key))}
            case "activation_checkpointing":
                for name, setting in _mapping(value, key).items():
                    if name in ("partition_activations", "cpu_checkpointing") and _switch(setting, f"{key}.{name}"):
                        raise _refused(f"{key}.{name}", "is not supported yet; supported: false")
            case _:
                _check_default(key, value, _TOP_DEFAULTS, "")
    if out["parallelism"]["strategy"] == "zero0" and "optimizer" in out:  # FP16_Optimizer flattens the gradients again
        raise _refused("optimizer", "without ZeRO, only the trainer's is supported yet; leave it out, or set a stage")
    return out


def _zero(config: Mapping[str, Any]) -> dict[str, Any]:
    stage = config.get("stage", 0)
    if type(stage) is not int or not 0 <= stage <= 3:
        raise _refused("zero_optimization.stage", f"ZeRO has stages 0 to 3, not {stage!r:.40}")
    zero: dict[str, Any] = {}
    offload: dict[str, bool] = {}
    for key, value in config.items():
        plain = key.removeprefix("stage3_")
        if key == "stage" or key in _IGNORED or plain in _IGNORED:
            continue
        if plain in SIZES:
            if stage == 3 or (stage and SIZES[plain] not in STAGE_3):  # accepted at every stage
                each_its_own = plain == "sub_group_size" and value == 0  # groups of one parameter, as 1 makes them
                zero[SIZES[plain]] = 1 if each_its_own else value
        elif key in ("offload_optimizer", "offload_param"):
            device = _offload(f"zero_optimization.{key}", _mapping(value or {}, key))
            if device is not None:
                zero[key] = device
                offload["optimizer" if key == "offload_optimizer" else "parameters"] = True
        elif key in ("cpu_offload", "cpu_offload_param"):
            offload["optimizer" if key == "cpu_offload" else "parameters"] = _switch(value, f"zero_optimization.{key}")
        elif plain == "model_persistence_threshold":
            raise _refused(f"zero_optimization.{key}", "is not supported yet; leave it out")
        else:
            _check_default(plain if plain in _DEFAULTS else key, value, _DEFAULTS, "zero_optimization.")
    return {"strategy": f"zero{stage}", "zero": zero, "offload": offload}


def _offload(field: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """DeepSpeed's device and its buffers; None if nothing is offloaded."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if key in ("device", "pin_memory", "buffer_count", "buffer_size", "max_in_cpu"):
            out[key] = value
        elif key not in _IGNORED_IN_OFFLOAD:
            _check_default(key, value, _OFFLOAD_DEFAULTS, f"{field}.")
    return out if out.get("device", "none") != "none" else None


def _precision(dtype: str, config: Mapping[str, Any], out: dict[str, dict[str, Any]]) -> None:
    if _switch(config.get("enabled"), f"{dtype}.enabled"):
        for key in _PRECISION_DEFAULTS.keys() & config.keys():
            _check_default(key, config[key], _PRECISION_DEFAULTS, f"{dtype}.")
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


def _check_default(key: str, value: object, defaults: Mapping[str, object], prefix: str) -> None:
    """Raise SpecError if the key is unknown or its value is not the default."""
    if key not in defaults:
        raise _refused(f"{prefix}{printable(key)[:80]}", "is unknown, and may take memory; leave it out")
    if value not in (defaults[key], None):
        raise _refused(f"{prefix}{key}", f"{value!r:.40} is not supported yet; supported: {defaults[key]!r}")


def _mapping(value: object, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise _refused(key, f"must be a mapping, not {value!r:.40}")
    return cast(Mapping[str, Any], value)


def _switch(value: object, key: str) -> bool:
    if value not in (True, False, "auto", None):
        raise _refused(key, f"must be true, false or auto, not {value!r:.40}")
    return value != "auto" and bool(value)


def _refused(key: str, why: str) -> SpecError:
    return SpecError(f"deepspeed: {key}: {why}", "parallelism.zero")


def read_deepspeed(name: str) -> dict[str, dict[str, Any]]:
    """Read a DeepSpeed config file as parts of a run. Raises SpecError or ConfigError."""
    try:
        config = read_spec(name)
    except SpecError as error:
        raise SpecError(f"deepspeed{str(error).removeprefix('spec')}", "parallelism.zero") from None
    return read(config)
