"""Other caches of transformers' generate: traces, storage arithmetic, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import passes_without_workspace
from benchmarks.golden import rows, trace_figures
from memplan import RunSpec, estimate
from memplan.catalogue.inference.quantized_caches import CacheQuantization
from memplan.catalogue.inference.quantized_caches import quantised as store
from memplan.core.errors import MemplanError
from memplan.core.units import rounded
from memplan.estimate.answer import phase_peaks
from memplan.program.graph import operations_of
from memplan.program.inference.steps import steps_of
from memplan.resolve.decide import decide
from tests.cases import in_groups
from tests.sampling import examples, sampled
from tests.tiny import TINY
from tests.walks import left as left_by
from tests.walks import lines_at, walk

# Families whose passes differ by some 512-byte tensors even with a dynamic cache.
ROUGHER = {"jamba": 1e-3, "llama4_text": 2e-3}
CASES: list[dict[str, Any]] = sampled(rows("traced_caches.jsonl"), 16)


def label(case: dict[str, Any]) -> str:
    generation = case["run"]["generation"]
    words = [generation.get("cache_implementation", ""), *map(str, generation.get("cache_config", {}).values())]
    words += [f"chunks-{generation['prefill_chunk_size']}"] if "prefill_chunk_size" in generation else []
    return "-".join([case["name"], *filter(None, words), f"n{case['run']['batch']['new_tokens']}"])


@in_groups(CASES, label)
def test_every_pass_equals_its_trace(case: dict[str, Any]) -> None:
    mine = passes_without_workspace(trace_figures(case["run"]))
    for phase, bytes_ in case["phases"].items():
        if phase != "load":
            assert mine[phase] == pytest.approx(bytes_, rel=ROUGHER.get(case["name"], 1e-5)), phase


# --- components of a quantised cache


def generating(model: Any = "llama-3.1-8b", **fields: Any) -> RunSpec:
    return RunSpec(**{"model": model, "task": "generate", **fields})


def quantised(model: Any = "llama-3.1-8b", batch: Any = None, **config: Any) -> RunSpec:
    generation = {"cache_implementation": "quantized", "cache_config": config}
    return generating(model, batch=batch or {"sequence": 4096, "new_tokens": 200}, generation=generation)


def left(run: RunSpec, step: int = -1) -> dict[str, int]:
    """Return the bytes of each kind of tensor that a pass leaves."""
    found: dict[str, int] = {}
    for name, bytes_ in left_by(walk(run).passes[step]):
        what = name.removesuffix(" before")  # present before, and unchanged
        found[what] = found.get(what, 0) + bytes_
    return found


LAYERS, HEADS, WIDTH = 32, 8, 128  # of Llama-3.1-8B


@pytest.mark.parametrize(
    ("config", "per_byte"), [({}, 2), ({"nbits": 2}, 4), ({"backend": "hqq", "nbits": 8}, 1), ({"backend": "hqq"}, 2)]
)
def test_codes_have_their_bits_and_groups_a_scale_and_a_zero_point(config: dict[str, Any], per_byte: int) -> None:
    kept = left(quantised(**config))
    # of 199 tokens after the prompt 128 were quantised, and 71 wait
    numbers = (4096 + 128) * HEADS * WIDTH
    for what in ("key", "value"):
        assert kept[f"{what} cache codes"] == LAYERS * rounded(numbers // per_byte)
        assert kept[f"{what} cache scales"] == kept[f"{what} cache zero points"] == LAYERS * rounded(numbers // 64 * 2)
        assert kept[f"{what} cache residual"] == LAYERS * rounded(71 * HEADS * WIDTH * 2)


def test_three_bits_are_ten_to_four_bytes_in_columns_filled_to_tens() -> None:
    kept = left(quantised(backend="hqq", nbits=3))
    assert kept["key cache codes"] == LAYERS * rounded((4096 + 128) * HEADS * WIDTH // 64 * 7 * 4)


def test_fp8_has_a_byte_a_number_and_one_scale() -> None:
    kept = left(quantised(backend="fp8"))
    assert kept["key cache codes"] == LAYERS * rounded((4096 + 199) * HEADS * WIDTH)
    assert kept["value cache scale"] == LAYERS * 512
    assert not any("residual" in what for what in kept)


def test_a_quantised_cache_saves_memory_in_decoding_and_peaks_in_prefill() -> None:
    batch = {"micro": 8, "sequence": 8192, "new_tokens": 100}
    plain, few = (phase_peaks(estimate(r)) for r in (generating(batch=batch), quantised(batch=batch)))
    # a layer's keys and values in 16 bits are 2 x 8 x 8192 x 8 x 128 x 2 bytes; 32 of them shrink to 9/32
    assert plain["decode"] - few["decode"] > 0.6 * 32 * 2 * 8 * 8192 * 8 * 128 * 2
    assert few["decode"] < few["prefill"]


def test_the_pass_that_requantises_the_cache_is_the_peak() -> None:
    short, long = (
        phase_peaks(estimate(quantised(batch={"micro": 4, "sequence": 8192, "new_tokens": n})))["decode"]
        for n in (128, 129)
    )
    one = 4 * 8192 * HEADS * WIDTH * 2
    assert short + one < long  # 128 new tokens take 127 passes, none of which requantises


def test_an_answers_run_has_the_decided_cache() -> None:
    config = estimate(generating(generation={"cache_implementation": "quantized"})).run.generation.cache_config
    assert config is not None
    assert config.model_dump() == {
        "backend": "quanto",
        "nbits": 4,
        "axis_key": 0,
        "axis_value": 0,
        "q_group_size": 64,
        "residual_length": 128,
    }


def test_groups_may_be_of_several_beams() -> None:
    config = {"backend": "hqq", "q_group_size": 256}
    generation = {"cache_implementation": "quantized", "cache_config": config, "num_beams": 2}
    decide(generating("qwen2.5-0.5b", batch={"sequence": 1, "new_tokens": 1}, generation=generation))


@pytest.mark.parametrize(("bits", "shifted"), [(8, 0), (4, 1), (2, 2), (1, 2), (3, 2)])
def test_parts_of_a_byte_are_shifted_and_all_but_the_first_joined(bits: int, shifted: int) -> None:
    packs = [op for op in store("keys", "x", "b k s d", "x", CacheQuantization("hqq", bits)) if op.name == "keys.pack"]
    assert [len(op.scratch) for op in packs] == [shifted]


def test_groups_along_the_last_axis_are_a_copy_until_cast() -> None:
    found = list(store("keys", "x", "b k s d", "x", CacheQuantization("quanto", axis_key=-1)))
    casts = [op.name for op in found].index("keys.cast")
    assert "keys grouped again" in found[casts + 1].reads
    assert not any("keys grouped again" in op.reads for op in found[casts + 2 :])


# --- host memory


def offloaded(model: str, kind: str = "offloaded", **batch: Any) -> RunSpec:
    return generating(model, batch=batch, generation={"cache_implementation": kind})


def test_an_offloaded_cache_has_two_layers_on_the_card() -> None:
    batch: dict[str, Any] = {"micro": 4, "sequence": 1000, "new_tokens": 25}
    layer = 2 * 4 * HEADS * WIDTH * 2
    run = offloaded("llama-3.1-8b", **batch)
    # key and value of the last layer including the new token, its old values, and those of the first layer, which is
    # next and includes the new token
    lines = lines_at(run, "decode")
    kept = sum(line.bytes for line in lines if "cache" in line.what and line.kind == "activation")
    assert kept == 2 * layer * 1024 + layer // 2 * 1023
    plain = estimate(generating(batch=batch))
    assert phase_peaks(plain)["decode"] - phase_peaks(estimate(run))["decode"] == 30 * layer * 1024


def test_other_layers_are_pinned_on_the_host_in_powers_of_two() -> None:
    """The host has all other layers in pinned memory, which is rounded up to a power of two."""
    answer = estimate(offloaded("llama-3.1-8b", micro=4, sequence=1000, new_tokens=25))
    assert 4 * 1024 * HEADS * WIDTH * 2 == 2**23
    assert answer.host_bytes == (LAYERS - 1) * 2 * 2**23
    longer = estimate(offloaded("llama-3.1-8b", micro=4, sequence=1000, new_tokens=26))
    assert longer.host_bytes == 2 * answer.host_bytes
    assert estimate(generating(batch={"sequence": 1000})).host_bytes == 0


def test_a_static_cache_keeps_windows_on_the_card() -> None:
    grown, fixed = (
        estimate(offloaded("gemma-3-1b", kind, sequence=4000, new_tokens=97))
        for kind in ("offloaded", "offloaded_static")
    )
    window, full = 2 * 256 * 2 * 512, 2 * 256 * 2 * 4096  # key and value, one head, of 512 tokens and of 4,096
    assert fixed.host_bytes == 3 * full  # 4 of 26 layers cache all tokens
    assert grown.host_bytes == 4 * full + 21 * window


def test_the_next_layers_cache_is_copied_while_a_layer_runs() -> None:
    """Layers with and without a window alternate, and the first follows the last, with the new token."""
    kinds = ("sliding_attention", "sliding_attention", "full_attention", "sliding_attention")
    config = {**TINY["gemma3_text"], "model_type": "gemma3_text", "num_hidden_layers": 4, "layer_types": kinds}
    generation = {"cache_implementation": "offloaded"}
    batch = {"sequence": 100, "new_tokens": 4}
    step = steps_of(decide(generating({"config": config}, batch=batch, generation=generation)))[-1]
    stack, axes = operations_of(step.graph)
    layers = [block.ops for run in stack.runs for _ in range(axes[run.times]) for block in run.blocks]
    coming = [[t.shape for op in ops if op.name == "cache.prefetch" for t in op.writes] for ops in layers]
    found = [[t.shape for op in ops if op.name == "cache.fetched" for t in op.writes] for ops in layers]
    (first,) = (op for op in stack.after if op.name == "cache.first")
    assert coming == [*found[1:], [t.shape for t in first.writes]]
    assert [len({*kinds}) for kinds in zip(*found, strict=True)] == [2, 2]
    assert all("kept_window" in t.shape.split() for t in first.writes)


def test_the_old_name_of_an_offloaded_static_cache_is_the_same() -> None:
    old, new = (
        estimate(offloaded("llama-3.2-1b", kind, sequence=500)) for kind in ("offloaded_hybrid", "offloaded_static")
    )
    assert old.run.generation == new.run.generation
    assert old.bytes == new.bytes


# --- chunked prefill


def chunked(chunk: int | None, sequence: int = 8192, **more: Any) -> RunSpec:
    generation = {"prefill_chunk_size": chunk, **more.pop("generation", {})}
    return generating(batch={"micro": 2, "sequence": sequence, "new_tokens": 8}, generation=generation, **more)


def test_chunked_prefill_needs_the_mlp_activations_of_one_chunk() -> None:
    whole, parts = (phase_peaks(estimate(chunked(n))) for n in (None, 1024))
    # when the gate, its activation and up coexist, 14,336 wide in bf16
    assert whole["prefill"] - parts["prefill"] > 2 * 3 * 2 * (8192 - 1024) * 14336 * 0.9
    assert parts["decode"] == whole["decode"]


def test_a_part_as_long_as_the_prompt_is_the_prompt() -> None:
    whole, longer = (estimate(chunked(n)) for n in (None, 8192))
    assert longer.bytes == whole.bytes
    assert longer.phases == whole.phases


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from(["llama-3.2-1b", "gemma-3-1b"]), st.booleans())
def test_chunked_prefill_leaves_the_same_cache_as_one_pass(sequence: int, chunk: int, model: str, away: bool) -> None:
    kind = "offloaded" if away else "dynamic"
    runs = [
        chunked(n, sequence, model=model, generation={"cache_implementation": kind})
        for n in (None, min(chunk, sequence))
    ]
    walked = [walk(run) for run in runs]
    if not away and model == "llama-3.2-1b":
        at_once, in_parts = (left(run, 0 if i == 0 else _last_of_prompt(run)) for i, run in enumerate(runs))
        assert in_parts == at_once
    assert walked[0].host_bytes == walked[1].host_bytes
    assert [p for p in walked[0].passes if p.phase == "decode"][-1].step.past == walked[1].passes[-1].step.past


def _last_of_prompt(run: RunSpec) -> int:
    return max(i for i, each in enumerate(walk(run).passes) if each.phase == "prefill")


@settings(max_examples=examples(12), deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(2, 60), st.integers(1, 40))
def test_a_quantised_cache_has_every_token_once(sequence: int, chunk: int, new: int, residual: int) -> None:
    config = {"residual_length": residual, "q_group_size": 1024}
    generation = {"cache_implementation": "quantized", "cache_config": config, "prefill_chunk_size": chunk}
    run = generating("llama-3.1-8b", batch={"sequence": sequence, "new_tokens": new}, generation=generation)
    walked = walk(run)
    for step in (each.step for each in walked.passes):
        assert 0 <= step.quantized <= step.past
        assert step.residual < max(residual, 1) + (step.quantized == 0)
        assert step.residual_after < residual
    assert walked.passes[-1].step.past == sequence + new - 2


# --- refusals

KIND, CONFIG = "generation.cache_implementation", "generation.cache_config"
REFUSED: dict[str, dict[str, Any]] = {
    f"{CONFIG}: only applies to a quantised cache, not dynamic": {"generation": {"cache_config": {}}},
    f"{CONFIG}.nbits: quanto does not support 8; choose 2, 4": {"config": {"nbits": 8}},
    f"{CONFIG}.axis_key: quanto does not support 1; choose 0, -1": {"config": {"axis_key": 1}},
    f"{CONFIG}.axis_value: hqq does not support -1; choose 0, 1": {"config": {"backend": "hqq", "axis_value": -1}},
    f"{CONFIG}.axis_key: hqq cannot read back what it stores in 3 bits": {
        "config": {"backend": "hqq", "nbits": 3, "axis_key": 1}
    },
    f"{CONFIG}.nbits: fp8 uses one scale": {"config": {"backend": "fp8", "nbits": 4}},
    f"{CONFIG}.q_group_size: 96 does not divide": {"config": {"q_group_size": 96}},
    # along the last axis groups share a position in the head: two heads of 33 tokens, and of 64 and 16
    f"{CONFIG}.q_group_size: 64 does not divide the 66 numbers": {
        "config": {"axis_key": -1},
        "batch": {"sequence": 33},
    },
    f"{CONFIG}.q_group_size: 64 does not divide the 160 numbers": {
        "config": {"axis_key": -1, "residual_length": 16},
        "batch": {"sequence": 64, "new_tokens": 20},
    },
    f"{CONFIG}.q_group_size: 256 does not divide 128 numbers": {
        "config": {"backend": "hqq", "q_group_size": 256},
        "batch": {"sequence": 1},
    },
    f"{CONFIG}.q_group_size: 63 leaves 63 rows of codes": {
        "config": {"backend": "hqq", "q_group_size": 63},
        "batch": {"sequence": 63},
    },
    "has sliding_attention layers; use dynamic": {"config": {}, "model": "gemma-3-1b"},
    "has linear_attention layers; use dynamic": {
        "config": {},
        "model": {"config": {"model_type": "mamba", **TINY["mamba"]}},
    },
    "has indexed_attention layers; use dynamic": {
        "config": {},
        "model": {"config": {"model_type": "deepseek_v32", **TINY["deepseek_v32"]}},
    },
    f"{KIND}: quantized is not supported yet with profile transformers-4.51": {
        "config": {},
        "profile": "transformers-4.51",
    },
    f"{KIND}: transformers' offloaded cache fails for deepseek_v32: it concatenates index keys": {
        "generation": {"cache_implementation": "offloaded"},
        "model": {"config": {"model_type": "deepseek_v32", **TINY["deepseek_v32"]}},
    },
    f"{KIND}: static is not supported yet for gemma4_text, whose layers share keys": {
        "generation": {"cache_implementation": "static"},
        "model": {"config": {"model_type": "gemma4_text", **TINY["gemma4_text"]}},
    },
    "generation.prefill_chunk_size: is not supported yet with a static cache": {
        "generation": {"cache_implementation": "static", "prefill_chunk_size": 64}
    },
    "generation.prefill_chunk_size: is not supported yet for mamba, whose layers keep states": {
        "generation": {"prefill_chunk_size": 64},
        "model": {"config": {"model_type": "mamba", **TINY["mamba"]}},
    },
    "generation.prefill_chunk_size: transformers reads a prompt with images in one pass": {
        "generation": {"prefill_chunk_size": 64},
        "model": "qwen2.5-vl-7b",
        "batch": {"images": 1, "image_size": 512, "sequence": 4096},
    },
    "generation.prefill_chunk_size: is not supported yet with profile transformers-4.51": {
        "generation": {"prefill_chunk_size": 64},
        "profile": "transformers-4.51",
    },
    "serving.cache_dtype: only applies to serving engines": {"serving": {"cache_dtype": "fp8"}},
}


@pytest.mark.parametrize("said", REFUSED)
def test_caches_unsupported_by_transformers_are_refused_in_one_line(said: str) -> None:
    fields = dict(REFUSED[said])
    if "config" in fields:
        fields["generation"] = {"cache_implementation": "quantized", "cache_config": fields.pop("config")}
    with pytest.raises(MemplanError) as caught:
        estimate(generating(**{"model": "qwen2.5-0.5b", **fields}))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
