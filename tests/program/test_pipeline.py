"""Pipelines: the memory of each stage, microbatches in flight, and comparison with torch's schedules."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from memplan import Estimate, RunSpec, estimate, find_model
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.catalogue.parallelism.pipeline import ENGINES, moments, most_in_flight, order, warm_up
from memplan.catalogue.parallelism.pipeline_stages import divide_by_device_map, split
from memplan.core.errors import SpecError
from memplan.engine.walk import alive, size
from memplan.planning.step_time import work
from memplan.program.graph import lower_training, operations_of, weights_of
from memplan.program.sharding.choice import sharding_of
from memplan.program.training.pipeline import every_stage, parameters_of
from memplan.program.training.program import program
from memplan.resolve.decide import decide
from tests.sampling import examples
from tests.tiny import TINY

laws = settings(max_examples=examples(12), deadline=None, suppress_health_check=[HealthCheck.too_slow])

GOLDEN = Path(__file__).parents[1] / "golden" / "traced_pipeline.jsonl"
TRACED = [row for row in map(json.loads, GOLDEN.read_text("utf-8").splitlines()) if "peaks" in row]
MEGATRON = {"profile": "megatron-core"}
TITAN = {"profile": "torchtitan"}


def piped(pp: int, microbatches: int, fields: dict[str, Any] | None = None, **parallelism: Any) -> Estimate:
    fields = {"model": "llama-3.2-1b", **(fields or {})}
    batch = {"sequence": 128, **fields.pop("batch", {}), "accumulation": microbatches}
    world = pp * parallelism.get("dp", 1)
    return estimate(RunSpec(**fields, batch=batch, parallelism={"world": world, "pp": pp, **parallelism}))


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a run and a pipeline that divides its layers."""
    profile = draw(st.sampled_from(["megatron-core", "torchtitan"]))
    pp = draw(st.sampled_from([2, 4]))
    chunks = draw(st.sampled_from([1, 1, 2]))
    schedule = draw(st.sampled_from(["1f1b", "gpipe"])) if profile == "torchtitan" and chunks == 1 else "1f1b"
    microbatches = pp * draw(st.integers(1, 3))
    dp = draw(st.sampled_from([1, 2, 4]))
    precision = draw(st.sampled_from(["pure", "amp", {"weights": "bf16", "grads": "fp32", "master": "fp32"}]))
    replicated = ["ddp", "fsdp2"] if profile == "torchtitan" and isinstance(precision, str) else ["ddp"]
    return {
        "model": draw(st.sampled_from(["llama-3.2-1b", "gemma-3-1b", "qwen3-0.6b", "olmoe-1b-7b"]))
        if profile == "torchtitan" and chunks == 1
        else "llama-3.2-1b",
        "profile": profile if profile == "megatron-core" else draw(st.sampled_from(["torchtitan", "transformers-5"])),
        "method": draw(st.sampled_from(["full", "lora"])),
        "precision": precision,
        "optimizer": draw(st.sampled_from(["adamw_torch", "sgd", "none"])),
        "kernels": {"checkpointing": draw(st.sampled_from(["none", "full"]))},
        "batch": {
            "micro": draw(st.integers(1, 2)),
            "sequence": draw(st.integers(1, 300)),
            "accumulation": microbatches,
        },
        "parallelism": {
            "world": pp * dp,
            "dp": dp,
            "strategy": draw(st.sampled_from(replicated)) if dp > 1 else "none",
            "pp": pp,
            "virtual_stages": chunks,
            "schedule": schedule,
            "stage": draw(st.integers(0, pp - 1)),
        },
    }


def of_experts(run: dict[str, Any]) -> dict[str, Any]:
    """Return the run, for mixtures with transformers' profile: torchtitan's does not support their experts."""
    return {**run, "profile": "transformers-5"} if run["model"] == "olmoe-1b-7b" else run


