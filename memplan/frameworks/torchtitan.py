"""torchtitan's command line: it has had no TOML since February 2026, but flags over a function of its registry."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.frameworks import shared_keys as words
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import (
    Nodes,
    Said,
    Written,
    command,
    counted_as,
    head_node,
    of_run,
    sequences,
    torchrun,
    where,
)
from memplan.spec.run import RunSpec

# Functions of torchtitan's registry, by the model's id. Source: torchtitan 0.3.0 models/*/config_registry.py.
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
    return _CONFIGS.get(str(words.model(run)), ("MODULE", "CONFIG"))


def _shards(run: RunSpec) -> bool:
    return run.parallelism.strategy == "fsdp2"


def _local_batch(run: RunSpec) -> int:
    """Of a pipeline, all microbatches of a step."""
    return run.batch.micro * (run.batch.accumulation if run.parallelism.pp > 1 else 1)


def _pipeline(run: RunSpec) -> bool:
    return run.parallelism.pp > 1


def _schedule(run: RunSpec) -> str:
    """As torch.distributed.pipelining names it."""
    if run.parallelism.schedule == "gpipe":
        return "GPipe"
    return "Interleaved1F1B" if run.parallelism.virtual_stages > 1 else "1F1B"


def _uneven(run: RunSpec) -> str:
    p = run.parallelism
    if p.first_stage_layers is None and p.last_stage_layers is None and p.virtual_stages == 1:
        return ""
    return "how layers are dealt to stages is parallelism.module_fqns_per_model_part, a list of names"


def _dtype(run: RunSpec) -> str:
    return "float32" if run.precision.weights == "fp32" else "bfloat16"


def _mixed(run: RunSpec) -> str:
    return "bfloat16" if words.computes(run) == "bf16" else "float32"


def _unknown(run: RunSpec) -> str:
    if _config(run)[0] != "MODULE":
        return ""
    return "torchtitan 0.3 has no config of this model: name your own module and config"


def _half(run: RunSpec) -> str:
    return "torchtitan has no fp16: it computes in bf16" if words.computes(run) == "fp16" else ""


def _method(run: RunSpec) -> str:
    return "" if run.method.kind == "full" else f"{run.method.kind} is to be written in a config of your own"


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    module, config = _config(run)
    flags = [f"--{key} {value}" for key, value in values.items() if not isinstance(value, bool)]
    for key, value in values.items():
        if isinstance(value, bool):
            part, _, name = key.rpartition(".")
            flags.append(f"--{part}.{name}" if value else f"--{part}.no_{name}")
    checkpointing = run.kernels.checkpointing
    if checkpointing in ("full", "selective"):
        flags.append(f"activation_checkpoint:{checkpointing}")  # a subcommand, so last
    said = [*head_node(nodes), *remarks]
    if checkpointing not in ("full", "selective"):
        said.append("the config's own activation_checkpoint has to be none of torchtitan's")
    return command(f"{torchrun(nodes)} -m torchtitan.train --module {module} --config {config}", flags, said)


def _degree(name: str) -> Said:
    full = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "cp": "context_parallel", "ep": "expert_parallel"}[name]
    return Said(f"parallelism.{full}_degree", of_run(lambda run: getattr(run.parallelism, name)))


TORCHTITAN = Written(
    "torchtitan",
    "torchtitan",
    "torchtitan 0.3.0 config/configs.py, config/manager.py, distributed/activation_checkpoint.py",
    ("ddp", "fsdp2"),
    ("etp",),
    (
        Said("training.local_batch_size", of_run(_local_batch)),
        Said("training.global_batch_size", of_run(sequences)),
        Said("training.seq_len", of_run(lambda run: run.batch.sequence)),
        Said("training.dtype", of_run(_dtype)),
        Said("training.mixed_precision_param", of_run(_mixed)),
        Said(
            "parallelism.data_parallel_replicate_degree",
            of_run(lambda run: 1 if _shards(run) else run.parallelism.dp),
        ),
        Said("parallelism.data_parallel_shard_degree", of_run(lambda run: run.parallelism.dp if _shards(run) else 1)),
        _degree("tp"),
        _degree("pp"),
        _degree("cp"),
        _degree("ep"),
        Said(
            "parallelism.enable_sequence_parallel",
            where(lambda run: run.parallelism.tp > 1, of_run(lambda run: run.parallelism.sequence_parallel)),
        ),
        Said("parallelism.pipeline_parallel_schedule", where(_pipeline, of_run(_schedule))),
        Said("parallelism.pipeline_parallel_microbatch_size", where(_pipeline, of_run(lambda run: run.batch.micro))),
    ),
    (counted_as("torchtitan"), _unknown, _half, _method, _uneven),
    _write,
)
