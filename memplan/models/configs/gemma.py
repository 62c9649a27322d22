"""Gemma 3n and Gemma 4: layers that differ in window, heads and width, and share keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.core.frozen import FrozenDict
from memplan.models.configs import processors
from memplan.models.configs.gemma4_towers import clip_axes, gemma4_towers, unified_embedders
from memplan.models.configs.images import padded_axes
from memplan.models.configs.layer_lists import SLIDING, kinds, listed, window_everywhere_but
from memplan.models.facts import Family, ImageFacts, ModelFacts, flash_width
from memplan.models.family_facts import (
    AttentionFacts,
    ConfigKeys,
    DirectReads,
    GenerationFacts,
    ParallelFacts,
    Picture,
    TrainingFacts,
)
from memplan.models.layers import Layer, as_json

# Mixers of layers that compute keys and values for themselves, compute them for later layers too, or reuse them.
OWN, STORED, REUSED = "attention", "attention, shares its keys", "attention, shared keys"
MASKS_IMAGES = AttentionFacts(no_flash_2="it drops the mask over image tokens")
_SAMPLES = 16_000  # of a second. Source: Gemma4UnifiedAudioFeatureExtractor
SPARSE = "sparse"  # an FFN with sparse activation: only its largest gates are kept


def _sharing(m: ModelFacts, sliding: Sequence[bool], reused: int) -> list[str]:
    """Return every layer's mixer; the last `reused` layers reuse keys and values.

    Each takes those of the last layer before them of its kind (with a window or without).

    Source: transformers 5.24 models/gemma4/configuration_gemma4.py kv_sharing_modes.
    """
    first = max(0, m.num_hidden_layers - reused)
    owners = sliding[:first]
    if set(owners) != set(sliding):
        raise ConfigError(
            f"config: num_kv_shared_layers {reused} leaves no layer whose keys they could share", "num_kv_shared_layers"
        )
    stored = {first - 1 - list(owners)[::-1].index(kind) for kind in set(sliding)}
    return [REUSED if i >= first else STORED if i in stored else OWN for i in range(m.num_hidden_layers)]


def _widths(m: ModelFacts) -> list[int]:
    """Return every layer's FFN width; Gemma 3n's config has one for all layers or a list."""
    if not isinstance(m.config.get("intermediate_size"), (list, tuple)):
        return [m.config_int("intermediate_size")] * m.num_hidden_layers
    widths = listed(m, "intermediate_size") or ()
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ConfigError(
                f"config: intermediate_size must be whole numbers, not {as_json(width)}", "intermediate_size"
            )
    return list(widths)


def _gemma3n_layers(m: ModelFacts) -> tuple[Layer, ...]:
    n = m.num_hidden_layers
    sliding = kinds(m, "layer_types", SLIDING, window_everywhere_but(m, 5))
    sparse = 10 if n > 10 else 0
    sparsity: Sequence[Any] = listed(m, "activation_sparsity_pattern") or [0.95] * sparse + [0.0] * (n - sparse)
    reused = m.config_int("num_kv_shared_layers", least=0)
    modes = _sharing(m, sliding, reused) if reused else [OWN] * n
    return tuple(
        Layer(s, True, m.num_key_value_heads, f, mode, SPARSE if is_sparse else "dense")
        for s, f, mode, is_sparse in zip(sliding, _widths(m), modes, sparsity, strict=True)
    )


def _per_layer(m: ModelFacts) -> Iterator[tuple[str, int]]:
    """Yield the axes of per-layer embeddings: their width, that of all layers together, and the rows of their table."""
    width = m.config_int("hidden_size_per_layer_input", least=0)
    all_ = m.num_hidden_layers * width
    yield from (("ple", width), ("layers", m.num_hidden_layers), ("all_ple", all_), ("all_ple32", -(-all_ // 32) * 32))
    yield "v_ple", m.config_int("vocab_size_per_layer_input")


def _gemma3n_axes(m: ModelFacts) -> Mapping[str, int]:
    streams = m.config_int("altup_num_inputs", least=2)
    return {**dict(_per_layer(m)), "P": streams, "P1": streams - 1, "laurel": m.config_int("laurel_rank")}


def _gemma4_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return the layers. Those without a window have other heads; those that reuse keys may have a double FFN width."""
    sliding = kinds(m, "layer_types", SLIDING, window_everywhere_but(m, 6))
    sliding[-1] = False  # transformers overrides the config
    wide = m.config_int("global_head_dim")
    for layer in m.part("per_layer_config").values():  # transformers 5.24 writes it instead of global_head_dim
        if not isinstance(layer, FrozenDict) or layer.get("head_dim", wide) != wide:
            raise UnsupportedModelError(
                f"per_layer_config: {as_json(layer)} is not supported yet; use global_head_dim, which is {wide} here",
                "per_layer_config",
            )
    modes = _sharing(m, sliding, m.config_int("num_kv_shared_layers", least=0))
    ffn = "experts" if m.get("enable_moe_block", False) else "dense"
    double = m.get("use_double_wide_mlp", False)
    return tuple(
        Layer(
            s, True, m.num_key_value_heads if s else _full_heads(m), m.intermediate_size * (2 if wide else 1), mode, ffn
        )
        for s, mode in zip(sliding, modes, strict=True)
        for wide in (double and mode == REUSED,)
    )


