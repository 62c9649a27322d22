"""Mixtures of experts with sliding windows: gpt-oss, Kolibri, Laguna and MiMo-V2-Flash.

gpt-oss and MiMo have sinks, learned logits that every query may attend to instead of a key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models import tensor_plans as plans
from memplan.models.configs.layer_lists import SLIDING, SPARSE, kinds, listed, window_everywhere_but
from memplan.models.configs.moe import EXPERTS, dense_or_sparse, expert_axes, granite_axes, sparse_step_layers
from memplan.models.configs.windows import all_but_every
from memplan.models.facts import Family, ModelFacts
from memplan.models.family_facts import (
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    ServingFacts,
    TrainingFacts,
)
from memplan.models.layers import Layer, as_json
from memplan.models.tensor_plans import TensorParallelPlan

NO_SINKS = "it does not support attention sinks"


def _gpt_oss_layers(m: ModelFacts) -> tuple[Layer, ...]:
    sliding = kinds(m, "layer_types", SLIDING, window_everywhere_but(m, 2))
    return tuple(Layer(s, True, m.num_key_value_heads, m.intermediate_size, ffn="experts") for s in sliding)


def _gpt_oss_axes(m: ModelFacts) -> Mapping[str, int]:
    return {"E": m.config_int("num_local_experts"), "e": m.config_int("num_experts_per_tok"), "m": m.intermediate_size}


def _mimo_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Sliding-window layers have twice as many key/value heads."""
    windowed = [i > 0 and (i + 1) % 6 != 0 for i in range(m.num_hidden_layers)]
    sliding = kinds(m, "layer_types", SLIDING, windowed)
    sparse = kinds(m, "mlp_layer_types", SPARSE, [i > 0 for i in range(m.num_hidden_layers)])
    return tuple(
        Layer(s, True, m.num_key_value_heads * (2 if s else 1), m.intermediate_size, ffn="experts" if e else "dense")
        for s, e in zip(sliding, sparse, strict=True)
    )


def _mimo_axes(m: ModelFacts) -> Mapping[str, int]:
    width = _mimo_rotary_width(m)
    return {
        "E": m.config_int("n_routed_experts"),
        "e": m.config_int("num_experts_per_tok"),
        "m": m.config_int("moe_intermediate_size"),
        "dv": m.config_int("v_head_dim"),
        "rot": width,
        "rot2": width // 2,
    }


