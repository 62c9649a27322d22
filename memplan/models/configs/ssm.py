"""State-space models, linear attention, and hybrids of them with attention.

Source: transformers 5.24 configuration classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models import tensor_plans as plans
from memplan.models.configs.moe import DENSE, EXPERTS, GGUF_BOTH_EXPERTS, expert_axes, numbers
from memplan.models.facts import Family, ModelFacts
from memplan.models.family_facts import (
    NO_CLASS,
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    GenerationFacts,
    ParallelFacts,
    ServingFacts,
    TrainingFacts,
)
from memplan.models.layers import Layer, as_json

_DELTA: dict[str, Any] = {
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "full_attention_interval": 4,
}


def words(m: ModelFacts, key: str, known: Mapping[str, str]) -> list[str]:
    """Return a config's list of layer kinds, translated by `known`. Raises ConfigError for any other list."""
    value: object = m.config.get(key)
    listed = cast(tuple[object, ...], value) if isinstance(value, tuple) else ()
    wrong = [word for word in listed if word not in known]
    if not listed or wrong:
        shown = as_json(wrong[0]) if wrong else as_json(m.config.get(key))
        raise ConfigError(f"config: {key} must be a list of {', '.join(known)}, not {shown}", key)
    return [known[str(word)] for word in listed]


def mixers(m: ModelFacts, key: str, known: Mapping[str, str], default: list[str]) -> list[str]:
    """Return the token mixer of every layer by a config's list, or `default` if there is no list."""
    if m.config.get(key) is None:
        return default
    listed = words(m, key, known)
    if len(listed) < m.num_hidden_layers:
        raise ConfigError(f"config: {key} must be a list of at least {m.num_hidden_layers} layers", key)
    return listed[: m.num_hidden_layers]


def _delta_layers(m: ModelFacts) -> tuple[Layer, ...]:
    every = m.config_int("full_attention_interval")
    default = ["linear_attention" if (i + 1) % every else "attention" for i in range(m.num_hidden_layers)]
    known = {"linear_attention": "linear_attention", "full_attention": "attention"}
    return tuple(
        Layer(False, True, m.num_key_value_heads, m.intermediate_size, mixer, ffn)
        for mixer, ffn in zip(mixers(m, "layer_types", known, default), _qwen_ffns(m), strict=True)
    )


def _qwen_ffns(m: ModelFacts) -> list[str]:
    """Return the FFN of every layer: Qwen3-Next may have dense ones; Qwen3.5 has experts in all layers or in none."""
    if "decoder_sparse_step" not in m.family.defaults:
        return ["experts" if "num_experts" in m.family.defaults else "dense"] * m.num_hidden_layers
    every, dense = m.config_int("decoder_sparse_step"), numbers(m, "mlp_only_layers")
    return ["dense" if i in dense or (i + 1) % every else "experts" for i in range(m.num_hidden_layers)]


def _delta_axes(m: ModelFacts) -> dict[str, int]:
    lk, lv = m.config_int("linear_num_key_heads"), m.config_int("linear_num_value_heads")
    dk, dv = m.config_int("linear_key_head_dim"), m.config_int("linear_value_head_dim")
    if lv % lk:
        raise ConfigError(
            f"config: linear_num_key_heads {lk} does not divide linear_num_value_heads {lv}", "linear_num_key_heads"
        )
    has_experts = "num_experts" in m.family.defaults
    return {
        **(expert_axes(shared="shared_expert_intermediate_size")(m) if has_experts else {}),
        "lk": lk,
        "lv": lv,
        "ldk": dk,
        "ldv": dv,
        "convolved": 2 * lk * dk + lv * dv,
        "projected": 2 * lk * dk + 2 * lv * dv,
        "kernel": m.config_int("linear_conv_kernel_dim"),
        "chunk": 64,
        "widest": max(64, dk, dv),
    }


