"""Questions about inference: answers against plain estimates, and laws."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.main import get_command

import memplan
from memplan import RunSpec, estimate, find_gpu, load_card
from memplan.catalogue.profiles.engines import ENGINES
from memplan.catalogue.quantization.weight_formats import FORMATS
from memplan.cli.app import app
from memplan.core.errors import MemplanError, SpecError
from memplan.estimate.demand import FITS, Demand
from memplan.planning.cache_choices import alternative_caches
from memplan.planning.inference import (
    DEGREES,
    Questions,
    load_of,
    mildest_format,
    most_requests,
    places,
    questions,
    with_format,
    with_tp,
)
from memplan.planning.offers import CardFilter, parse_owned_cards
from memplan.planning.plan import plan
from memplan.planning.reach import reach
from memplan.program.stored.weights import stored_weights
from memplan.report.plans import render
from memplan.report.plans.inference import Places
from memplan.report.text import Screen
from memplan.spec.run import changed
from tests.sampling import ALL, examples, sampled

COMMAND = get_command(app)
laws = settings(max_examples=examples(10), deadline=None)
ENGINE = st.sampled_from(["vllm-0.33", "sglang-0.5", "tgi-3", "llama.cpp-2026"])
MODEL = st.sampled_from(["llama-3.2-1b", "qwen2.5-7b", "gemma-3-1b", "qwen3-30b-a3b"])


def run_of(model: str = "llama-3.1-8b", profile: str = "vllm-0.33", gpu: str | None = "4090", **more: Any) -> RunSpec:
    batch = {"micro": 1, "sequence": 8000, "new_tokens": 192, **more.pop("batch", {})}
    return RunSpec(model=model, task="generate", profile=profile, gpu=gpu, batch=batch, **more)


ASKED = questions(run_of())


def fits(run: RunSpec) -> bool:
    try:
        return estimate(run).fits
    except MemplanError:
        return False


def test_the_library_has_the_questions() -> None:
    assert memplan.questions is questions
    assert memplan.Questions is Questions


@pytest.mark.parametrize("profile", sampled(["vllm-0.33", "llama.cpp-2026", "transformers-5"], 3))
def test_one_request_more_or_a_longer_one_does_not_fit(profile: str) -> None:
    run = run_of("llama-3.2-1b", profile, "3060")
    found = questions(run)
    most, longest = found.requests, found.context
    assert most.value > 1
    assert fits(changed(run, "batch", micro=most.value))
    assert most.binds == "max_num_seqs" or not fits(changed(run, "batch", micro=most.value + 1))
    assert fits(changed(run, "batch", sequence=longest.value - 192))
    assert longest.binds == "positions" or not fits(changed(run, "batch", sequence=longest.value - 191))


def test_every_choice_is_an_estimate_as_it_stands() -> None:
    run = run_of()
    assert [choice.name for choice in ASKED.degrees] == [str(tp) for tp in DEGREES]
    for tp, choice in zip(DEGREES, ASKED.degrees, strict=True):
        assert choice.answer is not None
        assert choice.answer.bytes.used == estimate(with_tp(run, tp)).bytes.used
        assert choice.fits == (choice.answer.verdict.answer == "fits")
    for choice in ASKED.formats[1:]:
        assert choice.answer is not None
        assert choice.answer.bytes.used == estimate(with_format(run, choice.name)).bytes.used


def test_a_choices_weights_are_its_engines_weights() -> None:
    plain, *formats = ASKED.formats
    rotary = 131_072 * 128 * 2  # cosines and sines of every position, kept in addition to the weights
    assert plain.weights == 2 * 8_030_261_248 + rotary
    model = load_card("llama-3.1-8b")
    for choice in formats:
        assert choice.weights == sum(w.bytes for w in stored_weights(model, choice.name)) + rotary


def test_runs_that_do_not_fit_get_the_mildest_format_and_fewest_gpus() -> None:
    """A model that does not fit is offered the mildest format and the fewest GPUs that do."""
    found = questions(run_of("llama-3.1-70b", gpu="h100"))
    assert not found.fits
    assert (found.requests.value, found.context.value, found.full) == (0, 0, None)
    assert found.mildest is not None
    assert found.fewest is not None
    assert not any(choice.fits for choice in found.formats[: found.formats.index(found.mildest)])
    assert not any(choice.fits for choice in found.degrees[: found.degrees.index(found.fewest)])
    assert fits(with_format(run_of("llama-3.1-70b", gpu="h100"), found.mildest.name))


def test_a_run_that_its_engine_does_not_start_does_not_fit() -> None:
    """Its requests fit, but the pool does not hold one of the 131,072 tokens that the engine admits."""
    assert ASKED.answer.verdict.answer == "does not start"
    assert ASKED.answer.fits
    assert ASKED.requests.value > 0
    assert not ASKED.fits
    assert not ASKED.formats[0].fits
    assert ASKED.mildest is None


def test_layers_are_placed_on_as_many_gpus_as_a_row_says() -> None:
    found = questions(run_of("qwen2-0.5b", "transformers-5", parallelism={"world": 2}, batch={"sequence": 100}))
    worlds = [choice.answer.run.parallelism.world for choice in found.placed if choice.answer is not None]
    assert worlds == [int(choice.name) for choice in found.placed]
    assert worlds[:2] == [1, 2]


def test_other_caches_are_those_of_the_engine_that_hold_more_requests() -> None:
    (fp8,) = ASKED.caches
    assert fp8.answer is not None
    assert (fp8.name, fp8.answer.run.serving.cache_dtype) == ("fp8", "fp8")
    assert fp8.requests > ASKED.requests.value


def test_only_alternatives_of_the_engine_that_the_run_leaves_open_are_tried() -> None:
    def names(*args: Any, **more: Any) -> list[str]:
        return [step.format for step, _ in alternative_caches(estimate(run_of(*args, **more)))]

    every = ["chunked prefill", "quantized, 4 bits", "offloaded"]
    assert names("llama-3.2-1b", "transformers-5") == every
    assert names("llama-3.2-1b", "transformers-5", batch={"sequence": 1000}) == every[1:]
    assert names("llama-3.2-1b", "transformers-5", generation={"cache_implementation": "offloaded"}) == []
    assert names("llama-3.2-1b", "transformers-4.51") == []
    assert names("llama-3.2-1b", "llama.cpp-2026") == ["q8_0"]
    assert names("llama-3.2-1b", serving={"cache_dtype": "fp8"}) == []


@ALL
def test_other_caches_of_transformers_fit_runs_the_default_does_not() -> None:
    found = questions(run_of(profile="transformers-5", batch={"sequence": 27000}))
    assert [choice.name for choice in found.caches] == ["chunked prefill", "quantized, 4 bits", "offloaded"]
    assert not found.fits
    assert all(choice.fits for choice in found.caches)
    assert [choice.pace is None for choice in found.caches] == [False, True, True]


@ALL
def test_a_requested_format_starts_the_ladder() -> None:
    asked = run_of(profile="llama.cpp-2026", gpu="3060", method={"quantization": {"format": "Q5_K_M"}})
    names = [choice.name for choice in questions(asked).formats]
    every = [step.format for step in FORMATS["llama.cpp-2026"]]
    assert names == ["Q5_K_M", *every[every.index("Q5_K_M") + 1 :]]


@ALL
def test_layouts_unsupported_by_a_framework_are_refused_by_name() -> None:
    found = questions(run_of("llama-3.2-1b", "transformers-4.51", "3060"))
    assert found.degrees[0].answer is not None
    assert all("not supported yet" in choice.refused for choice in found.degrees[1:])
    assert found.fewest is found.degrees[0]
    assert all(choice.answer is not None for choice in found.placed)  # except by a device_map


def test_speeds_use_the_stored_weights_and_the_engines_rank() -> None:
    run = run_of()
    for choice in (*ASKED.degrees, *ASKED.formats):
        assert choice.pace is not None
        assert 0 < choice.pace.work.bytes < choice.weights  # the embedding table is not read
    load, why = load_of(estimate(with_tp(run, 4)))
    assert load is not None
    assert (load.tp, why) == (4, "")


def test_speeds_with_layers_on_the_host_are_unknown() -> None:
    load, why = load_of(estimate(run_of("llama-3.2-1b", "llama.cpp-2026", "3060", serving={"gpu_layers": 4})))
    assert load is None
    assert "host" in why


def test_cards_hold_the_run_on_the_fewest_of_them() -> None:
    run = run_of(gpu=None)
    found = places(run, CardFilter(owned=parse_owned_cards("8x3060,2xh100,t4")))
    assert {placed.gpu.name for placed in found} == {"rtx-3060-12gb", "h100-sxm"}
    for placed in found:
        there = with_tp(run, placed.tp).model_copy(update={"gpu": placed.gpu.name})
        assert fits(there)
        assert placed.tp == 1 or not fits(with_tp(there, placed.tp // 2))
        assert placed.requests >= 1
    prices = [placed.price.low for placed in found if placed.price]
    assert prices == sorted(prices)
    assert [placed.gpu for placed in places(run, CardFilter(owned=parse_owned_cards("8x3060,2xh100,t4")), 1)] == [
        found[0].gpu
    ]
    cheap = CardFilter(owned=parse_owned_cards("8x3060,2xh100"), usd_per_hour=0.5)
    assert all(placed.price is not None and placed.price.low <= 0.5 for placed in places(run, cheap))


def test_to_own_cards_of_a_desk_come_by_list_price() -> None:
    run = run_of("qwen3-32b", "vllm-0.33", None)
    found = places(run, CardFilter(to="own"), 6)
    assert max(placed.tp for placed in found) <= 4
    assert all((placed.answer.verdict.headroom or 0) > 2**30 // 20 for placed in found)
    prices = [placed.gpu.launch_usd * placed.tp for placed in found if placed.gpu.launch_usd and placed.gpu.slots]
    assert len(prices) == len(found) == 6
    assert all(later > 0.75 * earlier for earlier, later in pairwise(prices))  # about equal ones by the fewest cards
    report = Places(estimate(run), FITS, found, "own")
    text = render("table", report, False, Screen())
    assert text.startswith(f"To own: {f'{found[0].tp} × ' * (found[0].tp > 1)}{found[0].gpu.name}, {prices[0]:,.0f} US")
    assert f" {prices[-1]:,.0f} " in text
    each = report.dump()["places"][0]["each"]
    assert (each["launch_usd"], each["watts"]) == (found[0].gpu.launch_usd, found[0].gpu.tdp_watts)


def test_headroom_and_tight_apply_to_every_answer() -> None:
    less, more = (most_requests(run_of(), demand).value for demand in (Demand(headroom=2**30), Demand(tight=True)))
    assert less <= ASKED.requests.value < more


def test_invalid_questions_are_errors() -> None:
    for run, field in ((run_of(gpu=None), "gpu"), (RunSpec(model="gpt2", gpu="3060"), "task")):
        with pytest.raises(SpecError) as caught:
            questions(run)
        assert caught.value.field == field
    with pytest.raises(SpecError, match=r"use memplan\.questions for generate"):
        plan(run_of())


def test_every_engine_has_formats_that_are_known_with_their_sources() -> None:
    assert {engine.name for engine in ENGINES} < FORMATS.keys()
    model = load_card("llama-3.1-8b")
    for steps in FORMATS.values():
        sizes = [sum(w.bytes for w in stored_weights(model, step.format)) for step in steps]
        assert sizes == sorted(sizes, reverse=True)
        assert all(step.quality and step.source for step in steps)


def test_formats_that_a_card_has_no_kernels_for_are_not_proposed() -> None:
    old, new = (questions(run_of("llama-3.2-1b", "sglang-0.5", gpu)).formats for gpu in ("t4", "a10"))
    assert [choice.name for choice in old] == ["as asked, bf16"]
    assert [choice.name for choice in new] == ["as asked, bf16", "fp8-channel", "w8a8-int8", "w4a16"]


def test_a_run_that_does_not_fit_gets_the_mildest_fitting_format() -> None:
    from memplan.report.next_steps import help_line

    for profile, option in (("vllm-0.33", "--stored fp8-channel"), ("transformers-5", "--quant-format int8")):
        answer = estimate(run_of("llama-3.1-8b", profile, "t4", batch={"sequence": 4000}))
        found = mildest_format(answer)
        assert found is not None
        assert f"{option} (uses {found[1].bytes.used / 2**30:.1f} GiB)" in help_line(answer)
    assert "No format" not in help_line(estimate(run_of("llama-3.1-70b")))


@ALL
def test_the_largest_model_is_one_whose_stored_weights_fit() -> None:
    run = run_of("llama-3.2-1b", "llama.cpp-2026", "t4", serving={"weights": "Q4_K_M"}, batch={"sequence": 2048})
    found = reach(run, "model")
    assert isinstance(found.value, str)
    assert load_card(found.value).card["parameters"] * 2 > find_gpu("t4").usable  # in 16 bits it would not fit


@laws
@given(MODEL, ENGINE, st.integers(64, 8000), st.integers(1, 8000))
def test_a_longer_context_never_has_more_requests(model: str, profile: str, sequence: int, more: int) -> None:
    short, long = (
        most_requests(run_of(model, profile, "a100", batch={"sequence": n})).value for n in (sequence, sequence + more)
    )
    assert long <= short


@ALL
@laws
@given(MODEL, ENGINE, st.sampled_from(["3060", "4090", "h100"]), st.integers(64, 16_000))
@example("gemma-3-1b", "llama.cpp-2026", "3060", 64)  # whose Q2_K is larger than its Q3_K_S
def test_a_milder_format_is_never_smaller_and_never_holds_more(
    model: str, profile: str, gpu: str, sequence: int
) -> None:
    found = [c for c in questions(run_of(model, profile, gpu, batch={"sequence": sequence})).formats if c.answer]
    assert [c.weights for c in found] == sorted((c.weights for c in found), reverse=True)
    assert [c.requests for c in found] == sorted(c.requests for c in found)
    assert [c.fits for c in found] == sorted(c.fits for c in found)


@laws
@given(MODEL, st.sampled_from(["vllm-0.33", "sglang-0.5"]), st.sampled_from(["3060", "4090", "h100"]))
def test_more_gpus_have_no_more_weights_each_and_hold_no_fewer_requests(model: str, profile: str, gpu: str) -> None:
    found = [c for c in questions(run_of(model, profile, gpu)).degrees if c.answer]
    assert [c.weights for c in found] == sorted((c.weights for c in found), reverse=True)
    for fewer, more in pairwise(found):
        assert more.requests >= fewer.requests or not fewer.fits


def test_full_batches_make_more_tokens_and_each_request_fewer() -> None:
    one, full = ASKED.decoding, ASKED.full
    assert one is not None
    assert full is not None
    assert full.requests == ASKED.requests.value > one.requests
    assert full.tokens_per_second > one.tokens_per_second
    assert full.per_request < one.per_request


def test_the_commands_json_equals_the_librarys(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "llama-3.1-8b", "--method", "generate", "--profile", "vllm-0.33", "--gpu", "4090"]
    with pytest.raises(SystemExit) as left:
        COMMAND.main([*words, "--seq-len", "8000", "--new-tokens", "192", "--json"])
    assert left.value.code == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["mode"], told["fits"], told["verdict"]["answer"]) == ("generate", False, "does not start")
    assert told["requests"] == ASKED.requests._asdict()
    assert told["context"] == ASKED.context._asdict()
    assert [c["requests"] for c in told["formats"]] == [c.requests for c in ASKED.formats]
    assert ASKED.decoding is not None
    assert told["decoding"]["tokens_per_second"]["low"] == pytest.approx(ASKED.decoding.tokens_per_second.low)
    assert find_gpu(told["gpu"]["name"]).name == "rtx-4090"
