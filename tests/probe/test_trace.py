"""Traces: fake tensors against real ones, kernels' scratch against arithmetic, traced steps against the estimate."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.core.errors import MemplanError, ProbeError, SpecError, UnknownNameError, UnsupportedModelError
from memplan.probe.difference import difference, phases
from memplan.probe.fake import fake_device
from memplan.probe.libraries import require
from memplan.probe.run.trace import TracedRun, Tracer, traces
from tests.encoders import SMALL
from tests.tiny import TINY
from tests.tiny_vision import TINY as TINY_VISION

pytestmark = pytest.mark.torch


def tiny(family: str, **parts: Any) -> RunSpec:
    """Return a run of the family's smallest config, with 2 sequences of 24 tokens by default."""
    model = {"config": {"model_type": family, **(TINY.get(family) or TINY_VISION[family])}}
    return RunSpec(model=model, **{"batch": {"micro": 2, "sequence": 24}, **parts})


@pytest.fixture(scope="module")
def traced(tracer: Tracer) -> Mapping[str, TracedRun]:
    return {name: tracer.trace(run) for name, run in RUNS.items()}


LONG = {"micro": 1, "sequence": 3200}  # more tokens than an embedding's backward handles without sorting
PLAIN = {"checkpointing": "none"}
HOST = {"offload": {"optimizer": True}}
SAVED = {"offload": {"activations": True}}
INT8 = {"kind": "qlora", "rank": 4, "quantization": {"format": "int8"}}
RUNS = {
    "full": tiny("llama", optimizer="adamw_torch", kernels={"attention": "sdpa"}),
    "long": tiny("qwen2", batch=LONG, optimizer="sgd", kernels={"attention": "sdpa_efficient"}),
    "eager": tiny("gemma2", batch={"micro": 2, "sequence": 24, "accumulation": 2}, kernels={"attention": "eager"}),
    "lora": tiny("mistral", method={"kind": "lora", "rank": 4}, optimizer="adafactor", kernels=PLAIN),
    "qlora": tiny("llama", method={"kind": "qlora", "rank": 4}, optimizer="adamw_8bit", kernels=PLAIN),
    "dora": tiny("phi3", method={"kind": "dora", "rank": 4}, precision={"autocast": True}, kernels=PLAIN),
    "t4": tiny("olmo2", precision="fp16", gpu="t4", optimizer={"name": "sgd", "momentum": 0.9}),
    "flash 2": tiny("qwen3", kernels={**PLAIN, "attention": "flash_attention_2"}),
    "int8": tiny("llama", method=INT8, kernels=PLAIN),
    "fused": tiny("llama", kernels={**PLAIN, "loss": "fused"}),
    "chunked": tiny("llama", kernels={**PLAIN, "loss": "chunked"}),
    "chunks are held": tiny("llama", kernels={**PLAIN, "loss": "chunked"}, loop={"hold_outputs": "step"}),
    "torch's RMSNorm": tiny("diffllama", kernels=PLAIN),
    "freeze": tiny("qwen2_vl", method={"kind": "freeze", "trainable_layers": 1}),
    "by tokens": tiny("llama", batch={"micro": 2, "sequence": 256}, kernels={**PLAIN, "loss": "chunked_lm_head"}),
    "last chunk of a token": tiny("gemma", batch={"sequence": 129}, kernels={**PLAIN, "loss": "chunked_lm_head"}),
    "recomputed chunks": tiny("llama", batch={"micro": 2, "sequence": 256}, kernels={**PLAIN, "loss": "chunked_nll"}),
    "chunks in fp32": tiny("gemma2", batch={"micro": 3, "sequence": 128}, kernels={"loss": "chunked_nll_fp32"}),
    "tiles": tiny("gemma2", batch={"micro": 3, "sequence": 128}, kernels={**PLAIN, "loss": "tiled_lm_head"}),
    "tiles, autocast": tiny("cohere", precision="amp", kernels={"loss": "tiled_lm_head"}),
    "offload": tiny("llama", kernels={"checkpointing": "offload"}),
    "offload, reentrant": tiny("qwen2", kernels={"checkpointing": "offload", "reentrant": True}),
    "offload, autocast": tiny("llama", precision="amp", kernels={"checkpointing": "offload", "reentrant": True}),
    "offload, adapters": tiny("llama", method={"kind": "lora", "rank": 4}, kernels={"checkpointing": "offload"}),
    "saved": tiny("llama", kernels=PLAIN, parallelism=SAVED),
    "saved, masked": tiny("cohere2", batch={"micro": 2, "sequence": 96}, kernels=PLAIN, parallelism=SAVED),
    "saved, adapters": tiny("mistral", method={"kind": "lora", "rank": 4}, precision="amp", parallelism=SAVED),
    "host": tiny("llama", optimizer="adamw_torch", parallelism=HOST),
    "host, adapters": tiny("gpt2", method={"kind": "lora", "rank": 4}, optimizer="adagrad", parallelism=HOST),
    "host, in backward": tiny("llama", optimizer={"name": "sgd", "in_backward": True}, parallelism=HOST),
    "in backward": tiny("gpt2", optimizer={"name": "adafactor", "in_backward": True}),
}
# Known differences of the estimate, in bytes of any phase: bitsandbytes' table, tensors that MatMul8bitLt saves in
# addition to its input, flash-attn's random state, which is one tensor and not two, labels kept by a fused loss, the
# rounding of eight chunks, a copy of the last chunk of 128 tokens without its last token, a chunk's losses, numbers per
# token of TRL's losses, and the first step's states with updates in backward.
NEAR = {
    "qlora": 1024,
    "flash 2": 1536,
    "fused": 512,
    "chunked": 2048,
    "chunks are held": 2048,
    "by tokens": 2 * 127 * TINY["llama"]["vocab_size"] * 2,
    "last chunk of a token": 512,
    "recomputed chunks": 3072,
    "tiles": 11 * 512,
    "tiles, autocast": 5 * 512,
    "in backward": 26 * 1024,
}


