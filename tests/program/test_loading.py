"""GPU memory while FSDP shards a model, against traces; and host memory of the checkpoint meanwhile.

The rows are in tests/golden/traced_loading.jsonl, which tests/golden/trace_loading.py made.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.accuracy import rows, without_workspaces
from memplan import Estimate, RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.program.graph import total_bytes
from memplan.program.loading import most_at_once
from memplan.program.sharding.choice import sharding_of
from memplan.report.wording import host
from memplan.resolve.decide import decide
from tests.sampling import sampled
from tests.tiny import TINY

CASES: list[dict[str, Any]] = sampled(rows("traced_loading.jsonl"), 8)


def label(case: dict[str, Any]) -> str:
    p = case["run"]["parallelism"]
    moved = "-offload" if p.get("offload") else ""
    sent = "" if p.get("cpu_ram_efficient_loading", True) else "-each"
    return f"{p['strategy']}{moved}{sent}-w{p['world']}"


@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_model_is_divided_as_the_trace_shows(case: dict[str, Any]) -> None:
    assert estimate(RunSpec(**case["run"])).phases[0].peak == pytest.approx(case["load"], rel=1e-3)


@pytest.mark.parametrize(
    "case",
    sampled(rows("traced_preparations.jsonl"), 4),
    ids=lambda case: f"{case['run']['model']}-{case['run']['method']['quantization']['kbit_preparation']}",
)
def test_axolotls_preparation_is_as_the_trace_shows(case: dict[str, Any]) -> None:
    """Both steps agree exactly; a load differs by the order in which weights of other names are cast."""
    answer = estimate(RunSpec(**case["run"]))
    assert answer.phases[0].peak == pytest.approx(case["load"], rel=3e-3)
    peaks = without_workspaces(answer)
    assert peaks[2, "bwd"] == pytest.approx(case["backward"], rel=1e-5)


@pytest.mark.parametrize("world", [64, 128])
def test_grouped_loading_steps_equal_single_ones(world: int) -> None:
    """300 rows are 5 each for 60 of 64 ranks, or 3 each for 100 of 128: the other ranks' shards are padded copies."""
    run = {
        "model": {"config": {"model_type": "llama", **TINY["llama"]}},
        "parallelism": {"world": world, "dp": world, "strategy": "fsdp2"},
    }
    structure = decide(RunSpec.model_validate(run)).structure
    each, together = (list(sharding_of(structure).loading_events(together=way)) for way in (False, True))
    assert len(together) < len(each)
    assert most_at_once(together) == most_at_once(each)


@pytest.mark.parametrize(
    ("changes", "run"),
    [
        (False, {"model": "qwen2-0.5b", "method": "lora"}),
        (False, {"model": "qwen2-0.5b", "method": "full", "parallelism": {"world": 2, "dp": 2, "strategy": "ddp"}}),
        (True, {"model": "qwen2-0.5b", "method": "qlora"}),
        (True, {"model": "moonlight-16b-a3b"}),  # the matrices of its routers become fp32
    ],
    ids=["as it stays", "on each rank", "quantised", "cast"],
)
def test_loading_takes_as_much_as_what_it_leaves_unless_it_changes_weights(changes: bool, run: dict[str, Any]) -> None:
    structure = decide(RunSpec.model_validate(run)).structure
    peak = sharding_of(structure).loading_peak()
    assert peak == most_at_once(sharding_of(structure).loading_events())
    assert (peak > total_bytes(sharding_of(structure).weights())) == changes


def test_a_buffer_without_elements_takes_no_storage() -> None:
    """A head of one dimension, half of it rotated, has no rotary frequencies."""
    assert most_at_once([(0, 0), (1, 512), (2, 0), (1, 0), (3, 256)]) == 512
    model = {"config": {"model_type": "glm4", **TINY["glm4"], "head_dim": 1}}
    run = RunSpec.model_validate({"model": model, "parallelism": {"world": 2, "dp": 2, "strategy": "zero3"}})
    assert any(bytes_ == 0 for _, bytes_ in sharding_of(decide(run).structure).loading_events())
    assert estimate(run).bytes.reserved > 0


# in host memory

PARAMETERS = 494_032_768  # qwen2-0.5b, stored in bf16
EFFICIENT = "cpu_ram_efficient_loading"


def asked(strategy: str = "ddp", world: int = 4, **fields: Any) -> Estimate:
    more = fields.pop("parallelism", {})
    parallelism = {"world": world, "dp": world, "strategy": strategy, **more}
    return estimate(RunSpec(**{"model": "qwen2-0.5b", **fields, "parallelism": parallelism}))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero3", "fsdp", "fsdp2"])
def test_a_checkpoint_in_its_stored_dtype_is_shared_within_a_node(strategy: str) -> None:
    load = asked(strategy).host.phases[0]
    assert (load.phase, load.rank, load.node) == ("load", 0, 0)
    assert load.mapped == 2 * PARAMETERS


@pytest.mark.parametrize(
    ("strategy", "how", "processes"),
    [
        ("ddp", {}, 4),
        ("fsdp", {EFFICIENT: False}, 4),
        ("fsdp", {}, 1),
        ("fsdp2", {EFFICIENT: False}, 4),
        ("fsdp2", {}, 1),
    ],
)
def test_in_another_dtype_it_is_memory_of_every_process_that_loads_it(
    strategy: str, how: dict[str, Any], processes: int
) -> None:
    load = asked(strategy, precision="fp32", parallelism=how).host.phases[0]
    assert load.rank == 4 * PARAMETERS
    assert load.node == processes * load.rank


