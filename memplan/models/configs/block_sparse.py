"""MiniMax-M3, whose indexer limits attention to blocks of keys, and Step-3.7, whose attention gates each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from memplan.models.configs.layer_lists import SLIDING, SPARSE, kinds, listed
from memplan.models.configs.uncalled_towers import step_tower
from memplan.models.facts import ONE_KERNEL, Family, ModelFacts
from memplan.models.family_facts import NO_CLASS, AttentionFacts, CheckpointFacts, ConfigKeys, GenerationFacts
from memplan.models.layers import Layer

_GROUPS = 16  # a loop over hundreds of experts is computed in this many groups, so an answer does not take seconds
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
    """Return a flag per layer from an older config's list of ones and zeros, or None if there is no list."""
    ones = listed(m, key, config)
    return None if ones is None else [bool(flag) for flag in ones]


def _minimax_layers(m: ModelFacts) -> tuple[Layer, ...]:
    n = m.num_hidden_layers
    older = _flags(m, m.part("sparse_attention_config"), "sparse_attention_freq")
    indexed = kinds(m, "layer_types", _INDEXED, older or [False] * n)
    sparse = kinds(m, "mlp_layer_types", SPARSE, _flags(m, m.config, "moe_layer_freq") or [True] * n)
    dense = m.config_int("dense_intermediate_size")
    return tuple(
        Layer(False, True, m.num_key_value_heads, dense, INDEXED if i else "attention", "experts" if e else "dense")
        for i, e in zip(indexed, sparse, strict=True)
    )


def _index_size(m: ModelFacts, key: str) -> int:
    """Return a size of the indexer; older configs have them in a nested `sparse_attention_config`."""
    value = m.part("sparse_attention_config").get(_OLDER[key])
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else m.config_int(key)


def _minimax_axes(m: ModelFacts) -> Mapping[str, int]:
    rotated = min(m.rotary_width, _index_size(m, "index_head_dim"))
    return {
        "E": m.config_int("num_local_experts"),
        "e": m.config_int("num_experts_per_tok"),
        "m": m.intermediate_size,
        "fd": m.config_int("dense_intermediate_size"),
        "fs": m.config_int("shared_intermediate_size"),
        "i": _index_size(m, "index_n_heads"),
        "di": _index_size(m, "index_head_dim"),
        "ti": _index_size(m, "index_topk_blocks"),
        "key_block": _index_size(m, "index_block_size"),
        "near_blocks": _index_size(m, "index_local_blocks"),
        "irot": rotated,
        "irot2": rotated // 2,
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
    layer_types: Any = listed(m, "layer_types")
    experts = m.config_int("n_routed_experts")
    return {
        **step_tower(m),
        "E": experts,
        "E1": experts + 1,
        "groups": min(experts, _GROUPS),
        "e": m.config_int("num_experts_per_tok"),
        "m": m.config_int("moe_intermediate_size"),
        "fs": m.config_int("share_expert_dim"),
        "aw": m.config_int("num_sliding_attention_heads", m.num_attention_heads)
        if layer_types
        else m.num_attention_heads,
    }


# Source: transformers 5.24 models/minimax_m3_vl/configuration_minimax_m3_vl.py,
# models/step3p7/configuration_step3p7.py.
_MINIMAX_M3 = Family(
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
    acts=(*ONE_KERNEL, "swigluoai"),  # the class overwrites it
    stack="minimax_m3",
    attention=AttentionFacts(no_flash_2="it does not support block masks"),
    generation=GenerationFacts(cache="indexed_blocks"),
)
FAMILIES = {
    "minimax_m3_vl_text": _MINIMAX_M3,
    "minimax_m3": _MINIMAX_M3._replace(built_as="minimax_m3_vl_text"),  # the text model of the published checkpoint
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
        keys=ConfigKeys(decoder="text_config"),
        layers=_step_layers,
        axes=_step_axes,
        stack="step3p7",
        attention=AttentionFacts(no_flash_2=NO_CLASS),
        checkpoint=CheckpointFacts(experts="split"),
    ),
}
