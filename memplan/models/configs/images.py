"""The patches and tokens of a vision-language model's images.

A run's images set these axes:

    images   images of a sequence, or tiles if images are cut into tiles
    tile     patches of one image or tile
    grid     `tile` and the rows that the tower adds, such as a class token
    patches  patches of all images of a sequence
    merged   the same patches after merging
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
    """One image as the vision tower sees it.

    rows        rows of patches, of each tile
    columns     columns of patches, of each tile
    tokens      tokens of the sequence that stand for the image
    merge       patches per side that are merged into one token
    tiles       tiles that the image is cut into
    added_rows  rows that the tower adds to each tile
    """

    rows: int
    columns: int
    tokens: int
    merge: int = 1
    tiles: int = 1
    added_rows: int = 0

    @property
    def patches(self) -> int:
        return self.rows * self.columns


def _qwen(least: int, most: int, m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to whole merged patches, between `least` and `most` pixels.

    Source: transformers 5.24 models/qwen2_vl/image_processing_qwen2_vl.py smart_resize. Raises SpecError if one side is
    more than 200 times the other.
    """
    if max(height, width) > _MAX_ASPECT_RATIO * min(height, width):
        raise SpecError(
            f"batch.image_size: {m.name or m.model_type} takes no image with a side more than {_MAX_ASPECT_RATIO} "
            f"times the other, such as {height} x {width}",
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
    """Resize to the tower's image size; its patches are average-pooled to `mm_tokens_per_image` tokens.

    Source: transformers 5.24 models/gemma3/image_processing_gemma3.py, modeling_gemma3.py Gemma3MultiModalProjector.
    Raises ConfigError if there are fewer patches than tokens.
    """
    side, tokens = rows(m), m.config_int("mm_tokens_per_image", 256)
    merge = side // round(sqrt(tokens))
    if not merge:
        raise ConfigError(
            f"config: {_VISION}.image_size: {side} x {side} patches cannot be averaged to mm_tokens_per_image {tokens}",
            "image_size",
        )
    return Picture(side, side, tokens, merge)


def _mistral3(m: ModelFacts, height: int, width: int) -> Picture:
    """Shrink to fit the tower's image size, rounded up to whole merged patches, each row followed by one more token.

    Source: transformers 5.24 models/pixtral/image_processing_pixtral.py, processing_pixtral.py.
    """
    longest, patch, merge = size(m, "image_size"), size(m, "patch_size"), m.config_int("spatial_merge_size", 2)
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = floor(height / ratio), floor(width / ratio)
    high, wide = ((n - 1) // (patch * merge) + 1 for n in (height, width))
    return Picture(high * merge, wide * merge, high * (wide + 1), merge)


# Source: `max_patches` of transformers 5.24 Llama4ImageProcessor and of the preprocessor_config.json of Llama 4.
_MAX_TILES = 16  # not counting the downscaled image that follows them


def _llama4(m: ModelFacts, height: int, width: int) -> Picture:
    """Scale the image up as little as possible, or down if it must be, to fill a rectangle of tiles.

    If there are several tiles, the whole image is one more. Each tile's tokens are followed by a separator, and the
    image has three more tokens.

    Source: transformers 5.24 models/llama4/image_processing_llama4.py get_best_fit, processing_llama4.py.
    """
    side, merge, high = size(m, "image_size"), _shuffled(m), rows(m)
    fits = [
        (min(down * side / height, tiles // down * side / width), tiles)
        for tiles in range(1, _MAX_TILES + 1)
        for down in range(1, tiles + 1)
        if tiles % down == 0
    ]
    grown = [scale for scale, _ in fits if scale >= 1]
    chosen = min(grown) if grown else max(scale for scale, _ in fits)
    tiles = min(n for scale, n in fits if scale == chosen)
    seen, separators = (tiles + 1, tiles) if tiles > 1 else (1, 0)
    return Picture(high, high, seen * (high // merge) ** 2 + separators + 3, merge, seen, added_rows=1)


def _shuffled(m: ModelFacts) -> int:
    """Return the patches per side that Llama 4's pixel shuffle merges into one token.

    Raises ConfigError if the sizes of the tower's config contradict each other.
    """
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
    pairs = {
        "intermediate_size": (axes["vf"], axes["vh"] * merge**2),
        "projector_output_dim": (axes["vpo"], axes["vp"]),
        "vision_output_dim": (axes["vo"], axes["vpo"]),
    }
    for key, (configured, required) in pairs.items():
        if configured != required:
            raise ConfigError(f"config: {_VISION}.{key} is {configured}, but the layer before it makes {required}", key)
    return merge


def _mllama(m: ModelFacts, height: int, width: int) -> Picture:
    """Pad to the largest number of tiles, whatever the image's size.

    One token of the sequence stands for the image; every token after it can attend to the whole image.

    Source: transformers 5.24 models/mllama/image_processing_mllama.py pad_batches_and_tiles.
    """
    return Picture(rows(m) * size(m, "max_num_tiles"), rows(m), 1)


# Fewest and most pixels of an image. Source: preprocessor_config.json as published with Qwen2-VL 2B to 72B and
# Qwen2.5-VL 3B to 72B; with Qwen3-VL, Qwen3.5 and Qwen3.6. (Without that file, transformers 5.24's
# Qwen2VLImageProcessor takes 56 x 56 to 28 x 28 x 1280 for all.)
_QWEN2 = partial(_qwen, 56 * 56, 3584 * 3584)
_QWEN3 = partial(_qwen, 256 * 256, 4096 * 4096)
_MAX_ASPECT_RATIO = 200  # source: `smart_resize`

PICTURES: dict[str, Callable[[ModelFacts, int, int], Picture]] = {
    "gemma3": _gemma3,
    "llama4": _llama4,
    "mistral3": _mistral3,
    "mllama": _mllama,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"), _QWEN3),
}
# Families whose tower reads all images as one packed sequence, which is split only for sdpa.
PACKS = ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe")
FIXED = ("gemma3", "mllama")  # families whose tower reads images of one fixed size


def takes_images(model_type: str) -> bool:
    """Whether the model has a vision tower whose memory is estimated."""
    return model_type in PICTURES


def picture_of(m: ModelFacts, pixels: int | tuple[int, int] | None) -> Picture:
    """Return an image of this size (a side, or height and width) as the model's processor resizes it.

    Raises SpecError if the result depends on the size and none is given.
    """
    if pixels is None and m.model_type not in FIXED:
        raise SpecError(
            f"batch.image_size: the tokens of an image of {m.name or m.model_type} depend on its size; give the pixels "
            "of a side, or height and width",
            "batch.image_size",
        )
    height, width = pixels if isinstance(pixels, tuple) else (pixels or 1, pixels or 1)
    return PICTURES[m.model_type](m, height, width)


def largest_picture(m: ModelFacts) -> Picture:
    """Return the image with the most tokens."""
    processor = PICTURES[m.model_type]
    if isinstance(processor, partial):  # only the number of pixels matters, so one row of merged patches will do
        merge = size(m, "spatial_merge_size")
        tokens = processor.args[1] // (size(m, "patch_size") * merge) ** 2
        return Picture(merge, merge * tokens, tokens, merge)
    if m.model_type == "llama4":
        side = size(m, "image_size") * round(sqrt(_MAX_TILES))
        return processor(m, side, side)
    side = size(m, "image_size")
    return processor(m, side, side)


def axes_of(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes set by the images of a run: of all images of a sequence, of one image, and of its windows."""
    if m.model_type == "mllama":
        return _tiled(m, images, picture)
    grid, images = picture.patches + picture.added_rows, images * picture.tiles
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
    """Return the rows of one attention call, exact and rounded up as its kernels do."""
    return {name: rows, **{f"{name}{n}": -(-rows // n) * n for n in (32, 128)}}


def _windows(m: ModelFacts, images: int, rows: int, columns: int) -> Mapping[str, int]:
    """Return the axes of Qwen2.5-VL's attention windows: their number, and the patches of a full window.

    `rows` and `columns` are those of an image after merging.
    """
    merge = size(m, "spatial_merge_size")
    side = max(1, size(m, "window_size") // merge // size(m, "patch_size"))
    return {
        "windows": images * -(-rows // side) * -(-columns // side),
        **_rounded("window", min(side, rows) * min(side, columns) * merge**2),
    }


def _tiled(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of Llama 3.2's images.

    grid  rows of one image: its tiles, each with a class token and padded to a multiple of 8
    seen  rows of all images that the language model attends to, without padding
    """
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
