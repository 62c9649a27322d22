"""Multi-head latent attention: DeepSeek's families and those written like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models.configs.layer_lists import kinds, listed
from memplan.models.configs.moe import DENSE, EXPERTS, after_first, sized
from memplan.models.configs.ssm import mixers
from memplan.models.configs.vision import size
from memplan.models.facts import ONE_KERNEL, Family, ModelFacts
from memplan.models.layers import Layer, as_json

_SITU = (*ONE_KERNEL, "situ")  # of Kimi K3, whose parts a kimi_linear config may have

# A head as these configs' classes mean it is the part that is rotated.
_NAMES: dict[str, tuple[str, ...]] = {"head_dim": ("qk_rope_head_dim",), "num_key_value_heads": ()}


def latent_axes(m: ModelFacts) -> Mapping[str, int]:
    """The axes of `memplan.catalogue.attention.latent`; a rank of 0 is none."""
    plain, turned = m.whole("qk_nope_head_dim"), m.head_dim
    values, rank = m.whole("v_head_dim", m.hidden_size // m.num_attention_heads), m.whole("kv_lora_rank")
    return {
        "d": plain + turned,
        "dn": plain,
        "dv": values,
        "dkv": plain + values,
        "ql": m.whole("q_lora_rank", 0, least=0),
        "kl": rank,
        "klr": rank + turned,
    }


def _routed(m: ModelFacts) -> Mapping[str, int]:
    """The axes of latent attention and of experts: `fs` is the width of the shared ones together, `G` the groups."""
    axes = sized("n_routed_experts")(m)
    shared, groups = m.whole("n_shared_experts"), m.whole("n_group", 1)
    return {**latent_axes(m), **axes, "fs": axes["m"] * shared, "G": groups}


def _listed(m: ModelFacts) -> tuple[Layer, ...]:
    """Dense and sparse layers as a list says; without one, all but the first few are sparse."""
    first = m.whole("first_k_dense_replace", 1, least=0)
    kinds = cast(
        Sequence[Any], m.config.get("mlp_layer_types") or ("dense",) * first + ("sparse",) * m.num_hidden_layers
    )
    if (
        not isinstance(kinds, tuple)
        or len(kinds) < m.num_hidden_layers
        or not set(map(str, kinds)) <= {"dense", "sparse"}
    ):
        raise ConfigError(
            f"config: mlp_layer_types must be a list of {m.num_hidden_layers} times dense or sparse", "mlp_layer_types"
        )
    layer = Layer(False, True, m.num_key_value_heads, m.intermediate_size)
    return tuple(layer._replace(ffn=DENSE if kind == "dense" else EXPERTS) for kind in kinds[: m.num_hidden_layers])


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


FULL, SHARED = "full", "shared"  # a layer has an indexer, or takes what the one before it chose


def _sparse(m: ModelFacts) -> tuple[Layer, ...]:
    """Layers with an indexer of their own, and those that share the one's before: a list, letters, or every so many."""
    count = m.num_hidden_layers
    every, offset = max(1, m.whole("index_topk_freq", 1, least=0)), m.whole("index_skip_topk_offset", 2, least=0)
    regular = tuple(FULL if max(i - offset + 1, 0) % every == 0 else SHARED for i in range(count))
    given: Any = m.config.get("indexer_types") or m.config.get("index_topk_pattern") or regular
    each = cast(Sequence[Any], given) if isinstance(given, (str, tuple)) else ()
    kinds = [{"F": FULL, "S": SHARED}.get(str(kind), str(kind)) for kind in each]
    if len(kinds) < count or not set(kinds) <= {FULL, SHARED} or kinds[0] != FULL:
        raise ConfigError(
            f"config: indexer_types must be a list of {count} times full or shared, the first full", "indexer_types"
        )
    return tuple(layer._replace(mixer=kind) for layer, kind in zip(_listed(m), kinds, strict=False))


def _indexed(m: ModelFacts) -> Mapping[str, int]:
    """Those and the axes of `memplan.catalogue.attention.sparse_indexer`."""
    heads, width = m.whole("index_n_heads"), m.whole("index_head_dim")
    return {**_routed(m), "ih": heads, "id": width, "idp": max(0, width - m.head_dim)}


