"""Caches of layers: closed-form arithmetic, published figures, and transformers' own caches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.catalogue.inference.caches import bytes_of, bytes_per_token, caches
from memplan.core.errors import UnsupportedModelError
from memplan.models.cards import card_names, load_card
from memplan.models.model import ModelSpec
from memplan.probe.libraries import model_class
from tests.sampling import examples, sampled
from tests.tiny import TINY

KIB, MIB = 2**10, 2**20

# Bytes that a token adds in bf16: layers x numbers per layer x 2 bytes.
PER_TOKEN = {
    "llama-3-8b": 32 * 2 * 8 * 128 * 2,
    "llama-3-70b": 80 * 2 * 8 * 128 * 2,
    "llama-2-7b": 32 * 2 * 32 * 128 * 2,
    "mistral-7b-v0.1": 32 * 2 * 8 * 128 * 2,
    "qwen2.5-32b": 64 * 2 * 8 * 128 * 2,
    "falcon-7b": 32 * 2 * 1 * 64 * 2,  # multi-query
    "starcoder": 40 * 2 * 1 * 128 * 2,
    "opt-13b": 40 * 2 * 40 * 128 * 2,  # one key head per query head
    "deepseek-v3": 61 * (512 + 64) * 2,
    "deepseek-v3.2": 61 * (512 + 64 + 128) * 2,  # plus the indexer's keys
    "glm-5.2": (78 * (512 + 64) + 21 * 128) * 2,  # 21 layers have an indexer; the others reuse its choice
    "gemma-2-9b": 42 * 2 * 8 * 256 * 2,
    "gemma-3n-e4b-text": (35 - 15) * 2 * 2 * 256 * 2,  # 15 layers reuse earlier layers' keys
    "gemma-4-31b": (50 * 16 * 256 + 10 * 4 * 512) * 2 * 2,  # heads of two widths
    "gpt-oss-20b": 24 * 2 * 8 * 64 * 2,
    "jamba-v0.1": 4 * 2 * 8 * 128 * 2,
    "nemotron-super-49b-v1": 49 * 2 * 8 * 128 * 2,  # 31 blocks have no attention
    "mimo-v2-flash": (9 * 4 + 39 * 8) * (192 + 128) * 2,
    "mamba-2.8b": 0,
}

# Cache bytes of a sequence, including windows, states and encoders.
SEQUENCES = {
    ("llama-3-8b", 8192): 8192 * 128 * KIB,
    ("gemma-2-9b", 8192): (21 * 8192 + 21 * 4095) * 2 * 8 * 256 * 2,
    ("gemma-3-27b", 131072): (10 * 131072 + 52 * 1023) * 2 * 16 * 128 * 2,
    ("llama-4-scout", 100_000): (12 * 100_000 + 36 * 8191) * 2 * 8 * 128 * 2,
    ("mamba-2.8b", 5): 64 * 5120 * (4 * 2 + 16 * 4),
    ("mamba-2.8b", 500_000): 64 * 5120 * (4 * 2 + 16 * 4),
    ("jamba-v0.1", 1000): 1000 * 16 * KIB + 28 * 8192 * (4 * 2 + 16 * 4),
    ("qwen3-next-80b-a3b", 1000): 1000 * 12 * 2 * 2 * 256 * 2 + 36 * ((2 * 16 + 32) * 128 * 4 * 2 + 32 * 128 * 128 * 4),
    ("kimi-linear-48b-a3b", 1000): 1000 * 7 * 576 * 2 + 20 * (3 * 4096 * 4 * 2 + 32 * 128 * 128 * 4),
    ("granite-4.0-h-tiny", 10): 10 * 4 * 2 * 4 * 128 * 2 + 36 * ((3072 + 2 * 128) * 4 * 2 + 48 * 64 * 128 * 4),
}

# Published figures: model, tokens, bytes, source.
PUBLISHED = (
    ("deepseek-v3", 1, 70_272, "DeepSeek-V3 insights, arXiv:2505.09343, table 1: 70.272 KB a token"),
    ("qwen2.5-72b", 1, 327_680, "the same: 327.680 KB a token"),
    ("llama-3.1-405b", 1, 516_096, "the same: 516.096 KB a token"),
    ("llama-3-8b", 8192, 2**30, "128 KiB a token, as vLLM's issues divide it"),
    ("jamba-v0.1", 262_144, 4 * 2**30 + 28 * 8192 * 72, "Jamba, arXiv:2403.19887, table 1: 4 GB at 256K tokens"),
    ("mixtral-8x7b", 262_144, 32 * 2**30, "the same: 32 GB"),
    ("llama-2-7b", 262_144, 128 * 2**30, "the same: 128 GB"),
)


@pytest.mark.parametrize(("name", "wanted"), PER_TOKEN.items())
def test_a_token_takes_what_the_arithmetic_says(name: str, wanted: int) -> None:
    assert bytes_per_token(caches(load_card(name))) == wanted


@pytest.mark.parametrize(("key", "wanted"), SEQUENCES.items())
def test_a_sequence_takes_what_the_arithmetic_says(key: tuple[str, int], wanted: int) -> None:
    name, tokens = key
    assert bytes_of(caches(load_card(name)), tokens) == wanted


@pytest.mark.parametrize(("name", "tokens", "wanted", "source"), PUBLISHED)
def test_published_figures_are_met_to_the_byte(name: str, tokens: int, wanted: int, source: str) -> None:
    assert bytes_of(caches(load_card(name)), tokens) == wanted, source


def test_latent_attention_expanded_takes_heads_of_keys_and_values() -> None:
    """As in transformers 4: 128 heads with keys 128 + 64 wide and values 128 wide."""
    kept = caches(load_card("deepseek-v3"), "expanded")
    assert bytes_per_token(kept) == 61 * 128 * (128 + 64 + 128) * 2


def test_compressed_attention_keeps_one_entry_per_block_of_tokens() -> None:
    """DeepSeek V4 at 128 k tokens: an entry per 4 tokens with an index key, or per 128, plus a window of 128."""
    tokens, window = 131_072, 127 * 512
    sliding, heavy = 2 * 2 * window * 2, 20 * (window + tokens // 128 * 512) * 2
    chosen = 21 * ((window + tokens // 4 * (512 + 128)) * 2 + 4 * (512 + 128) * (2 + 4))
    assert bytes_of(caches(load_card("deepseek-v4-flash")), tokens) == sliding + heavy + chosen


def test_an_encoder_decoder_caches_the_encoders_output_once() -> None:
    layers = caches(load_card("t5-base"))
    assert bytes_of(layers, 10, source=512) == 12 * 2 * 12 * 64 * 2 * (10 + 512)
    whisper = caches(load_card("whisper-large-v3"))
    assert bytes_of(whisper, 448, source=1500) == 32 * 2 * 1280 * 2 * (448 + 1500)


def test_cross_attention_layers_cache_the_image_tokens() -> None:
    layers = caches(load_card("llama-3.2-11b-vision"))
    seen = 4 * 1601  # four tiles of 40 x 40 patches and a class token
    assert bytes_of(layers, 100, source=seen) == (32 * 100 + 8 * seen) * 2 * 8 * 128 * 2


def test_an_encoder_generates_nothing() -> None:
    with pytest.raises(UnsupportedModelError, match="is an encoder"):
        caches(load_card("bert-base-uncased"))


def test_an_fp8_cache_is_half_as_large_except_for_states() -> None:
    llama = caches(load_card("llama-3-8b"))
    assert bytes_per_token(llama, cache_dtype="fp8") * 2 == bytes_per_token(llama)
    mamba = caches(load_card("mamba-2.8b"))
    assert bytes_of(mamba, 1, cache_dtype="fp8") == bytes_of(mamba, 1)


@pytest.mark.parametrize(("name", "tp", "share"), [("llama-3-8b", 4, 4), ("llama-3-8b", 16, 8), ("deepseek-v3", 8, 1)])
def test_ranks_divide_heads_and_no_latent(name: str, tp: int, share: int) -> None:
    """With 8 heads, 16 ranks hold one each; a latent has no heads to divide."""
    layers = caches(load_card(name))
    assert bytes_per_token(layers, tp=tp) * share == bytes_per_token(layers)


DECODERS = [name for name in card_names() if load_card(name).objective in ("causal_lm", "seq2seq_lm")]


@settings(max_examples=examples(200))
@given(st.sampled_from(DECODERS), st.integers(1, 300_000), st.integers(1, 3000), st.sampled_from([1, 2, 4, 8]))
def test_laws(name: str, tokens: int, more: int, tp: int) -> None:
    """More tokens never take less, nor more than they add; more ranks and 8 bits never take more."""
    layers = caches(load_card(name))
    now, later = bytes_of(layers, tokens), bytes_of(layers, tokens + more)
    slack = sum(p.elements * p.every * 2 for c in layers for p in c.parts if p.per == "rest")  # tokens without an entry
    assert now <= later + slack
    assert later - now <= more * bytes_per_token(layers) + slack
    assert bytes_of(layers, tokens, tp=2 * tp) <= bytes_of(layers, tokens, tp=tp) <= now
    assert bytes_of(layers, tokens, cache_dtype="fp8") <= now


TRACED = sorted({*sorted(TINY)[::4], "deepseek_v4", "gemma4_text", "glm_moe_dsa", "kimi_linear"})


@pytest.mark.torch
@pytest.mark.parametrize("model_type", sampled(TRACED))
@pytest.mark.filterwarnings("ignore")
def test_transformers_caches_are_met_to_the_byte(model_type: str) -> None:
    """Every layer of a small model's cache after 41 tokens, which do not fill the last entry."""
    import torch
    import transformers

    config = {"model_type": model_type, **TINY[model_type]}
    kind = {key: value for key, value in config.items() if key != "model_type"}
    made: Any = getattr(transformers, model_class(model_type)).from_config(
        transformers.AutoConfig.for_model(model_type, **kind), dtype=torch.bfloat16
    )
    with torch.no_grad():
        out = made.eval()(torch.randint(1, 100, (1, 41)), use_cache=True)

    def tensors(value: object) -> dict[object, int]:
        if isinstance(value, torch.Tensor):  # a view counts once, with its storage; counters do not count
            return {(value.data_ptr(), value.shape): value.nbytes} if value.numel() > 1 else {}
        return {k: n for v in value.values() for k, n in tensors(v).items()} if isinstance(value, dict) else {}

    found = [sum(tensors(dict(vars(layer))).values()) for layer in out.cache.layers]
    assert found == [layer.bytes_of(41) for layer in caches(ModelSpec(config))]
