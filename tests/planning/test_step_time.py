"""A step's operations, as closed arithmetic, and its time, as shares of a card's peak rates."""

from __future__ import annotations

from itertools import product
from math import log, sqrt
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.speed import Timed, published, timed
from memplan import RunSpec, all_gpus, find_gpu
from memplan.catalogue.hardware import rates
from memplan.catalogue.hardware.gpu import Price
from memplan.catalogue.kernels.flops import ADDING, CLIPPING
from memplan.planning.step_time import (
    Hourly,
    Product,
    Range,
    Shares,
    Work,
    busy,
    cost,
    hourly,
    limits,
    ratio,
    shares,
    step_pace,
    work,
)
from tests.cases import each
from tests.sampling import ALL, examples, sampled

B, S, H, F, V, A, K, D, L = 2, 96, 64, 176, 300, 4, 2, 16, 3
N = B * S
CONFIG = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": F,
    "vocab_size": V,
    "num_attention_heads": A,
    "num_key_value_heads": K,
    "num_hidden_layers": L,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
LINEAR = {
    "q": (A * D, H),
    "k": (K * D, H),
    "v": (K * D, H),
    "o": (H, A * D),
    "gate": (F, H),
    "up": (F, H),
    "down": (H, F),
}
LAYER = sum(out * into for out, into in LINEAR.values())
HEAD = V * H
PARAMETERS, TENSORS = L * (LAYER + 2 * H) + 2 * HEAD + H, L * (len(LINEAR) + 2) + 3
SCORES = B * A * S * S * D  # multiplications of either attention product


def counted(**run: Any) -> Work:
    kernels = {"attention": "eager", "checkpointing": "none", **run.pop("kernels", {})}
    batch = {"micro": B, "sequence": S, **run.pop("batch", {})}
    return work(RunSpec(model={"config": CONFIG}, kernels=kernels, batch=batch, **run))


def parts(w: Work) -> tuple[int, int, int, int]:
    return w.forward, w.recomputed, w.inputs, w.weights


def test_full_training_takes_six_operations_per_parameter_and_token_plus_attention() -> None:
    """Attention adds three times its forward products."""
    products = 2 * N * (L * LAYER + HEAD)
    attention = 2 * 2 * L * SCORES
    w = counted()
    assert parts(w) == (products + attention, 0, products + 2 * attention, products)
    assert w.operations == 6 * N * (L * LAYER + HEAD) + 3 * attention


def test_checkpointing_recomputes_blocks_except_their_last_product() -> None:
    """Nothing needs the last product's output: its backward keeps its input, and recomputation stops there."""
    block = 2 * N * LAYER + 2 * 2 * SCORES
    plain, twice = counted(), counted(kernels={"checkpointing": "full"})
    assert twice.recomputed == L * (block - 2 * N * H * F)
    assert parts(twice._replace(recomputed=0)) == parts(plain)
    assert counted(kernels={"checkpointing": "selective"}).recomputed == 0
    all_again = counted(kernels={"checkpointing": "full", "reentrant": True})
    assert all_again.recomputed == L * block


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_lora_skips_gradients_of_frozen_matrices_and_the_first_layers_input(kind: str) -> None:
    r = 8
    adapters = r * sum(out + into for out, into in LINEAR.values())
    entering = sum(out * into + r * into for out, into in (LINEAR[name] for name in "qkv"))
    frozen, attention = 2 * N * (L * LAYER + HEAD), 2 * 2 * L * SCORES
    low_rank = 2 * N * L * adapters
    w = counted(method={"kind": kind, "rank": r})
    assert parts(w) == (
        frozen + low_rank + attention,
        0,
        frozen + low_rank + 2 * attention - 2 * N * entering,
        low_rank,
    )


def test_checkpointing_has_the_first_layers_input_ask_for_a_gradient_under_lora() -> None:
    r = 8
    entering = sum(out * into + r * into for out, into in (LINEAR[name] for name in "qkv"))
    method = {"kind": "lora", "rank": r}
    more = counted(method=method, kernels={"checkpointing": "full"}).inputs - counted(method=method).inputs
    assert more == 2 * N * entering


def test_frozen_layers_below_the_trained_one_have_no_backward() -> None:
    """The trained layer has all of it: its first norm trains, and needs the gradient of its output."""
    w = counted(method={"kind": "freeze", "trainable_layers": 1})
    assert parts(w)[1:] == (0, 2 * N * (LAYER + HEAD) + 2 * 2 * 2 * SCORES, 2 * N * LAYER)