@laws
@given(runs())
def test_the_ledger_of_a_stage_sums_to_its_peak(run: dict[str, Any]) -> None:
    a = estimate(RunSpec(**of_experts(run)))
    assert sum(line.bytes for line in a.ledger) == a.bytes.allocated == max(p.peak for p in a.phases)
    assert max(p.peak for p in a.timeline) <= a.bytes.allocated
    assert [sum(kinds.values()) for kinds in a.timeline_kinds] == [moment.peak for moment in a.timeline]
    assert a.bytes.allocated <= a.bytes.reserved <= a.bytes.used


@laws
@given(runs())
def test_the_stages_together_have_the_models_parameters(run: dict[str, Any]) -> None:
    """Each once, except tied embeddings, which the first and the last stage have."""
    structure = decide(RunSpec(**of_experts(run))).structure
    model = structure.graph.model
    twice = model.vocab_size * model.hidden_size if model.tie_word_embeddings else 0
    assert sum(map(parameters_of, every_stage(structure))) == program(structure).counts.total + twice


@pytest.mark.parametrize("profile", ["transformers-5", "megatron-core", "torchtitan"])
def test_a_pipeline_of_one_stage_is_the_plain_estimate(profile: str) -> None:
    plain = estimate(RunSpec(model="llama-3.2-1b", profile=profile, batch={"accumulation": 3}))
    one = piped(1, 3, {"profile": profile, "batch": {"sequence": 2048}}, stage=0)
    assert (one.bytes, one.ledger, one.phases, one.ranks) == (plain.bytes, plain.ledger, plain.phases, ())


def test_only_the_first_stage_embeds_and_only_the_last_has_the_loss() -> None:
    structure = decide(
        RunSpec(model="llama-3.1-8b", parallelism={"world": 4, "pp": 4}, batch={"accumulation": 4}, **TITAN)
    ).structure
    outside = [{w.name for w, _, where in weights_of(s.graph) if not where} for s in every_stage(structure)]
    assert outside == [{"tok_embeddings.weight"}, set(), set(), {"norm.weight", "lm_head.weight"}]
    run = RunSpec(model="qwen3-8b", parallelism={"world": 4, "pp": 4}, batch={"accumulation": 4}, **TITAN)
    outside = [{w.name for w, _, where in weights_of(s.graph) if not where} for s in every_stage(decide(run).structure)]
    buffers = {f"model.rotary_emb.{name}" for name in ("inv_freq", "original_inv_freq")}
    assert [names - buffers for names in outside] == [
        {"model.embed_tokens.weight"},
        set(),
        set(),
        {"model.norm.weight", "lm_head.weight"},
    ]
    assert all(buffers <= names for names in outside)
    losses = [any(p.phase == "loss" for p in piped(4, 4, TITAN, stage=i).phases) for i in range(4)]
    assert losses == [False, False, False, True]


def test_layers_are_divided_as_each_library_divides_them() -> None:
    megatron, torch = ENGINES["megatron"], ENGINES["torch"]
    assert split(megatron, 32, 4, 1, None, None) == (8, 8, 8, 8)
    assert split(megatron, 32, 4, 2, None, None) == (4,) * 8
    assert split(megatron, 30, 4, 1, 7, 7) == (7, 8, 8, 7)
    assert split(megatron, 126, 16, 1, 7, 7) == (7, *[8] * 14, 7)
    assert split(megatron, 14, 2, 2, None, 6) == (4, 3, 4, 3)
    # 32 layers plus embeddings and head are 34: 9, 9, 8 and 8
    assert split(torch, 32, 4, 1, None, None) == (9 - 1, 9, 8, 8 - 1)
    assert split(torch, 32, 2, 2, None, None) == (9 - 1, 9, 8, 8 - 1)
    assert split(torch, 32, 4, 1, 5, None) == (5, 9, 9, 9)
    # account_for_embedding_in_pipeline_split and account_for_loss_in_pipeline_split: 126 + 2 = 16 x 8
    assert split(megatron, 126, 16, 1, None, None, ends=True) == (8 - 1, *[8] * 14, 8 - 1)
    assert split(megatron, 126, 8, 4, None, None, ends=True) == (4 - 1, *[4] * 30, 4 - 1)
    assert split(torch, 30, 4, 1, None, None, ends=False) == (8, 8, 7, 7)


