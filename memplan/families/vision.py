"""Vision-language models: a language model's config, the sizes of the tower beside it, and what images take of a run.

A tower's axes: vh hidden, va heads, vd head dim, vf FFN width, vin numbers of a patch, vm width of merged patches; vL1,
vL2 and so on count its layers. What a run decides: `images` of a sequence, or tiles where they are cut into those;
`tile` patches of one of them, `grid` with what the tower adds; `patches` and `merged` (after patches are merged) of all
images of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from math import ceil, floor, sqrt
from typing import Any, NamedTuple, cast

from memplan.config_classes import MODEL_TYPES
from memplan.errors import ConfigError, SpecError
from memplan.families import Family
from memplan.families.moe import sized, stepped
from memplan.families.ssm import FAMILIES as SSM
from memplan.layers import Layer, as_json, layers_of
from memplan.models import ModelSpec

_VISION = "vision_config"
_MOST = 2**21


def size(m: ModelSpec, key: str, default: int, *others: str) -> int:
    """A size of the tower's config, by the first of its names that is there. Raises ConfigError where it is no size."""
    part = m.part(_VISION)
    name = next((n for n in (key, *others) if part.get(n) is not None), key)
    value: object = part.get(name)
    if value is None:
        return default
    sides: tuple[Any, ...] = cast(tuple[Any, ...], value) if isinstance(value, tuple) else (value,)
    side = sides[0] if len(set(sides)) == 1 else None  # a square one
    if isinstance(side, bool) or not isinstance(side, int) or not 1 <= side <= _MOST:
        said = as_json(cast(Any, value))
        raise ConfigError(f"config: {_VISION}.{name} must be a whole number from 1 to {_MOST:,}, not {said}", name)
    return side


def places(m: ModelSpec, key: str, default: Sequence[int]) -> tuple[int, ...]:
    """A list of layers of the tower. Raises ConfigError where it is none."""
    value: object = m.part(_VISION).get(key)
    if value is None:
        return tuple(default)
    listed = cast(tuple[object, ...], value) if isinstance(value, tuple) else ("",)
    numbers = tuple(n for n in listed if isinstance(n, int) and not isinstance(n, bool) and n >= 0)
    if len(numbers) < len(listed):
        raise ConfigError(f"config: {_VISION}.{key} must be a list of layers, not {as_json(cast(Any, value))}", key)
    return numbers


