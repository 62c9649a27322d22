"""NCCL's memory: the communicators of a run, and their measured buffers."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import Estimate, RunSpec, estimate
from memplan.catalogue.hardware.overhead import PREDICTION_BAND_OF_RANKS, Communicator, nccl
from memplan.core.units import MIB
from memplan.resolve.communicators import communicators
from memplan.spec.parallelism import Parallelism

KERNELS, BUFFERS = 747, 738  # MiB: 1.28 - 0.55 and 2.0 - 1.28 GiB, as nvidia-smi showed them on 2 GPUs
CONNECTION = 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8 + 4 * MIB


def asked(**parallelism: Any) -> Estimate:
    return estimate(RunSpec(model="llama-3.1-8b", parallelism=parallelism))


@pytest.mark.parametrize(
    ("parallelism", "groups"),
    [
        ({}, []),
        ({"world": 2, "dp": 2, "strategy": "ddp"}, ["dp 2"]),
        ({"world": 16, "dp": 16, "strategy": "fsdp2"}, ["dp 16 across"]),
        ({"world": 16, "dp": 16, "strategy": "fsdp2", "gpus_per_node": 16}, ["dp 16"]),
        (
            {"world": 16, "dp": 16, "strategy": "fsdp", "shard_group": 8},
            ["shard 8", "replicate 2 across", "world 16 across"],
        ),
        ({"world": 8, "tp": 8}, ["tp 8"]),
        ({"world": 16, "dp": 2, "tp": 8, "strategy": "fsdp2"}, ["tp 8", "dp 2 across", "world 16 across"]),
        ({"world": 8, "dp": 2, "cp": 4, "strategy": "fsdp2"}, ["cp 4", "dp-cp 8"]),
        ({"world": 4, "pp": 4}, ["pp 4"]),
        (
            {"world": 16, "dp": 2, "tp": 4, "pp": 2, "strategy": "megatron_dist_opt"},
            ["tp 4", "dp 2", "pp 2 across", "world 16 across"],
        ),
    ],
)
def test_every_way_to_divide_the_work_has_a_communicator(parallelism: dict[str, Any], groups: list[str]) -> None:
    found = communicators(Parallelism(**parallelism))
    assert [f"{c.what} {c.ranks}{' across' * c.spans_nodes}" for c in found] == groups


def test_two_ranks_take_the_measured_buffers() -> None:
    answer = asked(world=2, dp=2, strategy="fsdp2")
    context, kernels, buffers = answer.beside
    assert kernels.usual + buffers.usual == (KERNELS + BUFFERS) * MIB == 1485 * MIB
    assert (kernels.basis, buffers.basis) == ("measured", "measured")
    assert answer.bytes.used - answer.bytes.reserved == sum(row.usual for row in answer.beside)
    assert "CUDA context" in context.what


def test_kernels_load_once_and_every_communicator_has_buffers() -> None:
    rows = nccl([Communicator("tp", 8), Communicator("dp", 2), Communicator("world", 16, spans_nodes=True)])
    assert [row.usual for row in rows] == [KERNELS * MIB, *[BUFFERS * MIB] * 3]
    assert [row.basis for row in rows] == ["measured", "assumed", "assumed", "assumed"]
    assert [row.what for row in rows[1:]] == [
        "NCCL's buffers, tp communicator of 8",
        "NCCL's buffers, dp communicator of 2",
        "NCCL's buffers, world communicator of 16",
    ]
    assert [row.high for row in rows[1:]] == [BUFFERS * MIB * 3 // 2] * 2 + [BUFFERS * MIB * 2]
    assert [row.low for row in rows[1:]] == [BUFFERS * MIB, 2 * CONNECTION, 2 * CONNECTION]
    assert nccl([]) == ()


def test_unmeasured_communicators_widen_the_range() -> None:
    two, eight = (asked(world=n, dp=n, strategy="ddp") for n in (2, 8))
    assert two.bytes.used == eight.bytes.used
    assert two.band.low == eight.band.low
    more = BUFFERS * MIB // 2  # for more than four ranks at most 50 % more
    assert eight.band.high - two.band.high == pytest.approx(more * (1 + PREDICTION_BAND_OF_RANKS.high / 1000), rel=1e-6)


def test_one_process_with_all_gpus_has_no_communicator() -> None:
    assert len(asked(world=4, pp=4, schedule="device_map").beside) == 1
    assert len(asked(world=4, pp=4, schedule="gpipe").beside) == 1 + 2


def test_each_degree_adds_its_buffers_to_used() -> None:
    tp = estimate(RunSpec(model="llama-3.1-8b", parallelism={"world": 2, "tp": 2}))
    both = asked(world=4, dp=2, tp=2, strategy="fsdp2")
    assert len(tp.beside) == 3
    assert len(both.beside) == 5
    context = both.bytes.used - both.bytes.reserved - (tp.bytes.used - tp.bytes.reserved)
    assert context == 2 * BUFFERS * MIB  # dp's and the world's