@pytest.mark.parametrize("microbatches", [1, 3, 8, 32])
def test_1f1b_has_one_microbatch_in_flight_per_remaining_stage(microbatches: int) -> None:
    """megatron-core's forward_backward_pipelining_without_interleaving: a stage of p runs p - 1 - i forward passes
    before the one that its first backward pass follows."""
    for stage in range(8):
        warm_up = min(8 - 1 - stage, microbatches)
        assert most_in_flight("1f1b", 8, stage, 1, microbatches) == min(warm_up + 1, microbatches)
        assert most_in_flight("gpipe", 8, stage, 1, microbatches) == microbatches


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches"), [(4, 2, 8), (4, 2, 4), (2, 3, 6), (8, 4, 16), (4, 5, 40)]
)
def test_interleaved_1f1b_warms_up_as_megatron_does(stages: int, chunks: int, microbatches: int) -> None:
    """get_pp_rank_microbatches: (p - i - 1) * 2 + (v - 1) * p passes, and all where those are fewer."""
    every = microbatches * chunks
    for stage in range(stages):
        warm_up = min((stages - stage - 1) * 2 + (chunks - 1) * stages, every)
        assert most_in_flight("1f1b", stages, stage, chunks, microbatches) == min(warm_up + 1, every)
        passes = [*order("1f1b", stages, stage, chunks, microbatches)]
        assert [backward for backward, _ in passes].index(True) == min(warm_up + 1, every)
        for chunk in range(chunks):
            assert passes.count((False, chunk)) == passes.count((True, chunk)) == microbatches