def test_flash_attention_leaves_out_the_masked_half_and_makes_the_scores_again() -> None:
    """Five products backward instead of four; the memory-efficient kernel does the same, except with a mask."""
    plain = counted()
    for attention in ("sdpa", "flash_attention_2", "sdpa_efficient"):
        w = counted(kernels={"attention": attention})
        assert plain.forward - w.forward == L * 2 * SCORES
        assert plain.inputs - w.inputs == L * (4 * 2 * SCORES - 5 * SCORES)
    masked = counted(kernels={"attention": "sdpa_efficient"}, loop={"padded": True})
    assert masked.forward == plain.forward
    assert masked.inputs - plain.inputs == L * 2 * SCORES


def test_a_fused_loss_makes_its_gradients_in_forward() -> None:
    plain, fused = counted(), counted(kernels={"loss": "fused"})
    made = 2 * N * HEAD
    assert parts(fused) == (plain.forward + 2 * made, 0, plain.inputs - made, plain.weights - made)


@pytest.mark.parametrize("loss", ["chunked", "chunked_lm_head"])
def test_a_chunked_loss_takes_the_same_operations(loss: str) -> None:
    assert parts(counted(kernels={"loss": loss})) == parts(counted())


def test_lora_as_one_function_makes_the_product_with_a_again() -> None:
    method, r = {"kind": "lora", "rank": 8}, 8
    apart, joined = counted(method=method), counted(method=method, kernels={"fused": ("lora",)})
    assert joined.forward == apart.forward
    assert joined.weights - apart.weights == 2 * N * L * r * sum(into for _, into in LINEAR.values())


def test_llm_int8_multiplies_forward_in_int8_and_backward_in_16_bits() -> None:
    w = counted(method={"kind": "qlora", "rank": 8, "quantization": {"format": "int8"}})
    in_int8 = sum(p.operations * p.times for p in w.products if p.dtype == "int8")
    assert in_int8 == 2 * N * L * LAYER
    assert step_pace(w, find_gpu("v100")) is None  # no units for int8


def test_autocast_multiplies_in_the_compute_dtype() -> None:
    assert {p.dtype for p in counted(precision="amp").products} == {"bf16"}
    assert {p.dtype for p in counted(precision="fp32").products} == {"fp32"}


def test_accumulation_repeats_the_pass_and_adds_gradients_up() -> None:
    once, thrice = counted(), counted(batch={"accumulation": 3})
    assert thrice.tokens == 3 * once.tokens
    assert parts(thrice) == tuple(3 * n for n in parts(once))
    added = (thrice.update - once.update) / (2 * ADDING)
    assert 2 * PARAMETERS <= added < 2 * PARAMETERS + 512 * TENSORS


def test_the_optimizer_reads_and_writes_states_parameters_and_gradients() -> None:
    """bf16 throughout: a parameter, its gradient and two moments, two bytes each. Rounding to 512 bytes and step
    counters add less than three times 512 bytes per tensor."""

    def update(optimizer: str, clip: float | None = None) -> int:
        return counted(optimizer=optimizer, loop={"clip_grad_norm": clip}).update

    for optimizer, states, gradients in (("adamw_torch_fused", 2, 1), ("adamw_torch", 7, 2)):
        exact = 2 * PARAMETERS * (2 * states + gradients + 2)
        assert exact <= update(optimizer) < exact + 512 * TENSORS * (3 * states + gradients)
    clipping = (update("adamw_torch_fused", 1.0) - update("adamw_torch_fused")) / CLIPPING
    assert 2 * PARAMETERS <= clipping < 2 * PARAMETERS + 512 * TENSORS


def test_weights_on_the_host_cross_the_bus_in_every_pass() -> None:
    """All of a model's weights, in bf16, for forward and for backward."""
    zero3 = {"strategy": "zero3", "offload": {"optimizer": True}}
    here = counted(parallelism=zero3)
    away = counted(parallelism={**zero3, "offload": {"optimizer": True, "parameters": True}})
    assert away.copied - here.copied == 2 * 2 * PARAMETERS


def test_offloaded_checkpoints_are_copied_out_and_back() -> None:
    """The inputs of all layers, in bf16."""
    away, here = (counted(kernels={"checkpointing": how}) for how in ("offload", "full"))
    assert away.copied == 2 * L * 2 * N * H
    assert away._replace(copied=0) == here


def test_an_optimizer_on_the_host_gets_gradients_and_gives_parameters_back() -> None:
    offload = {"offload": {"optimizer": True}}
    w = counted(optimizer="adamw_torch_fused", parallelism=offload, loop={"clip_grad_norm": None})
    assert 2 * 2 * PARAMETERS <= w.copied < 2 * 2 * PARAMETERS + 512 * TENSORS
    assert w.update == 0
    assert w.on_host > 2 * 2 * 2 * PARAMETERS  # two moments, read and written


