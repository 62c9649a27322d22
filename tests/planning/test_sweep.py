"""A sweep's arrays equal `estimate` for each run: bytes, phase and verdict."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import memplan
from memplan import RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.planning.sweep import STEP_PHASES, Grid
from tests.estimate.test_laws import runs
from tests.sampling import examples

CARDS = ("rtx-3060-12gb", "rtx-4090", "a100-sxm4-80gb", "mi300x", "t4")
VALUES = st.lists(st.integers(1, 9000), min_size=1, max_size=3)


def assert_each_as_estimated(swept: Grid) -> None:
    for place in np.ndindex(swept.allocated.shape):
        answer = estimate(swept.at(*place))
        assert swept.allocated[place] == answer.bytes.allocated
        assert STEP_PHASES[swept.phases[place]] == answer.peak.phase
        if swept.verdict is not None:
            assert swept.verdict[place] == answer.verdict.answer


@settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(runs(), st.sampled_from((None, *CARDS)), st.lists(st.integers(1, 40), min_size=1, max_size=3), VALUES)
def test_a_grid_equals_every_run_estimated_alone(
    run: dict[str, Any], gpu: str | None, batches: list[int], sequences: list[int]
) -> None:
    assert_each_as_estimated(memplan.grid(RunSpec(**run, gpu=gpu), batch=batches, sequence=sequences))


def test_a_verdict_that_no_bound_tells_is_replayed() -> None:
    swept = memplan.grid(RunSpec(model="qwen2-0.5b", method="lora", gpu="t4"), batch=range(1, 12))
    assert swept.unclear > 0
    assert set(swept.verdict) == {"fits", "tight", "does not fit"}
    assert_each_as_estimated(swept)


def test_ranks_are_an_axis_and_values_stand_as_they_were_listed() -> None:
    run = RunSpec(model="llama-3.2-1b", method="lora", batch={"accumulation": 2}, gpu="rtx-4090")
    swept = memplan.grid(run, rank=[64, 8, 64], sequence=[2048, 512])
    assert list(swept.axes) == ["sequence", "rank"]
    assert swept.allocated.shape == (2, 3)
    assert (swept.allocated[:, 0] == swept.allocated[:, 2]).all()
    assert_each_as_estimated(swept)


@pytest.mark.parametrize("model", ["mistral-7b-v0.1", "gemma-2-2b"])
def test_sequences_within_and_beyond_a_window(model: str) -> None:
    window = 4096
    run = RunSpec(model=model, method="qlora", gpu="a100")
    assert_each_as_estimated(memplan.grid(run, batch=[1, 2], sequence=[window - 1, window, window + 1]))


@pytest.mark.parametrize("loss", ["hf", "fused"])
@pytest.mark.parametrize("attention", ["sdpa_efficient", "eager"])
def test_kernels_with_sizes_of_their_own(loss: str, attention: str) -> None:
    kernels = {"loss": loss, "attention": attention, "fused": ["cross_entropy"] if loss == "hf" else []}
    run = RunSpec(model="qwen3-0.6b", kernels=kernels, gpu="t4")  # heads of 128 there: fp32 gradients in a workspace
    assert_each_as_estimated(memplan.grid(run, batch=[1, 3, 130], sequence=[1, 100, 1025, 3073]))
    assert_each_as_estimated(memplan.grid(run, batch=[2, 3], sequence=[7]))


def test_ranks_of_several_gpus_can_be_swept() -> None:
    parallelism = {"world": 2, "dp": 2, "strategy": "fsdp2"}
    run = RunSpec(model="llama-3.2-1b", parallelism=parallelism, gpu="rtx-3060-12gb")
    assert_each_as_estimated(memplan.grid(run, batch=[1, 2, 4], sequence=[512, 2048]))


def test_arrays_mark_impossible_runs() -> None:
    swept = memplan.grid(RunSpec(model="gpt2", gpu="t4"), sequence=[1024, 1025])
    assert list(swept.allocated) == [estimate(RunSpec(model="gpt2", batch={"sequence": 1024})).bytes.allocated, -1]
    assert list(swept.verdict) == ["fits", ""]
    assert list(swept.phases[1:]) == [-1]


def test_without_a_gpu_there_is_no_verdict() -> None:
    swept = memplan.grid(RunSpec(model="qwen2-0.5b"), batch=[1, 2])
    assert swept.verdict is None
    assert swept.answers is None
    assert swept.unclear == 0


def test_bytes_that_a_double_does_not_hold_are_exact() -> None:
    swept = memplan.grid(RunSpec(model="qwen2-0.5b", gpu="h100"), batch=[2**24 + 1, 3], sequence=[2**16 + 1])
    assert swept.allocated.max() > 2**53
    assert_each_as_estimated(swept)
    with pytest.raises(SpecError, match="int64"):
        memplan.grid(RunSpec(model="qwen2-0.5b"), batch=[2**36], sequence=[2**20])


@pytest.mark.parametrize(
    ("swept", "field"),
    [
        ({}, "grid"),
        ({"batch": []}, "batch"),
        ({"sequence": [512, 0]}, "batch.sequence"),
        ({"batch": [-1]}, "batch.micro"),
        ({"rank": [8]}, "method.rank"),  # a method without adapters
    ],
)
def test_impossible_sweep_values_are_named(swept: dict[str, list[int]], field: str) -> None:
    with pytest.raises((SpecError, ValueError), match=field.replace(".", r"\W+")):
        memplan.grid(RunSpec(model="qwen2-0.5b"), **swept)


def test_a_rank_that_is_too_large_leaves_the_others() -> None:
    swept = memplan.grid(RunSpec(model="qwen2-0.5b", method="lora"), rank=[8, 10**6])
    assert swept.allocated[0] > 0
    assert swept.allocated[1] == -1
    with pytest.raises(SpecError, match=r"method\.rank"):
        memplan.grid(RunSpec(model="qwen2-0.5b", method="lora"), rank=[10**6])