def test_fsdp2_casts_what_trains_on_the_host_and_fsdp1_on_the_gpu() -> None:
    autocast = {"weights": "bf16", "autocast": True}
    assert asked("fsdp2", precision=autocast).host.phases[0].rank == 4 * PARAMETERS
    assert asked("fsdp", precision=autocast).host.phases[0].rank == 0


def test_quantised_and_zero_3_weights_bypass_the_host() -> None:
    assert asked("ddp", method="qlora", precision="fp32").host.phases[0].rank == 0
    assert asked("zero3", precision="fp32").host.phases[0].rank == 0
    whole = {"zero": {"zero3_init_flag": False}}
    assert asked("zero3", precision="fp32", parallelism=whole).host.phases[0].rank == 4 * PARAMETERS


def test_offloaded_shards_coexist_with_the_full_model_until_it_is_sharded() -> None:
    moved = {"offload": {"parameters": True}}
    four = asked("fsdp2", 4, precision="fp32", parallelism=moved).host.phases[0]
    assert four.rank == 4 * PARAMETERS + PARAMETERS
    assert four.node == 4 * PARAMETERS + 4 * PARAMETERS
    eight = asked("fsdp", 8, precision="fp32", parallelism=moved).host
    assert eight.phases[0].rank == 4 * PARAMETERS
    assert eight.peak.phase == "step"


def test_a_node_has_the_given_processes_or_at_most_eight_by_default() -> None:
    moved = {"offload": {"parameters": True}}
    usual, two, few = (
        asked("fsdp2", world, parallelism={**moved, **more})
        for world, more in ((16, {}), (16, {"gpus_per_node": 2}), (4, {}))
    )
    assert [a.host.ranks for a in (usual, two, few)] == [8, 2, 4]
    assert two.host.phases[1].node == 2 * two.host_bytes
    assert usual.host_bytes == two.host_bytes
    assert "the 8 of a node; the peak is during the steps" in host(usual)
    assert host(asked("ddp")) == ""


def test_nodes_that_the_gpus_do_not_fill_are_refused() -> None:
    with pytest.raises(SpecError, match=r"parallelism\.gpus_per_node: 12 GPUs do not divide into nodes of 8"):
        asked("ddp", 12, parallelism={"gpus_per_node": 8})
    with pytest.raises(SpecError, match="only applies to several GPUs"):
        estimate(RunSpec(model="qwen2-0.5b", parallelism={"gpus_per_node": 2}))


def test_other_frameworks_get_no_loading_estimate_of_transformers() -> None:
    assert [p.phase for p in asked("ddp", profile="torchtitan").host.phases] == ["step"]
    assert [p.phase for p in asked("ddp").host.phases] == ["load", "step"]


def test_axolotl_moves_a_model_before_it_is_divided() -> None:
    def peaks(profile: str, efficient: bool) -> dict[str, int]:
        parallelism = {"world": 8, "dp": 8, "strategy": "fsdp2", "cpu_ram_efficient_loading": efficient}
        answer = estimate(RunSpec(model="qwen2-1.5b", precision="amp", profile=profile, parallelism=parallelism))
        return {phase.phase: phase.peak for phase in answer.phases}

    whole = 2 * 1_543_714_304  # bf16
    assert whole < peaks("axolotl-0.21", False)["load"] < 1.25 * whole
    assert peaks("axolotl-0.21", True)["load"] < 0.7 * whole
    assert peaks("transformers-5", False)["load"] < 0.7 * whole


def test_axolotl_makes_a_model_nf4_on_one_process() -> None:
    """The load ends with the head, whole and in parts. By then each GPU has its parts, and all scales."""

    def load(profile: str, efficient: bool) -> int:
        parallelism = {"world": 8, "dp": 8, "strategy": "fsdp2", "cpu_ram_efficient_loading": efficient}
        method = {"kind": "qlora", "targets": ["q_proj"], "quantization": {"storage": "bf16"}}
        return (
            estimate(RunSpec(model="qwen2.5-7b", method=method, profile=profile, parallelism=parallelism))
            .phases[0]
            .peak
        )

    table = 152_064 * 3_584  # of the embeddings, and of the head
    linear = 7_615_616_512 - 2 * table
    whole = 2 * table + linear // 2
    scales = linear // 64 + linear // 64 // 64  # a byte per block, and fp32 per 256 of them
    parts = (4 * table + linear // 2) // 8 + scales
    assert load("axolotl-0.21", True) == pytest.approx(parts + 2 * table, rel=0.01)
    assert load("axolotl-0.21", False) > whole
    assert load("transformers-5", True) > whole


def test_gradients_wait_where_the_framework_delays_their_reduction() -> None:
    def gradients(profile: str) -> int:
        parallelism = {"world": 8, "dp": 8, "strategy": "fsdp2"}
        run = RunSpec(
            model="qwen2-1.5b",
            precision="amp",
            profile=profile,
            parallelism=parallelism,
            loop={"trainer": True},
            batch={"accumulation": 2},
        )
        return sum(line.bytes for line in estimate(run).ledger if line.kind == "gradient")

    assert gradients("axolotl-0.21") > 2 * 1_500_000_000  # whole, in bf16
    assert gradients("verl-0.9") == gradients("axolotl-0.12")
    assert gradients("axolotl-0.12") < gradients("axolotl-0.21") / 2
