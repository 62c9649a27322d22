"""Cards that a run is resolved alike for share what is resolved; the answer still names each card."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import MemplanError, RunSpec, estimate
from memplan.planning.offers import CardFilter, wanted_cards
from memplan.planning.reach import cards_that_hold
from memplan.resolve.decide import decide
from tests.cases import each


def test_cards_with_equal_facts_share_a_structure():
    one, other = (decide(RunSpec(model="smollm2-135m", gpu=gpu)) for gpu in ("a100-sxm-40gb", "a100-sxm-80gb"))
    assert one.structure is other.structure
    assert one.gpu is not None
    assert other.gpu is not None
    assert (one.gpu.name, other.gpu.name) == ("a100-sxm-40gb", "a100-sxm-80gb")


def test_notes_are_of_the_name_that_was_typed():
    exact, typed = (decide(RunSpec(model="smollm2-135m", gpu=gpu)) for gpu in ("a100-sxm-80gb", "a100"))
    assert exact.gpu == typed.gpu
    assert [note for note in typed.notes if "could also be" in note] == [
        note for note in typed.notes if note not in exact.notes
    ]
    assert len(typed.notes) == len(exact.notes) + 1


def test_deepspeed_reads_how_much_a_gpu_holds():
    parallelism = {"dp": 2, "world": 2, "strategy": "zero2"}
    runs = (
        RunSpec(model="qwen2.5-14b", gpu=gpu, parallelism=parallelism) for gpu in ("a100-sxm-40gb", "a100-sxm-80gb")
    )
    flattens = [decide(run).structure.ranks.knobs.flattens for run in runs]
    assert flattens == [False, True]  # 14.8 billion parameters in 16 bits, and a second copy of them


# What a Mac does not run, as a run, and the field that asks for it.
NOT_ON_A_MAC: list[tuple[dict[str, Any], str]] = [
    *(({"task": "generate", "profile": name}, "profile") for name in ("vllm-0.33", "sglang", "tgi")),
    ({"method": "qlora", "profile": "unsloth"}, "profile"),
    *(
        ({"optimizer": name}, "optimizer.name")
        for name in ("paged_adamw_32bit", "paged_adamw_8bit", "adamw_bnb_8bit", "galore_adamw_8bit_layerwise")
    ),
    ({"kernels": {"attention": "flash_attention_2"}}, "kernels.attention"),
    ({"parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}}, "parallelism.world"),
]


@each(NOT_ON_A_MAC)
def test_what_a_mac_does_not_run_is_refused_there_and_offered_nowhere(case: tuple[dict[str, Any], str]) -> None:
    fields, field = case
    run = RunSpec(model="smollm2-135m", **fields)
    with pytest.raises(MemplanError, match="Apple's GPUs") as caught:
        estimate(run.model_copy(update={"gpu": "m3-max"}))
    assert caught.value.field == field
    assert estimate(run.model_copy(update={"gpu": "h100"})).verdict.answer
    vendors = {holding.gpu.vendor for holding in cards_that_hold(run)}
    assert "NVIDIA" in vendors
    assert "Apple" not in vendors
    bought = {gpu.vendor for gpu, _ in wanted_cards(CardFilter(), run)}
    assert ("Apple" in bought) == (field == "parallelism.world")  # buying chooses the number of cards itself


def test_a_mac_is_offered_alone() -> None:
    run = RunSpec(model="smollm2-135m", optimizer="adamw_torch_8bit")
    assert {counts for gpu, counts in wanted_cards(CardFilter(), run) if gpu.vendor == "Apple"} == {(1,)}
    assert "Apple" in {holding.gpu.vendor for holding in cards_that_hold(run)}
