"""What images take of a run of a vision-language model: patches of its tower, and tokens of the sequence.

What a run decides: `images` of a sequence, or tiles where they are cut into those; `tile` patches of one of them,
`grid` with what the tower adds; `patches` and `merged` (after patches are merged) of all images of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import ceil, floor, sqrt
from typing import Any, NamedTuple, cast

from memplan.core.errors import ConfigError, SpecError
from memplan.models.configs.vision import llama4, rows, size
from memplan.models.facts import ModelFacts
from memplan.models.layers import as_json

_VISION = "vision_config"


class Picture(NamedTuple):
    """One image as the tower sees it: rows and columns of patches, and how many tokens of the sequence it is.

    `merge` patches a side become one token. `tiles`: it sees so many, each of those rows and columns, and an image is
    cut into them; `own` rows it adds to each.
    """

    rows: int
    columns: int
    tokens: int
    merge: int = 1
    tiles: int = 1
    own: int = 0

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def _qwen(least: int, most: int, m: ModelFacts, height: int, width: int) -> Picture:
    """Sides are rounded to whole merged patches, between `least` and `most` pixels.

    Source: transformers 5.24 models/qwen2_vl/image_processing_qwen2_vl.py smart_resize. Raises SpecError for a side
    that is more than 200 times the other.
    """
    if max(height, width) > _LONGEST * min(height, width):
        raise SpecError(
            f"batch.image_size: {m.name or m.model_type} takes no image with a side more than {_LONGEST} times the "
            f"other; {height} x {width} has one",
            "batch.image_size",
        )
    patch, merge = size(m, "patch_size"), size(m, "spatial_merge_size")
    factor = patch * merge
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > most:
        beta = sqrt(height * width / most)
        h, w = (max(factor, floor(n / beta / factor) * factor) for n in (height, width))
    elif h * w < least:
        beta = sqrt(least / (height * width))
        h, w = (ceil(n * beta / factor) * factor for n in (height, width))
    return Picture(h // patch, w // patch, h * w // factor**2, merge)


def _gemma3(m: ModelFacts, height: int, width: int) -> Picture:
    """Every image is resized to the tower's, whose patches are averaged to `mm_tokens_per_image` tokens.

    Source: transformers 5.24 models/gemma3/image_processing_gemma3.py, modeling_gemma3.py Gemma3MultiModalProjector.
    Raises ConfigError where there are fewer patches than tokens.
    """
    side, tokens = rows(m), m.whole("mm_tokens_per_image", 256)
    merge = side // round(sqrt(tokens))
    if not merge:
        raise ConfigError(
            f"config: {_VISION}.image_size: {side} x {side} patches cannot be averaged to mm_tokens_per_image {tokens}",
            "image_size",
        )
    return Picture(side, side, tokens, merge)


def _mistral3(m: ModelFacts, height: int, width: int) -> Picture:
    """An image no side of which is longer than the tower's, in whole merged patches, rounded up; after every row of
    them comes a token of its own. Source: transformers 5.24 models/pixtral/image_processing_pixtral.py,
    processing_pixtral.py."""
    longest, patch, merge = size(m, "image_size"), size(m, "patch_size"), m.whole("spatial_merge_size", 2)
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = floor(height / ratio), floor(width / ratio)
    high, wide = ((n - 1) // (patch * merge) + 1 for n in (height, width))
    return Picture(high * merge, wide * merge, high * (wide + 1), merge)


# Source: `max_patches` of transformers 5.24 Llama4ImageProcessor and of the preprocessor_config.json of Llama 4.
_MOST_TILES = 16  # but for the whole image beside them


def _llama4(m: ModelFacts, height: int, width: int) -> Picture:
    """An image is grown as little as it can be, or shrunk if it must be, to a rectangle of tiles; where those are
    several, the whole image is one more. A tile's tokens have a separator after them, and the image three of its own.

    Source: transformers 5.24 models/llama4/image_processing_llama4.py get_best_fit, processing_llama4.py.
    """
    side, merge, high = size(m, "image_size"), _shuffled(m), rows(m)
    fits = [
        (min(down * side / height, tiles // down * side / width), tiles)
        for tiles in range(1, _MOST_TILES + 1)
        for down in range(1, tiles + 1)
        if tiles % down == 0
    ]
    grown = [scale for scale, _ in fits if scale >= 1]
    chosen = min(grown) if grown else max(scale for scale, _ in fits)
    tiles = min(n for scale, n in fits if scale == chosen)
    seen, separators = (tiles + 1, tiles) if tiles > 1 else (1, 0)
    return Picture(high, high, seen * (high // merge) ** 2 + separators + 3, merge, seen, own=1)


def _shuffled(m: ModelFacts) -> int:
    """How many patches a side become one of Llama 4's tokens. Raises ConfigError where the tower fits not itself."""
    ratio: object = m.part(_VISION).get("pixel_shuffle_ratio", 0.5)
    merge = round(1 / ratio) if isinstance(ratio, (int, float)) and 0.01 < ratio <= 1 else 0
    if not merge:
        raise ConfigError(
            f"config: {_VISION}.pixel_shuffle_ratio must be a number from 0.01 to 1, not {as_json(cast(Any, ratio))}",
            "pixel_shuffle_ratio",
        )
    axes, high = llama4(m), rows(m)
    if not high or high % merge:
        raise ConfigError(f"config: {_VISION}.image_size: {high} rows of patches do not merge by {merge}", "image_size")
    wants = {
        "intermediate_size": (axes["vf"], axes["vh"] * merge**2),
        "projector_output_dim": (axes["vpo"], axes["vp"]),
        "vision_output_dim": (axes["vo"], axes["vpo"]),
    }
    for key, (found, fits) in wants.items():
        if found != fits:
            raise ConfigError(f"config: {_VISION}.{key} is {found}, but the layer before it makes {fits}", key)
    return merge


