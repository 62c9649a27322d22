"""Small configs of the vision-language models: odd sizes, a few layers, grouped heads, towers of a few blocks."""

from __future__ import annotations

from typing import Any

from tests.tiny import TINY as TEXTS
from tests.tiny_towers import TINY as RESTING

_TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 2000,
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
}
_IDS = {"image_token_id": 1990, "video_token_id": 1991, "vision_start_token_id": 1992, "vision_end_token_id": 1993}
_QWEN_EYES = {"depth": 5, "hidden_size": 160, "intermediate_size": 432, "num_heads": 4, "out_hidden_size": 128}
_QWEN2 = {"rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]}}
_QWEN3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 4, 4]}}

_SIGLIP = {
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
_SMOL: dict[str, Any] = {
    "text_config": {**_TEXT, "model_type": "llama"},
    "vision_config": _SIGLIP,
    "image_token_id": 1990,
}
# windows of 2 seconds
_WHISPER = {
    "d_model": 160,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 640,
    "num_mel_bins": 24,
    "max_source_positions": 100,
}

_GEMMA = {
    "model_type": "gemma4_vision",
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 48,
    "patch_size": 4,
    "position_embedding_size": 512,
}

_GLM_TOWER = {"depth": 3, "hidden_size": 160, "intermediate_size": 432, "num_heads": 4, "out_hidden_size": 128}
TINY: dict[str, dict[str, Any]] = {
    "aya_vision": {
        "text_config": {"model_type": "cohere2", **TEXTS["cohere2"]},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "vision_use_head": False},
        "alignment_intermediate_size": 208,
        "image_token_index": 290,
    },
    "cohere2_vision": {
        "text_config": {"model_type": "cohere2", **TEXTS["cohere2"]},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "vision_use_head": False},
        "alignment_intermediate_size": 208,
        "image_token_id": 290,
    },
    "gemma3": {
        "text_config": {
            **_TEXT,
            "model_type": "gemma3_text",
            "num_hidden_layers": 7,
            "head_dim": 32,
            "sliding_window": 64,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "vision_use_head": False},
        "mm_tokens_per_image": 16,
        "image_token_index": 1990,
        "boi_token_index": 1991,
        "eoi_token_index": 1992,
    },
    "gemma4": {
        "text_config": {**TEXTS["gemma4_text"], "model_type": "gemma4_text"},
        "vision_config": {**_GEMMA, "use_clipped_linears": True},
        "audio_config": {
            "model_type": "gemma4_audio",
            "hidden_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "output_proj_dims": 176,
            "subsampling_conv_channels": [32, 24],
        },
        "image_token_id": 290,
        "video_token_id": 291,
        "audio_token_id": 292,
    },
    "gemma4_unified": {
        "text_config": {**TEXTS["gemma4_unified_text"], "model_type": "gemma4_unified_text"},
        "vision_config": {"patch_size": 4, "mm_embed_dim": 160, "mm_posemb_size": 128, "output_proj_dims": 160},
        "audio_config": {"audio_embed_dim": 112},
        "image_token_id": 290,
        "video_token_id": 291,
        "audio_token_id": 292,
    },
    "glm4v": {
        **{key: value for key, value in _IDS.items() if not key.startswith("vision")},
        "text_config": {
            **_TEXT,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
                "partial_rotary_factor": 0.5,
            },
        },
        "vision_config": {**_GLM_TOWER, "image_size": 112},
    },
    "glm_ocr": {
        **{key: value for key, value in _IDS.items() if not key.startswith("vision")},
        "text_config": {
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        "vision_config": _GLM_TOWER,
    },
    "idefics3": _SMOL,
    "internvl": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_SIGLIP, "image_size": [112, 112], "patch_size": [14, 14]},
        "image_token_id": 1990,
    },
    "kimi_k25": {
        "text_config": {"model_type": "deepseek_v3", **TEXTS["deepseek_v3"]},
        "vision_config": {
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 96,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        "projection_hidden_size": 64,
        "tie_word_embeddings": False,
    },
    "lfm2_vl": {
        "text_config": {"model_type": "lfm2", **TEXTS["lfm2"]},
        "vision_config": {
            "model_type": "siglip2_vision_model",
            **_SIGLIP,
            "patch_size": 16,
            "num_patches": 64,
            "vision_use_head": False,
        },
        "projector_hidden_size": 208,
        "image_token_id": 290,
    },
    "llama4": {
        "text_config": {**TEXTS["llama4_text"], "model_type": "llama4_text"},
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": 160,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 14,
            "projector_input_dim": 96,
            "projector_output_dim": 96,
            "vision_output_dim": 96,
        },
        "image_token_index": 290,
    },
    "llava": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_SIGLIP},
        "image_token_index": 1990,
    },
    "llava_next": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **_SIGLIP},
        "image_grid_pinpoints": [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336]],
        "image_token_index": 1990,
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "vision_use_head": False},
        "image_grid_pinpoints": [[112, 224], [224, 112], [224, 224], [336, 112], [112, 336], [448, 448]],
        "vision_aspect_ratio": "anyres_max_4",
        "vision_feature_layer": -1,
        "image_token_id": 1990,
        "video_token_id": 1991,
    },
    "mistral3": {
        "text_config": {**_TEXT, "model_type": "mistral", "head_dim": 32, "sliding_window": None},
        "vision_config": {
            "model_type": "pixtral",
            "hidden_size": 160,
            "intermediate_size": 432,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 560,
            "patch_size": 14,
        },
        "tie_word_embeddings": False,
        "image_token_index": 1990,
    },
    "mllama": {
        "text_config": {
            **_TEXT,
            "model_type": "mllama_text_model",
            "num_hidden_layers": 7,
            "cross_attention_layers": [1, 4],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        },
        "vision_config": {
            "model_type": "mllama_vision_model",
            "hidden_size": 160,
            "intermediate_size": 432,
            "num_hidden_layers": 4,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": 56,
            "patch_size": 14,
            "intermediate_layers_indices": [1, 2],
            "vision_output_dim": 480,
        },
        "image_token_index": 1990,
    },
    "paligemma": {
        "text_config": {**_TEXT, "model_type": "gemma", "head_dim": 32},
        "vision_config": {"model_type": "siglip_vision_model", **_SIGLIP, "vision_use_head": False},
        "image_token_index": 1990,
        "projection_dim": 128,
    },
    "qwen2_5_omni_thinker": {
        "text_config": {**_TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
        "vision_config": {**_QWEN_EYES, "fullatt_block_indexes": [2, 4]},
        "audio_config": {**_WHISPER, "n_window": 32, "output_dim": 128},
        "audio_token_index": 1990,
        "image_token_index": 1991,
        "video_token_index": 1992,
        "vision_start_token_id": 1993,
    },
    "qwen2_audio": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "audio_config": {"model_type": "qwen2_audio_encoder", **_WHISPER},
        "audio_token_index": 1990,
    },
    "qwen2_vl": {
        **_TEXT,
        **_QWEN2,
        **_IDS,
        "vision_config": {"depth": 4, "embed_dim": 160, "num_heads": 4, "hidden_size": 128},
    },
    "qwen2_5_vl": {
        **_TEXT,
        **_QWEN2,
        **_IDS,
        "vision_config": {**_QWEN_EYES, "fullatt_block_indexes": [2, 4]},
    },
    "qwen3_vl": {
        **_IDS,
        "text_config": {**_TEXT, **_QWEN3, "head_dim": 32, "num_hidden_layers": 5},
        "vision_config": {**_QWEN_EYES, "num_position_embeddings": 256, "deepstack_visual_indexes": [1, 3]},
    },
    "qwen3_vl_moe": {
        **_IDS,
        "text_config": {
            **_TEXT,
            **_QWEN3,
            "head_dim": 32,
            "num_hidden_layers": 5,
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        "vision_config": {**_QWEN_EYES, "num_position_embeddings": 256, "deepstack_visual_indexes": [1, 3]},
    },
    **{
        family: {
            **_IDS,
            "text_config": {
                **_TEXT,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 1e6,
                    "mrope_section": [2, 1, 1],
                    "partial_rotary_factor": 0.25,
                },
                "head_dim": 32,
                "num_hidden_layers": 5,
                "full_attention_interval": 3,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "linear_key_head_dim": 32,
                "linear_value_head_dim": 32,
                **more,
            },
            "vision_config": {
                "depth": 4,
                "hidden_size": 160,
                "intermediate_size": 432,
                "num_heads": 4,
                "out_hidden_size": 128,
                "num_position_embeddings": 256,
            },
        }
        for family, more in (
            ("qwen3_5", {}),
            (
                "qwen3_5_moe",
                {
                    "num_experts": 8,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": 96,
                    "shared_expert_intermediate_size": 96,
                },
            ),
        )
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {
            **_TEXT,
            **_QWEN3,
            "num_hidden_layers": 5,
            "moe_intermediate_size": 96,
            "num_experts": 8,
            "num_experts_per_tok": 2,
        },
        "vision_config": {**_QWEN_EYES, "num_position_embeddings": 256, "deepstack_visual_indexes": [1, 3]},
        "audio_config": {**_WHISPER, "downsample_hidden_size": 48, "output_dim": 128},
        "audio_token_id": 1990,
        "image_token_id": 1991,
        "video_token_id": 1992,
        "vision_start_token_id": 1993,
    },
    "smolvlm": _SMOL,
    "voxtral": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "audio_config": {"model_type": "voxtral_encoder", **_WHISPER},
        "audio_token_id": 1990,
    },
}

TINY["glm46v"] = TINY["glm4v"]

# Further shapes of a family: Gemma 4's large models have experts or none, no embeddings in every layer, and images
# whose tokens attend to each other.
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma4-large": {
        "model_type": "gemma4",
        "text_config": {**RESTING["gemma4-experts"]["text_config"], "use_bidirectional_attention": "vision"},
        "vision_config": {**_GEMMA, "standardize": True},
        "audio_config": None,
        "image_token_id": 290,
        "video_token_id": 291,
        "audio_token_id": 292,
    },
}
