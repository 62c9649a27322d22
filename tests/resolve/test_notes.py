"""Notes on runs that a library does not start as it is configured by default."""

from __future__ import annotations

import pytest

from memplan import RunSpec, estimate
from memplan.models.cards import card_names, load_card
from memplan.resolve.notes import ABSENT_BLOCKS


def test_a_model_that_accelerate_does_not_wrap_by_itself_is_noted() -> None:
    for model, noted in (
        ("llava-1.5-7b", True),
        ("gemma-3-4b", True),
        ("qwen3.5-0.8b-text", True),
        ("llama-3.2-1b", False),
    ):
        for strategy in ("fsdp", "fsdp2", "ddp"):
            run = RunSpec(model=model, method="lora", parallelism={"strategy": strategy, "world": 2})  # type: ignore[arg-type]
            notes = [note for note in estimate(run).notes if "fsdp_transformer_layer_cls_to_wrap names" in note]
            assert bool(notes) == (noted and strategy != "ddp"), (model, strategy)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_absent_blocks_are_those_that_transformers_lists_in_vain() -> None:
    wrapping = pytest.importorskip("accelerate.utils.dataclasses")
    from memplan.probe.script.model import empty_model

    smallest: dict[str, str] = {}
    for name in sorted(card_names(), key=lambda name: int(load_card(name).card["parameters"]), reverse=True):
        smallest[load_card(name).model_type] = name
    for family in {*ABSENT_BLOCKS, "qwen2_5_vl", "llama", "internvl"} & smallest.keys():
        model = empty_model(RunSpec(model=smallest[family]))
        absent = {n for n in model._no_split_modules if wrapping.get_module_class_from_name(model, n) is None}
        assert bool(absent) == (family in ABSENT_BLOCKS), family
        if absent:
            named, blocks = ABSENT_BLOCKS[family]
            assert named in absent
            assert model._no_split_modules & {*blocks.replace(" and", ",").split(", ")}