@pytest.mark.torch
@pytest.mark.parametrize(("stages", "chunks", "microbatches"), [(4, 2, 8), (4, 2, 10), (4, 3, 3), (2, 2, 4), (8, 2, 8)])
def test_interleaved_1f1b_is_torchs_order(stages: int, chunks: int, microbatches: int) -> None:
    schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
    rounds = max(1, microbatches // stages)
    for rank in range(stages):
        torchs = object.__new__(schedules.ScheduleInterleaved1F1B)
        torchs.n_local_stages, torchs.pp_group_size, torchs._n_microbatches = chunks, stages, microbatches
        torchs.number_of_rounds, torchs.microbatches_per_round = rounds, microbatches // rounds
        actions = [a for a in torchs._calculate_single_rank_operations(rank) if a is not None]
        words = {"FORWARD": False, "FULL_BACKWARD": True}
        found = [
            (words[a.computation_type.name], a.stage_index // stages)
            for a in actions
            if a.computation_type.name in words
        ]
        assert found == [*order("1f1b", stages, rank, chunks, microbatches)]


def kept_of_layers(graph: Any, times: int) -> int:
    """Return the bytes that `passes` forward passes of 512 tokens keep in their layers."""
    low, axes = lower_training(graph), {**operations_of(graph)[1], "b": 1, "s": 512}
    counts = alive(low.kept, low.runs, axes)
    return times * sum(
        n * size(*low.sizes[key][:2], axes)[1] for key, n in counts.items() if low.sizes[key][3] == "model.layers"
    )


@pytest.mark.parametrize("pp", [2, 4, 8, 16])
def test_the_first_stage_keeps_one_gpus_activations(pp: int) -> None:
    """Korthikanti et al. 2022 (arXiv:2205.05198), 4.2.3: p microbatches of L/p layers each.

    The last layer's output is sent, not kept.
    """
    whole = decide(RunSpec(model="llama-3.1-8b", **MEGATRON)).structure.graph
    run = RunSpec(model="llama-3.1-8b", batch={"accumulation": 64}, parallelism={"world": pp, "pp": pp}, **MEGATRON)
    first = decide(run).structure.graph
    assert kept_of_layers(first, pp) == kept_of_layers(whole, 1)


def test_each_further_microbatch_adds_one_pass_up_to_those_in_flight() -> None:
    """Megatron's gradients exist from the start, so the first backward pass is the largest: 3 others are in flight."""
    peaks = [piped(4, m, {"batch": {"sequence": 2048}, **MEGATRON}, stage=0) for m in range(2, 7)]
    grown = [b.bytes.allocated - a.bytes.allocated for a, b in pairwise(peaks)]
    assert grown[0] == grown[1] > 0
    assert grown[2:] == [0, 0]
    kept = [line for line in peaks[-1].ledger if "of 4 microbatches in flight" in line.why]
    assert sum(line.bytes for line in kept) == 3 * grown[0]
    assert {line.why.partition(" microbatches")[0] for line in kept} == {"3 of 4"}


def test_gpipe_keeps_every_microbatch_and_1f1b_at_most_the_stages() -> None:
    gpipe = [piped(4, m, TITAN, stage=0, schedule="gpipe").bytes.allocated for m in (4, 8, 16)]
    assert gpipe[2] - gpipe[1] == 2 * (gpipe[1] - gpipe[0]) > 0
    ones = [piped(4, m, TITAN, stage=0).bytes.allocated for m in (8, 16)]
    assert ones[1] - ones[0] == 8 * 128 * 2048 * 2  # torch has a gradient buffer for each microbatch


def test_the_answer_is_the_largest_stage_and_ranks_list_all() -> None:
    for fields, more in (
        (MEGATRON, {}),
        (TITAN, {}),
        (MEGATRON, {"virtual_stages": 2}),
        (TITAN, {"schedule": "gpipe"}),
    ):
        a = piped(4, 8, {"gpu": "rtx-4090", **fields}, **more)
        stages = [piped(4, 8, {"gpu": "rtx-4090", **fields}, stage=i, **more) for i in range(4)]
        worst = max(range(4), key=lambda i: stages[i].bytes.allocated)
        assert a.run.parallelism.stage == worst
        assert a.ledger == stages[worst].ledger
        assert [r.bytes for r in a.ranks] == [s.bytes for s in stages]
        assert [r.peak for r in a.ranks] == [s.peak for s in stages]
        assert [r.verdict for r in a.ranks] == [s.verdict for s in stages]
        assert sum(r.layers for r in a.ranks) == find_model("llama-3.2-1b").num_hidden_layers
        assert estimate(a.run).bytes == a.bytes
        assert a.model_dump()["ranks"][1]["bytes"] == stages[1].bytes.as_dict()


def test_equal_stages_are_lowered_once() -> None:
    structure = decide(
        RunSpec(model="llama-3.1-8b", batch={"accumulation": 32}, parallelism={"world": 32, "pp": 32}, **MEGATRON)
    ).structure
    lows = {id(lower_training(s.graph)) for s in every_stage(structure)}
    assert len(lows) == 3


def test_memory_outside_a_pass_is_at_most_the_microbatches_in_flight() -> None:
    for stage in range(4):
        for moment in moments("1f1b", 4, stage, 2, 8):
            assert sum(moment.others) + 1 <= most_in_flight("1f1b", 4, stage, 2, 8)


def test_device_map_deals_layers_by_their_bytes() -> None:
    """As infer_auto_device_map of transformers 5.24 does for Llama 3.1 8B; of 8 GPUs it leaves two empty."""
    for gpus, layers in ((2, (16, 16)), (3, (10, 15, 7)), (4, (7, 12, 12, 1)), (8, (2, 7, 7, 7, 7, 2))):
        a = piped(gpus, 1, {"model": "llama-3.1-8b"})
        assert tuple(r.layers for r in a.ranks) == layers
        assert a.run.parallelism.schedule == "device_map"
        assert any("2 stay empty" in note for note in a.notes) == (gpus == 8)


@pytest.mark.torch
@pytest.mark.parametrize("gpus", [2, 3, 5])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2-7b", "mistral-7b-v0.3", "qwen3-8b", "llama-3.1-70b"])
def test_device_map_deals_layers_as_transformers_does(name: str, gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    library = pytest.importorskip("transformers.integrations.accelerate")
    monkeypatch.setattr(library, "get_max_memory", dict)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(find_model(name).config)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    room = library.get_balanced_memory(model, dict.fromkeys(range(gpus), 2**50), model._no_split_modules)
    found = library.infer_auto_device_map(model, room, model._no_split_modules)
    on = [gpu for module, gpu in found.items() if ".layers." in module]
    assert [r.layers for r in piped(gpus, 1, {"model": name}).ranks] == [on.count(gpu) for gpu in sorted(set(on))]


def test_device_map_is_one_process_in_which_one_microbatch_is_in_flight() -> None:
    a = piped(2, 4, {"model": "llama-3.1-8b", "gpu": "a100-80gb"})
    assert [r.in_flight for r in a.ranks] == [1, 1]
    plain = estimate(RunSpec(model="llama-3.1-8b", gpu="a100-80gb", batch={"sequence": 128, "accumulation": 4}))
    context = plain.bytes.used - plain.bytes.reserved
    assert all(r.bytes.used - r.bytes.reserved == context for r in a.ranks)  # no NCCL
    assert sum(r.parameters for r in a.ranks) == plain.parameters.total
    assert work(a.run).idle == 1


def test_a_device_map_brings_the_logits_back_to_the_first_gpu() -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 4,
        "vocab_size": 32_000,
        "max_position_embeddings": 1024,
    }
    fields = {"model": {"config": config}, "method": "lora", "batch": {"sequence": 1024}}
    first = piped(2, 1, fields, stage=0)
    assert (first.peak.phase, first.peak.where) == ("loss", "return")
    logits = next(line for line in first.ledger if line.what == "logits")
    assert logits.bytes == 1024 * 32_000 * 2
    assert sum(line.bytes for line in first.ledger) == first.bytes.allocated
    fused = piped(2, 1, {**fields, "kernels": {"loss": "fused"}}, stage=0)
    assert first.bytes.allocated - fused.bytes.allocated > logits.bytes // 2
    assert all(phase.phase != "loss" for phase in fused.phases)


def test_stages_may_also_use_tensor_parallelism() -> None:
    """Tensor parallelism halves every stage except for norms, which are replicated."""
    one, two = (piped(4, 4, {"model": "llama-3.1-8b"}, world=4 * tp, tp=tp, schedule="1f1b") for tp in (1, 2))
    assert sum(line.bytes for line in two.ledger) == two.bytes.allocated
    assert all(b.bytes.allocated < a.bytes.allocated for a, b in zip(one.ranks, two.ranks, strict=True))
    norms = 2 * 8 * 4096  # the third stage's 8 layers
    assert two.ranks[2].parameters - norms == (one.ranks[2].parameters - norms) // 2


@pytest.mark.parametrize("chunks", [1, 2])
def test_all_microbatches_share_the_buffer_that_tokens_are_gathered_in(chunks: int) -> None:
    """Megatron's GlobalMemoryBuffer: one buffer of 128 x 2048 bf16 numbers, however many are in flight."""
    for stage in range(4):
        more = {"world": 8, "tp": 2, "sequence_parallel": True, "stage": stage, "virtual_stages": chunks}
        a = piped(4, 8, MEGATRON, **more)
        assert [line.bytes for line in a.ledger if line.what == "gathered"] == [128 * 2048 * 2]
        assert sum(line.bytes for line in a.ledger) == a.bytes.allocated


def test_megatrons_own_layers_and_its_distributed_optimizer_run_in_stages() -> None:
    config = {"model_type": "megatron_gpt", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    config |= {"num_attention_heads": 4, "vocab_size": 1024, "max_position_embeddings": 512}
    fields = {
        "model": {"config": config},
        "precision": {"weights": "bf16", "grads": "fp32", "master": "fp32"},
        "kernels": {"attention": "flash_attention_2", "checkpointing": "selective"},
        **MEGATRON,
    }
    one = piped(4, 8, fields)
    two = piped(4, 8, fields, world=8, dp=2, strategy="megatron_dist_opt")
    for a in (one, two):
        assert [r.in_flight for r in a.ranks] == [4, 3, 2, 1]
        assert sum(line.bytes for line in a.ledger) == a.bytes.allocated
    for r, s in zip(one.ranks, two.ranks, strict=True):  # masters and two moments in fp32, half each
        assert r.bytes.allocated - s.bytes.allocated == pytest.approx(12 * r.parameters / 2, rel=0.01)


REFUSED: list[tuple[dict[str, Any], int, dict[str, Any], str, tuple[str, ...]]] = [
    ({"pp": 64}, 64, MEGATRON, "parallelism.pp", ("pp 64", "16 layers")),
    ({"pp": 8, "virtual_stages": 4}, 8, MEGATRON, "parallelism.pp", ("pp 8", "virtual_stages 4", "32", "16 layers")),
    ({"pp": 5}, 5, MEGATRON, "parallelism.pp", ("pp 5", "16 layers", "--first-stage-layers")),
    ({"pp": 4, "first_stage_layers": 3}, 4, MEGATRON, "parallelism.pp", ("pp 4", "16 layers", "3", "first")),
    ({"pp": 2, "first_stage_layers": 3, "last_stage_layers": 4}, 4, MEGATRON, "parallelism.pp", ("3 + 4",)),
    ({"pp": 4, "schedule": "gpipe"}, 4, MEGATRON, "parallelism.schedule", ("megatron", "1f1b")),
    ({"pp": 4, "virtual_stages": 2}, 9, MEGATRON, "batch.accumulation", ("9", "pp 4", "virtual_stages 2", "2 equal")),
    ({"pp": 4, "virtual_stages": 2}, 2, MEGATRON, "batch.accumulation", ("2 microbatches", "fewer than pp 4")),
    ({"pp": 4}, 3, TITAN, "batch.accumulation", ("3", "pp 4", "gpipe")),
    ({"pp": 4, "virtual_stages": 2}, 9, TITAN, "batch.accumulation", ("9", "pp 4", "virtual_stages 2", "2 equal")),
    ({"pp": 2, "virtual_stages": 2, "schedule": "gpipe"}, 4, TITAN, "parallelism.virtual_stages", ("gpipe", "1f1b")),
    ({"pp": 16}, 16, TITAN, "parallelism.pp", ("pp 16", "without any of 16 layers")),
    ({"pp": 9}, 9, MEGATRON, "parallelism.pp", ("pp 9", "16 layers", "--ends-as-layers does")),
    ({"pp": 4, "ends_as_layers": True}, 4, MEGATRON, "parallelism.pp", ("pp 4", "16 layers", "one each")),
    (
        {"pp": 4, "ends_as_layers": True, "first_stage_layers": 4},
        *(4, MEGATRON, "parallelism.ends_as_layers", ("first_stage_layers",)),
    ),
    ({"pp": 4, "stage": 4}, 4, MEGATRON, "parallelism.stage", ("pp 4", "stage 4", "0 to 3")),
    ({"stage": 1}, 1, MEGATRON, "parallelism.stage", ("pp 1",)),
    ({"virtual_stages": 2}, 1, MEGATRON, "parallelism.virtual_stages", ("pp is 1",)),
    ({"schedule": "gpipe"}, 1, TITAN, "parallelism.schedule", ("pp is 1",)),
    ({"pp": 2, "dp": 2, "strategy": "fsdp"}, 2, TITAN, "parallelism.strategy", ("fsdp2", "ddp", "pp 2")),
    (
        {"pp": 2, "dp": 2, "strategy": "fsdp2", "offload": {"parameters": True}},
        *(2, TITAN, "parallelism.offload", ("parameters", "pp 2")),
    ),
    ({"pp": 2, "dp": 2, "strategy": "zero2"}, 2, {}, "parallelism.strategy", ("DeepSpeed", "zero2", "zero1", "pp 2")),
    ({"pp": 2, "dp": 2, "strategy": "zero3"}, 2, {}, "parallelism.strategy", ("DeepSpeed", "zero3", "zero1", "pp 2")),
    ({"pp": 2, "dp": 2, "strategy": "fsdp2"}, 2, MEGATRON, "parallelism.strategy", ("megatron", "fsdp2", "pp 2")),
    (
        {"pp": 2, "dp": 2, "strategy": "fsdp2", "reshard_after_forward": True},
        *(2, TITAN, "parallelism.reshard_after_forward", ("pp 2", "torchtitan")),
    ),
    (
        {"pp": 2, "dp": 2, "strategy": "fsdp2", "virtual_stages": 4},
        *(2, TITAN, "parallelism.virtual_stages", ("4", "fsdp2", "3")),
    ),
    (
        {"pp": 2, "dp": 2, "strategy": "zero1"},
        *(2, {"method": "freeze"}, "parallelism.strategy", ("zero1", "nothing trains", "fsdp2")),
    ),
    ({"pp": 2}, 2, {"loop": {"hold_outputs": True}}, "loop.hold_outputs", ("pp 2",)),
    ({"pp": 2}, 2, {"model": "roberta-base"}, "parallelism.pp", ("masked_lm",)),
    ({"pp": 2, "schedule": "1f1b"}, 2, {"model": "gemma-3n-e4b"}, "parallelism.pp", ("gemma3n",)),
    ({"pp": 2, "schedule": "device_map"}, 1, MEGATRON, "parallelism.schedule", ("megatron", "1f1b")),
    (
        {"pp": 2, "dp": 2, "strategy": "ddp", "schedule": "device_map"},
        1,
        {},
        "parallelism.schedule",
        ("pp 2", "world of 4"),
    ),
    ({"pp": 2, "schedule": "device_map"}, 1, {}, "parallelism.schedule", ("tied", "1f1b")),
    ({"pp": 8, "stage": 6}, 1, {"model": "llama-3.1-8b"}, "parallelism.stage", ("6 of pp 8", "0 to 5")),
    (
        {"pp": 2},
        *(
            1,
            {
                "model": "llama-3.1-8b",
                "method": {"kind": "qlora", "quantization": {"format": "gptq-int4", "block_size": 128}},
            },
        ),
        *("parallelism.schedule", ("gptq-int4", "nf4")),
    ),
]


@pytest.mark.parametrize(("parallelism", "microbatches", "fields", "field", "words"), REFUSED)
def test_impossible_pipelines_are_refused_in_one_line_with_every_factor(
    parallelism: dict[str, Any], microbatches: int, fields: dict[str, Any], field: str, words: tuple[str, ...]
) -> None:
    pp = parallelism.pop("pp", 1)
    with pytest.raises(SpecError) as caught:
        piped(pp, microbatches, fields, **parallelism)
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
    assert [word for word in words if word not in str(caught.value)] == []


def test_megatron_interleaves_equal_groups_of_more_microbatches_than_stages() -> None:
    """Two groups of 5 warm up with one microbatch more per further chunk than groups of 4 do."""
    notes = piped(4, 10, MEGATRON, stage=0, virtual_stages=2).notes
    assert any("--microbatch-group-size-per-virtual-pipeline-stage 5" in note for note in notes)
    assert warm_up(4, 0, 2, 10) - warm_up(4, 0, 2, 8) == 1


def test_megatron_runs_fewer_microbatches_than_stages_and_keeps_fewer() -> None:
    assert [r.in_flight for r in piped(4, 2, MEGATRON).ranks] == [2, 2, 2, 1]


def test_a_step_waits_while_a_pipeline_fills_and_drains() -> None:
    """Narayanan et al. 2021 (arXiv:2104.04473): a bubble of (p - 1) / m, and a v-th of that with v chunks."""

    def idle(m: int, **more: Any) -> float:
        parallelism = {"world": 4, "pp": 4, **more}
        return work(RunSpec(model="llama-3.2-1b", batch={"accumulation": m}, parallelism=parallelism, **MEGATRON)).idle

    assert idle(12) == 3 / 12
    assert idle(12, virtual_stages=2) == 3 / 24


@pytest.mark.parametrize(
    "case",
    TRACED,
    ids=lambda c: (
        f"{c['schedule']}-{c['chunks']}-{c['stage']}-{c['microbatches']}-{c['checkpoint']}-"
        f"{c.get('replicas', '')}-{c.get('trainable', '')}-{c.get('lora', '')}-{c.get('reduces', '')}-{c['tokens']}"
    ),
)
def test_a_stage_holds_the_microbatches_of_torchs_schedule(case: dict[str, Any]) -> None:
    """Within a hundredth, at real schedules of torch.distributed.pipelining: see tests/golden/trace_pipeline.py."""
    run = RunSpec(
        model={"config": case["config"]},
        profile="torchtitan" if case.get("reduces") else "transformers-5",
        precision="amp" if case.get("reduces") else "fp32",
        method={"kind": "lora", "rank": case["lora"]}
        if "lora" in case
        else {"kind": "freeze", "trainable_layers": case["trainable"]}
        if "trainable" in case
        else "full",
        optimizer="adamw_torch",
        batch={"sequence": case["tokens"], "accumulation": case["microbatches"]},
        kernels={"checkpointing": "full" if case["checkpoint"] else "none"},
        loop={"clip_grad_norm": None},
        parallelism={
            "world": case["stages"] * case.get("replicas", 1),
            "dp": case.get("replicas", 1),
            "strategy": "fsdp2" if case.get("replicas", 1) > 1 else "none",
            "pp": case["stages"],
            "stage": case["stage"],
            "schedule": case["schedule"],
            "virtual_stages": case["chunks"],
        },
    )
    structure = decide(run).structure
    assert list(structure.graph.degrees.layers) == case["layers"]
    workspace = cublas_workspace(None).usual
    mine: dict[str, int] = {}
    for p in estimate(run).phases:
        if p.phase != "load":
            for step in (1, 2) if p.step is None else (p.step,):
                name = f"{'step' if p.phase == 'step' else 'passes'} {step}"
                handles = 1 if p.step == 1 and p.phase in ("forward", "loss") else 2
                mine[name] = max(mine.get(name, 0), p.peak - handles * workspace)
    counters = 512 * sum(p.copies for p in sharding_of(structure).trained())  # AdamW's counters, on the host
    for name, on_host in (("passes 1", 0), ("passes 2", counters), ("step 2", counters)):
        assert mine[name] + on_host == pytest.approx(case["peaks"][name], rel=0.01), name


@pytest.mark.parametrize(("schedule", "model", "given"), [("1f1b", "gpt2", 0), ("device_map", "jamba", 1)])
def test_later_stages_have_positions_only_if_one_process_moves_them(schedule: str, model: str, given: int) -> None:
    """Only embeddings look them up; layers get them as an argument and do not read them."""
    config = {"model_type": model, **TINY[model], "tie_word_embeddings": False}
    parallelism = {"world": 2, "pp": 2, "schedule": schedule, "first_stage_layers": None if given else 2}
    batch = {"sequence": 64, "accumulation": 1 if given else 2}
    structure = decide(RunSpec(model={"config": config}, batch=batch, parallelism=parallelism)).structure
    first, last = (operations_of(stage.graph)[0] for stage in every_stage(structure))
    for stack, expected in ((first, 1), (last, given)):
        made = [t.name for op in stack.before for t in op.writes]
        assert made.count("positions") == expected
        named = {name for op in stack.runs[0].blocks[0].ops for name in op.reads}
        assert ("positions" in named) == bool(expected)


def test_the_traces_are_of_every_schedule_and_stage() -> None:
    assert {(c["schedule"], c["chunks"], c["stage"]) for c in TRACED if "replicas" not in c} == {
        (schedule, chunks, stage) for schedule, chunks in (("1f1b", 1), ("gpipe", 1), ("1f1b", 2)) for stage in range(4)
    }


def test_a_gpu_gets_nine_tenths_of_its_share_of_a_quantised_model() -> None:
    """Twelve modules of 10 bytes on two GPUs: a share of 60 plus a buffer of 12, and the first reserves room for 10."""
    ten = [10] * 10
    assert divide_by_device_map(10, ten, [10], 10, 2, quantised=False).layers == (
        5,
        5,
    )  # 72 - 10: the embeddings and five layers
    assert divide_by_device_map(10, ten, [10], 10, 2, quantised=True).layers == (
        4,
        6,
    )  # 64 - 10: the embeddings and four
