"""The sizes of vision towers.

A tower's axes:

    vh            hidden size
    va            heads
    vd            head dim
    vf            FFN width
    vin           elements of a patch
    vm            width of merged patches
    vL1, vL2, ... layers of each run

The axes set by a run's images are in `memplan.models.configs.images`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from math import isqrt
from typing import Any, NoReturn, cast

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.facts import ModelFacts, flash_width
from memplan.models.family_facts import EMPTY
from memplan.models.layers import MOST_LAYERS, as_json

_VISION = "vision_config"
_LIMIT = 2**21
_COUNTS_LAYERS = ("depth", "num_hidden_layers", "num_global_layers")


def _defaults(m: ModelFacts) -> Mapping[str, int | tuple[int, ...]]:
    return m.family.images.defaults if m.family.images is not None else EMPTY


def size(m: ModelFacts, key: str, default: int = 0, *others: str) -> int:
    """Return a size of the tower's config, by the first of its names that is set; else `default`, or the class's.

    Raises ConfigError if it is not a size.
    """
    part = m.part(_VISION)
    name = next((n for n in (key, *others) if part.get(n) is not None), key)
    value: object = part.get(name)
    if value is None:
        return default or cast(int, _defaults(m)[key])
    sides: tuple[Any, ...] = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
    side = sides[0] if len(set(sides)) == 1 else None  # a pair must be a square
    most = MOST_LAYERS if key in _COUNTS_LAYERS else _LIMIT
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= most:
        shown = as_json(cast(Any, value))
        raise ConfigError(f"config: {_VISION}.{name} must be a whole number from 1 to {most:,}, not {shown}", name)
    return side


def places(m: ModelFacts, key: str) -> tuple[int, ...]:
    """Return a list of layer indices of the tower's config. Raises ConfigError if it is not one."""
    value: object = m.part(_VISION).get(key)
    if value is None:
        return cast(tuple[int, ...], _defaults(m)[key])
    listed = cast(tuple[object, ...], value) if isinstance(value, tuple) else ("",)
    numbers = tuple(n for n in listed if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
    if len(numbers) < len(listed):
        raise ConfigError(f"config: {_VISION}.{key} must be a list of layers, not {as_json(cast(Any, value))}", key)
    return numbers


def _tower(
    m: ModelFacts,
    runs: Sequence[int],
    channels: int,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    ratio: str = "",
) -> dict[str, int]:
    """Return the axes of a tower.

    runs      number of layers of each run
    channels  channels of a patch, over all frames
    hidden    config key of the hidden size
    heads     config key of the number of heads
    ratio     config key of the FFN width as a multiple of the hidden size, if the config has no width
    """
    h, a, side = size(m, hidden), size(m, heads), size(m, "patch_size")
    if h % a:
        raise ConfigError(f"config: {_VISION}: {a} heads do not divide {h}", _VISION)
    d = h // a
    return {
        "vh": h,
        "va": a,
        "vd": d,
        "vd32": flash_width(d),
        "vd2": d // 2,
        "vd4": d // 4,
        "vf": h * size(m, ratio) if ratio else size(m, "intermediate_size"),
        "vin": channels * side**2,
        "patch": side,
        **{f"vL{i}": n for i, n in enumerate(runs, 1)},
    }


def _qwen(m: ModelFacts, runs: Sequence[int], hidden: str = "hidden_size", ratio: str = "") -> dict[str, int]:
    """Return the axes of Qwen's tower, which sees every image as two frames and merges squares of patches."""
    channels = size(m, "in_channels") * size(m, "temporal_patch_size")
    axes = _tower(m, runs, channels, hidden, "num_heads", ratio)
    return {**axes, "vm": axes["vh"] * size(m, "spatial_merge_size") ** 2}


def qwen2_vl(m: ModelFacts) -> dict[str, int]:
    return _qwen(m, (size(m, "depth"),), "embed_dim", "mlp_ratio")


def glm_ocr(m: ModelFacts) -> dict[str, int]:
    """Return the axes of GLM-OCR's tower; `vcontext` is the width of the MLP at its end.

    Raises ConfigError if the tower's output is not as wide as the text model.
    """
    out, h = size(m, "out_hidden_size"), m.hidden_size
    if out != h:
        raise ConfigError(f"config: {_VISION}.out_hidden_size {out} must be the text's hidden_size {h}", _VISION)
    return {**_qwen(m, (size(m, "depth"),)), "vcontext": h * size(m, "in_channels")}


def glm4v(m: ModelFacts) -> dict[str, int]:
    """Return the axes of GLM-4.1V's tower. Its blocks' MLPs are as wide as its output, and the last as wide as theirs
    in the config."""
    axes = glm_ocr(m)
    return {**axes, "vf": m.hidden_size, "vcontext": axes["vf"], "vpositions": rows(m) ** 2}


def glm46v(m: ModelFacts) -> dict[str, int]:
    """Return the axes of GLM-4.6V's tower. Raises UnsupportedModelError for another text model than GLM-4.1V's."""
    text = m.part("text_config").get("model_type", "glm4v_text")
    if text != "glm4v_text":
        why = f"{as_json(text)} is not supported yet for glm46v; supported: glm4v_text"
        raise UnsupportedModelError(f"text_config.model_type: {why}", "text_config")
    return glm4v(m)


def run_lengths(depth: int, ends: Sequence[int]) -> Iterator[int]:
    """Yield the number of layers up to and including each of `ends`, and after the last."""
    start = 0
    for end in sorted({e + 1 for e in ends if e < depth} | {depth}):
        yield end - start
        start = end


def windowed_runs(m: ModelFacts) -> tuple[tuple[bool, int], ...]:
    """Return Qwen2.5-VL's runs of blocks: whether they attend to the whole image, and how many they are."""
    full = set(places(m, "fullatt_block_indexes"))
    kinds = groupby(i in full for i in range(size(m, "depth")))
    return tuple((is_full, len(tuple(blocks))) for is_full, blocks in kinds)


def qwen2_5_vl(m: ModelFacts) -> dict[str, int]:
    return _qwen(m, tuple(n for _, n in windowed_runs(m)))


def deepstack(m: ModelFacts) -> tuple[int, ...]:
    """Return the blocks of Qwen3-VL's tower whose output is also added to the language model; Qwen3.5 has none.

    Raises ConfigError for a list that names a block twice.
    """
    key = "deepstack_visual_indexes"
    indices = places(m, key) if _defaults(m)[key] else ()
    if len(set(indices)) < len(indices):
        raise ConfigError(f"config: {_VISION}.{key} names a layer twice: {as_json(cast(Any, indices))}", key)
    return tuple(i for i in indices if i < size(m, "depth"))


def qwen3_vl(m: ModelFacts) -> dict[str, int]:
    deep = deepstack(m)
    return {
        "one": 1,
        "after": max(1, m.num_hidden_layers - len(deep)),
        **_qwen(m, tuple(run_lengths(size(m, "depth"), deep))),
        "vpositions": size(m, "num_position_embeddings"),
    }


def gemma3(m: ModelFacts) -> dict[str, int]:
    return _patched(m, size(m, "num_hidden_layers"))


def _patched(m: ModelFacts, *runs: int, added: int = 0) -> dict[str, int]:
    """Return the axes of a tower with a table of positions: one for each patch, and `added` ones."""
    return {**_tower(m, runs, size(m, "num_channels")), "vpositions": rows(m) ** 2 + added}


def llava(m: ModelFacts) -> dict[str, int]:
    """Return the axes of LLaVA's tower, CLIP's. Its features are the input of the last `vL2` layers."""
    depth, unread = size(m, "num_hidden_layers"), unread_layers(m)
    return _patched(m, depth - unread, *((unread,) if unread else ()), added=1)


def unread_layers(m: ModelFacts) -> int:
    """Return the number of LLaVA's last layers whose output nothing reads. Raises ConfigError for several outputs."""
    chosen: object = m.config.get("vision_feature_layer", -2)
    depth = size(m, "num_hidden_layers")
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not -depth <= chosen < depth or not chosen:
        raise ConfigError(
            f"config: vision_feature_layer must be one layer from {-depth} to {depth}, not 0, not {as_json(chosen)}",
            "vision_feature_layer",
        )
    return -1 - chosen if chosen < 0 else depth - chosen


def internvl(m: ModelFacts) -> dict[str, int]:
    """Return the axes of InternVL's tower; `vm` is the width of merged patches."""
    axes = _patched(m, size(m, "num_hidden_layers"), added=1)
    return {**axes, "vm": axes["vh"] * merged_patches(m) ** 2}


def merged_patches(m: ModelFacts) -> int:
    """Return the patches per side that InternVL merges. Raises ConfigError if they do not divide an image's."""
    ratio: object = m.config.get("downsample_ratio", 0.5)
    merge = round(1 / ratio) if isinstance(ratio, (int, float)) and 0.01 < ratio <= 1 else 0
    if not merge or rows(m) % merge:
        raise ConfigError(
            f"config: downsample_ratio must divide {rows(m)} patches of a side, not {as_json(ratio)}",
            "downsample_ratio",
        )
    return merge


def smolvlm(m: ModelFacts) -> dict[str, int]:
    axes = _patched(m, size(m, "num_hidden_layers"))
    return {**axes, "vm": axes["vh"] * m.config_int("scale_factor", 2) ** 2}


def aya_vision(m: ModelFacts) -> dict[str, int]:
    """Return the axes of Aya Vision's tower; `valigned` is the width of its projector."""
    width = m.config_int("alignment_intermediate_size", m.hidden_size)
    return _aligned(m, rows(m) ** 2, width)


def cohere2_vision(m: ModelFacts) -> dict[str, int]:
    return _aligned(m, rows(m) ** 2, m.config_int("alignment_intermediate_size", 36864))


def lfm2_vl(m: ModelFacts) -> dict[str, int]:
    positions = size(m, "num_patches")
    return {**_aligned(m, positions, m.config_int("projector_hidden_size", 2560)), "vside": isqrt(positions)}


def _aligned(m: ModelFacts, positions: int, width: int) -> dict[str, int]:
    """Return the axes of SigLIP's tower with a projector of merged patches that is `width` wide inside."""
    axes = _tower(m, (size(m, "num_hidden_layers"),), size(m, "num_channels"))
    merged = axes["vh"] * m.config_int("downsample_factor", 2) ** 2
    return {**axes, "vpositions": positions, "vm": merged, "valigned": width, "valigned2": max(1, width // 2)}


def mistral3(m: ModelFacts) -> dict[str, int]:
    axes = _tower(m, (size(m, "num_hidden_layers"),), size(m, "num_channels"))
    return {**axes, "vm": axes["vh"] * m.config_int("spatial_merge_size", 2) ** 2}


def rows(m: ModelFacts) -> int:
    """Return the rows, and columns, of patches of an image of the tower's size. Raises ConfigError if it has none."""
    return size(m, "image_size") // size(m, "patch_size") or without_patches()


def without_patches() -> NoReturn:
    """Raise ConfigError: an image is smaller than a patch."""
    raise ConfigError(f"config: {_VISION}.image_size: an image has no patch of {_VISION}.patch_size", "image_size")


def llama4(m: ModelFacts) -> dict[str, int]:
    """Return the tower's axes; `vp` and `vpo` are the widths of its adapter's layers, `vo` that of its output."""
    return {
        **_tower(m, (size(m, "num_hidden_layers"),), size(m, "num_channels")),
        "vpositions": rows(m) ** 2 + 1,
        "vp": size(m, "projector_input_dim"),
        "vpo": size(m, "projector_output_dim"),
        "vo": size(m, "vision_output_dim"),
    }


def intermediate(m: ModelFacts) -> tuple[int, ...]:
    """Return the layers of Llama 3.2's tower whose output goes to the language model, besides that of the last."""
    indices = places(m, "intermediate_layers_indices")
    return tuple(sorted(i for i in set(indices) if i < size(m, "num_hidden_layers")))


def mllama(m: ModelFacts) -> dict[str, int]:
    inner = intermediate(m)
    ratios: object = m.part(_VISION).get("supported_aspect_ratios")
    runs = (*run_lengths(size(m, "num_hidden_layers"), inner), size(m, "num_global_layers"))
    return {
        **_tower(m, runs, size(m, "num_channels"), heads="attention_heads"),
        "vinner": len(inner),
        "vo": size(m, "vision_output_dim"),
        "vrows": rows(m) ** 2 + 1,
        "vtiles": size(m, "max_num_tiles"),
        "vratios": (len(cast(tuple[object, ...], ratios)) if isinstance(ratios, tuple) else 8) + 1,
        "v8": m.vocab_size + 8,
    }
