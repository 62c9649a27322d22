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
_SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_COHERE = {"model_type": "cohere2", **DECODERS["cohere2"]}
_LLAMA = {"model_type": "llama", **DECODERS["llama"]}
_LISTENING = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "num_mel_bins": 16,
    "max_source_positions": 20,
}
_UNIFIED = DECODERS["gemma4_unified_text"]
# variants: large Gemma 4 models have experts, small ones keys reused by later layers
TINY: dict[str, dict[str, Any]] = {
    "aya_vision": {"model_type": "aya_vision", "text_config": _COHERE, "vision_config": _SIGLIP},
    "cohere2_vision": {
        "model_type": "cohere2_vision",
        "text_config": _COHERE,
        "vision_config": {**_SIGLIP, "vision_use_head": False},
        "alignment_intermediate_size": 48,
    },
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
    "gemma4_unified": {
        "model_type": "gemma4_unified",
        "text_config": {**_UNIFIED, "model_type": "gemma4_unified_text"},
        "vision_config": {
            "model_type": "gemma4_unified_vision",
            "patch_size": 4,
            "mm_embed_dim": 32,
            "mm_posemb_size": 8,
            "output_proj_dims": 32,
        },
        "audio_config": {"model_type": "gemma4_unified_audio", "audio_embed_dim": 24},
    },
    "lfm2_vl": {
        "model_type": "lfm2_vl",
        "text_config": {"model_type": "lfm2", **DECODERS["lfm2"]},
        "vision_config": {**_SIGLIP, "model_type": "siglip2_vision_model", "num_patches": 16},
        "projector_hidden_size": 56,
    },
    **{
        model_type: {
            "model_type": model_type,
            "text_config": _LLAMA,
            "vision_config": {**_SIGLIP, "model_type": "clip_vision_model"},
        }
        for model_type in ("llava_next", "llava_next_video")
    },
    "llava_onevision": {
        "model_type": "llava_onevision",
        "text_config": {"model_type": "qwen2", **DECODERS["qwen2"]},
        "vision_config": {**_SIGLIP, "vision_use_head": False},
    },
    "qwen2_audio": {
        "model_type": "qwen2_audio",
        "text_config": {"model_type": "qwen2", **DECODERS["qwen2"]},
        "audio_config": {"model_type": "qwen2_audio_encoder", **_LISTENING},
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
    "voxtral": {
        "model_type": "voxtral",
        "text_config": {**_LLAMA, "head_dim": 16},
        "audio_config": {"model_type": "voxtral_encoder", **_LISTENING},
    },
}