def _beside_a_tower(m: ModelFacts) -> Mapping[str, int]:
    """Those of the decoder and of the tower, as `memplan.models.configs.vision` calls them; `vrows` squared are its
    places, `vframes` the times it tells apart, `vp` the width that its projector normalises."""
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
        "vp": m.whole("projection_hidden_size", 1152),
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
    """Kimi Linear's: words, or lists of layers counted from 1; else every fourth attends, from the fifth. Kimi K3 sums
    the outputs of so many layers, and chooses from the sums before in each."""
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
    found = mixers(m, "layer_types", _MIXERS, default)
    every = m.whole("attn_res_block_size", 0)
    if every and -(-count // every) > _MOST_SUMS:
        raise ConfigError(
            f"config: attn_res_block_size {every} makes more than {_MOST_SUMS} sums of {count} layers",
            "attn_res_block_size",
        )
    return tuple(
        layer._replace(mixer=mixer, sums=-(-i // every) if every else 0, opens=bool(every) and i % every == 0)
        for i, (layer, mixer) in enumerate(zip(_listed(m), found, strict=True))
    )


_MOST_SUMS = 128  # no model in use has more than 8; every layer chooses from those before it


def _delta_axes(m: ModelFacts) -> Mapping[str, int]:
    """Those of latent attention and of experts, and of `memplan.catalogue.families.kimi_linear`."""
    part = m.part("linear_attn_config")
    width, heads, kernel = (
        value if isinstance(value := part.get(old), int) and value > 0 else m.whole(new) for old, new in _LINEAR.items()
    )
    return {
        **_routed(m),
        "lv": heads,
        "ldk": width,
        "convolved": 3 * heads * width,
        "kernel": kernel,
        "chunk": 64,
        "hl": m.whole("routed_expert_hidden_size", m.hidden_size),
    }


def _delta_beside_a_tower(m: ModelFacts) -> Mapping[str, int]:
    """Those of `memplan.catalogue.families.kimi_linear` and of the tower, as `memplan.models.configs.vision` calls
    them; `vq` is the width of its queries."""
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
    """V4's layers: a list of kinds or of rates, else two heavy ones and both kinds in turn; the first few hashed."""
    count = m.num_hidden_layers
    usual = ("heavy",) * min(count, 2) + tuple("sparse" if i % 2 else "heavy" for i in range(max(count - 2, 0)))
    key = "layer_types" if m.config.get("layer_types") is not None else "compress_ratios"
    given, known = listed(m, key), _KINDS if key == "layer_types" else _COMPRESSED
    found = usual if given is None else tuple(known.get(kind, "") for kind in given)
    if not all(found):
        raise ConfigError(f"config: {key} must be a list of {count} kinds of layers that V4 has", key)
    hashed = m.whole("num_hash_layers", 3, least=0)
    feeds = kinds(m, "mlp_layer_types", {"hash_moe": True, "moe": False}, [i < hashed for i in range(count)])
    layer = Layer(True, True, 1, m.whole("moe_intermediate_size"))
    return tuple(
        layer._replace(sliding=kind == "sliding", mixer=kind, ffn="hashed" if feed else EXPERTS)
        for kind, feed in zip(found, feeds, strict=True)
    )


def _streamed(m: ModelFacts) -> Mapping[str, int]:
    """The axes of `memplan.catalogue.families.deepseek_v4`."""
    d, n, h, groups = m.head_dim, m.whole("hc_mult"), m.hidden_size, m.whole("o_groups")
    turned = m.whole("qk_rope_head_dim", d // 8)
    rates = m.part("compress_rates")
    width, low = m.num_attention_heads * d // groups, m.whole("o_lora_rank")
    return {
        **sized("n_routed_experts")(m),
        "m": m.whole("intermediate_size", m.whole("moe_intermediate_size")),  # the class takes the two for one
        "rot": turned,
        "rot2": turned // 2,
        "n": n,
        "nh": n * h,
        "n2": n * n,
        "nw": (2 + n) * n,
        "ql": m.whole("q_lora_rank"),
        "og": groups,
        "ol": low,
        "ogl": groups * low,
        "gd": width,
        "ih": m.whole("index_n_heads"),
        "id": m.whole("index_head_dim"),
        "rc": int(rates.get("compressed_sparse_attention", 4)),
        "rh": int(rates.get("heavily_compressed_attention", 128)),
    }


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

FAMILIES = {
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
        {"intermediate_size": ("moe_intermediate_size",)},
        layers=_compressed,
        axes=_streamed,
        whole=("weights_proj",),
    ),
    "deepseek_v2": Family(
        {
            **_DEEPSEEK,
            "intermediate_size": 11008,
            "moe_intermediate_size": 1407,
            "n_shared_experts": 2,
            "n_routed_experts": 64,
            "num_experts_per_tok": 6,  # as DeepSeek's own class has it; transformers' has none, and does not run
            "first_k_dense_replace": 0,
            "topk_method": "greedy",
        },
        _NAMES,
        layers=after_first,
        axes=_routed,
    ),
    "deepseek_v3": Family(_V3, _NAMES, layers=after_first, axes=_routed),
    "kimi_k25": Family(
        {**_V3, "tie_word_embeddings": True}, _NAMES, layers=after_first, axes=_beside_a_tower, decoder="text_config"
    ),
    "kimi_k3": Family(
        _KIMI_LINEAR,
        _NAMES,
        layers=_delta_layers,
        axes=_delta_beside_a_tower,
        decoder="text_config",
        acts=_SITU,
        renamed=_KIMI_KEYS,
    ),
    "kimi_linear": Family(_KIMI_LINEAR, _NAMES, layers=_delta_layers, axes=_delta_axes, acts=_SITU, renamed=_KIMI_KEYS),
    "kimi_k2": Family(_V3, _NAMES, layers=after_first, axes=_routed, built_as="deepseek_v3"),
    "deepseek_v32": Family(
        {**_V3, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64},
        _NAMES,
        layers=_listed,
        axes=_indexed,
        whole=("weights_proj",),
    ),
    "glm4_moe_lite": Family(
        {
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
        _NAMES,
        layers=_listed,
        axes=_routed,
    ),
    "glm_moe_dsa": Family(
        {
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
        _NAMES,
        layers=_sparse,
        axes=_indexed,
        whole=("weights_proj",),
    ),
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
        _NAMES,
        axes=latent_axes,
    ),
}
