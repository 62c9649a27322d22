"""Layouts of a run on a cluster: every layout is valid, bounds hold, and traffic follows published formulas."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memplan import RunSpec, estimate
from memplan.catalogue.hardware.gpus import all_gpus, find_gpu
from memplan.catalogue.hardware.links import EXPOSED, network, node_link
from memplan.catalogue.parallelism.sharding import STRATEGIES
from memplan.core.errors import MemplanError, SpecError
from memplan.core.units import GIB
from memplan.estimate.demand import Demand
from memplan.models.cards import find_model
from memplan.planning.cluster import ANY, ClusterSearch, FixedDegrees, cluster_of, plain_parallelism, run_of, search
from memplan.planning.traffic import (
    Cluster,
    ParallelGrid,
    StepTime,
    Traffic,
    TrafficFacts,
    group,
    groups,
    min_state_bytes,
    step,
    traffic_facts,
)
from tests.sampling import ALL, examples

few = settings(max_examples=examples(8), deadline=None)

H100 = find_gpu("h100")
RUNS = st.fixed_dictionaries(
    {
        "model": st.sampled_from(["llama-3.2-1b", "qwen2.5-0.5b", "pythia-70m"]),
        "method": st.sampled_from(["full", "lora", "qlora"]),
        "batch": st.fixed_dictionaries(
            {
                "micro": st.sampled_from([1, 2]),
                "sequence": st.sampled_from([512, 1000]),
                "accumulation": st.sampled_from([1, 3]),
            }
        ),
        "kernels": st.sampled_from([{}, {"checkpointing": "none"}]),
    }
)
SIZES = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 8]))


def run(**fields: Any) -> RunSpec:
    return RunSpec.model_validate({"model": "llama-3.2-1b", **fields})


def found(
    asked: RunSpec, nodes: int, each: int, pinned: FixedDegrees = ANY, gpu: str = "h100", **more: Any
) -> ClusterSearch:
    return search(asked, cluster_of(find_gpu(gpu), nodes, each), pinned, **more)


def known(asked: RunSpec) -> TrafficFacts:
    alone = asked.model_copy(update={"gpu": "h100", "parallelism": plain_parallelism(asked)})
    return traffic_facts(alone, estimate(alone), asked)


# --- layouts ---


@few
@given(RUNS, SIZES)
def test_every_grid_is_the_world_with_the_same_batch_and_weights(fields: dict[str, Any], size: tuple[int, int]) -> None:
    asked = run(**fields)
    world, model, bound = size[0] * size[1], find_model(asked.model), known(asked)
    sequences = asked.batch.micro * asked.batch.accumulation * world
    answer = found(asked, *size, most=None)
    assert answer.placed
    for placed in answer.placed:
        grid, p = placed.grid, placed.answer.run.parallelism
        assert grid.dp * grid.tp * grid.pp * grid.cp == p.world == world
        assert (p.dp, p.tp, p.pp, p.cp, p.ep) == (grid.dp, grid.tp, grid.pp, grid.cp, grid.ep)
        assert model.num_attention_heads % grid.tp == model.num_key_value_heads % grid.tp == 0
        assert grid.pp <= model.num_hidden_layers
        assert grid.cp == 1 or asked.batch.sequence % (2 * grid.cp) == 0
        assert grid.micro * grid.accumulation * grid.dp == sequences == answer.sequences
        batch = placed.answer.run.batch
        assert (batch.micro, batch.accumulation) == (grid.micro, grid.accumulation)
        assert 0 < min_state_bytes(bound, grid) <= placed.answer.bytes.allocated  # none is ruled out that could fit
    refused = sum(reason.grids for reason in answer.refused)
    assert answer.grids == len(answer.placed) + answer.missed + answer.too_large + refused


@few
@given(RUNS, SIZES, st.sampled_from(["gtx-1070-ti", "t4", "rtx-3090"]))
def test_the_fastest_that_fits_is_the_best(fields: dict[str, Any], size: tuple[int, int], gpu: str) -> None:
    asked = run(**fields)
    every = found(asked, *size, gpu=gpu, most=None)
    times = [placed.step.seconds.usual for placed in every.placed]
    assert times == sorted(times)
    assert all(placed.answer.fits for placed in every.placed)
    first = found(asked, *size, gpu=gpu, most=1)
    assert first.best == every.best or (first.best is not None and every.best is not None)
    assert (first.best is None) == (not every.placed)
    if first.best is not None and every.best is not None:
        assert first.best.grid == every.best.grid
        assert first.nearest is None
    elif first.nearest is not None:
        assert first.nearest.answer.verdict.answer != "fits"


@pytest.mark.parametrize("precision", ["pure", "amp", "mixed"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_bound_holds_in_every_precision(precision: str, accumulation: int) -> None:
    asked = run(model="qwen2.5-0.5b", precision=precision, batch={"accumulation": accumulation})
    cluster, bound, answered = cluster_of(H100, 1, 4), known(asked), 0
    for strategy, tp in product(STRATEGIES, (1, 2)):
        grid = ParallelGrid(4 // tp, tp, 1, 1, 1, strategy, 1, accumulation * tp)
        try:
            answer = estimate(run_of(asked, cluster, grid))
        except MemplanError:
            continue
        answered += 1
        assert min_state_bytes(bound, grid) <= answer.bytes.allocated
    assert answered >= 2


@pytest.mark.parametrize("moved", [{"optimizer": True}, {"optimizer": True, "parameters": True}])
def test_the_bound_counts_nothing_that_the_host_keeps(moved: dict[str, bool]) -> None:
    asked = run(parallelism={"offload": moved})
    bound, cluster = known(asked), cluster_of(H100, 1, 4)
    answer = search(asked, cluster, most=None)
    takes = {"fsdp", "fsdp2", "zero3"} if "parameters" in moved else {"zero1", "zero2", "zero3"}
    assert answer.placed
    assert {p.grid.strategy for p in answer.placed} <= takes
    for placed in answer.placed:
        assert placed.answer.run.parallelism.offload == asked.parallelism.offload
        assert min_state_bytes(bound, placed.grid) <= placed.answer.bytes.allocated


def test_the_deepspeed_configuration_is_kept() -> None:
    asked = run(parallelism={"zero": {"reduce_bucket_size": 10**8}})
    answer = search(asked, cluster_of(H100, 1, 2), FixedDegrees(pp=1, cp=1), most=None)
    kept = {p.grid.strategy: p.answer.run.parallelism.zero.reduce_bucket_size for p in answer.placed}
    assert kept["zero2"] == 10**8
    assert kept["fsdp2"] == 5 * 10**8


def test_fixed_degrees_are_respected() -> None:
    answer = found(run(), 2, 4, FixedDegrees(tp=2, pp=1, strategies=("fsdp2",), sequences=16), most=None)
    assert {(p.grid.tp, p.grid.strategy) for p in answer.placed} == {(2, "fsdp2")}
    assert {p.grid.dp * p.grid.accumulation for p in answer.placed} == {16}


def test_refused_grids_are_counted_with_a_reason() -> None:
    answer = found(run(method="qlora"), 1, 2, most=None)
    reasons = {refused.field: refused for refused in answer.refused}
    assert "method.kind" in reasons
    assert all(refused.grids > 0 and refused.reason.startswith(refused.field) for refused in answer.refused)


def test_if_nothing_fits_the_nearest_names_the_missing_memory() -> None:
    answer = found(run(model="llama-3.1-8b"), 1, 2, gpu="3090", most=None)
    assert answer.best is None
    assert answer.nearest is not None
    assert answer.nearest.answer.verdict.answer == "does not fit"
    assert answer.too_large == answer.grids


MISTAKES = {
    (
        1,
        8,
        FixedDegrees(tp=3),
    ): "parallelism.tp: tp 3 does not divide 32 attention heads and 8 key/value heads and 8 GPUs",
    (
        1,
        8,
        FixedDegrees(tp=16, pp=3),
    ): "parallelism.tp: tp 16 does not divide 8 key/value heads and 8 GPUs; pp 3 does not divide 8 GPUs",
    (1, 32, FixedDegrees(pp=32)): "parallelism.pp: pp 32 is more than 16 layers",
    (
        1,
        6,
        FixedDegrees(cp=3),
    ): "parallelism.cp: cp 3 does not divide 2,048 tokens of a sequence, in two parts for each rank,",
    (2, 4, FixedDegrees(ep=2)): "parallelism.ep: ep 2 does not divide 1 experts",
    (2, 4, FixedDegrees(tp=4, pp=4)): "parallelism.world: 2 x 4 = 8 GPUs are not a multiple of tp 4 x pp 4 x cp 1 = 16",
    (
        1,
        2,
        FixedDegrees(tp=1, pp=1, cp=1, sequences=3),
    ): "global_batch: 3 sequences a step do not divide into micro-batches "
    "of 1 for any dp: of 1 x 2 = 2 GPUs, tp 1 x pp 1 x cp 1 leave 2",
}


@pytest.mark.parametrize(("asked", "message"), MISTAKES.items(), ids=[m[:40] for m in MISTAKES.values()])
def test_indivisible_sizes_are_named_factor_by_factor(asked: tuple[int, int, FixedDegrees], message: str) -> None:
    with pytest.raises(SpecError) as raised:
        found(run(), *asked)
    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("nodes", "each", "gbps", "field"),
    [(0, 8, None, "nodes"), (1, 0, None, "gpus"), (9000, 8, None, "nodes"), (1, 8, -1.0, "network_gbps")],
)
def test_impossible_clusters_are_refused(nodes: int, each: int, gbps: float | None, field: str) -> None:
    with pytest.raises(SpecError) as raised:
        cluster_of(H100, nodes, each, gbps)
    assert raised.value.field == field


@ALL
def test_headroom_is_left() -> None:
    asked = run(model="llama-3.1-8b")
    some = found(asked, 1, 8, FixedDegrees(pp=1), most=None, demand=Demand(headroom=40 * GIB))
    assert some.placed
    assert all((p.answer.verdict.headroom or 0) >= 40 * GIB for p in some.placed)
    assert len(some.placed) < len(found(asked, 1, 8, FixedDegrees(pp=1), most=None).placed)


# --- placement of ranks, and their traffic ---


@few
@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
@example(nodes=4, each=3, ranks=4, stride=1)  # groups with three and with two ranks on a node
def test_rank_numbering_decides_how_many_of_a_group_share_a_node(
    nodes: int, each: int, ranks: int, stride: int
) -> None:
    cluster = cluster_of(H100, nodes, each)
    if cluster.world % (ranks * stride):
        return
    told = group(cluster, ranks, stride)
    fewest = ranks
    for first in range(cluster.world):
        block, at = divmod(first, ranks * stride)
        if at >= stride:
            continue
        members = [block * ranks * stride + at + i * stride for i in range(ranks)]
        by_node = {node: sum(member // each == node for member in members) for node in range(nodes)}
        fewest = min(fewest, max(by_node.values()))
    assert told.crosses == (fewest < ranks)
    assert told.near == fewest


def test_tensor_parallel_ranks_lie_next_to_each_other_and_stages_furthest_apart() -> None:
    around = groups(cluster_of(H100, 4, 8), ParallelGrid(4, 4, 2, 1, 1, "fsdp2", 1, 8))
    assert around["tp"] == (4, 1, 4)
    assert around["dp"] == (4, 4, 2)
    assert around["pp"] == (2, 16, 1)
    assert {name for name, among in around.items() if among.ranks > 1 and among.crosses} == {"dp", "pp"}


BARE = known(run(batch={"micro": 2, "sequence": 512}, kernels={"checkpointing": "none"}))
NODE = cluster_of(H100, 1, 8)


def sent(cluster: Cluster, grid: ParallelGrid, of: TrafficFacts = BARE) -> dict[str, Traffic]:
    return {s.kind: s for s in step(of, cluster, grid).sent}


@pytest.mark.parametrize(
    ("strategy", "times"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3), ("fsdp", 3), ("fsdp2", 3)]
)
@pytest.mark.parametrize("n", [2, 8])
def test_replicas_send_the_volume_of_the_zero_paper(strategy: str, times: int, n: int) -> None:
    """Twice the parameters up to stage 2, three times at stage 3 (section 7), less the rank's own n-th."""
    parameters = 1_235_814_400
    assert sent(NODE, ParallelGrid(n, 1, 1, 1, 1, strategy, 2, 1))["dp"].bytes == round(
        times * parameters * 2 * (n - 1) / n
    )


