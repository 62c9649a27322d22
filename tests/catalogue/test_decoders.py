"""Unusual decoders: attention sinks, shared keys, several streams, towers unused by text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace
from benchmarks.golden import trace_figures
from memplan import RunSpec, estimate
from memplan.catalogue import build
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import MemplanError, SpecError
from memplan.models.configs import family
from memplan.models.model import ModelSpec
from tests.cases import in_groups
from tests.sampling import sampled
from tests.tiny import TINY as DECODERS
from tests.tiny_towers import TINY

GOLDEN = Path(__file__).parents[1] / "golden" / "traced_decoders.jsonl"
ROWS: list[dict[str, Any]] = [json.loads(line) for line in GOLDEN.read_text("utf-8").splitlines()][1:]
FAMILIES = ("gpt_oss", "mimo_v2_flash", "gemma3n_text", "gemma4_text", "llama4_text", "minimax_m3_vl_text")


def config(name: str, **more: Any) -> dict[str, Any]:
    found = TINY[name] if name in TINY else {"model_type": name, **DECODERS[name]}
    return {**found, **more}


def run(name: str, keys: dict[str, Any] | None = None, **fields: Any) -> RunSpec:
    return RunSpec.model_validate(
        {"model": {"config": config(name, **(keys or {}))}, "batch": {"sequence": 128}, **fields}
    )


def label(case: dict[str, Any]) -> str:
    kernels, precision = case["run"]["kernels"], case["run"].get("precision") or {}
    ways = (kernels.get("checkpointing", "full"), kernels.get("attention", ""), precision.get("weights", ""))
    return "-".join((case["name"], *filter(None, ways)))


# MiniMax-M3's stack leaves out small tensors of chosen blocks; in the others one or two numbers round differently.
@in_groups(sampled(ROWS), label)
def test_an_estimate_equals_the_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"]
    assert answer.parameters.trainable == case["trainable"]
    compared = compared_with_trace(case)
    assert compared.peak <= 2e-4, compared
    assert compared.phase <= 5e-3, compared


def test_every_family_is_traced_with_every_method() -> None:
    traced = {
        (case["run"]["model"]["config"]["model_type"], case["run"].get("method", {}).get("kind", "full"))
        for case in ROWS
    }
    assert traced >= {(family, kind) for family in (*FAMILIES, "gemma4") for kind in ("full", "lora", "qlora")}


@pytest.mark.parametrize("name", ["gemma4-experts", "gemma4-small"])
def test_text_runs_hold_the_towers_without_gradients(name: str) -> None:
    whole = estimate(run(name, optimizer="adamw_torch"))
    alone = estimate(run(name, {"vision_config": None, "audio_config": None}, optimizer="adamw_torch"))
    tower = whole.parameters.total - alone.parameters.total
    assert whole.parameters.trainable - alone.parameters.trainable == tower > 0
    # its weights in bf16, each rounded up to 512 bytes, and neither gradients nor states
    more = whole.bytes.allocated - alone.bytes.allocated
    assert 2 * tower <= more < 2 * tower + 512 * 200


def test_a_tower_has_layers_that_a_text_skips() -> None:
    tower, *_ = build(ModelSpec(config("step3p7")), Wiring("flash", "efficient")).runs
    assert tower.times == "vL"
    assert [op.skipped for op in tower.blocks[0].ops] == [False] + [True] * (len(tower.blocks[0].ops) - 1)


def test_keys_reused_by_later_layers_are_counted_once() -> None:
    own = estimate(run("gemma4_text", {"num_kv_shared_layers": 0, "use_double_wide_mlp": False}))
    shared = estimate(run("gemma4_text", {"use_double_wide_mlp": False}))
    # k_proj, v_proj and k_norm of one layer with a window and two without: 64 x 16 and 64 x 32, twice, and a norm
    assert own.parameters.total - shared.parameters.total == (2 * 64 * 16 + 16) + 2 * (2 * 64 * 32 + 32)


@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash"])
def test_attention_sinks_are_computed_without_sdpa(name: str) -> None:
    asked = estimate(run(name))
    eager = estimate(run(name, kernels={"attention": "eager"}))
    assert asked.bytes.allocated == eager.bytes.allocated
    assert asked.run.kernels.attention == "eager"


def test_flex_attention_keeps_the_mask_of_padded_tokens() -> None:
    kernels, batch = {"attention": "flex_attention", "checkpointing": "none"}, {"micro": 8, "sequence": 1024}
    runs = ({"kernels": kernels, "batch": batch, "loop": {"padded": padded}} for padded in (False, True))
    plain, padded = (estimate(RunSpec(model="qwen2-0.5b", method="lora", **fields)).bytes.allocated for fields in runs)
    assert padded - plain == 8 * 1024 * (8 + 1)  # the int64 mask that the model is given, and a boolean one


def test_sinks_get_no_gradient_from_flash_attention_3() -> None:
    kernels = {"attention": "flash_attention_3"}
    flash, eager = (estimate(run("gpt_oss", kernels={"attention": a})) for a in ("flash_attention_3", "eager"))
    assert (flash.parameters.total, flash.parameters.trainable) == (eager.parameters.total,) * 2
    states = [sum(line.bytes for line in a.ledger if line.kind == "optstate") for a in (flash, eager)]
    assert states[1] - states[0] == 3 * 3 * 512  # both moments and the step of each layer's sinks, in blocks of 512
    with pytest.raises(SpecError, match="does not run with flash_attention_3"):
        estimate(run("mimo_v2_flash", kernels=kernels))
    two = {"parallelism": {"world": 2}, "gpu": "h100"}
    with pytest.raises(SpecError, match=r"self_attn.sinks of gpt_oss is trainable but never gets a gradient"):
        estimate(run("gpt_oss", kernels=kernels, **two))
    fsdp2 = {"parallelism": {"world": 2, "strategy": "fsdp2"}, "gpu": "h100"}
    assert estimate(run("gpt_oss", kernels=kernels, **fsdp2)).bytes.allocated > 0


@pytest.mark.parametrize("name", [*FAMILIES, "step3p7"])
def test_models_unsupported_by_flash_attention_2_are_refused(name: str) -> None:
    asked = run(name, kernels={"attention": "flash_attention_2"})
    if not ModelSpec(config(name)).family.attention.no_flash_2:
        assert estimate(asked).bytes.allocated > 0
        return
    with pytest.raises(SpecError, match="does not run with flash_attention_2"):
        estimate(asked)


FLASHES = (
    *("bloom", "mpt", "mamba", "mamba2", "falcon_mamba", "gemma3", "paligemma", "mllama"),  # whose classes refuse it
    *("llama", "gpt2", "falcon", "jamba", "gemma3_text", "llava"),
)


@pytest.mark.parametrize("model_type", FLASHES)
def test_flash_attention_2_is_refused_if_the_class_does_not_support_it(model_type: str) -> None:
    auto = pytest.importorskip("transformers.models.auto.modeling_auto")
    maps = (auto.MODEL_FOR_CAUSAL_LM_MAPPING, auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    configs = pytest.importorskip("transformers").CONFIG_MAPPING
    built = next(m[configs[model_type]] for m in maps if configs[model_type] in m)
    assert bool(family(model_type).attention.no_flash_2) == (not built._supports_flash_attn)


def test_layers_that_gemma_3n_clamps_are_left_unquantised() -> None:
    clamped = ("prediction_coefs", "correction_coefs")
    silent = estimate(run("gemma3n_text", method="qlora"))
    named = {"kind": "qlora", "quantization": {"skip": ["lm_head", *clamped]}}
    said = estimate(run("gemma3n_text", method=named))
    assert silent.bytes == said.bytes
    assert any("prediction_coefs" in note for note in silent.notes)
    assert not any("prediction_coefs" in note for note in said.notes)


def test_adapters_on_all_linear_layers_of_llama_4_leave_its_router_out() -> None:
    answer = estimate(run("llama4_text", method="lora"))
    assert any("router" in note for note in answer.notes)


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "no such kind": ("gpt_oss", {"layer_types": ["round"] * 3}, "layer_types"),
    "too short": ("gpt_oss", {"layer_types": ["full_attention"]}, "layer_types"),
    "no list": ("mimo_v2_flash", {"mlp_layer_types": "sparse"}, "mlp_layer_types"),
    "a width that is none": ("gemma3n_text", {"intermediate_size": [176, 0, 176, 176, 176, 176]}, "intermediate_size"),
    "nothing to share": ("gemma4_text", {"num_kv_shared_layers": 5}, "num_kv_shared_layers"),
    "no experts": ("llama4_text", {"num_local_experts": 0}, "num_local_experts"),
    "layers in words": ("llama4_text", {"moe_layers": "all"}, "moe_layers"),
    "an odd tower": (
        "gemma4-small",
        {"audio_config": {"subsampling_conv_channels": [16]}},
        "subsampling_conv_channels",
    ),
    "a ratio in words": ("step3p7", {"vision_config": {"mlp_ratio": "big"}}, "mlp_ratio"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_config_is_refused_by_its_key(broken: tuple[str, dict[str, Any], str]) -> None:
    name, keys, key = broken
    with pytest.raises(MemplanError, match=key) as caught:
        estimate(run(name, keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys", "line"),
    [
        ("diffllama", {"attention_dropout": 0.1}, "config: attention_dropout must be 0 for diffllama"),
        ("diffllama", {"num_key_value_heads": 1}, "config: num_key_value_heads must be even for diffllama, not 1"),
        (
            "laguna",
            {"num_attention_heads_per_layer": [16, 32, 31, 32, 16]},
            "config: num_attention_heads_per_layer must be multiples of num_key_value_heads 2, not 31",
        ),
        (
            "laguna",
            {"rope_parameters": {"sliding_attention": {"partial_rotary_factor": 2}}},
            "config: rope_parameters: partial_rotary_factor of sliding_attention must be above 0 and at most 1, not 2",
        ),
        (
            "laguna",
            {"moe_apply_router_weight_on_input": True},
            "moe_apply_router_weight_on_input: true is not supported by transformers' class",
        ),
    ],
)
def test_what_a_decoders_class_refuses_is_refused_in_one_line(name: str, keys: dict[str, Any], line: str) -> None:
    with pytest.raises(MemplanError) as caught:
        estimate(run(name, keys))
    assert str(caught.value) == line


def test_layers_of_laguna_have_their_own_numbers_of_heads() -> None:
    stack = build(ModelSpec(config("laguna")), Wiring("flash", "efficient"))
    blocks = [block for r in stack.runs for block in r.blocks]
    heads = [next(w.shape for op in block.ops for w in op.weights if "q_proj" in w.name) for block in blocks]
    assert heads == ["a16 d h", "a32 d h", "a16 d h"]