def _full_heads(m: ModelFacts) -> int:
    """Return the key/value heads of layers without a window, whose number may differ if keys are also the values."""
    heads = m.config_int("num_global_key_value_heads", m.num_key_value_heads)
    return heads if m.get("attention_k_eq_v", False) else m.num_key_value_heads


def _gemma4_axes(m: ModelFacts) -> Mapping[str, int]:
    wide = m.config_int("global_head_dim")
    expert_keys = {"E": "num_experts", "e": "top_k_experts", "m": "moe_intermediate_size"}
    return {
        **dict(_per_layer(m)),
        "dg": wide,
        "dg2": wide // 2,
        "dg32": flash_width(wide),
        "kg": _full_heads(m),
        **({axis: m.config_int(key) for axis, key in expert_keys.items()} if m.get("enable_moe_block", False) else {}),
    }


def _gemma4_axes_with_towers(m: ModelFacts) -> Mapping[str, int]:
    return {**_gemma4_axes(m), **gemma4_towers(m)}


def _clip(m: ModelFacts, seconds: int | None, samples: int, longest: int = 2**21) -> tuple[int, Picture]:
    """Return a clip of which as many `samples` make a token, cut after the `longest` seconds; two more tokens frame it.

    Raises SpecError as `clip_length`.
    """
    tokens = -(-processors.clip_length(m, seconds, longest) * _SAMPLES // samples)
    return 1, Picture(tokens, 1, tokens + 2)


def _samples(m: ModelFacts, seconds: int | None) -> tuple[int, Picture]:
    """Source: transformers 5.24 models/gemma4_unified/feature_extraction_gemma4_unified.py."""
    return _clip(m, seconds, unified_embedders(m)["uo"])


def _frames(m: ModelFacts, seconds: int | None) -> tuple[int, Picture]:
    """Source: transformers 5.24 models/gemma4/feature_extraction_gemma4.py, processing_gemma4.py."""
    return _clip(m, seconds, 640, 30)


def _tower_axes(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    return {**padded_axes(m, images, picture), **clip_axes(m, picture.patches)}


def _unified_axes(m: ModelFacts) -> Mapping[str, int]:
    return {**_gemma4_axes(m), **unified_embedders(m)}


# Source: transformers 5.24 models/gemma3n/configuration_gemma3n.py, models/gemma4/configuration_gemma4.py.
_GEMMA4 = Family(
    {
        "tie_word_embeddings": True,
        "intermediate_size": 9216,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
        "attention_k_eq_v": False,
    },
    ConfigKeys({"hidden_act": ("hidden_activation",)}),
    _gemma4_layers,
    _gemma4_axes,
    stack="gemma4",
    attention=AttentionFacts(no_flash_2="its widest heads are wider than 256"),
    generation=GenerationFacts(cache="two_widths"),
)
_UNIFIED = _GEMMA4._replace(
    defaults={**_GEMMA4.defaults, "sliding_window": 1024},
    keys=_GEMMA4.keys._replace(fixed={"hidden_size_per_layer_input": 0, "enable_moe_block": False}),
)
FAMILIES = {
    "gemma3n_text": Family(
        {
            "tie_word_embeddings": True,
            "intermediate_size": 16384,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "sliding_window": 512,
            "final_logit_softcapping": 30.0,
            "vocab_size_per_layer_input": 262_144,
            "hidden_size_per_layer_input": 256,
            "altup_num_inputs": 4,
            "num_kv_shared_layers": 15,
            "laurel_rank": 64,
        },
        keys=ConfigKeys({"intermediate_size": (), "hidden_act": ("hidden_activation",)}),
        layers=_gemma3n_layers,
        axes=_gemma3n_axes,
        stack="gemma3n",
        # Source: modeling_gemma3n.py Gemma3nTextAltUp.predict, correct
        training=TrainingFacts(direct_reads=DirectReads("clamps", ("prediction_coefs", "correction_coefs"))),
    ),
    "gemma4_text": _GEMMA4,
    "gemma4": _GEMMA4._replace(
        keys=_GEMMA4.keys._replace(decoder="text_config"),
        axes=_gemma4_axes_with_towers,
        attention=MASKS_IMAGES,
        parallel=ParallelFacts(wrapped_stem="model.vision_tower.patch_embedder."),
        stack="gemma4_multimodal",
        images=ImageFacts(
            picture=processors.gemma4,
            largest=partial(processors.gemma4, height=14, width=20),  # 280 tokens, as many as any
            axes=_tower_axes,
            has_masks=True,
            clip=_frames,
            ffn="gated",
        ),
    ),
    "gemma4_unified": _UNIFIED._replace(
        keys=_UNIFIED.keys._replace(decoder="text_config"),
        axes=_unified_axes,
        stack="gemma4_unified",
        attention=MASKS_IMAGES,
        images=ImageFacts(
            picture=processors.gemma4_unified,
            largest=partial(processors.gemma4_unified, height=14, width=20),
            axes=padded_axes,
            clip=_samples,
        ),
    ),
    "gemma4_unified_text": _UNIFIED,
}
