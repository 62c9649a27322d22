"""Emitted launch files: every key exists in the framework, its own classes read the file, and it matches the run."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec
from memplan.core.errors import SpecError, UnknownNameError
from memplan.frameworks.emit import FILE_FORMATS, emit
from memplan.frameworks.whole_file import Nodes
from memplan.resolve.decide import fill_defaults
from tests.sampling import examples

few = settings(max_examples=examples(60), deadline=None)
NODES = Nodes(2, 8)

# Keys of a DeepSpeed config. Source: DeepSpeed 0.19.8 runtime/constants.py, runtime/zero/config.py,
# runtime/zero/offload_config.py, runtime/precision_config.py.
DEEPSPEED_KEYS = {
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("bf16", "fp16", "enabled", "zero_optimization", "stage", "reduce_bucket_size", "allgather_bucket_size"),
    *("sub_group_size", "overlap_comm", "contiguous_gradients", "round_robin_gradients", "device", "pin_memory"),
    *("stage3_prefetch_bucket_size", "stage3_param_persistence_threshold", "stage3_max_live_parameters"),
    *("stage3_max_reuse_distance", "offload_optimizer", "offload_param", "buffer_count", "buffer_size", "max_in_cpu"),
}
# Fields of torchtitan's configs. Source: torchtitan 0.3.0 config/configs.py.
TORCHTITAN_FLAGS = {
    *(f"training.{n}" for n in ("local_batch_size", "global_batch_size", "seq_len", "dtype", "mixed_precision_param")),
    *(f"parallelism.data_parallel_{kind}_degree" for kind in ("replicate", "shard")),
    *(f"parallelism.{kind}_parallel_degree" for kind in ("tensor", "pipeline", "context", "expert")),
    *("parallelism.enable_sequence_parallel", "parallelism.no_enable_sequence_parallel"),
    *("parallelism.pipeline_parallel_microbatch_size", "parallelism.pipeline_parallel_schedule"),
}
# Source: NVIDIA/Megatron-LM megatron/training/arguments.py at 000c4ac24f61.
MEGATRON_FLAGS = {
    *("tensor-model-parallel-size", "pipeline-model-parallel-size", "context-parallel-size"),
    *("expert-model-parallel-size", "expert-tensor-parallel-size", "num-virtual-stages-per-pipeline-rank"),
    *("sequence-parallel", "use-distributed-optimizer", "use-torch-fsdp2", "micro-batch-size", "global-batch-size"),
    *("seq-length", "max-position-embeddings", "bf16", "fp16", "recompute-granularity", "recompute-method"),
    *("recompute-num-layers", "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "kv-channels"),
    *("group-query-attention", "num-query-groups", "num-experts", "moe-router-topk", "moe-ffn-hidden-size"),
    *("untie-embeddings-and-output-weights", "swiglu", "normalization", "position-embedding-type"),
    *("decoder-first-pipeline-num-layers", "decoder-last-pipeline-num-layers"),
    *("account-for-embedding-in-pipeline-split", "account-for-loss-in-pipeline-split"),
    *("disable-bias-linear", "add-qkv-bias", "qk-layernorm", "hidden-dropout"),
    *("no-create-attention-mask-in-dataloader", "no-gradient-accumulation-fusion"),
    *(
        "microbatch-group-size-per-virtual-pipeline-stage",
        "cp-comm-type",
        "cross-entropy-loss-fusion",
        "cross-entropy-fusion-impl",
    ),
}


@st.composite
def runs(draw: st.DrawFn) -> RunSpec:
    """Draw a complete run on sixteen GPUs."""
    dp, tp, pp, cp = draw(st.sampled_from([(16, 1, 1, 1), (2, 8, 1, 1), (4, 1, 1, 4), (2, 4, 2, 1), (4, 2, 2, 1)]))
    strategy = draw(st.sampled_from(["ddp", "zero0", "zero1", "zero2", "zero3", "fsdp", "fsdp2"]))
    return fill_defaults(
        RunSpec.model_validate(
            {
                "model": draw(st.sampled_from(["llama-3.1-8b", "qwen2-7b", "qwen3-30b-a3b", "gemma-2-9b"])),
                "precision": draw(st.sampled_from(["pure", "amp", "mixed", "fp16", "fp32"])),
                "batch": {n: draw(st.integers(1, 64)) for n in ("micro", "accumulation", "sequence")},
                "kernels": {"checkpointing": draw(st.sampled_from(["none", "full", "selective", "offload"]))},
                "parallelism": {
                    "world": 16,
                    "dp": dp,
                    "tp": tp,
                    "pp": pp,
                    "cp": cp,
                    "strategy": strategy,
                    "ep": draw(st.sampled_from([1, 2])),
                    "sequence_parallel": tp > 1 and draw(st.booleans()),
                    "offload": {"optimizer": draw(st.booleans())},
                },
                "gpu": "h100",
            }
        )
    )


def told(name: str, run: RunSpec, nodes: Nodes = NODES) -> str | None:
    """Return the file; None if the framework does not support the run, which the error names."""
    framework, p = FILE_FORMATS[name], run.parallelism
    unsupported = [degree for degree in framework.unsupported_degrees if (getattr(p, degree) or 1) > 1]
    if not unsupported and p.strategy in framework.strategies:
        return emit(name, run, nodes)
    with pytest.raises(SpecError) as raised:
        emit(name, run, nodes)
    assert framework.title in str(raised.value)
    assert raised.value.field == (f"parallelism.{unsupported[0]}" if unsupported else "parallelism.strategy")
    return None


def flags(text: str) -> dict[str, str]:
    """Return a command's flags with their values."""
    command = " ".join(line.rstrip(" \\") for line in text.splitlines() if not line.startswith("#"))
    words = command.partition(".train --module")[2] or command.partition(".py ")[2]
    return {m[1]: m[2] for m in re.finditer(r"--([\w.-]+)(?: ([^\s-]\S*))?", words)}


