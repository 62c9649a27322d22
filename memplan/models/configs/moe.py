"""Decoders with mixtures of experts: which layers have experts, how many, and how wide they are.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models import tensor_plans as plans
from memplan.models.configs.layer_lists import SLIDING, kinds
from memplan.models.configs.windows import all_but_every, windows_after
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

EXPERTS, DENSE = "experts", "dense"


def expert_axes(
    experts: str = "num_experts",
    chosen: str = "num_experts_per_tok",
    width: str = "moe_intermediate_size",
    shared: str = "",
) -> Callable[[ModelFacts], Mapping[str, int]]:
    """Return a function for the expert axes of configs with these keys; `shared` is the width of the shared expert."""

    def axes(m: ModelFacts) -> Mapping[str, int]:
        count, per_token = m.config_int(experts), m.config_int(chosen)
        if per_token > count:
            raise ConfigError(f"config: {chosen} {per_token} is more than the {count} of {experts}", chosen)
        sizes = {"E": count, "e": per_token, "none": 0, "m": m.config_int(width)}
        return {**sizes, **({"fs": m.config_int(shared)} if shared else {})}

    return axes


_LOCAL_EXPERTS = expert_axes("num_local_experts", width="intermediate_size")


def every_layer(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers that all have experts."""
    layer = Layer(m.sliding_window is not None, True, m.num_key_value_heads, m.intermediate_size, ffn=EXPERTS)
    return (layer,) * m.num_hidden_layers


def sparse_step_layers(m: ModelFacts, alternates: bool = False) -> tuple[Layer, ...]:
    """Return layers with experts in every `decoder_sparse_step`th but `mlp_only_layers`.

    `alternates`: of the layers up to `max_window_layers`, every other one has a window, as in Qwen2-MoE.
    """
    count, step = m.num_hidden_layers, m.config_int("decoder_sparse_step", 1)
    dense, last = numbers(m, "mlp_only_layers"), m.config_int("max_window_layers", 28, least=0)
    windows = [m.sliding_window is not None] * count
    if alternates:
        default = [window and i % 2 == 0 and i < last for i, window in enumerate(windows)]
        windows = kinds(m, "layer_types", SLIDING, default)
    return tuple(
        Layer(
            window,
            True,
            m.num_key_value_heads,
            m.intermediate_size,
            ffn=EXPERTS if i not in dense and (i + 1) % step == 0 else DENSE,
        )
        for i, window in enumerate(windows)
    )


def numbers(m: ModelFacts, key: str) -> tuple[int, ...]:
    """Return a config's list of layer indices, empty if it is absent. Raises ConfigError for anything else."""
    value: object = m.config.get(key)
    numbers = cast(tuple[object, ...], value) if isinstance(value, tuple) else ()
    if (value is not None and not isinstance(value, tuple)) or not all(isinstance(n, int) for n in numbers):
        raise ConfigError(f"config: {key} must be a list of layer indices, not {as_json(m.config[key])}", key)
    return cast(tuple[int, ...], numbers)


_QWEN2_MOE = {
    "num_key_value_heads": 16,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "use_sliding_window": False,
    "sliding_window": 4096,
}


def after_first(m: ModelFacts, steps: bool = False) -> tuple[Layer, ...]:
    """Return layers with experts, except the first `first_k_dense_replace`.

    `steps`: only every `moe_layer_freq`th of the others has experts.
    """
    first = m.config_int("first_k_dense_replace", least=0)
    step = m.config_int("moe_layer_freq", 1) if steps else 1
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size)
    count = m.num_hidden_layers
    return tuple(layer._replace(ffn=EXPERTS if i >= first and i % step == 0 else DENSE) for i in range(count))