def _tower(hidden: int, heads: int, ffn: int, patch: tuple[int, int], runs: Sequence[int]) -> dict[str, int]:
    """The axes of a tower; `patch` is how many channels a patch has, over all frames, and its side."""
    if hidden % heads:
        raise ConfigError(f"config: {_VISION}: {heads} heads do not divide {hidden}", _VISION)
    d = hidden // heads
    return {
        "vh": hidden,
        "va": heads,
        "vd": d,
        "vd32": -(-d // 32) * 32 if d <= 128 else -(-d // 64) * 64,
        "vd2": d // 2,
        "vd4": d // 4,
        "vf": ffn,
        "vin": patch[0] * patch[1] ** 2,
        "patch": patch[1],
        **{f"vL{i}": n for i, n in enumerate(runs, 1)},
    }


def _frames(m: ModelSpec, channels: int, patch: int) -> tuple[int, int]:
    """A patch of Qwen's towers, which see two frames of every image."""
    return channels * size(m, "temporal_patch_size", 2), patch


def qwen2_vl(m: ModelSpec) -> dict[str, int]:
    hidden, patch = size(m, "embed_dim", 1280), size(m, "patch_size", 14)
    made = _tower(
        hidden,
        size(m, "num_heads", 16),
        hidden * size(m, "mlp_ratio", 4),
        _frames(m, size(m, "in_channels", 3, "in_chans"), patch),
        (size(m, "depth", 32),),
    )
    return {**made, "vm": hidden * size(m, "spatial_merge_size", 2) ** 2}


def stretches(depth: int, ends: Sequence[int]) -> Iterator[int]:
    """How many layers there are up to each of the places, that one included, and after the last."""
    start = 0
    for end in sorted({e + 1 for e in ends if e < depth} | {depth}):
        yield end - start
        start = end


FULL_ATTENTION = (7, 15, 23, 31)  # Qwen2.5-VL's blocks that see a whole image
DEEPSTACK = (8, 16, 24)  # Qwen3-VL's blocks whose output goes to the language model, too


def windowed_runs(m: ModelSpec) -> tuple[tuple[bool, int], ...]:
    """Qwen2.5-VL's blocks in order: whether they see a whole image, and how many there are of the kind in a row."""
    depth, full = size(m, "depth", 32), set(places(m, "fullatt_block_indexes", FULL_ATTENTION))
    out: list[tuple[bool, int]] = []
    for i in range(depth):
        if out and out[-1][0] == (i in full):
            out[-1] = (i in full, out[-1][1] + 1)
        else:
            out.append((i in full, 1))
    return tuple(out)


def qwen2_5_vl(m: ModelSpec) -> dict[str, int]:
    hidden, patch = size(m, "hidden_size", 3584), size(m, "patch_size", 14)
    made = _tower(
        hidden,
        size(m, "num_heads", 16),
        size(m, "intermediate_size", 3420),
        _frames(m, size(m, "in_channels", 3), patch),
        tuple(n for _, n in windowed_runs(m)),
    )
    return {**made, "vm": hidden * size(m, "spatial_merge_size", 2) ** 2}


def deepstack(m: ModelSpec) -> tuple[int, ...]:
    """The blocks of Qwen3's tower whose output goes to the language model, too. Qwen3.5's has none."""
    depth = size(m, "depth", 27)
    found = () if m.model_type.startswith("qwen3_5") else places(m, "deepstack_visual_indexes", DEEPSTACK)
    return tuple(i for i in found if i < depth)


def qwen3_vl(m: ModelSpec) -> dict[str, int]:
    hidden, patch = size(m, "hidden_size", 1152), size(m, "patch_size", 16)
    made = _tower(
        hidden,
        size(m, "num_heads", 16),
        size(m, "intermediate_size", 4304),
        _frames(m, size(m, "in_channels", 3), patch),
        tuple(stretches(size(m, "depth", 27), deepstack(m))),
    )
    positions = size(m, "num_position_embeddings", 2304)
    return {
        "one": 1,
        "after": max(1, m.num_hidden_layers - len(deepstack(m))),
        **made,
        "vm": hidden * size(m, "spatial_merge_size", 2) ** 2,
        "vpositions": positions,
    }


def qwen3_vl_moe(m: ModelSpec) -> dict[str, int]:
    return {**sized()(m), **qwen3_vl(m)}


def qwen3_5(m: ModelSpec) -> dict[str, int]:
    """The tower's axes beside those of the text model."""
    text = SSM["qwen3_5_text"].axes
    assert text is not None
    return {**text(m), **qwen3_vl(m)}


def gemma3(m: ModelSpec) -> dict[str, int]:
    hidden, patch = size(m, "hidden_size", 768), size(m, "patch_size", 16)
    made = _tower(
        hidden,
        size(m, "num_attention_heads", 12),
        size(m, "intermediate_size", 3072),
        (size(m, "num_channels", 3), patch),
        (size(m, "num_hidden_layers", 12),),
    )
    return {**made, "vpositions": (size(m, "image_size", 224) // patch) ** 2}


def mistral3(m: ModelSpec) -> dict[str, int]:
    hidden, patch = size(m, "hidden_size", 1024), size(m, "patch_size", 16)
    made = _tower(
        hidden,
        size(m, "num_attention_heads", 16),
        size(m, "intermediate_size", 4096),
        (size(m, "num_channels", 3), patch),
        (size(m, "num_hidden_layers", 24),),
    )
    return {**made, "vm": hidden * m.whole("spatial_merge_size", 2) ** 2}


def llama4(m: ModelSpec) -> dict[str, int]:
    """The tower's axes alone; vp and vpo wide are the layers of its adapter, vo what the projector reads."""
    hidden, patch = size(m, "hidden_size", 768), size(m, "patch_size", 14)
    made = _tower(
        hidden,
        size(m, "num_attention_heads", 16),
        size(m, "intermediate_size", 5632),
        (size(m, "num_channels", 3), patch),
        (size(m, "num_hidden_layers", 34),),
    )
    return {
        **made,
        "vpositions": (size(m, "image_size", 448) // patch) ** 2 + 1,
        "vp": size(m, "projector_input_dim", 4096),
        "vpo": size(m, "projector_output_dim", 4096),
        "vo": size(m, "vision_output_dim", 7680),
    }


INTERMEDIATE = (3, 7, 15, 23, 30)  # layers of Llama 3.2's tower whose output the language model sees, too


def intermediate(m: ModelSpec) -> tuple[int, ...]:
    """Those of the tower's first layers whose output goes to the language model beside that of the last."""
    found = places(m, "intermediate_layers_indices", INTERMEDIATE)
    depth = size(m, "num_hidden_layers", 32)
    return tuple(sorted(i for i in set(found) if i < depth))


CROSS = (3, 8, 13, 18, 23, 28, 33, 38)  # Llama 3.2's layers that look at the image


def mllama(m: ModelSpec) -> dict[str, int]:
    hidden, patch = size(m, "hidden_size", 1280), size(m, "patch_size", 14)
    tiles = size(m, "max_num_tiles", 4)
    rows = (size(m, "image_size", 448) // patch) ** 2 + 1
    inner = intermediate(m)
    depth = size(m, "num_hidden_layers", 32)
    ratios: object = m.part(_VISION).get("supported_aspect_ratios")
    made = _tower(
        hidden,
        size(m, "attention_heads", 16),
        size(m, "intermediate_size", 5120),
        (size(m, "num_channels", 3), patch),
        (*stretches(depth, inner), size(m, "num_global_layers", 8)),
    )
    return {
        **made,
        "vinner": len(inner),
        "vo": size(m, "vision_output_dim", 7680),
        "vrows": rows,
        "vtiles": tiles,
        "vratios": (len(cast(tuple[object, ...], ratios)) if isinstance(ratios, tuple) else 8) + 1,
        "v8": m.vocab_size + 8,
    }


def crossed(m: ModelSpec) -> tuple[Layer, ...]:
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


def like(model_type: str, m: ModelSpec) -> tuple[Layer, ...]:
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


def _mistral(m: ModelSpec) -> tuple[Layer, ...]:
    return like(decoder_of(m), m)


def decoder_of(m: ModelSpec) -> str:
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
    ),
    "qwen3_vl": Family(
        {"num_key_value_heads": 32, "intermediate_size": 22016, "head_dim": 128}, axes=qwen3_vl, decoder="text_config"
    ),
}


# What images take


class Picture(NamedTuple):
    """One image as the tower sees it: rows and columns of patches, and how many tokens of the sequence it is.

    `tiles`: it sees so many, each of those rows and columns, and an image is cut into them.
    """

    rows: int
    columns: int
    tokens: int
    tiles: int = 1

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def _qwen(least: int, most: int, m: ModelSpec, height: int, width: int) -> Picture:
    """Sides are rounded to whole merged patches, between `least` and `most` pixels.

    Source: transformers 5.24 models/qwen2_vl/image_processing_qwen2_vl.py smart_resize; the limits are those of the
    preprocessor_config.json published with the models.
    """
    patch, merge = size(m, "patch_size", 14), size(m, "spatial_merge_size", 2)
    factor = patch * merge
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        beta = sqrt(height * width / most)
        h, w = (max(factor, floor(n / beta / factor) * factor) for n in (height, width))
    elif h * w < least:
        beta = sqrt(least / (height * width))
        h, w = (ceil(n * beta / factor) * factor for n in (height, width))
    rows, columns = h // patch, w // patch
    return Picture(rows, columns, rows * columns // merge**2)


def _gemma3(m: ModelSpec, height: int, width: int) -> Picture:
    """Every image is resized to the tower's. Source: transformers 5.24 models/gemma3/image_processing_gemma3.py."""
    side = size(m, "image_size", 224) // size(m, "patch_size", 16)
    return Picture(side, side, m.whole("mm_tokens_per_image", 256))


def _mistral3(m: ModelSpec, height: int, width: int) -> Picture:
    """An image no side of which is longer than the tower's, in whole merged patches, rounded up; after every row of
    them comes a token of its own. Source: transformers 5.24 models/pixtral/image_processing_pixtral.py,
    processing_pixtral.py."""
    longest, patch, merge = size(m, "image_size", 1024), size(m, "patch_size", 16), m.whole("spatial_merge_size", 2)
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = floor(height / ratio), floor(width / ratio)
    rows, columns = ((n - 1) // (patch * merge) + 1 for n in (height, width))
    return Picture(rows * merge, columns * merge, rows * (columns + 1))


_MOST_TILES = 16  # `max_patches` of the image processor, but for the whole image beside them


def _llama4(m: ModelSpec, height: int, width: int) -> Picture:
    """An image is grown as little as it can be, or shrunk if it must be, to a rectangle of tiles; where those are
    several, the whole image is one more. A tile's tokens have a separator after them, and the image three of its own.

    Source: transformers 5.24 models/llama4/image_processing_llama4.py get_best_fit, processing_llama4.py.
    """
    side, patch, merge = size(m, "image_size", 448), size(m, "patch_size", 14), _shuffled(m)
    fits = [
        (min(rows * side / height, tiles // rows * side / width), tiles)
        for tiles in range(1, _MOST_TILES + 1)
        for rows in range(1, tiles + 1)
        if tiles % rows == 0
    ]
    grown = [scale for scale, _ in fits if scale >= 1]
    chosen = min(grown) if grown else max(scale for scale, _ in fits)
    tiles = min(n for scale, n in fits if scale == chosen)
    rows = side // patch
    seen, separators = (tiles + 1, tiles) if tiles > 1 else (1, 0)
    return Picture(rows, rows, seen * (rows // merge) ** 2 + separators + 3, seen)


def _shuffled(m: ModelSpec) -> int:
    """How many patches a side become one of Llama 4's tokens. Raises ConfigError where the tower fits not itself."""
    ratio: object = m.part(_VISION).get("pixel_shuffle_ratio", 0.5)
    merge = round(1 / ratio) if isinstance(ratio, (int, float)) and 0.01 < ratio <= 1 else 0
    if not merge:
        raise ConfigError(
            f"config: {_VISION}.pixel_shuffle_ratio must be a number from 0.01 to 1, not {as_json(cast(Any, ratio))}",
            "pixel_shuffle_ratio",
        )
    axes, rows = llama4(m), size(m, "image_size", 448) // size(m, "patch_size", 14)
    if not rows or rows % merge:
        raise ConfigError(f"config: {_VISION}.image_size: {rows} rows of patches do not merge by {merge}", "image_size")
    wants = {
        "intermediate_size": (axes["vf"], axes["vh"] * merge**2),
        "projector_output_dim": (axes["vpo"], axes["vp"]),
        "vision_output_dim": (axes["vo"], axes["vpo"]),
    }
    for key, (found, fits) in wants.items():
        if found != fits:
            raise ConfigError(f"config: {_VISION}.{key} is {found}, but the layer before it makes {fits}", key)
    return merge


def _mllama(m: ModelSpec, height: int, width: int) -> Picture:
    """Every image takes as many tiles as there may be, whatever its size: those it does not fill are zeros. In the
    sequence one token stands for it, and every token after that sees all of it.

    Source: transformers 5.24 models/mllama/image_processing_mllama.py pad_batches_and_tiles.
    """
    side = size(m, "image_size", 448) // size(m, "patch_size", 14)
    return Picture(side * size(m, "max_num_tiles", 4), side, 1)


PICTURES: dict[str, Callable[[ModelSpec, int, int], Picture]] = {
    "gemma3": _gemma3,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "mllama": _mllama,
    "qwen2_vl": partial(_qwen, 56 * 56, 12_845_056),
    "qwen2_5_vl": partial(_qwen, 56 * 56, 12_845_056),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe"), partial(_qwen, 65_536, 16_777_216)),
    "qwen3_vl": partial(_qwen, 65_536, 16_777_216),
    "qwen3_vl_moe": partial(_qwen, 65_536, 16_777_216),
}
# Families whose images are one sequence, which is split for sdpa alone.
PACKS = ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
FIXED = ("gemma3", "mllama")  # families whose images are all of one size to the tower


ELSEWHERE = ("kimi_k25", "kimi_k3", "llama4")  # families with a tower whose decoder another module knows


def is_vision(model_type: str) -> bool:
    """Whether the model has a tower."""
    return model_type in FAMILIES or model_type in ELSEWHERE


def sees(model_type: str) -> bool:
    """Whether the model has a tower, and what that takes for images is counted."""
    return model_type in PICTURES


def picture_of(m: ModelSpec, pixels: int | tuple[int, int] | None) -> Picture:
    """An image of so many pixels, a side or height and width, as the model's processor hands it on.

    Raises SpecError where that depends on the size and none is given.
    """
    if pixels is None and m.model_type not in FIXED:
        raise SpecError(
            f"batch.image_size: {m.name or m.model_type} has as many tokens for an image as its size makes; say how "
            "many pixels a side has, or height and width",
            "batch.image_size",
        )
    height, width = pixels if isinstance(pixels, tuple) else (pixels or 1, pixels or 1)
    return PICTURES[m.model_type](m, height, width)


def axes_of(m: ModelSpec, images: int, picture: Picture) -> Mapping[str, int]:
    """The axes that the images of a run decide: those of a sequence, of one image, and of one window of it."""
    if m.model_type == "mllama":
        return _tiled(m, images, picture)
    merge = size(m, "spatial_merge_size", 2)
    if m.model_type == "mistral3":
        merge = m.whole("spatial_merge_size", 2)
    if m.model_type == "gemma3":
        merge = (
            size(m, "image_size", 224) // size(m, "patch_size", 16) // round(sqrt(m.whole("mm_tokens_per_image", 256)))
        )
    own = 0
    if m.model_type == "llama4":
        merge, own, images = _shuffled(m), 1, images * picture.tiles
    grid = picture.patches + own
    rows, columns = picture.rows // merge, picture.columns // merge
    side = max(1, size(m, "window_size", 112) // merge // size(m, "patch_size", 14))
    window = min(side, rows) * min(side, columns) * merge**2
    return {
        "images": images,
        "patches": images * picture.patches,
        "merged": images * rows * columns,
        "tile": picture.patches,
        "grid": grid,
        "grid32": -(-grid // 32) * 32,
        "grid128": -(-grid // 128) * 128,
        "windows": images * -(-rows // side) * -(-columns // side),
        "window": window,
        "window32": -(-window // 32) * 32,
        "window128": -(-window // 128) * 128,
    }


def _tiled(m: ModelSpec, images: int, picture: Picture) -> Mapping[str, int]:
    """Llama 3.2's: `grid` rows of an image, those of its tiles, each with a row of its own and padded to whole eights;
    `seen` by the language model of all images, not padded."""
    tiles = size(m, "max_num_tiles", 4)
    rows = picture.patches // tiles + 1
    grid, seen = tiles * -(-rows // 8) * 8, images * tiles * rows
    return {
        "images": images,
        "patches": images * picture.patches,
        "merged": images,
        "grid": grid,
        "grid32": -(-grid // 32) * 32,
        "window": grid,
        "seen": seen,
        "seen8": -(-seen // 8) * 8,
    }