def _scan_axes(keys: tuple[str, str], sizes: Iterable[int]) -> dict[str, int]:
    """Return the axes of Mamba 2's mixer.

    `sizes` are heads, head width, state, groups, convolution kernel and chunk; `keys` are the config's keys of heads
    and groups, for the error message.
    """
    heads, width, state, groups, kernel, chunk = sizes
    inner = heads * width
    if heads % groups:
        raise ConfigError(f"config: {keys[1]} {groups} does not divide {keys[0]} {heads}", keys[1])
    return {
        "mh": heads,
        "mp": width,
        "mn": state,
        "mg": groups,
        "inner": inner,
        "grouped": inner // groups,
        "convolved": inner + 2 * groups * state,
        "projected": 2 * inner + 2 * groups * state + heads,
        "kernel": kernel,
        "chunk": chunk,
    }


def _mamba2_axes(m: ModelFacts) -> dict[str, int]:
    names = ("num_heads", "head_dim", "state_size", "n_groups", "conv_kernel", "chunk_size")
    return _scan_axes(("num_heads", "n_groups"), (m.config_int(name) for name in names))


def _mamba1_axes(m: ModelFacts, inner: int, state: str, rank: str, kernel: str) -> dict[str, int]:
    """Return the axes of Mamba 1's mixer; `state`, `rank` and `kernel` are the config's keys."""
    n = m.config_int(state)
    steps = -(-m.hidden_size // 16) if m.config.get(rank) == "auto" else m.config_int(rank)
    return {"inner": inner, "mn": n, "dtr": steps, "dbc": steps + 2 * n, "kernel": m.config_int(kernel)}


def _mamba_axes(m: ModelFacts) -> dict[str, int]:
    inner = m.config_int("intermediate_size", m.config_int("expand") * m.hidden_size)
    return _mamba1_axes(m, inner, "state_size", "time_step_rank", "conv_kernel")


def _jamba_axes(m: ModelFacts) -> dict[str, int]:
    inner = m.config_int("mamba_expand") * m.hidden_size
    mixer = _mamba1_axes(m, inner, "mamba_d_state", "mamba_dt_rank", "mamba_d_conv")
    return {**mixer, **expert_axes(width="intermediate_size")(m)}


def _jamba_layers(m: ModelFacts) -> tuple[Layer, ...]:
    every, offset = m.config_int("attn_layer_period"), m.config_int("attn_layer_offset", least=0)
    expert_every, expert_offset = m.config_int("expert_layer_period"), m.config_int("expert_layer_offset", least=0)
    has_experts = m.config_int("num_experts") > 1
    return tuple(
        Layer(
            False,
            False,
            m.num_key_value_heads,
            m.intermediate_size,
            _ATTENTION if i % every == offset else _MAMBA,
            "experts" if has_experts and i % expert_every == expert_offset else "dense",
        )
        for i in range(m.num_hidden_layers)
    )


_MAMBA1: dict[str, Any] = {
    "state_size": 16,
    "expand": 2,
    "conv_kernel": 4,
    "time_step_rank": "auto",
    "use_conv_bias": True,
    "residual_in_fp32": True,
    "tie_word_embeddings": True,
}


def _mixer_layers(m: ModelFacts) -> tuple[Layer, ...]:
    return (Layer(False, False, 1, m.intermediate_size, _MAMBA, "none"),) * m.num_hidden_layers


_NO_HEADS: dict[str, tuple[str, ...]] = {"num_attention_heads": (), "num_key_value_heads": (), "head_dim": ()}
_NO_ATTENTION = ("hidden_size", "num_hidden_layers", "vocab_size")

_MAMBA, _ATTENTION = "mamba", "attention"
_WORDS = {"mamba": _MAMBA, "linear_attention": _MAMBA, "attention": _ATTENTION, "full_attention": _ATTENTION}


def _granite_layers(m: ModelFacts) -> tuple[Layer, ...]:
    key = "layers_block_type" if m.config.get("layers_block_type") is not None else "layer_types"
    ffn = "experts" if m.config_int("num_local_experts", least=0) else "dense"
    width = m.config_int("shared_intermediate_size")
    kinds = mixers(m, key, _WORDS, [_MAMBA] * m.num_hidden_layers)
    return tuple(Layer(False, True, m.num_key_value_heads, width, mixer, ffn) for mixer in kinds)


def _granite_axes(m: ModelFacts) -> dict[str, int]:
    count = m.config_int("num_local_experts", least=0)
    experts = {"E": count, "e": m.config_int("num_experts_per_tok"), "m": m.intermediate_size} if count else {}
    return {**_bamba_axes(m), **experts, "f": m.config_int("shared_intermediate_size")}


def _bamba_axes(m: ModelFacts) -> dict[str, int]:
    """Return the axes of Mamba 2's mixer in a hybrid, whose inner width a config may state as `mamba_d_ssm`."""
    inner = m.config_int("mamba_expand") * m.hidden_size
    if m.config.get("mamba_d_ssm") is not None:
        inner = m.config_int("mamba_d_ssm")
    heads, width = m.config_int("mamba_n_heads"), m.config.get("mamba_d_head")
    width = inner // heads if width == "auto" else m.config_int("mamba_d_head")
    if heads * width != inner:
        raise ConfigError(
            f"config: mamba_n_heads {heads} x mamba_d_head {width} is not mamba_expand x hidden_size, {inner}",
            "mamba_n_heads",
        )
    sizes = (m.config_int(f"mamba_{name}") for name in ("d_state", "n_groups", "d_conv", "chunk_size"))
    return _scan_axes(("mamba_n_heads", "mamba_n_groups"), (heads, width, *sizes))


def _bamba_layers(m: ModelFacts) -> tuple[Layer, ...]:
    attends = numbers(m, "attn_layer_indices")
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size, _MAMBA)
    return tuple(layer._replace(mixer=_ATTENTION) if i in attends else layer for i in range(m.num_hidden_layers))


