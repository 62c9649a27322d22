"""Llama 4: chunked attention with rotary positions or full attention without, and experts in every n-th layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.core.errors import ConfigError
from memplan.models.configs import images
from memplan.models.configs.layer_lists import kinds, listed
from memplan.models.configs.towers import llama4 as tower
from memplan.models.facts import Family, ModelFacts
from memplan.models.family_facts import (
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    TrainingFacts,
)
from memplan.models.layers import Layer, as_json

CHUNKED = {"chunked_attention": True, "full_attention": False}


def _layers(m: ModelFacts) -> tuple[Layer, ...]:
    n = m.num_hidden_layers
    every = m.config_int("no_rope_layer_interval")
    flags = listed(m, "no_rope_layers") if m.config.get("no_rope_layers") else None
    rotary = [bool(r) for r in flags] if flags is not None else [(i + 1) % every != 0 for i in range(n)]
    chunked = kinds(m, "layer_types", CHUNKED, [r and m.sliding_window is not None for r in rotary])
    sparse = _sparse_layers(m)
    dense = m.config_int("intermediate_size_mlp")
    return tuple(
        Layer(c, r, m.num_key_value_heads, dense, ffn="experts" if i in sparse else "dense")
        for i, (c, r) in enumerate(zip(chunked, rotary, strict=True))
    )


def _sparse_layers(m: ModelFacts) -> frozenset[int]:
    """Return the indices of the layers with experts."""
    indices: Any = m.config.get("moe_layers")
    if indices is None:
        step = m.config_int("interleave_moe_layer_step", least=0)
        return frozenset(range(step - 1, m.num_hidden_layers, step)) if step else frozenset()
    if not isinstance(indices, (list, tuple)):
        raise ConfigError(f"config: moe_layers must be a list of layers, not {as_json(indices)}", "moe_layers")
    return frozenset(i for i in indices if isinstance(i, int))  # pyright: ignore[reportUnknownVariableType]


def _axes(m: ModelFacts) -> Mapping[str, int]:
    return {
        "E": m.config_int("num_local_experts"),
        "e": m.config_int("num_experts_per_tok"),
        "m": m.intermediate_size,
        "fd": m.config_int("intermediate_size_mlp"),
    }


def _axes_with_tower(m: ModelFacts) -> Mapping[str, int]:
    return {**_axes(m), **tower(m)}


_TEXT = {
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_experts_per_tok": 1,
    "num_local_experts": 16,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
}

_ROUTER_NOTE = (  # source: peft 0.21 tuners/lora/layer.py Linear.forward; modeling_llama4.py Llama4Router
    "peft's all-linear also wraps Llama 4's router and fails in the first step; name layers such as q_proj instead. "
    "Counted with all linear layers except the router"
)


def _note(_: ModelFacts) -> str:
    return (
        "llama4: transformers 5.24's image-text model fails when it returns its loss, with or without images (its "
        "decoder outputs have no image_outputs); counted as if they had"
    )


# Source: transformers 5.24 models/llama4/configuration_llama4.py.
_TEXT_ONLY = Family(
    _TEXT,
    ConfigKeys({"sliding_window": ("attention_chunk_size",)}),
    _layers,
    _axes,
    stack="llama4",
    attention=AttentionFacts(no_flash_2="it does not support chunked attention"),
    training=TrainingFacts(all_linear_note=_ROUTER_NOTE),
    generation=GenerationFacts(cache="chunked"),
    parallel=ParallelFacts(
        fails="modeling_llama4.py adds to its experts' output in place, which autograd refuses for a tensor taken from "
        "a DTensor"
    ),
)
FAMILIES = {
    "llama4_text": _TEXT_ONLY,
    "llama4": _TEXT_ONLY._replace(
        keys=_TEXT_ONLY.keys._replace(decoder="text_config"),
        axes=_axes_with_tower,
        stack="llama4_vision",
        checkpoint=CheckpointFacts(gguf="llama4"),
        parallel=ParallelFacts(),
        images=images.LLAMA4,
        note=_note,
    ),
}
