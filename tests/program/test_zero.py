"""DeepSpeed's ZeRO: the paper's table, effects of its configuration, and host memory."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate
from math import lcm, prod
from statistics import mean
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.golden import rows
from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.parallelism.sharding import ZeroSettings
from memplan.core.errors import SpecError
from memplan.core.units import ITEMSIZE, rounded
from memplan.engine.storages import COMPUTING, REDUCING
from memplan.program.graph import TensorGroup, operations_of, weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.sharding.megatron import buffers
from memplan.program.sharding.zero import ZeroSharding
from memplan.program.sharding.zero3 import Zero3Sharding
from memplan.program.sharding.zero3_prefetch import gathered_peak
from memplan.program.structure import Structure
from memplan.program.training.program import program
from memplan.resolve.decide import decide
from tests.sampling import examples

laws = settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.too_slow])

PARAMETERS = 8_030_261_248  # llama-3.1-8b
EMBEDDING = 128_256 * 4096
LAYER = 218_112_000  # 2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336 + 2 x 4096
STAGES = ("zero1", "zero2", "zero3")


def spec(
    strategy: str, world: int, offload: tuple[str, ...] = (), zero: dict[str, Any] | None = None, **fields: Any
) -> RunSpec:
    parallelism = {
        "world": world,
        "dp": world,
        "strategy": strategy,
        "offload": dict.fromkeys(offload, True),
        "zero": zero or {},
    }
    run = {"model": "llama-3.1-8b", "precision": "mixed", "optimizer": "adamw_torch", **fields}
    return RunSpec(**run, parallelism=parallelism)


def structure(*args: Any, **fields: Any) -> Structure:
    return decide(spec(*args, **fields)).structure


def answer(*args: Any, **fields: Any) -> Estimate:
    return estimate(spec(*args, **fields))


def zero_of(run: Structure) -> ZeroSharding:
    sharding = sharding_of(run)
    assert isinstance(sharding, ZeroSharding)
    return sharding


def exact(run: Structure, some: Iterable[TensorGroup]) -> int:
    """Return the exact bytes, without an allocator's rounding."""
    axes = operations_of(run.graph)[1]
    return sum(prod(_number(t, axes) for t in h.shape.split()) * ITEMSIZE[h.dtype] * h.copies for h in some)


def _number(term: str, axes: dict[str, int]) -> int:
    return int(term) if term.isdigit() else axes[term]


# the paper's table


def closed(stage: int, numbers: float, world: int, states: int = 12) -> float:
    """Return a rank's bytes. ZeRO (arXiv:1910.02054), figure 1: weights 2, gradients 2 and `states` per parameter."""
    weights = 2 / (world if stage > 2 else 1)
    gradients = 2 / (world if stage > 1 else 1)
    return numbers * (weights + gradients + states / (world if stage > 0 else 1))


def test_the_papers_table_of_seven_and_a_half_billion() -> None:
    """Table 1, in GB to the digits it prints: 7.5B parameters on 64 GPUs, and on one."""
    assert closed(0, 7.5, 1) == 120
    assert [round(closed(stage, 7.5, 64), 1) for stage in (1, 2, 3)] == [31.4, 16.6, 1.9]


