"""The range around `used`: fitted to published runs, and tested on held-out runs."""

from __future__ import annotations

import json
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue.hardware.overhead import COMPILED, COVERAGE, EXTRA_LOSS_COPIES, PREDICTION_BAND
from memplan.core.units import MIB
from memplan.engine.native import new_allocator
from memplan.estimate.training_peaks import training_peaks
from memplan.program.training.replay import STREAMS, cached_logits, replay_steps
from memplan.resolve.decide import decide
from tests.sampling import ALL

PUBLISHED = Path(__file__).parents[1] / "golden" / "published.jsonl"


def measured() -> list[tuple[str, float]]:
    """Return the configuration and the error of `used` for every run with a measured process."""
    rows: list[dict[str, Any]] = [json.loads(line) for line in PUBLISHED.read_text("utf-8").splitlines()]
    return [
        (json.dumps(row["run"], sort_keys=True), row["process"] / estimate(RunSpec(**row["run"])).bytes.used - 1)
        for row in rows
        if "process" in row
    ]


def shortest(errors: list[float]) -> tuple[float, float]:
    """Return the shortest range that holds `COVERAGE` of the errors plus one further run."""
    ordered = sorted(errors)
    inside = min(len(ordered), ceil(COVERAGE * (len(ordered) + 1)))
    ranges = zip(ordered, ordered[inside - 1 :], strict=False)
    return min(ranges, key=lambda ends: ends[1] - ends[0])


pytestmark = ALL


@pytest.fixture(scope="module")
def errors() -> list[tuple[str, float]]:
    return measured()


def test_the_row_is_the_shortest_range_of_the_published_errors(errors: list[tuple[str, float]]) -> None:
    low, high = shortest([error for _, error in errors])
    assert len(errors) >= 86
    assert PREDICTION_BAND.low / 1000 <= low < (PREDICTION_BAND.low + 1) / 1000
    assert (PREDICTION_BAND.high - 1) / 1000 < high <= PREDICTION_BAND.high / 1000


def test_half_its_width_is_at_most_six_per_cent_of_used() -> None:
    assert (PREDICTION_BAND.high - PREDICTION_BAND.low) / 2 <= 60


def test_the_range_covers_the_runs_of_a_held_out_configuration(errors: list[tuple[str, float]]) -> None:
    covered = 0
    for configuration in dict.fromkeys(name for name, _ in errors):
        low, high = shortest([error for name, error in errors if name != configuration])
        covered += sum(low <= error <= high for name, error in errors if name == configuration)
    assert 0.93 <= covered / len(errors) <= 0.98


def test_ranges_contain_the_cards_measurements(errors: list[tuple[str, float]]) -> None:
    rows = [json.loads(line) for line in PUBLISHED.read_text("utf-8").splitlines()]
    runs = [(row["process"], estimate(RunSpec(**row["run"]))) for row in rows if "process" in row]
    inside = sum(answer.band.low <= process <= answer.band.high for process, answer in runs)
    assert 0.93 <= inside / len(runs) <= 0.98


def test_a_fused_cross_entropy_holds_a_copy_of_logits_missing_from_replays() -> None:
    rows = [json.loads(line) for line in PUBLISHED.read_text("utf-8").splitlines()]
    found: list[float] = []
    for row in rows:
        run = RunSpec(**row["run"])
        if "process" in row and run.method.kind != "full" and "cross_entropy" in (run.kernels.fused or ()):
            decided = decide(run)
            walked = training_peaks(decided)
            copy = cached_logits(decided.structure, walked.axes)
            allocator = new_allocator(streams=STREAMS)
            replay_steps(walked.program, walked.axes, walked.workspace, allocator)
            replayed = allocator.peak_reserved
            if copy and replayed + copy < estimate(run).gpu.usable:
                found.append((row["process"] - replayed - 520 * MIB) / copy)
    assert len(found) == 14
    assert min(found) > 0.7
    assert max(found) < 2.05
    assert round(median(found)) == EXTRA_LOSS_COPIES


def test_a_run_that_only_survives_by_releasing_segments_is_tight() -> None:
    """Its tensors live on 7 % less than the card has, but with room to spare torch would reserve more than that."""
    run = {"model": "smollm2-135m", "method": "lora", "batch": {"micro": 8}}
    answer, roomy = estimate(RunSpec(**run, gpu="3060")), estimate(RunSpec(**run, gpu="a6000"))
    assert answer.gpu is not None
    context = roomy.bytes.used - roomy.bytes.reserved
    sure = answer.gpu.usable * 1000 // (1000 + PREDICTION_BAND.high) - context
    assert answer.bytes.allocated < sure < roomy.bytes.reserved
    assert answer.walk.reserved(sure) is not None
    assert answer.verdict.answer == "tight"
    assert answer.band.low <= answer.gpu.usable < answer.band.high == roomy.band.high


def test_compiled_code_keeps_less_than_eager_code() -> None:
    """In layers, and in all of a model with two layers, as AOTAutograd's partitioner divides them."""
    rows = [json.loads(line) for line in PUBLISHED.with_name("traced_compiled.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 9
    for row in rows:
        for eager, compiled in (row["layer"], [2 * a + b for a, b in zip(row["layer"], row["outside"], strict=True)]):
            assert 1000 + COMPILED.low <= 1000 * compiled / eager <= 1000 + COMPILED.high, row["id"]


def test_the_range_of_a_compiled_run_goes_down() -> None:
    """Its figure and upper end are those of eager code. A card between its ends is tight."""
    fields = {"model": "llama-3.2-1b", "method": "lora", "batch": {"micro": 4, "sequence": 2048}}
    eager, compiled = (estimate(RunSpec(**fields, kernels={"compile": c}, gpu="a100-40gb")) for c in (False, True))
    away = sum(line.bytes for line in eager.ledger if line.kind == "temp")
    away += sum(line.bytes for line in eager.ledger if line.kind == "activation") // 2
    assert (compiled.bytes, compiled.band.high) == (eager.bytes, eager.band.high)
    low = eager.band.low - away * (1000 + PREDICTION_BAND.low) // 1000
    assert abs(compiled.band.low - low) <= 1
    answers = [estimate(RunSpec(**fields, kernels={"compile": c}, gpu="3060")).verdict.answer for c in (False, True)]
    assert answers == ["does not fit", "tight"]


@pytest.mark.parametrize("task", ["forward", "generate"])
def test_the_range_of_a_compiled_inference_goes_both_ways(task: str) -> None:
    """Down by the temporaries of the peak, and up by those of a forward pass or a decoding step in CUDA graphs."""
    fields = {"model": "llama-3.2-1b", "task": task, "batch": {"sequence": 1024}, "gpu": "a100-40gb"}
    eager, compiled = (estimate(RunSpec(**fields, kernels={"compile": c})) for c in (False, True))  # type: ignore[arg-type]
    temporaries = sum(line.bytes for line in eager.ledger if line.kind == "activation") - 16 * 1024 * 2 * 8 * 64 * 2
    logits = 1024 * 128256 * 2 if task == "forward" else 0
    wider = eager.band.low - compiled.band.low, compiled.band.high - eager.band.high
    assert compiled.bytes == eager.bytes
    assert wider[0] == pytest.approx((temporaries - logits) * (1000 + PREDICTION_BAND.low) / 1000, rel=1e-3)
    if task == "forward":
        assert wider[1] == pytest.approx(temporaries * (1000 + PREDICTION_BAND.high) / 1000, rel=1e-3)
    else:  # one token's logits and their casts, not a prompt's activations
        assert 3 * 2 * 128256 < wider[1] < temporaries / 10
