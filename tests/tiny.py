"""Small configs of every model_type that transformers can build: odd sizes, three layers, grouped heads if allowed."""

from __future__ import annotations

from typing import Any

_BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 176,
    "vocab_size": 300,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_GPT = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300, "n_positions": 128}


def _base(**more: Any) -> dict[str, Any]:
    return {**_BASE, **more}


_HEADS = {"head_dim": 16}
# Queries and keys of 24, of which 8 are rotated, and values of 16; ranks of 24 and 32.
_LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}

# Two of four groups of experts, four of the eight in them, and two that every token uses.
_ROUTED = {
    "moe_intermediate_size": 48,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
}

_INDEXED = {"index_n_heads": 16, "index_head_dim": 24, "index_topk": 24}
_MAMBA = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "state_size": 16,
    "time_step_rank": 16,
    "vocab_size": 300,
    "pad_token_id": 0,
}
_DELTA: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
_SHARED = {
    "num_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}

# As little as a config can say.
SMALLEST: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}

TINY: dict[str, dict[str, Any]] = {
    "bloom": {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300},
    "cohere": _base(),
    "cohere2": _base(num_hidden_layers=5, sliding_window=32, **_HEADS),
    "deepseek_v2": _base(num_key_value_heads=4, topk_method="group_limited_greedy", **_LATENT, **_ROUTED),
    "deepseek_v3": _base(num_key_value_heads=4, **_LATENT, **_ROUTED),
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 128,
        "vocab_size": 300,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 176, "moe_num_experts": 4, "moe_top_k": 2, "moe_jitter_eps": 0.01},
    },
    "deepseek_v32": _base(num_key_value_heads=4, **_LATENT, **_ROUTED, **_INDEXED),
    "ernie4_5": _base(**_HEADS),
    "ernie4_5_moe": _base(
        moe_intermediate_size=48, moe_num_experts=8, moe_k=2, moe_num_shared_experts=2, moe_layer_start_index=1
    ),
    "exaone4": _base(num_hidden_layers=5, sliding_window=32),
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 300,
        "multi_query": True,
        "parallel_attn": True,
        "bias": False,
    },
    "falcon_mamba": _MAMBA,
    "gemma": _base(**_HEADS),
    "gemma2": _base(num_hidden_layers=4, sliding_window=32, **_HEADS),
    "gemma3_text": _base(num_hidden_layers=7, sliding_window=32, **_HEADS),
    "gemma3n_text": _base(
        num_hidden_layers=6,
        sliding_window=32,
        hidden_size_per_layer_input=24,
        vocab_size_per_layer_input=280,
        num_kv_shared_layers=2,
        layer_types=[*["sliding_attention"] * 3, "full_attention", "sliding_attention", "full_attention"],
        activation_sparsity_pattern=[0.95, 0.95, 0.0, 0.0, 0.0, 0.0],
        laurel_rank=16,
        **_HEADS,
    ),
    "gemma4_text": _base(
        num_hidden_layers=6,
        num_key_value_heads=1,
        sliding_window=32,
        global_head_dim=32,
        hidden_size_per_layer_input=24,
        vocab_size_per_layer_input=280,
        num_kv_shared_layers=3,
        use_double_wide_mlp=True,
        layer_types=["sliding_attention", "full_attention"] * 3,
        **_HEADS,
    ),
    "glm": _base(**_HEADS),
    "glm4": _base(**_HEADS),
    "glm4_moe": _base(moe_intermediate_size=48, n_routed_experts=8, num_experts_per_tok=2, use_qk_norm=True, **_HEADS),
    "glm4_moe_lite": _base(num_key_value_heads=4, **{**_LATENT, **_ROUTED, "v_head_dim": 24}),
    "glm_moe_dsa": _base(
        num_key_value_heads=4, indexer_types=["full", "full", "shared"], **_LATENT, **_ROUTED, **_INDEXED
    ),
    "gpt2": {**_GPT, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1},
    "gpt_bigcode": {**_GPT, "n_inner": 256, "multi_query": True},
    "gpt_neo": {
        "hidden_size": 64,
        "num_layers": 4,
        "num_heads": 4,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 32,
    },
    "gpt_oss": _base(num_local_experts=8, num_experts_per_tok=2, sliding_window=32, **_HEADS),
    "gpt_neox": {k: v for k, v in _BASE.items() if k != "num_key_value_heads"},
    "gptj": {**_GPT, "rotary_dim": 8},
    "granite": _base(),
    "granitemoe": _base(num_local_experts=8, num_experts_per_tok=2, attention_dropout=0.1),
    "granitemoehybrid": _base(
        num_hidden_layers=4,
        layer_types=["mamba", "mamba", "attention", "mamba"],
        position_embedding_type="nope",
        intermediate_size=48,
        shared_intermediate_size=88,
        num_local_experts=4,
        num_experts_per_tok=2,
        mamba_n_heads=8,
        mamba_d_state=24,
        mamba_n_groups=2,
        mamba_chunk_size=32,
    ),
    "hunyuan_v1_dense": _base(**_HEADS),
    "hunyuan_v1_moe": _base(num_experts=8, moe_topk=2, **_HEADS),
    "internlm3": _base(**_HEADS),
    "jamba": _base(
        num_hidden_layers=4,
        num_experts=4,
        num_experts_per_tok=2,
        attn_layer_period=4,
        attn_layer_offset=2,
        mamba_dt_rank=16,
    ),
    "llama": _base(),
    "mamba": _MAMBA,
    "mamba2": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "expand": 1,
        "num_heads": 2,
        "head_dim": 64,
        "state_size": 24,
        "n_groups": 2,
        "chunk_size": 32,
        "vocab_size": 300,
        "pad_token_id": 0,
    },
    "minimax_m2": _base(num_local_experts=8, num_experts_per_tok=2, rotary_dim=8, **_HEADS),
    "minicpm3": _base(num_key_value_heads=4, **_LATENT),
    "llama4_text": _base(
        num_hidden_layers=4,
        intermediate_size=48,
        intermediate_size_mlp=176,
        attention_chunk_size=32,
        no_rope_layer_interval=2,
        interleave_moe_layer_step=2,
        num_local_experts=6,
        num_experts_per_tok=1,
        **_HEADS,
    ),
    "mimo_v2_flash": _base(
        num_hidden_layers=5,
        num_attention_heads=8,
        head_dim=48,
        v_head_dim=32,
        moe_intermediate_size=40,
        n_routed_experts=8,
        num_experts_per_tok=3,
        sliding_window=32,
        layer_types=["full_attention", *["sliding_attention"] * 3, "full_attention"],
    ),
    "minimax_m3_vl_text": _base(
        num_hidden_layers=4,
        intermediate_size=40,
        dense_intermediate_size=176,
        shared_intermediate_size=48,
        num_local_experts=8,
        num_experts_per_tok=3,
        index_n_heads=2,
        index_head_dim=32,
        index_block_size=32,
        index_topk_blocks=2,
        layer_types=["full_attention"] * 2 + ["minimax_m3_sparse"] * 2,
        mlp_layer_types=["dense", *["sparse"] * 3],
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5},
        head_dim=32,
    ),
    "ministral": _base(
        sliding_window=32, layer_types=["sliding_attention", "full_attention", "sliding_attention"], **_HEADS
    ),
    "ministral3": _base(**_HEADS),
    "mistral": _base(sliding_window=None),
    "mixtral": _base(num_local_experts=8, num_experts_per_tok=2, router_jitter_noise=0.01),
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 3, "max_seq_len": 128, "vocab_size": 300},
    "nemotron": _base(**_HEADS),
    "nemotron_h": {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "hybrid_override_pattern": "ME*-ME",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "intermediate_size": 120,
        "vocab_size": 300,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 24,
        "n_groups": 2,
        "chunk_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 56,
        "moe_latent_size": 40,
        "moe_shared_expert_intermediate_size": 72,
    },
    "olmo": _base(),
    "olmo2": _base(),
    "olmoe": _base(num_experts=8, num_experts_per_tok=2),
    "olmo3": _base(num_hidden_layers=5, sliding_window=32),
    "opt": {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 256,
        "vocab_size": 300,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 64,
        "do_layer_norm_before": True,
    },
    "phi": _base(),
    "phi3": _base(),
    "phimoe": _base(num_local_experts=8, num_experts_per_tok=2, attention_bias=True, lm_head_bias=True),
    "qwen2": _base(),
    "qwen2_moe": _base(
        moe_intermediate_size=48,
        shared_expert_intermediate_size=96,
        num_experts=8,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    ),
    "qwen3": _base(**_HEADS),
    "seed_oss": _base(**_HEADS),
    "qwen3_moe": _base(moe_intermediate_size=48, num_experts=8, num_experts_per_tok=2, mlp_only_layers=[1], **_HEADS),
    "qwen3_5_moe_text": _base(**_DELTA, **_SHARED),
    "qwen3_5_text": _base(**_DELTA),
    "qwen3_next": _base(**_DELTA, **_SHARED),
    "smollm3": _base(num_hidden_layers=5),
    "stablelm": _base(),
    "starcoder2": _base(sliding_window=None),
}

# What peft is asked to adapt of families of which it does not take all linear layers.
TARGETS: dict[str, list[str]] = {
    "falcon_mamba": ["in_proj", "x_proj"],
    "mamba": ["in_proj", "x_proj"],
    "mamba2": ["in_proj"],
    "nemotron_h": ["in_proj", "q_proj", "up_proj"],
}