@pytest.mark.parametrize("world", [1, 2, 8, 64, 1024])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_rank_holds_the_papers_share_and_padding(stage: int, world: int) -> None:
    """To the byte, with shards of parameters and padding; at stage 2 without the gradients of weights that a rank
    shares with others."""
    run = structure(STAGES[stage - 1], world, zero={"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    own = zero_of(run).partition
    padded = own * world
    weights = sum(n for w, n, _ in weights_of(run.graph) if w.trains)
    assert 0 <= padded - PARAMETERS < (2 * world if stage < 3 else weights * world)
    kept = {
        1: sharding_of(run).accumulated(),
        2: (),
        3: (h for h in sharding_of(run).reduction_buffers() if h.kind == "gradient"),
    }[stage]
    states = sum(prod(s.shape) * ITEMSIZE[s.dtype] * s.count for s in sharding_of(run).optimizer().states if s.shape)
    held = exact(run, (h for h in sharding_of(run).weights() if h.kind == "parameter")) + exact(run, kept) + states
    held += 2 * own if stage == 2 else 0
    whole = {1: 4, 2: 2, 3: 0}[stage] * PARAMETERS
    assert held == whole + {1: 12, 2: 14, 3: 16}[stage] * padded // world
    assert held - closed(stage, PARAMETERS, world) == (16 - whole // PARAMETERS) * (padded - PARAMETERS) / world


# effects of the configuration

RUN: dict[str, Any] = {"model": "llama-3.2-1b", "batch": {"sequence": 64}}


@laws
@given(st.sampled_from(STAGES), st.integers(1, 10**9), st.integers(2, 10**9))
def test_a_larger_bucket_is_never_smaller(strategy: str, small: int, more: int) -> None:
    """The bucket itself; the reduced copy has the size of its contents."""
    peaks = [
        sum(
            h.bytes
            for h in (*sharding_of(run).reduction_buffers(), *sharding_of(run).held_in("backward"))
            if h.what == "bucket of gradients"
        )
        for size in (small, small + more)
        for run in [structure(strategy, 4, zero={"reduce_bucket_size": size}, **RUN)]
    ]
    assert peaks[0] <= peaks[1]


@pytest.mark.parametrize("strategy", STAGES[:2])
def test_overlapping_takes_a_second_bucket_below_stage_three(strategy: str) -> None:
    def buckets(run: Structure) -> int:
        return sum(h.copies * h.bytes for h in sharding_of(run).held_in("backward") if h.what == "bucket of gradients")

    alone, overlapping = (structure(strategy, 4, zero={"overlap_comm": flag}, **RUN) for flag in (False, True))
    assert buckets(overlapping) == 2 * buckets(alone) == pytest.approx(2 * 2 * 500_000_000, abs=1024)
    without = structure(strategy, 4, zero={"contiguous_gradients": False}, **RUN)
    assert buckets(without) == 0


def test_a_rank_keeps_the_gradients_of_weights_that_are_others_in_part() -> None:
    """On 64 ranks the embeddings span five partitions, and each of those ranks has their full gradient."""
    run = structure("zero2", 64)
    (kept,) = sharding_of(run).accumulated()
    own = zero_of(run).partition
    assert own < EMBEDDING
    assert EMBEDDING + own // 2 < int(kept.shape) < EMBEDDING + 2 * own


def test_a_gradient_larger_than_the_bucket_waits_outside_it() -> None:
    found = {h.what: h.bytes for h in sharding_of(structure("zero3", 8)).held_in("backward")}
    assert found["bucket as it is reduced"] == 2 * EMBEDDING  # 5e8 numbers, divisible by 8 ranks: no copy
    larger = structure("zero3", 8, zero={"reduce_bucket_size": 600_000_000})
    found = {h.what: h.bytes for h in sharding_of(larger).held_in("backward")}
    assert 2 * EMBEDDING < found["bucket as it is reduced"] <= 2 * 600_000_000


def test_auto_is_of_the_hidden_size_and_the_trainers() -> None:
    auto = {
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
    }
    knobs = structure("zero3", 4, zero=auto, loop={"trainer": True}).ranks.knobs
    assert knobs.reduce_bucket == 4096**2
    assert knobs.prefetch == int(0.9 * 4096 * 4096)
    assert knobs.persistent == 10 * 4096
    with pytest.raises(SpecError, match=r"loop\.trainer"):
        structure("zero3", 4, zero=auto)


def test_sub_groups_collect_partitions_up_to_their_size() -> None:
    run = structure("zero3", 8, zero={"sub_group_size": 100_000_000})
    layers = -(-(100_000_000 - EMBEDDING // 8) // (LAYER // 8))
    assert 100_000_000 <= zero_of(run).updated_at_once < EMBEDDING // 8 + (layers + 1) * LAYER // 8
    assert answer("zero3", 8, zero={"sub_group_size": 100_000_000}).phases[-1].peak < answer("zero3", 8).phases[-1].peak
    sharding = zero_of(run)
    assert isinstance(sharding, Zero3Sharding)
    moments = [s.bytes for s in sharding.optimizer().states if s.what == "exp_avg"]
    assert moments == [rounded(4 * numbers) for numbers in sharding.sub_groups]
    assert len(moments) == -(-sharding.partition // sharding.updated_at_once)


# gathered weights


def gathered(zero: dict[str, Any], **fields: Any) -> dict[str, int]:
    run = structure("zero3", 8, zero=zero, **fields)
    return {phase: found.weights + found.written for phase, found in gathered_peak(run.graph, run.ranks).items()}


def test_nothing_fetched_ahead_and_nothing_kept_is_one_module_at_a_time() -> None:
    """The largest module is the head; within a layer, one of the FFN's matrices."""
    found = gathered({"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0})
    assert found["forward"] == found["backward"] == 2 * EMBEDDING


def test_weights_reused_within_the_reuse_distance_stay_gathered() -> None:
    """Norms are below the threshold, so they are never sharded."""
    found = gathered({"stage3_max_reuse_distance": 10**11, "stage3_max_live_parameters": 10**11})
    norms = 65 * 4096
    assert 2 * (PARAMETERS - norms) <= found["backward"] < 2 * (PARAMETERS - norms + 2 * EMBEDDING)


def test_a_weight_reused_within_the_reuse_distance_stays_gathered() -> None:
    """Between the last layer's down_proj and its backward run the last norm and the head, forward and backward."""
    between = 2 * (4096 + EMBEDDING)
    kernels = {"checkpointing": "none"}
    at, within = (
        gathered({"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": distance}, kernels=kernels)
        for distance in (between, between + 1)
    )
    assert at["loss"] == 2 * EMBEDDING  # the head's own backward is next
    assert within["loss"] == 2 * (EMBEDDING + 14336 * 4096)


@laws
@given(st.integers(0, 10**9), st.integers(0, 2 * 10**9), st.sampled_from(["none", "full"]))
def test_gathered_weights_and_messages_never_exceed_the_model(prefetch: int, reuse: int, checkpointing: str) -> None:
    run = structure("zero3", 4, **RUN, kernels={"checkpointing": checkpointing})
    numbers = program(run).counts.total
    for found in gathered_peak(
        run.graph, run.ranks._replace(knobs=ZeroSettings(prefetch=prefetch, reuse=reuse, live=10**12))
    ).values():
        assert 0 <= found.weights <= 2 * numbers
        assert 0 <= found.written <= 2 * numbers


def test_a_loss_that_multiplies_by_the_head_has_it_whole_throughout() -> None:
    zero = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    plain, fused = gathered(zero), gathered(zero, kernels={"loss": "fused"})
    assert fused["loss"] == 2 * EMBEDDING
    assert fused["forward"] == plain["forward"] + 2 * EMBEDDING  # plus the embeddings


# host memory

GIB = 2**30


def test_the_host_has_deepspeeds_pinned_buffers_and_states() -> None:
    """With 8B on 8 ranks a partition has 1.004e9 numbers: pinned memory is rounded up to a power of two."""
    own = PARAMETERS // 8
    moved = answer("zero2", 8, ("optimizer",))
    pinned = 4 * GIB + 4 * GIB + 2 * GIB + GIB  # fp32 weights and gradients, bf16 weights, the largest gradient
    assert moved.host_bytes == pinned + 2 * 4 * own
    free = answer("zero2", 8, ("optimizer",), {"offload_optimizer": {"pin_memory": False}})
    assert free.host_bytes == (4 + 4 + 2 + 8) * own + 2 * EMBEDDING


def test_at_stage_three_only_gradients_are_pinned() -> None:
    own = PARAMETERS // 8
    moved = answer("zero3", 8, ("optimizer",), {"offload_optimizer": {"pin_memory": False}})
    assert moved.host_bytes == (2 + 4 + 4 + 8) * own
    pinned = answer("zero3", 8, ("optimizer",))
    # the sub-group of 1e9 numbers and the rest are pinned separately
    assert pinned.host_bytes - (4 + 8) * own == pytest.approx(2 * GIB + 4 * GIB + 4 * (own - 10**9), abs=3 * GIB)


def test_nvme_leaves_buffers_in_host_memory() -> None:
    zero = {"offload_optimizer": {"device": "nvme", "buffer_count": 5}, "sub_group_size": 10**8}
    run = structure("zero3", 8, ("optimizer",), zero)
    found = {h.what: h.bytes * h.copies for h in sharding_of(run).host()}
    assert found["buffer of a sub-group on NVMe"] == 5 * 4 * zero_of(run).updated_at_once
    assert not any(h.kind == "optstate" for h in sharding_of(run).host())
    on_cpu = answer("zero3", 8, ("optimizer",), {"sub_group_size": 10**8})
    assert answer("zero3", 8, ("optimizer",), zero).host_bytes < on_cpu.host_bytes


def test_offloaded_parameters_leave_the_gpu() -> None:
    here, away = answer("zero3", 8, ("optimizer",)), answer("zero3", 8, ("optimizer", "parameters"))
    saved = here.categories["parameter"] - away.categories["parameter"]
    assert saved == pytest.approx(2 * PARAMETERS / 8, rel=1e-3)
    assert away.host_bytes - here.host_bytes == 2 * GIB  # 2.008e9 bytes


@laws
@given(st.sampled_from(STAGES), st.integers(2, 64), st.sampled_from(["full", "lora"]))
def test_the_gpu_holds_less_with_the_optimizer_on_the_host(strategy: str, world: int, method: str) -> None:
    fields = {**RUN, "method": method}
    here, away = answer(strategy, world, **fields), answer(strategy, world, ("optimizer",), **fields)
    assert away.host_bytes > 0 == here.host_bytes
    assert away.categories["optstate"] == 0
    steps = [next(p.peak for p in a.phases if p.phase == "step") for a in (away, here)]
    assert steps[0] < steps[1]
    assert sum(line.bytes for line in away.ledger) == away.bytes.allocated


def test_one_rank_gathers_weights_in_place_unless_the_host_has_them() -> None:
    """The published step that ran out of an A100's memory had 46 GB before it, and 61 after backward
    (OpenRLHF/OpenRLHF#698): 6 and 8 bytes a parameter."""
    one, away = structure("zero3", 1), structure("zero3", 1, ("parameters",))
    assert all(peak == (0, 0) for peak in gathered_peak(one.graph, one.ranks).values())
    held = [h for h in sharding_of(one).weights() if h.kind == "parameter"]
    assert exact(one, held) == 6 * PARAMETERS  # no weight is whole in addition
    assert max(sum(peak) for peak in gathered_peak(away.graph, away.ranks).values()) >= 2 * EMBEDDING
    ends = {phase.phase: phase.peak for phase in answer("zero2", 1, batch={"sequence": 128}).phases if phase.step == 1}
    assert ends["forward"] == pytest.approx(6 * PARAMETERS, rel=0.01)
    assert ends["step"] > 79 * GIB


def test_a_fully_loaded_model_is_on_the_gpu_before_it_is_sharded() -> None:
    divided, at_once = (answer("zero3", 8, zero={"zero3_init_flag": flag}) for flag in (True, False))
    assert at_once.phases[0].peak == pytest.approx(2 * PARAMETERS, rel=0.01)
    made = 2 + 2 * 4  # its shard; the fp32 partition with a copy, or with zero gradients
    assert divided.phases[0].peak == pytest.approx(made * PARAMETERS / 8, rel=0.01)
    assert at_once.phases[1:] == divided.phases[1:]


def test_weights_are_flattened_on_the_host_if_two_copies_do_not_fit() -> None:
    """8B in bf16 is 15 GiB: 48 GB have room for 30, 24 GB do not. Both hold the same afterwards.

    The partition is copied on its way to the host.
    """
    large, small = (answer("zero2", 8, ("optimizer",), gpu=gpu) for gpu in ("a40", "rtx-3090"))
    assert large.phases[0].peak == pytest.approx(4 * PARAMETERS, rel=0.01)
    assert small.phases[0].peak == pytest.approx(2 * PARAMETERS * (1 + 1 / 8), rel=0.01)
    assert large.phases[1].peak == small.phases[1].peak


REFUSED: list[tuple[str, int, tuple[str, ...], dict[str, Any], str, str]] = [
    ("ddp", 2, (), {"reduce_bucket_size": 5}, "parallelism.zero", "zero1, zero2, zero3"),
    ("zero2", 2, (), {"sub_group_size": 5}, "parallelism.zero.sub_group_size", "zero3"),
    ("zero3", 2, (), {"round_robin_gradients": True}, "parallelism.zero.round_robin_gradients", "zero1"),
    ("zero2", 2, ("parameters",), {}, "parallelism.offload", "zero3"),
    ("fsdp2", 2, ("optimizer",), {}, "parallelism.offload", "set parameters"),
    ("ddp", 2, ("optimizer",), {}, "parallelism.offload", "zero1"),
    ("zero0", 1, ("optimizer",), {}, "parallelism.offload", "zero1"),
    ("zero0", 2, (), {"reduce_bucket_size": 5}, "parallelism.zero", "zero1, zero2, zero3"),
    ("zero3", 2, (), {"offload_param": {"pin_memory": False}}, "parallelism.zero.offload_param", "offload"),
    (
        "zero2",
        2,
        ("optimizer",),
        {"offload_optimizer": {"device": "nvme"}},
        "parallelism.zero.offload_optimizer.device",
        "zero3",
    ),
]


@pytest.mark.parametrize(("strategy", "world", "offload", "zero", "field", "word"), REFUSED)
def test_options_unsupported_by_deepspeed_are_refused(
    strategy: str, world: int, offload: tuple[str, ...], zero: dict[str, Any], field: str, word: str
) -> None:
    with pytest.raises(SpecError) as caught:
        answer(strategy, world, offload, zero, precision="bf16")
    assert caught.value.field == field
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_optimizer_that_deepspeed_does_not_step_on_the_host_is_refused() -> None:
    with pytest.raises(SpecError, match="adamw_torch"):
        answer("zero2", 2, ("optimizer",), optimizer="sgd")


# published runs


RESERVED = rows("ranks_reserved.jsonl")


@pytest.mark.parametrize("row", RESERVED, ids=lambda row: row["id"])
def test_torchs_reserved_memory_under_zero_is_met(row: dict[str, Any]) -> None:
    """For the entire process, including loading. One segment of a large block is 1 % of the largest."""
    a = estimate(RunSpec(**row["run"]))
    assert row["source"].startswith("https://")
    assert a.bytes.allocated < row["reserved"]
    assert abs(a.bytes.reserved - row["reserved"]) <= 0.015 * row["reserved"] + row["digits"] / 2


def test_reserved_memory_under_zero_has_one_per_cent_mean_error() -> None:
    errors = [abs(estimate(RunSpec(**row["run"])).bytes.reserved / row["reserved"] - 1) for row in RESERVED]
    assert len(errors) == 12
    assert mean(errors) < 0.01


# streams


def test_the_gathered_peak_is_the_largest_set_alive_at_once() -> None:
    """Its events in order reach the maximum that `held_in` counts, and nothing at the end."""
    run = structure("zero3", 8)
    _, events, most, bytes_ = sharding_of(run).gathering()
    sizes = {number: size for number, size in events if size}
    live = list(accumulate(size or -sizes[number] for number, size in events))
    assert live[most - 1] == max(live) == bytes_
    assert live[-1] == 0
    assert bytes_ == max(w.weights + w.written for w in gathered_peak(run.graph, run.ranks).values())


@pytest.mark.parametrize("strategy", STAGES)
def test_without_overlap_nothing_runs_on_another_stream(strategy: str) -> None:
    together, apart = (structure(strategy, 8, zero={"overlap_comm": flag}) for flag in (False, True))
    assert {stream for stream, bytes_ in sharding_of(together).reduction_streams() if bytes_} == {COMPUTING}
    assert REDUCING in {stream for stream, bytes_ in sharding_of(apart).reduction_streams() if bytes_}
    assert sharding_of(together).idle_in_streams() == 0 < sharding_of(apart).idle_in_streams()


def test_a_gradient_outside_buckets_waits_in_place() -> None:
    """Those of head and embeddings have 525,336,576 numbers, but a bucket has 500,000,000."""
    run = structure("zero3", 8)
    assert len(sharding_of(run).late_gradients()) == 2
    assert sum(bytes_ for stream, bytes_ in sharding_of(run).reduction_streams() if stream == COMPUTING) == 0
    wider = structure("zero3", 8, zero={"reduce_bucket_size": EMBEDDING})
    assert sharding_of(wider).late_gradients() == frozenset()


def test_flattened_weights_free_their_original_segments() -> None:
    """Below stage 3 they were loaded one by one: their blocks are free when the first step begins, and the flat copy
    stays."""
    run = structure("zero2", 8)
    alive: dict[int, int] = {}
    for number, bytes_ in sharding_of(run).loading_events():
        if bytes_:
            alive[number] = bytes_
        else:
            alive.pop(number, None)
    assert max(alive.values()) == 2 * 8 * zero_of(run).partition
    assert len(alive) < 10


# Megatron's distributed optimizer


@pytest.mark.parametrize("world", [2, 8, 24, 512])
def test_megatron_divides_twelve_bytes_of_eighteen(world: int) -> None:
    """bf16 weights 2 and fp32 main gradients 4 in full; master and both moments 12 of a shard, including padding.

    Weights start at multiples of 64, and their total is padded to a multiple of 128 and of the ranks.
    """
    run = structure("megatron_dist_opt", world)
    whole = sum(b.numbers for b in buffers(run.graph, run.ranks))
    weights = sum(n for w, n, _ in weights_of(run.graph) if w.trains)
    assert whole % world == whole % 128 == 0
    assert 0 <= whole - PARAMETERS < 64 * weights + lcm(world, 128)
    states = sum(prod(s.shape) * ITEMSIZE[s.dtype] * s.count for s in sharding_of(run).optimizer().states)
    held = exact(run, (h for h in sharding_of(run).weights() if h.kind == "parameter"))
    assert held == 2 * whole
    assert exact(run, sharding_of(run).gradients()) == 4 * whole
    assert states == 12 * whole // world


def test_replicas_with_fp32_gradients_and_masters_have_eighteen_bytes_a_parameter() -> None:
    precision = {"weights": "bf16", "grads": "fp32", "master": "fp32"}
    run = structure("ddp", 8, precision=precision)
    held = exact(run, (h for h in (*sharding_of(run).weights(), *sharding_of(run).gradients()) if h.kind != "buffer"))
    assert held + sum(prod(s.shape) * 4 * s.count for s in sharding_of(run).optimizer().states) == 18 * PARAMETERS


@laws
@given(st.integers(2, 64), st.integers(1, 4), st.sampled_from(["adamw_torch", "sgd"]))
def test_more_ranks_never_hold_more_under_megatron(world: int, times: int, optimizer: str) -> None:
    few, many = (answer("megatron_dist_opt", n, optimizer=optimizer, **RUN) for n in (world, world * times))
    padding = 6 * lcm(world * times, 128)
    assert many.bytes.allocated <= few.bytes.allocated + padding
    assert sum(line.bytes for line in few.ledger) == few.bytes.allocated


def test_one_gpu_is_the_plain_estimate_under_megatron() -> None:
    assert answer("megatron_dist_opt", 1, **RUN).phases == answer("none", 1, **RUN).phases


def test_the_main_gradients_stay_and_nothing_is_gathered_apart() -> None:
    a = answer("megatron_dist_opt", 8, optimizer="adamw_torch_fused")
    by = {p.phase: p.peak for p in a.phases if p.step in (2, None)}
    fixed = 6 * PARAMETERS + 12 * PARAMETERS // 8
    assert by["step"] == pytest.approx(fixed, rel=0.01)
    assert by["load"] == pytest.approx(8 * PARAMETERS, rel=0.01)


# adapters, quantised weights, small states


@pytest.mark.parametrize("storage", ["uint8", "bf16"])
@pytest.mark.parametrize("world", [2, 8])
def test_stage_three_divides_packed_weights_and_not_their_scales(storage: str, world: int) -> None:
    """nf4: half a byte per number, a one-byte absmax per 64, and a 4-byte one per 256 of those."""
    method = {"kind": "qlora", "quantization": {"storage": storage}}
    whole_, divided = (structure(name, world, method=method) for name in ("zero2", "zero3"))
    linear = PARAMETERS - 2 * EMBEDDING - 65 * 4096

    def of(run: Structure, *words: str) -> int:
        return sum(h.bytes * h.copies for h in sharding_of(run).weights() if all(word in h.what for word in words))

    packed = sum(
        h.bytes * h.copies
        for h in sharding_of(divided).weights()
        if h.dtype == storage and "proj.weight, one of" in h.what
    )
    assert of(whole_, "(packed)") == linear // 2
    assert packed == pytest.approx(linear / 2 / world, rel=1e-4)
    assert of(divided, "absmax") == of(whole_, "absmax") > 0


def test_adapters_are_in_the_dtype_of_all_and_their_masters_divided() -> None:
    run = structure("zero2", 4, method={"kind": "lora", "rank": 8})
    (master,) = (h for h in sharding_of(run).weights() if "fp32 partition" in h.what)
    trained = program(run).counts.trainable
    assert 0 <= 4 * int(master.shape) - trained < 8
    assert {h.dtype for h in sharding_of(run).weights() if "lora" in h.what} == {"bf16"}


@pytest.mark.parametrize("kind", ["freeze", "dora", "qdora"])
def test_only_trained_weights_are_partitioned_with_any_method(kind: str) -> None:
    run = structure("zero2", 4, **{**RUN, "method": kind})
    (master,) = (h for h in sharding_of(run).weights() if "fp32 partition" in h.what)
    assert 0 <= 4 * int(master.shape) - program(run).counts.trainable < 8


@pytest.mark.parametrize(("name", "moments"), [("adamw_8bit", 2), ("lion_8bit", 1)])
def test_eight_bit_states_are_of_the_flat_partition(name: str, moments: int) -> None:
    """One byte per number and an fp32 absmax per 256; no exception for small weights or embeddings."""
    run = structure("zero2", 8, optimizer=name)
    own = zero_of(run).partition
    states = sum(s.bytes * s.count for s in sharding_of(run).optimizer().states if s.shape and s.bytes > 10**5)
    assert states == pytest.approx(moments * own * (1 + 4 / 256), rel=1e-4)


@pytest.mark.parametrize(
    ("strategy", "checkpointing", "field"),
    [
        ("zero1", "full", None),
        ("zero2", "full", None),
        ("zero3", "full", None),
        ("ddp", "none", None),
        ("ddp", "full", "parallelism.find_unused_parameters"),
    ],
)
def test_a_tower_without_images_is_divided_but_gets_no_gradients(
    strategy: str, checkpointing: str, field: str | None
) -> None:
    """DeepSpeed's partitions and DDP's buckets are of all trainable weights; DDP leaves the others' gradients None."""
    parallelism = {"world": 2, "dp": 2, "strategy": strategy}
    run = RunSpec(model="qwen3-vl-2b", parallelism=parallelism, kernels={"checkpointing": checkpointing})
    if field is not None:
        with pytest.raises(SpecError) as caught:
            estimate(run)
        assert caught.value.field == field
        return
    structure = decide(run).structure
    trainable, sharding = program(structure).counts.trainable, sharding_of(structure)
    if strategy == "ddp":
        held = sum(h.bytes * h.copies for h in sharding.reduction_buffers())
        assert 0 <= held - 2 * trainable < 512 * 200
        assert not any("visual" in h.what for h in sharding.gradients())
    else:
        assert 0 <= 2 * zero_of(structure).partition - trainable < 1000
        images = RunSpec(**{**run.model_dump(), "batch": {"images": 1, "image_size": 448}})
        assert zero_of(decide(images).structure).partition == zero_of(structure).partition


@pytest.mark.parametrize(
    ("profile", "reentrant", "waits"), [("trl-1.15", False, False), ("trl-1.15", True, True), ("trl-1.13", False, True)]
)
def test_a_profile_says_whether_ddp_waits_for_a_tower(profile: str, reentrant: bool, waits: bool) -> None:
    run = RunSpec(
        model="qwen3-vl-2b",
        profile=profile,
        parallelism={"world": 2, "dp": 2, "strategy": "ddp"},
        kernels={"checkpointing": "full", "reentrant": reentrant},
    )
    found = None
    try:
        estimate(run)
    except SpecError as error:
        found = error.field
    assert found == ("parallelism.find_unused_parameters" if waits else None)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"method": "dora"}, "method.kind"),
        ({"method": {"kind": "qlora", "quantization": {"storage": "fp32"}}}, "method.quantization.storage"),
        (
            {"method": {"kind": "qlora", "quantization": {"kbit_preparation": True}}},
            "method.quantization.kbit_preparation",
        ),
        ({"optimizer": "paged_adamw_8bit"}, "optimizer.name"),
    ],
)
def test_models_that_deepspeed_partitions_wrongly_are_refused(fields: dict[str, Any], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        answer("zero3", 2, **fields)
    assert caught.value.field == field
