"""Megatron-LM's flags, for pretrain_gpt.py: the model's sizes, how it is divided, batch and recomputation."""

from __future__ import annotations

from collections.abc import Mapping

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
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.spec.run import RunSpec

# What a family is in Megatron's words, beside its sizes.
_LLAMA = ("--swiglu", "--normalization RMSNorm", "--position-embedding-type rope", "--disable-bias-linear")
_KINDS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": (*_LLAMA, "--add-qkv-bias"),
    "qwen3": (*_LLAMA, "--qk-layernorm"),
    "qwen3_moe": (*_LLAMA, "--qk-layernorm"),
}


def _model(run: RunSpec) -> ModelSpec:
    return find_model(run.model)


def _heads(run: RunSpec) -> int | None:
    m = _model(run)
    return m.head_dim if m.head_dim * m.num_attention_heads != m.hidden_size else None


def _groups(run: RunSpec) -> int | None:
    m = _model(run)
    return m.num_key_value_heads if m.num_key_value_heads != m.num_attention_heads else None


def _axis(name: str) -> Said:
    flag = {"E": "num-experts", "e": "moe-router-topk", "m": "moe-ffn-hidden-size"}[name]
    return Said(flag, of_run(lambda run: _model(run).axes().get(name) if "E" in _model(run).axes() else None))


def _several(degree: int) -> int | None:
    return degree if degree > 1 else None


def _granularity(run: RunSpec) -> str | None:
    kind = run.kernels.checkpointing
    return kind if kind in ("full", "selective") else None


def _full(run: RunSpec) -> bool:
    return run.kernels.checkpointing == "full"


def _family(run: RunSpec) -> str:
    kind = _model(run).model_type
    if kind in (*_KINDS, "megatron_gpt"):
        return ""
    return f"norms, activation, biases and positions of {kind} are to be said too"


def _masters(run: RunSpec) -> str:
    if run.precision.weights == "fp32" or run.precision.master is not None:
        return ""
    half = run.precision.weights
    return f"--{half} keeps fp32 masters and gradients beside {half} weights; --precision mixed counts the masters"


def _gpipe(run: RunSpec) -> str:
    return "Megatron-LM has 1F1B alone, no GPipe" if run.parallelism.schedule == "gpipe" else ""


def _adapters(run: RunSpec) -> str:
    return "" if run.method.kind == "full" else f"Megatron-LM trains all weights: it has no {run.method.kind}"


def _to_host(run: RunSpec) -> str:
    return "layers' inputs are not kept on the host so" if run.kernels.checkpointing == "offload" else ""


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    flags = [f"--{key}" if value is True else f"--{key} {value}" for key, value in values.items() if value is not False]
    m = _model(run)
    if m.model_type == "megatron_gpt":
        flags += _own(m)
    elif m.model_type in _KINDS:
        flags += _KINDS[m.model_type]
    return command(f"{torchrun(nodes)} pretrain_gpt.py", flags, [*head_node(nodes), *remarks])


def _own(m: ModelSpec) -> list[str]:
    """What a megatron_gpt config says beside sizes."""
    flags = ["--swiglu"] if m.get("gated_mlp", False) else []
    flags += ["--normalization RMSNorm"] if m.get("norm_type", "layernorm") == "rmsnorm" else []
    flags += [f"--position-embedding-type {m.get('position_embedding_type', 'learned_absolute')}"]
    flags += [] if m.get("use_bias", True) else ["--disable-bias-linear"]
    flags += [f"--hidden-dropout {m.get('hidden_dropout', 0.1)}"]
    return flags


_MOE = ("E", "e", "m")

MEGATRON = Written(
    "megatron",
    "Megatron-LM",
    "NVIDIA/Megatron-LM megatron/training/arguments.py at 000c4ac24f61 (megatron-core 0.15)",
    ("ddp", "zero1", "fsdp2", "megatron_dist_opt"),
    (),
    (
        Said("tensor-model-parallel-size", of_run(lambda run: run.parallelism.tp)),
        Said("sequence-parallel", of_run(lambda run: run.parallelism.sequence_parallel)),
        Said("pipeline-model-parallel-size", of_run(lambda run: run.parallelism.pp)),
        Said(
            "num-virtual-stages-per-pipeline-rank",
            where(lambda run: run.parallelism.virtual_stages > 1, of_run(lambda run: run.parallelism.virtual_stages)),
        ),
        Said("decoder-first-pipeline-num-layers", of_run(lambda run: run.parallelism.first_stage_layers)),
        Said("decoder-last-pipeline-num-layers", of_run(lambda run: run.parallelism.last_stage_layers)),
        Said("account-for-embedding-in-pipeline-split", of_run(lambda run: bool(run.parallelism.ends_as_layers))),
        Said("account-for-loss-in-pipeline-split", of_run(lambda run: bool(run.parallelism.ends_as_layers))),
        Said("context-parallel-size", of_run(lambda run: run.parallelism.cp)),
        Said("expert-model-parallel-size", of_run(lambda run: _several(run.parallelism.ep))),
        Said("expert-tensor-parallel-size", of_run(lambda run: run.parallelism.etp)),
        Said(
            "use-distributed-optimizer", of_run(lambda run: run.parallelism.strategy in ("zero1", "megatron_dist_opt"))
        ),
        Said("use-torch-fsdp2", of_run(lambda run: run.parallelism.strategy == "fsdp2")),
        Said("micro-batch-size", of_run(lambda run: run.batch.micro)),
        Said("global-batch-size", of_run(sequences)),
        Said("seq-length", of_run(lambda run: run.batch.sequence)),
        Said("bf16", of_run(lambda run: run.precision.weights == "bf16")),
        Said("fp16", of_run(lambda run: run.precision.weights == "fp16")),
        Said("recompute-granularity", of_run(_granularity)),
        Said("recompute-method", where(_full, of_run(lambda run: "uniform"))),
        Said("recompute-num-layers", where(_full, of_run(lambda run: 1))),
        Said("num-layers", of_run(lambda run: _model(run).num_hidden_layers)),
        Said("hidden-size", of_run(lambda run: _model(run).hidden_size)),
        Said("ffn-hidden-size", of_run(lambda run: _model(run).intermediate_size)),
        Said("num-attention-heads", of_run(lambda run: _model(run).num_attention_heads)),
        Said("kv-channels", of_run(_heads)),
        Said("group-query-attention", of_run(lambda run: _groups(run) is not None)),
        Said("num-query-groups", of_run(_groups)),
        *map(_axis, _MOE),
        Said(
            "max-position-embeddings",
            of_run(lambda run: max(run.batch.sequence, _model(run).max_position_embeddings or 0)),
        ),
        Said("untie-embeddings-and-output-weights", of_run(lambda run: not _model(run).tie_word_embeddings)),
    ),
    (counted_as("megatron-core"), _family, _masters, _adapters, _to_host, _gpipe),
    _write,
)
