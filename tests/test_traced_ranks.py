"""Estimates of one rank against its traced steps: torch's DDP and FSDP on fake CUDA tensors, every allocation recorded.

The rows are in tests/golden/traced_ranks.jsonl, which tests/golden/trace_ranks.py made.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import rows, without_workspaces
from memplan import RunSpec, estimate
from tests.sampling import ALL, sampled

CASES: list[dict[str, Any]] = sampled(rows("traced_ranks.jsonl"), 8)


def label(case: dict[str, Any]) -> str:
    return f"{case['name']}-w{case['run']['parallelism']['world']}"


def error(case: dict[str, Any]) -> float:
    """Of the peak, as a share of the traced one."""
    return max(without_workspaces(estimate(RunSpec(**case["run"]))).values()) / case["peak"] - 1


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_rank_holds_what_the_trace_shows(case: dict[str, Any]) -> None:
    answer = estimate(RunSpec(**case["run"]))
    assert answer.parameters.total == case["parameters"]
    assert answer.parameters.trainable == case["trainable"]
    assert abs(error(case)) < 0.03
    mine = without_workspaces(answer)
    ahead = case["run"]["parallelism"].get("forward_prefetch")  # from the second step on: the first shows the order
    for step, peaks in case["steps"].items():
        if ahead and step == "1":
            continue
        assert mine[int(step), "bwd"] == pytest.approx(peaks["bwd"], rel=0.04)
        assert mine[int(step), "opt"] == pytest.approx(max(peaks["opt"], peaks["clip"]), rel=0.05)
        if case["run"]["parallelism"]["strategy"] != "fsdp":  # which lets go of gradients when the next pass begins
            assert mine[int(step), "fwd"] == pytest.approx(peaks["fwd"], rel=0.04)


@ALL
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_the_mean_error_of_a_strategy_is_below_a_hundredth(strategy: str) -> None:
    errors = [abs(error(case)) for case in CASES if case["run"]["parallelism"]["strategy"] == strategy]
    assert len(errors) > 60
    assert mean(errors) < 0.01