def test_tensor_parallel_ranks_sum_four_times_a_layer() -> None:
    grid = ParallelGrid(1, 8, 1, 1, 1, "none", 2, 3)
    state, logits, layers = 2 * 512 * 2048 * 2, 2 * 512 * 128256 * 2, 16
    whole = (4 * layers + 2) * 2 * state + logits  # two more at embeddings and head, whose logits are gathered
    assert sent(NODE, grid)["tp"].bytes == 3 * whole * 7 // 8
    again = known(run(batch={"micro": 2, "sequence": 512}))
    assert sent(NODE, grid, again)["tp"].bytes == 3 * (whole + 2 * layers * 2 * state) * 7 // 8


def test_a_pipelines_bubble_is_the_papers() -> None:
    took = step(BARE, NODE, ParallelGrid(1, 1, 4, 1, 1, "none", 2, 8))
    assert took.bubble.usual == pytest.approx(took.computing.usual * 3 / 8)
    deeper = step(BARE, NODE, ParallelGrid(1, 1, 4, 1, 1, "none", 2, 8, virtual_stages=2))
    assert deeper.bubble.usual == pytest.approx(deeper.computing.usual * 3 / 16)
    assert {s.kind: s.bytes for s in took.sent} == {"pp": 2 * 8 * 2 * 512 * 2048 * 2}


