"""Axes of Gemma 4's vision tower and audio encoder, and of the layers that the unified model has in their place.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from memplan.core.errors import ConfigError
from memplan.models.configs.towers import size
from memplan.models.facts import ModelFacts, flash_width
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
        "vd2": d // 2,
        "vd4": max(1, d // 4),
        "vd32": flash_width(d),
        "vh32": -(-h // 32) * 32,
        "vf": size(m, "intermediate_size", 3072),
        "vin": 3 * patch * patch,
        "patch": patch,
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
    context = _audio(audio, "attention_chunk_size", 12) + _audio(audio, "attention_context_left", 13) - 1
    context += _audio(audio, "attention_context_right", 0, least=0)
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
        "ua": _audio(audio, "num_attention_heads", 8),
        "umel": first,
        "uhalfmel": first // 2,
        "uquartermel": first // 4,
        "uchunk": _audio(audio, "attention_chunk_size", 12),
        "ucontext": context,
        "ucontext1": context + 1,
        "upositions": context // 2 + 1,
    }


def clip_axes(m: ModelFacts, tokens: int) -> Mapping[str, int]:
    """Return the axes of the audio encoder for a clip of `tokens`. A chunk of them attends to those around it.

    uframes  frames of a clip, four to a token but the last
    uchunks  chunks
    ureach   tokens with those around the first and the last chunk
    umargin  tokens of all chunks with those around them
    ulong    tokens, and those before them that a convolution sees
    """
    if not m.part("audio_config"):
        return {}
    axes = gemma4_towers(m)
    chunk, around = axes["uchunk"], axes["ucontext"] - axes["uchunk"]
    chunks = -(-tokens // chunk)
    return {
        "uframes": 4 * tokens - 1,
        "uhalf": 2 * tokens,
        "uchunks": chunks,
        "upadded": chunks * chunk,
        "ureach": tokens + around + chunk - 1,
        "umargin": chunks * chunk + around,
        "ulong": tokens + axes["ukernel"] - 1,
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


def _audio(part: Mapping[str, object], key: str, default: int, least: int = 1) -> int:
    value = part.get(key)
    return default if value is None else _number(key, value, least)


def _number(key: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= 2**21:
        raise ConfigError(f"config: audio_config.{key} must be a whole number from {least}, not {as_json(value)}", key)
    return value