_NEMOTRON_WORDS = {
    "mamba": _MAMBA,
    "linear_attention": _MAMBA,
    "attention": _ATTENTION,
    "full_attention": _ATTENTION,
    "mlp": "dense",
    "moe": "experts",
}
_LETTERS = {"M": _MAMBA, "*": _ATTENTION, "-": "dense", "E": "experts"}


def _nemotron_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return the layers of a list of words, or of letters in older configs, whose length is the number of layers."""
    key = next((k for k in ("layers_block_type", "layer_types") if m.config.get(k) is not None), None)
    letters: object = m.config.get("hybrid_override_pattern")
    if key is not None:
        kinds = words(m, key, _NEMOTRON_WORDS)
    elif letters is None:
        kinds = [_MAMBA, "experts", _ATTENTION, "dense"]
    elif isinstance(letters, str) and letters and set(letters) <= set(_LETTERS):
        kinds = [_LETTERS[letter] for letter in letters]
    else:
        key = "hybrid_override_pattern"
        raise ConfigError(
            f"config: {key} must consist of the letters {' '.join(_LETTERS)}, not {as_json(letters)}", key
        )
    return tuple(
        Layer(False, False, m.num_key_value_heads, m.intermediate_size, kind, "none")
        if kind in (_MAMBA, _ATTENTION)
        else Layer(False, False, m.num_key_value_heads, m.intermediate_size, "none", kind)
        for kind in kinds
    )


# Older configs' keys of the mixer's sizes.
_OLDER = {"n_groups": "mamba_n_groups", "conv_kernel": "mamba_d_conv", "chunk_size": "mamba_chunk_size"}


def _nemotron_axes(m: ModelFacts) -> dict[str, int]:
    names = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size")
    older = (_OLDER.get(name, name) for name in names)
    keys = [old if m.config.get(old) is not None else name for old, name in zip(older, names, strict=True)]
    sizes = map(m.config_int, keys)
    latent = m.config.get("moe_latent_size")
    count, per_token = m.config_int("n_routed_experts"), m.config_int("num_experts_per_tok")
    if per_token > count:
        raise ConfigError(
            f"config: num_experts_per_tok {per_token} is more than the {count} of n_routed_experts",
            "num_experts_per_tok",
        )
    return {
        **_scan_axes(("mamba_num_heads", "n_groups"), sizes),
        "E": count,
        "e": per_token,
        "m": m.config_int("moe_intermediate_size"),
        "fs": m.config_int("moe_shared_expert_intermediate_size"),
        **({"latent": m.config_int("moe_latent_size")} if latent is not None else {}),
    }


def _lfm2_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return LFM2's layers by `layer_types`, or by the numbers of those with attention."""
    attends = numbers(m, "full_attn_idxs") if m.config.get("full_attn_idxs") is not None else range(m.num_hidden_layers)
    default = [_ATTENTION if i in attends else "convolution" for i in range(m.num_hidden_layers)]
    known = {"full_attention": _ATTENTION, "conv": "convolution"}
    width = _lfm2_width(m)
    return tuple(
        Layer(False, True, m.num_key_value_heads, width, mixer) for mixer in mixers(m, "layer_types", known, default)
    )


