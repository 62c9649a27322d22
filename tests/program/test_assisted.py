"""Assisted generation: rounds against traces of transformers' generate, arithmetic and laws."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.accuracy import passes_without_workspace
from benchmarks.golden import rows, trace_figures
from memplan import RunSpec, estimate
from memplan.cli.app import app
from memplan.core.errors import MemplanError
from memplan.core.units import ITEMSIZE, rounded
from memplan.estimate.answer import phase_peaks
from memplan.models.cards import find_model
from memplan.planning.inference import Limit, load_of, most_requests
from memplan.probe.run.trace import Tracer
from memplan.program.inference.assisted import longest_draft, round_of, steps_of
from memplan.program.run import TOKENS
from memplan.resolve.assisted import model_of_first_layers
from memplan.resolve.decide import decide
from tests.program.test_inference import generating
from tests.sampling import ALL, examples, sampled
from tests.tiny import TINY
from tests.walks import lines_at, walk

CASES: list[dict[str, Any]] = sampled(rows("traced_assisted.jsonl"), 10)
BF16, FP32 = ITEMSIZE["bf16"], ITEMSIZE["fp32"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_every_round_is_near_its_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"]
    mine = passes_without_workspace(answer)
    for phase, bytes_ in case["phases"].items():
        if phase != "load":
            assert mine[phase] == pytest.approx(bytes_, rel=case.get("within", 2.5e-3)), phase


@ALL
def test_the_mean_error_of_all_rounds_is_below_0_1_per_cent() -> None:
    errors: list[float] = []
    for case in CASES:
        mine = passes_without_workspace(trace_figures(case["run"]))
        errors += [abs(mine[phase] / n - 1) for phase, n in case["phases"].items() if phase != "load"]
    assert len(errors) > 80
    assert sum(errors) / len(errors) < 1e-3


@pytest.mark.torch
def test_a_trace_is_of_transformers_own_generate(tracer: Tracer) -> None:
    case = CASES[0]
    traced = tracer.trace(RunSpec(**case["run"]), 1)
    assert {p.phase: p.peak for p in traced.phases} == case["phases"]
    assert {"model.embed_tokens.weight", "assistant.model.embed_tokens.weight"} <= {s.name for s in traced.alive}


# --- components


def assisted(tokens: int = 5, model: str = "llama-3.1-8b", assistant: Any = "llama-3.2-1b", **fields: Any) -> RunSpec:
    batch = {"sequence": 1000, "new_tokens": 25, **fields.pop("batch", {})}
    generation = {"assistant_model": assistant, "num_assistant_tokens": tokens, **fields.pop("generation", {})}
    return generating(model, batch=batch, generation=generation, **fields)


def held(run: RunSpec, phase: str, what: str, whose: str = "") -> int:
    """Return the bytes of tensors named `what` alive at a phase's peak, of the model or (`whose`) the assistant."""
    lines = lines_at(run, phase)
    return sum(n.bytes for n in lines if what in n.what and n.where.startswith("assistant.") == bool(whose))


def test_the_assistants_weights_add_to_the_models() -> None:
    alone, small = (estimate(generating(name, batch={"sequence": 8})) for name in ("llama-3.1-8b", "llama-3.2-1b"))
    answer = estimate(assisted(batch={"sequence": 8}))
    assert answer.categories["parameter"] == alone.categories["parameter"] + small.categories["parameter"]
    assert answer.parameters == alone.parameters
    of_assistant = [n for n in answer.ledger if n.where.startswith("assistant") and n.kind == "parameter"]
    assert sum(n.bytes for n in of_assistant) == small.categories["parameter"]