def test_fused_kernels_move_fewer_bytes() -> None:
    stock, fused = counted(), counted(kernels={"fused": ("rms_norm", "rope", "swiglu", "cross_entropy")})
    assert fused.moved < stock.moved
    assert fused.calls < stock.calls
    assert fused.operations == stock.operations


def test_quantised_layers_move_more_bytes_with_the_same_flops() -> None:
    method = {"kind": "qlora", "rank": 8, "quantization": {"kbit_preparation": False}}
    few = {"micro": 1, "sequence": 8}  # few tokens, so that matrices dominate
    lora, qlora = counted(method={"kind": "lora", "rank": 8}, batch=few), counted(method=method, batch=few)
    assert qlora.operations == lora.operations
    assert qlora.moved > lora.moved


# seconds


CARD = find_gpu("a100-80gb")
SHARE, WIDTH, HOST = rates.products((8, 0)), rates.BANDWIDTH, rates.LAUNCH
LIMITS = limits(CARD, frozenset(("bf16", "fp16", "fp32")))
assert LIMITS is not None
ONE = Work(1000, 10**15, 0, 0, 0, (Product("bf16", False, 10**15, 1, 1),), 10**12, 10**11, 0, 0, 1)


def test_a_steps_time_is_its_compute_time_plus_its_memory_time() -> None:
    found = step_pace(ONE, CARD)
    assert found is not None
    peak, bandwidth = CARD.bf16_tflops * 1e12, CARD.bandwidth_gbps * 1e9
    expected = [
        10**15 / (peak * p / 100) + (10**12 + 10**11) / (bandwidth * b / 100)
        for p, b in ((SHARE.high, WIDTH.high), (SHARE.usual, WIDTH.usual), (SHARE.low, WIDTH.low))
    ]
    assert found.seconds == pytest.approx(expected)
    assert found.tokens_per_second == pytest.approx([1000 / s for s in reversed(expected)])
    assert found.bound == "products"
    assert found.basis == "measured"


def test_attention_has_its_own_share_of_peak() -> None:
    found = step_pace(ONE._replace(products=(Product("bf16", True, 10**15, 1, 1),), moved=0, update=0), CARD)
    assert found is not None
    share = rates.attention((8, 0)).usual / 100
    assert found.seconds.usual == pytest.approx(10**15 / (CARD.bf16_tflops * 1e12 * share))


def test_a_product_of_few_rows_is_bound_by_its_bytes() -> None:
    few = ONE._replace(products=(Product("bf16", False, 10**6, 10**12, 3),), moved=0, update=0)
    found = step_pace(few, CARD)
    assert found is not None
    assert found.seconds.usual == pytest.approx(3 * 10**12 / (CARD.bandwidth_gbps * 1e9 * WIDTH.usual / 100))
    assert found.bound == "bytes"


def test_many_small_kernels_are_bound_by_the_host() -> None:
    many = Work(10, 10, 0, 0, 0, (Product("bf16", False, 10, 10, 1),), 10, 10, 0, 0, 10**6)
    found = step_pace(many, CARD)
    assert found is not None
    assert found.seconds == pytest.approx((HOST.low, HOST.usual, HOST.high))
    assert found.bound == "host"


def test_bus_transfers_add_to_the_time() -> None:
    """An A100 with 16 lanes of PCIe 4.0 at 1.969 GB/s each."""
    here = step_pace(ONE, CARD)
    away = step_pace(ONE._replace(copied=10**12, on_host=10**11), CARD)
    assert here is not None
    assert away is not None
    bus, host = rates.BUS, rates.HOST_MEMORY
    more = [
        10**12 / (16 * 1.969e9 * b / 100) + 10**11 / (h * 1e9)
        for b, h in ((bus.high, host.high), (bus.usual, host.usual), (bus.low, host.low))
    ]
    assert [a - b for a, b in zip(away.seconds, here.seconds, strict=True)] == pytest.approx(more)
    assert (away.bound, away.basis) == ("copies", "assumed")
    assert (here.bus, here.host) == (None, None)


def test_unknown_buses_count_as_16_lanes_of_pcie_4() -> None:
    assert all(0 < rates.bus_gbps(gpu.pcie) < 200 for gpu in all_gpus())
    assert rates.bus_gbps(None) == rates.bus_gbps("PCIe 4.0 x16")


def test_a_card_of_two_devices_is_halved() -> None:
    whole = find_gpu("mi250x")
    assert whole.devices == 2
    halves, one = step_pace(ONE, whole), step_pace(ONE, whole._replace(devices=1))
    assert halves is not None
    assert one is not None
    assert halves.seconds.usual == pytest.approx(2 * one.seconds.usual)


