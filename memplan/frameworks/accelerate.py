"""accelerate's config file, for `accelerate launch --config_file`: FSDP, DeepSpeed or DDP."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks import shared_keys as words
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import Nodes, Said, Written, constant, nested, of_run, where, yaml_lines
from memplan.spec.parallelism import Zero
from memplan.spec.run import RunSpec


def _kind(run: RunSpec) -> str:
    p = run.parallelism
    if words.fsdp(run) is not None or p.tp * p.cp > 1:  # accelerate divides by tp and cp under FSDP2 alone
        return "FSDP"
    if words.stage(run) is not None:
        return "DEEPSPEED"
    return "MULTI_GPU" if p.world > 1 else "NO"


def _fsdp(run: RunSpec) -> bool:
    return _kind(run) == "FSDP"


def _fsdp1(run: RunSpec) -> bool:
    return words.fsdp(run) == 1


def _divided(run: RunSpec) -> bool:
    return run.parallelism.tp * run.parallelism.cp > 1


def _deepspeed(run: RunSpec) -> bool:
    return _kind(run) == "DEEPSPEED"


def _stage_3(run: RunSpec) -> bool:
    return words.stage(run) == 3


def _version(run: RunSpec) -> int:
    return words.fsdp(run) or 2


def _precision(run: RunSpec) -> str:
    p = run.precision
    return words.computes(run) if p.autocast or p.master is not None else "no"


def _sent(run: RunSpec) -> bool:
    return run.parallelism.cpu_ram_efficient_loading


def _offloads(run: RunSpec) -> bool:
    return run.parallelism.offload.parameters


def _machines(run: RunSpec, nodes: Nodes) -> int:
    return nodes.nodes


def _processes(run: RunSpec) -> int:
    return run.parallelism.world


def _checkpointing(run: RunSpec) -> str:
    on = run.kernels.checkpointing not in (None, "none")
    return f"the trainer's own gradient_checkpointing is to be {'on' if on else 'off'}: memplan counted it so"


def _pure(run: RunSpec) -> str:
    if _precision(run) != "no" or run.precision.weights == "fp32":
        return ""
    return f"pure {run.precision.weights}: load the model in it (dtype); accelerate casts nothing"


def _batch(run: RunSpec) -> str:
    b = run.batch
    return f"per_device_train_batch_size {b.micro}, gradient_accumulation_steps {b.accumulation} are the trainer's"


def _configured(run: RunSpec) -> str:
    """What its sections have no keys for."""
    zero = run.parallelism.zero
    ours = {**dict(zero), "zero3_init_flag": True}
    plain = all(ours[name] == value for name, value in dict(Zero()).items() if not name.startswith("offload"))
    return "" if plain else "DeepSpeed's buckets are said in its JSON (--emit deepspeed), by deepspeed_config_file"


def _blocks(run: RunSpec) -> str:
    return "every block is a unit of FSDP's: transformers' classes name them (_no_split_modules)" if _fsdp(run) else ""


def _host(run: RunSpec, moved: str, part: str) -> str:
    """Where DeepSpeed keeps what is offloaded."""
    return getattr(run.parallelism.zero, part).device if getattr(run.parallelism.offload, moved) else "none"


def _launcher(nodes: Nodes) -> str | None:
    return "standard" if nodes.nodes > 1 else None


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    several = "--machine_rank N --main_process_ip ADDRESS --main_process_port 29500 " if nodes.nodes > 1 else ""
    said = [f"accelerate launch --config_file FILE {several}train.py", *remarks]
    return "\n".join([*(f"# {remark}" for remark in said), *yaml_lines(nested(values))]) + "\n"


_UNIT = "TRANSFORMER_BASED_WRAP"

ACCELERATE = Written(
    "accelerate",
    "accelerate",
    "accelerate 1.15.0 commands/config/config_args.py, commands/config/cluster.py, commands/launch.py",
    ("ddp", "fsdp", "fsdp2", "zero1", "zero2", "zero3"),
    ("pp", "ep", "etp"),
    (
        Said("compute_environment", constant("LOCAL_MACHINE")),
        Said("distributed_type", of_run(_kind)),
        Said("mixed_precision", of_run(_precision)),
        Said("num_machines", _machines),
        Said("num_processes", of_run(_processes)),
        Said("machine_rank", constant(0)),
        Said("rdzv_backend", constant("static")),
        Said("same_network", constant(True)),
        Said("main_training_function", constant("main")),
        Said("use_cpu", constant(False)),
        Said("fsdp_config.fsdp_version", where(_fsdp, of_run(_version))),
        Said("fsdp_config.fsdp_auto_wrap_policy", where(_fsdp, constant(_UNIT))),
        Said(
            "fsdp_config.fsdp_reshard_after_forward",
            where(_fsdp, of_run(lambda run: "FULL_SHARD" if _fsdp1(run) else True)),
        ),
        Said("fsdp_config.fsdp_offload_params", where(_fsdp, of_run(_offloads))),
        Said("fsdp_config.fsdp_cpu_ram_efficient_loading", where(_fsdp, of_run(_sent))),
        Said("fsdp_config.fsdp_activation_checkpointing", where(_fsdp, constant(False))),
        Said("fsdp_config.fsdp_state_dict_type", where(_fsdp, constant("SHARDED_STATE_DICT"))),
        Said("fsdp_config.fsdp_backward_prefetch", where(_fsdp1, constant("BACKWARD_PRE"))),
        Said("fsdp_config.fsdp_forward_prefetch", where(_fsdp1, constant(False))),
        Said("fsdp_config.fsdp_use_orig_params", where(_fsdp1, constant(True))),
        Said("fsdp_config.fsdp_sync_module_states", where(_fsdp1, constant(True))),
        Said("parallelism_config.parallelism_config_dp_replicate_size", where(_divided, constant(1))),
        Said(
            "parallelism_config.parallelism_config_dp_shard_size",
            where(_divided, of_run(lambda run: run.parallelism.dp)),
        ),
        Said("parallelism_config.parallelism_config_tp_size", where(_divided, of_run(lambda run: run.parallelism.tp))),
        Said("parallelism_config.parallelism_config_cp_size", where(_divided, of_run(lambda run: run.parallelism.cp))),
        Said(
            "parallelism_config.parallelism_config_cp_comm_strategy",
            where(lambda run: run.parallelism.cp > 1, constant("allgather")),
        ),
        Said("deepspeed_config.zero_stage", where(_deepspeed, of_run(words.stage))),
        Said(
            "deepspeed_config.gradient_accumulation_steps",
            where(_deepspeed, of_run(lambda run: run.batch.accumulation)),
        ),
        Said("deepspeed_config.gradient_clipping", where(_deepspeed, of_run(words.clip))),
        Said(
            "deepspeed_config.offload_optimizer_device",
            where(_deepspeed, of_run(lambda run: _host(run, "optimizer", "offload_optimizer"))),
        ),
        Said(
            "deepspeed_config.offload_param_device",
            where(_deepspeed, of_run(lambda run: _host(run, "parameters", "offload_param"))),
        ),
        Said(
            "deepspeed_config.zero3_init_flag",
            where(_deepspeed, of_run(lambda run: _stage_3(run) and run.parallelism.zero.zero3_init_flag)),
        ),
        Said("deepspeed_config.zero3_save_16bit_model", where(_stage_3, constant(False))),
        Said("deepspeed_config.deepspeed_multinode_launcher", where(_deepspeed, lambda run, nodes: _launcher(nodes))),
    ),
    (_batch, _checkpointing, _pure, _blocks, _configured),
    _write,
)
