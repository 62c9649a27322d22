"""Plans, checked against exhaustive search: proposals fit, and nothing cheaper is missed."""

from __future__ import annotations

from itertools import combinations, product
from math import log2
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memplan
from memplan import RunSpec, estimate
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.profiles.costs import cost_of
from memplan.core.errors import MemplanError, SpecError, UnknownNameError
from memplan.core.units import GIB
from memplan.estimate.answer import phase_peaks
from memplan.estimate.demand import MAY_FIT, Demand
from memplan.models.cards import card_names, load_card
from memplan.planning.advice import advise
from memplan.planning.ladder import RUNGS, ladder
from memplan.planning.levers import Lever, levers_of, pull
from memplan.planning.offers import COUNTS, CardFilter, Offer, offers, parse_owned_cards
from memplan.planning.plan import Proposal, plan, time_of
from memplan.planning.reach import AXES, _largest, frontier, largest_batch, largest_sequence, reach
from memplan.planning.search import Trials, _by_cost, answer_with_one_lever, strongest
from memplan.planning.step_time import cost, step_pace, work
from memplan.spec.run import changed
from memplan.spec.training import Evaluation
from tests.sampling import ALL, examples

few = settings(max_examples=examples(4), deadline=None, suppress_health_check=[HealthCheck.too_slow])

RUNS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["qwen2-0.5b", "llama-3.2-1b"]),
        "method": st.sampled_from(["full", "lora", "qlora"]),
        "gpu": st.sampled_from(["t4", "rtx-3060-12gb", "gtx-1070-ti"]),
        "batch": st.fixed_dictionaries(
            {"micro": st.sampled_from([1, 4, 8]), "sequence": st.sampled_from([1024, 4096])}
        ),
        "precision": st.sampled_from(["fp16", "fp32"]),
    }
)
REFUSED = RunSpec(model="qwen2-7b", method="full", gpu="3090")


def fits(run: RunSpec) -> bool:
    return estimate(run).verdict.answer == "fits"


def alone(run: RunSpec, levers: tuple[Lever, ...]) -> bool | None:
    """Return whether the run fits with the levers; None if it cannot have them."""
    try:
        return fits(pull(run, levers))
    except MemplanError:
        return None


def place(proposal: Proposal) -> tuple[int, float]:
    """Return the tier of a proposal's strongest lever, and how many times longer a step takes, to a tenth."""
    assert proposal.time is not None
    return max(lever.tier for lever in proposal.levers), round(proposal.time.high, 1)


# --- levers ---


def test_of_two_ways_that_keep_the_result_the_quicker_comes_first() -> None:
    run = RunSpec(model="qwen3-32b", method="lora", gpu="h100", batch={"sequence": 8192})
    kept = [way for way in plan(run).proposals if way.severity == 0]
    assert [("optimizer and weights on the host" in way.levers[0].title, len(way.levers)) for way in kept] == [
        (False, 2),
        (False, 2),
        (True, 1),
    ]
    assert [place(way) for way in kept] == sorted(place(way) for way in kept)


@settings(few, max_examples=examples(8))
@given(RUNS)
def test_every_proposal_fits_needs_its_levers_and_no_cheaper_one_is_missing(fields: dict[str, Any]) -> None:
    run = RunSpec(**fields)
    found = plan(run)
    if fits(run):
        assert found.fits
        assert found.proposals == ()
        return
    assert all(fits(proposal.run) for proposal in found.proposals)
    assert [place(way) for way in found.proposals] == sorted(place(way) for way in found.proposals)
    proposed = [proposal.levers for proposal in found.proposals]
    every = levers_of(estimate(run).run)
    for lever in every:  # an exhaustive search over single levers
        if alone(run, (lever,)):
            milder = [other for other in every[: every.index(lever) + 1] if other.group == lever.group]
            assert any(
                levers[0].group == lever.group and (levers[0] in milder or lever.group == "sequence")
                for levers in proposed
                if len(levers) == 1
            ), lever
    for levers in proposed:
        for lever in levers:
            rest = tuple(other for other in levers if other is not lever)
            assert not alone(run, rest), [other.title for other in levers]
    free = [lever for lever in every if lever.tier == 0]
    pairs = (pair for pair in combinations(free, 2) if pair[0].group != pair[1].group)
    if any(alone(run, pair) for pair in pairs):  # two that preserve results are proposed if they suffice
        assert found.proposals[0].severity == 0


