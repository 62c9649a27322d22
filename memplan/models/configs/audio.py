"""Audio-language models: the language model's config, and the sizes of the audio tower.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.core.errors import ConfigError
from memplan.models.configs.images import grid_axes
from memplan.models.configs.vision import LLAVA
from memplan.models.facts import Family, ImageFacts, ModelFacts, flash_width
from memplan.models.family_facts import AttentionFacts, Picture, ServingFacts
from memplan.models.layers import MOST_LAYERS, as_json

# Axis of Whisper's encoder -> its keys in `audio_config`, and the default of both classes.
_ENCODER = {
    "va": (("encoder_attention_heads", "num_attention_heads"), 20),
    "uL": (("encoder_layers", "num_hidden_layers"), 32),
    "uh": (("d_model", "hidden_size"), 1280),
    "uf": (("encoder_ffn_dim", "intermediate_size"), 5120),
    "uin": (("num_mel_bins",), 128),
    "upositions": (("max_source_positions",), 1500),
}


def encoder(m: ModelFacts) -> dict[str, int]:
    """Return the axes of Whisper's encoder. Raises ConfigError for a size that is not one."""
    part, axes = m.part("audio_config"), dict[str, int]()
    for axis, (keys, default) in _ENCODER.items():
        key = next((k for k in keys if part.get(k) is not None), keys[0])
        value: object = part.get(key, default)
        most = MOST_LAYERS if axis == "uL" else 2**21
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            shown = as_json(value)
            raise ConfigError(f"config: audio_config.{key} must be a whole number from 1 to {most:,}, not {shown}", key)
        axes[axis] = value
    width, heads = axes["uh"], axes["va"]
    if width % heads:
        raise ConfigError(f"config: audio_config: {heads} heads do not divide {width}", "audio_config")
    return {**axes, "vd": width // heads, "vd32": flash_width(width // heads)}


_FRAMES = 100  # of a second, two of which are a position. Source: transformers 5.24 feature_extraction_whisper.py


def _cut(m: ModelFacts, seconds: int | None) -> tuple[int, Picture]:
    """Return a window, which cuts longer clips and is masked after shorter ones; two of its positions make a token.

    Source: transformers 5.24 models/qwen2_audio/modeling_qwen2_audio.py _get_feat_extract_output_lengths.
    """
    positions = encoder(m)["upositions"]
    heard = min(positions, positions if seconds is None else seconds * _FRAMES // 2)
    return 1, Picture(positions, 1, (heard - 2) // 2 + 1, 2)


def _joined(m: ModelFacts, seconds: int | None) -> tuple[int, Picture]:
    """Return the windows that a clip fills, of which the last is silent to its end. Several positions make a token.

    Source: transformers 5.24 models/voxtral/processing_voxtral.py, modeling_voxtral.py get_audio_features.
    """
    axes = encoder(m)
    positions, merge = axes["upositions"], max(1, axes["uf"] // axes["uh"])
    if axes["uf"] != axes["uh"] * merge or positions % merge:
        raise ConfigError(
            "config: audio_config.intermediate_size: no whole number of positions is as wide", "audio_config"
        )
    windows = 1 if seconds is None else -(-seconds * _FRAMES // (2 * positions))
    return windows, Picture(positions, 1, positions // merge, merge)


def _heard(m: ModelFacts, windows: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of audio windows.

    pooled   tokens of a window before its silence is cut
    unread   tokens that are cut, if the encoder does not attend to silence
    """
    grid, pooled = picture.patches, picture.patches // picture.merge
    return {
        **grid_axes(windows, picture),
        "merged": windows * picture.tokens,
        "pooled": pooled,
        "unread": pooled - picture.tokens,
        "grid8": -(-grid // 8) * 8,
        "grid_uneven": grid if grid % 8 else 0,
    }


_VOXTRAL_EARS = ImageFacts(clip=_joined, axes=_heard)
_VOXTRAL = LLAVA._replace(
    defaults={
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 30,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
    },
    axes=encoder,
    stack="audio_language",
    serving=ServingFacts(is_modelled=False),
    images=_VOXTRAL_EARS,
)
FAMILIES: dict[str, Family] = {
    "qwen2_audio": _VOXTRAL._replace(
        defaults={"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 151936},
        attention=AttentionFacts(single_sequence="layers"),
        wraps="qwen2",
        images=_VOXTRAL_EARS._replace(clip=_cut, has_masks=True),
    ),
    "voxtral": _VOXTRAL,
}
