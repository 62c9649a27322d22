"""accelerate's config file, for `accelerate launch --config_file`: FSDP, DeepSpeed or DDP."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import FileFormat, FileKey, Nodes, constant, nested, of_run, only_if, yaml_lines
from memplan.spec.parallelism import Zero
from memplan.spec.run import RunSpec


def _kind(run: RunSpec) -> str:
    p = run.parallelism
    if shared_keys.fsdp(run) is not None or p.tp * p.cp > 1:  # accelerate supports tp and cp only under FSDP2
        return "FSDP"
    if shared_keys.stage(run) is not None:
        return "DEEPSPEED"
    return "MULTI_GPU" if p.world > 1 else "NO"


def _uses_fsdp(run: RunSpec) -> bool:
    return _kind(run) == "FSDP"


def _uses_fsdp1(run: RunSpec) -> bool:
    return shared_keys.fsdp(run) == 1


def _uses_tp_or_cp(run: RunSpec) -> bool:
    return run.parallelism.tp * run.parallelism.cp > 1


def _uses_deepspeed(run: RunSpec) -> bool:
    return _kind(run) == "DEEPSPEED"


def _is_stage_3(run: RunSpec) -> bool:
    return shared_keys.stage(run) == 3


def _fsdp_version(run: RunSpec) -> int:
    return shared_keys.fsdp(run) or 2


def _precision(run: RunSpec) -> str:
    p = run.precision
    return shared_keys.computes(run) if p.autocast or p.master is not None else "no"


def _efficient_loading(run: RunSpec) -> bool:
    return run.parallelism.cpu_ram_efficient_loading


def _offloads(run: RunSpec) -> bool:
    return run.parallelism.offload.parameters


def _machines(run: RunSpec, nodes: Nodes) -> int:
    return nodes.nodes


def _processes(run: RunSpec) -> int:
    return run.parallelism.world


def _checkpointing_remark(run: RunSpec) -> str:
    on = run.kernels.checkpointing not in (None, "none")
    return f"turn the trainer's gradient_checkpointing {'on' if on else 'off'}, as memplan assumed"


def _pure_remark(run: RunSpec) -> str:
    if _precision(run) != "no" or run.precision.weights == "fp32":
        return ""
    return f"pure {run.precision.weights}: load the model in it (dtype); accelerate casts nothing"


def _batch_remark(run: RunSpec) -> str:
    b = run.batch
    return f"set per_device_train_batch_size {b.micro}, gradient_accumulation_steps {b.accumulation} in the trainer"


def _buckets_remark(run: RunSpec) -> str:
    zero = run.parallelism.zero
    values = {**dict(zero), "zero3_init_flag": True}
    plain = all(values[name] == value for name, value in dict(Zero()).items() if not name.startswith("offload"))
    return "" if plain else "set DeepSpeed's buckets in its JSON (--emit deepspeed), given by deepspeed_config_file"


def _blocks_remark(run: RunSpec) -> str:
    return "FSDP wraps every block, which transformers lists in _no_split_modules" if _uses_fsdp(run) else ""


def _offload_device(run: RunSpec, moved: str, part: str) -> str:
    return getattr(run.parallelism.zero, part).device if getattr(run.parallelism.offload, moved) else "none"


def _launcher(nodes: Nodes) -> str | None:
    return "standard" if nodes.nodes > 1 else None


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    several = "--machine_rank N --main_process_ip ADDRESS --main_process_port 29500 " if nodes.nodes > 1 else ""
    comments = [f"accelerate launch --config_file FILE {several}train.py", *remarks]
    return "\n".join([*(f"# {comment}" for comment in comments), *yaml_lines(nested(values))]) + "\n"


_WRAP_POLICY = "TRANSFORMER_BASED_WRAP"

ACCELERATE = FileFormat(
    "accelerate",
    "accelerate",
    "accelerate 1.15.0 commands/config/config_args.py, commands/config/cluster.py, commands/launch.py",
    ("ddp", "fsdp", "fsdp2", "zero1", "zero2", "zero3"),
    ("pp", "ep", "etp"),
    (
        FileKey("compute_environment", constant("LOCAL_MACHINE")),
        FileKey("distributed_type", of_run(_kind)),
        FileKey("mixed_precision", of_run(_precision)),
        FileKey("num_machines", _machines),
        FileKey("num_processes", of_run(_processes)),
        FileKey("machine_rank", constant(0)),
        FileKey("rdzv_backend", constant("static")),
        FileKey("same_network", constant(True)),
        FileKey("main_training_function", constant("main")),
        FileKey("use_cpu", constant(False)),
        FileKey("fsdp_config.fsdp_version", only_if(_uses_fsdp, of_run(_fsdp_version))),
        FileKey("fsdp_config.fsdp_auto_wrap_policy", only_if(_uses_fsdp, constant(_WRAP_POLICY))),
        FileKey(
            "fsdp_config.fsdp_reshard_after_forward",
            only_if(_uses_fsdp, of_run(lambda run: "FULL_SHARD" if _uses_fsdp1(run) else True)),
        ),
        FileKey("fsdp_config.fsdp_offload_params", only_if(_uses_fsdp, of_run(_offloads))),
        FileKey("fsdp_config.fsdp_cpu_ram_efficient_loading", only_if(_uses_fsdp, of_run(_efficient_loading))),
        FileKey("fsdp_config.fsdp_activation_checkpointing", only_if(_uses_fsdp, constant(False))),
        FileKey("fsdp_config.fsdp_state_dict_type", only_if(_uses_fsdp, constant("SHARDED_STATE_DICT"))),
        FileKey("fsdp_config.fsdp_backward_prefetch", only_if(_uses_fsdp1, constant("BACKWARD_PRE"))),
        FileKey("fsdp_config.fsdp_forward_prefetch", only_if(_uses_fsdp1, constant(False))),
        FileKey("fsdp_config.fsdp_use_orig_params", only_if(_uses_fsdp1, constant(True))),
        FileKey("fsdp_config.fsdp_sync_module_states", only_if(_uses_fsdp1, constant(True))),
        FileKey("parallelism_config.parallelism_config_dp_replicate_size", only_if(_uses_tp_or_cp, constant(1))),
        FileKey(
            "parallelism_config.parallelism_config_dp_shard_size",
            only_if(_uses_tp_or_cp, of_run(lambda run: run.parallelism.dp)),
        ),
        FileKey(
            "parallelism_config.parallelism_config_tp_size",
            only_if(_uses_tp_or_cp, of_run(lambda run: run.parallelism.tp)),
        ),
        FileKey(
            "parallelism_config.parallelism_config_cp_size",
            only_if(_uses_tp_or_cp, of_run(lambda run: run.parallelism.cp)),
        ),
        FileKey(
            "parallelism_config.parallelism_config_cp_comm_strategy",
            only_if(lambda run: run.parallelism.cp > 1, constant("allgather")),
        ),
        FileKey("deepspeed_config.zero_stage", only_if(_uses_deepspeed, of_run(shared_keys.stage))),
        FileKey(
            "deepspeed_config.gradient_accumulation_steps",
            only_if(_uses_deepspeed, of_run(lambda run: run.batch.accumulation)),
        ),
        FileKey("deepspeed_config.gradient_clipping", only_if(_uses_deepspeed, of_run(shared_keys.clip))),
        FileKey(
            "deepspeed_config.offload_optimizer_device",
            only_if(_uses_deepspeed, of_run(lambda run: _offload_device(run, "optimizer", "offload_optimizer"))),
        ),
        FileKey(
            "deepspeed_config.offload_param_device",
            only_if(_uses_deepspeed, of_run(lambda run: _offload_device(run, "parameters", "offload_param"))),
        ),
        FileKey(
            "deepspeed_config.zero3_init_flag",
            only_if(_uses_deepspeed, of_run(lambda run: _is_stage_3(run) and run.parallelism.zero.zero3_init_flag)),
        ),
        FileKey("deepspeed_config.zero3_save_16bit_model", only_if(_is_stage_3, constant(False))),
        FileKey(
            "deepspeed_config.deepspeed_multinode_launcher",
            only_if(_uses_deepspeed, lambda run, nodes: _launcher(nodes)),
        ),
    ),
    (_batch_remark, _checkpointing_remark, _pure_remark, _blocks_remark, _buckets_remark),
    _write,
)