@pytest.mark.parametrize("name", RUNS)
def test_traced_and_estimated_peaks_are_equal(name: str, traced: Mapping[str, TracedRun]) -> None:
    trace, answer = traced[name], estimate(RUNS[name])
    assert (trace.parameters, trace.trainable) == (answer.parameters.total, answer.parameters.trainable)
    lines = [line for line in phases(trace, answer) if line.phase != "load"]
    assert {line.phase for line in lines} >= {"forward", "backward", "step"}
    within = NEAR.get(name, 0)
    assert max(abs(line.estimated - line.traced) for line in lines) <= within, lines
    if not within:
        assert [line for line in difference(trace, answer) if line.phase != "step"] == []  # its scratch is one line


def test_frozen_are_layers_and_not_the_longer_lists_inside_of_them(tracer: Tracer) -> None:
    config = {"model_type": "t5", **SMALL["t5"], "num_decoder_layers": 2}
    run = RunSpec(model={"config": config}, method={"kind": "freeze", "trainable_layers": 1}, batch={"sequence": 24})
    assert tracer.trace(run).trainable == estimate(run).parameters.trainable


@pytest.mark.parametrize("name", ["full", "lora"])
def test_traced_and_recorded_allocations_fill_the_same_segments(name: str, traced: Mapping[str, TracedRun]) -> None:
    reserved = estimate(RUNS[name]).bytes.reserved
    assert traced[name].peak < traced[name].reserved
    assert abs(traced[name].reserved - reserved) <= 20 * 2**20  # the trace loads in another order


def test_missing_and_surplus_tensors_sum_to_each_phases_difference(
    traced: Mapping[str, TracedRun],
) -> None:
    # a trace compared with the estimate of another run: without checkpointing, with adapters twice as wide
    for name, other in (
        ("full", tiny("llama", optimizer="adamw_torch", kernels=PLAIN)),
        ("lora", tiny("mistral", method={"kind": "lora", "rank": 8}, kernels={"checkpointing": "full"})),
        ("eager", tiny("gemma2", kernels=PLAIN, loop={"hold_outputs": True})),
    ):
        answer = estimate(other)
        found, off = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        for line in difference(traced[name], answer):
            found[line.phase, line.step] += line.bytes
            assert (line.bytes < 0) == (line.verdict in ("lacks", "goes too early"))
            assert line.count > 0
        for phase in phases(traced[name], answer):
            if phase.phase != "load":
                off[phase.phase, phase.step] += phase.estimated - phase.traced
        assert found == off
        assert any(off.values())


