"""Context parallelism: one rank's estimate against torch's ring attention, and laws."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

from benchmarks.accuracy import TRACED as PHASES
from benchmarks.accuracy import rows
from memplan import Estimate, RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.estimate.training_peaks import training_peaks
from memplan.models.configs import families
from memplan.probe.refusals import checked_run
from memplan.program.sharding.ranks import SINGLE_RANK
from memplan.resolve.decide import decide
from tests.program.test_tensor_parallel import LLAMA
from tests.sampling import sampled

FAMILIES = [name for name, row in families().items() if row.parallel.context]

TRACED: list[dict[str, Any]] = rows("traced_parallel_cp.jsonl")
SHARDED = [case for case in TRACED if "strategy" in case["run"]["parallelism"]]
EXCHANGED: list[dict[str, Any]] = rows("traced_parallel_ulysses.jsonl")


def run(cp: int, config: dict[str, Any] | None = None, **options: Any) -> RunSpec:
    parallelism = {"world": cp, "cp": cp, "strategy": "fsdp2" if cp > 1 else "none", **options.pop("parallelism", {})}
    return RunSpec(
        model={"config": {**LLAMA, **(config or {})}}, parallelism=parallelism, gpu="a100-sxm-80gb", **options
    )


def peaks(case: dict[str, Any], strategy: str = "fsdp2") -> dict[tuple[int, str], int]:
    """Return the rank's peaks without cuBLAS's workspaces, with full weights if the trace names no strategy."""
    asked = dict(case["run"])
    decided = decide(RunSpec(**{**asked, "parallelism": {"strategy": strategy, **asked["parallelism"]}}))
    if "strategy" not in asked["parallelism"]:
        decided = decided._replace(structure=decided.structure._replace(ranks=SINGLE_RANK))
    walked = training_peaks(decided)
    found: dict[tuple[int, str], int] = {}
    for phase in walked.phases:
        if phase.phase in PHASES:
            for step in (phase.step,) if phase.step else (1, 2):
                handles = 2 if phase.phase in ("backward", "step") or phase.step != 1 else 1
                key = (step, PHASES[phase.phase])
                found[key] = max(found.get(key, 0), phase.peak - handles * walked.workspace)
    return found


@pytest.mark.parametrize("case", [*sampled(TRACED, 8), *SHARDED], ids=lambda case: case["name"])
def test_a_ranks_estimate_equals_torchs_allocations(case: dict[str, Any]) -> None:
    mine = peaks(case)
    for step, traced in case["steps"].items():
        expected = {"fwd": traced["fwd"], "bwd": traced["bwd"], "opt": max(traced["opt"], traced["clip"])}
        for phase, bytes_ in expected.items():
            assert mine[int(step), phase] == pytest.approx(bytes_, rel=0.02), (step, phase)
    assert max(mine.values()) == pytest.approx(case["peak"], rel=1e-3)


def test_a_probe_takes_the_traced_runs_and_no_others() -> None:
    for case in (TRACED[0], EXCHANGED[0], SHARDED[0]):
        assert checked_run(RunSpec(**case["run"])).parallelism.cp > 1
    for other in ({"strategy": "zero3", "context": "ulysses"}, {"world": 4, "dp": 2}):
        with pytest.raises(SpecError, match="a probe runs on one GPU, or as one rank"):
            checked_run(run(2, parallelism=other))


def test_every_family_is_traced_with_0_01_per_cent_mean_error() -> None:
    assert {case["run"]["model"]["config"]["model_type"] for case in TRACED} >= set(FAMILIES)
    assert mean(abs(max(peaks(case).values()) / case["peak"] - 1) for case in sampled(TRACED, 8)) < 1e-4


@pytest.mark.parametrize("case", sampled(EXCHANGED, 4), ids=lambda case: case["name"])
def test_a_ulysses_rank_equals_deepspeeds_allocations(case: dict[str, Any]) -> None:
    """To the byte at the peak."""
    mine = peaks(case, "zero3")
    for step, traced in case["steps"].items():
        assert mine[int(step), "bwd"] == pytest.approx(traced["bwd"], rel=1e-4), step
        assert mine[int(step), "fwd"] == pytest.approx(traced["fwd"], rel=1e-3), step
    assert max(mine.values()) == case["peak"]


def ulysses(sp: int, **options: Any) -> RunSpec:
    parallelism = {"context": "ulysses", "strategy": "zero3", **options.pop("parallelism", {})}
    return run(sp, options.pop("config", None), parallelism=parallelism, **options)


def test_every_family_is_traced_with_heads_exchanged() -> None:
    assert {case["run"]["model"]["config"]["model_type"] for case in EXCHANGED} >= set(FAMILIES)


def test_exchanged_heads_attend_to_all_tokens() -> None:
    answer = estimate(ulysses(4, kernels={"checkpointing": "none"}, batch={"sequence": 4096, "micro": 2}))
    dims = {line.what: line.dims for line in answer.ledger}
    assert dims["q.heads"] == (2, 4096, 8 // 4, 64)
    assert dims["k.heads"] == (2, 4096, 4 // 4, 64)


def test_key_heads_are_repeated_if_there_are_more_ranks() -> None:
    answer = estimate(ulysses(8, kernels={"checkpointing": "none"}, batch={"sequence": 4096}))
    dims = {line.what: line.dims for line in answer.ledger}
    assert dims["q.heads"] == dims["k.heads"] == (1, 4096, 1, 64)


def test_zero_also_shards_among_context_parallel_ranks() -> None:
    apart = estimate(run(1, parallelism={"world": 4, "dp": 4, "strategy": "zero3"}, batch={"sequence": 64}))
    together = estimate(ulysses(2, parallelism={"world": 4, "dp": 2}, batch={"sequence": 64}))
    assert apart.categories["optstate"] == together.categories["optstate"]


def activations(answer: Estimate) -> int:
    return answer.categories["activation"] + answer.categories["temp"]


def test_more_ranks_hold_less_of_a_sequence() -> None:
    options: dict[str, Any] = {"kernels": {"checkpointing": "none"}, "batch": {"sequence": 8192}}
    one, two, four = (estimate(run(cp, **options)) for cp in (1, 2, 4))
    assert activations(one) > activations(two) > activations(four) > activations(one) / 4
    assert one.parameters == two.parameters == four.parameters


def test_context_parallel_ranks_also_shard_the_weights() -> None:
    """FSDP2 shards them among replicas and context-parallel ranks alike."""
    apart = estimate(run(1, parallelism={"world": 4, "dp": 4, "strategy": "fsdp2"}, batch={"sequence": 64}))
    together = estimate(run(2, parallelism={"world": 4, "dp": 2, "strategy": "fsdp2"}, batch={"sequence": 64}))
    assert apart.categories["optstate"] == together.categories["optstate"]


def test_keys_and_values_of_all_ranks_are_gathered() -> None:
    answer = estimate(run(4, kernels={"checkpointing": "none"}, batch={"sequence": 4096, "micro": 4}))
    gathered = [line for line in answer.ledger if line.what == "keys and values of all ranks"]
    assert all(line.dims == (8, 4, 1024, 4, 64) for line in gathered)


REFUSED = {
    "tokens": (
        run(4, batch={"sequence": 1004}),
        "parallelism.cp: 4 ranks have two slices of a sequence each, and 8 do",
    ),
    "strategy": (run(2, parallelism={"strategy": "ddp"}), "parallelism.strategy: accelerate's context parallelism"),
    "padding": (
        run(2, loop={"padded": True}),
        "loop.padded: accelerate's context parallelism does not support attention masks",
    ),
    "attention": (run(2, kernels={"attention": "eager"}), "not with a mask"),
    "dtype": (run(2, precision="fp32"), "not with efficient attention"),
    "family": (
        RunSpec(model="gpt2", parallelism={"world": 2, "cp": 2, "strategy": "fsdp2"}, batch={"sequence": 512}),
        "parallelism.cp: 2 is not supported yet for gpt2; supported: decoders whose",
    ),
    "both": (
        run(2, parallelism={"world": 4, "tp": 2}),
        "parallelism.cp: accelerate 1.15 cannot combine cp 2 with tp 2",
    ),
    "heads": (
        ulysses(3, batch={"sequence": 1536}),
        "parallelism.cp: 3 does not divide 8 attention heads and neither divides 4 key/value heads nor is a multiple",
    ),
    "deepspeed": (ulysses(2, parallelism={"strategy": "fsdp2"}), "parallelism.strategy: Ulysses needs DeepSpeed"),
    "exchanged tokens": (
        ulysses(4, batch={"sequence": 1002}),
        "parallelism.cp: 4 ranks do not divide a sequence of 1002",
    ),
    "nothing exchanged": (
        run(1, parallelism={"context": "ulysses"}),
        "parallelism.context: ulysses needs context parallelism",
    ),
    "masked": (ulysses(2, loop={"padded": True}), "loop.padded: "),
    "loss": (run(2, kernels={"loss": "fused"}), "kernels.loss: 'fused' is not supported yet"),
    "profile": (run(2, profile="torchtitan"), "parallelism.cp: 2 is not supported yet; supported: 1 with profile"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_unsupported_by_ring_attention_are_refused_in_one_line(kind: str) -> None:
    asked, said = REFUSED[kind]
    with pytest.raises(SpecError) as error:
        estimate(asked)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