def test_bf16_without_hardware_support_takes_fp32s_time_and_a_note() -> None:
    t4 = find_gpu("t4")
    bf16 = step_pace(ONE, t4)
    fp32 = step_pace(ONE._replace(products=(Product("fp32", False, 10**15, 1, 1),)), t4)
    fp16 = step_pace(ONE._replace(products=(Product("fp16", False, 10**15, 1, 1),)), t4)
    assert bf16 is not None
    assert fp32 is not None
    assert fp16 is not None
    assert bf16.seconds == fp32.seconds
    assert "no units for bf16" in bf16.note
    assert fp16.note == ""
    products = 10**15 / (t4.fp16_tflops * 1e12 * rates.ANY_PRODUCTS.usual / 100)
    assert fp32.seconds.usual - fp16.seconds.usual == pytest.approx((8 - 1) * products)


def test_geforce_cards_have_half_the_16_bit_rate_and_full_fp32() -> None:
    """An RTX 3090 does 35.6 TFLOPS in fp32 (10,496 units x 2 x 1.695 GHz), and half of its nominal 142 in 16 bits."""
    card = find_gpu("3090")
    work_ = ONE._replace(products=(Product("fp32", False, 10**15, 1, 1),), moved=0, update=0)
    found = step_pace(work_, card)
    assert found is not None
    assert found.seconds.usual == pytest.approx(10**15 / (35.58e12 * rates.ANY_PRODUCTS.usual / 100), rel=1e-3)


def test_without_a_rate_there_is_no_answer() -> None:
    card = find_gpu("gtx-1080-ti")
    assert card.fp16_tflops is None
    assert step_pace(ONE, card) is None
    assert ratio(ONE, ONE, card) is None


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_every_card_answers_in_order_or_not_at_all(kind: str) -> None:
    w = counted(method=kind)
    found = [p for p in (step_pace(w, gpu) for gpu in all_gpus()) if p is not None]
    assert len(found) > 150
    for p in found:
        assert 0 < p.seconds.low <= p.seconds.usual <= p.seconds.high
        assert p.basis in ("measured", "assumed")


@settings(max_examples=examples(15), deadline=None)
@given(st.integers(1, 4), st.integers(1, 600), st.integers(1, 64), st.sampled_from(["full", "lora", "qlora"]))
def test_more_tokens_never_take_less(micro: int, sequence: int, more: int, kind: str) -> None:
    def seconds(b: int, s: int) -> float:
        found = step_pace(counted(method=kind, batch={"micro": b, "sequence": s}, kernels={"attention": "sdpa"}), CARD)
        assert found is not None
        return found.seconds.usual

    now = seconds(micro, sequence)
    assert seconds(micro + more, sequence) >= now
    assert seconds(micro, sequence + more) >= now


def test_a_ratio_is_narrower_than_either_time() -> None:
    run = {"model": "qwen2-0.5b", "batch": {"micro": 4, "sequence": 1024}}
    plain = work(RunSpec(**run, kernels={"checkpointing": "none"}))
    twice = work(RunSpec(**run, kernels={"checkpointing": "full"}))
    assert ratio(plain, plain, CARD) == (1, 1)
    found = ratio(plain, twice, CARD)
    assert found is not None
    low, high = found
    assert 1.1 < low <= high < 4 / 3 + 0.05
    slow, fast = step_pace(twice, CARD), step_pace(plain, CARD)
    assert slow is not None
    assert fast is not None
    assert low <= slow.seconds.usual / fast.seconds.usual <= high
    back = ratio(twice, plain, CARD)
    assert back == pytest.approx((1 / high, 1 / low))


def test_a_ratio_is_of_equal_tokens() -> None:
    once, thrice = counted(), counted(batch={"accumulation": 3})
    found = ratio(once, thrice, CARD)
    assert found is not None
    assert 0.9 < found[0] <= found[1] < 1 + 1e-9  # the optimizer steps once for three passes


# dollars


def test_an_hours_price_is_the_range_of_the_dated_ones() -> None:
    prices = (
        Price("a", 2.0, "2026-01-02", "on demand", "x"),
        Price("b", 1.0, "2026-03-04", "on demand", "x"),
        Price("c", 0.1, "", "undated", "x"),
    )
    assert hourly(CARD._replace(prices=prices)) == Hourly(1.0, 2.0, "2026-03-04")
    assert hourly(CARD._replace(prices=())) is None