def test_the_lines_name_tensors_on_either_side(traced: Mapping[str, TracedRun]) -> None:
    kept = difference(traced["full"], estimate(tiny("llama", optimizer="adamw_torch", kernels=PLAIN)))
    assert {line.verdict for line in kept if line.where.startswith("model.layers")} >= {"too many"}
    let_go = difference(traced["lora"], estimate(tiny("mistral", method={"kind": "lora", "rank": 4})))
    lacking = [line for line in let_go if line.bytes < 0 and line.phase == "forward"]
    assert any(line.where == "base_model.model.model.layers.N.mlp" for line in lacking), lacking


@pytest.mark.parametrize("name", RUNS)
def test_a_trace_adds_up(name: str, traced: Mapping[str, TracedRun]) -> None:
    trace = traced[name]
    assert min(trace.allocated) >= 0
    assert trace.peak == max(trace.allocated) == sum(trace.categories.values()) == sum(s.bytes for s in trace.alive)
    assert all(s.bytes >= s.asked and s.bytes % 512 == 0 for s in trace.storages)
    assert Counter(e >= 0 for e in trace.events)[True] == len(trace.storages)
    assert {trace.peak, trace.peak_of(*_split(trace.peak_phase))} == {trace.peak}
    assert {"torch", "transformers", "peft"} <= trace.versions.keys()


def _split(phase: str) -> tuple[str, int]:
    name, _, step = phase.partition(" ")
    return name, int(step or 0)


# --- fake tensors against real ones

CPU = [
    tiny("llama", kernels={"attention": "eager", "checkpointing": "none"}),
    tiny("qwen2", method={"kind": "lora", "rank": 4}, kernels={"attention": "sdpa_math"}, optimizer="adafactor"),
    tiny("gpt2", method={"kind": "dora", "rank": 4}, kernels={"attention": "eager"}, optimizer="sgd"),
    tiny(
        "phi3",
        precision="fp32",
        optimizer={"name": "adamw_torch"},
        kernels={"attention": "sdpa_math", "checkpointing": "none"},
        batch={"micro": 1, "sequence": 24, "accumulation": 2},
        loop={"hold_outputs": True},
    ),
]


@pytest.mark.parametrize("run", CPU, ids=lambda run: run.method.kind)
def test_fake_tensors_are_allocated_and_freed_like_real_ones(run: RunSpec, tracer: Tracer) -> None:
    steps = run.batch.accumulation  # one shows forward, backward and the creation of states, two their reuse
    fake, real = (tracer.trace(run, steps, device="cpu", data=data) for data in (False, True))
    assert fake.events == real.events
    assert fake.storages == real.storages
    assert fake.phases == real.phases


# --- scratch memory of kernels


def scratch(op: str, *args: Any, capability: tuple[int, int] = (8, 0), **kwargs: Any) -> list[int]:
    from memplan.catalogue.quantization.fused_4bit import card_of
    from memplan.probe.fake.kernels import ROWS

    row = next(row for row in ROWS if row.op == op)
    return [bytes_ for _, bytes_ in row.bytes_of(args, kwargs, card_of(capability))]