@few
@given(runs())
def test_accelerates_file_describes_the_run(run: RunSpec) -> None:
    text = told("accelerate", run)
    if text is None:
        return
    read = yaml.safe_load(text)
    p = run.parallelism
    assert (read["num_machines"], read["num_processes"]) == (2, 16)
    sharded = p.strategy.startswith("fsdp") or p.tp * p.cp > 1
    zero = int(p.strategy[-1]) if p.strategy.startswith("zero") else None
    kind = "FSDP" if sharded else ("MULTI_GPU" if zero is None else "DEEPSPEED")
    assert read["distributed_type"] == kind
    assert read.get("deepspeed_config", {}).get("zero_stage") == (zero if kind == "DEEPSPEED" else None)
    if kind == "FSDP":
        assert read["fsdp_config"]["fsdp_version"] == (1 if p.strategy == "fsdp" else 2)
    divided = read.get("parallelism_config", {})
    if p.tp * p.cp > 1:
        sizes = [divided[f"parallelism_config_{n}_size"] for n in ("dp_replicate", "dp_shard", "tp", "cp")]
        assert sizes == [1, p.dp, p.tp, p.cp]
    casts = run.precision.autocast or run.precision.master is not None
    assert read["mixed_precision"] == (run.precision.compute if casts else "no")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
@few
@given(runs())
def test_accelerates_own_classes_take_its_file(run: RunSpec) -> None:
    import tempfile

    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    text = told("accelerate", run)
    if text is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.yaml"
        file.write_text(text, "utf-8")
        config = load_config_from_file(str(file))
    assert isinstance(config, ClusterConfig)
    args = launch_command_parser().parse_args(["train.py"])
    sections: Any = (config.fsdp_config, config.deepspeed_config, config.parallelism_config)
    # A section's keys become launcher options of the same name.
    assert [key for section in sections for key in section if not hasattr(args, key)] == []


@few
@given(runs())
def test_deepspeeds_keys_are_its_own_and_the_batch_is_the_runs(run: RunSpec) -> None:
    text = told("deepspeed", run)
    if text is None:
        return

    def keys(value: Any) -> set[str]:
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    read = json.loads(text)
    assert keys(read) <= DEEPSPEED_KEYS
    b = run.batch
    assert read["train_batch_size"] == b.micro * b.accumulation * 16
    assert read["train_micro_batch_size_per_gpu"] * read["gradient_accumulation_steps"] * 16 == read["train_batch_size"]
    assert read["zero_optimization"]["stage"] == int(run.parallelism.strategy[-1])
    assert ("offload_optimizer" in read["zero_optimization"]) == run.parallelism.offload.optimizer
    assert ("stage3_prefetch_bucket_size" in read["zero_optimization"]) == (run.parallelism.strategy == "zero3")


@few
@given(runs())
def test_torchtitans_flags_are_its_own_and_divide_the_world(run: RunSpec) -> None:
    text = told("torchtitan", run)
    if text is None:
        return
    said = flags(text)
    assert set(said) <= TORCHTITAN_FLAGS | {"config"}
    degrees = ("data_parallel_replicate", "data_parallel_shard", "tensor_parallel", "pipeline_parallel")
    world = 1
    for degree in (*degrees, "context_parallel"):
        world *= int(said[f"parallelism.{degree}_degree"])
    assert world == 16
    p, b = run.parallelism, run.batch
    assert int(said["training.global_batch_size"]) == b.micro * b.accumulation * p.dp
    passes = b.accumulation if p.pp == 1 else 1
    assert int(said["training.local_batch_size"]) * passes * p.dp == int(said["training.global_batch_size"])
    assert ("activation_checkpoint:full" in text) == (run.kernels.checkpointing == "full")


