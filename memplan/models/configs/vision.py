"""Vision-language models: a language model's config, and the sizes of the tower beside it.

A tower's axes: vh hidden, va heads, vd head dim, vf FFN width, vin numbers of a patch, vm width of merged patches; vL1,
vL2 and so on count its layers. What images take of a run is in `memplan.models.configs.images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, cast

from memplan.core.errors import ConfigError
from memplan.models.configs.dense import MODEL_TYPES
from memplan.models.configs.moe import sized, stepped
from memplan.models.configs.ssm import FAMILIES as SSM
from memplan.models.facts import Family, ModelFacts
from memplan.models.layers import MOST_LAYERS, Layer, as_json, layers_of

_VISION = "vision_config"
_MOST = 2**21
_COUNTS_LAYERS = ("depth", "num_hidden_layers", "num_global_layers")

_QWEN3 = {
    "depth": 27,
    "hidden_size": 1152,
    "num_heads": 16,
    "intermediate_size": 4304,
    "in_channels": 3,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
}
# What the classes of `vision_config` fill in. Source: transformers 5.24 configuration classes.
_DEFAULTS: dict[str, Mapping[str, int | tuple[int, ...]]] = {
    "gemma3": {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_channels": 3,
        "patch_size": 16,
        "image_size": 224,
    },
    "llama4": {
        "hidden_size": 768,
        "num_attention_heads": 16,
        "intermediate_size": 5632,
        "num_hidden_layers": 34,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 448,
        "projector_input_dim": 4096,
        "projector_output_dim": 4096,
        "vision_output_dim": 7680,
    },
    "mistral3": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_channels": 3,
        "patch_size": 16,
        "image_size": 1024,
    },
    "mllama": {
        "hidden_size": 1280,
        "attention_heads": 16,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_global_layers": 8,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 448,
        "max_num_tiles": 4,
        "vision_output_dim": 7680,
        "intermediate_layers_indices": (3, 7, 15, 23, 30),
    },
    "qwen2_vl": {
        "depth": 32,
        "embed_dim": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
    "qwen2_5_vl": {
        "depth": 32,
        "hidden_size": 3584,
        "num_heads": 16,
        "intermediate_size": 3420,
        "in_channels": 3,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
    **{key: {**_QWEN3, "deepstack_visual_indexes": ()} for key in ("qwen3_5", "qwen3_5_moe")},
    **{key: {**_QWEN3, "deepstack_visual_indexes": (8, 16, 24)} for key in ("qwen3_vl", "qwen3_vl_moe")},
}


def size(m: ModelFacts, key: str, default: int = 0, *others: str) -> int:
    """A size of the tower's config, by the first of its names that is there; else the default, or that of its class.

    Raises ConfigError where it is no size.
    """
    part = m.part(_VISION)
    name = next((n for n in (key, *others) if part.get(n) is not None), key)
    value: object = part.get(name)
    if value is None:
        return default or cast(int, _DEFAULTS[m.model_type][key])
    sides: tuple[Any, ...] = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
    side = sides[0] if len(set(sides)) == 1 else None  # a square one
    most = MOST_LAYERS if key in _COUNTS_LAYERS else _MOST
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= most:
        said = as_json(cast(Any, value))
        raise ConfigError(f"config: {_VISION}.{name} must be a whole number from 1 to {most:,}, not {said}", name)
    return side


def places(m: ModelFacts, key: str) -> tuple[int, ...]:
    """A list of layers of the tower. Raises ConfigError where it is none."""
    value: object = m.part(_VISION).get(key)
    if value is None:
        return cast(tuple[int, ...], _DEFAULTS[m.model_type][key])
    listed = cast(tuple[object, ...], value) if isinstance(value, tuple) else ("",)
    numbers = tuple(n for n in listed if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
    if len(numbers) < len(listed):
        raise ConfigError(f"config: {_VISION}.{key} must be a list of layers, not {as_json(cast(Any, value))}", key)
    return numbers


def _tower(
    m: ModelFacts,
    runs: Sequence[int],
    colours: int,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    ratio: str = "",
) -> dict[str, int]:
    """The axes of a tower whose layers are `runs` of equal ones and whose patches have so many `colours`, over all
    frames; its config says the FFN's width, or how many times the hidden size that is (`ratio`)."""
    h, a, side = size(m, hidden), size(m, heads), size(m, "patch_size")
    if h % a:
        raise ConfigError(f"config: {_VISION}: {a} heads do not divide {h}", _VISION)
    d = h // a
    return {
        "vh": h,
        "va": a,
        "vd": d,
        "vd32": -(-d // 32) * 32 if d <= 128 else -(-d // 64) * 64,
        "vd2": d // 2,
        "vd4": d // 4,
        "vf": h * size(m, ratio) if ratio else size(m, "intermediate_size"),
        "vin": colours * side**2,
        "patch": side,
        **{f"vL{i}": n for i, n in enumerate(runs, 1)},
    }


def _qwen(m: ModelFacts, runs: Sequence[int], hidden: str = "hidden_size", ratio: str = "") -> dict[str, int]:
    """A tower of Qwen's, which sees two frames of every image and merges patches of a square."""
    colours = size(m, "in_channels") * size(m, "temporal_patch_size")
    made = _tower(m, runs, colours, hidden, "num_heads", ratio)
    return {**made, "vm": made["vh"] * size(m, "spatial_merge_size") ** 2}


def qwen2_vl(m: ModelFacts) -> dict[str, int]:
    return _qwen(m, (size(m, "depth"),), "embed_dim", "mlp_ratio")


def stretches(depth: int, ends: Sequence[int]) -> Iterator[int]:
    """How many layers there are up to each of the places, that one included, and after the last."""
    start = 0
    for end in sorted({e + 1 for e in ends if e < depth} | {depth}):
        yield end - start
        start = end


def windowed_runs(m: ModelFacts) -> tuple[tuple[bool, int], ...]:
    """Qwen2.5-VL's blocks in order: whether they see a whole image, and how many there are of the kind in a row."""
    full = set(places(m, "fullatt_block_indexes"))
    kinds = groupby(i in full for i in range(size(m, "depth")))
    return tuple((whole, len(tuple(blocks))) for whole, blocks in kinds)


def qwen2_5_vl(m: ModelFacts) -> dict[str, int]:
    return _qwen(m, tuple(n for _, n in windowed_runs(m)))


def deepstack(m: ModelFacts) -> tuple[int, ...]:
    """The blocks of Qwen3's tower whose output goes to the language model, too. Qwen3.5's has none.

    Raises ConfigError for a list that names a block twice.
    """
    key = "deepstack_visual_indexes"
    found = () if m.model_type.startswith("qwen3_5") else places(m, key)
    if len(set(found)) < len(found):
        raise ConfigError(f"config: {_VISION}.{key} names a layer twice: {as_json(cast(Any, found))}", key)
    return tuple(i for i in found if i < size(m, "depth"))


def qwen3_vl(m: ModelFacts) -> dict[str, int]:
    deep = deepstack(m)
    return {
        "one": 1,
        "after": max(1, m.num_hidden_layers - len(deep)),
        **_qwen(m, tuple(stretches(size(m, "depth"), deep))),
        "vpositions": size(m, "num_position_embeddings"),
    }


def qwen3_vl_moe(m: ModelFacts) -> dict[str, int]:
    return {**sized()(m), **qwen3_vl(m)}


def qwen3_5(m: ModelFacts) -> dict[str, int]:
    """The tower's axes beside those of the text model."""
    text = SSM["qwen3_5_text"].axes
    assert text is not None
    return {**text(m), **qwen3_vl(m)}


def gemma3(m: ModelFacts) -> dict[str, int]:
    made = _tower(m, (size(m, "num_hidden_layers"),), size(m, "num_channels"))
    return {**made, "vpositions": rows(m) ** 2}


def mistral3(m: ModelFacts) -> dict[str, int]:
    made = _tower(m, (size(m, "num_hidden_layers"),), size(m, "num_channels"))
    return {**made, "vm": made["vh"] * m.whole("spatial_merge_size", 2) ** 2}


def rows(m: ModelFacts) -> int:
    """How many rows of patches an image has where all are of the tower's size, and how many columns."""
    return size(m, "image_size") // size(m, "patch_size")


def llama4(m: ModelFacts) -> dict[str, int]:
    """The tower's axes alone; vp and vpo wide are the layers of its adapter, vo what the projector reads."""
    return {
        **_tower(m, (size(m, "num_hidden_layers"),), size(m, "num_channels")),
        "vpositions": rows(m) ** 2 + 1,
        "vp": size(m, "projector_input_dim"),
        "vpo": size(m, "projector_output_dim"),
        "vo": size(m, "vision_output_dim"),
    }


def intermediate(m: ModelFacts) -> tuple[int, ...]:
    """The layers of Llama 3.2's tower whose output goes to the language model, beside that of the last."""
    found = places(m, "intermediate_layers_indices")
    return tuple(sorted(i for i in set(found) if i < size(m, "num_hidden_layers")))


CROSS = (3, 8, 13, 18, 23, 28, 33, 38)  # Llama 3.2's layers that look at the image


def mllama(m: ModelFacts) -> dict[str, int]:
    inner = intermediate(m)
    ratios: object = m.part(_VISION).get("supported_aspect_ratios")
    runs = (*stretches(size(m, "num_hidden_layers"), inner), size(m, "num_global_layers"))
    return {
        **_tower(m, runs, size(m, "num_channels"), heads="attention_heads"),
        "vinner": len(inner),
        "vo": size(m, "vision_output_dim"),
        "vrows": rows(m) ** 2 + 1,
        "vtiles": size(m, "max_num_tiles"),
        "vratios": (len(cast(tuple[object, ...], ratios)) if isinstance(ratios, tuple) else 8) + 1,
        "v8": m.vocab_size + 8,
    }


def crossed(m: ModelFacts) -> tuple[Layer, ...]:
    """Llama 3.2's layers: some have attention to the image in place of attention among tokens."""
    listed: object = m.config.get("cross_attention_layers")
    if listed is not None and not isinstance(listed, tuple):
        raise ConfigError(
            f"config: cross_attention_layers must be a list of layers, not {as_json(listed)}", "cross_attention_layers"
        )
    cross = set(CROSS if listed is None else cast(tuple[object, ...], listed))
    k, f = m.num_key_value_heads, m.intermediate_size
    return tuple(
        Layer(False, True, k, f, mixer="cross_attention" if i in cross else "attention")
        for i in range(m.num_hidden_layers)
    )


def like(model_type: str, m: ModelFacts) -> tuple[Layer, ...]:
    """The layers of a decoder that has a model_type of its own without the tower."""
    return layers_of(
        model_type,
        m.config,
        m.num_hidden_layers,
        m.sliding_window,
        m.num_attention_heads,
        m.num_key_value_heads,
        m.intermediate_size,
        m.hidden_size,
    )


def _mistral(m: ModelFacts) -> tuple[Layer, ...]:
    return like(decoder_of(m), m)


def decoder_of(m: ModelFacts) -> str:
    """The model_type of Mistral 3's decoder."""
    return str(m.part("text_config").get("model_type", "mistral"))


_QWEN2_VL: dict[str, Any] = {
    "num_key_value_heads": 8,
    "intermediate_size": 29568,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 80,
}

# Source: transformers 5.24 configuration classes.
FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        MODEL_TYPES["gemma3_text"],
        {"hidden_act": ("hidden_activation",)},
        layers=partial(like, "gemma3_text"),
        axes=gemma3,
        decoder="text_config",
    ),
    "mistral3": Family(
        {**MODEL_TYPES["mistral"], "tie_word_embeddings": True}, layers=_mistral, axes=mistral3, decoder="text_config"
    ),
    "mllama": Family(
        {"num_key_value_heads": 8, "intermediate_size": 14336}, layers=crossed, axes=mllama, decoder="text_config"
    ),
    "qwen2_vl": Family(_QWEN2_VL, layers=partial(like, "qwen2"), axes=qwen2_vl, decoder="text_config"),
    "qwen2_5_vl": Family(_QWEN2_VL, layers=partial(like, "qwen2"), axes=qwen2_5_vl, decoder="text_config"),
    "qwen3_5": SSM["qwen3_5_text"]._replace(axes=qwen3_5, decoder="text_config"),
    "qwen3_5_moe": SSM["qwen3_5_moe_text"]._replace(axes=qwen3_5, decoder="text_config"),
    "qwen3_vl_moe": Family(
        {
            "num_key_value_heads": 16,
            "intermediate_size": 5632,
            "moe_intermediate_size": 1408,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "tie_word_embeddings": False,
        },
        layers=stepped,
        axes=qwen3_vl_moe,
        decoder="text_config",
        renamed={"num_local_experts": "num_experts"},
    ),
    "qwen3_vl": Family(
        {"num_key_value_heads": 32, "intermediate_size": 22016, "head_dim": 128}, axes=qwen3_vl, decoder="text_config"
    ),
}


ELSEWHERE = ("kimi_k25", "kimi_k3", "llama4")  # families with a tower whose decoder another module knows


def is_vision(model_type: str) -> bool:
    """Whether the model has a tower."""
    return model_type in FAMILIES or model_type in ELSEWHERE