def _mllama(m: ModelFacts, height: int, width: int) -> Picture:
    """Every image takes as many tiles as there may be, whatever its size: those it does not fill are zeros. In the
    sequence one token stands for it, and every token after that sees all of it.

    Source: transformers 5.24 models/mllama/image_processing_mllama.py pad_batches_and_tiles.
    """
    return Picture(rows(m) * size(m, "max_num_tiles"), rows(m), 1)


# The fewest pixels of an image, and the most. Source: preprocessor_config.json as published with Qwen2-VL 2B to 72B and
# Qwen2.5-VL 3B to 72B; with Qwen3-VL, Qwen3.5 and Qwen3.6. (Where that file is missing, transformers 5.24's
# Qwen2VLImageProcessor takes 56 x 56 to 28 x 28 x 1280 of any.)
_QWEN2 = partial(_qwen, 56 * 56, 3584 * 3584)
_QWEN3 = partial(_qwen, 256 * 256, 4096 * 4096)
_LONGEST = 200  # times the short side. Source: `smart_resize`

PICTURES: dict[str, Callable[[ModelFacts, int, int], Picture]] = {
    "gemma3": _gemma3,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "mllama": _mllama,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"), _QWEN3),
}
# Families whose images are one sequence, which is split for sdpa alone.
PACKS = ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
FIXED = ("gemma3", "mllama")  # families whose images are all of one size to the tower


def sees(model_type: str) -> bool:
    """Whether the model has a tower, and what that takes for images is counted."""
    return model_type in PICTURES


def picture_of(m: ModelFacts, pixels: int | tuple[int, int] | None) -> Picture:
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


def largest_picture(m: ModelFacts) -> Picture:
    """An image that is as many tokens as any may be."""
    made = PICTURES[m.model_type]
    if isinstance(made, partial):  # by its pixels alone, whatever its sides: merged patches in a row stand for them
        merge = size(m, "spatial_merge_size")
        tokens = made.args[1] // (size(m, "patch_size") * merge) ** 2
        return Picture(merge, merge * tokens, tokens, merge)
    if m.model_type == "llama4":
        side = size(m, "image_size") * round(sqrt(_MOST_TILES))
        return made(m, side, side)
    side = size(m, "image_size")
    return made(m, side, side)


def axes_of(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """The axes that the images of a run decide: those of a sequence, of one image, and of one window of it."""
    if m.model_type == "mllama":
        return _tiled(m, images, picture)
    grid, images = picture.patches + picture.own, images * picture.tiles
    rows, columns = picture.rows // picture.merge, picture.columns // picture.merge
    return {
        "images": images,
        "patches": images * picture.patches,
        "merged": images * rows * columns,
        "tile": picture.patches,
        **_rounded("grid", grid),
        **(_windows(m, images, rows, columns) if m.model_type == "qwen2_5_vl" else {}),
    }


def _rounded(name: str, rows: int) -> dict[str, int]:
    """Rows of one call of attention, and as its kernels round them."""
    return {name: rows, **{f"{name}{n}": -(-rows // n) * n for n in (32, 128)}}


def _windows(m: ModelFacts, images: int, rows: int, columns: int) -> Mapping[str, int]:
    """Qwen2.5-VL's, of images of so many merged rows and columns: how many there are, and patches of a whole one."""
    merge = size(m, "spatial_merge_size")
    side = max(1, size(m, "window_size") // merge // size(m, "patch_size"))
    return {
        "windows": images * -(-rows // side) * -(-columns // side),
        **_rounded("window", min(side, rows) * min(side, columns) * merge**2),
    }


def _tiled(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Llama 3.2's: `grid` rows of an image, those of its tiles, each with a row of its own and padded to whole eights;
    `seen` by the language model of all images, not padded."""
    tiles = size(m, "max_num_tiles")
    rows = picture.patches // tiles + 1
    grid, seen = tiles * -(-rows // 8) * 8, images * tiles * rows
    return {
        "images": images,
        "patches": images * picture.patches,
        "merged": images,
        **_rounded("grid", grid),
        "seen": seen,
        "seen8": -(-seen // 8) * 8,
    }
