"""The replay with names reserves what the replay without them does, and its tensors sum to what is allocated."""

from __future__ import annotations

import pytest

from memplan.core.units import GIB, MIB
from memplan.estimate.estimate import walk
from memplan.estimate.training import TrainingWalk
from memplan.explain.requests import requests, segment_of
from memplan.spec.run import RunSpec

RUNS = {
    "qlora": {"method": "qlora", "batch": {"micro": 2, "sequence": 512}},
    "full": {"method": "full", "batch": {"micro": 1, "sequence": 256}},
    "accumulating": {"method": "lora", "batch": {"micro": 1, "sequence": 256, "accumulation": 4}},
    "fsdp": {"method": "lora", "parallelism": {"world": 4, "dp": 4, "strategy": "fsdp"}},
    "expandable": {"method": "full", "loop": {"expandable_segments": True}},
}


def walk_of(**fields: object) -> TrainingWalk:
    walked = walk(RunSpec.model_validate({"model": "smollm2-135m", "gpu": "t4", **fields}))
    assert isinstance(walked, TrainingWalk)
    return walked


@pytest.mark.parametrize("run", RUNS)
def test_the_replay_with_names_is_the_replay(run: str) -> None:
    walked = walk_of(**RUNS[run])
    made = [*requests(walked)]
    if run != "expandable":  # which grows by pages
        assert max(r.reserved + r.segment for r in made) == walked.reserved()
    assert all(sum(r.kinds.values()) == r.allocated for r in made)
    assert not any(r.failed for r in made)


@pytest.mark.parametrize("run", RUNS)
def test_a_replay_fails_where_the_run_does_not_live(run: str) -> None:
    walked = walk_of(**RUNS[run])
    for capacity in (walked.peak // 2, walked.peak - MIB, walked.reserved() or 0):
        made = [*requests(walked, capacity)]
        assert made[-1].failed == (walked.reserved(capacity) is None)


def test_a_failed_request_has_a_name_a_shape_and_a_phase() -> None:
    walked = walk_of(method="full", batch={"micro": 8, "sequence": 2048}, kernels={"checkpointing": "none"})
    failed = [*requests(walked, 12 * GIB)][-1]
    assert failed.failed
    assert (failed.phase, bool(failed.where), bool(failed.name), bool(failed.shape)) == ("forward", True, True, True)


@pytest.mark.parametrize(
    ("tensor", "segment"),
    [
        (1, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 1, 20 * MIB),
        (10 * MIB - 1, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (83 * MIB, 84 * MIB),
    ],
)
def test_a_segment_is_what_torch_asks_for(tensor: int, segment: int) -> None:
    assert segment_of(tensor) == segment