def test_both_caches_hold_keys_and_values_of_all_tokens_including_proposed() -> None:
    run = assisted()
    layers, heads, width = 32, 8, 128
    one, of_assistant = heads * width * BF16, 8 * 64 * BF16
    # at its longest the model reads all tokens except the last, and one layer's values are concatenated
    longest = 1000 + 25 - 1
    whole, before = rounded(one * longest), rounded(one * (longest - 1))
    assert held(run, "decode", "cache") in (2 * layers * whole, (2 * layers - 1) * whole + 2 * before)
    # the assistant has read all proposed tokens except the last
    assert held(run, "decode", "cache", "assistant") == 2 * 16 * rounded(of_assistant * (longest - 1))


def test_the_logits_of_a_round_are_kept_three_times_until_the_next() -> None:
    tokens, v = 7, 128256
    lines = {line.what: line.bytes for line in lines_at(assisted(tokens), "decode")}
    rows_ = tokens + 1
    assert lines["logits of the round before"] == rounded(rows_ * v * BF16)
    assert lines["logits in fp32 of the round before"] == rounded(rows_ * v * FP32)
    assert lines["copy of the logits of the round before"] == rounded(rows_ * v * FP32)
    assert lines["logits of all proposed tokens"] == rounded(tokens * v * FP32)


def test_the_default_number_of_new_tokens_is_20() -> None:
    run = assisted(generation={"num_assistant_tokens": None})
    answer = estimate(run)
    assert answer.run.generation.num_assistant_tokens == TOKENS == 20
    assert answer.run.generation.assistant_dtype == "bf16"
    assert answer.phases == estimate(assisted(20)).phases


def test_an_early_exit_shares_weights_and_caches_only_its_layers() -> None:
    run = generating(
        "llama-3.1-8b", batch={"sequence": 100}, generation={"assistant_early_exit": 4, "num_assistant_tokens": 3}
    )
    alone = estimate(generating("llama-3.1-8b", batch={"sequence": 100}))
    assert estimate(run).categories["parameter"] == alone.categories["parameter"]
    draft = next(step for step in steps_of(decide(run)) if step.assists)
    assert draft.graph.model.num_hidden_layers == 4


def test_prompt_lookup_verifies_its_tokens_without_keeping_their_logits() -> None:
    run = generating("llama-3.2-1b", batch={"sequence": 100}, generation={"prompt_lookup_num_tokens": 10})
    assert not any(step.assists for step in steps_of(decide(run)))
    assert {step.fed for step in steps_of(decide(run))} == {110, 11, 1}
    assert held(run, "decode", "proposed tokens") == 0


def test_a_quantised_assistant_is_smaller_by_its_weights() -> None:
    plain, four = (estimate(assisted(generation={"assistant_quantization": q})) for q in (None, {"format": "nf4"}))
    whole, small = (estimate(generating("llama-3.2-1b", method=m)) for m in ("full", {"quantization": {}}))
    saved = whole.categories["parameter"] - small.categories["parameter"]
    assert saved > 0
    assert plain.categories["parameter"] - four.categories["parameter"] == saved


def test_a_round_proposes_at_most_the_remaining_tokens() -> None:
    of = decide(assisted(5)).assistant
    assert of is not None
    assert [round_of(of, 1000, 25, n).proposed for n in (1, 19, 20, 21, 24, 25)] == [5, 5, 5, 4, 1, 0]


def test_a_heuristic_schedule_may_grow_by_two_a_round() -> None:
    # 5, 7 and 9 proposed plus one of the model's each: 24 tokens; of 11 there is room for
    assert longest_draft(5, 25) == 9
    assert longest_draft(5, 24 + 12) == 11
    grows = assisted(5, generation={"num_assistant_tokens_schedule": "heuristic"})
    assert estimate(grows).phases == estimate(assisted(9)).phases


def test_tokens_decoded_copy_the_experts_they_choose() -> None:
    model = {"config": {"model_type": "mixtral", **TINY["mixtral"]}}
    config = TINY["mixtral"]
    run = generating(model, batch={"micro": 5, "sequence": 9, "new_tokens": 3})
    lines = {line.what: line.bytes for line in lines_at(run, "decode")}
    matrix = config["hidden_size"] * config["intermediate_size"] * BF16
    chosen = 5 * config["num_experts_per_tok"]
    assert lines["mlp.experts.gate_up_proj selected"] == rounded(chosen * 2 * matrix)
    assert lines["mlp.experts.down_proj selected"] == rounded(chosen * matrix)
    prompt = [line.what for line in lines_at(run, "prefill")]
    assert not any("selected" in what for what in prompt)


