"""accelerate's config file, for `accelerate launch --config_file`: FSDP, DeepSpeed or DDP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.parallelism.sharding import STAGES
from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import FileFormat, Nodes, nested, yaml_lines
from memplan.spec.parallelism import Parallelism, Zero
from memplan.spec.run import RunSpec


def _type(run: RunSpec) -> str:
    p = run.parallelism
    if shared_keys.fsdp(run) is not None or p.tp * p.cp > 1:  # accelerate supports tp and cp only under FSDP2
        return "FSDP"
    if shared_keys.stage(run) is not None:
        return "DEEPSPEED"
    return "MULTI_GPU" if p.world > 1 else "NO"


def _precision(run: RunSpec) -> str:
    p = run.precision
    return shared_keys.computes(run) if p.autocast or p.master is not None else "no"


def _keys(run: RunSpec, nodes: Nodes) -> Mapping[str, Value]:
    p, kind = run.parallelism, _type(run)
    keys: dict[str, Value] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "mixed_precision": _precision(run),
        "num_machines": nodes.nodes,
        "num_processes": p.world,
        "machine_rank": 0,
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
        "use_cpu": False,
    }
    if kind == "FSDP":
        keys |= {f"fsdp_config.fsdp_{name}": value for name, value in _fsdp(run).items()}
    if p.tp * p.cp > 1:
        sizes = {"dp_replicate_size": 1, "dp_shard_size": p.dp, "tp_size": p.tp, "cp_size": p.cp}
        names = {**sizes, "cp_comm_strategy": "allgather" if p.cp > 1 else None}
        keys |= {f"parallelism_config.parallelism_config_{name}": value for name, value in names.items()}
    if kind == "DEEPSPEED":
        keys |= {f"deepspeed_config.{name}": value for name, value in _deepspeed(run, nodes).items()}
    return keys


def _fsdp(run: RunSpec) -> dict[str, Value]:
    p, is_fsdp1 = run.parallelism, shared_keys.fsdp(run) == 1
    keys: dict[str, Value] = {
        "version": shared_keys.fsdp(run) or 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "reshard_after_forward": "FULL_SHARD" if is_fsdp1 else True,
        "offload_params": p.offload.parameters,
        "cpu_ram_efficient_loading": p.cpu_ram_efficient_loading,
        "activation_checkpointing": False,
        "state_dict_type": "SHARDED_STATE_DICT",
    }
    only_in_1 = {"backward_prefetch": "BACKWARD_PRE", "forward_prefetch": False}
    only_in_1 |= {"use_orig_params": True, "sync_module_states": True}
    return keys | only_in_1 if is_fsdp1 else keys


def _deepspeed(run: RunSpec, nodes: Nodes) -> dict[str, Value]:
    p, is_stage_3 = run.parallelism, shared_keys.stage(run) == 3
    return {
        "zero_stage": shared_keys.stage(run),
        "gradient_accumulation_steps": run.batch.accumulation,
        "gradient_clipping": shared_keys.clip(run),
        "offload_optimizer_device": p.zero.offload_optimizer.device if p.offload.optimizer else "none",
        "offload_param_device": p.zero.offload_param.device if p.offload.parameters else "none",
        "zero3_init_flag": is_stage_3 and p.zero.zero3_init_flag,
        "zero3_save_16bit_model": False if is_stage_3 else None,
        "deepspeed_multinode_launcher": "standard" if nodes.nodes > 1 else None,
    }


def _remarks(run: RunSpec) -> Iterator[str]:
    b, weights = run.batch, run.precision.weights
    yield f"set per_device_train_batch_size {b.micro}, gradient_accumulation_steps {b.accumulation} in the trainer"
    on = run.kernels.checkpointing not in (None, "none")
    yield f"turn the trainer's gradient_checkpointing {'on' if on else 'off'}, as memplan assumed"
    if _precision(run) == "no" and weights != "fp32":
        yield f"pure {weights}: load the model in it (dtype); accelerate casts nothing"
    if _type(run) == "FSDP":
        yield "FSDP wraps every block, which transformers lists in _no_split_modules"
    if _sets_buckets(run.parallelism):
        yield "set DeepSpeed's buckets in its JSON (--emit deepspeed), given by deepspeed_config_file"


def _sets_buckets(p: Parallelism) -> bool:
    values = {**dict(p.zero), "zero3_init_flag": True}
    return any(values[name] != value for name, value in dict(Zero()).items() if not name.startswith("offload"))


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    several = "--machine_rank N --main_process_ip ADDRESS --main_process_port 29500 " if nodes.nodes > 1 else ""
    comments = [f"accelerate launch --config_file FILE {several}train.py", *remarks]
    return "\n".join([*(f"# {comment}" for comment in comments), *yaml_lines(nested(values))]) + "\n"


ACCELERATE = FileFormat(
    "accelerate",
    "accelerate",
    "accelerate 1.15.0 commands/config/config_args.py, commands/config/cluster.py, commands/launch.py",
    ("ddp", "fsdp", "fsdp2", *STAGES),
    ("pp", "ep", "etp"),
    _keys,
    _remarks,
    _write,
)