def test_keys_and_values_go_round_a_ring() -> None:
    grid = ParallelGrid(1, 1, 1, 4, 1, "none", 2, 1)
    keys = 2 * 512 * 2 * 8 * 64 * 2
    assert sent(NODE, grid)["cp"].bytes == 16 * 3 * keys * 3 // 4


def test_tokens_go_to_experts_and_back() -> None:
    moe = known(run(model="qwen3-30b-a3b", batch={"micro": 1, "sequence": 512}, kernels={"checkpointing": "none"}))
    there = sent(NODE, ParallelGrid(8, 1, 1, 1, 8, "fsdp2", 1, 1), moe)
    assert there["ep"].bytes == 48 * 4 * (512 * 8 * 2048 * 2) * 7 // 8
    assert there["dp"].bytes < sent(NODE, ParallelGrid(8, 1, 1, 1, 1, "fsdp2", 1, 1), moe)["dp"].bytes


@few
@given(
    st.sampled_from([(8, 1, 1, 1), (4, 2, 1, 1), (2, 2, 2, 1), (2, 1, 2, 2), (1, 8, 1, 1)]),
    st.sampled_from(["ddp", "zero2", "fsdp2"]),
    st.integers(1, 8),
)
def test_seconds_are_in_order_and_the_network_is_never_faster(
    degrees: tuple[int, int, int, int], strategy: str, passes: int
) -> None:
    grid = ParallelGrid(*degrees, 1, strategy if degrees[0] * degrees[3] > 1 else "none", 2, passes)
    near, far = (step(BARE, cluster_of(H100, *size), grid) for size in ((1, 8), (4, 2)))
    for took in (near, far):
        parts = [took.computing, took.bubble, *(s.shown for s in took.sent)]
        assert took.seconds.usual == pytest.approx(sum(part.usual for part in parts))
        for each in (took.seconds, took.computing, *(s.seconds for s in took.sent)):
            assert 0 <= each.low <= each.usual <= each.high
        for s in took.sent:
            assert all(0 <= shown <= t * 1.0001 for shown, t in zip(s.shown, s.seconds, strict=True))
    assert near.bytes == far.bytes
    assert near.seconds.usual <= far.seconds.usual