# --- laws


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a run with an assistant as the fields of a RunSpec."""
    pair = draw(st.sampled_from([("llama-3.1-8b", "llama-3.2-1b"), ("gemma-2-9b", "gemma-2-2b"), ("gpt2-xl", "gpt2")]))
    ways: list[dict[str, Any]] = [
        {"assistant_model": pair[1], "num_assistant_tokens": draw(st.integers(1, 9))},
        *([{"assistant_early_exit": 2, "num_assistant_tokens": 3}] if pair[1] != "gpt2" else []),  # unsupported there
        {"prompt_lookup_num_tokens": draw(st.integers(1, 9))},
    ]
    return {
        "model": pair[0],
        "task": "generate",
        "batch": {"sequence": draw(st.integers(1, 600)), "new_tokens": draw(st.integers(2, 60))},
        "generation": {**draw(st.sampled_from(ways)), "do_sample": draw(st.booleans())},
    }


laws = settings(max_examples=examples(6), deadline=None, suppress_health_check=[HealthCheck.too_slow])


@laws
@given(runs(), st.sampled_from(["sequence", "new_tokens"]), st.integers(1, 50))
def test_more_never_takes_less(fields: dict[str, Any], axis: str, more: int) -> None:
    larger = {**fields, "batch": {**fields["batch"], axis: fields["batch"][axis] + more}}
    before, after = (phase_peaks(estimate(RunSpec(**f))) for f in (fields, larger))
    assert all(after[phase] >= n for phase, n in before.items())


@laws
@given(runs())
def test_the_ledger_sums_to_the_peak_of_every_phase(fields: dict[str, Any]) -> None:
    run = RunSpec(**fields)
    answer, walked = estimate(run), walk(run)
    assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
    for phase in walked.phases:
        assert sum(line.bytes for line in walked.lines(phase)) == phase.peak
    assert answer.bytes.reserved >= answer.bytes.allocated
    alone = estimate(RunSpec(**{**fields, "generation": {}}))
    assert answer.bytes.allocated >= alone.bytes.allocated


def test_a_static_cache_may_be_as_long_as_the_window() -> None:
    static = {"cache_implementation": "static"}
    decided = decide(assisted(3, "gemma-2-9b", "gemma-2-2b", generation=static, batch={"sequence": 4096 - 25 + 1}))
    assert {step.room for step in steps_of(decided) if step.room} == {4096}


def test_only_the_models_loop_always_keeps_special_tokens() -> None:
    """The assistant's loop keeps its special tokens in memory only while it proposes."""

    def counts(run: RunSpec) -> list[int]:
        return [h.copies for step in steps_of(decide(run)) for h in step.loop_tensors if h.what == "special tokens"]

    first = counts(assisted(2))[:3]  # two proposed, and read
    assert first == [4 + 2, 4 + 2, 4]
    looked = assisted(assistant=None, generation={"num_assistant_tokens": None, "prompt_lookup_num_tokens": 3})
    assert set(counts(looked)) == {2}


@pytest.mark.parametrize("prompt", [4094, 4095, 4096, 5000])
def test_a_pass_starts_with_the_cache_the_previous_one_left(prompt: int) -> None:
    """In consecutive rounds around a window of 4,096 tokens, for model and assistant, with alternating layers."""
    run = assisted(2, "gemma-2-9b", "gemma-2-2b", batch={"sequence": prompt, "new_tokens": 4})
    decided = decide(run)
    steps, own = steps_of(decided), decided.structure.graph.model
    read = [step for step in steps if step.graph.model == own]
    proposed = [step for step in steps if step.graph.model != own]
    assert (len(read), len(proposed)) == (4, 2 + 2 + 1)
    for some in (read[1:], proposed):
        assert [step.past_window for step in some[1:]] == [step.grown for step in some[:-1]]