@ALL
def test_no_proposal_contains_a_smaller_set_that_already_fits() -> None:
    batch, kernels = {"micro": 16, "sequence": 1024}, {"checkpointing": "none"}
    run = RunSpec(model="qwen2-0.5b", method="lora", gpu="t4", batch=batch, kernels=kernels)
    for proposal in plan(run, most=1).proposals:
        for lever in proposal.levers:
            rest = tuple(other for other in proposal.levers if other is not lever)
            assert not alone(run, rest), [other.title for other in proposal.levers]


SMALL_SPACE = ("optimizer", "in backward", "loss", "rank", "targets")
SPACES = [
    (model, method, share)
    for model in ("qwen2-0.5b", "granite-3.1-1b-a400m")  # the second one is a mixture of experts
    for method in ("full", "lora", "qlora")
    for share in (30, 45, 60)
]


def test_no_set_is_searched_for_in_a_tier_whose_levers_are_refused() -> None:
    searched: list[object] = []
    levers: Any = [SimpleNamespace(tier=i // 8, group=str(i)) for i in range(9)]  # the last is of tier 1
    trials: Any = SimpleNamespace(
        answer=lambda pulled: None if pulled[0].tier else 0,
        fits=lambda _: False,
        known=searched.append,
    )
    assert next(_by_cost(trials, levers, 1), None) is None
    assert not searched
    assert next(_by_cost(trials, levers, 0)) == (levers[0], levers[1])


def test_a_set_is_pulled_and_kept_in_its_levers_order() -> None:
    run = RunSpec(model="tinyllama-1.1b", gpu="rtx-4090")
    trials, tried = Trials(run, Demand(), None), strongest(Trials(run, Demand(), None), levers_of(run))[::-1]
    assert len(tried) > 4
    assert trials.answer(tried) == estimate(pull(run, tried))
    assert trials.fitting() == [tried]


def exhaustive(run: RunSpec, demand: Demand) -> list[int]:
    """Return the price of every set of levers of a small space that meets the demand: the tier of its strongest."""
    levers = [lever for lever in levers_of(estimate(run).run) if lever.group in SMALL_SPACE]
    groups = [[None, *(lever for lever in levers if lever.group == group)] for group in SMALL_SPACE]
    sets = [tuple(lever for lever in choice if lever is not None) for choice in product(*groups)]
    trials = Trials(run, demand, None)
    return [max((lever.tier for lever in pulled), default=-1) for pulled in sets if trials.fits(pulled)]


@ALL
@pytest.mark.parametrize(("model", "method", "share"), SPACES)
def test_plans_and_advice_find_what_an_exhaustive_search_finds(model: str, method: str, share: int) -> None:
    run = RunSpec(model=model, method=method, gpu="rtx-3060-12gb")
    used = estimate(run).bytes.used
    demand = Demand(headroom=find_gpu("rtx-3060-12gb").usable - used * share // 100)
    prices = exhaustive(run, demand)
    others = {lever.group for lever in levers_of(estimate(run).run)} - {*SMALL_SPACE}
    found = plan(run, headroom=demand.headroom, without=[*others])
    assert bool(found.proposals) >= bool(prices)
    if prices:
        assert min(prices) == max(lever.tier for lever in found.proposals[0].levers)
        step = next(
            step for step in advise(run, demand).steps if step.title.lower() in (method, f"{method} fine-tuning")
        )
        assert (step.title, step.answer) == (step.title, "yes")


@ALL
def test_qlora_of_a_mixture_of_experts_has_ways_to_fit() -> None:
    found = plan(RunSpec(model="qwen3-30b-a3b", method="qlora", gpu="a6000"))
    assert all(proposal.answer.fits for proposal in found.proposals)
    assert [lever.title for lever in found.proposals[0].levers] == ["quantised experts, without adapters"]


@ALL
def test_advice_names_changes_by_which_full_training_fits() -> None:
    step = advise(RunSpec(model="qwen2-7b", gpu="3090")).steps[0]
    assert step.answer == "yes"
    assert "the optimizer's step in backward" in step.options[0].title


@ALL
def test_lever_savings_sum_to_the_difference_of_two_estimates() -> None:
    found = plan(RunSpec(model="qwen2-7b", method="lora", gpu="3090", batch={"micro": 8}))
    assert found.best is not None
    for proposal in found.proposals:
        assert sum(effect.saves for effect in proposal.effects) == proposal.saves
        alone_ = estimate(proposal.run).bytes.allocated
        assert proposal.saves == estimate(found.answer.asked).bytes.allocated - alone_
        for effect in proposal.effects:
            peaks = [max(p.peak for p in answer.phases) for answer in (effect.before, effect.after)]
            assert effect.saves == peaks[0] - peaks[1]
            assert set(effect.phases) <= {"load", "forward", "loss", "backward", "step"}
    assert any(len(proposal.levers) > 1 for proposal in found.proposals)


@ALL
def test_of_a_way_the_change_that_saves_most_is_told_first() -> None:
    # Full training peaks in the step, where a chunked loss saves nothing: it does once LoRA has no such step.
    found = plan(RunSpec(model="qwen3-32b", gpu="h100", parallelism={"world": 8}))
    way = next(way for way in found.proposals if "a chunked loss" in {lever.title for lever in way.levers})
    assert [effect.lever.title for effect in way.effects] == ["LoRA", "a chunked loss"]
    assert all(effect.before.bytes.used > effect.after.bytes.used for effect in way.effects)


@ALL
def test_the_mildest_lever_is_proposed_and_sequences_stay_as_long_as_possible() -> None:
    run = RunSpec(model="qwen2-7b", method="lora", gpu="3090", batch={"micro": 8})
    found = plan(run)
    [micro] = [p for p in found.proposals if [lever.group for lever in p.levers] == ["batch"]]
    assert micro.run.batch.micro * micro.run.batch.accumulation == 8
    assert not fits(changed(run, "batch", micro=2 * micro.run.batch.micro, accumulation=4))
    [shorter] = [p for p in found.proposals if [lever.group for lever in p.levers] == ["sequence"]]
    tokens = shorter.run.batch.sequence
    assert tokens % 64 == 0
    assert fits(changed(run, "batch", sequence=tokens))
    assert not fits(changed(run, "batch", sequence=tokens + 64))


@ALL
def test_headroom_stays_free_and_tight_counts_on_request() -> None:
    run = RunSpec(model="qwen2-0.5b", method="lora", gpu="t4", batch={"sequence": 512})
    assert plan(run).fits
    left = plan(run, headroom=25 * GIB // 2)
    assert not left.fits
    assert left.proposals
    assert all((p.answer.verdict.headroom or 0) >= 25 * GIB // 2 for p in left.proposals)
    tight = RunSpec(model="qwen2-7b", method="lora", gpu="rtx-4000-ada")
    assert estimate(tight).verdict.answer == "tight"
    assert plan(tight, tight=True).fits
    assert not plan(tight).fits


@pytest.mark.parametrize("headroom", [-1, 80 * GIB])
def test_headroom_that_no_card_can_leave_is_refused(headroom: int) -> None:
    with pytest.raises(SpecError, match="headroom"):
        plan(REFUSED, headroom=headroom)


@ALL
def test_if_nothing_fits_the_nearest_is_named_with_the_missing_memory() -> None:
    found = memplan.plan(RunSpec(model="qwen2-72b", method="full", gpu="p4"))
    assert found.proposals == ()
    assert found.best is None
    assert found.nearest is not None
    assert found.nearest.answer.bytes.allocated < found.answer.bytes.allocated
    assert (found.nearest.answer.verdict.headroom or 0) < 0


def test_a_plan_needs_a_gpu() -> None:
    with pytest.raises(SpecError, match="gpu"):
        plan(RunSpec(model="qwen2-7b"))


def test_a_run_whose_tower_ddp_waits_for_is_planned_with_sharding() -> None:
    run = RunSpec(model="gemma-3-12b", gpu="h100-sxm", parallelism={"world": 4})
    found = plan(run)
    assert (found.asked, found.answer.asked.parallelism.find_unused_parameters) == (run, True)
    chosen = found.proposals[0].run.parallelism
    assert (chosen.strategy, chosen.find_unused_parameters) == ("fsdp2", None)


@pytest.mark.parametrize(
    ("parallelism", "strategies", "host"),
    [
        ({}, [], "zero3"),
        ({"world": 2}, ["zero2", "fsdp2", "zero3"], "zero3"),
        ({"world": 2, "strategy": "zero1"}, ["zero2", "zero3"], "zero3"),
        ({"world": 2, "strategy": "zero2", "offload": {"optimizer": True}}, ["zero3"], "zero3"),
        ({"world": 2, "strategy": "zero3"}, [], "zero3"),
        ({"world": 2, "strategy": "fsdp2"}, [], "fsdp2"),
        ({"world": 2, "strategy": "fsdp2", "offload": {"parameters": True}}, [], None),
        ({"world": 2, "tp": 2}, [], None),
    ],
)
def test_what_ranks_hold_whole_is_divided_or_moved_to_the_host(
    parallelism: dict[str, Any], strategies: list[str], host: str | None
) -> None:
    run = estimate(RunSpec(model="qwen3-8b", gpu="4090", parallelism=parallelism)).run
    levers = levers_of(run)
    divided = [pull(run, [lever]) for lever in levers if lever.group == "sharding" and "sharding" in lever.keys]
    moved = [pull(run, [lever]) for lever in levers if "offload_all" in lever.keys]
    assert [after.parallelism.strategy for after in divided] == strategies
    assert [after.parallelism.strategy for after in moved] == ([host] if host else [])
    assert all(
        (after.parallelism.offload.optimizer, after.parallelism.offload.parameters) == (True, True) for after in moved
    )
    assert all(after.parallelism.world == run.parallelism.world for after in (*divided, *moved))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_deepspeed_divides_a_run_under_autocast_with_fp32_masters(dtype: str) -> None:
    autocast = {"weights": dtype, "compute": dtype, "autocast": True}
    scales = {"grad_scaler": dtype == "fp16"}
    asked = RunSpec(model="qwen3-8b", gpu="4090", parallelism={"world": 2}, precision=autocast, loop=scales)
    run = estimate(asked).run
    divided = [estimate(pull(run, [lever])).run for lever in levers_of(run) if lever.group == "sharding"]
    assert [(after.parallelism.strategy, after.precision.autocast, after.precision.master) for after in divided] == [
        ("zero2", False, "fp32"),
        ("fsdp2", True, None),
        ("zero3", False, "fp32"),
        ("zero3", False, "fp32"),
    ]


def test_every_lever_has_its_costs_and_is_ordered_by_them() -> None:
    run = estimate(
        RunSpec(
            model="qwen2-7b",
            precision="amp",
            optimizer="adamw_torch",
            kernels={"attention": "eager", "checkpointing": "none", "reentrant": False},
            batch={"micro": 8},
        )
    ).run
    levers = levers_of(run)
    assert [lever.tier for lever in levers] == sorted(lever.tier for lever in levers)
    assert levers[-1].group == "gpus"  # hardware to buy comes last
    groups = {"optimizer", "loss", "attention", "checkpointing", "batch", "precision", "method", "sequence", "gpus"}
    assert groups <= {lever.group for lever in levers}
    for lever in levers:
        assert lever.severity == max(cost_of(key).severity for key in lever.keys)
        assert pull(run, (lever,)) != run


@ALL
def test_an_evaluation_that_does_not_fit_shrinks_before_training_does() -> None:
    evaluation = {"micro": 8, "kept_batches": 4}
    found = plan(RunSpec(model="qwen2-7b", method="qlora", gpu="3090", also={"evaluation": evaluation}))
    assert found.best is not None
    for proposal in found.proposals:
        if proposal.severity < 3:
            assert {lever.group for lever in proposal.levers} <= {"evaluation", "kept logits", "what is kept"}
            before, after = phase_peaks(proposal.before), phase_peaks(proposal.answer)
            assert after.pop("eval") < before.pop("eval")
            assert after == before
    # Levers on the same field change different parts of it.
    levers = levers_of(found.answer.run)
    together = [next(v for v in levers if v.group == g) for g in ("evaluation", "kept logits", "what is kept")]
    changed_ = pull(found.answer.run, together).also.evaluation
    assert changed_ == Evaluation(micro=4, kept_batches=4, accumulation=1, preprocess="argmax")
    assert not {"kept logits", "what is kept"} & {v.group for v in levers_of(pull(found.answer.run, together))}


def test_time_is_counted_and_rows_widen_it() -> None:
    before = estimate(RunSpec(model="qwen2-7b", method="lora", gpu="a100", kernels={"checkpointing": "none"}))
    [full] = [lever for lever in levers_of(before.run) if lever.keys == ("checkpointing",)]
    after = estimate(pull(before.asked, (full,)))
    time = time_of(before, after, (full,))
    assert time is not None
    assert time.basis == "derived"
    # Forward and input gradients are 2 + 2 per frozen parameter; the blocks' forward runs twice.
    assert 1.2 < time.low <= time.high < 1.5
    [paged] = [lever for lever in levers_of(before.run) if lever.keys == ("optimizer_paged",)]
    row = cost_of("optimizer_paged")
    with_row = time_of(before, estimate(pull(before.asked, (paged,))), (paged,))
    without = time_of(before, estimate(pull(before.asked, (paged,))), ())
    assert with_row is not None
    assert without is not None
    assert row.low is not None
    assert row.high is not None
    assert with_row[:2] == (without.low * row.low, without.high * row.high)
    assert with_row.basis == "assumed"


# --- how far ---


@few
@given(RUNS)
def test_the_largest_batch_equals_an_exhaustive_search(fields: dict[str, Any]) -> None:
    run = RunSpec(**fields)
    most = reach(run, "batch").value
    assert isinstance(most, int)
    held = [n for n in range(1, 41) if fits(changed(run, "batch", micro=n))]
    assert most > 40 or most == max(held, default=0)


@pytest.mark.parametrize(
    ("held", "bound", "samples", "multiple", "most"),
    [
        ({*range(1, 11)}, 20, 64, 1, 10),
        ({*range(1, 11), 13, 17}, 20, 64, 1, 17),  # above the first that does not fit
        ({*range(1, 11), 13, 17}, 10, 64, 1, 17),  # and above the first that its prompt rules out
        ({*range(1, 11), 30}, 20, 64, 1, 10),  # there the tensors alone do not fit
        ({*range(1, 11), 13, 14}, 20, 2, 1, 10),  # two probes: at 20 and 15
        ({*range(1, 11), 12, 13}, 20, 4, 4, 13),  # probes multiples of four: 12, and on from there
        ({*range(1, 11), 20}, 20, 0, 1, 20),  # the last that bounds allow is tried first
        (set[int](), 20, 64, 1, 0),
    ],
)
def test_batches_that_fit_above_the_first_that_does_not_are_found(
    held: set[int], bound: int, samples: int, multiple: int, most: int
) -> None:
    tried: Any = SimpleNamespace(holds=lambda n: n in held, may_hold=lambda n: n <= bound, has_room=lambda n: n <= 20)
    assert _largest(tried, samples, multiple) == most


@ALL
def test_reach_names_the_limiting_resource() -> None:
    run = RunSpec(model="qwen2-0.5b", method="lora", gpu="t4")
    for axis, value in (("batch", largest_batch(run)), ("sequence", largest_sequence(run))):
        found = reach(run, axis)
        assert found.value == value
        assert found.binds == "memory"
        assert found.answer is not None
        assert found.answer.fits
        assert found.beyond is not None
        assert not found.beyond.fits
    assert reach(RunSpec(model="gpt2", method="lora", gpu="h100", batch={"sequence": 1024}), "sequence")[1:2] == (1024,)
    assert reach(RunSpec(model="gpt2", gpu="h100", batch={"sequence": 64}), "sequence").binds == "positions"
    rank = reach(run, "rank")
    assert rank.binds == "rank"
    assert rank.value == 128  # k_proj and v_proj of Qwen2-0.5B are 128 x 896


@ALL
def test_the_largest_model_is_the_largest_of_those_that_fit() -> None:
    run = RunSpec(model="qwen2-0.5b", method="lora", gpu="gtx-1070-ti")
    found = reach(run, "model")
    size = {name: int(load_card(name).card["parameters"]) for name in card_names()}
    assert fits(run.model_copy(update={"model": found.value}))
    for name in card_names():
        if size[name] > size[str(found.value)] and size[name] < 6e9:  # the weights of larger ones exceed 8 GiB
            try:
                assert not fits(run.model_copy(update={"model": name})), name
            except MemplanError:
                continue


@ALL
def test_ranks_that_divide_the_weights_hold_a_larger_model() -> None:
    alone_ = RunSpec(model="qwen2-0.5b", gpu="gtx-1070-ti")
    together = changed(alone_, "parallelism", world=64, dp=64, strategy="fsdp2")
    held = [reach(run, "model", MAY_FIT).value for run in (alone_, together)]
    size = [int(load_card(str(name)).card["parameters"]) for name in held]
    assert size[0] * 2 <= find_gpu("gtx-1070-ti").usable < size[1] * 2  # two bytes each


def test_reach_refuses_invalid_questions() -> None:
    assert AXES == ("batch", "sequence", "rank", "completion", "generations", "model")
    with pytest.raises(UnknownNameError, match="max"):
        reach(REFUSED, "layers")
    with pytest.raises(SpecError, match="rank"):
        reach(REFUSED, "rank")
    with pytest.raises(SpecError, match="gpu"):
        reach(RunSpec(model="qwen2-7b"), "batch")
    with pytest.raises(SpecError, match="gpu"):
        reach(RunSpec(model="qwen2-7b"), "model")
    assert reach(RunSpec(model="qwen2-72b", gpu="t4"), "batch")[1:3] == (0, None)


@ALL
def test_the_frontier_is_the_longest_sequence_of_every_batch() -> None:
    run = RunSpec(model="qwen2-0.5b", method="lora", gpu="t4")
    found = frontier(run)
    assert [batch for batch, _ in found.longest] == [1 << i for i in range(len(found.longest))]
    tokens = [tokens for _, tokens in found.longest]
    assert tokens == sorted(tokens, reverse=True)
    batch, longest = found.longest[1]
    assert longest == largest_sequence(changed(run, "batch", micro=batch))
    for (_, longest), answers in zip(found.longest, found.around, strict=True):
        for sequence, answer in zip(found.sequences, answers, strict=True):
            assert answer is not None
            assert (answer.verdict.answer == "fits") == (sequence <= longest)


# --- the ladder ---


def test_the_ladder_starts_plain_and_estimates_every_rung() -> None:
    found = ladder(RunSpec(model="qwen2-0.5b", method="qlora", gpu="t4", batch={"micro": 4}))
    plain = found.plain.run
    assert (plain.method.kind, plain.precision.autocast, plain.kernels.checkpointing) == ("full", True, "none")
    assert [rung.lever.keys[0] for rung in found.rungs] == list(RUNGS)
    assert found.rungs[0].before == found.plain
    for below, above in zip(found.rungs, found.rungs[1:], strict=False):
        assert below.after == above.before
    total = found.plain.bytes.allocated - found.rungs[-1].after.bytes.allocated
    assert sum(rung.saves for rung in found.rungs) == total
    assert found.rungs[-1].after.run.method.kind == "qlora"


# --- what to buy ---


def test_offers_fit_and_come_cheapest_first() -> None:
    run = RunSpec(model="llama-3.2-1b", method="lora", gpu="t4")
    found = offers(run, most=12, tokens=10**8)
    assert len(found.offers) == 12
    assert found.nearest is None
    prices = [offer.usd for offer in found.offers if offer.usd is not None]
    assert prices == sorted(prices)
    for offer in found.offers:
        assert offer.answer.run.gpu == offer.gpu.name
        assert fits(offer.answer.asked)
        one = step_pace(work(offer.answer.asked), offer.gpu)
        assert one is not None
        if offer.count == 1 and offer.price is not None:
            assert offer.million == cost(one, offer.price)
            assert offer.whole == cost(one, offer.price, 10**8)


def test_every_card_that_holds_the_run_is_offered() -> None:
    run = RunSpec(model="llama-3.2-1b", method="lora")
    found = {offer.gpu.name for offer in offers(run, CardFilter(counts=(1,)), most=1000).offers}
    for gpu in all_gpus()[::9]:
        assert (gpu.name in found) == fits(run.model_copy(update={"gpu": gpu.name})), gpu.name


def test_cards_to_own_have_a_list_price_and_fit_in_one_machine() -> None:
    found = offers(RunSpec(model="qwen2-7b"), CardFilter(to="own")).offers
    assert found
    totals = [(offer.gpu.launch_usd or 0) * offer.count for offer in found]
    assert all(
        total > 0 and offer.gpu.slots and offer.gpu.launch_date for total, offer in zip(totals, found, strict=True)
    )
    assert all(offer.count <= 4 for offer in found)
    steps = [(round(4 * log2(total)), offer.count) for total, offer in zip(totals, found, strict=True)]
    assert steps == sorted(steps)  # of about the same price, fewest cards first
    assert (found[0].gpu.name, found[0].count) == ("rtx-pro-6000-max-q", 1)  # four 5090s are 7 % less


def test_offers_leave_memory_free_and_fit_in_one_machine_if_they_can() -> None:
    for to in ("own", "rent"):
        for offer in offers(RunSpec(model="qwen2-7b"), CardFilter(to=to)).offers:
            assert (offer.answer.verdict.headroom or 0) >= GIB // 20
            assert offer.count <= 8
    large = offers(RunSpec(model="deepseek-v3"), most=1).offers
    assert [offer.count > 8 for offer in large] == [True]


@pytest.mark.parametrize(
    ("wanted", "holds"),
    [
        (CardFilter(vendors=("AMD",)), lambda offer: offer.gpu.vendor == "AMD"),
        (CardFilter(markets=("consumer",)), lambda offer: offer.gpu.market == "consumer"),
        (CardFilter(memory=(20 * GIB, 30 * GIB)), lambda offer: 20 * GIB <= offer.gpu.usable <= 30 * GIB),
        (CardFilter(usd_per_hour=0.3), lambda offer: offer.price is not None and offer.price.low <= 0.3),
        (CardFilter(counts=(2,)), lambda offer: offer.count == 2),
    ],
)
def test_only_cards_that_meet_the_request_are_offered(wanted: CardFilter, holds: Any) -> None:
    found = offers(RunSpec(model="llama-3.2-1b", method="lora"), wanted, most=4).offers
    assert found
    assert all(map(holds, found))


def test_owned_cards_are_a_limit() -> None:
    have = parse_owned_cards("2x3090, 1 x a100")
    assert [(card.gpu, card.count) for card in have] == [(find_gpu("3090"), 2), (find_gpu("a100"), 1)]
    found = offers(RunSpec(model="llama-3.1-8b", method="lora"), CardFilter(owned=have), each=True).offers
    assert {(offer.gpu.name, offer.count) for offer in found} <= {
        ("rtx-3090", 1),
        ("rtx-3090", 2),
        (find_gpu("a100").name, 1),
    }
    assert parse_owned_cards("t4")[0].count == 1


@pytest.mark.parametrize(("text", "field"), [("", "have"), ("0x3090", "have"), ("2x", "gpu"), ("2xrtx-9999", "gpu")])
def test_a_list_of_cards_that_cannot_be_read_is_named(text: str, field: str) -> None:
    with pytest.raises(MemplanError, match=field):
        parse_owned_cards(text)


def test_contradictory_requirements_are_named() -> None:
    with pytest.raises(SpecError, match="memory"):
        offers(REFUSED, CardFilter(memory=(2, 1)))
    with pytest.raises(SpecError, match="buy"):
        offers(REFUSED, CardFilter(vendors=("Intel",), markets=("laptop",), memory=(10**15, None)))


def test_if_no_card_fits_the_nearest_is_named_with_the_missing_memory() -> None:
    found = offers(RunSpec(model="qwen2-72b"), CardFilter(owned=parse_owned_cards("3090,t4")))
    assert found.offers == ()
    assert found.nearest is not None
    assert found.nearest.gpu == find_gpu("3090")
    on = estimate(RunSpec(model="qwen2-72b", gpu="3090"))
    assert found.nearest.short_by == on.least - on.gpu.usable if on.gpu else False


def test_several_cards_run_models_that_one_does_not() -> None:
    run = RunSpec(model="llama-3.2-1b", precision="amp")
    assert not fits(run.model_copy(update={"gpu": "rtx-3060-12gb"}))
    found = offers(run, CardFilter(owned=parse_owned_cards("8x3060")))
    several: list[Offer] = [offer for offer in found.offers if offer.count > 1]
    assert several
    assert all(offer.count in COUNTS and offer.strategy != "none" and offer.answer.fits for offer in several)
    assert all(offer.answer.run.parallelism.world == offer.count for offer in several)
    row = cost_of("more_gpus")
    for offer in several:  # each computes its part, and all wait for communication
        one = step_pace(work(run.model_copy(update={"gpu": offer.gpu.name})), offer.gpu)
        assert one is not None
        assert offer.million is not None
        assert row.low is not None
        share = 1_000_000 / (one.tokens * offer.count)
        assert offer.million.seconds.low == pytest.approx(one.seconds.low * row.low * share)


# --- advice ---


@ALL
def test_advice_takes_the_first_step_that_fits_and_hides_no_other() -> None:
    found = advise(RunSpec(model="qwen2-7b", gpu="a4000"))
    assert [step.answer for step in found.steps] == ["no", "no", "yes", "not needed"]
    assert found.best is not None
    assert found.best.run.method.kind == "qlora"
    for step in found.steps:
        for choice in step.options:
            assert choice.fits == fits(choice.run)
        assert [choice.fits for choice in step.options] == sorted((c.fits for c in step.options), reverse=True)
    largest = found.best.run.method.rank
    assert not fits(changed(found.best.run, "method", rank=2 * largest))


@ALL
def test_if_no_method_fits_the_smallest_other_change_is_searched() -> None:
    found = advise(RunSpec(model="qwen2-72b", gpu="t4"))
    assert [step.answer for step in found.steps[:3]] == ["no", "no", "no"]
    last = found.steps[3]
    assert last.answer == "yes"
    assert last.options[0].fits
    assert found.best == last.options[0]
    assert any(choice.run.gpu != "t4" for choice in last.options)  # a rented card
    assert any(choice.run.model != "qwen2-72b" for choice in last.options)


def test_a_pipeline_is_planned_though_levers_change_which_stage_is_the_worst() -> None:
    run = RunSpec(
        model="llama-3.2-1b",
        profile="torchtitan",
        gpu="a100-80gb",
        batch={"micro": 8, "sequence": 65536, "accumulation": 2},
        parallelism={"world": 2, "pp": 2},
    )
    found = plan(run)
    proposal = found.nearest or found.proposals[0]
    before, after = phase_peaks(found.answer), phase_peaks(proposal.answer)
    assert before.keys() != after.keys()  # the first stage has no loss
    for effect in proposal.effects:
        assert effect.phases.keys() <= phase_peaks(effect.before).keys()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_first_single_lever_is_the_same_without_the_bound(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunSpec(model="qwen2-7b", method=method, gpu="rtx-3060-12gb")
    tried: list[Any] = []
    monkeypatch.setattr(
        Trials, "fits", lambda trials, levers, fits=Trials.fits: (tried.append(levers), fits(trials, levers))[1]
    )
    found = answer_with_one_lever(run)
    estimated = len(tried)
    monkeypatch.setattr(Trials, "may_fit", lambda *_: True)
    assert found == answer_with_one_lever(run)
    assert estimated < len(tried) - estimated


def test_levers_that_change_nothing_are_searched_though_a_shorter_sequence_would_do() -> None:
    """Three of them fit only together, which no set of two and no forecast finds; 192 tokens alone would fit, too."""
    kernels: dict[str, Any] = {"checkpointing": "none"}
    batch = {"micro": 8, "sequence": 8192}
    found = plan(RunSpec(model="llama-3.2-1b", method="lora", batch=batch, kernels=kernels, gpu="rtx-3060"))
    first, *others = found.proposals
    assert {lever.group for lever in first.levers} == {"batch", "checkpointing", "loss"}
    assert not any(lever.tier for lever in first.levers)
    assert any(len(other.levers) == 1 and other.levers[0].group == "sequence" for other in others)