def dense_or_sparse(m: ModelFacts) -> tuple[Layer, ...]:
    """Return dense and sparse layers by `mlp_layer_types`; without it, only the first few are dense."""
    first = m.config_int("first_k_dense_replace", 1, least=0)
    kinds = cast(
        Sequence[Any], m.config.get("mlp_layer_types") or ("dense",) * first + ("sparse",) * m.num_hidden_layers
    )
    if (
        not isinstance(kinds, tuple)
        or len(kinds) < m.num_hidden_layers
        or not set(map(str, kinds)) <= {"dense", "sparse"}
    ):
        raise ConfigError(
            f"config: mlp_layer_types must be a list of {m.num_hidden_layers} words, dense or sparse", "mlp_layer_types"
        )
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size)
    return tuple(layer._replace(ffn=DENSE if kind == "dense" else EXPERTS) for kind in kinds[: m.num_hidden_layers])


def between(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers with experts in every `moe_layer_interval`th layer of a range."""
    count, step = m.num_hidden_layers, m.config_int("moe_layer_interval", 1)
    first = m.config_int("moe_layer_start_index", 1, least=0)
    last: object = m.config.get("moe_layer_end_index")
    end = count - 1 if last in (None, -1) else m.config_int("moe_layer_end_index", least=0)
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size)
    return tuple(
        layer._replace(ffn=EXPERTS if first <= i <= end and (i + 1) % step == 0 else DENSE) for i in range(count)
    )


def _ernie(m: ModelFacts) -> Mapping[str, int]:
    axes = expert_axes("moe_num_experts", "moe_k")(m)
    return {**axes, "fs": axes["m"] * m.config_int("moe_num_shared_experts", 2, least=0)}


def _dbrx(m: ModelFacts) -> Mapping[str, int]:
    """Return the sizes of the nested `ffn_config`."""
    ffn, axes = m.part("ffn_config"), dict[str, int]()
    for axis, key, default in (("E", "moe_num_experts", 4), ("e", "moe_top_k", 1), ("f", "ffn_hidden_size", 3584)):
        value: object = ffn.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**21:
            raise ConfigError(f"config: {key} must be a whole number from 1 to {2**21:,}, not {as_json(value)}", key)
        axes[axis] = value
    if axes["e"] > axes["E"]:
        raise ConfigError(f"config: moe_top_k {axes['e']} is more than the {axes['E']} of moe_num_experts", "moe_top_k")
    return {**axes, "E1": axes["E"] + 1}


def _hunyuan(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes; the config class's default is one expert, however many a token is to choose."""
    experts = m.config_int("num_experts", 1)
    return {"E": experts, "e": min(m.config_int("moe_topk", 1), experts), "m": m.intermediate_size}


def _phi(m: ModelFacts) -> Mapping[str, int]:
    if m.config_int("num_experts_per_tok") != 2:
        raise ConfigError("config: num_experts_per_tok must be 2: phimoe draws two experts", "num_experts_per_tok")
    return _LOCAL_EXPERTS(m)


def _exaone(m: ModelFacts) -> Mapping[str, int]:
    axes = expert_axes()(m)
    return {**axes, "fs": axes["m"] * m.config_int("num_shared_experts")}


def _dots_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Qwen3's layers, with experts in all but the first few."""
    return tuple(a._replace(ffn=b.ffn) for a, b in zip(windows_after(m), after_first(m), strict=True))


_exaone_windows = all_but_every(4, unrotated="among windows")


def _exaone_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return EXAONE 4's layers, with experts in all but the first."""
    return tuple(a._replace(ffn=b.ffn) for a, b in zip(_exaone_windows(m), dense_or_sparse(m), strict=True))


_afmoe_windows = all_but_every(4, unrotated="always", key="global_attn_every_n_layers")
_AFMOE_NORMS = ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm")


def _afmoe_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers with windows, except every fourth, and with experts in all but the first."""
    return tuple(a._replace(ffn=b.ffn) for a, b in zip(_afmoe_windows(m), after_first(m), strict=True))


def _cohere_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Cohere 2's layers. The first few are dense, with windows of their own pattern; without any they rotate."""
    first = m.config_int("first_k_dense_replace", 0, least=0)
    own, period = m.config_int("prefix_dense_sliding_window_pattern", 1), m.config_int("sliding_window_pattern", 4)
    default = [(i + 1) % own != 0 if i < first else (i - first + 1) % period != 0 for i in range(m.num_hidden_layers)]
    return tuple(
        layer._replace(sliding=s, rotary=s or (layer.ffn == DENSE and own == 1))
        for layer, s in zip(dense_or_sparse(m), kinds(m, "layer_types", SLIDING, default), strict=True)
    )


def _cohere(m: ModelFacts) -> Mapping[str, int]:
    axes = expert_axes(width="intermediate_size")(m)
    shared = axes["m"] * m.config_int("num_shared_experts", 0, least=0)
    return {**axes, "fs": shared, "f": m.config_int("prefix_dense_intermediate_size", m.intermediate_size)}


def _mellum_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers with windows and dense layers only where `layer_types` and `mlp_layer_types` say so."""
    windows = kinds(m, "layer_types", SLIDING, [False] * m.num_hidden_layers)
    return tuple(a._replace(sliding=s) for a, s in zip(dense_or_sparse(m), windows, strict=True))


def granite_axes(m: ModelFacts) -> Mapping[str, int]:
    return {**_LOCAL_EXPERTS(m), "fs": m.config_int("shared_intermediate_size", least=0)}


def _glm(m: ModelFacts) -> Mapping[str, int]:
    axes = expert_axes("n_routed_experts")(m)
    return {**axes, "fs": axes["m"] * m.config_int("n_shared_experts")}


# Keys of a GGUF file.
_GGUF_CHOSEN = {"expert_used_count": "num_experts_per_tok"}
GGUF_EXPERTS = {**_GGUF_CHOSEN, "expert_feed_forward_length": "moe_intermediate_size"}
GGUF_SHARED_EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "leading_dense_block_count": "first_k_dense_replace",
    **GGUF_EXPERTS,
}
GGUF_BOTH_EXPERTS = {
    "expert_count": "num_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    **GGUF_EXPERTS,
}
_MOE = Family(
    {},
    layers=every_layer,
    axes=_LOCAL_EXPERTS,
    stack="mixtures",
    attention=AttentionFacts(flex=True),
    checkpoint=CheckpointFacts(experts="split"),
    parallel=ParallelFacts(plans.MIXTURE, experts=True, context=True),
)
_GRANITE = Family(
    {"intermediate_size": 11008, "num_local_experts": 8, "num_experts_per_tok": 2},
    keys=ConfigKeys({"head_dim": ()}),
    layers=every_layer,
    axes=_LOCAL_EXPERTS,
    stack="mixtures",
    checkpoint=CheckpointFacts(gguf="granitemoe", gguf_keys={"expert_count": "num_local_experts", **_GGUF_CHOSEN}),
    parallel=ParallelFacts(plans.EXPERTS, experts=True, context=True),
    serving=ServingFacts(adapts_tables=True),
)

_GLM_MOE = _MOE._replace(
    defaults={
        "num_key_value_heads": 8,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "partial_rotary_factor": 0.5,
    },
    layers=after_first,
    axes=_glm,
    training=TrainingFacts(fuses_experts=True),
    checkpoint=CheckpointFacts(
        experts="split",
        gguf="glm4moe",
        gguf_keys=GGUF_SHARED_EXPERTS,
        gguf_switches={"attention_bias": "attn_q.bias", "use_qk_norm": "attn_q_norm.weight"},
    ),
)

FAMILIES: dict[str, Family] = {
    "afmoe": _MOE._replace(
        defaults={
            "head_dim": 128,
            "intermediate_size": 6144,
            "moe_intermediate_size": 1408,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "num_shared_experts": 2,
            "first_k_dense_replace": 1,
            "sliding_window": 1024,
        },
        keys=ConfigKeys(renamed={"num_dense_layers": "first_k_dense_replace"}),
        layers=_afmoe_layers,
        axes=_exaone,
        stack="afmoe",
        training=TrainingFacts(never_quantised=(*_AFMOE_NORMS, "q_norm", "k_norm", "norm")),
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "cohere2_moe": _MOE._replace(
        defaults={
            "tie_word_embeddings": True,
            "head_dim": 128,
            "intermediate_size": 22528,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 0,
            "sliding_window": 4096,
        },
        layers=_cohere_layers,
        axes=_cohere,
        generation=GenerationFacts(ignores_early_exit=True),
        checkpoint=CheckpointFacts(),
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "dbrx": Family(
        {"d_model": 2048, "n_heads": 16, "n_layers": 24, "vocab_size": 32000, "kv_n_heads": 1, "max_seq_len": 2048},
        keys=ConfigKeys(
            {
                "hidden_size": ("hidden_size", "d_model"),
                "num_hidden_layers": ("num_hidden_layers", "n_layers"),
                "num_attention_heads": ("num_attention_heads", "n_heads"),
                "num_key_value_heads": ("kv_n_heads",),
                "intermediate_size": (),
                "head_dim": (),
                "max_position_embeddings": ("max_position_embeddings", "max_seq_len"),
                "hidden_act": (),
            },
            decoder="attn_config",
        ),
        layers=every_layer,
        axes=_dbrx,
        stack="dbrx",
    ),
    "deepseek": Family(  # source: the code published with its weights; transformers 5.24 has no class
        {
            "intermediate_size": 11008,
            "moe_intermediate_size": 1407,
            "n_routed_experts": None,
            "num_experts_per_tok": None,
            "n_shared_experts": None,
            "first_k_dense_replace": 0,
        },
        layers=partial(after_first, steps=True),
        axes=_glm,
        stack="mixtures",
    ),
    "dots1": _MOE._replace(
        defaults={
            "num_key_value_heads": 32,
            "intermediate_size": 10944,
            "moe_intermediate_size": 1408,
            "n_routed_experts": None,
            "num_experts_per_tok": None,
            "n_shared_experts": None,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
            "sliding_window": 4096,
            "max_window_layers": 62,
        },
        layers=_dots_layers,
        axes=_glm,
        training=TrainingFacts(fuses_experts=True),
        serving=ServingFacts(is_modelled=False),
        parallel=ParallelFacts(plans.MIXTURE, experts=True),
    ),
    "ernie4_5_moe": _MOE._replace(
        defaults={
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "moe_num_experts": 64,
            "moe_k": 6,
        },
        layers=between,
        axes=_ernie,
        training=TrainingFacts(fuses_experts=True),
    ),
    "exaone_moe": _MOE._replace(
        defaults={
            "num_key_value_heads": 32,
            "intermediate_size": 16384,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "sliding_window": 4096,
        },
        layers=_exaone_layers,
        axes=_exaone,
        stack="exaone_moe",
        parallel=ParallelFacts(plans.MIXTURE._replace(replicated=("shared_experts",)), experts=True),
        training=TrainingFacts(fuses_experts=True),
        serving=ServingFacts(adapts_tables=True),
    ),
    "flex_olmo": _MOE._replace(
        defaults={"intermediate_size": 11008, "num_experts": 7, "num_experts_per_tok": 5},
        keys=ConfigKeys({"head_dim": ()}, renamed={"num_local_experts": "num_experts"}),
        axes=expert_axes(width="intermediate_size"),
        stack="olmo",
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "glm4_moe": _GLM_MOE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE._replace(
        defaults={**_GRANITE.defaults, "shared_intermediate_size": 0},
        axes=granite_axes,
        checkpoint=CheckpointFacts(),
        serving=ServingFacts(is_modelled=False),
        parallel=ParallelFacts(plans.EXPERTS, experts=True),
    ),
    "hunyuan_v1_moe": _MOE._replace(
        defaults={"intermediate_size": 11008, "num_experts": 1, "moe_topk": 1},
        axes=_hunyuan,
        parallel=ParallelFacts(plans.EXPERTS, experts=True, context=True),
    ),
    "hy_v3": _MOE._replace(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 13312,
            "moe_intermediate_size": 1536,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
        },
        keys=ConfigKeys(renamed={"num_local_experts": "num_experts"}),
        layers=dense_or_sparse,
        axes=_exaone,
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "mellum": _MOE._replace(
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 7168,
            "moe_intermediate_size": 896,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "sliding_window": 1024,
            "first_k_dense_replace": 0,
        },
        keys=ConfigKeys(renamed={"num_local_experts": "num_experts"}),
        layers=_mellum_layers,
        axes=expert_axes(),
        training=TrainingFacts(fuses_experts=True),
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "minimax_m2": _MOE._replace(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 1536,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "rotary_dim": None,
        },
        checkpoint=CheckpointFacts(experts="split", gguf="minimax-m2"),
        parallel=ParallelFacts(plans.GATHERED, experts=True, context=True),
    ),
    "mixtral": _MOE._replace(
        defaults={
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        training=TrainingFacts(experts_were=True),
        checkpoint=CheckpointFacts(experts="split", gguf="llama"),
        parallel=ParallelFacts(plans.MIXTURE, experts=True, context=True, gpt=plans.GPT_EXPERTS),
        serving=ServingFacts(adapts_tables=True),
    ),
    "olmoe": _MOE._replace(
        attention=AttentionFacts(),
        defaults={"intermediate_size": 2048, "num_experts": 64, "num_experts_per_tok": 8},
        keys=ConfigKeys({"head_dim": ()}),
        axes=expert_axes(width="intermediate_size"),
        training=TrainingFacts(experts_were=True),
        checkpoint=CheckpointFacts(
            experts="split", gguf="olmoe", gguf_keys={"expert_count": "num_experts", **_GGUF_CHOSEN}
        ),
        parallel=ParallelFacts(plans.GATHERED, experts=True, context=True),
    ),
    "phimoe": _MOE._replace(
        defaults={
            "num_key_value_heads": 8,
            "intermediate_size": 6400,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        axes=_phi,
        checkpoint=CheckpointFacts(experts="split", gguf="phimoe"),
        parallel=ParallelFacts(plans.EXPERTS, experts=True, context=True),
        serving=ServingFacts(adapts_tables=True, llama_cpp_window=False),
    ),
    "qwen2_moe": _MOE._replace(
        defaults=_QWEN2_MOE,
        layers=partial(sparse_step_layers, alternates=True),
        axes=expert_axes(shared="shared_expert_intermediate_size"),
        training=TrainingFacts(experts_were=True),
        checkpoint=CheckpointFacts(experts="split", gguf="qwen2moe", gguf_keys=GGUF_BOTH_EXPERTS),
        parallel=ParallelFacts(plans.MIXTURE._replace(replicated=("shared_expert",)), experts=True, context=True),
    ),
    "qwen3_moe": _MOE._replace(
        defaults={
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "use_sliding_window": False,
            "sliding_window": 4096,
        },
        keys=ConfigKeys(renamed={"num_local_experts": "num_experts"}),
        layers=sparse_step_layers,
        axes=expert_axes(),
        training=TrainingFacts(experts_were=True, fuses_experts=True),
        checkpoint=CheckpointFacts(
            experts="split", gguf="qwen3moe", gguf_keys={"expert_count": "num_experts", **GGUF_EXPERTS}
        ),
        parallel=ParallelFacts(
            plans.MIXTURE, experts=True, context=True, gpt={**plans.GPT_EXPERTS, "qk_layernorm": True}
        ),
        serving=ServingFacts(adapts_tables=True),
    ),
    "sarvam_moe": _GLM_MOE._replace(
        defaults={
            **_GLM_MOE.defaults,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "intermediate_size": 8192,
            "moe_intermediate_size": 1024,
            "num_experts_per_tok": 6,
            "partial_rotary_factor": 1.0,
            "use_qk_norm": True,
        },
        keys=ConfigKeys(
            renamed={
                "num_experts": "n_routed_experts",
                "num_shared_experts": "n_shared_experts",
                "use_qkv_bias": "attention_bias",
            }
        ),
        built_as="glm4_moe",
    ),
    "solar_open": _MOE._replace(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "moe_intermediate_size": 1280,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
        },
        axes=_glm,
        parallel=ParallelFacts(TensorParallelPlan(plans.QKV, ("o_proj",), experts=True), experts=True, context=True),
        serving=ServingFacts(is_modelled=False),
    ),
}
