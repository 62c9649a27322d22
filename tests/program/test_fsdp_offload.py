"""FSDP with offloaded shards: host memory, what stays on the GPU, and refusals."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from memplan import Estimate, RunSpec, estimate
from memplan.core.errors import SpecError
from memplan.core.units import rounded
from memplan.planning.step_time import work

H, F, V, L = 256, 768, 1000, 4
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 4,
    "vocab_size": V,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
BLOCK = (*[(H, H)] * 4, (F, H), (F, H), (H, F), (H,), (H,))
OUTSIDE = ((V, H), (H,), (V, H))
LORA = {"kind": "lora", "rank": 8}


def run(strategy: str, world: int = 4, moved: bool = True, **fields: Any) -> RunSpec:
    parallelism = {"world": world, "dp": world, "strategy": strategy, "offload": {"parameters": moved}}
    more = fields.pop("parallelism", {})
    defaults: dict[str, Any] = {"model": {"config": LLAMA}, "batch": {"micro": 2, "sequence": 64}}
    return RunSpec(**{**defaults, **fields, "parallelism": {**parallelism, **more}})


def asked(strategy: str, world: int = 4, moved: bool = True, **fields: Any) -> Estimate:
    return estimate(run(strategy, world, moved, **fields))


def power_of_two(n: int) -> int:
    """Return the size torch allocates for pinned memory."""
    power = 1
    while power < n:
        power *= 2
    return power


def part(shape: tuple[int, ...], world: int) -> int:
    """Return the number of elements in the first rank's rows."""
    return -(-shape[0] // world) * prod(shape[1:])


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(("precision", "itemsize"), [("bf16", 2), ("amp", 4)])
def test_fsdp2_keeps_pinned_shards_and_gradients_and_states_on_the_host(
    world: int, precision: str, itemsize: int
) -> None:
    weights = [*BLOCK * L, *OUTSIDE]
    parts = [part(shape, world) * itemsize for shape in weights]
    pinned = sum(map(power_of_two, parts))
    answer = asked("fsdp2", world, precision=precision, optimizer="sgd", loop={"clip_grad_norm": None})
    momentum = asked("fsdp2", world, precision=precision, optimizer={"name": "sgd", "momentum": 0.9})
    assert answer.host_bytes == 2 * pinned
    assert momentum.host_bytes - answer.host_bytes == sum(parts)


def test_fsdp1_pins_full_flat_parameters_and_gradients_of_frozen_ones() -> None:
    block, outside = sum(map(prod, BLOCK)), sum(map(prod, OUTSIDE))
    flat = L * power_of_two(block // 4 * 2) + power_of_two(outside // 4 * 2)
    full = asked("fsdp", optimizer="sgd")
    frozen = asked("fsdp", method={"kind": "freeze", "trainable_layers": 1}, optimizer="sgd")
    assert full.host_bytes == frozen.host_bytes == 2 * flat


@pytest.mark.parametrize("strategy", ["fsdp", "fsdp2"])
@pytest.mark.parametrize("fields", [{}, {"precision": "amp"}, {"method": LORA}], ids=["full", "amp", "lora"])
def test_no_weights_gradients_or_states_are_on_the_gpu_at_the_step(strategy: str, fields: dict[str, Any]) -> None:
    away, here = asked(strategy, **fields), asked(strategy, moved=False, **fields)
    workspaces = sum(line.bytes for line in away.ledger if "workspace" in line.what)
    buffers = 2 * rounded(H // 4 // 2 * 4)  # the rotation's frequencies, twice
    step = next(p.peak for p in away.phases if p.phase == "step")
    assert step - workspaces <= buffers + 4 * 512  # the gradients' norm
    assert away.categories["optstate"] == 0
    assert away.bytes.allocated < here.bytes.allocated
    assert away.host_bytes > here.host_bytes == 0
    assert sum(line.bytes for line in away.ledger) == away.bytes.allocated


def test_only_fsdp1_keeps_gradient_shards_on_the_gpu_until_backward_ends() -> None:
    deep = {**LLAMA, "num_hidden_layers": 40}
    grows = {
        strategy: asked(strategy, model={"config": deep}).bytes.allocated - asked(strategy).bytes.allocated
        for strategy in ("fsdp", "fsdp2")
    }
    inputs = 36 * 2 * 64 * H * 2  # 36 more blocks, each checkpointed
    block = sum(map(prod, BLOCK))
    assert grows["fsdp2"] == inputs
    assert grows["fsdp"] == 36 * rounded(block // 4 * 2)  # at the first block, when the inputs are used up


def test_fsdp2_accumulates_gradients_on_the_host_with_one_shard_in_transit() -> None:
    """Accumulation adds one gradient shard on the host and nothing on the GPU."""
    once = asked("fsdp2", optimizer="sgd")
    more = asked("fsdp2", optimizer="sgd", batch={"micro": 2, "sequence": 64, "accumulation": 4})
    assert more.host_bytes - once.host_bytes == part((V, H), 4) * 2
    assert more.bytes.allocated == once.bytes.allocated


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": "fsdp", "batch": {"accumulation": 2}}, "batch.accumulation: .*loop.trainer"),
        ({"strategy": "fsdp2", "loop": {"grad_scaler": True}}, "loop.grad_scaler: true is not supported yet"),
        ({"strategy": "ddp"}, "parameters with fsdp, fsdp2, zero3"),
        (
            {"strategy": "fsdp2", "moved": False, "parallelism": {"offload": {"optimizer": True}}},
            "FSDP offloads parameters, gradients and states together; set parameters too",
        ),
        ({"strategy": "fsdp2", "parallelism": {"world": 8, "tp": 2}}, "none with tensor parallelism"),
    ],
)
def test_options_unsupported_with_fsdp_offload_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        asked(**fields)


def test_offloading_parameters_and_optimizer_equals_offloading_parameters() -> None:
    both = asked("fsdp2", parallelism={"offload": {"parameters": True, "optimizer": True}})
    assert (both.phases, both.host_bytes) == (asked("fsdp2").phases, asked("fsdp2").host_bytes)


def test_shards_are_copied_in_for_every_pass_and_gradients_out() -> None:
    parts = sum(part(shape, 4) * 2 for shape in (*BLOCK * L, *OUTSIDE))
    assert work(run("fsdp2")).copied == 2 * parts + parts
    kept = work(run("fsdp2", parallelism={"reshard_after_forward": False}))
    assert kept.copied == parts + parts
    three = {"micro": 2, "sequence": 64, "accumulation": 3}
    assert work(run("fsdp2", batch=three)).copied == 3 * 3 * parts
    assert work(run("fsdp2", batch=three, loop={"trainer": True})).copied == 3 * 2 * parts + parts
    assert work(run("fsdp2", optimizer="sgd")).on_host == 2 * 2 * parts


# and NO_SHARD, which shards nothing


def undivided(**fields: Any) -> Estimate:
    return asked("fsdp", moved=False, **{**fields, "parallelism": {"shard_group": 1}})


def test_under_no_shard_every_rank_has_all_and_more_ranks_change_nothing() -> None:
    block, outside = sum(map(prod, BLOCK)), sum(map(prod, OUTSIDE))
    two, eight = (asked("fsdp", n, moved=False, parallelism={"shard_group": 1}) for n in (2, 8))
    assert two.phases == eight.phases
    assert two.categories["parameter"] == 2 * (L * block + outside)
    assert two.categories["optstate"] >= 2 * two.categories["parameter"]
    assert not any("all_gather" in line.where and line.kind == "parameter" for line in two.ledger)


def test_under_mixed_precision_a_unit_is_copied_to_be_computed_in() -> None:
    answer = undivided(precision="amp")
    copies = [line for line in answer.ledger if "as computed in" in line.what]
    assert copies
    assert {line.dtype for line in copies} == {"bf16"}
    assert answer.bytes.allocated > asked("ddp", moved=False, precision="amp").phases[-1].peak / 2


def test_no_shard_exists_only_for_fsdp1() -> None:
    from memplan.resolve.request import spec_of

    said = spec_of({"model": "llama-3.1-8b", "gpus": 8, "fsdp": "no_shard"})["parallelism"]
    assert (said["strategy"], said["shard_group"]) == ("fsdp", 1)
    with pytest.raises(SpecError, match="only FSDP1 supports"):
        asked("fsdp2", moved=False, parallelism={"shard_group": 1})
    with pytest.raises(SpecError, match=r"offloaded parameters|without offloading"):
        asked("fsdp", parallelism={"shard_group": 1})