@pytest.mark.parametrize("model", ["gemma-3-1b", "glm-4.5-air", "smollm3-3b", "qwen2-7b"])
def test_an_early_exit_uses_the_models_first_layers(model: str) -> None:
    whole = find_model(model)
    assert model_of_first_layers(whole, 3).layers == whole.layers[:3]


# --- refusals and messages


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"batch": {"micro": 2}}, "batch.micro"),
    ({"generation": {"num_beams": 2}}, "generation.num_beams"),
    ({"generation": {"cache_implementation": "legacy"}}, "generation.cache_implementation"),
    (
        {"model": "gemma-2-9b", "assistant": "gemma-2-2b", "generation": {"cache_implementation": "static"}}
        | {"batch": {"sequence": 4073}},  # one more than fits the window of 4,096
        "generation.cache_implementation",
    ),
    ({"generation": {"prompt_lookup_num_tokens": 3}}, "generation.prompt_lookup_num_tokens"),
    ({"generation": {"assistant_model": None}}, "generation.num_assistant_tokens"),
    ({"generation": {"assistant_model": "qwen2-0.5b"}}, "generation.assistant_model"),
    ({"generation": {"assistant_model": "no-such-model"}}, "generation.assistant_model"),
    (
        {"generation": {"assistant_model": None, "num_assistant_tokens": None, "assistant_dtype": "bf16"}},
        "generation.assistant_dtype",
    ),
    ({"generation": {"assistant_model": None, "assistant_early_exit": 32}}, "generation.assistant_early_exit"),
    *(
        (
            {"model": name, "assistant": None}
            | {"generation": {"assistant_early_exit": 3, "num_assistant_tokens": None}}
            | {"batch": {"sequence": 8}},
            "generation.assistant_early_exit",
        )
        for name in ("gpt2", "gemma-3-4b", "gemma-3n-e4b-text")
    ),
    ({"profile": "transformers-4.51"}, "generation.assistant_model"),
    ({"task": "forward", "batch": {"new_tokens": 0}}, "generation"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=str)
def test_options_unsupported_by_transformers_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    run = assisted(**{k: v for k, v in fields.items() if k != "task"})
    run = run.model_copy(update={"task": fields.get("task", "generate")})
    with pytest.raises(MemplanError) as caught:
        estimate(run)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_a_model_that_keeps_states_takes_no_assistant() -> None:
    config = {"config": {"model_type": "mamba2", **TINY["mamba2"]}}
    with pytest.raises(MemplanError, match="keeps states"):
        estimate(generating(config, generation={"prompt_lookup_num_tokens": 3}))


def test_the_command_takes_an_assistant() -> None:
    words = "llama-3.1-8b --method generate --seq-len 512 --assistant-model llama-3.2-1b --assistant-quant-format nf4"
    done = CliRunner().invoke(app, [*words.split(), "--num-assistant-tokens", "5", "--gpu", "3090", "--json"])
    answer = json.loads(done.stdout)
    assert answer["run"]["generation"]["assistant_quantization"]["format"] == "nf4"
    run = assisted(generation={"assistant_quantization": {"format": "nf4"}}, batch={"sequence": 512, "new_tokens": 256})
    assert answer["bytes"]["allocated"] == estimate(run.model_copy(update={"gpu": "3090"})).bytes.allocated


def test_a_plan_says_that_one_is_generated_for_at_a_time() -> None:
    run = assisted(gpu="3090")
    assert most_requests(run) == Limit(1, "assistant")
    assert most_requests(assisted(gpu="t4")) == Limit(0, "memory")
    load, why = load_of(estimate(run))
    assert load is None
    assert "accepted" in why
