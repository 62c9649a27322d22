"""torchtitan's command line: since February 2026 a function of its registry and flags, instead of TOML."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import (
    FileFormat,
    FileKey,
    Nodes,
    command,
    counted_as,
    head_node,
    of_run,
    only_if,
    sequences,
    torchrun,
)
from memplan.spec.run import RunSpec

# Module and function of torchtitan's registry, by model id. Source: torchtitan 0.3.0 models/*/config_registry.py.
_CONFIGS = {
    "meta-llama/Llama-3.1-8B": ("llama3", "llama3_8b"),
    "meta-llama/Llama-3.1-70B": ("llama3", "llama3_70b"),
    "meta-llama/Llama-3.1-405B": ("llama3", "llama3_405b"),
    "Qwen/Qwen3-0.6B": ("qwen3", "qwen3_0_6b"),
    "Qwen/Qwen3-1.7B": ("qwen3", "qwen3_1_7b"),
    "Qwen/Qwen3-14B": ("qwen3", "qwen3_14b"),
    "Qwen/Qwen3-32B": ("qwen3", "qwen3_32b"),
    "Qwen/Qwen3-30B-A3B": ("qwen3", "qwen3_30b_a3b"),
    "openai/gpt-oss-20b": ("gpt_oss", "gpt_oss_20b"),
    "openai/gpt-oss-120b": ("gpt_oss", "gpt_oss_120b"),
    "deepseek-ai/DeepSeek-V3": ("deepseek_v3", "deepseek_v3_671b"),
}


def _config(run: RunSpec) -> tuple[str, str]:
    return _CONFIGS.get(str(shared_keys.model(run)), ("MODULE", "CONFIG"))


def _shards(run: RunSpec) -> bool:
    return run.parallelism.strategy == "fsdp2"


def _local_batch(run: RunSpec) -> int:
    """Sequences per rank and pass; with a pipeline, all microbatches of a step."""
    return run.batch.micro * (run.batch.accumulation if run.parallelism.pp > 1 else 1)


def _has_pipeline(run: RunSpec) -> bool:
    return run.parallelism.pp > 1


def _schedule(run: RunSpec) -> str:
    """The schedule's name in torch.distributed.pipelining."""
    if run.parallelism.schedule == "gpipe":
        return "GPipe"
    return "Interleaved1F1B" if run.parallelism.virtual_stages > 1 else "1F1B"


def _stages_remark(run: RunSpec) -> str:
    p = run.parallelism
    if p.first_stage_layers is None and p.last_stage_layers is None and p.virtual_stages == 1:
        return ""
    return "list the modules of every stage in parallelism.module_fqns_per_model_part"


def _dtype(run: RunSpec) -> str:
    return "float32" if run.precision.weights == "fp32" else "bfloat16"


def _mixed_precision(run: RunSpec) -> str:
    return "bfloat16" if shared_keys.computes(run) == "bf16" else "float32"


def _config_remark(run: RunSpec) -> str:
    if _config(run)[0] != "MODULE":
        return ""
    return "torchtitan 0.3 has no config of this model: name your own module and config"


def _fp16_remark(run: RunSpec) -> str:
    return "torchtitan has no fp16: it computes in bf16" if shared_keys.computes(run) == "fp16" else ""


def _method_remark(run: RunSpec) -> str:
    return "" if run.method.kind == "full" else f"{run.method.kind} needs a config of your own"


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    module, config = _config(run)
    flags = [f"--{key} {value}" for key, value in values.items() if not isinstance(value, bool)]
    for key, value in values.items():
        if isinstance(value, bool):
            part, _, name = key.rpartition(".")
            flags.append(f"--{part}.{name}" if value else f"--{part}.no_{name}")
    checkpointing = run.kernels.checkpointing
    if checkpointing in ("full", "selective"):
        flags.append(f"activation_checkpoint:{checkpointing}")  # a subcommand, which must come last
    comments = [*head_node(nodes), *remarks]
    if checkpointing not in ("full", "selective"):
        comments.append("set activation_checkpoint to none in the config")
    return command(f"{torchrun(nodes)} -m torchtitan.train --module {module} --config {config}", flags, comments)


def _degree(name: str) -> FileKey:
    full = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "cp": "context_parallel", "ep": "expert_parallel"}[name]
    return FileKey(f"parallelism.{full}_degree", of_run(lambda run: getattr(run.parallelism, name)))


TORCHTITAN = FileFormat(
    "torchtitan",
    "torchtitan",
    "torchtitan 0.3.0 config/configs.py, config/manager.py, distributed/activation_checkpoint.py",
    ("ddp", "fsdp2"),
    ("etp",),
    (
        FileKey("training.local_batch_size", of_run(_local_batch)),
        FileKey("training.global_batch_size", of_run(sequences)),
        FileKey("training.seq_len", of_run(lambda run: run.batch.sequence)),
        FileKey("training.dtype", of_run(_dtype)),
        FileKey("training.mixed_precision_param", of_run(_mixed_precision)),
        FileKey(
            "parallelism.data_parallel_replicate_degree",
            of_run(lambda run: 1 if _shards(run) else run.parallelism.dp),
        ),
        FileKey(
            "parallelism.data_parallel_shard_degree", of_run(lambda run: run.parallelism.dp if _shards(run) else 1)
        ),
        _degree("tp"),
        _degree("pp"),
        _degree("cp"),
        _degree("ep"),
        FileKey(
            "parallelism.enable_sequence_parallel",
            only_if(lambda run: run.parallelism.tp > 1, of_run(lambda run: run.parallelism.sequence_parallel)),
        ),
        FileKey("parallelism.pipeline_parallel_schedule", only_if(_has_pipeline, of_run(_schedule))),
        FileKey(
            "parallelism.pipeline_parallel_microbatch_size", only_if(_has_pipeline, of_run(lambda run: run.batch.micro))
        ),
    ),
    (counted_as("torchtitan"), _config_remark, _fp16_remark, _method_remark, _stages_remark),
    _write,
)