def test_a_million_tokens_cost_their_seconds_at_the_hours_price() -> None:
    found = step_pace(ONE, CARD)
    assert found is not None
    seconds = found.seconds.times(1_000_000 / 1000)
    assert cost(found).seconds == seconds
    assert cost(found).usd is None
    plain = cost(found, 3.6)
    assert plain.usd == pytest.approx([s * 0.001 for s in seconds])
    ranged = cost(found, Hourly(1.0, 3.0, "2026-01-01"), tokens=5_000_000)
    assert ranged.usd == pytest.approx(
        Range(5 * seconds.low / 3600, 5 * seconds.usual * 2 / 3600, 5 * seconds.high * 3 / 3600)
    )


# rates


def test_every_rate_says_how_it_is_known() -> None:
    own = (rate(card) for rate in (rates.products, rates.attention) for card in ((8, 0), (9, 0), None))
    for rate in (*own, rates.BANDWIDTH, rates.LAUNCH, rates.BUS, rates.HOST_MEMORY):
        assert 0 < rate.low <= rate.usual <= rate.high
        assert rate.basis in ("measured", "assumed")
        assert rate.source
    assert rates.products((8, 9)) is rates.products(None) is rates.ANY_PRODUCTS
    assert rates.bandwidth((8, 0)).basis == "measured"
    assert rates.bandwidth((9, 0)).basis == "assumed"
    assert rates.attention((12, 0)) is rates.attention(None) is rates.ANY_ATTENTION


def test_published_speeds_state_their_source() -> None:
    for row in published().values():
        assert row["source"].startswith("https://")
        assert row["tokens_per_second"] > 0
        assert ("golden" in row) != ("stack" in row)  # the golden row has the stack


@each(sampled(list(published())))
def test_a_published_steps_time_is_met_or_misses_for_a_cause(id: str) -> None:
    t = timed(id)
    assert t.inside != bool(t.cause)


def read_from(gives: str) -> list[Timed]:
    return [timed(id) for id, row in published().items() if row.get("gives") == gives]


@ALL
def test_an_a100s_usual_rates_meet_the_runs_they_were_read_from() -> None:
    """No other choice of the three rates, in steps of 5, is better by more than a hundredth."""
    runs = read_from("A100")
    assert len(runs) == 45
    usual = shares(CARD)[1]

    def off(choice: Shares) -> float:
        errors = [log(max(sum(busy(t.work, LIMITS, choice)), t.work.calls * choice.launch) / t.seconds) for t in runs]
        return sqrt(sum(e * e for e in errors) / len(errors))

    best = off(usual)
    assert best < 0.08
    for step in product((-0.05, 0, 0.05), repeat=3):
        other = Shares(*(rate + d for rate, d in zip(usual, step, strict=False)), *usual[3:])
        assert off(other) > best - 0.01


@ALL
def test_runs_that_no_rate_was_read_from_are_near_the_usual_time() -> None:
    others = [timed(id) for id, row in published().items() if not row.get("gives") and not row.get("cause")]
    assert len(others) == 43
    assert sorted(abs(t.error) for t in others)[21] < 0.1


@ALL
def test_an_h100s_speedup_over_an_a100_matches_one_measured_loop() -> None:
    """A loop that is 1.5 times slower than others is so on both cards."""
    for model in ("llama-3-8b-full", "llama-3-8b-lora", "llama-2-13b-lora", "phi-3-mini-full", "phi-3-mini-lora"):
        h100, a100 = (timed(f"universal-llm-trainer-{gpu}-{model}") for gpu in ("h100-sxm", "a100-80gb"))
        ours = h100.pace.seconds.usual / a100.pace.seconds.usual
        assert ours == pytest.approx(h100.seconds / a100.seconds, rel=0.15)


def test_runs_with_and_without_fused_kernels_agree_on_product_time() -> None:
    """At the usual share of the bandwidth, and not at others."""
    for name in ("fms-base-mistralai-mistral-7b-v0.1-{}-lora-g1-b8", "fms-granite-ibm-powerlm-3b-{}-full-g1-b8"):
        stock, fused = timed(name.format("none")), timed(name.format("foak-fast-kernels"))
        assert stock.share == pytest.approx(fused.share, abs=0.01)
        fast = shares(CARD)[1]._replace(bandwidth=0.9)
        assert abs(stock.share_at(fast) - fused.share_at(fast)) > 0.02


def test_the_host_takes_as_long_for_a_kernel_as_short_steps_show() -> None:
    shown = [t.seconds / t.work.calls * 1e6 for t in read_from("launch")]
    assert len(shown) == 3
    assert all(rates.LAUNCH.usual - 2 <= us <= rates.LAUNCH.usual + 2 for us in shown)
