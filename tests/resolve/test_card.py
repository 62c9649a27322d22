"""Cards that a run is resolved alike for share what is resolved; the answer still names each card."""

from __future__ import annotations

from memplan import RunSpec
from memplan.resolve.decide import decide


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
