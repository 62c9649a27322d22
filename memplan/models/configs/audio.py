"""Audio-language models: the language model's config, and the sizes of the audio tower.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from memplan.core.errors import ConfigError
from memplan.models.configs.vision import LLAVA
from memplan.models.facts import Family, ModelFacts
from memplan.models.family_facts import AttentionFacts, ServingFacts
from memplan.models.layers import MOST_LAYERS, as_json

# Axis of Whisper's encoder -> its keys in `audio_config`, and the default of both classes.
_ENCODER = {
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
    return axes


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
    stack="text_only",
    serving=ServingFacts(is_modelled=False),
    images=None,
)
FAMILIES: dict[str, Family] = {
    "qwen2_audio": _VOXTRAL._replace(
        defaults={"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 151936},
        attention=AttentionFacts(single_sequence="layers"),
        wraps="qwen2",
    ),
    "voxtral": _VOXTRAL,
}