_LARA_LAYERS = ("linear_attention", "sliding_attention", "full_attention")


def _lara_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Lara Mini's layers: of five, two are linear, two have a window and rotate, and one has neither."""
    linear, window, full = _LARA_LAYERS
    default = [(linear, window, linear, full, window)[i % 5] for i in range(m.num_hidden_layers)]
    return tuple(
        m.equal_layer._replace(
            sliding=word == window, rotary=word == window, mixer=linear if word == linear else _ATTENTION, ffn=EXPERTS
        )
        for word in mixers(m, "layer_types", {word: word for word in _LARA_LAYERS}, default)
    )


_LFM3_LAYERS = ("full_attention", "sliding_attention", "conv")


def _lfm3_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return LFM3's layers: of four, one with full attention, one with a window, and convolutions."""
    full, window, conv = _LFM3_LAYERS
    default = [full if i % 4 == 2 else conv if i % 4 or not i else window for i in range(m.num_hidden_layers)]
    return tuple(
        m.equal_layer._replace(sliding=word == window, mixer="convolution" if word == conv else _ATTENTION)
        for word in mixers(m, "layer_types", {word: word for word in _LFM3_LAYERS}, default)
    )


def _lfm2_axes(m: ModelFacts) -> dict[str, int]:
    return {"f": _lfm2_width(m), "kernel": m.config_int("conv_L_cache")}


def _lfm2_width(m: ModelFacts) -> int:
    """Return the width of LFM2's MLP: two thirds of the config's, times a factor, rounded up."""
    if not m.get("block_auto_adjust_ff_dim", True):
        return m.intermediate_size
    step, factor = m.config_int("block_multiple_of", 256), m.get("block_ffn_dim_multiplier", 1.0)
    return -(-int(factor * int(2 * m.intermediate_size / 3)) // step) * step


def _lfm2_moe_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return LFM2's layers, with experts in all but the first `num_dense_layers`."""
    dense = m.config_int("num_dense_layers", least=0)
    return tuple(layer._replace(ffn=EXPERTS if i >= dense else DENSE) for i, layer in enumerate(_lfm2_layers(m)))


def _lfm2_moe_axes(m: ModelFacts) -> dict[str, int]:
    return {**_lfm2_axes(m), **expert_axes()(m)}


_SCANS = ("mamba_ssm", "causal_conv1d")
_MAMBA_ROW = Family(
    _MAMBA1,
    ConfigKeys({**_NO_HEADS, "intermediate_size": ()}, _NO_ATTENTION),
    _mixer_layers,
    _mamba_axes,
    stack="mamba",
    attention=AttentionFacts(no_flash_2=NO_CLASS, rotary=False, single_sequence="layers"),
    training=TrainingFacts(fused_mixers=True, packages=_SCANS),
    generation=GenerationFacts(cache="mamba-1"),
    checkpoint=CheckpointFacts(gguf="mamba"),
)
_EXPERTS = {"num_key_value_heads": 2, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512}
_POST_NORM = {"post_attention_layernorm": "post_attention_norm"}
_GGUF_DELTA = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    "full_attention_interval": "full_attention_interval",
    **GGUF_BOTH_EXPERTS,
}
_QWEN3_NEXT = Family(
    {
        **_DELTA,
        **_EXPERTS,
        "intermediate_size": 5632,
        "decoder_sparse_step": 1,
        "num_experts": 512,
        "num_experts_per_tok": 10,
    },
    layers=_delta_layers,
    axes=_delta_axes,
    stack="qwen3_next",
    training=TrainingFacts(packages=("fla", "causal_conv1d")),
    generation=GenerationFacts(cache="delta"),
    checkpoint=CheckpointFacts(experts="split", gguf="qwen3next", gguf_keys=_GGUF_DELTA, gguf_modules=_POST_NORM),
    parallel=ParallelFacts(plans.MIXTURE_DELTA, experts=True),
)

