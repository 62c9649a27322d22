"""Axes of the vision and audio towers of Gemma 4 and Step-3.7, whose weights are loaded but whose forward pass is not
estimated.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from memplan.core.errors import ConfigError
from memplan.models.configs.towers import size
from memplan.models.facts import ModelFacts
from memplan.models.layers import as_json


def gemma4_towers(m: ModelFacts) -> Mapping[str, int]:
    h, a = size(m, "hidden_size", 768), size(m, "num_attention_heads", 12)
    d, patch = size(m, "head_dim", 64), size(m, "patch_size", 16)
    vision = {
        "vL": size(m, "num_hidden_layers", 16),
        "vh": h,
        "va": a,
        "vk": size(m, "num_key_value_heads", 12),
        "vd": d,
        "vd4": max(1, d // 4),
        "vf": size(m, "intermediate_size", 3072),
        "vin": 3 * patch * patch,
        "vpositions": size(m, "position_embedding_size", 10240),
    }
    audio = m.part("audio_config")
    if not audio:
        return vision
    width = _audio(audio, "hidden_size", 1024)
    key = "subsampling_conv_channels"
    channels: object = audio.get(key, (128, 32))
    if not isinstance(channels, tuple) or len(cast(tuple[object, ...], channels)) != 2:
        raise ConfigError(f"config: audio_config.{key} must be two numbers, not {as_json(cast(object, channels))}", key)
    first, second = (_number(key, n) for n in cast(tuple[object, ...], channels))
    return {
        **vision,
        "uL": _audio(audio, "num_hidden_layers", 12),
        "uh": width,
        "uh2": width // 2,
        "ud": width // _audio(audio, "num_attention_heads", 8),
        "uo": _audio(audio, "output_proj_dims", 1536),
        "uc0": first,
        "uc1": second,
        "uin": first // 4 * second,
        "ukernel": _audio(audio, "conv_kernel_size", 5),
    }


def unified_embedders(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of the unified Gemma 4's embedders of pixels and of sound."""
    pixels = size(m, "patch_size", 16) * size(m, "pooling_kernel_size", 3)
    return {
        "vh": size(m, "mm_embed_dim", 3840),
        "vo": size(m, "output_proj_dims", 3840),
        "vin": 3 * pixels**2,
        "vpositions": size(m, "mm_posemb_size", 1120),
        "uo": _audio(m.part("audio_config"), "audio_embed_dim", 640),
    }


def _audio(part: Mapping[str, object], key: str, default: int) -> int:
    value = part.get(key)
    return default if value is None else _number(key, value)


def _number(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**21:
        raise ConfigError(f"config: audio_config.{key} must be a whole number from 1, not {as_json(value)}", key)
    return value


def step_tower(m: ModelFacts) -> Mapping[str, int]:
    h, side, patch = size(m, "hidden_size", 1536, "width"), size(m, "image_size", 728), size(m, "patch_size", 14)
    ratio: object = m.part("vision_config").get("mlp_ratio", 8960 / 1536)
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1000:
        raise ConfigError(f"config: vision_config.mlp_ratio must be a number, not {as_json(ratio)}", "mlp_ratio")
    return {
        "vL": size(m, "num_hidden_layers", 47, "layers"),
        "vh": h,
        "vf": int(h * ratio),
        "vd4": max(1, h // size(m, "num_attention_heads", 16, "heads") // 4),
        "vin": size(m, "num_channels", 3) * patch * patch,
        "vpositions": (side // patch) ** 2,
    }
