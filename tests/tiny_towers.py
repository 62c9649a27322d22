"""Small configs of models with towers that are unused by text."""

from __future__ import annotations

from typing import Any

from tests.tiny import TINY as DECODERS

_EYES = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 64,
}
_EARS = {
    "model_type": "gemma4_audio",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "output_proj_dims": 24,
    "subsampling_conv_channels": [16, 8],
}
_EXPERTS = {
    **{key: value for key, value in DECODERS["gemma4_text"].items() if key != "use_double_wide_mlp"},
    "model_type": "gemma4_text",
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 3,
    "moe_intermediate_size": 48,
    "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
}
# variants: large Gemma 4 models have experts, small ones keys reused by later layers
TINY: dict[str, dict[str, Any]] = {
    "gemma4-experts": {
        "model_type": "gemma4",
        "text_config": _EXPERTS,
        "vision_config": {**_EYES, "standardize": True, "use_clipped_linears": False},
        "audio_config": None,
    },
    "gemma4-small": {
        "model_type": "gemma4",
        "text_config": {**DECODERS["gemma4_text"], "model_type": "gemma4_text"},
        "vision_config": {**_EYES, "standardize": False, "use_clipped_linears": True},
        "audio_config": {**_EARS, "use_clipped_linears": True},
    },
    "step3p7": {
        "model_type": "step3p7",
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 300,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "share_expert_dim": 48,
            "sliding_window": 32,
            "max_position_embeddings": 1024,
            "pad_token_id": 0,
            "layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention", "sliding_attention"],
        },
        "vision_config": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "mlp_ratio": 2.0,
        },
    },
}
