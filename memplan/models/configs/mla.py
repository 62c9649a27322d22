"""Multi-head latent attention: DeepSeek's families and their relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models import tensor_plans as plans
from memplan.models.configs.layer_lists import kinds, listed
from memplan.models.configs.moe import EXPERTS, GGUF_SHARED_EXPERTS, after_first, dense_or_sparse, expert_axes
from memplan.models.configs.ssm import mixers
from memplan.models.configs.towers import size
from memplan.models.facts import ONE_KERNEL, Family, ImageFacts, ModelFacts
from memplan.models.family_facts import (
    NO_CLASS,
    AttentionFacts,
    CheckpointFacts,
    ConfigKeys,
    DirectReads,
    GenerationFacts,
    ParallelFacts,
    ServingFacts,
    TrainingFacts,
)
from memplan.models.layers import Layer, as_json
from memplan.models.objectives import CLASSIFIER

_SITU = (*ONE_KERNEL, "situ")  # Kimi K3's activation; a kimi_linear config may have it too

# These config classes' head_dim is the rotated part of a head.
_NAMES: dict[str, tuple[str, ...]] = {"head_dim": ("qk_rope_head_dim",), "num_key_value_heads": ()}


def latent_axes(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of `memplan.catalogue.attention.latent`; a `ql` of 0 means that queries are not compressed."""
    plain, rotated = m.config_int("qk_nope_head_dim"), m.head_dim
    values, rank = m.config_int("v_head_dim", m.hidden_size // m.num_attention_heads), m.config_int("kv_lora_rank")
    return {
        "d": plain + rotated,
        "dn": plain,
        "dv": values,
        "dkv": plain + values,
        "ql": m.config_int("q_lora_rank", 0, least=0),
        "kl": rank,
        "klr": rank + rotated,
    }


def _routed(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of latent attention and experts; `fs` is the total width of shared experts, `G` the groups."""
    axes = expert_axes("n_routed_experts")(m)
    shared, groups = m.config_int("n_shared_experts"), m.config_int("n_group", 1)
    return {**latent_axes(m), **axes, "fs": axes["m"] * shared, "G": groups}


_DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_V3: dict[str, Any] = {
    **_DEEPSEEK,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "rope_interleave": True,
}


FULL, SHARED = "full", "shared"  # the layer has an indexer, or reuses the previous layer's choice of tokens


def _with_indexers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return layers with or without an indexer of their own, by a list, a string of letters, or a frequency."""
    count = m.num_hidden_layers
    every, offset = (
        max(1, m.config_int("index_topk_freq", 1, least=0)),
        m.config_int("index_skip_topk_offset", 2, least=0),
    )
    regular = tuple(FULL if max(i - offset + 1, 0) % every == 0 else SHARED for i in range(count))
    pattern: Any = m.config.get("indexer_types") or m.config.get("index_topk_pattern") or regular
    words = cast(Sequence[Any], pattern) if isinstance(pattern, (str, tuple)) else ()
    kinds = [{"F": FULL, "S": SHARED}.get(str(word), str(word)) for word in words]
    if len(kinds) < count or not set(kinds) <= {FULL, SHARED} or kinds[0] != FULL:
        raise ConfigError(
            f"config: indexer_types must be a list of {count} words, full or shared, the first full", "indexer_types"
        )
    return tuple(layer._replace(mixer=kind) for layer, kind in zip(dense_or_sparse(m), kinds, strict=False))


def _indexer_axes(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of `_routed` and of `memplan.catalogue.attention.sparse_indexer`."""
    heads, width = m.config_int("index_n_heads"), m.config_int("index_head_dim")
    narrow = m.config_int("q_lora_rank")  # which the indexer reads, too
    return {**_routed(m), "ql": narrow, "ih": heads, "id": width, "idp": max(0, width - m.head_dim)}


def _routed_with_tower(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of Kimi K2.5's decoder and of its tower, the latter as in `memplan.models.configs.towers`.

    vrows    rows, and columns, of the table of positions
    vframes  positions in time
    vp       width that the projector normalises
    """
    hidden, heads = size(m, "hidden_size", 1152, "vt_hidden_size"), size(m, "num_attention_heads", 16)
    kernel, patch = size(m, "merge_kernel_size", 2), size(m, "patch_size", 14)
    return {
        **_routed(m),
        "vh": hidden,
        "va": heads,
        "vd": hidden // heads,
        "vd2": hidden // heads // 2,
        "vd4": hidden // heads // 4,
        "vf": size(m, "intermediate_size", 4304, "vt_intermediate_size"),
        "vin": 3 * patch**2,
        "vL1": size(m, "num_hidden_layers", 27, "vt_num_hidden_layers"),
        "vm": hidden * kernel**2,
        "vp": m.config_int("projection_hidden_size", 1152),
        "vrows": size(m, "pos_emb_height", 64, "init_pos_emb_height"),
        "vframes": size(m, "pos_emb_time", 4, "init_pos_emb_time") + 1,
    }


_LINEAR = {
    "head_dim": "linear_head_dim",
    "num_heads": "linear_num_heads",
    "short_conv_kernel_size": "linear_conv_kernel_dim",
}
_MIXERS = {"linear_attention": "linear_attention", "full_attention": "attention"}


def _delta_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Kimi Linear's and Kimi K3's layers.

    Mixers are listed as words or as layer numbers from 1; by default every fourth layer from the fifth has attention.
    Kimi K3 sums the outputs of every `attn_res_block_size` layers, and each layer chooses among the earlier sums.
    """
    count, part = m.num_hidden_layers, m.part("linear_attn_config")
    default = ["attention" if i and i % 4 == 0 else "linear_attention" for i in range(count)]
    if m.config.get("layer_types") is None and "full_attn_layers" in part and "kda_layers" in part:
        listed: dict[Any, str] = {}
        for key, kind in (("full_attn_layers", "attention"), ("kda_layers", "linear_attention")):
            numbers = cast(Sequence[Any], part[key] if isinstance(part[key], tuple) else ())
            listed |= dict.fromkeys(numbers, kind)
        if set(listed) != set(range(1, count + 1)):
            raise ConfigError(
                f"config: full_attn_layers and kda_layers of linear_attn_config must be lists of all {count} layers",
                "linear_attn_config",
            )
        default = [listed[i + 1] for i in range(count)]
    kinds = mixers(m, "layer_types", _MIXERS, default)
    every = m.config_int("attn_res_block_size", 0)
    if every and -(-count // every) > _MAX_SUMS:
        raise ConfigError(
            f"config: attn_res_block_size {every} makes more than {_MAX_SUMS} sums of {count} layers",
            "attn_res_block_size",
        )
    return tuple(
        layer._replace(
            mixer=mixer, choosable_sums=-(-i // every) if every else 0, opens_sum=bool(every) and i % every == 0
        )
        for i, (layer, mixer) in enumerate(zip(dense_or_sparse(m), kinds, strict=True))
    )


_MAX_SUMS = 128  # no known model has more than 8


def _delta_axes(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of latent attention, experts and `memplan.catalogue.families.kimi_linear`."""
    part = m.part("linear_attn_config")
    width, heads, kernel = (
        value if isinstance(value := part.get(old), int) and value > 0 else m.config_int(new)
        for old, new in _LINEAR.items()
    )
    return {
        **_routed(m),
        "lv": heads,
        "ldk": width,
        "convolved": 3 * heads * width,
        "kernel": kernel,
        "chunk": 64,
        "hl": m.config_int("routed_expert_hidden_size", m.hidden_size),
    }


def _delta_with_tower(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of Kimi K3's decoder and of its tower, the latter as in `memplan.models.configs.towers`.

    `vq` is the width of the tower's queries.
    """
    vision = m.part("vision_config")
    for key, only in (("mm_projector_type", "patchmergerv2"), ("norm_type", "rmsnorm"), ("mlp_type", "mlp2")):
        if vision.get(key, only) != only:
            raise ConfigError(f"config: {key} of Kimi K3 must be {only}, not {as_json(vision[key])}", key)
    hidden, kernel = size(m, "hidden_size", 1024, "vt_hidden_size"), size(m, "merge_kernel_size", 2)
    return {
        **_delta_axes(m),
        "vh": hidden,
        "vq": size(m, "qkv_hidden_size", hidden),
        "vf": size(m, "intermediate_size", 4096, "vt_intermediate_size"),
        "vin": 3 * size(m, "patch_size", 14) ** 2,
        "vL1": size(m, "num_hidden_layers", 27, "vt_num_hidden_layers"),
        "vm": size(m, "mm_hidden_size", hidden) * kernel**2,
        "vrows": size(m, "pos_emb_height", 64, "init_pos_emb_height"),
        "vcolumns": size(m, "pos_emb_width", 64, "init_pos_emb_width"),
        "vframes": size(m, "pos_emb_time", 4, "init_pos_emb_time"),
    }


_KIMI_LINEAR: dict[str, Any] = {
    "intermediate_size": 9216,
    "moe_intermediate_size": 1024,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "linear_head_dim": 128,
    "linear_num_heads": 32,
    "linear_conv_kernel_dim": 4,
}

_COMPRESSED = {0: "sliding", 4: "sparse", 128: "heavy"}
_KINDS = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "sparse",
    "heavily_compressed_attention": "heavy",
}


def _compressed(m: ModelFacts) -> tuple[Layer, ...]:
    """Return DeepSeek-V4's layers by a list of kinds or of compression rates.

    Without a list, two heavily compressed layers are followed by sparse and heavy ones in turn. The first layers choose
    experts by a hash.
    """
    count = m.num_hidden_layers
    default = ("heavy",) * min(count, 2) + tuple("sparse" if i % 2 else "heavy" for i in range(max(count - 2, 0)))
    key = "layer_types" if m.config.get("layer_types") is not None else "compress_ratios"
    words, known = listed(m, key), _KINDS if key == "layer_types" else _COMPRESSED
    compressions = default if words is None else tuple(known.get(word, "") for word in words)
    if not all(compressions):
        raise ConfigError(
            f"config: {key} must be a list of {count} layers, each one of {', '.join(map(str, known))}", key
        )
    hashed = m.config_int("num_hash_layers", 3, least=0)
    hashes = kinds(m, "mlp_layer_types", {"hash_moe": True, "moe": False}, [i < hashed for i in range(count)])
    layer = Layer(True, True, 1, m.config_int("moe_intermediate_size"))
    return tuple(
        layer._replace(sliding=mixer == "sliding", mixer=mixer, ffn="hashed" if is_hashed else EXPERTS)
        for mixer, is_hashed in zip(compressions, hashes, strict=True)
    )


def _v4_axes(m: ModelFacts) -> Mapping[str, int]:
    """Return the axes of `memplan.catalogue.families.deepseek_v4`."""
    d, n, h, groups = m.head_dim, m.config_int("hc_mult"), m.hidden_size, m.config_int("o_groups")
    rotated = m.config_int("qk_rope_head_dim", d // 8)
    rates = m.part("compress_rates")
    width, low = m.num_attention_heads * d // groups, m.config_int("o_lora_rank")
    return {
        **expert_axes("n_routed_experts")(m),
        "m": m.config_int("intermediate_size", m.config_int("moe_intermediate_size")),  # aliases in the config class
        "rot": rotated,
        "rot2": rotated // 2,
        "n": n,
        "nh": n * h,
        "n2": n * n,
        "nw": (2 + n) * n,
        "ql": m.config_int("q_lora_rank"),
        "og": groups,
        "ol": low,
        "ogl": groups * low,
        "gd": width,
        "ih": m.config_int("index_n_heads"),
        "id": m.config_int("index_head_dim"),
        "rc": int(rates.get("compressed_sparse_attention", 4)),
        "rh": int(rates.get("heavily_compressed_attention", 128)),
    }


# Source: modeling_kimi_linear.py of moonshotai/Kimi-K3, _apply_attn_res.
_RESIDUAL_PROJECTIONS = DirectReads(
    "multiplies by", ("self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj"), "attn_res_block_size"
)


def has_k3_parts(m: ModelFacts) -> bool:
    """Whether the config has any of Kimi K3's parts, so that transformers' Kimi Linear class does not fit it."""
    kda = m.part("linear_attn_config")
    keys = ("attn_res_block_size", "routed_expert_hidden_size", "mla_use_output_gate")
    return (
        any(m.config.get(key) for key in keys)
        or m.hidden_act == "situ"
        or any(kda.get(key) for key in ("use_full_rank_gate", "gate_lower_bound"))
    )


def _k3_note(m: ModelFacts) -> str:
    return _K3_NOTE if has_k3_parts(m) else ""


_K3_NOTE = (
    "kimi_k3: transformers 5.24 has no class for it. The parts that differ from Kimi Linear (attention residuals, "
    "bounded activation and decay, gates, a narrower space for experts) follow the modeling_kimi_linear.py published "
    "with its weights. That code calls flash-linear-attention and runs routed experts without gradients, so we assume "
    "that it trains and generates like transformers' Kimi Linear. None of it was traced"
)

# Source: transformers 5.24 configuration classes.
_KIMI_KEYS = {
    "model_max_length": "max_position_embeddings",
    "moe_renormalize": "norm_topk_prob",
    "num_expert_group": "n_group",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "num_experts_per_token": "num_experts_per_tok",
    "num_shared_experts": "n_shared_experts",
}

_V2_KEYS = {  # of a GGUF file
    "attention.key_length": None,
    "attention.head_count_kv": None,
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    **GGUF_SHARED_EXPERTS,
}
_DEEPSEEK_V3 = Family(
    _V3,
    ConfigKeys(_NAMES),
    after_first,
    _routed,
    stack="deepseek",
    training=TrainingFacts(fuses_experts=True),
    generation=GenerationFacts(cache="latent"),
    checkpoint=CheckpointFacts(experts="split", gguf="deepseek2"),
    parallel=ParallelFacts(plans.FFN, experts=True),
)
_INDEXED = _DEEPSEEK_V3._replace(
    defaults={**_V3, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
    layers=dense_or_sparse,
    axes=_indexer_axes,
    attention=AttentionFacts(no_flash_2=NO_CLASS),
    training=TrainingFacts(never_quantised=("weights_proj",), fuses_experts=True),
    checkpoint=CheckpointFacts(experts="split", gguf="deepseek32"),
    parallel=ParallelFacts(plans.LATENT_EXPERTS, experts=True),
)
_KIMI = Family(
    _KIMI_LINEAR,
    ConfigKeys(_NAMES, renamed=_KIMI_KEYS),
    _delta_layers,
    _delta_axes,
    acts=_SITU,
    stack="kimi_linear",
    attention=AttentionFacts(rotary=False),
    training=TrainingFacts(direct_reads=_RESIDUAL_PROJECTIONS),
    generation=GenerationFacts(cache="delta"),
    checkpoint=CheckpointFacts(experts="split"),
    parallel=ParallelFacts(plans.FFN, experts=True),
    serving=ServingFacts(fp32_states=True),
    note=_k3_note,
)

FAMILIES = {
    "axk1": _DEEPSEEK_V3._replace(
        defaults={**_V3, "n_routed_experts": 192, "first_k_dense_replace": 1},
        layers=dense_or_sparse,
        training=TrainingFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
    "deepseek_v2": _DEEPSEEK_V3._replace(
        defaults={
            **_DEEPSEEK,
            "intermediate_size": 11008,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,  # from DeepSeek's own class; transformers' has no default and fails
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
        },
        checkpoint=CheckpointFacts(experts="split", gguf="deepseek2", gguf_keys=_V2_KEYS),
        parallel=_INDEXED.parallel,
    ),
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v32": _INDEXED,
    "deepseek_v4": Family(
        {
            "head_dim": 512,
            "num_key_value_heads": 1,
            "intermediate_size": None,
            "moe_intermediate_size": 2048,
            "q_lora_rank": 1024,
            "num_experts_per_tok": 6,
            "n_routed_experts": 256,
            "hc_mult": 4,
            "hc_sinkhorn_iters": 20,
            "sliding_window": 128,
            "o_groups": 8,
            "o_lora_rank": 1024,
            "index_n_heads": 64,
            "index_head_dim": 128,
            "index_topk": 512,
        },
        keys=ConfigKeys({"intermediate_size": ("moe_intermediate_size",)}),
        layers=_compressed,
        axes=_v4_axes,
        stack="deepseek_v4",
        attention=AttentionFacts(
            no_flash_2="it does not support attention sinks, nor heads wider than 256", single_sequence="views"
        ),
        training=TrainingFacts(never_quantised=("weights_proj",)),
        generation=GenerationFacts(cache="compressed"),
        checkpoint=CheckpointFacts(experts="split"),
        serving=ServingFacts(whole=frozenset(("attn_hc", "ffn_hc", "hc_head", "compressor", "kv_proj"))),
    ),
    "glm4_moe_lite": _DEEPSEEK_V3._replace(
        defaults={
            **_V3,
            "first_k_dense_replace": None,
            "intermediate_size": 10240,
            "moe_intermediate_size": 1536,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "n_routed_experts": 64,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 4,
        },
        layers=dense_or_sparse,
        parallel=ParallelFacts(plans.LATENT._replace(experts=True, replicated=("shared_experts",)), experts=True),
    ),
    "glm_moe_dsa": _INDEXED._replace(
        defaults={
            **_V3,
            "intermediate_size": 12288,
            "q_lora_rank": 2048,
            "qk_nope_head_dim": 192,
            "v_head_dim": 256,
            "n_group": 1,
            "topk_group": 1,
            "index_topk": 2048,
            "index_head_dim": 128,
            "index_n_heads": 32,
        },
        layers=_with_indexers,
        checkpoint=CheckpointFacts(experts="split", gguf="glm-dsa"),
    ),
    "kimi_k2": _DEEPSEEK_V3._replace(built_as="deepseek_v3"),
    "kimi_k25": _DEEPSEEK_V3._replace(
        defaults={**_V3, "tie_word_embeddings": True},
        keys=ConfigKeys(_NAMES, decoder="text_config"),
        axes=_routed_with_tower,
        stack="kimi",
        training=TrainingFacts(),
        parallel=ParallelFacts(),
        images=ImageFacts(),
    ),
    "kimi_k3": _KIMI._replace(
        keys=_KIMI.keys._replace(decoder="text_config"),
        axes=_delta_with_tower,
        stack="kimi",
        checkpoint=CheckpointFacts(),
        parallel=ParallelFacts(),
        images=ImageFacts(),
    ),
    "kimi_linear": _KIMI._replace(training=_KIMI.training._replace(packages=("fla", "causal_conv1d"))),
    "minicpm3": Family(
        {
            "tie_word_embeddings": True,
            "intermediate_size": 6400,
            "kv_lora_rank": 256,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "max_position_embeddings": 32768,
        },
        keys=ConfigKeys(_NAMES),
        axes=latent_axes,
        stack="minicpm3",
        generation=GenerationFacts(cache="latent"),
        parallel=ParallelFacts(plans.LATENT),
    ),
    "mistral4": _DEEPSEEK_V3._replace(
        defaults={
            "intermediate_size": 12288,
            "moe_intermediate_size": 2048,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 4,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "kv_lora_rank": 256,
            "q_lora_rank": 1024,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
        },
        keys=ConfigKeys(_NAMES, renamed={"num_local_experts": "n_routed_experts"}),
        objectives=CLASSIFIER,
        training=TrainingFacts(),
        checkpoint=CheckpointFacts(experts="split"),
    ),
    "sarvam_mla": _DEEPSEEK_V3._replace(
        defaults={
            **_V3,
            "intermediate_size": 16384,
            "q_lora_rank": None,
            "n_routed_experts": 128,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        keys=ConfigKeys(_NAMES, renamed={"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}),
        built_as="deepseek_v3",
    ),
    "youtu": _DEEPSEEK_V3._replace(
        defaults={**_DEEPSEEK, "tie_word_embeddings": True, "intermediate_size": 6144, "rope_interleave": True},
        layers=None,
        axes=latent_axes,
        training=TrainingFacts(),
        checkpoint=CheckpointFacts(),
        parallel=ParallelFacts(),
        serving=ServingFacts(is_modelled=False),
    ),
}
