"""Estimates of one rank against traced steps: torch's DDP and FSDP on fake CUDA tensors, every allocation recorded.

The rows are in tests/golden/traced_ranks.jsonl, which tests/golden/trace_ranks.py and trace_deepspeed.py made.
"""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import without_workspaces
from benchmarks.golden import rows, trace_figures
from memplan import RunSpec, estimate
from memplan.probe.run.trace import Tracer
from tests.cases import in_groups
from tests.sampling import ALL, sampled

CASES: list[dict[str, Any]] = sampled(rows("traced_ranks.jsonl"), 8)


def label(case: dict[str, Any]) -> str:
    return f"{case['name']}-w{case['run']['parallelism'].get('world', 1)}"


def error(case: dict[str, Any]) -> float:
    """Return the peak's error relative to the traced peak."""
    return max(without_workspaces(trace_figures(case["run"])).values()) / case["peak"] - 1


@in_groups(CASES, label)
def test_a_ranks_estimate_equals_its_trace(case: dict[str, Any]) -> None:
    answer = trace_figures(case["run"])
    assert answer.parameters.total == case["parameters"]
    assert answer.parameters.trainable == case["trainable"]
    assert abs(error(case)) < 0.03
    mine = without_workspaces(answer)
    ahead = case["run"]["parallelism"].get("forward_prefetch")  # from the second step on: the first records the order
    for step, peaks in case["steps"].items():
        if ahead and step == "1":
            continue
        assert mine[int(step), "bwd"] == pytest.approx(peaks["bwd"], rel=0.04)
        assert mine[int(step), "opt"] == pytest.approx(max(peaks["opt"], peaks["clip"]), rel=0.05, abs=2048)
        if case["run"]["parallelism"]["strategy"] != "fsdp":  # FSDP1 frees gradients when the next pass begins
            assert mine[int(step), "fwd"] == pytest.approx(peaks["fwd"], rel=0.04)


TOWERS = [case for case in rows("traced_ranks.jsonl") if case["name"].startswith("tower-")]


@in_groups(sampled(TOWERS, 4), label)
def test_a_tower_that_fsdp1_flattens_with_other_weights_is_traced(case: dict[str, Any]) -> None:
    assert abs(error(case)) < 1e-3


EXACT = [
    case for case in rows("traced_ranks.jsonl") if case["name"].startswith(("unequal-", "zero0-", "root-", "casts-"))
]


@in_groups(sampled(EXACT, 8), label)
def test_units_of_unequal_layers_are_traced_to_a_hundredth_of_a_percent(case: dict[str, Any]) -> None:
    """Every phase, not only the peak: FSDP2's towers, windows, shared tables and roots, and DeepSpeed without ZeRO."""
    mine = without_workspaces(trace_figures(case["run"]))
    for step, peaks in case["steps"].items():
        wanted = {"fwd": peaks["fwd"], "bwd": peaks["bwd"], "opt": max(peaks["opt"], peaks["clip"])}
        found = {phase: mine[int(step), phase] for phase in wanted}
        assert found == pytest.approx(wanted, rel=1e-4)


def test_parts_that_are_cast_last_are_there_twice_until_their_units_are() -> None:
    """Loading ends with all parts in fp32, and those of the root, embeddings and head, in bf16, too: as traced."""
    case = next(case for case in rows("traced_ranks.jsonl") if case["name"] == "casts-lora")
    ranks, config = case["run"]["parallelism"]["world"], case["run"]["model"]["config"]
    ends = 2 * config["vocab_size"] * config["hidden_size"] + config["hidden_size"]
    (load,) = (phase.peak for phase in estimate(RunSpec(**case["run"])).phases if phase.phase == "load")
    assert load == pytest.approx((4 * case["parameters"] + 2 * ends) / ranks, rel=2e-3)


@ALL
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp2"])
def test_the_mean_error_of_a_strategy_is_below_a_hundredth(strategy: str) -> None:
    errors = [abs(error(case)) for case in CASES if case["run"]["parallelism"]["strategy"] == strategy]
    assert len(errors) > 60
    assert mean(errors) < 0.01


@pytest.mark.torch
def test_a_new_trace_equals_the_golden_one() -> None:
    """Full training of the small Llama on two GPUs with every strategy, then on one GPU in the same process.

    It is not the one of other tests: torch copies tensors otherwise in a process that has had a process group.
    """
    wanted = ("full-fsdp2-w2", "full-fsdp-w2", "full-ddp-w2")
    found = [case for case in rows("traced_ranks.jsonl") if label(case) in wanted]
    alone = RunSpec(**{key: found[0]["run"][key] for key in ("model", "batch", "gpu")})
    assert len(found) == 3
    with Tracer() as tracer:
        for case in found:
            traced = tracer.trace(RunSpec(**case["run"]))
            assert max(p.peak for p in traced.phases if p.step) == case["peak"]
        assert tracer.trace(alone).peak == max(without_workspaces(estimate(alone)).values())
