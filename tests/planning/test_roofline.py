"""Tokens per second: bytes and operations against arithmetic, ranges against published measurements, and laws."""

from __future__ import annotations

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import RunSpec, find_gpu, load_card
from memplan.catalogue.hardware import token_rates
from memplan.planning.roofline import DecodingPace, Load, decode, decoding, distinct, prefill, prefilling
from memplan.planning.step_time import work
from memplan.program.stored.weights import stored_weights
from tests.sampling import examples

PUBLISHED: list[dict[str, Any]] = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "golden" / "published_decoding.jsonl").read_text("utf-8").splitlines()
]

laws = settings(max_examples=examples(30), deadline=None)
MODELS = ("llama-3.1-8b", "qwen2.5-7b", "gemma-3-1b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite", "mamba-130m")
CARDS = ("h100", "a100", "4090", "l4", "t4", "mi300x", "m2 ultra")


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row['model']}-{row['gpu']}-{row['format']}-{row['tp']}")
def test_measured_and_published_speeds_lie_in_the_range(row: dict[str, Any]) -> None:
    load = Load(load_card(row["model"]), row["format"], tp=row["tp"], host=token_rates.REPLAY, recorded=row["recorded"])
    low, high = decode(load, find_gpu(row["gpu"]), row["prompt"], row["new_tokens"]).tokens_per_second
    assert low <= row["tokens_per_second"] <= high
    assert high < 10 * low, "a range that says nothing"


def test_a_token_reads_every_weight_but_the_table_of_tokens_once() -> None:
    model = load_card("llama-3.1-8b")
    layers, h, kv, f, v = 32, 4096, 1024, 14336, 128_256
    matrices = layers * (2 * h * h + 2 * h * kv + 3 * h * f) + v * h
    norms = (2 * layers + 1) * h
    step = decoding(Load(model), 1000, 25, 4)
    assert step.weights == ((token_rates.PLAIN, 2 * (matrices + norms + 4 * h)),)  # one embedding row per request
    token = layers * 2 * kv * 2
    assert step.caches == (4 * 1000 * token, 4 * 1024 * token)
    assert step.operations == 2 * 4 * matrices
    assert step.attending == 4 * 2 * layers * 32 * (128 + 128) * 1024


def test_a_tied_table_is_read_as_the_head() -> None:
    model = load_card("qwen2.5-0.5b")
    assert model.tie_word_embeddings
    assert decoding(Load(model), 8, 1, 1).bytes == sum(w.bytes for w in stored_weights(model))


def test_only_experts_chosen_by_some_token_are_read() -> None:
    model = load_card("qwen3-30b-a3b")
    every, chosen, h, m, layers = 128, 8, 2048, 768, 48
    expert = layers * 3 * h * m * 2
    one, many = (decoding(Load(model), 8, 1, n) for n in (1, 10_000))
    assert one.experts == (8.0, 128)
    assert many.experts[0] == pytest.approx(every)
    assert many.bytes - one.bytes == pytest.approx((every - chosen) * expert + (10_000 - 1) * h * 2, rel=1e-9)


@pytest.mark.parametrize("model", ["llama-3.2-1b", "qwen3-30b-a3b", "phi-3-mini-4k"])
def test_a_prompt_takes_the_operations_that_a_forward_pass_of_training_does(model: str) -> None:
    """Except for the head, applied to the last token only, and attention's diagonal, counted in full."""
    s, card = 512, load_card(model)
    kernels = {"checkpointing": "none", "attention": "flash_attention_2"}
    trained = work(RunSpec(model=model, batch={"sequence": s}, kernels=kernels))
    attention = sum(p.operations * p.times for p in trained.products if p.attention) * 2 // 7  # only forward
    mine = prefilling(Load(card), s)
    head = 2 * (s - 1) * card.vocab_size * card.hidden_size
    assert mine.operations + head == trained.forward - attention
    assert mine.attending == attention * (s + 1) // s


def test_weights_in_fewer_bits_are_fewer_bytes_to_read() -> None:
    model = load_card("llama-3.1-8b")
    plain, eight, four = (decoding(Load(model, f), 8, 1, 1) for f in (None, "Q8_0", "Q4_K_M"))
    assert plain.bytes > eight.bytes > four.bytes
    rates = [dict(step.weights).keys() - {token_rates.PLAIN} for step in (plain, eight, four)]
    assert rates == [set(), {token_rates.EIGHT}, {token_rates.FEWER}]
    bits = dict(decoding(Load(model, "nf4"), 8, 1, 1).weights)
    assert set(bits) == {token_rates.PLAIN, token_rates.BITSANDBYTES}


