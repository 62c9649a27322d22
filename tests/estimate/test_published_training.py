"""Published training runs: each is met, or misses by at most its stated cause."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

import pytest

from benchmarks import golden
from benchmarks.golden import GOALS, NEAR, SLACK, Goal, Measured, phase_peak, published, rows, verdicts
from memplan import RunSpec, find_gpu
from memplan.catalogue.hardware.overhead import COMPILED
from memplan.estimate.answer import bytes_by_kind
from tests.cases import each
from tests.sampling import ALL

ROWS: dict[str, dict[str, Any]] = {row["id"]: row for row in rows("published.jsonl")}

# Unsupported fields for which published runs are refused, and the number of runs.
NOT_YET: dict[str, int] = {}


def answered() -> list[Measured]:
    return published()[0]


def identity(found: Measured) -> str:
    return found.id


@each(ROWS.values(), lambda row: row["id"])
def test_every_golden_run_states_its_source_and_kind(row: dict[str, Any]) -> None:
    assert row["source"].startswith("https://")
    assert row["date"][:2] == "20"
    assert row["metric"] in ("max_memory_allocated", "active_bytes.all.peak")
    assert {"family", "stack", "measured"} <= row.keys()
    run = RunSpec(**row["run"])
    assert RunSpec.model_validate_json(run.model_dump_json()) == run
    assert run.gpu is None or row["allocated"] < find_gpu(run.gpu).usable
    assert row["allocated"] <= row.get("reserved", row["allocated"]) <= row.get("process", 2**60)


def test_out_of_memory_runs_state_their_source_and_the_cards_memory() -> None:
    for row in rows("oom.jsonl"):
        assert row["source"].startswith("https://")
        assert RunSpec(**row["run"]).gpu is not None
        assert 0 < row["seen"] < 2**37


@ALL
def test_every_family_of_runs_on_several_gpus_reaches_its_goal() -> None:
    """The mean error of peaks above 4 GiB, or of torch's reserved memory if only that is known."""
    errors: dict[str, list[float]] = {}
    for m in golden.ranks():
        if m.large:
            errors.setdefault(m.family, []).append(abs(m.error))
    for r in golden.ranks_reserved():
        errors.setdefault(r.strategy, []).append(abs(r.error))
    assert errors.keys() == {"SimuMax", "fms-acceleration", "litgpt", "zero2", "zero3"}
    assert {family: mean(some) for family, some in errors.items() if mean(some) > golden.SEVERAL_GOAL} == {}


def test_no_measurement_is_counted_twice() -> None:
    files = (
        *("published.jsonl", "megatron.jsonl", "oom.jsonl"),
        *("ranks.jsonl", "ranks_oom.jsonl", "ranks_reserved.jsonl"),
    )
    ids = [row["id"] for name in files for row in rows(name)]
    ids += [id for group in golden.not_expressed() for id in group["ids"]]
    assert [id for id, times in Counter(ids).items() if times > 1] == []


def test_excluded_runs_have_a_source_and_a_reason() -> None:
    assert all(group["source"].startswith("https://") and group["reason"] for group in golden.not_expressed())


def test_refused_runs_are_those_with_unsupported_fields() -> None:
    """If this fails, a field has become supported, and its runs are tested from now on."""
    assert Counter(refused.field for refused in published()[1]) == NOT_YET


@each(lambda: (m for m in answered() if not m.cause), identity)
def test_a_published_peak_is_met_within_what_the_allocator_leaves_unsplit(met: Measured) -> None:
    assert abs(met.off) <= met.slack


def test_published_peaks_of_compiled_code_are_in_their_range() -> None:
    """At most what eager code takes; at least that without its temporaries and half of its kept activations."""
    assert len(golden.compiled()) == 3
    for m in golden.compiled():
        kinds = bytes_by_kind(m.answer.ledger)
        least = m.answer.bytes.allocated - kinds["temp"] + kinds["activation"] * COMPILED.low // 1000
        assert least <= m.allocated <= m.answer.bytes.allocated, m.id


@each(lambda: (m for m in answered() if m.after), identity)
def test_weights_and_states_equal_the_memory_after_a_step(m: Measured) -> None:
    assert abs(m.kept - (m.after or 0)) <= SLACK


@each(lambda: (m for m in answered() if m.cause), identity)
def test_a_published_peak_with_a_cause_misses_by_at_most_its_statement(missed: Measured) -> None:
    """If the first line fails, the run is met, and its cause can be removed."""
    assert abs(missed.off) > missed.slack
    assert abs(missed.error) <= ROWS[missed.id]["within"]


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: goal.title)
def test_the_mean_error_of_large_peaks_reaches_its_goal(goal: Goal) -> None:
    errors = golden.means(goal)
    assert sum(errors) <= goal.most * len(errors)


def test_small_peaks_are_met_within_60_mib() -> None:
    assert {m.id: m.off for m in answered() if not m.large and abs(m.off) > NEAR} == {}


@each(lambda: (m for m in answered() if m.phases), identity)
def test_the_published_peak_of_every_phase_is_met(m: Measured) -> None:
    off = {phase: phase_peak(m.answer, phase) - m.phases[phase] for phase in ("forward", "backward", "step")}
    assert {phase: bytes_ for phase, bytes_ in off.items() if abs(bytes_) > SLACK} == {}


def test_an_estimate_equals_a_trace_with_the_libraries_of_its_time() -> None:
    """Published runs of stock transformers 4.45, 4.48 and 5, traced again."""
    assert {r.measured.id: r.engine for r in golden.replayed() if abs(r.engine) > 0.001} == {}


def test_traces_of_large_published_runs_meet_the_card_within_three_per_mille() -> None:
    errors = [abs(r.error) for r in golden.replayed() if r.measured.large]
    assert sum(errors) <= 0.003 * len(errors)


def test_no_out_of_memory_run_is_predicted_to_fit() -> None:
    assert verdicts()["died"]["fits"] == []


def test_at_most_three_per_cent_of_successful_runs_are_predicted_to_fail() -> None:
    ran = verdicts()["ran"]
    assert len(ran["does not fit"]) <= 0.03 * sum(map(len, ran.values())), ran["does not fit"]


def test_every_answer_of_another_tool_is_about_a_golden_run() -> None:
    assert {tool.asked for tool in golden.other_tools()} == {len(answered())}
