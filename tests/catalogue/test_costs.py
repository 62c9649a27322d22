"""Costs of changes: every lever has a row, whose time and quality both name a source."""

from __future__ import annotations

import re

import pytest

from memplan.catalogue.profiles.costs import COSTS, LeverCost, cost_of
from memplan.core.errors import UnknownNameError

LEVERS = {
    *("checkpointing", "reentrant", "attention_flash", "fused_loss", "chunked_loss"),
    *("optimizer_fused", "optimizer_8bit", "optimizer_paged", "optimizer_adafactor", "optimizer_sgd", "in_backward"),
    *("micro_batch", "sequence", "rank", "targets", "precision_pure", "method_lora", "method_qlora", "double_quant"),
    *(
        "offload_activations",
        "offload_optimizer",
        "offload_all",
        "more_gpus",
        "sharding",
        "expandable_segments",
        "stack",
    ),
    *("quantize_experts", "sync_each_batch"),
    *("evaluation_batch", "evaluation_host", "evaluation_argmax"),
    *("reference_precomputed", "reference_adapters", "reference_none", "tiled_loss"),
    *("role_quantized", "role_server"),
    *("rollout_sleep", "rollout_length", "rollout_share", "rollout_server", "generations", "completions"),
}
every_row = pytest.mark.parametrize("row", COSTS, ids=[row.lever for row in COSTS])


def test_every_lever_has_one_row() -> None:
    assert {row.lever for row in COSTS} == LEVERS
    assert len(COSTS) == len(LEVERS)
    assert all(cost_of(lever).lever == lever for lever in LEVERS)


@every_row
def test_a_row_says_its_time_or_that_it_is_counted(row: LeverCost) -> None:
    assert row.basis in ("derived", "measured", "assumed")
    assert (row.low is None) == (row.high is None) == row.time_source.startswith("counted: ")
    assert (row.basis == "derived") == ("assumed" not in row.time_source)
    if row.low is not None and row.high is not None:
        assert 0.5 <= row.low <= row.high


@every_row
def test_a_row_names_the_sources_of_its_time_and_quality(row: LeverCost) -> None:
    assert row.quality
    assert re.search(r"arXiv:\d{4}\.\d{5}|documentation|blog", row.quality_source)
    assert "\n" not in "".join((row.quality, row.time_source, row.quality_source))
    assert not row.quality.endswith(".")


@every_row
def test_how_severe_a_change_is_agrees_with_its_sentence(row: LeverCost) -> None:
    assert row.severity in (0, 1, 2, 3)
    assert (row.severity == 0) == row.quality.startswith("none")
    assert (row.severity == 1) == row.quality.startswith("hardly any")


def test_an_unknown_lever_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean checkpointing"):
        cost_of("checkpoint")
