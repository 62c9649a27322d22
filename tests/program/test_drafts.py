"""Speculative decoding in serving engines: weights, slots and steps of the draft."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import Estimate, RunSpec, estimate
from memplan.core.errors import MemplanError
from memplan.core.units import MIB
from memplan.program.serving.draft import layers_of, lookahead_slots
from memplan.program.serving.draft_weights import rank_weights
from memplan.program.serving.model_weights import TABLE
from memplan.resolve.serving import resolve_serving
from memplan.spec.run import changed

BF16 = 2
HEAD: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 2048,
}
# one layer of Llama-3.1-8B: q and o, k and v, the MLP, two norms
Q, KV, MLP, NORM = 4096 * 4096, 1024 * 4096, 3 * 4096 * 14336, 4096
LAYER = 2 * Q + 2 * KV + MLP + 2 * NORM


def served(profile: str, model: str = "llama-3.1-8b", gpu: str | None = "h100-sxm", **serving: Any) -> RunSpec:
    batch = {"sequence": 4000, "new_tokens": 100}
    return RunSpec(model=model, task="generate", profile=profile, gpu=gpu, batch=batch, serving=serving)


def weights(run: RunSpec) -> int:
    return sum(h.bytes for h in rank_weights(resolve_serving(run)) if h.group != TABLE)


def fact(answer: Estimate, name: str) -> Any:
    assert answer.serving is not None
    return answer.serving[name]


PROFILES = ("vllm-0.33", "sglang-0.5", "llama.cpp-2026")


@pytest.mark.parametrize("profile", PROFILES)
def test_a_draft_models_weights_exclude_shared_ones(profile: str) -> None:
    both = weights(served(profile, draft_model="llama-3.2-1b", num_speculative_tokens=4))
    assert both == weights(served(profile)) + weights(served(profile, "llama-3.2-1b"))


@pytest.mark.parametrize("profile", PROFILES[:2])
def test_an_eagle_3_head_has_wider_queries_and_its_own_vocabulary(profile: str) -> None:
    config = {**HEAD, "draft_vocab_size": 32000}
    run = served(profile, speculative_method="eagle3", draft_model={"config": config}, num_speculative_tokens=3)
    numbers = LAYER + Q + 2 * KV + 3 * 4096 * 4096 + 2 * NORM + 32000 * 4096
    copies = 128256 * 4096 if profile.startswith("sglang") else 0  # embeddings, until the pool exists
    assert weights(run) - weights(served(profile)) == BF16 * (numbers + copies) + 8 * 32000


@pytest.mark.parametrize("profile", PROFILES[:2])
def test_an_eagle_head_shares_embeddings_and_head(profile: str) -> None:
    run = served(profile, speculative_method="eagle", draft_model={"config": HEAD}, num_speculative_tokens=3)
    copies = 2 * 128256 * 4096 if profile.startswith("sglang") else 0
    assert weights(run) - weights(served(profile)) == BF16 * (LAYER - NORM + 2 * 4096 * 4096 + copies)


def test_sglangs_copies_of_embeddings_and_head_are_divided_by_ranks() -> None:
    asked = {"speculative_method": "eagle", "draft_model": {"config": HEAD}, "num_speculative_tokens": 3}
    two = resolve_serving(changed(served("sglang-0.5", **asked), "parallelism", world=2, tp=2))
    (made,) = (h.bytes for h in rank_weights(two) if "made for the draft" in h.what)
    assert made == 2 * 128256 * 4096 * BF16 // 2


def test_vllm_lays_a_drafts_layers_in_the_same_blocks() -> None:
    answer = estimate(served("vllm-0.33", draft_model="llama-3.2-1b", num_speculative_tokens=4))
    # 16 tokens of 32 layers with 8 heads of 128, and of 16 with 8 heads of 64, keys and values
    assert fact(answer, "block_bytes") == 16 * BF16 * 2 * 8 * (32 * 128 + 16 * 64)
    assert fact(answer, "blocks") == fact(answer, "pool") // fact(answer, "block_bytes")
    alone = estimate(served("vllm-0.33"))
    assert fact(answer, "blocks") < fact(alone, "blocks")


def test_a_request_has_slots_for_proposed_tokens() -> None:
    drafted = resolve_serving(served("vllm-0.33", draft_model="llama-3.2-1b", num_speculative_tokens=4))
    looked = resolve_serving(served("vllm-0.33", speculative_method="ngram", num_speculative_tokens=4))
    assert (lookahead_slots(drafted), lookahead_slots(looked)) == (8, 4)
    assert layers_of(looked) == ()
    # 4,096 tokens are 256 blocks, and 4 more a further one; no request is longer than the engine admits
    batch = {"sequence": 4000, "new_tokens": 96}
    asked = {"speculative_method": "ngram", "num_speculative_tokens": 4}
    needs: list[int] = []
    for serving in ({}, asked, {**asked, "max_model_len": 4096}):
        run = RunSpec(model="llama-3.1-8b", task="generate", profile="vllm-0.33", batch=batch, serving=serving)
        answer = estimate(run)
        needs.append(fact(answer, "needed") // fact(answer, "block_bytes"))
    assert needs == [256 + 1, 257 + 1, 256 + 1]  # plus the block that is never handed out


def test_sglang_counts_a_drafts_layers_as_wide_as_the_models() -> None:
    answer = estimate(served("sglang-0.5", draft_model="llama-3.2-1b"))
    model, assumed, real = 32 * 8 * 128 * 2 * BF16, 16 * 8 * 128 * 2 * BF16, 16 * 8 * 64 * 2 * BF16
    tokens = fact(answer, "tokens")
    assert fact(answer, "pool") == tokens * (model + real)
    assert fact(answer, "needed") == 4100 * (model + assumed)
    assert answer.run.serving.max_num_seqs == 48
    assert answer.run.serving.num_speculative_tokens == 4


def test_llama_cpp_creates_a_separate_context_for_a_draft() -> None:
    fields: dict[str, Any] = {"cache_dtype": "q8_0", "max_num_seqs": 2, "max_model_len": 4352}
    alone = estimate(served("llama.cpp-2026", **fields))
    both = estimate(served("llama.cpp-2026", draft_model="llama-3.2-1b", draft_weights="Q4_K_M", **fields))
    cache = 2 * 4352 * 16 * 2 * 8 * 64 * 2  # slots, tokens, layers, keys and values, heads, width, fp16
    assert fact(both, "pool") - fact(alone, "pool") == cache == 272 * MIB
    small = estimate(served("llama.cpp-2026", "llama-3.2-1b", weights="Q4_K_M", **{**fields, "cache_dtype": "fp16"}))
    assert fact(both, "weights") - fact(alone, "weights") == fact(small, "weights")
    assert fact(both, "activations") - fact(alone, "activations") == fact(small, "activations")


def test_multi_token_prediction_layers_are_like_the_last_layer() -> None:
    run = served("vllm-0.33", "deepseek-v3", gpu=None, speculative_method="mtp", max_num_seqs=8, weights="fp8")
    s, alone = (
        resolve_serving(run),
        resolve_serving(served("vllm-0.33", "deepseek-v3", gpu=None, max_num_seqs=8, weights="fp8")),
    )
    assert s.draft is not None
    assert s.draft.tokens == 1
    kept = layers_of(s)
    assert len(kept) == 1
    assert kept[0] == alone.caches[-1]
    more = sum(h.bytes for h in rank_weights(s) if h.group != TABLE) - sum(
        h.bytes for h in rank_weights(alone) if h.group != TABLE
    )
    experts = 256 * 3 * 7168 * 2048  # a byte each
    joined = (2 * 7168 * 7168 + 3 * 7168) * BF16
    assert [h.bytes for h in rank_weights(s) if h.what.startswith("projections and norms")] == [joined]
    assert experts + joined < more < 1.05 * (experts + joined)


def test_a_draft_model_is_given_one_token_more_of_every_request() -> None:
    run = served("vllm-0.33", draft_model="llama-3.2-1b", num_speculative_tokens=4, max_num_seqs=64)
    s = resolve_serving(changed(run, "serving", max_num_batched_tokens=4096))
    made = {h.what: h.bytes for h in rank_weights(s)}
    assert made["inputs of the draft model"] == (4096 + 64) * (4 + 8 + 8)  # ids, positions, where keys go
    assert made["proposed tokens and their probabilities"] == 64 * 4 * (8 + 4)


def test_a_draft_models_experts_are_divided_by_their_width() -> None:
    """Regardless of the model's: enable_expert_parallel applies only to the model."""
    config = {"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128, "num_local_experts": 3}
    small = {"config": {**config, "num_experts_per_tok": 2}}
    run = RunSpec(model=small, task="generate", profile="vllm-0.33", parallelism={"world": 2, "tp": 2, "ep": 2})
    asked = {"draft_model": small, "num_speculative_tokens": 2}
    both = resolve_serving(changed(run, "serving", **asked))
    matrix = 64 * 128 * BF16
    experts = {h.what: h.bytes for h in rank_weights(both) if h.group == "mlp"}
    assert list(experts.values()) == [2 * 2 * 3 * matrix, 2 * 3 * 3 * matrix // 2]  # two of three; half of each


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"profile": "tgi-3", "draft_model": "llama-3.2-1b"}, "serving.speculative_method"),
    ({"profile": "vllm-0.11", "draft_model": "llama-3.2-1b"}, "serving.speculative_method"),
    ({"profile": "llama.cpp-2026", "speculative_method": "ngram"}, "serving.speculative_method"),
    ({"profile": "vllm-0.33", "draft_model": "llama-3.2-1b"}, "serving.num_speculative_tokens"),
    ({"profile": "vllm-0.33", "num_speculative_tokens": 3}, "serving.num_speculative_tokens"),
    ({"profile": "vllm-0.33", "speculative_method": "eagle", "num_speculative_tokens": 3}, "serving.draft_model"),
    ({"profile": "vllm-0.33", "speculative_method": "ngram"}, "serving.num_speculative_tokens"),
    ({"profile": "vllm-0.33", "speculative_method": "mtp"}, "serving.speculative_method"),
    ({"profile": "sglang-0.5", "speculative_method": "mtp"}, "serving.speculative_method"),
    ({"profile": "sglang-0.5", "draft_model": "qwen2-0.5b"}, "serving.draft_model"),
    ({"profile": "sglang-0.5", "draft_model": "/no/such/config.json"}, "serving.draft_model"),
    ({"profile": "sglang-0.5", "speculative_method": "ngram", "draft_weights": "fp8"}, "serving.draft_weights"),
    ({"profile": "sglang-0.5", "draft_model": "qwen2-0.5b", "draft_weights": "bogus"}, "serving.draft_weights"),
]


@pytest.mark.parametrize(("fields", "field"), REFUSED, ids=str)
def test_drafts_unsupported_by_an_engine_are_refused_by_field(fields: dict[str, Any], field: str) -> None:
    serving = {name: value for name, value in fields.items() if name != "profile"}
    with pytest.raises(MemplanError) as caught:
        estimate(served(fields["profile"], **serving))
    assert caught.value.field == field
    assert "\n" not in str(caught.value)