@few
@given(runs())
def test_megatrons_flags_are_its_own_and_divide_the_world(run: RunSpec) -> None:
    text = told("megatron", run)
    if text is None:
        return
    said = flags(text)
    assert set(said) <= MEGATRON_FLAGS
    p, b = run.parallelism, run.batch
    sizes = [int(said[f"{kind}-size"]) for kind in ("tensor-model-parallel", "pipeline-model-parallel")]
    assert [*sizes, int(said["context-parallel-size"])] == [p.tp, p.pp, p.cp]
    assert int(said["global-batch-size"]) == b.micro * b.accumulation * p.dp
    assert ("use-distributed-optimizer" in said) == (p.strategy == "zero1")
    assert ("sequence-parallel" in said) == p.sequence_parallel
    assert int(said.get("expert-model-parallel-size", "1")) == p.ep


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_every_framework_names_its_version(name: str) -> None:
    framework = FILE_FORMATS[name]
    assert re.search(r"\d+\.\d+", framework.source)
    assert framework.strategies


@pytest.mark.parametrize(
    ("nodes", "line"),
    [
        (Nodes(1, 8), "torchrun --standalone --nproc_per_node=8 train.py"),
        (
            Nodes(4, 2),
            "torchrun --nnodes=4 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=$HEAD_NODE:29500 train.py",
        ),
    ],
)
def test_torchrun_starts_a_process_for_every_gpu(nodes: Nodes, line: str) -> None:
    run = RunSpec(model="llama-3.1-8b", parallelism={"world": 8, "dp": 4, "tp": 2, "strategy": "fsdp2"})
    text = emit("torchrun", run, nodes)
    assert text.splitlines()[-1] == line
    assert "# train.py divides its 8 ranks as dp 4 x tp 2 x pp 1 x cp 1, fsdp2" in text


def test_a_model_of_torchtitans_registry_has_its_config() -> None:
    run = fill_defaults(RunSpec(model="llama-3.1-405b", parallelism={"world": 16, "dp": 16, "strategy": "fsdp2"}))
    assert "--module llama3 --config llama3_405b" in emit("torchtitan", run, NODES)
    other = run.model_copy(update={"model": "qwen2-7b"})
    assert "# torchtitan 0.3 has no config of this model" in emit("torchtitan", other, NODES)


def test_sizes_are_megatrons_own_words() -> None:
    run = fill_defaults(RunSpec(model="qwen3-30b-a3b", parallelism={"world": 16, "dp": 16, "ep": 8, "strategy": "ddp"}))
    said = flags(emit("megatron", run, NODES))
    assert (said["num-layers"], said["hidden-size"], said["num-query-groups"], said["kv-channels"]) == (
        *("48", "2048", "4", "128"),
    )
    assert (said["num-experts"], said["moe-router-topk"], said["moe-ffn-hidden-size"]) == ("128", "8", "768")
    assert "qk-layernorm" in said


@pytest.mark.parametrize(
    ("fused", "impl"), [((), None), (("cross_entropy",), "te"), (("compiled_cross_entropy",), "native")]
)
def test_megatrons_fused_losses_have_flags(fused: tuple[str, ...], impl: str | None) -> None:
    run = RunSpec(model="qwen2-7b", kernels={"fused": fused}, profile="megatron-core")
    said = flags(emit("megatron", fill_defaults(run), NODES))
    assert said.get("cross-entropy-fusion-impl") == impl
    assert ("cross-entropy-loss-fusion" in said) == (impl is not None)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_emitted_deepspeed_config_reads_back_as_the_run(stage: int) -> None:
    from memplan.frameworks.deepspeed import read

    zero = {"reduce_bucket_size": 10**8, **({"sub_group_size": 10**7} if stage == 3 else {})}
    run = fill_defaults(
        RunSpec.model_validate(
            {
                "model": "llama-3.1-8b",
                "precision": "mixed",
                "batch": {"micro": 2, "accumulation": 3},
                "parallelism": {
                    "world": 16,
                    "dp": 16,
                    "strategy": f"zero{stage}",
                    "zero": zero,
                    "offload": {"optimizer": True},
                },
            }
        )
    )
    fields = read(json.loads(emit("deepspeed", run, NODES)))
    said = fields["parallelism"]
    assert said["strategy"] == run.parallelism.strategy
    assert said["offload"] == {"optimizer": True}
    assert {name: getattr(run.parallelism.zero, name) for name in zero} == {name: said["zero"][name] for name in zero}
    assert fields["batch"] == {"micro": 2, "accumulation": 3}


def test_pipelines_are_each_frameworks_own_words() -> None:
    over = {"world": 16, "dp": 4, "pp": 4, "strategy": "ddp", "schedule": "gpipe", "first_stage_layers": 7}
    run = fill_defaults(RunSpec(model="llama-3.1-8b", parallelism=over, batch={"micro": 2, "accumulation": 8}))
    titan, megatron = (flags(emit(name, run, NODES)) for name in ("torchtitan", "megatron"))
    assert titan["parallelism.pipeline_parallel_schedule"] == "GPipe"
    assert titan["parallelism.pipeline_parallel_microbatch_size"] == "2"
    assert titan["training.local_batch_size"] == "16"
    assert megatron["decoder-first-pipeline-num-layers"] == "7"
    assert "no GPipe" in emit("megatron", run, NODES)


def test_an_unknown_framework_suggests_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean megatron"):
        emit("megatrom", RunSpec(model="qwen2-7b"), NODES)