def test_windows_bound_the_cache_reads() -> None:
    load = Load(load_card("gemma-3-1b"))
    grown = decoding(load, 100_000, 1, 1).caches[0] - decoding(load, 50_000, 1, 1).caches[0]
    assert grown == 50_000 * 4 * 2 * 1 * 256 * 2  # 4 of 26 layers have no window


def test_a_card_without_units_for_products_only_reads() -> None:
    gpu = find_gpu("h100")._replace(bf16_tflops=None, fp16_tflops=None)
    load = Load(load_card("llama-3.2-1b"))
    assert prefill(load, gpu, 100) is None
    pace = decode(load, gpu, 100, 10)
    assert pace.bound == ("memory", "memory")
    assert any("only reading is counted" in note for note in pace.notes)
    assert token_rates.PRODUCTS not in pace.assumed


def test_every_rate_that_an_answer_rests_on_is_named_with_its_source() -> None:
    pace = decode(Load(load_card("llama-3.1-8b"), "fp8-channel", tp=4), find_gpu("h100"), 100, 10)
    assert {token_rates.PLAIN, token_rates.EIGHT, token_rates.PRODUCTS, token_rates.SCHEDULING} < set(pace.assumed)
    assert sum("NVLink" in span.what for span in pace.assumed) == 2
    assert all(span.source and span.low <= span.high for span in pace.assumed)


@given(st.integers(1, 512), st.integers(1, 512), st.integers(1, 1000))
def test_distinct_experts_lie_between_experts_per_token_and_all_experts(e: int, k: int, n: int) -> None:
    k = min(e, k)
    assert k - 1e-9 <= distinct(e, k, n) <= min(e, k * n) + 1e-9
    assert distinct(e, k, n) <= distinct(e, k, n + 1) + 1e-9


def paced(model: str, gpu: str, prompt: int, requests: int, **load: Any) -> DecodingPace:
    return decode(Load(load_card(model), **load), find_gpu(gpu), prompt, 64, requests)


@laws
@given(st.sampled_from(MODELS), st.sampled_from(CARDS), st.integers(1, 20_000), st.integers(1, 64), st.floats(1, 10))
def test_more_bandwidth_is_never_slower(model: str, name: str, prompt: int, requests: int, more: float) -> None:
    gpu, load = find_gpu(name), Load(load_card(model))
    assert gpu.bandwidth_gbps is not None
    wider = gpu._replace(bandwidth_gbps=gpu.bandwidth_gbps * more)
    before, after = (decode(load, card, prompt, 64, requests).step for card in (gpu, wider))
    assert after.low <= before.low
    assert after.high <= before.high
    assert 0 < after.low <= after.high < inf


@laws
@given(st.sampled_from(MODELS), st.sampled_from(CARDS), st.integers(1, 20_000), st.integers(1, 64), st.integers(1, 64))
def test_a_longer_context_and_more_requests_take_a_step_no_less_time(
    model: str, gpu: str, prompt: int, requests: int, more: int
) -> None:
    least = paced(model, gpu, prompt, requests).step
    for other in (paced(model, gpu, prompt + more, requests), paced(model, gpu, prompt, requests + more)):
        assert other.step.low >= least.low
        assert other.step.high >= least.high


@laws
@given(st.sampled_from(MODELS[:-1]), st.integers(1, 20_000), st.sampled_from([1, 2, 4]))
def test_more_ranks_read_no_more_per_rank(model: str, prompt: int, tp: int) -> None:
    one, two = (decoding(Load(load_card(model), tp=n), prompt, 8, 4) for n in (tp, 2 * tp))
    assert two.bytes <= one.bytes
    assert two.caches <= one.caches


@laws
@given(st.sampled_from(MODELS), st.sampled_from(CARDS), st.integers(1, 4000))
def test_prefill_takes_less_time_per_token_than_decoding(model: str, gpu: str, prompt: int) -> None:
    load, card = Load(load_card(model)), find_gpu(gpu)
    whole = prefill(load, card, prompt)
    if whole is not None:
        made = decode(load, card, prompt, 1, 1)
        assert whole.tokens_per_second.high >= made.tokens_per_second.high * 0.999