def _mimo_rotary_width(m: ModelFacts) -> int:
    """Return twice the length of `arange(0, d * partial_rotary_factor, 2)`, so an odd width is rounded up."""
    width = int(m.head_dim * m.get("partial_rotary_factor", 0.334))
    return 2 * -(-width // 2)


_kolibri_windows = all_but_every(5, unrotated="always", fixed=True)


def _kolibri_layers(m: ModelFacts) -> tuple[Layer, ...]:
    return tuple(layer._replace(ffn=EXPERTS) for layer in _kolibri_windows(m))


def _flint_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return rotated layers with windows, and others first, last and in every fourth place; the first two are dense."""
    last = m.num_hidden_layers - 1
    windows = kinds(m, "layer_types", SLIDING, [1 < i < last and i % 4 != 1 for i in range(m.num_hidden_layers)])
    return tuple(a._replace(sliding=s, rotary=s) for a, s in zip(sparse_step_layers(m), windows, strict=True))


def _granite_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers with windows, except every fourth. One with a base of 0 for its angles is not rotated."""
    sliding = kinds(m, "layer_types", SLIDING, [i % 4 != 0 for i in range(m.num_hidden_layers)])
    bases = listed(m, "layer_rope_theta") or (1,) * m.num_hidden_layers
    if len({base for base in bases if base}) != 1:
        text = "layer_rope_theta: is not supported yet unless it has one base other than 0"
        raise UnsupportedModelError(text, "layer_rope_theta")
    layer = m.equal_layer._replace(ffn="experts" if m.config.get("num_local_experts") else "dense")
    return tuple(layer._replace(sliding=s, rotary=bool(base)) for s, base in zip(sliding, bases, strict=True))


def _laguna_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers that are dense first, and have windows and their own numbers of heads where lists say so."""
    if m.get("moe_apply_router_weight_on_input", False):
        text = "moe_apply_router_weight_on_input: true is not supported by transformers' class"
        raise UnsupportedModelError(text, "moe_apply_router_weight_on_input")
    key, k = "num_attention_heads_per_layer", m.num_key_value_heads
    heads = listed(m, key) or [m.num_attention_heads] * m.num_hidden_layers
    wrong = [n for n in heads if isinstance(n, bool) or not isinstance(n, int) or n < 1 or n % k]
    if wrong:
        raise ConfigError(f"config: {key} must be multiples of num_key_value_heads {k}, not {as_json(wrong[0])}", key)
    sliding = kinds(m, "layer_types", SLIDING, [False] * m.num_hidden_layers)
    layers = zip(dense_or_sparse(m), sliding, heads, strict=True)
    return tuple(layer._replace(sliding=window, a=a) for layer, window, a in layers)


def _laguna_axes(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes, those of rotated widths in layers with a window too."""
    rotated = {
        f"{axis}{half}": width // (2 if half else 1)
        for axis, kind, share in (("rot", "full_attention", 0.5), ("wrot", "sliding_attention", 1.0))
        for width in (_rotated(m, kind, share),)
        for half in ("", "2")
    }
    return {**expert_axes(shared="shared_expert_intermediate_size")(m), **rotated}


def _rotated(m: ModelFacts, kind: str, share: Any) -> int:
    """Return the rotated numbers of a head in layers of a kind; `share` of them without `rope_parameters`."""
    table: Any = m.part("rope_parameters").get(kind)
    if isinstance(table, Mapping):
        share = cast(Mapping[str, Any], table).get("partial_rotary_factor", 1.0)
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        text = f"partial_rotary_factor of {kind} must be above 0 and at most 1, not {as_json(share)}"
        raise ConfigError(f"config: rope_parameters: {text}", "rope_parameters")
    return 2 * -(-int(m.head_dim * share) // 2)


_GRANITE_SWA = Family(
    {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "intermediate_size": 8192,
        "sliding_window": 128,
    },
    layers=_granite_layers,
    stack="granite_swa",
    attention=AttentionFacts(no_flash_2=NO_SINKS),
    serving=ServingFacts(is_modelled=False),
)

# Source: transformers 5.24 models/gpt_oss/configuration_gpt_oss.py,
# models/mimo_v2_flash/configuration_mimo_v2_flash.py, models/kolibri1/configuration_kolibri1.py.
FAMILIES = {
    "flint": Family(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 1024,
            "num_experts": 256,
            "num_experts_per_tok": 6,
            "sliding_window": 513,
            "mlp_only_layers": (0, 1),
        },
        layers=_flint_layers,
        axes=expert_axes(shared="shared_expert_intermediate_size"),
        stack="gpt_oss",
        attention=AttentionFacts(no_flash_2=NO_SINKS),
        checkpoint=CheckpointFacts(experts="split"),
        serving=ServingFacts(is_modelled=False),
    ),
    "gpt_oss": Family(
        {
            "intermediate_size": 2880,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "attention_bias": True,
        },
        layers=_gpt_oss_layers,
        axes=_gpt_oss_axes,
        stack="gpt_oss",
        attention=AttentionFacts(no_flash_2=NO_SINKS, flash_3=True),
        training=TrainingFacts(never_quantised=("post_attention_layernorm", "input_layernorm", "norm")),
        generation=GenerationFacts(ignores_early_exit=True),
        checkpoint=CheckpointFacts(
            runs_mxfp4=True,
            gguf="gpt-oss",
            gguf_keys={
                "feed_forward_length": None,
                "expert_feed_forward_length": "intermediate_size",
                "expert_count": "num_local_experts",
                "expert_used_count": "num_experts_per_tok",
            },
            gguf_switches={"attention_bias": "attn_q.bias"},
        ),
        parallel=ParallelFacts(TensorParallelPlan(), experts=True),
        serving=ServingFacts(shares_gate_a=True),
    ),
    "granite_swa": _GRANITE_SWA,
    "granitemoe_swa": _GRANITE_SWA._replace(
        defaults={
            "intermediate_size": 11008,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 0,
            "sliding_window": 128,
        },
        axes=granite_axes,
    ),
    "kolibri1": Family(
        {
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 512,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 384,
            "num_experts_per_tok": 6,
            "sliding_window": 513,
            "norm_topk_prob": False,
        },
        keys=ConfigKeys({"intermediate_size": ("moe_intermediate_size",)}),
        layers=_kolibri_layers,
        axes=expert_axes(shared="shared_expert_intermediate_size"),
        stack="exaone_moe",
        attention=AttentionFacts(flex=True),
        checkpoint=CheckpointFacts(experts="split"),
        parallel=ParallelFacts(plans.MIXTURE),
        serving=ServingFacts(is_modelled=False),
    ),
    "laguna": Family(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 8192,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "sliding_window": 512,
            "gating": True,
        },
        layers=_laguna_layers,
        axes=_laguna_axes,
        stack="laguna",
        checkpoint=CheckpointFacts(experts="split"),
        serving=ServingFacts(is_modelled=False),
    ),
    "mimo_v2_flash": Family(
        {
            "intermediate_size": 16384,
            "head_dim": 192,
            "v_head_dim": 128,
            "num_key_value_heads": 4,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "sliding_window": 129,
            "attention_bias": False,
        },
        layers=_mimo_layers,
        axes=_mimo_axes,
        stack="gpt_oss",
        attention=AttentionFacts(no_flash_2=NO_SINKS),
        checkpoint=CheckpointFacts(experts="split"),
    ),
}
