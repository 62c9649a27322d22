"""Megatron-LM's flags for pretrain_gpt.py: sizes of the model, parallelism, batch and recomputation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.catalogue.parallelism.pipeline import group_size
from memplan.frameworks.change_table import Value
from memplan.frameworks.whole_file import FileFormat, Nodes, command, head_node, profile_remark, sequences, torchrun
from memplan.models.cards import find_model
from memplan.models.configs.megatron import fuses_accumulation, gpt_config, positions_of
from memplan.models.model import ModelSpec
from memplan.spec.run import RunSpec


def _keys(run: RunSpec, nodes: Nodes) -> Mapping[str, Value]:
    p, weights, recomputes = run.parallelism, run.precision.weights, run.kernels.checkpointing
    is_full, fused = recomputes == "full", run.kernels.fused or ()
    impl = "te" if "cross_entropy" in fused else "native" if "compiled_cross_entropy" in fused else None
    return {
        "tensor-model-parallel-size": p.tp,
        "sequence-parallel": p.sequence_parallel,
        "pipeline-model-parallel-size": p.pp,
        "num-virtual-stages-per-pipeline-rank": p.virtual_stages if p.virtual_stages > 1 else None,
        "microbatch-group-size-per-virtual-pipeline-stage": group_size(p.pp, run.batch.accumulation)
        if p.virtual_stages > 1 and run.batch.accumulation % p.pp
        else None,
        "decoder-first-pipeline-num-layers": p.first_stage_layers,
        "decoder-last-pipeline-num-layers": p.last_stage_layers,
        "account-for-embedding-in-pipeline-split": bool(p.ends_as_layers),
        "account-for-loss-in-pipeline-split": bool(p.ends_as_layers),
        "context-parallel-size": p.cp,
        "cp-comm-type": "a2a" if p.cp > 1 and p.context == "ulysses" else None,
        "expert-model-parallel-size": p.ep if p.ep > 1 else None,
        "expert-tensor-parallel-size": p.etp,
        "use-distributed-optimizer": p.strategy in ("zero1", "megatron_dist_opt"),
        "use-torch-fsdp2": p.strategy == "fsdp2",
        "micro-batch-size": run.batch.micro,
        "global-batch-size": sequences(run),
        "seq-length": run.batch.sequence,
        "bf16": weights == "bf16",
        "fp16": weights == "fp16",
        "recompute-granularity": recomputes if recomputes in ("full", "selective") else None,
        "recompute-method": "uniform" if is_full else None,
        "recompute-num-layers": 1 if is_full else None,
        "cross-entropy-loss-fusion": impl is not None,
        "cross-entropy-fusion-impl": impl,
        **_sizes(find_model(run.model), run.batch.sequence),
    }


def _sizes(m: ModelSpec, sequence: int) -> Mapping[str, Value]:
    heads, groups, axes = m.num_attention_heads, m.num_key_value_heads, m.axes()
    experts = {"num-experts": "E", "moe-router-topk": "e", "moe-ffn-hidden-size": "m"} if "E" in axes else {}
    return {
        "num-layers": m.num_hidden_layers,
        "hidden-size": m.hidden_size,
        "ffn-hidden-size": m.intermediate_size,
        "num-attention-heads": heads,
        "kv-channels": m.head_dim if m.head_dim * heads != m.hidden_size else None,
        "group-query-attention": groups != heads,
        "num-query-groups": groups if groups != heads else None,
        **{flag: axes.get(axis) for flag, axis in experts.items()},
        "max-position-embeddings": max(sequence, m.max_position_embeddings or 0),
        "untie-embeddings-and-output-weights": not m.tie_word_embeddings,
    }


def _remarks(run: RunSpec) -> Iterator[str]:
    m, weights = find_model(run.model), run.precision.weights
    yield from profile_remark(run, "megatron-core")
    if not m.is_megatron and gpt_config(m) is None:
        yield f"add the flags for norms, activation, biases and positions of {m.model_type}"
    if weights != "fp32" and run.precision.master is None:
        yield f"--{weights} also keeps fp32 master weights and gradients; --precision mixed counts the master weights"
    if run.method.kind != "full":
        yield f"Megatron-LM trains all weights: it has no {run.method.kind}"
    if run.kernels.checkpointing == "offload":
        yield "these flags do not offload checkpoints to the host"
    if run.parallelism.schedule == "gpipe":
        yield "Megatron-LM has only 1F1B, no GPipe"


def _write(values: Mapping[str, Value], remarks: list[str], run: RunSpec, nodes: Nodes) -> str:
    flags = [f"--{key}" if value is True else f"--{key} {value}" for key, value in values.items() if value is not False]
    m = find_model(run.model)
    config = m.config if m.is_megatron else gpt_config(m)
    flags += [] if config is None else _gpt_flags(ModelSpec(config))
    return command(f"{torchrun(nodes)} pretrain_gpt.py", flags, [*head_node(nodes), *remarks])


def _gpt_flags(m: ModelSpec) -> list[str]:
    """The flags of a megatron_gpt config, in addition to its sizes."""
    flags = ["--swiglu"] if m.get("gated_mlp", False) else []
    flags += ["--normalization RMSNorm"] if m.get("norm_type", "layernorm") == "rmsnorm" else []
    flags += [f"--position-embedding-type {positions_of(m)}"]
    flags += [] if m.get("use_bias", True) else ["--disable-bias-linear"]
    flags += ["--add-qkv-bias"] if m.get("add_qkv_bias", False) else []
    flags += ["--qk-layernorm"] if m.get("qk_layernorm", False) else []
    flags += [] if m.get("create_attention_mask", True) else ["--no-create-attention-mask-in-dataloader"]
    flags += [] if fuses_accumulation(m) else ["--no-gradient-accumulation-fusion"]
    flags += [f"--hidden-dropout {m.get('hidden_dropout', 0.1)}"]
    return flags


MEGATRON = FileFormat(
    "megatron",
    "Megatron-LM",
    "NVIDIA/Megatron-LM megatron/training/arguments.py at 000c4ac24f61 (megatron-core 0.15)",
    ("ddp", "zero1", "fsdp2", "megatron_dist_opt"),
    (),
    _keys,
    _remarks,
    _write,
)
