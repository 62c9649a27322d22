"""Answers by trace with torch: for families without a stack, and for one with a stack against the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.core.errors import MemplanError, ProbeError, SpecError
from memplan.core.units import GIB, MIB
from memplan.estimate.answer import Estimate
from memplan.probe.answer import traced_answer
from memplan.probe.limits import Limits
from memplan.probe.run.trace import Tracer
from tests.tiny import TINY

pytestmark = pytest.mark.torch

_GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 64}
_PLAIN = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}
# Families without a stack and of different kinds: learned or rotary positions, biases, one or two norms.
UNKNOWN: dict[str, dict[str, Any]] = {
    "xglm": {
        "d_model": 64,
        "num_layers": 2,
        "attention_heads": 4,
        "ffn_dim": 128,
        "vocab_size": 300,
        "max_position_embeddings": 64,
    },
    "persimmon": _PLAIN,
    "biogpt": _PLAIN,
    "codegen": {**_GPT, "rotary_dim": 8},
}


def run_of(family: str, config: Mapping[str, Any], **parts: Any) -> RunSpec:
    model = {"config": {"model_type": family, **config}}
    return RunSpec(model=model, **{"batch": {"micro": 2, "sequence": 24}, **parts})


@pytest.fixture(scope="module")
def answers(tracer: Tracer) -> Mapping[str, Estimate]:
    return {name: traced_answer(run_of(name, config), tracer, keep=False) for name, config in UNKNOWN.items()}


@pytest.mark.parametrize("family", UNKNOWN)
def test_a_family_without_a_stack_has_an_answer_that_adds_up(family: str, answers: Mapping[str, Estimate]) -> None:
    answer = answers[family]
    assert answer.via == "trace"
    assert {p.phase for p in answer.phases} == {"load", "forward", "loss", "backward", "step"}
    assert max(p.peak for p in answer.phases) == answer.bytes.allocated == sum(answer.categories.values())
    assert answer.bytes.allocated <= answer.bytes.reserved < answer.bytes.used
    assert {line.basis for line in answer.ledger if line.kind != "other"} == {"traced"}
    assert any(line.what.endswith("weight exp_avg") and line.count == 2 for line in answer.ledger)
    assert max(p.peak for p in answer.timeline) == answer.bytes.allocated
    assert [sum(kinds.values()) for kinds in answer.timeline_kinds] == [moment.peak for moment in answer.timeline]


def test_a_class_without_sdpa_is_noted(answers: Mapping[str, Estimate]) -> None:
    eager = {name for name, answer in answers.items() if any("does not support sdpa" in note for note in answer.notes)}
    assert eager == {"xglm"}


def test_parameter_counts_equal_transformers(answers: Mapping[str, Estimate]) -> None:
    import torch
    import transformers

    counted: dict[str, int] = {}
    for name, config in UNKNOWN.items():
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **config))
        model.tie_weights()
        counted[name] = sum(p.numel() for p in model.parameters())
    assert {name: answer.parameters.total for name, answer in answers.items()} == counted
    assert all(answer.parameters == (answer.parameters.total,) * 3 for answer in answers.values())


LLAMA = {
    "full": {},
    "kept": {"kernels": {"checkpointing": "none"}, "optimizer": "sgd", "gpu": "h100"},
    "lora": {"method": {"kind": "lora", "rank": 4}, "kernels": {"checkpointing": "none"}, "gpu": "3090"},
    "accumulated": {"method": "lora", "batch": {"micro": 2, "sequence": 24, "accumulation": 2}},
}


@pytest.mark.parametrize("parts", LLAMA.values(), ids=LLAMA.keys())
def test_the_engine_and_a_trace_agree_on_a_known_family(parts: dict[str, Any], tracer: Tracer) -> None:
    run = run_of("llama", TINY["llama"], **parts)
    traced, engine = traced_answer(run, tracer, keep=False), estimate(run)
    assert traced.parameters == engine.parameters
    peaks, expected = ({(p.phase, p.step): p.peak for p in a.phases if p.phase != "load"} for a in (traced, engine))
    assert peaks == expected
    assert traced.bytes.allocated == engine.bytes.allocated
    assert abs(traced.bytes.reserved - engine.bytes.reserved) <= 2 * MIB  # loading order differs
    assert abs(traced.bytes.used - engine.bytes.used) <= 2 * MIB
    assert (traced.verdict.answer, traced.run.model_dump()) == (engine.verdict.answer, engine.run.model_dump())


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_experts_that_a_token_is_not_sent_to_are_not_active(family: str, tracer: Tracer) -> None:
    run = run_of(family, TINY[family], precision="fp32")
    answer = traced_answer(run, tracer, keep=False)
    assert answer.parameters == estimate(run).parameters
    assert answer.parameters.active < answer.parameters.total


def test_tasks_other_than_training_are_traced(tracer: Tracer) -> None:
    run = run_of("xglm", UNKNOWN["xglm"], task="generate", batch={"micro": 2, "sequence": 24, "new_tokens": 3})
    answer = traced_answer(run, tracer, keep=False)
    assert [(p.phase, p.step) for p in answer.phases] == [("load", None), ("prefill", None), ("decode", None)]
    assert sum(answer.categories.values()) == answer.bytes.allocated


REFUSED: dict[str, tuple[str, dict[str, Any], type[MemplanError], str]] = {
    "more tokens than positions": (
        "biogpt",
        {"max_position_embeddings": 20},
        SpecError,
        "has learned positions for 20",
    ),
    "a negative size": ("persimmon", {"hidden_size": -64}, ProbeError, "cannot build persimmon from this config"),
    "no heads": ("persimmon", {"num_attention_heads": 0}, ProbeError, "cannot build persimmon from this config"),
    "text for a number": ("persimmon", {"hidden_size": "64"}, ProbeError, "cannot build persimmon from this config"),
    "a size beyond all": ("persimmon", {"vocab_size": 10**15}, ProbeError, "a trace takes at most 10,000,000,000,000"),
    "bytes beyond all": ("persimmon", {"vocab_size": 2**60}, ProbeError, "cannot build persimmon from this config"),
    "code for an activation": ("persimmon", {"hidden_act": "os.system('false')"}, ProbeError, "cannot build"),
    "no such class": ("../persimmon", {}, ProbeError, "no class for causal language models of model_type '../pers"),
    "the name of a class's own": ("auto", {}, ProbeError, "no class for causal language models of model_type 'auto'"),
    "a backbone of another library": ("timm_backbone", {"use_pretrained_backbone": True}, ProbeError, "TimmBackbone"),
}


@pytest.mark.parametrize(("family", "config", "kind", "line"), REFUSED.values(), ids=REFUSED.keys())
def test_configs_that_no_class_accepts_are_one_line(
    family: str, config: dict[str, Any], kind: type[MemplanError], line: str, tracer: Tracer
) -> None:
    with pytest.raises(kind, match=line) as error:
        traced_answer(run_of(family, {**_PLAIN, **config}), tracer, keep=False)
    assert "\n" not in str(error.value)


def test_positions_exclude_leading_rows_and_other_modalities() -> None:
    from torch import nn

    from memplan.probe.script.parameter_counts import positions

    class Offset(nn.Embedding):
        offset = 2

    model = nn.ModuleDict(
        {
            "wpe": nn.Embedding(64, 8),
            "position_embeddings": nn.Embedding(66, 8, padding_idx=1),
            "embed_positions": Offset(66, 8, padding_idx=1),
            "relative_position": nn.Embedding(32, 8),
            "vision_tower": nn.ModuleDict({"position_embedding": nn.Embedding(50, 8)}),
            "embed_tokens": nn.Embedding(300, 8),
        }
    )
    assert sorted(positions(model)) == [("embed_positions", 64), ("position_embeddings", 64), ("wpe", 64)]


def test_an_endless_trace_is_stopped_and_the_next_one_works() -> None:
    endless = run_of("xglm", {**UNKNOWN["xglm"], "num_layers": 10**8})
    with Tracer(Limits(1, 8 * GIB, 10**13)) as tracer, pytest.raises(ProbeError, match="it took more than 1 seconds"):
        tracer.trace(endless)


def test_half_an_answer_of_a_killed_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os, sys; sys.stdin.readline(); print('{\"a\":', end='', flush=True); os.kill(os.getpid(), 9)"
    real = subprocess.Popen

    def start(_: object, **given: Any) -> subprocess.Popen[str]:
        return real([sys.executable, "-c", script], **given)

    monkeypatch.setattr(subprocess, "Popen", start)
    with Tracer() as tracer, pytest.raises(ProbeError, match="was ended by SIGKILL"):
        tracer.trace(RunSpec(model="gpt2"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not limit a process's data")
def test_a_restricted_process_has_little_memory_no_network_and_starts_no_programs() -> None:
    code = """
import json, socket, subprocess
from memplan.probe import limits
limits.restrict(2**29, 100)
found = []
for attempt in (
    lambda: bytearray(2**30),
    lambda: socket.create_connection(("127.0.0.1", 9)),
    lambda: socket.getaddrinfo("localhost", 80),
    lambda: (limits.seal(), subprocess.run(["true"])),
):
    try:
        attempt()
    except Exception as error:
        found.append(type(error).__name__)
print(json.dumps(found))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(done.stdout) == ["MemoryError", "PermissionError", "PermissionError", "PermissionError"]
