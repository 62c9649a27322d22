"""Serving engines: pools equal to logs to the block, pools from a card's memory, and laws."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from typer.main import get_command

from benchmarks.golden import NEAR_REPORT
from memplan import RunSpec, estimate
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.profiles.engines import (
    ENGINES,
    EngineBehaviour,
    EngineDefaults,
    EngineSetting,
    engine_settings,
    rows,
)
from memplan.catalogue.quantization.gguf import dynamic_range
from memplan.cli.app import app
from memplan.core.errors import MemplanError, SpecError, UnknownNameError
from memplan.estimate.serving import pool_tokens, requests
from memplan.models.cards import card_names, find_model, load_card
from memplan.planning.inference import with_tp
from memplan.program.serving.budget import budget, card_for, layers_that_fit, pool_of
from memplan.program.serving.compressed import room_of
from memplan.program.serving.draft_weights import rank_weights
from memplan.program.serving.engine_step import largest
from memplan.program.serving.images import profiled_items
from memplan.program.serving.llama_cpp import compute_buffer
from memplan.program.serving.parallel import stage_settings
from memplan.program.serving.pool import Blocks
from memplan.program.serving.rank_share import TOWERS, bytes_on_rank, has_whole_shared_experts, heads_of
from memplan.program.serving.settings import ServingRanks, Settings
from memplan.program.serving.sglang import static_fraction
from memplan.program.stored.gguf import file_type_of, gguf_file
from memplan.program.stored.weights import stored_weights
from memplan.report.schema import answer_model
from memplan.report.wording import verdict as verdict_line
from memplan.resolve.serving import resolve_serving
from memplan.spec.parallelism import Parallelism
from memplan.spec.run import changed
from memplan.spec.serving import Serving
from tests.sampling import examples, sampled

GIB, MIB = 2**30, 2**20
GOLDEN = [
    json.loads(line) for line in (Path(__file__).parents[1] / "golden" / "serving.jsonl").read_text().splitlines()
]


def of_kind(kind: str) -> Any:
    found = [row for row in GOLDEN if row["kind"] == kind]
    return pytest.mark.parametrize("row", found, ids=lambda row: row["id"])


def settings_of(row: Mapping[str, Any]) -> Settings:
    """Return the settings of a run as logged at its start."""
    serving = {"max_model_len": row.get("longest"), "max_num_batched_tokens": row.get("batched")}
    if row.get("cache_dtype"):
        serving["cache_dtype"] = row["cache_dtype"]
    if row.get("states") == 1:
        serving["prefix_caching"] = False
    if "seqs" in row:
        serving |= {"max_num_seqs": row["seqs"], "cuda_graphs": not row.get("eager", False)}
    if "flash" in row:
        serving["flash_attention"] = row["flash"]
    if "weights" in row:
        serving["weights"] = row["weights"]
    serving |= row.get("limits", {})
    tp = row.get("tp", 1)
    return resolve_serving(
        RunSpec(
            model=row.get("model") or {"config": row["config"]},
            gpu=row.get("gpu"),
            task="generate",
            batch={"sequence": 1, "new_tokens": 1},
            serving=serving,
            parallelism={"world": tp, "tp": tp},
            profile=row.get("profile", "llama.cpp-2026"),
        )
    )


@of_kind("pool")
def test_a_pool_has_the_blocks_that_a_log_says(row: dict[str, Any]) -> None:
    """Some number of bytes that rounds to the logged GiB gives exactly the logged blocks, and those blocks the logged
    tokens and concurrency."""
    s = settings_of(row)
    a_block = pool_of(s, 0).block_bytes
    groups = pool_of(s, 0).groups  # type: ignore[attr-defined]
    blocks = row.get("blocks") or row["tokens"] // (row.get("block_size") or 16) * len(groups)
    if "available_gib" in row:
        digits = Fraction(row["available_gib"])
        low, high = (digits - Fraction(1, 200)) * GIB, (digits + Fraction(1, 200)) * GIB
        made = range(int(low) // a_block, int(high) // a_block + 1)
        blocks = row.get("blocks") or next(n for n in made if pool_of(s, n * a_block).tokens == row["tokens"])
        assert blocks in made
    pool = pool_of(s, blocks * a_block)
    assert isinstance(pool, Blocks)
    assert pool.blocks == blocks
    assert len(pool.groups) == row.get("groups", 1)
    assert pool.block == row.get("block_size", 16)
    if "tokens" in row:
        assert pool.tokens == row["tokens"]
    if "concurrency" in row:
        assert f"{float(pool.concurrency(row['longest'])):.2f}" == row["concurrency"]


@of_kind("needed")
def test_the_longest_request_needs_the_logged_memory(row: dict[str, Any]) -> None:
    s = settings_of(row)
    pool = pool_of(s, 0)
    assert isinstance(pool, Blocks)
    needed = sum(g.layers * g.page * g.blocks_of(s.longest, pool.in_flight) for g in pool.groups)
    assert str(round(needed / GIB, 2)) == row["needed_gib"]


@of_kind("block")
def test_a_block_is_no_smaller_than_a_state(row: dict[str, Any]) -> None:
    pool = pool_of(settings_of(row), 0)
    assert isinstance(pool, Blocks)
    assert pool.block == row["block_size"]
    if "padding" in row:
        (padding,) = {f"{100 * (g.page / g.own - 1):.2f}" for g in pool.groups if g.kind == "state"}
        assert padding == row["padding"]


@of_kind("slots")
def test_slots_take_the_bytes_that_a_log_says(row: dict[str, Any]) -> None:
    pool = pool_of(settings_of(row), 10**12)
    assert abs(Fraction(row["tokens"] * pool.block_bytes, GIB) - Fraction(row["gib"])) <= Fraction(row["within"])


@of_kind("weights")
def test_weights_take_the_bytes_that_a_log_says(row: dict[str, Any]) -> None:
    taken = sum(h.bytes for h in rank_weights(settings_of(row)) if h.group != "table")
    if "within" in row:
        assert abs(taken / GIB / float(row["gib"]) - 1) <= float(row["within"])
        return
    assert f"{taken / GIB:.{len(row['gib'].partition('.')[2])}f}" == row["gib"]


@of_kind("seen")
def test_the_encoder_is_profiled_on_the_logged_input(row: dict[str, Any]) -> None:
    found = profiled_items(settings_of(row))
    assert found is not None
    assert (found.items, found.kind) == (row["items"], row["what"])
    assert max(row["batched"], found.tokens) == row["budget"]


@of_kind("step")
def test_a_steps_bytes_are_near_the_logged_ones(row: dict[str, Any]) -> None:
    """Within the row's tolerance: the scratch memory of the sampler's sort is assumed."""
    s = settings_of(row)
    step = largest(s, s.steps, s.requests, profiled=True)
    assert abs(step.bytes / GIB / float(row["gib"]) - 1) <= float(row["within"])


@of_kind("llama.cpp")
def test_llama_cpp_reserves_the_buffers_that_a_log_says(row: dict[str, Any]) -> None:
    s = settings_of(row)
    assert f"{pool_of(s, 0).bytes / MIB:.2f}" == row["cache_mib"]
    if "compute_mib" in row:
        assert f"{compute_buffer(s, row['logits']).bytes / MIB:.2f}" == row["compute_mib"]


@of_kind("reserved")
def test_llama_cpp_estimates_match_its_reservations_on_every_card(row: dict[str, Any]) -> None:
    """Weights and cache to the byte; the compute buffer to the byte, or within the row's tolerance.

    A card whose experts another card computes reserves less than is counted: its row has no compute buffer.
    """
    run = RunSpec(
        model=row["model"],
        task="generate",
        profile="llama.cpp-2026",
        batch={"micro": row["seqs"], "sequence": 1, "new_tokens": 1},
        parallelism={"world": row["cards"], "dp": row["cards"]},
        serving=row["serving"],
    )
    cards = stage_settings(resolve_serving(run))
    assert len(cards) == row["cards"]
    for s, (weights, cache, compute) in zip(cards, row["cards_have"], strict=True):
        assert sum(h.bytes for h in rank_weights(s)) == weights
        assert pool_of(s, 0).bytes == cache
        counted = compute_buffer(s, row.get("logits")).bytes
        assert compute is None or abs(counted / max(1, compute) - 1) <= float(row.get("within", 0))


@of_kind("card")
def test_a_pool_computed_from_the_card_misses_a_log_as_documented(row: dict[str, Any]) -> None:
    run = RunSpec(
        model=row["model"],
        task="generate",
        batch={"sequence": 1, "new_tokens": 1},
        gpu=row["gpu"],
        profile=row["profile"],
        parallelism={"world": row["tp"], "tp": row["tp"]},
        serving=row["serving"],
    )
    tokens = pool_tokens(run)
    assert f"{100 * (tokens / row['tokens'] - 1):+.1f}" == row["percent"]
    page = (Path(__file__).parents[2] / "docs" / "how-it-works" / "serving.md").read_text("utf-8")
    assert f"| {row['tokens']:,} | {tokens:,} |" in page


@of_kind("left")
def test_the_share_leaves_the_pool_that_a_log_says(row: dict[str, Any]) -> None:
    share = float(row["share_gib"]) * GIB / find_gpu(row["gpu"]).usable
    serving = {"memory_utilization": share, "lora_slots": 1, **row["serving"]}
    run = run_of(row["model"], row["profile"], row["gpu"], precision={"weights": "fp16"}, sequence=512, serving=serving)
    answer = estimate(run)
    assert answer.serving is not None
    assert abs(answer.serving["pool"] / GIB / float(row["gib"]) - 1) <= NEAR_REPORT


def run_of(model: str, profile: str, gpu: str | None = "h100", tp: int = 1, **more: Any) -> RunSpec:
    parallelism = {"world": tp, "tp": tp}
    batch = {"micro": more.pop("micro", 1), "sequence": more.pop("sequence", 4096), "new_tokens": 512}
    return RunSpec(
        model=model,
        task="generate",
        batch=batch,
        profile=profile,
        gpu=gpu,
        parallelism=parallelism,
        **more,
    )


def test_every_engine_row_states_its_source() -> None:
    for engine in ENGINES:
        assert engine.read
        for row in engine.rows:
            assert row.field in (*EngineBehaviour._fields, *EngineDefaults._fields), row.field
            assert row.source
            assert (row.basis == "assumed") == row.source.startswith("assumed") or engine.kind in ("tgi", "llama.cpp")
        assert len({row.field for row in engine.rows}) == len(engine.rows)
        values = {row.field: row.value for row in rows(engine)}
        settled = {k: v for record in engine_settings(engine) for k, v in record._asdict().items()}
        assert values == {field: settled[field] for field in values}
    assert set(EngineDefaults._fields) <= set(Serving.model_fields)


@pytest.mark.parametrize(
    ("field", "value"), [("sampler", "random"), ("block_size", "16"), ("wiggle", 1), ("towers", 1)]
)
def test_a_wrong_engine_row_is_an_error_that_names_it(field: str, value: object) -> None:
    engine = ENGINES[0]._replace(rows=(EngineSetting(field, value, "a test"),))
    with pytest.raises(ValueError, match=rf"profile vllm-0.33: {field} (is no field|cannot be)"):
        engine_settings(engine)


def test_vllm_divides_its_share_of_a_card() -> None:
    """Llama 3 8B on an H100: 0.92 of the card, less weights, the sampler's peak, graphs and loaded kernels."""
    answer = estimate(run_of("llama-3-8b", "vllm-0.33"))
    s, total = answer.serving, 0
    assert s is not None
    assert answer.gpu is not None
    total = -(-answer.gpu.usable * 92 // 100)
    rotary = 8192 * 128 * 2
    assert s["weights"] == 2 * 8_030_261_248 + rotary
    sampled = 1024 * 128_256  # logits: in bf16, and in fp32 with probabilities and noise
    assert s["activations"] == sampled * (2 + 3 * 4) + (8192 + 1024) * 4096 * 2
    counted = 1024 * 4 * (128_256 + 2 * -(-128_256 // 32) + 3 * 1024 + 128 + 1024 + 129 + 128)  # per request
    assert (
        sum(h.bytes for h in rank_weights(resolve_serving(run_of("llama-3-8b", "vllm-0.33"))) if h.group == "table")
        == counted
    )
    left = total - s["weights"] - counted - s["activations"] - s["cuda_graphs"] - 256 * MIB
    assert s["blocks"] == left // (16 * 128 * 2**10)
    assert s["tokens"] == s["blocks"] * 16 * 8192 // 8192
    assert s["requests"] == s["blocks"] // (4608 // 16)
    assert answer.verdict.answer == "fits"


def test_the_ledger_sums_and_the_answer_matches_its_schema() -> None:
    for profile in ("vllm-0.33", "sglang-0.5", "tgi-3", "llama.cpp-2026"):
        for gpu in ("h100", None):
            answer = estimate(run_of("qwen2.5-7b", profile, gpu))
            assert sum(line.bytes for line in answer.ledger) == answer.bytes.allocated
            assert answer.bytes.allocated == max(p.peak for p in answer.phases)
            assert [p.phase for p in answer.phases] == ["load", "prefill", "decode"]
            read = answer_model().model_validate_json(answer.model_dump_json())
            assert read.model_dump()["serving"]["tokens"] == answer.serving["tokens"]  # type: ignore[index]


def test_tgi_does_not_fit_where_its_warm_up_does_not() -> None:
    """TGI 3.3.7 models/flash_causal_lm.py warmup: not enough memory to handle the prefill tokens."""
    assert estimate(run_of("mistral-7b-v0.3", "tgi-3", "t4", sequence=128)).verdict.answer == "does not fit"
    assert estimate(run_of("mistral-7b-v0.3", "tgi-3", "a10", sequence=128)).verdict.answer != "does not fit"


def test_tgi_keeps_the_tokens_that_it_measured_with() -> None:
    """Llama 3 8B on an H100: a cache of 4,096 tokens, plus 0.9 of the memory that is then free."""
    s = resolve_serving(run_of("llama-3-8b", "tgi-3"))
    assert s.gpu is not None
    b = budget(s, s.gpu.usable)
    token, before = 32 * 4096, b.context.usual
    free = s.gpu.usable - before - b.parameters - b.step.bytes - b.driver_kernels.usual - 4096 * token
    assert b.available == free * 900 // 1000 + 4096 * token
    assert b.pool.tokens == b.available // token


def test_without_a_card_the_pool_holds_exactly_the_requests() -> None:
    answer = estimate(run_of("llama-3-8b", "vllm-0.33", None, micro=3))
    assert answer.verdict.answer is None
    assert answer.serving is not None
    blocks = 3 * (4608 // 16) + 1  # plus one that is never handed out
    assert answer.serving["pool"] == answer.serving["needed"] == blocks * 16 * 128 * 2**10


def test_a_run_fits_if_its_requests_do() -> None:
    held_ = requests(run_of("llama-3-8b", "vllm-0.33", "4090", serving={"max_model_len": 8192}), 4608)
    assert 0 < held_ < 60
    fits = [
        estimate(run_of("llama-3-8b", "vllm-0.33", "4090", micro=n, serving={"max_model_len": 8192})).verdict.answer
        for n in (1, held_ + 1)
    ]
    assert fits[0] == "fits"
    assert fits[1] != "fits"
    assert estimate(run_of("llama-3-8b", "vllm-0.33", "t4")).verdict.answer == "does not fit"


def test_vllm_does_not_start_if_the_pool_cannot_hold_its_longest_request() -> None:
    """64 layers of keys and values of 8 heads of 128 in bf16 are 256 KiB a token: 10 GiB for Qwen3's 40,960."""
    answer = estimate(run_of("qwen3-32b", "vllm-0.33"))
    assert answer.serving is not None
    assert (answer.verdict.answer, answer.serving["needed"]) == ("does not start", (4608 // 16 + 1) * 2**22)
    reason = answer.verdict.reason
    assert reason is not None
    assert "the model's max seq len (40960), (10.00 GiB KV cache is needed" in reason
    assert reason in verdict_line(answer)
    starting = int(reason.rpartition(" ")[2])
    assert estimate(run_of("qwen3-32b", "vllm-0.33", serving={"max_model_len": starting})).verdict.answer == "fits"
    longer = estimate(run_of("qwen3-32b", "vllm-0.33", serving={"max_model_len": starting + 16}))
    assert longer.verdict.answer == "tight"
    assert answer.band.high <= 80 * 2**30


@pytest.mark.parametrize("profile", ["sglang", "tgi", "llama.cpp"])
def test_other_engines_start_with_a_pool_smaller_than_their_longest_request(profile: str) -> None:
    answer = estimate(run_of("llama-3.1-8b", profile, "4090"))
    assert (answer.verdict.answer in ("fits", "tight"), answer.verdict.reason) == (True, None)
    assert "reason" not in answer.verdict.as_dict()


@pytest.mark.parametrize("profile", [engine.name for engine in ENGINES])
def test_a_run_that_does_not_fit_names_the_card_size_it_needs(profile: str) -> None:
    """A card of just that size holds the requests at the same share, and one 1 % smaller does not."""
    run = run_of("llama-3.1-8b", profile, micro=300)
    answer = estimate(run)
    assert answer.verdict.answer == "does not fit"
    assert answer.bytes.used == sum(line.bytes for line in answer.ledger) + (answer.bytes.used - answer.bytes.reserved)
    s = resolve_serving(run)
    s = s._replace(serving=s.serving.model_copy(update={"max_model_len": s.context}))
    needed = card_for(budget(s, s.gpu.usable))  # type: ignore[union-attr]
    assert answer.bytes.used >= needed > answer.gpu.usable  # type: ignore[union-attr]
    assert budget(s, needed + 2**24).fits
    assert not budget(s, needed * 99 // 100).fits


def test_a_card_too_small_names_the_smallest_that_holds_the_run() -> None:
    from memplan.report import render

    text = render("table", [estimate(run_of("llama-3-8b", "vllm-0.33", "t4"))], False, None, False)
    assert "Would fit:" in text
    assert "DOES NOT FIT" in text


def test_layers_of_several_kinds_share_blocks() -> None:
    """gpt-oss: 18 layers of each kind, whose blocks overlap. Gemma 3 27B: 52 with a window and 10 without, in 6 and 1
    groups of 10. Gemma 4 31B: pages of two sizes."""
    s = resolve_serving(run_of("gpt-oss-120b", "vllm-0.33"))
    pool = pool_of(s, 10 * GIB)
    assert isinstance(pool, Blocks)
    assert [(g.kind, g.layers) for g in pool.groups] == [("sliding", 18), ("full", 18)]
    assert pool.block_bytes == 18 * 16 * 2 * 8 * 64 * 2
    gemma = pool_of(resolve_serving(run_of("gemma-3-27b", "vllm-0.33")), 10 * GIB)
    assert isinstance(gemma, Blocks)
    assert sorted((g.kind, g.layers) for g in gemma.groups) == [("full", 10)] + [("sliding", 10)] * 6
    both = pool_of(resolve_serving(run_of("gemma-4-31b", "vllm-0.33")), 10 * GIB)
    assert isinstance(both, Blocks)
    assert {(g.kind, g.block) for g in both.groups} == {("sliding", 16), ("full", 32)}
    with pytest.raises(SpecError, match="caches of 131,072 and 262,144"):
        pool_of(resolve_serving(run_of("gemma-4-31b", "vllm-0.11")), GIB)


def test_without_the_hybrid_manager_windows_keep_all() -> None:
    pool = pool_of(resolve_serving(run_of("gemma-3-27b", "vllm-0.33", serving={"hybrid_cache": False})), 10 * GIB)
    assert isinstance(pool, Blocks)
    assert [(g.kind, g.page) for g in pool.groups] == [("full", 62 * 16 * 2 * 16 * 128 * 2)]


def test_every_state_takes_its_own_block() -> None:
    """Qwen3-Next: 12 layers with keys, 36 with states, in four groups. A request holds blocks of tokens in one group,
    and two states in each other group while prefixes are cached."""
    s = resolve_serving(run_of("qwen3-next-80b-a3b", "vllm-0.33"))
    pool = pool_of(s, 40 * GIB)
    assert isinstance(pool, Blocks)
    assert sorted((g.kind, g.layers) for g in pool.groups) == [("full", 12)] + [("state", 12)] * 3
    state = 32 * 128 * 128 * 2 + (2 * 16 * 128 + 32 * 128) * 3 * 2
    block = -(-state // (16 * 2 * 2 * 256 * 2)) * 16
    assert pool.block == block
    assert pool.of_request(10_000) == -(-10_000 // block) + 3 * 2


def test_deepseek_v4_has_groups_of_unlike_pages() -> None:
    """https://github.com/vllm-project/vllm/issues/44376, vLLM 0.22 with one step of 16,384 tokens in flight: 30,000
    tokens need 6.66 GiB, and 5.44 GiB hold 13,528. Its blocks had 22 pages of each size; 0.33 has those of the fullest
    group: 21 layers that choose entries, with an indexer's, and 20 that do not."""
    s = resolve_serving(divided("deepseek-v4-flash", "vllm-0.33", tp=2))
    pool = pool_of(s, 10 * GIB)
    assert isinstance(pool, Blocks)
    assert [g.block for g in pool.groups] == [256, 64, 64, 4, 8]
    assert pool.block_bytes == 21 * (37_440 + 8_640) + 20 * 1_728
    waits = -(-4 * 4 * 512 * 4 // 576) * 576  # fp32 keys and gates of four tokens for two entries, or eight for one
    own = -(-4 * 4 * 128 * 4 // 576) * 576
    assert [g.page for g in pool.groups[1:]] == [22 * 37_440, 21 * 37_440, 21 * (waits + own), 20 * waits]
    one, before = pool._replace(in_flight=16_384), 22 * (37_440 + 8_640 + 1_728)
    assert round(one.of_request(30_000) * before / GIB, 2) == 6.66
    assert one.of_request(13_528) * before <= 5.445 * GIB < one.of_request(13_600) * before
    stages = [
        pool_of(stage, 0) for stage in stage_settings(resolve_serving(divided("deepseek-v4-flash", "vllm-0.33", pp=2)))
    ]
    assert sum(stage.block_bytes for stage in stages) == pool.block_bytes


def test_deepseek_v4_reserves_room_for_gathered_keys() -> None:
    """Indexer keys of 40 requests of full length, one per four tokens, and heads padded to 64."""
    run = divided("deepseek-v4-flash", "vllm-0.33", tp=8, serving={"max_model_len": 2**20})
    s = resolve_serving(run)
    step = largest(s, s.steps, s.requests, True)
    sizes = {t.what: t.bytes for t in step.alive}
    assert step.where == "sparse.indexer"
    assert sizes["room for gathered keys"] == 40 * 2**20 // 4 * 132 + MIB
    assert sizes["padded q"] == sizes["output of padded heads"] == s.steps * 64 * 512 * 2
    assert sizes["streams"] == s.steps * 4 * 4096 * 2
    assert room_of(resolve_serving(divided("deepseek-v4-flash", "vllm-0.33")))["qp"] == 64  # which is its own number
    (table,) = (h for h in rank_weights(s) if h.what.startswith("cosines"))
    assert table.bytes == 2 * 2**20 * 64 * 4
    for bad in ({"cache_dtype": "bf16"}, {"block_size": 16}):
        with pytest.raises(SpecError, match=f"serving.{next(iter(bad))}"):
            resolve_serving(changed(run, "serving", **bad))
    with pytest.raises(SpecError, match="not supported yet with sglang"):
        resolve_serving(run_of("deepseek-v4-flash", "sglang-0.5"))


def test_llama_cpp_keeps_a_checkpoints_mxfp4_and_converts_its_fp8() -> None:
    """24 layers of 32 experts with matrices of 2880 x 5760 and 2880 x 2880, in 4.25 bits instead of 16."""
    published = estimate(run_of("gpt-oss-20b", "llama.cpp"))
    converted = estimate(run_of("gpt-oss-20b", "llama.cpp", serving={"weights": "none"}))
    assert published.serving is not None
    assert converted.serving is not None
    experts = 24 * 32 * 2880 * (5760 + 2880)
    assert converted.serving["weights"] - published.serving["weights"] == experts * 2 - experts * 17 // 32
    for fp8 in ("deepseek-v3", "minimax-m2"):
        assert estimate(run_of(fp8, "llama.cpp")).run.serving.weights == "none"


def test_a_layer_that_predicts_ahead_is_the_published_one() -> None:
    """The checkpoints of Qwen3.5 and 3.6 have it; its parameters are the difference that their cards state."""
    for name, elements in {"qwen3.6-27b": 372255232 + 2 * 5120**2 + 3 * 5120, "qwen3.5-35b-a3b": 844640768}.items():
        run = run_of(name, "vllm-0.33", serving={"speculative_method": "mtp"})
        parts = [h.bytes for h in rank_weights(resolve_serving(run)) if "predict ahead" in h.what]
        assert sum(parts) == elements * 2
        assert str(elements) in str(find_model(name).card["difference"])


def test_llama_cpp_sizes_a_mixture_without_a_dense_width() -> None:
    assert compute_buffer(resolve_serving(run_of("dbrx", "llama.cpp"))).bytes > 0


def test_a_pure_state_space_model_takes_one_block_per_request() -> None:
    """Falcon Mamba 7B: 64 layers with a state of 8192 x 16 and 3 convolution columns. vLLM caches no prefixes; SGLang
    gives states 9 of 19 bytes, one of them padding, and each request three if prefixes are cached."""
    state = 64 * 8192 * (16 + 3) * 2
    s = resolve_serving(run_of("falcon-mamba-7b", "vllm-0.33"))
    pool = pool_of(s, 100 * state)
    assert isinstance(pool, Blocks)
    assert (pool.blocks, pool.block_bytes, pool.of_request(10**6)) == (100, state, 1)
    assert pool.holds(10**6, 99)
    assert not pool.holds(10**6, 100)  # one block is never handed out
    two = pool_of(resolve_serving(divided("falcon-mamba-7b", "vllm-0.33", tp=2)), 0)
    assert two.block_bytes == state // 2
    slots = 64 * 8192 * (16 * 4 + 3 * 2)
    kept = pool_of(resolve_serving(run_of("falcon-mamba-7b", "sglang-0.5")), 19 * slots)
    assert (kept.blocks, kept.bytes) == (8, 9 * slots)
    assert kept.concurrency(4096) == Fraction(8, 3)
    assert kept.needs(4096, 2) == 7 * slots
    assert estimate(run_of("falcon-mamba-7b", "vllm-0.33")).verdict.answer == "fits"


def test_adapters_take_slots_for_every_matrix() -> None:
    """Rank 16 on Llama 3 8B: A and B of q, k, v, o, gate, up and down in 32 layers, and in vLLM also of embeddings and
    head. Each rank has all of A and its shard of B; the other way round if inputs are sharded."""
    h, kv, f, v = 4096, 1024, 14336, 128_256
    layers = 32 * (2 * (h + h) + 2 * (h + kv) + 3 * (h + f))
    assert adapters("llama-3-8b", "sglang-0.5") == 2 * 2 * 16 * layers
    assert adapters("llama-3-8b", "vllm-0.33") == 2 * 2 * 16 * (layers + 2 * (h + v))
    two = 32 * (h + h // 2 + 2 * (h + kv // 2) + (h // 2 + h) + 2 * (h + f // 2) + f // 2 + h)
    assert adapters("llama-3-8b", "vllm-0.33", tp=2) == 2 * 2 * 16 * (two + 2 * (h + v))
    first, last = (
        sum(h.bytes for h in rank_weights(s) if h.group == "adapter")
        for s in stage_settings(resolve_serving(divided("llama-3-8b", "vllm-0.33", pp=2, serving=_SLOTS)))
    )
    assert first == last == 2 * 2 * 16 * (layers // 2 + h + v)
    answer = estimate(run_of("llama-3-8b", "vllm-0.33", serving={**_SLOTS, "lora_cpu_slots": 10}))
    assert answer.host_bytes == 10 * 2 * 16 * (layers + 2 * (h + v))


_SLOTS = {"lora_slots": 2, "lora_rank": 16}


def adapters(model: str, profile: str, **degrees: Any) -> int:
    """Return the bytes of two slots of rank 16 on a card."""
    s = resolve_serving(divided(model, profile, serving=_SLOTS, **degrees))
    return sum(h.bytes for h in rank_weights(s) if h.group == "adapter")


def test_the_share_of_vllm_0_7_does_not_pay_for_slots() -> None:
    pools = {
        name: [
            budget(resolve_serving(run_of("llama-3-8b", name, serving=slots)), 80 * GIB).available
            for slots in ({}, _SLOTS)
        ]
        for name in ("vllm-0.6", "vllm-0.7", "vllm-v0-0.8")
    }
    of_slots = adapters("llama-3-8b", "vllm-0.6")
    assert pools["vllm-0.7"][0] == pools["vllm-0.7"][1]
    assert {name: before - after for name, (before, after) in pools.items() if name != "vllm-0.7"} == {
        "vllm-0.6": of_slots,
        "vllm-v0-0.8": of_slots,
    }
    assert pools["vllm-0.7"][0] - pools["vllm-0.6"][0] == (256 - 51) * MIB


def test_experts_have_an_adapter_each() -> None:
    """Qwen3-30B-A3B: separate gates and ups of 128 experts, and the router; on four ranks 32 experts each."""
    h, m, e, v = 2048, 768, 128, 151_936
    attention = (h + 4096) + 2 * (h + 512) + (4096 + h)
    experts = e * (2 * (h + m) + m + h)
    tables = 2 * (h + v)
    assert adapters("qwen3-30b-a3b", "vllm-0.33") == 2 * 2 * 16 * (48 * (attention + experts + h + e) + tables)
    assert adapters("qwen3-30b-a3b", "sglang-0.5") == 2 * 2 * 16 * 48 * (attention + experts)
    four = 48 * (attention + experts // 4 + h + e) + tables
    assert adapters("qwen3-30b-a3b", "vllm-0.33", dp=4, ep=4) == 2 * 2 * 16 * four


def test_experts_of_gpt_oss_have_one_matrix_for_gates_and_ups() -> None:
    h, m, e, q, kv = 2880, 2880, 32, 4096, 512
    attention = (h + q) + 2 * (h + kv) + (q + h)
    experts = e * (h + 2 * m + m + h)
    assert adapters("gpt-oss-20b", "vllm-0.33") == 2 * 2 * 16 * 24 * (attention + experts + h + e)


def test_a_rank_has_at_least_one_head_and_the_most_experts() -> None:
    fused = resolve_serving(run_of("phi-4", "vllm-0.33", tp=20))  # 40 query and 10 key heads, in one matrix
    assert heads_of(fused, frozenset(("qkv_proj",)), 40 + 2 * 10, 20) == 40 // 20 + 2
    s = resolve_serving(divided("qwen3-30b-a3b", "vllm-0.33", dp=3, ep=3))
    experts = [w for w in stored_weights(s.model, s.quantization, s.dtype) if ".experts." in w.name]
    assert sum(bytes_on_rank(s, w) for w in experts) == 48 * -(-128 // 3) * 3 * 2048 * 768 * 2
    assert resolve_serving(divided("mixtral-8x7b", "vllm-0.33", dp=8, ep=8)).ranks.etp == 1  # one each


def test_shared_experts_are_replicated_if_data_parallel_groups_share_experts() -> None:
    assert not has_whole_shared_experts(resolve_serving(divided("deepseek-v2-lite", "vllm-0.33", tp=2, ep=2)))
    assert has_whole_shared_experts(resolve_serving(divided("deepseek-v2-lite", "vllm-0.33", tp=2, dp=2, ep=4)))


def test_video_frames_come_in_pairs_and_deepstack_features_count() -> None:
    """vLLM 0.11 shares 14 frames between two videos; Qwen3-VL adds features of three layers of its tower."""
    limits = {"limit_images": 0, "limit_videos": 2}
    two, one = (
        profiled_items(resolve_serving(run_of("qwen2.5-vl-7b", "vllm-0.11", serving={**limits, "limit_videos": n})))
        for n in (2, 1)
    )
    assert one is not None
    assert two is not None
    assert (one.patches, two.patches) == (7 * 65_536, 4 * 65_536)
    levels = profiled_items(resolve_serving(run_of("qwen3-vl-8b", "vllm-0.33")))
    assert levels is not None
    assert levels.levels == 1 + 3


def test_ranks_divide_matrices_and_copy_heads_that_are_too_few() -> None:
    one, eight, sixteen = (resolve_serving(run_of("llama-3-8b", "vllm-0.33", tp=tp)) for tp in (1, 8, 16))
    assert pool_of(one, 0).block_bytes == 8 * pool_of(eight, 0).block_bytes == 8 * pool_of(sixteen, 0).block_bytes
    latent = [pool_of(resolve_serving(run_of("deepseek-v3", "vllm-0.33", tp=tp)), 0).block_bytes for tp in (1, 8)]
    assert latent[0] == latent[1] == 64 * 61 * 576 * 2


def test_a_step_of_latents_has_room_for_the_prompts_that_are_cached() -> None:
    """Keys and values of 65,536 tokens and 16 heads, 128 wide each, in addition to q, latent, residual and output."""
    s = resolve_serving(run_of("deepseek-v2-lite", "vllm-0.33"))
    step = largest(s, 2048, 1)
    assert step.where == "attention.workspace"
    assert step.bytes == 2 * (65536 * 16 * (128 + 128) + 2048 * (2048 + 16 * 192 + 512 + 64 + 16 * 128))
    short = resolve_serving(
        run_of("deepseek-v2-lite", "vllm-0.33", serving={"max_model_len": 5120, "max_num_seqs": 16})
    )
    assert largest(short, 2048, 1).bytes == step.bytes - 2 * (65536 - 8 * 5120) * 16 * 256
    other = resolve_serving(run_of("deepseek-v2-lite", "sglang-0.5"))
    assert largest(other, 2048, 1).where != "attention.workspace"


def test_only_one_version_stores_sparse_latents_in_fp8_by_default() -> None:
    """61 layers with 656 packed bytes, otherwise 576 numbers; index keys of 128 bytes and a scale."""
    of = {"auto": 2 * 576, "fp8": 656, "bf16": 2 * 576}
    for profile, usual in (("vllm-0.33", "auto"), ("vllm-0.11", "fp8")):
        for dtype, kept in {**of, "auto": of[usual]}.items():
            s = resolve_serving(run_of("deepseek-v3.2", profile, tp=8, serving={"cache_dtype": dtype}))
            assert pool_of(s, 0).block_bytes == 64 * 61 * (kept + 128 + 4)


def test_sglang_reserves_memory_by_its_heuristic() -> None:
    """An 80 GiB card: at least 10 GiB; a 24 GiB card: 512 MiB, 1.5 MiB per token, an eighth of a GiB, and graphs."""
    assert static_fraction(80 * GIB, 8192, 256, ServingRanks(), False, True) == round(
        1 - (512 + 12288 + 128 + 512 + 8 * 58) / 81920, 3
    )
    small = 512 + 1.5 * 4096 + 128 + 2 * 48 + 8 * 50
    assert static_fraction(24 * GIB, 4096, 48, ServingRanks(), False, True) == round(1 - small / (24 * 1024), 3)


def test_experts_in_mxfp4_are_padded_as_the_cards_kernel_has_them() -> None:
    """36 layers with 128 experts of width 2880: half a byte per number, one byte per scale of 32, and biases."""

    def experts(gpu: str, profile: str = "vllm-0.33", tp: int = 1) -> int:
        s = resolve_serving(run_of("gpt-oss-120b", profile, gpu=gpu, tp=tp, serving={"weights": "mxfp4"}))
        return sum(h.bytes for h in rank_weights(s) if h.group == "mlp")

    def padded(width: int, hidden: int, bias: int) -> int:
        return 36 * 128 * (3 * width * hidden * 17 // 32 + (2 * width + hidden) * bias)

    assert experts("a100-80gb") == experts("rtx-5090") == experts("h100", "vllm-0.11") == padded(2944, 3072, 2)
    assert experts("b200") == padded(2944, 3072, 4)
    assert experts("b200", "vllm-0.11") == padded(3072, 3072, 4)
    assert experts("a100-80gb", tp=8) == padded(384, 3072, 2)  # 12 of 90 blocks, which are 3 tiles of 128
    scales = 5888 * 92 + 3072 * 92  # rows in multiples of 256, columns in multiples of 4
    assert experts("h100") == 36 * 128 * (3 * 2880 * 2880 // 2 + scales + (5760 + 2880) * 4)
    assert experts("h100", "sglang-0.5") == padded(2880, 2880, 2)


def test_a_model_card_states_its_checkpoints_format() -> None:
    """DeepSeek V3's matrices take one byte per number plus a 4-byte scale per 128 x 128; embeddings and head two."""
    run = run_of("deepseek-v3", "vllm-0.33", gpu="h200", tp=8)
    assert estimate(run).run.serving.weights is None  # the config's own
    found, said, plain = (
        sum(h.bytes for h in rank_weights(resolve_serving(changed(run, "serving", weights=w))))
        for w in (None, "fp8", "none")
    )
    assert found == said
    assert 0.50 < found / plain < 0.51
    assert estimate(run_of("llama-3-8b", "vllm-0.33")).run.serving.weights is None
    assert estimate(run_of("gpt-oss-20b", "llama.cpp-2026")).run.serving.weights == "mxfp4"
    quantised = changed(run, "method", quantization={"format": "nf4"})
    assert estimate(quantised).run.serving.weights is None


def test_the_command_shows_the_pool_and_its_contents(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["llama-3-8b", "--method", "generate", "--profile", "vllm-0.33", "--seq-len", "4096", "--gpu", "h100"]
    run = run_of("llama-3-8b", "vllm-0.33")
    pool = estimate(changed(run, "batch", new_tokens=256)).serving or {}

    def printed(*args: str) -> str:
        with pytest.raises(SystemExit) as left:
            get_command(app).main([*args])
        assert left.value.code == 0
        return capsys.readouterr().out

    table = printed(*asked, "--details")
    assert f"{pool['tokens']:,} tokens in bf16, {pool['blocks']:,} blocks of 16 at 2,097,152 bytes" in table
    assert f"holds    {pool['concurrency']:,.2f} requests of 4,352 tokens at once; the run's 1 needs " in table
    assert json.loads(printed(*asked, "--format", "json"))["serving"] == pool
    assert "<h2>Keys and values</h2>" in printed(*asked, "--format", "html")
    assert "| holds |" in printed(*asked, "--format", "markdown")
    both = printed("compare", "llama-3-8b", "llama-3-8b --cache-dtype fp8", *asked[1:])
    assert f"{pool['tokens']:,}" in next(line for line in both.splitlines() if line.startswith("tokens "))


def test_llama_cpp_keeps_layers_on_the_host_unless_offloaded() -> None:
    """0, 17 and all of 33 layers, the head included."""
    answers = [estimate(run_of("llama-3-8b", "llama.cpp-2026", serving={"gpu_layers": n})) for n in (0, 17, 33)]
    weights = [a.serving["weights"] for a in answers]  # type: ignore[index]
    layer = 2 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 2 * 4096)
    head = 2 * (128_256 * 4096 + 4096)
    assert weights == [0, head + 16 * layer, head + 32 * layer]
    pools = [a.serving["pool"] for a in answers]  # type: ignore[index]
    assert pools == [0, 4608 * 16 * 4096, 4608 * 32 * 4096]


def test_llama_cpp_keeps_experts_on_the_host() -> None:
    """As much leaves the card as the experts of the layers take; the first pattern counts; the note's number fits."""
    m, half = find_model("qwen3-30b-a3b"), 24
    experts = 3 * 128 * 768 * 2048 * 2  # gate, up and down of a layer in F16

    def weights(**serving: Any) -> int:
        run = run_of("qwen3-30b-a3b", "llama.cpp-2026", serving={"weights": "F16", **serving})
        return sum(h.bytes for h in rank_weights(resolve_serving(run)))

    everything = weights()
    assert everything - weights(n_cpu_moe=half) == half * experts
    assert everything - weights(n_cpu_moe=1000) == m.num_hidden_layers * experts
    assert weights(override_tensor=["exps=CPU"]) == weights(n_cpu_moe=m.num_hidden_layers)
    assert weights(override_tensor=["exps=CUDA0", "exps=CPU"]) == everything
    assert weights(override_tensor=["nothing=CPU"]) == everything
    by_config = run_of("gpt-oss-20b", "llama.cpp-2026", serving={"n_cpu_moe": 24})  # stored by names of parameters
    assert not any("uint8" in h.dtype for h in rank_weights(resolve_serving(by_config)))

    run = run_of("qwen3-30b-a3b", "llama.cpp-2026", "3060", serving={"weights": "Q4_K_M"})
    answer = estimate(run)
    [note] = [note for note in answer.notes if "--n-cpu-moe" in note]
    least = int(note.rpartition(" ")[2])
    assert answer.verdict.answer == "does not fit"
    assert estimate(changed(run, "serving", n_cpu_moe=least)).verdict.answer == "fits"


def test_llama_cpp_predicts_ahead_in_a_second_context() -> None:
    """llama.cpp of llama-cpp-python 0.3.36 on a simulated card reserves the cache of one more layer, states from before
    each of three proposed tokens, and compute buffers of 136,331,520 and 136,331,392 bytes."""
    serving = {"max_model_len": 8192, "max_num_batched_tokens": 512, "weights": "F16", "speculative_method": "mtp"}
    run = run_of("qwen3.6-27b", "llama.cpp", serving=serving)
    s = resolve_serving(changed(run, "batch", sequence=1, new_tokens=1))
    assert s.draft is not None
    assert s.draft.settings is not None
    layer = 8192 * 2 * 4 * 256 * 2  # keys and values of 4 heads in fp16
    states = 48 * (48 * 128 * 128 + 3 * 10240) * 4  # 48 layers of 48 heads, and three columns of the convolution
    assert pool_of(s, 0).bytes == 1_164_443_648 + 33_554_432 == (16 + 1) * layer + (1 + 3) * states
    both = compute_buffer(s).bytes + compute_buffer(s.draft.settings).bytes
    assert largest(s, s.steps, s.requests, profiled=True).bytes == both
    assert 136_331_520 + 136_331_392 <= both <= 1.1 * (136_331_520 + 136_331_392)


# Bytes of unsloth's files of Qwen3.8 27B, shaped like Qwen3.6 27B, and of Qwen3 30B A3B, as people list them.
DYNAMIC = {
    ("qwen3.6-27b", "UD-IQ2_XXS"): 7_266_070_528,
    ("qwen3.6-27b", "UD-Q2_K_XL"): 9_828_981_664,
    ("qwen3.6-27b", "ud-iq3_s"): 12_040_883_104,
    ("qwen3.6-27b", "UD-IQ4_XS"): 14_252_845_984,
    ("qwen3.6-27b", "Q4_K_XL"): 17_559_178_144,
    ("qwen3.6-27b", "UD-Q5_K_XL"): 20_876_938_144,
    ("qwen3-30b-a3b", "UD-Q4_K_XL"): 17_706_002_678,
}


@pytest.mark.parametrize(("model", "name"), DYNAMIC)
def test_the_range_of_a_dynamic_gguf_holds_published_files(model: str, name: str) -> None:
    plain, shares = file_type_of(name), dynamic_range(name)
    assert plain is not None
    assert shares is not None
    least, most = (gguf_file(find_model(model), plain).bytes * (1000 + share) // 1000 for share in shares)
    assert least <= DYNAMIC[model, name] <= most
    dynamic, usual = (estimate(run_of(model, "llama.cpp", "h100", serving={"weights": w})) for w in (name, plain))
    assert usual.serving is not None
    weights = usual.bytes.allocated - usual.serving["activations"] - usual.serving["pool"]
    assert dynamic.bytes == usual.bytes
    assert abs(dynamic.band.low - usual.band.low - weights * shares[0] // 1000) <= 2
    assert abs(dynamic.band.high - usual.band.high - weights * shares[1] // 1000) <= 2


def test_llama_cpp_quantises_caches_in_blocks_of_32() -> None:
    plain, eight, four = (
        pool_of(resolve_serving(run_of("llama-3-8b", "llama.cpp-2026", serving={"cache_dtype": dtype})), 0).bytes
        for dtype in ("fp16", "q8_0", "q4_0")
    )
    assert (eight * 64, four * 64) == (plain * 34, plain * 18)


def test_the_vision_tower_is_profiled_before_the_pool_is_allocated() -> None:
    """Qwen2.5-VL 7B on an H100: 7 rows of frames of 16,384 tokens with 4 patches each. A block's FFN holds them 5 times
    at the tower's width, 3 times at the FFN's, and as pixels. Its weights are loaded unless both inputs are off."""
    run = run_of("qwen2.5-vl-7b", "vllm-0.33")
    answer = estimate(run)
    patches = 7 * 16384 * 4
    assert answer.serving is not None
    assert answer.serving["activations"] == 2 * patches * (5 * 1280 + 3 * 3420 + 1176)
    assert any("encoder on 1 video of 114,688 tokens" in note for note in answer.notes)
    images = estimate(changed(run, "serving", limit_videos=0)).serving or {}
    none = estimate(changed(run, "serving", limit_images=0, limit_videos=0)).serving or {}
    assert images["activations"] - none["activations"] == 2 * 16384 * 3584  # the image's embeddings
    assert images["weights"] - none["weights"] == sum(
        h.bytes for h in rank_weights(resolve_serving(run)) if h.group in TOWERS
    )
    two = largest(resolve_serving(divided("qwen2.5-vl-7b", "vllm-0.33", tp=2)), 8192, 1024, profiled=True)
    assert two.bytes == 2 * patches * (5 * 1280 + 3 * 1710 + 1176)
    late = stage_settings(resolve_serving(divided("qwen2.5-vl-7b", "vllm-0.33", pp=2)))[1]
    assert not largest(late, 8192, 1024, profiled=True).where.startswith("encoder")


def test_sglang_reserves_more_memory_for_a_vision_tower() -> None:
    """Gemma 3's has 27 layers 1,152 wide, 1.424 times 24 layers of 1,024; its outputs have 100 MiB."""
    s = resolve_serving(run_of("gemma-3-4b", "sglang-0.5"))
    plain = static_fraction(s.gpu.usable, 8192, 256, ServingRanks(), False, True)  # type: ignore[union-attr]
    assert s.serving.memory_utilization == plain * (0.95 * (1 - 0.1 * (27 * 1152**2 / (24 * 1024**2) - 1)))
    seeing = resolve_serving(run_of("qwen2.5-vl-7b", "sglang-0.5"))
    assert pool_of(seeing, GIB).tokens == (GIB - 100 * MIB) // (28 * 2 * 4 * 128 * 2)
    text = resolve_serving(run_of("gemma-3-1b", "sglang-0.5"))
    assert text.serving.memory_utilization == plain


@pytest.mark.parametrize(
    ("profile", "dtype", "head"),
    [
        ("vllm-0.33", "fp8_e5m2", 128),
        ("vllm-0.33", "int8_per_token_head", 128 + 4),
        ("vllm-0.33", "int4_per_token_head", 64 + 4),
        ("vllm-0.33", "nvfp4", 64 + 8),
        ("sglang-0.5", "mxfp8", 128 + 4),
        ("sglang-0.5", "fp4_mx_block16", 64 + 8),
        ("llama.cpp-2026", "iq4_nl", 4 * 18),
        ("llama.cpp-2026", "q5_1", 4 * 24),
    ],
)
def test_a_tokens_bytes_follow_the_cache_format(profile: str, dtype: str, head: int) -> None:
    """Llama 3 8B: keys and values of 8 heads, 128 wide, in 32 layers."""
    s = resolve_serving(run_of("llama-3-8b", profile, "b200", serving={"cache_dtype": dtype}))
    tokens = 1 if profile != "vllm-0.33" else 16
    assert pool_of(s, 0).block_bytes == tokens * 32 * 2 * 8 * head


def test_a_step_of_experts_has_their_rows() -> None:
    """Qwen3-30B-A3B, 40,960 tokens of one request: 8 rows per token, as wide as gate and up or as the outputs. 0.11
    takes 32,768 tokens at once, with separate rows for the sum and activations at their own width."""
    one, tokens = {"max_num_batched_tokens": 40960, "max_num_seqs": 1}, 40960
    step = largest(resolve_serving(run_of("qwen3-30b-a3b", "vllm-0.33", serving=one)), tokens, 1)
    assert step.where == "experts"
    assert step.bytes == tokens * 2 * (2 * 2048 + 128 + 8 * (max(768, 2048) + max(2 * 768, 2048)))
    old = largest(resolve_serving(run_of("qwen3-30b-a3b", "vllm-0.11", serving=one)), tokens, 1)
    assert old.bytes == tokens * 2 * (3 * 2048 + 128) + 32768 * 2 * 8 * (max(2 * 768, 2048) + 768)


def held_of(run: RunSpec) -> list[dict[str, int]]:
    """Return the bytes of each group of weights on every card."""
    found: list[dict[str, int]] = []
    for s in stage_settings(resolve_serving(run)):
        groups: dict[str, int] = {}
        for h in rank_weights(s):
            groups[h.group] = groups.get(h.group, 0) + h.bytes
        found.append(groups)
    return found


def divided(model: str, profile: str, gpu: str = "h200", **degrees: Any) -> RunSpec:
    serving = degrees.pop("serving", {})
    world = degrees.get("dp", 1) * degrees.get("tp", 1) * degrees.get("pp", 1)
    run = run_of(model, profile, gpu, serving=serving)
    return run.model_copy(update={"parallelism": Parallelism(world=world, **degrees)})


def test_a_pipelines_end_stages_have_embeddings_and_head() -> None:
    """Llama 3 8B in two stages of 16 layers: embeddings in the first, norm and head in the last."""
    first, last = held_of(divided("llama-3-8b", "vllm-0.33", pp=2))
    h, f, table = 4096, 14336, 2 * 128_256 * 4096
    layer = 2 * (2 * h * h + 2 * h * 1024 + 3 * h * f)
    assert first["embedding"] == last["lm_head"] == table
    assert (first["norm"], last["norm"]) == (2 * 16 * 2 * h, 2 * (16 * 2 + 1) * h)
    for stage in (first, last):
        assert stage["attention"] + stage["mlp"] == 16 * layer
    assert "lm_head" not in first
    assert "embedding" not in last
    tied = held_of(divided("llama-3.2-1b", "vllm-0.33", pp=2))
    assert tied[0]["embedding"] == tied[1]["embedding"] == 2 * 128_256 * 2048


@pytest.mark.parametrize(
    ("profile", "layers", "stages", "have"),
    [
        ("vllm-0.33", "qwen2.5-32b", 3, [21, 22, 21]),
        ("sglang-0.5", "qwen2.5-32b", 3, [21, 21, 22]),
        ("vllm-0.33", "deepseek-v3", 8, [7, 7, 8, 8, 8, 8, 8, 7]),
        ("sglang-0.5", "deepseek-v3", 8, [7, 7, 7, 8, 8, 8, 8, 8]),
    ],
)
def test_remaining_layers_go_to_other_stages(profile: str, layers: str, stages: int, have: list[int]) -> None:
    assert [s.stage.layers for s in stage_settings(resolve_serving(divided(layers, profile, pp=stages)))] == have


def test_a_pipelines_pool_is_as_large_as_its_fullest_stage_holds() -> None:
    """Llama 3 8B in two stages: the last has logits, a sampler and its received input."""
    run = divided("llama-3-8b", "vllm-0.33", "4090", pp=2, serving={"max_model_len": 8192})
    s = resolve_serving(run)
    assert s.gpu is not None
    found = budget(s, s.gpu.usable)
    assert found.settings.stage.headed
    assert found.pool.block_bytes == 16 * 16 * 4096
    sampled = 256 * 128_256
    sent = 2 * 2 * 2048 * 4096
    assert found.step.bytes == sampled * (2 + 3 * 4) + (2048 + 256) * 4096 * 2 + sent
    answer = estimate(run)
    assert answer.serving is not None
    assert answer.serving["tokens"] == found.pool.tokens == found.available // (16 * 16 * 4096) * 16
    assert any("stage 2 of 2, the fullest: layers 16 to 31 and the head" in note for note in answer.notes)


def test_stages_have_layers_of_every_group() -> None:
    """Gemma 3 27B has 62 layers, every sixth without a window: 5 in each stage. Its 52 layers with a window are in six
    groups, every sixth in one; each stage has 26."""
    first, last = (
        pool_of(s, 10 * GIB) for s in stage_settings(resolve_serving(divided("gemma-3-27b", "vllm-0.33", pp=2)))
    )
    assert isinstance(first, Blocks)
    assert isinstance(last, Blocks)
    assert [(g.kind, g.layers) for g in first.groups] == [("sliding", 5)] * 2 + [("sliding", 4)] * 4 + [("full", 5)]
    assert sum(g.layers for pool in (first, last) for g in pool.groups) == 62
    assert first.block_bytes == last.block_bytes == 5 * 16 * 2 * 16 * 128 * 2


def test_groups_of_ranks_share_experts() -> None:
    """Qwen3-30B-A3B on 4 GPUs with vLLM: its 128 experts are sharded, by width or one by one, attention is replicated,
    and experts get the tokens of all four groups. Without experts the groups are replicas."""
    experts = 2 * 48 * 128 * 3 * 2048 * 768
    for ep in (1, 4):
        run = divided("qwen3-30b-a3b", "vllm-0.33", dp=4, ep=ep)
        (have,) = held_of(run)
        assert have["mlp"] == experts // 4
        assert have["attention"] == 2 * 48 * (2 * 4096 * 2048 + 2 * 512 * 2048)
        step = largest(resolve_serving(run), 8192, 1)
        assert step.where == "experts"
        rows = 4 * 8192 * 8 * (max(768 if ep > 1 else 192, 2048) + max(2 * (768 if ep > 1 else 192), 2048))
        assert step.bytes == 2 * (rows + 8192 * (2 * 2048 + 128) + 4 * 8192 * (2048 + 128))
    both = divided("qwen3-30b-a3b", "vllm-0.33", dp=2, tp=2, ep=4)
    assert held_of(both)[0]["mlp"] == experts // 4
    assert held_of(divided("llama-3-8b", "vllm-0.33", dp=4)) == held_of(divided("llama-3-8b", "vllm-0.33"))
    assert held_of(divided("qwen3-30b-a3b", "sglang-0.5", dp=4)) == held_of(divided("qwen3-30b-a3b", "sglang-0.5"))


def test_sglangs_attention_may_be_data_parallel() -> None:
    """Each of 8 GPUs has its own keys, attention and embeddings, and an eighth of experts and head; its steps are an
    eighth as long."""
    run = divided("qwen3-30b-a3b", "sglang-0.5", dp=8, ep=8, serving={"dp_attention": True})
    (have,) = held_of(run)
    assert have["embedding"] == 2 * 151_936 * 2048 == 8 * have["lm_head"]
    assert have["mlp"] == 2 * 48 * 16 * 3 * 2048 * 768
    s, plain = resolve_serving(run), resolve_serving(divided("qwen3-30b-a3b", "sglang-0.5", tp=8))
    assert (s.steps, plain.steps) == (1024, 8192)
    assert pool_of(s, 0).block_bytes == 4 * pool_of(plain, 0).block_bytes  # 4 heads; each of 8 ranks has one
    reserved = 512 + 1.5 * 8192 + 1024 + 2 * 512 + 8 * 58 + 4.5 * 8 * 512
    mib = s.gpu.usable / MIB  # type: ignore[union-attr]
    assert s.serving.memory_utilization == round((mib - reserved) / mib, 3)


def test_llama_cpp_lays_layers_on_several_cards() -> None:
    """Llama 3 8B and its head on three cards in the ratio 2:1:1, and all on the second."""
    run = run_of("llama-3-8b", "llama.cpp-2026", "3090", serving={"tensor_split": [2, 1, 1]})
    three = run.model_copy(update={"parallelism": Parallelism(world=3, dp=3)})
    stages = [s.stage for s in stage_settings(resolve_serving(three))]
    assert [(s.first, s.last, s.headed) for s in stages] == [(0, 17, False), (17, 25, False), (25, 32, True)]
    answer = estimate(three)
    assert answer.serving is not None
    assert (answer.serving["card"], answer.serving["layers"]) == (0, 17)
    assert answer.serving["pool"] == 4608 * 17 * 4096
    none = changed(changed(three, "serving", tensor_split=None), "serving", split_mode="none", main_gpu=1)
    assert estimate(none).serving == estimate(run.model_copy(update={"serving": Serving()})).serving


def test_llama_cpp_needs_as_many_cards_as_hold_its_layers() -> None:
    """A plan finds the number of GPUs: a 24 GB card holds half the layers of a 70B model in 4 bits."""
    run = run_of("llama-3.1-70b", "llama.cpp-2026", "3090", serving={"weights": "Q4_K_M"})
    answers = [estimate(with_tp(run, n)) for n in (1, 2)]
    assert [a.verdict.answer for a in answers] == ["does not fit", "fits"]
    assert [a.serving["layers"] for a in answers] == [80, 41]  # type: ignore[index]


def test_llama_cpps_fit_leaves_one_gib_free_on_every_card() -> None:
    """Llama 3.1 70B in 4 bits on one card of 24 GB, and on two."""
    for cards in (1, 2):
        run = with_tp(run_of("llama-3.1-70b", "llama.cpp-2026", "3090", serving={"weights": "Q6_K"}), cards)
        answer = estimate(run)
        assert answer.verdict.answer == "does not fit"
        layers = layers_that_fit(resolve_serving(run))
        assert layers is not None
        assert 10 < layers < 81
        assert any(f"would put {layers} of 81 layers" in note for note in answer.notes)
        last, more = (estimate(changed(run, "serving", gpu_layers=n)) for n in (layers, layers + 1))
        assert last.verdict.headroom >= 2**30 > more.verdict.headroom  # type: ignore[operator]
        assert not any("--fit" in note for note in last.notes)
    assert layers_that_fit(resolve_serving(run_of("llama-3-8b", "vllm-0.33"))) is None


REFUSED = {
    "profile: vllm-0.33 is a serving engine": {"task": "train"},
    "optimizer: only applies to training": {"optimizer": "sgd"},
    "kernels: only applies to training": {"kernels": {"attention": "eager"}},
    "method.kind: vllm-0.33 does not train": {"method": "lora"},
    "parallelism.tp: 3 does not divide 32": {"parallelism": {"world": 3, "tp": 3}},
    "parallelism.cp: vllm-0.33 only takes dp": {"parallelism": {"world": 2, "cp": 2}},
    "serving.cache_dtype: vllm-0.33 has no q8_0 cache; choose auto, bf16": {"serving": {"cache_dtype": "q8_0"}},
    "serving.cache_dtype: vllm-0.11 has no nvfp4": {"profile": "vllm-0.11", "serving": {"cache_dtype": "nvfp4"}},
    "serving.cache_dtype: nvfp4 needs compute capability 10, and h100 has 9.0": {"serving": {"cache_dtype": "nvfp4"}},
    "serving.cache_dtype: vLLM 0.33 cannot store MLA latents in int8_per_token_head": {
        "model": "deepseek-v2-lite",
        "serving": {"cache_dtype": "int8_per_token_head"},
    },
    "serving.flash_attention: llama.cpp quantises values": {
        "profile": "llama.cpp-2026",
        "serving": {"cache_dtype": "q8_0", "flash_attention": False},
    },
    "model: gemma2 models are not supported yet with vllm-0.6": {"model": "gemma-2-9b", "profile": "vllm-0.6"},
    "model: qwen2_vl models are not supported yet with vllm-0.6": {"model": "qwen2-vl-7b", "profile": "vllm-0.6"},
    "serving.speculative_method: ngram is not supported yet with vllm-0.6": {
        "profile": "vllm-0.6",
        "serving": {"speculative_method": "ngram"},
    },
    "serving.gpu_layers: only applies to llama.cpp": {"serving": {"gpu_layers": 3}},
    "serving.max_model_len: 100 is less": {"serving": {"max_model_len": 100}},
    "batch: vllm-0.33 only takes": {"batch": {"images": 1}},
    "serving.weights: unknown name": {"serving": {"weights": "bogus"}},
    "generation: only applies to transformers": {"generation": {"cache_implementation": "legacy"}},
    "objective: vllm-0.33 needs causal_lm": {"objective": "masked_lm"},
    "precision: vllm-0.33 only takes precision.weights": {"precision": "amp"},
    "precision.compute: vllm-0.33 computes in bf16": {"precision": {"compute": "fp8"}},
    "gpu: vLLM 0.33 needs compute capability 7.5, and Tesla P40 has 6.1": {"gpu": "p40"},
    "parallelism.world: 4 GPUs are not": {"parallelism": {"world": 4, "pp": 2, "dp": 1}},
    "parallelism.pp: 40 stages are more than the model's 32 layers": {"parallelism": {"world": 40, "pp": 40}},
    "parallelism.ep: llama models have no experts": {"parallelism": {"world": 2, "dp": 2, "ep": 2}},
    "parallelism.ep: vLLM's --enable-expert-parallel": {
        "model": "qwen3-30b-a3b",
        "parallelism": {"world": 4, "dp": 4, "ep": 2},
    },
    "parallelism.ep: vLLM's --enable-expert-parallel uses all tp x dp ranks; use 1, not 2": {
        "model": "qwen3-30b-a3b",
        "parallelism": {"ep": 2},
    },
    "parallelism.ep: 3 does not divide the 4": {
        "model": "qwen3-30b-a3b",
        "profile": "sglang-0.5",
        "parallelism": {"world": 4, "tp": 4, "ep": 3},
    },
    "parallelism.pp: tgi-3 only supports tp": {"profile": "tgi-3", "parallelism": {"world": 2, "pp": 2}},
    "parallelism.tp: llama.cpp splits by layers": {
        "profile": "llama.cpp-2026",
        "parallelism": {"world": 2, "tp": 2},
    },
    "serving.split_mode: only applies to llama.cpp": {"serving": {"split_mode": "layer"}},
    "serving.limit_images: only applies to vLLM": {"profile": "sglang-0.5", "serving": {"limit_images": 0}},
    "serving.lora_cpu_slots: only applies to vLLM": {"profile": "sglang-0.5", "serving": {"lora_cpu_slots": 3}},
    "serving.lora_rank: needs slots": {"serving": {"lora_rank": 8}},
    "serving.lora_cpu_slots: needs slots": {"serving": {"lora_cpu_slots": 3, "lora_slots": 0}},
    "serving.lora_cpu_slots: 1 is less than the 2": {"serving": {"lora_cpu_slots": 1, "lora_slots": 2}},
    "serving.dp_attention: only applies to SGLang": {"serving": {"dp_attention": True}},
    "serving.split_mode: row: llama.cpp of 2026 has no": {
        "profile": "llama.cpp-2026",
        "serving": {"split_mode": "row"},
    },
    "serving.main_gpu: only applies to split_mode none": {"profile": "llama.cpp-2026", "serving": {"main_gpu": 0}},
    "serving.tensor_split: has 2 parts for 1 GPUs": {"profile": "llama.cpp-2026", "serving": {"tensor_split": [1, 1]}},
    "serving.n_cpu_moe: only applies to llama.cpp": {"serving": {"n_cpu_moe": 3}},
    **{
        f"serving.override_tensor: {message}": {"profile": "llama.cpp-2026", "serving": {"override_tensor": [text]}}
        for text, message in {
            "exps": "'exps' is not PATTERN=BUFFER; write exps=CPU",
            "exps=RAM": "'RAM' is not a buffer; use CPU, or CUDA0",
            "exps=CUDA1": "CUDA1 is not one of 1 GPUs, counted from 0",
            "(exps=CPU": "'(exps' is not a regular expression: missing )",
            "(a+)+=CPU": "'(a+)+' would take too long to match",
            f"{'.*' * 7}=CPU": f"'{'.*' * 7}' would take too long to match",
        }.items()
    },
    "model: t5 models are not supported yet": {"model": "t5-base"},
    "model: whisper models are not supported yet with vllm-0.33, which reserves": {"model": "whisper-large-v3"},
}


@pytest.mark.parametrize(("line", "change"), REFUSED.items(), ids=REFUSED)
def test_options_unsupported_by_an_engine_are_errors(line: str, change: dict[str, Any]) -> None:
    run = {"model": "llama-3-8b", "task": "generate", "profile": "vllm-0.33", "gpu": "h100"}
    with pytest.raises(MemplanError) as caught:
        estimate(RunSpec(**{**run, **change}))
    assert str(caught.value).startswith(line)


def test_training_with_an_engine_and_unknown_engines_are_errors() -> None:
    with pytest.raises(SpecError, match="is a serving engine"):
        estimate(RunSpec(model="llama-3-8b", profile="sglang-0.5"))
    for task in ("train", "generate"):
        with pytest.raises(SpecError, match="serving: only applies to serving engines"):
            estimate(RunSpec(model="llama-3-8b", task=task, serving={"block_size": 16}))  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match=r"vllm-0\.33"):
        estimate(RunSpec(model="llama-3-8b", profile="vllm-2.0"))
    with pytest.raises(UnknownNameError):
        resolve_serving(RunSpec(model="llama-3-8b", task="generate", profile="transformers-5"))
    with pytest.raises(MemplanError):
        Serving(max_seqs=3)  # type: ignore[call-arg]


SERVED = (
    "llama-3-8b",
    "qwen2.5-7b",
    "gemma-3-4b",
    "gpt-oss-20b",
    "qwen3-next-80b-a3b",
    "deepseek-v2-lite",
    "jamba-v0.1",
)
STATES = ("qwen3-next-80b-a3b", "jamba-v0.1")
PAGED = ("vllm-0.33", "vllm-0.11", "sglang-0.5", "tgi-3")


@settings(max_examples=examples(80), deadline=None)
@given(
    st.sampled_from(SERVED),
    st.sampled_from(PAGED),
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.sampled_from(["h200", "b200", "a100-80gb"]),
)
def test_laws(model: str, profile: str, tokens: int, more: int, gpu: str) -> None:
    """Longer requests never fit more often; 8 bits and more ranks never hold fewer tokens or need more memory."""
    assume(profile != "tgi-3" or model not in STATES)
    run = run_of(model, profile, gpu, sequence=4000)
    s = resolve_serving(run)
    assert s.gpu is not None
    pool = budget(s, s.gpu.usable).pool
    if pool.bytes:
        assert pool.concurrency(tokens + more) <= pool.concurrency(tokens)
        assert pool.bytes <= max(0, budget(s, s.gpu.usable).available)
    eight = run.model_copy(update={"serving": Serving(cache_dtype="fp8")})
    assert pool_tokens(eight) >= pool_tokens(run)
    assert pool_tokens(run_of(model, profile, gpu, tp=2, sequence=4000)) >= pool_tokens(run)


def test_models_are_found_once() -> None:
    model = load_card("llama-3-8b")
    run = run_of("llama-3-8b", "vllm-0.33")
    facts = estimate(run, model=find_model("llama-3-8b")).serving or {}
    assert pool_tokens(run, model) == pool_tokens(run) == facts["tokens"]


def test_the_range_of_a_tight_engine_ends_above_its_card() -> None:
    answer = estimate(run_of("qwen3-32b", "vllm-0.33", gpu="a100-sxm-80gb", sequence=2048))
    assert answer.verdict.answer == "tight"
    assert answer.gpu is not None
    assert answer.band.low < answer.gpu.usable < answer.band.high


def test_an_answer_for_each_family_holds_its_own_run() -> None:
    """A card of each model_type, with the engine that profiles towers: no crash, and no refusal of the answer's run."""
    families = {load_card(name).model_type: name for name in sorted(card_names())}
    refused, broken = 0, dict[str, str]()
    for name in sampled(sorted(families.values()), 16):
        try:
            answer = estimate(RunSpec(model=name, task="generate", profile="vllm"))
        except MemplanError:
            refused += 1
            continue
        try:
            if estimate(answer.run).run != answer.run:
                broken[name] = "another run"
        except MemplanError as error:
            broken[name] = str(error)
    assert broken == {}
    assert refused < len(families) / 2