_SCAN: dict[str, Any] = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
}
_BAMBA = Family(
    {"num_key_value_heads": 8, "intermediate_size": 14336, "partial_rotary_factor": 0.5, **_SCAN},
    keys=ConfigKeys(fixed={"partial_rotary_factor": 0.5}),
    layers=_bamba_layers,
    axes=_bamba_axes,
    stack="ssm",
    attention=AttentionFacts(single_sequence="layers"),
    training=TrainingFacts(packages=_SCANS),
    generation=GenerationFacts(cache="mamba-2"),
    serving=ServingFacts(is_modelled=False),
)

FAMILIES: dict[str, Family] = {
    "bamba": _BAMBA,
    "falcon_h1": _BAMBA._replace(
        defaults={"num_key_value_heads": 8, "intermediate_size": 14336, "mamba_d_ssm": 1024, **_SCAN},
        keys=ConfigKeys(),
        training=TrainingFacts(fused_mixers=True, packages=_SCANS),
        generation=GenerationFacts(cache="side_by_side"),
    ),
    "falcon_mamba": _MAMBA_ROW,
    "jamba": Family(
        {
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "num_experts": 16,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 8,
            "attn_layer_offset": 4,
            "mamba_d_state": 16,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": "auto",
            "mamba_conv_bias": True,
        },
        keys=ConfigKeys({"head_dim": ()}),
        layers=_jamba_layers,
        axes=_jamba_axes,
        stack="mamba",
        attention=AttentionFacts(rotary=False, single_sequence="layers"),
        training=TrainingFacts(packages=_SCANS, scans_alone=True),
        generation=GenerationFacts(cache="mamba-1"),
        checkpoint=CheckpointFacts(experts="split", gguf="jamba"),
        parallel=ParallelFacts(plans.EXPERTS, experts=True),
        serving=ServingFacts(adapts_tables=True),
    ),
    "lara_mini": _QWEN3_NEXT._replace(
        defaults={
            **{key: value for key, value in _DELTA.items() if key.startswith("linear")},
            **_EXPERTS,
            "tie_word_embeddings": True,
            "head_dim": 128,
            "num_key_value_heads": 4,
            "linear_num_key_heads": 8,
            "linear_num_value_heads": 16,
            "num_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 512,
        },
        layers=_lara_layers,
        stack="lara_mini",
        training=TrainingFacts(),
        checkpoint=CheckpointFacts(experts="split"),
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "lfm2": Family(
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 8,
            "intermediate_size": 12288,
            "conv_L_cache": 3,
            "block_ffn_dim_multiplier": 1.0,
        },
        keys=ConfigKeys(
            {"intermediate_size": ("block_ff_dim", "intermediate_size"), "hidden_act": ()},
            renamed={"tie_embedding": "tie_word_embeddings"},
        ),
        layers=_lfm2_layers,
        axes=_lfm2_axes,
        stack="lfm2",
        generation=GenerationFacts(cache="convolution"),
        serving=ServingFacts(is_modelled=False),
    ),
    "lfm3": Family(
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "intermediate_size": 7680,
            "sliding_window": 256,
            "conv_L_cache": 7,
        },
        keys=ConfigKeys({"hidden_act": ()}, fixed={"block_auto_adjust_ff_dim": False}),
        layers=_lfm3_layers,
        axes=_lfm2_axes,
        stack="lfm2",
        generation=GenerationFacts(cache="convolution"),
        serving=ServingFacts(is_modelled=False),
    ),
    "lfm2_moe": Family(
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 8,
            "intermediate_size": 7168,
            "moe_intermediate_size": 1792,
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "num_dense_layers": 2,
            "conv_L_cache": 3,
            "block_auto_adjust_ff_dim": False,
        },
        keys=ConfigKeys({"hidden_act": ()}, renamed={"tie_embedding": "tie_word_embeddings"}),
        layers=_lfm2_moe_layers,
        axes=_lfm2_moe_axes,
        stack="lfm2",
        generation=GenerationFacts(cache="convolution"),
        checkpoint=CheckpointFacts(experts="split"),
        serving=ServingFacts(is_modelled=False),
    ),
    "mamba": _MAMBA_ROW._replace(training=TrainingFacts(skips=("dt_proj",), fused_mixers=True, packages=_SCANS)),
    "nemotron_h": Family(
        {
            "num_key_value_heads": 8,
            "head_dim": 128,
            "intermediate_size": 21504,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "chunk_size": 128,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7688,
            "moe_shared_expert_intermediate_size": 7688,
            "mlp_hidden_act": "relu2",
        },
        keys=ConfigKeys(
            {"hidden_act": ("mlp_hidden_act",)}, required=("hidden_size", "num_attention_heads", "vocab_size")
        ),
        layers=_nemotron_layers,
        axes=_nemotron_axes,
        acts=("relu2",),
        gated=False,
        stack="ssm",
        attention=AttentionFacts(rotary=False, single_sequence="layers"),
        training=TrainingFacts(fused_mixers=True, packages=_SCANS),
        generation=GenerationFacts(cache="mamba-2"),
        checkpoint=CheckpointFacts(gguf="nemotron_h", gguf_rolls=True),
        serving=ServingFacts(adapts_tables=True, fp32_states=True),
    ),
    "granitemoehybrid": Family(
        {
            "intermediate_size": 11008,
            "shared_intermediate_size": 1024,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            **_SCAN,
        },
        keys=ConfigKeys({"head_dim": ()}),
        layers=_granite_layers,
        axes=_granite_axes,
        stack="ssm",
        attention=AttentionFacts(single_sequence="layers"),
        training=TrainingFacts(packages=_SCANS),
        generation=GenerationFacts(cache="mamba-2"),
        checkpoint=CheckpointFacts(gguf="granitehybrid"),
        parallel=ParallelFacts(plans.EXPERTS, experts=True),
        serving=ServingFacts(adapts_tables=True),
    ),
    "mamba2": _MAMBA_ROW._replace(
        defaults={
            "num_heads": 128,
            "head_dim": 64,
            "state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "chunk_size": 256,
            "use_conv_bias": True,
            "residual_in_fp32": True,
        },
        axes=_mamba2_axes,
        stack="ssm",
        training=TrainingFacts(fused_mixers=True, packages=_SCANS),
        generation=GenerationFacts(cache="mamba-2"),
        checkpoint=CheckpointFacts(gguf="mamba2"),
    ),
    "qwen3_5_moe_text": _QWEN3_NEXT._replace(
        defaults={**_DELTA, **_EXPERTS, "num_experts": 256, "num_experts_per_tok": 8},
        keys=ConfigKeys({"intermediate_size": ()}),
        checkpoint=CheckpointFacts(experts="split"),
        serving=ServingFacts(adapts_tables=True),
    ),
    "qwen3_5_text": _QWEN3_NEXT._replace(
        defaults={**_DELTA, "num_key_value_heads": 4, "intermediate_size": 12288},
        checkpoint=CheckpointFacts(gguf="qwen35", gguf_modules=_POST_NORM, gguf_rolls=True),
        parallel=ParallelFacts(plans.LLAMA_DELTA),
        serving=ServingFacts(adapts_tables=True),
    ),
    "qwen3_next": _QWEN3_NEXT._replace(training=_QWEN3_NEXT.training._replace(fuses_experts=True)),
}
