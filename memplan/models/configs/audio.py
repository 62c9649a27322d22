"""Audio-language models: the language model's config, and the sizes of the audio tower.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from memplan.core.errors import ConfigError
from memplan.models.configs import images, processors, towers
from memplan.models.configs.images import grid_axes, rounded, windowed
from memplan.models.configs.vision import LLAVA, QWEN2_5_VL, QWEN3_VL_MOE, qwen3_vl_moe
from memplan.models.facts import Family, ImageFacts, ModelFacts, flash_width
from memplan.models.family_facts import (
    AttentionFacts,
    CheckpointFacts,
    GenerationFacts,
    Picture,
    ServingFacts,
    TrainingFacts,
)
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


# The axes of the encoder of a Qwen-Omni, which has a vision tower, too -> those of Whisper's.
_OMNI = {"ua": "va", "ud": "vd", "ud32": "vd32", **{axis: axis for axis in ("uL", "uh", "uf", "uin", "upositions")}}
_LONGEST = 300  # seconds. Source: nb_max_frames of preprocessor_config.json as published with Qwen2.5-Omni, Qwen3-Omni


def _omni_encoder(m: ModelFacts) -> dict[str, int]:
    """Return the axes of a Qwen-Omni's encoder. Raises ConfigError if its output is not as wide as the text model."""
    axes = encoder(m)
    width = _size(m, "output_dim", 3584)
    if width != m.hidden_size:
        raise ConfigError(
            f"config: audio_config.output_dim {width} must be the text's hidden_size {m.hidden_size}", "audio_config"
        )
    return {own: axes[axis] for own, axis in _OMNI.items()}


def _size(m: ModelFacts, key: str, default: int, most: int = 2**21) -> int:
    value: object = m.part("audio_config").get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(
            f"config: audio_config.{key} must be a whole number from 1 to {most:,}, not {as_json(value)}", key
        )
    return value


def _omni_note(_: ModelFacts) -> str:
    return "the thinker alone; the talker and the vocoder that speak are not loaded"


def _qwen2_5_omni(m: ModelFacts) -> dict[str, int]:
    return {**towers.qwen2_5_vl(m), **_omni_encoder(m)}


