"""Megatron-LM's flags for pretrain_gpt.py: sizes of the model, parallelism, batch and recomputation."""

from __future__ import annotations

from collections.abc import Mapping

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
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.spec.run import RunSpec


def _model(run: RunSpec) -> ModelSpec:
    return find_model(run.model)


def _head_dim(run: RunSpec) -> int | None:
    m = _model(run)
    return m.head_dim if m.head_dim * m.num_attention_heads != m.hidden_size else None


def _groups(run: RunSpec) -> int | None:
    m = _model(run)
    return m.num_key_value_heads if m.num_key_value_heads != m.num_attention_heads else None


def _expert_flag(name: str) -> FileKey:
    flag = {"E": "num-experts", "e": "moe-router-topk", "m": "moe-ffn-hidden-size"}[name]
    return FileKey(flag, of_run(lambda run: _model(run).axes().get(name) if "E" in _model(run).axes() else None))


def _unless_1(degree: int) -> int | None:
    return degree if degree > 1 else None


def _granularity(run: RunSpec) -> str | None:
    kind = run.kernels.checkpointing
    return kind if kind in ("full", "selective") else None


def _checkpoints_fully(run: RunSpec) -> bool:
    return run.kernels.checkpointing == "full"


def _family_remark(run: RunSpec) -> str:
    m = _model(run)
    if m.family.parallel.megatron_flags is not None:
        return ""
    return f"add the flags for norms, activation, biases and positions of {m.model_type}"


def _masters_remark(run: RunSpec) -> str:
    if run.precision.weights == "fp32" or run.precision.master is not None:
        return ""
    half = run.precision.weights
    return f"--{half} also keeps fp32 master weights and gradients; --precision mixed counts the master weights"


def _gpipe_remark(run: RunSpec) -> str:
    return "Megatron-LM has only 1F1B, no GPipe" if run.parallelism.schedule == "gpipe" else ""


def _method_remark(run: RunSpec) -> str:
    return "" if run.method.kind == "full" else f"Megatron-LM trains all weights: it has no {run.method.kind}"


def _offload_remark(run: RunSpec) -> str:
    return "these flags do not offload checkpoints to the host" if run.kernels.checkpointing == "offload" else ""


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    flags = [f"--{key}" if value is True else f"--{key} {value}" for key, value in values.items() if value is not False]
    m = _model(run)
    flags += _megatron_gpt_flags(m) if m.is_megatron else m.family.parallel.megatron_flags or ()
    return command(f"{torchrun(nodes)} pretrain_gpt.py", flags, [*head_node(nodes), *remarks])


def _megatron_gpt_flags(m: ModelSpec) -> list[str]:
    """The flags of a megatron_gpt config, in addition to its sizes."""
    flags = ["--swiglu"] if m.get("gated_mlp", False) else []
    flags += ["--normalization RMSNorm"] if m.get("norm_type", "layernorm") == "rmsnorm" else []
    flags += [f"--position-embedding-type {m.get('position_embedding_type', 'learned_absolute')}"]
    flags += [] if m.get("use_bias", True) else ["--disable-bias-linear"]
    flags += [f"--hidden-dropout {m.get('hidden_dropout', 0.1)}"]
    return flags


_EXPERT_AXES = ("E", "e", "m")

MEGATRON = FileFormat(
    "megatron",
    "Megatron-LM",
    "NVIDIA/Megatron-LM megatron/training/arguments.py at 000c4ac24f61 (megatron-core 0.15)",
    ("ddp", "zero1", "fsdp2", "megatron_dist_opt"),
    (),
    (
        FileKey("tensor-model-parallel-size", of_run(lambda run: run.parallelism.tp)),
        FileKey("sequence-parallel", of_run(lambda run: run.parallelism.sequence_parallel)),
        FileKey("pipeline-model-parallel-size", of_run(lambda run: run.parallelism.pp)),
        FileKey(
            "num-virtual-stages-per-pipeline-rank",
            only_if(lambda run: run.parallelism.virtual_stages > 1, of_run(lambda run: run.parallelism.virtual_stages)),
        ),
        FileKey("decoder-first-pipeline-num-layers", of_run(lambda run: run.parallelism.first_stage_layers)),
        FileKey("decoder-last-pipeline-num-layers", of_run(lambda run: run.parallelism.last_stage_layers)),
        FileKey("account-for-embedding-in-pipeline-split", of_run(lambda run: bool(run.parallelism.ends_as_layers))),
        FileKey("account-for-loss-in-pipeline-split", of_run(lambda run: bool(run.parallelism.ends_as_layers))),
        FileKey("context-parallel-size", of_run(lambda run: run.parallelism.cp)),
        FileKey("expert-model-parallel-size", of_run(lambda run: _unless_1(run.parallelism.ep))),
        FileKey("expert-tensor-parallel-size", of_run(lambda run: run.parallelism.etp)),
        FileKey(
            "use-distributed-optimizer", of_run(lambda run: run.parallelism.strategy in ("zero1", "megatron_dist_opt"))
        ),
        FileKey("use-torch-fsdp2", of_run(lambda run: run.parallelism.strategy == "fsdp2")),
        FileKey("micro-batch-size", of_run(lambda run: run.batch.micro)),
        FileKey("global-batch-size", of_run(sequences)),
        FileKey("seq-length", of_run(lambda run: run.batch.sequence)),
        FileKey("bf16", of_run(lambda run: run.precision.weights == "bf16")),
        FileKey("fp16", of_run(lambda run: run.precision.weights == "fp16")),
        FileKey("recompute-granularity", of_run(_granularity)),
        FileKey("recompute-method", only_if(_checkpoints_fully, of_run(lambda run: "uniform"))),
        FileKey("recompute-num-layers", only_if(_checkpoints_fully, of_run(lambda run: 1))),
        FileKey("num-layers", of_run(lambda run: _model(run).num_hidden_layers)),
        FileKey("hidden-size", of_run(lambda run: _model(run).hidden_size)),
        FileKey("ffn-hidden-size", of_run(lambda run: _model(run).intermediate_size)),
        FileKey("num-attention-heads", of_run(lambda run: _model(run).num_attention_heads)),
        FileKey("kv-channels", of_run(_head_dim)),
        FileKey("group-query-attention", of_run(lambda run: _groups(run) is not None)),
        FileKey("num-query-groups", of_run(_groups)),
        *map(_expert_flag, _EXPERT_AXES),
        FileKey(
            "max-position-embeddings",
            of_run(lambda run: max(run.batch.sequence, _model(run).max_position_embeddings or 0)),
        ),
        FileKey("untie-embeddings-and-output-weights", of_run(lambda run: not _model(run).tie_word_embeddings)),
    ),
    (
        counted_as("megatron-core"),
        *(_family_remark, _masters_remark, _method_remark, _offload_remark, _gpipe_remark),
    ),
    _write,
)