def test_a_faster_network_is_never_slower() -> None:
    grid = ParallelGrid(16, 1, 1, 1, 1, "fsdp2", 2, 1)
    took: list[StepTime] = [step(BARE, cluster_of(H100, 2, 8, gbps), grid) for gbps in (10, 100, 400, 3200)]
    seconds = [t.seconds.usual for t in took]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def test_every_card_has_links_with_a_source() -> None:
    for gpu in all_gpus():
        for link in (node_link(gpu, 8), node_link(gpu, 2), network(gpu)):
            assert link.bytes > 0
            assert link.source
            for rate in (link.share, link.hop):
                assert 0 < rate.low <= rate.usual <= rate.high
                assert rate.source
        assert node_link(gpu, 2).bytes >= node_link(gpu, 8).bytes, gpu.name


def test_two_geforce_cards_have_a_bridge_and_eight_do_not() -> None:
    card = find_gpu("3090")
    assert [node_link(card, n).name for n in (2, 4)] == ["NVLink", "PCIe"]
    assert network(H100).bytes == 400e9 / 8
    assert network(H100, 100).bytes == 100e9 / 8
    assert set(EXPOSED) == {"dp", "tp", "pp", "cp", "ep"}


def test_sharing_a_run_between_two_cards_is_estimated() -> None:
    asked = run()
    told = found(asked, 1, 2).together
    there = {"world": 2, "dp": 2}
    each = [
        estimate(run(gpu="h100", parallelism={**there, "strategy": strategy})).bytes.allocated
        for strategy in ("ddp", "fsdp2")
    ]
    assert told == (estimate(run(gpu="h100")).bytes.allocated, *each)


