"""torchtitan's command line: since February 2026 a function of its registry and flags, instead of TOML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.frameworks import shared_keys
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import FileFormat, Nodes, command, head_node, profile_remark, sequences, torchrun
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


def _keys(run: RunSpec, nodes: Nodes) -> Mapping[str, Value]:
    p, b, has_pipeline, shards = run.parallelism, run.batch, run.parallelism.pp > 1, run.parallelism.strategy == "fsdp2"
    interleaved = "Interleaved1F1B" if p.virtual_stages > 1 else "1F1B"
    schedule = "GPipe" if p.schedule == "gpipe" else interleaved  # as torch.distributed.pipelining names it
    return {
        # sequences per rank and pass; with a pipeline, all microbatches of a step
        "training.local_batch_size": b.micro * (b.accumulation if has_pipeline else 1),
        "training.global_batch_size": sequences(run),
        "training.seq_len": b.sequence,
        "training.dtype": "float32" if run.precision.weights == "fp32" else "bfloat16",
        "training.mixed_precision_param": "bfloat16" if shared_keys.computes(run) == "bf16" else "float32",
        "parallelism.data_parallel_replicate_degree": 1 if shards else p.dp,
        "parallelism.data_parallel_shard_degree": p.dp if shards else 1,
        "parallelism.tensor_parallel_degree": p.tp,
        "parallelism.pipeline_parallel_degree": p.pp,
        "parallelism.context_parallel_degree": p.cp,
        "parallelism.expert_parallel_degree": p.ep,
        "parallelism.enable_sequence_parallel": p.sequence_parallel if p.tp > 1 else None,
        "parallelism.pipeline_parallel_schedule": schedule if has_pipeline else None,
        "parallelism.pipeline_parallel_microbatch_size": b.micro if has_pipeline else None,
    }


def _remarks(run: RunSpec) -> Iterator[str]:
    p = run.parallelism
    yield from profile_remark(run, "torchtitan")
    if _config(run)[0] == "MODULE":
        yield "torchtitan 0.3 has no config of this model: name your own module and config"
    if shared_keys.computes(run) == "fp16":
        yield "torchtitan has no fp16: it computes in bf16"
    if run.kernels.every_n_layers > 1:
        yield "torchtitan 0.3 checkpoints every layer; 0.2 has activation_checkpoint.selective_ac_option"
    if run.method.kind != "full":
        yield f"{run.method.kind} needs a config of your own"
    if p.first_stage_layers is not None or p.last_stage_layers is not None or p.virtual_stages != 1:
        yield "list the modules of every stage in parallelism.module_fqns_per_model_part"


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


TORCHTITAN = FileFormat(
    "torchtitan",
    "torchtitan",
    "torchtitan 0.3.0 config/configs.py, config/manager.py, distributed/activation_checkpoint.py",
    ("ddp", "fsdp2"),
    ("etp",),
    _keys,
    _remarks,
    _write,
)