def meta(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def test_flash_backward_allocates_row_sums_fp32_gradients_and_expanded_key_gradients() -> None:
    op = "aten::_scaled_dot_product_flash_attention_backward"
    q, k = meta(2, 8, 100, 40), meta(2, 4, 100, 40)
    assert scratch(op, None, q, q, q) == [4 * 2 * 8 * 128, 4 * 2 * 8 * 128 * 64]
    assert scratch(op, None, q, k, k)[2:] == [2 * 100 * 8 * 40 * 2] * 2


def test_efficient_backward_has_a_workspace_by_the_tile_the_card_holds() -> None:
    op = "aten::_scaled_dot_product_efficient_attention_backward"
    narrow, wide = meta(2, 8, 100, 64), meta(2, 8, 100, 128)
    assert scratch(op, None, narrow, narrow, narrow) == [4 * 2 * 8 * 100, 16 * 2 * 1 * (64 * 64 * 4 + 16)]
    assert scratch(op, None, wide, wide, wide)[1] == 16 * 1 * (128 * 128 * 4 + 16)
    keys = 4 * 2 * 128 * (128 + 128)  # two splits of keys, in a tile of 64 x 64
    assert scratch(op, None, wide, wide, wide, capability=(8, 6))[1] == 16 * (2 * 2 * (64 * 64 * 4 + 16) + keys)
    single = meta(2, 8, 100, 64, dtype="float32")
    assert scratch(op, None, single, single, single)[1:3] == [4 * 2 * 100 * 8 * 64, 4 * 2 * 100 * 8]


def test_few_rows_read_4_bit_matrices_packed_as_in_bitsandbytes() -> None:
    import torch

    from memplan.catalogue.quantization.fused_4bit import KernelCard, reads_packed
    from memplan.probe.fake.kernels import heuristic

    random, dtypes = Random(0), {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    sizes = (64, 200, 576, 1024, 1536, 2048, 3072, 4096, 5120, 8192, 11008, 13824, 14336, 28672)
    for capability in ((7, 0), (7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (11, 0), (12, 0), (12, 1)):
        for processors in (40, 82, 108, 132, 170):
            card = KernelCard(capability, processors if capability != (8, 9) else 128)
            choose = heuristic(card)
            assert choose is not None
            for _ in range(300):
                rows = random.choice((*range(1, 18), random.randint(18, 1536)))
                n, k, dtype = random.choice(sizes), random.choice(sizes), random.choice([*dtypes])
                case = rows, n, k, dtype, card
                assert reads_packed(*case) == bool(choose(0, dtypes[dtype], rows, n, k)), case


def test_embedding_backward_sorts_more_than_3072_indices() -> None:
    op = "aten::embedding_dense_backward"
    few, many = meta(3072, dtype="int64"), meta(4000, dtype="int64")
    assert scratch(op, meta(3072, 40), few, 1000) == []
    segments = 4000 // 10 + 1000
    assert scratch(op, meta(4000, 40), many, 1000) == [8 * 4000] * 5 + [8 * segments, segments * 64 * 4]


def test_small_rows() -> None:
    assert scratch("aten::_softmax_backward_data", None, meta(2, 3, 4)) == [2 * 3 * 4 * 2]
    norms = [meta(65536), meta(65537), meta(2)]
    assert scratch("aten::_foreach_norm.Scalar", norms) == [4 * 3 * 2]
    assert scratch("aten::_foreach_norm.Scalar", []) == []
    codes, weight = meta(6, 16, dtype="int8"), meta(32, 16, dtype="int8")
    import torch

    assert scratch("bitsandbytes::int8_scaled_mm", codes, weight, dtype=torch.float16) == [4 * 6 * 32]
    assert scratch("bitsandbytes::int8_scaled_mm", codes, weight, dtype=torch.bfloat16) == [4 * 6 * 32, 2 * 6 * 32]
    positional = (codes, weight, None, None, None, torch.bfloat16)  # as torch's dispatcher passes it on
    assert scratch("bitsandbytes::int8_scaled_mm", *positional) == [4 * 6 * 32, 2 * 6 * 32]


def test_a_4_bit_product_dequantises_its_matrix_where_bitsandbytes_would() -> None:
    op, x = "bitsandbytes::gemm_4bit", meta(512, 4096)
    plain = scratch(op, x, None, (14336, 4096), None, 64, "nf4")
    assert plain == [14336 * 4096 * 2]
    nested = scratch(op, x, None, (14336, 4096), None, 64, "nf4", absmax_8bit=meta(1))
    assert nested == [4 * 14336 * 4096 // 64] * 2 + plain
    assert scratch(op, meta(1, 4096), None, (14336, 4096), None, 64, "nf4") == []  # the fused kernel, for one token


def test_every_row_is_met_by_a_traced_step(traced: Mapping[str, TracedRun]) -> None:
    met = {storage.op for trace in traced.values() for storage in trace.storages}
    assert met >= {
        "flash row sums",
        "efficient workspace",
        "embedding sums",
        "softmax gradient times output",
        "norms of parts",
        "4-bit matrix dequantised",
        "int32 product",
    }


def test_the_card_decides_the_kernel(traced: Mapping[str, TracedRun]) -> None:
    def kernels(name: str) -> set[str]:
        return {s.op for s in traced[name].storages if s.op.startswith("_scaled_dot_product") and "back" not in s.op}

    assert kernels("full") == {"_scaled_dot_product_flash_attention"}
    assert kernels("t4") == {"_scaled_dot_product_efficient_attention"}
    assert kernels("flash 2") == kernels("eager") == set()


# --- families without a stack, other tasks


def test_a_family_without_a_stack_can_be_traced(tracer: Tracer) -> None:
    config = {"model_type": "persimmon", **TINY["mistral"]}
    run = RunSpec(model={"config": config}, batch={"micro": 2, "sequence": 24}, method="lora", precision="fp32")
    trace = tracer.trace(run, steps=1)
    assert trace.peak_of("backward", 1) is not None
    assert any("query_key_value" in storage.module for storage in trace.storages)
    with pytest.raises(UnsupportedModelError):
        estimate(trace.run)


def test_generation_keeps_its_cache_and_the_last_token_s_logits(tracer: Tracer) -> None:
    run = tiny("llama", task="generate", batch={"micro": 2, "sequence": 24, "new_tokens": 3})
    trace = tracer.trace(run, steps=1)
    assert [phase.phase for phase in trace.phases] == ["load", "prefill", "decode"]
    vocabulary = TINY["llama"]["vocab_size"]
    assert max(s.shape[0] for s in trace.storages if s.op == "mm" and s.shape[1:] == (vocabulary,)) == 2
    forward = tracer.trace(tiny("llama", task="forward"), steps=1)
    assert forward.phases[-1].left - forward.phases[0].left == 512  # only the ids stay


def test_a_trace_has_the_caches_that_generate_makes(tracer: Tracer) -> None:
    batch = {"micro": 2, "sequence": 64, "new_tokens": 3}

    def traced(**generation: Any) -> TracedRun:
        return tracer.trace(tiny("llama", task="generate", batch=batch, generation=generation), steps=1)

    sizes = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    assert any(s.dtype == "float8_e4m3fn" and s.shape[2:3] == (65,) for s in traced(**sizes).storages)
    plain, away, parts = traced(), traced(cache_implementation="offloaded"), traced(prefill_chunk_size=16)
    assert away.phases[-1].peak < plain.phases[-1].peak
    assert parts.phases[1].peak < plain.phases[1].peak
    assert parts.phases[-1].peak == plain.phases[-1].peak


def test_a_backend_that_is_not_installed_is_named(tracer: Tracer) -> None:
    if find_spec("hqq") is not None:
        pytest.skip("it is installed")
    config = {"cache_implementation": "quantized", "cache_config": {"backend": "hqq"}}
    run = tiny("llama", task="generate", batch={"sequence": 64, "new_tokens": 2}, generation=config)
    with pytest.raises(ProbeError, match="hqq is in hqq, which is not installed; pip install hqq") as caught:
        tracer.trace(run, steps=1)
    assert caught.value.field == "generation.cache_config.backend"


# --- runs that cannot be traced


CHATGLM = {"model_type": "chatglm", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
STATIC = {"world": 2, "dp": 2, "strategy": "ddp", "static_graph": True}
REFUSED = [
    ({"optimizer": "galore_adamw"}, SpecError, "optimizer.name: a probe does not run galore_adamw; it runs "),
    ({"optimizer": "adamm"}, UnknownNameError, "did you mean ademamix or adamw_8bit"),
    ({"precision": "mixed"}, SpecError, "precision.master"),
    ({"precision": "fp32", "kernels": {"attention": "flash_attention_2"}}, SpecError, "needs bf16 or fp16"),
    ({"optimizer": {"state_dtype": "bf16"}}, SpecError, "optimizer.state_dtype"),
    ({"kernels": {"compile": True}}, SpecError, "kernels.compile: a probe does not run 'true'"),
    ({"parallelism": {"world": 2, "dp": 1}}, SpecError, "parallelism.world: a world of 2 GPUs is not dp 1 x tp 1"),
    (
        {"parallelism": {"world": 4, "dp": 2, "tp": 2}},
        SpecError,
        "parallelism: a probe runs on one GPU, or as one rank",
    ),
    ({"parallelism": {"world": 2, "dp": 2, "strategy": "zero3"}}, SpecError, "it runs ddp, fsdp, fsdp2"),
    ({"parallelism": STATIC}, SpecError, "parallelism.static_graph: a probe does not run 'true'"),
    ({"parallelism": HOST, "optimizer": "adamw_8bit"}, SpecError, "parallelism.offload: adamw_8bit (optimizer.name)"),
    ({"parallelism": HOST, "loop": {"grad_scaler": True}}, SpecError, "loop.grad_scaler: a probe scales no losses"),
    ({"batch": {"new_tokens": 3}}, SpecError, "batch.new_tokens: only task generate makes new tokens"),
    (
        {"model": {"config": {"model_type": "kimi_k25", **TINY_VISION["kimi_k25"]}}, "batch": {"images": 1}},
        SpecError,
        "batch.images: images are not supported yet for kimi_k25",
    ),
    (
        {
            "model": {"config": {"model_type": "smolvlm", **TINY_VISION["smolvlm"]}},
            "batch": {"sequence": 20, "images": 2},
        },
        SpecError,
        "batch.images: 2 images of 16 tokens each do not fit batch.sequence 20, which must be at least 32",
    ),
    ({"model": {"config": CHATGLM}}, ProbeError, "no class for causal language models of model_type 'chatglm'"),
    ({"method": {"kind": "lora", "targets": ["w_pack"]}}, ProbeError, "method.targets: peft refuses"),
    ({"model": {"config": {"model_type": "llama", "rope_parameters": 3}}}, ProbeError, "cannot build llama"),
]


def test_a_float_that_json_cannot_represent_reaches_the_config_class(tracer: Tracer) -> None:
    limit = {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    model = {"config": {"model_type": "nemotron_h", **TINY["nemotron_h"], **limit}}
    run = RunSpec(model=model, batch={"sequence": 24}, kernels={"attention": "eager"})
    assert tracer.trace(run).parameters == estimate(run).parameters.total


@pytest.mark.parametrize(("parts", "kind", "line"), REFUSED, ids=lambda value: str(value)[:40])
def test_unsupported_runs_are_refused_in_one_line(
    parts: dict[str, Any], kind: type[MemplanError], line: str, tracer: Tracer
) -> None:
    model = {"model": {"config": {"model_type": "llama", **TINY["llama"]}}}
    with pytest.raises(kind) as raised:
        tracer.trace(RunSpec(**{**model, **parts}))
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(ProbeError, match=r"no_such_library is not installed; .*pip install 'memplan\[probe\]'"):
        require("no_such_library")


def test_data_is_for_the_cpu() -> None:
    with pytest.raises(ProbeError, match="a trace with data runs on the CPU only"):
        list(map(_raised, traces([tiny("llama")], data=True)))


def _raised(found: TracedRun | MemplanError) -> None:
    assert isinstance(found, MemplanError)
    raise found


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ProbeError, match="a trace needs a C\\+\\+ compiler once"):
        fake_device.shim()
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(ProbeError, match="false cannot compile against torch's headers"):
        fake_device.shim()


def test_a_device_that_is_not_there_comes_before_torch() -> None:
    import torch

    assert torch.__version__
    with pytest.raises(ProbeError, match="torch is already imported"):
        fake_device.load()


def test_a_dead_process_is_one_error_line_and_the_next_run_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'out of luck' >&2\nkill -9 $$\n")
    dying.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dying))
    found = [str(found) for found in traces([tiny("llama"), tiny("gpt2")])]
    assert found == ["probe: the tracing process was ended by SIGKILL: out of luck"] * 2


def test_a_caller_imports_nothing_heavy() -> None:
    code = "import memplan.probe.run.trace, memplan.probe.difference, sys; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# --- saved tensors on the host


@pytest.mark.parametrize("family", ["llama", "qwen3", "starcoder2", "mixtral"])
def test_the_host_has_every_byte_that_autograd_saves(family: str) -> None:
    """A real step on the CPU, with hooks that count each tensor as often as it is saved."""
    import torch

    from memplan.probe.script.script import build

    saved: list[int] = []

    def pack(tensor: Any) -> Any:
        saved.append(tensor.numel() * tensor.element_size())
        return tensor

    plain = {"precision": "fp32", "optimizer": "sgd", "kernels": {**PLAIN, "attention": "eager"}}
    script = build(tiny(family, **plain), "cpu")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        script.step()
    assert estimate(tiny(family, **plain, parallelism=SAVED)).host_bytes == sum(saved)