def test_the_bound_divides_by_every_degree_that_divides_the_model() -> None:
    known = traffic_facts(run(), estimate(run()))
    whole = sum(known.held)
    assert (
        min_state_bytes(known, ParallelGrid(1, 2, 2, 1, 1, "none", 1, 1))
        == sum(held // 4 for held in known.held)
        < whole
    )
    assert min_state_bytes(known, ParallelGrid(4, 1, 1, 1, 1, "ddp", 1, 1)) == whole


def test_stages_under_fsdp2_send_weights_and_gradients_once_a_step() -> None:
    """They stay gathered in between, as in torchtitan: see `memplan.program.sharding.fsdp_pipeline`."""
    whole = BARE.weights / 4
    for m in (4, 8):
        message = sent(NODE, ParallelGrid(2, 1, 4, 1, 1, "fsdp2", 1, m))["dp"].bytes
        assert message == round((whole + BARE.trained / 4) / 2)


def test_torchtitans_grids_have_stages_matrices_and_fsdp2_together() -> None:
    """70B on 64 GPUs: torchtitan's own layout is found, with its layers, and no bound ruled it out."""
    asked = run(model="llama-3.1-70b", profile="torchtitan", precision="amp", parallelism={"sequence_parallel": True})
    place = cluster_of(find_gpu("h100"), 8, 8)
    there = search(asked, place, FixedDegrees(tp=8, pp=4, cp=1, ep=1, strategies=("fsdp2",), sequences=32))
    (placed,) = there.placed
    assert (placed.grid.dp, placed.grid.tp, placed.grid.pp, placed.grid.accumulation) == (2, 8, 4, 16)
    assert placed.answer.run.parallelism.sequence_parallel
    bare = asked.model_copy(update={"parallelism": plain_parallelism(asked)})
    assert min_state_bytes(traffic_facts(bare, estimate(bare), asked), placed.grid) <= placed.answer.bytes.allocated


@pytest.mark.parametrize(("profile", "precision"), [("torchtitan", "amp"), ("transformers-5", "pure")])
def test_the_bound_of_stages_under_fsdp2_holds(profile: str, precision: str) -> None:
    """Also for the second stage, whose layers and microbatches in flight are counted."""
    divides = {"sequence_parallel": profile == "torchtitan"}
    asked = run(model="llama-3.1-8b", profile=profile, precision=precision, parallelism=divides)
    bare = asked.model_copy(update={"parallelism": plain_parallelism(asked)})
    bound, cluster = traffic_facts(bare, estimate(bare), asked), cluster_of(H100, 4, 8)
    for tp, pp, passes in ((1, 4, 8), (2, 8, 8), (2, 4, 32), (1, 2, 4)):
        grid = ParallelGrid(32 // (tp * pp), tp, pp, 1, 1, "fsdp2", 1, passes)
        least_of_all = min_state_bytes(bound, grid)
        assert 0 < least_of_all <= estimate(run_of(asked, cluster, grid)).bytes.allocated


def test_the_nearest_is_found_even_if_no_stage_fits() -> None:
    """A stage that does not fit ends the check of a layout, and the nearest is still the one that needs least more."""
    asked = run(model="llama-3.1-70b", profile="torchtitan", precision="amp", parallelism={"sequence_parallel": True})
    there = search(
        asked, cluster_of(find_gpu("h100"), 1, 8), FixedDegrees(tp=2, cp=1, ep=1, strategies=("fsdp2",), sequences=8)
    )
    assert there.best is None
    assert there.nearest is not None
    assert there.missed + there.too_large + sum(r.grids for r in there.refused) == there.grids