def _halved(m: ModelFacts, seconds: int | None) -> tuple[int, Picture]:
    """Return a clip of Qwen2.5-Omni: two frames are a position, and two of these a token.

    Source: transformers 5.24 models/qwen2_5_omni/processing_qwen2_5_omni.py.
    """
    positions = processors.clip_length(m, seconds, _LONGEST) * _FRAMES // 2
    return 1, Picture(positions, 1, positions // 2, 2)


def _chunked(m: ModelFacts, count: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of Qwen2.5-Omni's images, or of its clips, whose positions are a column.

    uframes   frames of a padded clip
    uheard    frames of all clips before the padding
    uchunks   chunks of all clips, which are read and attended to one by one
    uchunk    frames of the longest chunk
    urows     its positions
    """
    if picture.columns > 1:
        return windowed(m, count, picture)
    frames, half = 2 * picture.rows, _size(m, "n_window", 100, encoder(m)["upositions"])
    chunk = min(frames, 2 * half)
    chunks, tail = -(-frames // chunk), frames % chunk
    return {
        **_clip_axes(m, count, picture, frames, chunks, chunk),
        **_windows(count, chunk // 2, (frames // chunk, tail // 2)),
        "uframes": _LONGEST * _FRAMES,
        "urows": chunk // 2,
    }


def _qwen3_omni(m: ModelFacts) -> dict[str, int]:
    """Return the axes of Qwen3-Omni. `uc` are the channels of its convolutions, which halve the bands three times."""
    axes, channels = _omni_encoder(m), _size(m, "downsample_hidden_size", 480)
    bands = [axes["uin"]]
    for _ in range(3):
        bands.append((bands[-1] + 1) // 2)
    umel = {f"umel{i}": n for i, n in enumerate(bands) if i}
    return {**qwen3_vl_moe(m), **axes, "uc": channels, **umel, "uflat": channels * bands[-1]}


_ROWS = 13  # positions of a second. Source: modeling_qwen3_omni_moe.py _get_feat_extract_output_lengths


def _eighths(m: ModelFacts, seconds: int | None) -> tuple[int, Picture]:
    """Return a clip of Qwen3-Omni, whose chunks are seconds. Each position is a token.

    Source: transformers 5.24 models/qwen3_omni_moe/processing_qwen3_omni_moe.py. Raises ConfigError for other chunks.
    """
    if _size(m, "n_window", 50) != _FRAMES // 2:
        raise ConfigError("config: audio_config.n_window must be 50: its class counts 13 positions a chunk", "n_window")
    tokens = _ROWS * processors.clip_length(m, seconds, _LIMIT)
    return 1, Picture(tokens, 1, tokens)


_LIMIT = 2**20  # seconds, of clips that are not cut


def _seconds(m: ModelFacts, count: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of Qwen3-Omni's images, or of its clips, whose windows are of several chunks."""
    if picture.columns > 1:
        return grid_axes(count, picture)
    seconds = picture.rows // _ROWS
    window = _ROWS * max(1, _size(m, "n_window_infer", 800) // _FRAMES)
    return {
        **_clip_axes(m, count, picture, seconds * _FRAMES, seconds, _FRAMES),
        **_windows(count, min(window, picture.rows), divmod(picture.rows, window)),
        "uframes": seconds * _FRAMES,
        "uhalf": _FRAMES // 2,
        "uquarter": _FRAMES // 4,
        "urows": _ROWS,
    }


def _clip_axes(m: ModelFacts, count: int, picture: Picture, frames: int, chunks: int, chunk: int) -> Mapping[str, int]:
    return {
        **grid_axes(count, picture),
        "merged": count * picture.tokens,
        "heads": encoder(m)["va"],
        "head_width": encoder(m)["vd"],
        "uheard": count * frames,
        "uchunks": count * chunks,
        "uchunk": chunk,
    }


def _windows(count: int, window: int, of_clip: tuple[int, int]) -> Mapping[str, int]:
    """Return the axes of attention within windows, of which a clip has a number of full ones and the rest."""
    full, rest = of_clip
    return {
        **rounded("window", window),
        "windows": count * (full + (rest > 0)),
        "window_pairs": count * (full * window**2 + rest**2),
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
        generation=GenerationFacts(all_logits=True),
        wraps="qwen2",
        images=_VOXTRAL_EARS._replace(clip=_cut, has_masks=True),
    ),
    "qwen2_5_omni_thinker": QWEN2_5_VL._replace(
        defaults={
            **QWEN2_5_VL.defaults,
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "sliding_window": 32768,
            "max_window_layers": 28,
        },
        axes=_qwen2_5_omni,
        stack="qwen_omni",
        generation=GenerationFacts(all_logits=True),
        checkpoint=CheckpointFacts(),
        serving=ServingFacts(is_modelled=False),
        images=images.QWEN2_5_VL._replace(
            axes=_chunked,
            clip=_halved,
            pictures=partial(processors.pairs, 128 * 28 * 28, 768 * 28 * 28),
            video="",
        ),
        note=_omni_note,
    ),
    "qwen3_omni_moe_thinker": QWEN3_VL_MOE._replace(
        defaults={
            **QWEN3_VL_MOE.defaults,
            "vocab_size": 3584,
            "hidden_size": 2048,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        axes=_qwen3_omni,
        stack="qwen_omni",
        training=TrainingFacts(fuses_experts=True),
        generation=GenerationFacts(all_logits=True),
        checkpoint=CheckpointFacts(experts="split"),
        serving=ServingFacts(is_modelled=False),
        images=images.QWEN3_VL._replace(
            picture=partial(processors.qwen, *images.PIXELS_2),
            largest=partial(images.largest_merged, images.PIXELS_2[1]),
            axes=_seconds,
            clip=_eighths,
            pictures=partial(processors.pairs, 128 * 32 * 32, 768 * 32 * 32),
            video="",
        ),
        note=_omni_note,
    ),
    "voxtral": _VOXTRAL,
}
