"""Estimates of trainers' profiles against traced steps of the trainers themselves: tests/golden/trace_trainers.py."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import compared_with_trace, rows, trace_figures
from memplan import RunSpec, estimate
from tests.cases import in_groups
from tests.sampling import sampled

ROWS: list[dict[str, Any]] = rows("traced_trainers.jsonl")
PROFILES = ("trl-1.15", "trl-1.13", "trl-1.6", "llamafactory-0.9.5", "axolotl-0.21", "ms-swift-4.6", "automodel-0.7")


@in_groups(sampled(ROWS), lambda row: row["name"])
def test_a_trainers_step_is_near_its_trace(row: dict[str, Any]) -> None:
    answer = trace_figures(row["run"])
    assert (answer.parameters.total, answer.parameters.trainable) == (row["parameters"], row["trainable"])
    compared = compared_with_trace(row)
    assert compared.peak < 5e-4, compared
    assert compared.phase < 5e-3 + _tables(row) / min(row["steps"]["2"].values()), compared
    assert compared.same


def _tables(row: dict[str, Any]) -> int:
    """Return the bytes of cos and sin, which NeMo Automodel keeps during the optimizer's step, and memplan does not."""
    config, run = row["run"]["model"]["config"], row["run"]
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return 2 * 4 * head * run["batch"].get("sequence", 2048) if run["profile"].startswith("automodel") else 0


def test_every_profile_is_held_to_twenty_traces() -> None:
    counts = Counter(row["run"]["profile"] for row in ROWS)
    assert set(counts) == set(PROFILES)
    assert min(counts.values()) >= 20
    for profile in PROFILES:
        assert mean(compared_with_trace(row).peak for row in ROWS if row["run"]["profile"] == profile) < 5e-4


UNSLOTH: list[dict[str, Any]] = rows("traced_unsloth.jsonl")
_BUFFERS = 4 << 20  # for offloaded inputs, which are not counted


@in_groups(sampled(UNSLOTH), lambda row: row["name"])
def test_unsloths_step_is_near_its_trace(row: dict[str, Any]) -> None:
    """Up to the buffers through which it offloads: 4 MiB for any model."""
    answer = trace_figures(row["run"])
    assert (answer.parameters.total, answer.parameters.trainable) == (row["parameters"], row["trainable"])
    compared = compared_with_trace(row)
    missed = compared.peak * row["peak"] >= _BUFFERS + 1e-3 * row["peak"]
    assert missed == bool(compared.cause), compared
    assert compared.same


def test_unsloths_traces_are_met_on_average() -> None:
    assert len(UNSLOTH) >= 20
    assert mean(compared_with_trace(row).peak for row in UNSLOTH) < 5e-3


V, H, N = 128256, 1024, 2 * 1023  # words, width, and labelled rows of 2 sequences of 1,024 tokens


def head_bytes(profile: str, method: str, dtype: str) -> int:
    """Return the estimate of the traced run of a Llama with 4 layers."""
    name = f"{profile} llama {method} {dtype} 2x1024"
    run = next(row["run"] for row in ROWS if row["name"] == name)
    return estimate(RunSpec(**run)).bytes.allocated


def test_casting_the_head_for_each_chunk_costs_its_copies() -> None:
    """Over bf16 weights, chunks of TRL 1.13 hold three gradients of the head; 1.6 adds casts instead of the third."""
    assert head_bytes("trl-1.13", "full", "bf16") < head_bytes("trl-1.6", "full", "bf16")
    frozen = head_bytes("trl-1.6", "lora", "bf16") - head_bytes("trl-1.13", "lora", "bf16")
    chunk = 256 * V
    assert frozen == pytest.approx((4 + 2) * V * H + 2 * chunk - 16 * chunk, rel=0.01)
