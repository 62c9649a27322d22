"""MiniMax-M3 and Step-3.7: layers whose attention an indexer narrows to blocks of keys, or that gate each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models.configs.layer_lists import SLIDING, SPARSE, kinds, listed
from memplan.models.configs.uncalled_towers import step_tower
from memplan.models.facts import Family, ModelFacts
from memplan.models.layers import Layer

_GROUPS = 16  # into which hundreds of experts in a loop are put, so that an answer does not take seconds
INDEXED = "attention to blocks of keys"
_INDEXED = {"minimax_m3_sparse": True, "full_attention": False}
_OLDER = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_block_size": "sparse_block_size",
    "index_local_blocks": "sparse_local_block",
}


def _flags(m: ModelFacts, config: Mapping[str, Any], key: str) -> Sequence[bool] | None:
    """What a list of ones and zeros of an older config says of the layers."""
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(cast(Sequence[Any], value)) < m.num_hidden_layers:
        raise ConfigError(f"config: {key} must be a list of at least {m.num_hidden_layers} layers", key)
    return [bool(flag) for flag in cast(Sequence[Any], value)[: m.num_hidden_layers]]


def _minimax_layers(m: ModelFacts) -> tuple[Layer, ...]:
    n = m.num_hidden_layers
    older = _flags(m, m.part("sparse_attention_config"), "sparse_attention_freq")
    indexed = kinds(m, "layer_types", _INDEXED, older or [False] * n)
    sparse = kinds(m, "mlp_layer_types", SPARSE, _flags(m, m.config, "moe_layer_freq") or [True] * n)
    dense = m.whole("dense_intermediate_size")
    return tuple(
        Layer(False, True, m.num_key_value_heads, dense, INDEXED if i else "attention", "experts" if e else "dense")
        for i, e in zip(indexed, sparse, strict=True)
    )


def _index_size(m: ModelFacts, key: str) -> int:
    """A size of the indexer, which older configs have in a part of their own."""
    value = m.part("sparse_attention_config").get(_OLDER[key])
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else m.whole(key)


def _minimax_axes(m: ModelFacts) -> Mapping[str, int]:
    turned = min(m.rotary_width, _index_size(m, "index_head_dim"))
    return {
        "E": m.whole("num_local_experts"),
        "e": m.whole("num_experts_per_tok"),
        "m": m.intermediate_size,
        "fd": m.whole("dense_intermediate_size"),
        "fs": m.whole("shared_intermediate_size"),
        "i": _index_size(m, "index_n_heads"),
        "di": _index_size(m, "index_head_dim"),
        "ti": _index_size(m, "index_topk_blocks"),
        "key_block": _index_size(m, "index_block_size"),
        "near_blocks": _index_size(m, "index_local_blocks"),
        "irot": turned,
        "irot2": turned // 2,
        "rot": m.rotary_width,
        "rot2": m.rotary_width // 2,
    }


def _step_layers(m: ModelFacts) -> tuple[Layer, ...]:
    sliding = kinds(m, "layer_types", SLIDING, [False] * m.num_hidden_layers)
    sparse = kinds(m, "mlp_layer_types", SPARSE, [i >= 3 for i in range(m.num_hidden_layers)])
    return tuple(
        Layer(s, True, m.num_key_value_heads, m.intermediate_size, ffn="experts" if e else "dense")
        for s, e in zip(sliding, sparse, strict=True)
    )


def _step_axes(m: ModelFacts) -> Mapping[str, int]:
    every: Any = listed(m, "layer_types")
    number = m.whole("n_routed_experts")
    return {
        **step_tower(m),
        "E": number,
        "E1": number + 1,
        "groups": min(number, _GROUPS),
        "e": m.whole("num_experts_per_tok"),
        "m": m.whole("moe_intermediate_size"),
        "fs": m.whole("share_expert_dim"),
        "aw": m.whole("num_sliding_attention_heads", m.num_attention_heads) if every else m.num_attention_heads,
    }


# Source: transformers 5.24 models/minimax_m3_vl/configuration_minimax_m3_vl.py,
# models/step3p7/configuration_step3p7.py.
FAMILIES = {
    "minimax_m3_vl_text": Family(
        {
            "intermediate_size": 3072,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts_per_tok": 4,
            "num_local_experts": 128,
            "dense_intermediate_size": 12288,
            "shared_intermediate_size": 3072,
            "index_n_heads": 4,
            "index_head_dim": 128,
            "index_topk_blocks": 16,
            "index_block_size": 128,
            "index_local_blocks": 1,
            "partial_rotary_factor": 1.0,
        },
        layers=_minimax_layers,
        axes=_minimax_axes,
    ),
    "step3p7": Family(
        {
            "vocab_size": 128815,
            "hidden_size": 4096,
            "intermediate_size": 11264,
            "num_hidden_layers": 45,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_experts_per_tok": 8,
            "n_routed_experts": 288,
            "moe_intermediate_size": 1280,
            "share_expert_dim": 1280,
            "sliding_window": None,
        },
        layers=_step_layers,
        axes=_step_axes,
        decoder="text_config",
    ),
}
