"""The model_type of a config, and the nearest supported families if it is not supported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.configs import DENSE, MODULES, family, kind_of

_MAX_SHOWN = 80  # characters of a name that an error message repeats

# Config key -> the kind of an unsupported model that has it.
_KINDS = {
    "num_experts": "mixture of experts",
    "num_local_experts": "mixture of experts",
    "n_routed_experts": "mixture of experts",
    "moe_num_experts": "mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "vision_config": "vision-language",
    "visual": "vision-language",
    "mm_vision_tower": "vision-language",
    "audio_config": "audio-language",
    "audio": "audio-language",
    "ssm_cfg": "state space",
    "state_size": "state space",
    "mamba_d_state": "state space hybrid",
    "linear_num_key_heads": "linear attention hybrid",
    "hidden_size_per_layer_input": "embeddings in every layer",
    "position_encoding_2d": "the first ChatGLM",
    "use_bidirectional_attention": "encoder",
    "is_encoder_decoder": "encoder-decoder",
    "add_cross_attention": "encoder-decoder",
}
# Part of a model_type -> the kind of model, if no config key tells.
_KINDS_BY_NAME = {
    "bert": "encoder",
    "t5": "encoder-decoder",
    "vit": "vision encoder",
    "dbrx": "mixture of experts",
    "moe": "mixture of experts",
    "rwkv": "recurrent",
    "recurrent": "recurrent",
}


def model_type_of(config: Mapping[str, Any]) -> str:
    """The config's model_type, if memplan has a stack for it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise ConfigError("config: no model_type, so not a Hugging Face model config", "model_type")
    is_dense = MODULES.get(model_type) == DENSE
    if model_type in MODULES and not is_dense:
        return model_type
    shown = repr(model_type) if len(model_type) <= _MAX_SHOWN else f"{model_type[:_MAX_SHOWN]!r}..."
    kinds = dict.fromkeys(kind for key, kind in _KINDS.items() if _is_set(config, key))
    if not kinds and config.get("text_config"):
        kinds = {"multimodal": None}
    if not kinds and not is_dense:
        kinds = {kind: None for part, kind in _KINDS_BY_NAME.items() if part in model_type}
    if kinds or not is_dense:
        listed = f" ({', '.join(kinds)})" if kinds else ""
        near = " or ".join(nearest_families(model_type, kinds))
        hint = f"; did you mean {near}?" if near else ", and no supported family has a similar name"
        raise UnsupportedModelError(f"model_type: {shown}{listed} is not supported yet{hint}", "model_type")
    return model_type


_MIN_SIMILARITY = 0.75  # of two names, as difflib.SequenceMatcher.ratio()


def nearest_families(model_type: str, kinds: Iterable[str] = ()) -> tuple[str, ...]:
    """Return at most three supported families similar to an unsupported `model_type` whose config has these `kinds`.

    Families with the longest common prefix come first, then those of the same kind, then the nearest versions.

    >>> nearest_families("qwen4"), nearest_families("qwen4", ["mixture of experts"])
    (('qwen3', 'qwen2', 'qwen'), ('qwen3_moe', 'qwen2_moe', 'qwen3_5'))
    """
    lowered = model_type[:_MAX_SHOWN].lower()
    wanted, (stem, version, rest) = " ".join(kinds), _words(lowered)
    import difflib

    similarity = {name: difflib.SequenceMatcher(None, lowered, name).ratio() for name in MODULES}

    def distance(name: str) -> tuple[float, ...]:
        stem_of, version_of, rest_of = _words(name)
        common = next((i for i, (a, b) in enumerate(zip(stem, stem_of, strict=False)) if a != b), None)
        common = min(len(stem), len(stem_of)) if common is None else common
        kind = _kind(name)
        other = float(not any(part in wanted for part in kind.split(", ")) if kind else bool(wanted))
        if not common:
            return 0, other, -similarity[name]
        return -common, other, len(set(rest) ^ set(rest_of)), abs(version - version_of), -similarity[name]

    def is_similar(name: str) -> bool:
        same_kind = any(part in wanted for part in _kind(name).split(", ") if part)
        return same_kind or similarity[name] >= _MIN_SIMILARITY or _words(name)[0][:1] == stem[:1]

    return tuple(sorted((name for name in MODULES if name != model_type and is_similar(name)), key=distance)[:3])


def _kind(name: str) -> str:
    tower = family(name).images
    sees = tower is not None and (tower.clip is None or tower.picture is not None)
    return "vision-language" if sees or "_vl" in name.removesuffix("_text") else kind_of(name)


def _words(name: str) -> tuple[list[str], float, list[str]]:
    """Split a name into its first words, the version after them, and the remaining words.

    >>> _words("kimi_k25"), _words("qwen3_5_moe"), _words("gemma3_text")
    ((['kimi', 'k'], 25.0, []), (['qwen'], 3.5, ['moe']), (['gemma'], 3.0, []))
    """
    parts = re.findall(r"[a-z]+|[0-9]+", name)
    at = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    numbers = [part for part in parts[at : at + 2] if part.isdigit()]
    version = float(".".join(numbers)) if numbers else 1.0
    return parts[:at], version, [part for part in parts[at + len(numbers) :] if part != "text"]


def _is_set(config: Mapping[str, Any], key: str) -> bool:
    """Whether the config has a telling value for the key: a single expert makes no mixture."""
    return bool(config.get(key)) and not (key.endswith("experts") and config[key] == 1)
