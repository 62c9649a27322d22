"""The patches and tokens of a vision-language model's images.

A run's images set these axes:

    images   images of a sequence, or tiles if images are cut into tiles
    tile     patches of one image or tile
    grid     `tile` and the rows that the tower adds, such as a class token
    patches  patches of all images of a sequence
    merged   the same patches after merging
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import ceil, floor, sqrt
from typing import Any, cast

from memplan.core.errors import ConfigError, SpecError, refused
from memplan.models.configs.towers import llama4, merged_patches, rows, size
from memplan.models.facts import ImageFacts, ModelFacts
from memplan.models.family_facts import Picture
from memplan.models.layers import as_json

_VISION = "vision_config"


def _qwen(least: float, most: float, m: ModelFacts, height: int, width: int) -> Picture:
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


def _frames(m: ModelFacts, frames: int, height: int, width: int) -> tuple[int, Picture]:
    """Return a video whose frames are images of one tile."""
    return frames, _picture(m, height, width)


def _pairs(least: float, most: float, m: ModelFacts, frames: int, height: int, width: int) -> tuple[int, Picture]:
    """Return a video of which two frames make one picture, each resized as an image.

    Source: transformers 5.24 models/qwen2_vl/video_processing_qwen2_vl.py.
    """
    return -(-frames // size(m, "temporal_patch_size")), _qwen(least, most, m, height, width)


def _budgeted_pairs(least: int, most: int, m: ModelFacts, frames: int, height: int, width: int) -> tuple[int, Picture]:
    """Return a video of which two frames make one picture, whose pixels are limited in all.

    Source: transformers 5.24 models/qwen3_vl/video_processing_qwen3_vl.py smart_resize.
    """
    return _pairs(least / frames, most / frames, m, frames, height, width)


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


def _fixed(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the tower's image size; every patch is a token, as in PaliGemma."""
    side = rows(m)
    return Picture(side, side, side**2)


def _llava(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the tower's image size, whose class token becomes a token only if all features are read.

    Source: transformers 5.24 models/llava/processing_llava.py.
    """
    side, full = rows(m), m.config.get("vision_feature_select_strategy", "default") == "full"
    return Picture(side, side, side**2 + full, added_rows=1)


# The resolutions of transformers' config classes.
_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_ONEVISION = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))


def _llava_next(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the best of the config's resolutions, cut that into tiles, and add the whole image as one more tile.

    Rows and columns that only pad are dropped, and each row of patches is followed by one more token.

    Source: transformers 5.24 image_processing_utils.py select_best_resolution, models/llava_next.
    """
    full = m.config.get("vision_feature_select_strategy", "default") == "full"
    tiles, high, wide = _tiles_of(m, height, width, _NEXT)
    return Picture(rows(m), rows(m), rows(m) ** 2 + full + high * (wide + 1), tiles=tiles, added_rows=1)


def _llava_onevision(m: ModelFacts, height: int, width: int) -> Picture:
    """Cut the image as LLaVA-NeXT does; more rows and columns than the config's limit of tiles has are interpolated.

    Source: transformers 5.24 models/llava_onevision/modeling_llava_onevision.py pack_image_features.
    """
    ratio = str(m.config.get("vision_aspect_ratio", "anyres_max_9")).removeprefix("anyres_max_")
    if not ratio.isascii() or not ratio.isdigit() or not int(ratio):
        raise ConfigError(
            "config: vision_aspect_ratio must be anyres_max_ and a number of tiles", "vision_aspect_ratio"
        )
    tiles, high, wide = _tiles_of(m, height, width, _ONEVISION)
    shrinks = sqrt(high * wide / (int(ratio) * (rows(m) or 1) ** 2))
    if shrinks > 1.1:
        high, wide = int(high // shrinks), int(wide // shrinks)
    return Picture(rows(m), rows(m), rows(m) ** 2 + high * (wide + 1), tiles=tiles)


def _tiles_of(m: ModelFacts, height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int, int]:
    """Return the tiles of an image, counting the one that is all of it, and its rows and columns without padding."""
    side = size(m, "image_size")
    down, across = (n // side for n in _best_resolution(m, height, width, pinpoints))
    high, wide = rows(m) * down, rows(m) * across
    if width * high > wide * height:
        high -= (high - int(round(height * (wide / width), 7))) // 2 * 2
    else:
        wide -= (wide - int(round(width * (high / height), 7))) // 2 * 2
    return down * across + 1, high, wide


def _best_resolution(m: ModelFacts, height: int, width: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the height and width that hold most of the image and waste least. Raises ConfigError for other lists."""
    listed: Any = m.config.get("image_grid_pinpoints", pinpoints)
    side = size(m, "image_size")
    if not listed or type(listed) is not tuple or not all(_is_pair(pair, side) for pair in cast(list[Any], listed)):
        raise ConfigError(
            f"config: image_grid_pinpoints must be pairs of pixels of at least {side}, not "
            f"{as_json(m.config.get('image_grid_pinpoints')):.80}",
            "image_grid_pinpoints",
        )

    def kept(pair: tuple[int, int]) -> tuple[int, int]:
        scale = min(pair[1] / width, pair[0] / height)
        pixels = min(int(width * scale) * int(height * scale), width * height)
        return pixels, pixels - pair[0] * pair[1]

    return max(cast(tuple[tuple[int, int], ...], listed), key=kept)


def _is_pair(pair: Any, side: int) -> bool:
    return (
        type(pair) is tuple and [*map(type, cast(list[Any], pair))] == [int, int] and min(cast(list[int], pair)) >= side
    )


def _lined(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of LLaVA-NeXT's images: the patches (`cells`) and tokens (`lined`) of one image's tiles, without
    the one that is the whole image."""
    cells, lined = picture.patches * (picture.tiles - 1), picture.tokens - picture.patches
    return {**_axes(images, picture), "merged": images * picture.tokens, "cells": cells, "lined": lined}


def _only_image(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of a sequence's only image: LLaVA-OneVision does not cut several ones into tiles."""
    if images > 1:
        raise refused("batch.images", f"several images of a sequence are not supported yet for {m.model_type}; use 1")
    return _lined(m, images, picture)


def _internvl(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to one tile of the tower's image size, whose patches are merged.

    Source: transformers 5.24 models/internvl/modeling_internvl.py pixel_shuffle.
    """
    side, merge = rows(m), merged_patches(m)
    return Picture(side, side, (side // merge) ** 2, merge, added_rows=1)


def _smolvlm(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to one tile of the tower's image size, whose patches are merged."""
    side, merge = rows(m), m.config_int("scale_factor", 2)
    if side % merge:
        raise ConfigError(f"config: scale_factor {merge} does not divide {side} patches of a side", "scale_factor")
    return Picture(side, side, (side // merge) ** 2, merge)


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


_MAX_ASPECT_RATIO = 200  # source: `smart_resize`


def picture_of(m: ModelFacts, pixels: int | tuple[int, int] | None) -> Picture:
    """Return an image of this size (a side, or height and width) as the model's processor resizes it.

    Raises SpecError if the result depends on the size and none is given.
    """
    images = tower_of(m)
    if pixels is None and not images.is_fixed:
        raise SpecError(
            f"batch.image_size: the tokens of an image of {m.name or m.model_type} depend on its size; give the pixels "
            "of a side, or height and width (--image-size 1024 or 720x1280)",
            "batch.image_size",
        )
    height, width = pixels if isinstance(pixels, tuple) else (pixels or 1, pixels or 1)
    return _picture(m, height, width)


def pictures_of(m: ModelFacts, images: int, frames: int, pixels: int | tuple[int, int] | None) -> tuple[int, Picture]:
    """Return how many pictures the tower reads of a sequence's images or video, and one of them.

    Raises SpecError if there are both, or the model takes no videos, and as `picture_of`.
    """
    picture = picture_of(m, pixels)
    if not frames:
        return images, picture
    pictures = tower_of(m).pictures
    if images or pictures is None:
        other = f"a video is not supported yet for {m.model_type}; use batch.images"
        why = "a sequence has images or a video, not both; leave batch.images out" if images else other
        raise refused("batch.frames", why)
    height, width = pixels if isinstance(pixels, tuple) else (pixels or 1, pixels or 1)
    return pictures(m, frames, height, width)


def takes_images(m: ModelFacts) -> bool:
    """Whether the model has a vision tower whose memory is estimated."""
    return m.family.images is not None and m.family.images.picture is not None


def tower_of(m: ModelFacts) -> ImageFacts:
    """Return the facts of the model's vision tower, which it must have."""
    assert m.family.images is not None
    return m.family.images


def _picture(m: ModelFacts, height: int, width: int) -> Picture:
    picture = tower_of(m).picture
    assert picture is not None
    resized = picture(m, height, width)
    if not resized.patches or not resized.tokens:
        raise ConfigError(f"config: {_VISION}.image_size: an image has no patch of {_VISION}.patch_size", "image_size")
    return resized


def largest_picture(m: ModelFacts) -> Picture:
    """Return the image with the most tokens."""
    largest = tower_of(m).largest
    if largest is not None:
        return largest(m)
    side = size(m, "image_size")
    return _picture(m, side, side)


def _largest_merged(most: int, m: ModelFacts) -> Picture:
    """Return one row of merged patches: only their number matters."""
    merge = size(m, "spatial_merge_size")
    tokens = most // (size(m, "patch_size") * merge) ** 2
    return Picture(merge, merge * tokens, tokens, merge)


def _largest_tiled(m: ModelFacts) -> Picture:
    side = size(m, "image_size") * round(sqrt(_MAX_TILES))
    return _picture(m, side, side)


def axes_of(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes set by the images of a run: of all images of a sequence, of one image, and of its windows."""
    axes = tower_of(m).axes
    return axes(m, images, picture) if axes is not None else _axes(images, picture)


def _axes(images: int, picture: Picture) -> Mapping[str, int]:
    grid, images = picture.patches + picture.added_rows, images * picture.tiles
    rows, columns = picture.rows // picture.merge, picture.columns // picture.merge
    return {
        "images": images,
        "patches": images * picture.patches,
        "merged": images * rows * columns,
        "tile": picture.patches,
        **_rounded("grid", grid),
    }


def _rounded(name: str, rows: int) -> dict[str, int]:
    """Return the rows of one attention call, exact and rounded up as its kernels do."""
    return {name: rows, **{f"{name}{n}": -(-rows // n) * n for n in (32, 128)}}


def _windowed(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of Qwen2.5-VL's images and attention windows: their number, the patches of a full window,
    and the pairs of patches of all windows."""
    merge, rows, columns = picture.merge, picture.rows // picture.merge, picture.columns // picture.merge
    side = max(1, size(m, "window_size") // merge // size(m, "patch_size"))
    squares = [n // side * side**2 + (n % side) ** 2 for n in (rows, columns)]
    return {
        **_axes(images, picture),
        "window_pairs": images * picture.tiles * squares[0] * squares[1] * merge**4,
        "windows": images * picture.tiles * -(-rows // side) * -(-columns // side),
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


# Fewest and most pixels of an image. Source: preprocessor_config.json as published with Qwen2-VL 2B to 72B and
# Qwen2.5-VL 3B to 72B; with Qwen3-VL, Qwen3.5 and Qwen3.6. (Without that file, transformers 5.24's
# Qwen2VLImageProcessor takes 56 x 56 to 28 x 28 x 1280 for all.)
_PIXELS_2, _PIXELS_3 = (56 * 56, 3584 * 3584), (256 * 256, 4096 * 4096)
# Fewest and most pixels of all frames of a video. Source: video_preprocessor_config.json as published with Qwen3-VL.
# (Qwen2-VL and Qwen2.5-VL publish none, and transformers then reads _PIXELS_2 for each frame.)
_PIXELS_OF_VIDEO = (64 * 64, 2 * 3 * 2048 * 2048)

_QWEN: dict[str, int | tuple[int, ...]] = {
    "num_heads": 16,
    "in_channels": 3,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
}
# Source of the towers' defaults: transformers 5.24 configuration classes.
QWEN2_VL = ImageFacts(
    {**_QWEN, "depth": 32, "embed_dim": 1280, "mlp_ratio": 4},
    partial(_qwen, *_PIXELS_2),
    partial(_largest_merged, _PIXELS_2[1]),
    is_packed=True,
    pictures=partial(_pairs, *_PIXELS_2),
    video="frames",
)
QWEN2_5_VL = QWEN2_VL._replace(
    defaults={
        **_QWEN,
        "depth": 32,
        "hidden_size": 3584,
        "intermediate_size": 3420,
        "window_size": 112,
        "fullatt_block_indexes": (7, 15, 23, 31),
    },
    axes=_windowed,
    ffn="fused",
)
QWEN3_VL = ImageFacts(
    {
        **_QWEN,
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "patch_size": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": (8, 16, 24),
    },
    partial(_qwen, *_PIXELS_3),
    partial(_largest_merged, _PIXELS_3[1]),
    is_packed=True,
    pictures=partial(_budgeted_pairs, *_PIXELS_OF_VIDEO),
    video="pixels",
)
QWEN3_5 = QWEN3_VL._replace(defaults={**QWEN3_VL.defaults, "deepstack_visual_indexes": ()})
GEMMA3 = ImageFacts(
    {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_channels": 3,
        "patch_size": 16,
        "image_size": 224,
    },
    _gemma3,
    is_fixed=True,
    boundary_tokens=4,  # transformers processing_gemma3.py full_image_sequence
    is_rotated=False,
)
MISTRAL3 = ImageFacts(
    {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_channels": 3,
        "patch_size": 16,
        "image_size": 1024,
    },
    _mistral3,
    has_masks=True,
    ffn="gated",
)
MLLAMA = ImageFacts(
    {
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
    _mllama,
    axes=_tiled,
    is_fixed=True,
    has_masks=True,
)
LLAMA4 = ImageFacts(
    {
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
    _llama4,
    _largest_tiled,
    by_keyword=True,
)
CLIP = ImageFacts(
    {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_channels": 3,
        "patch_size": 14,
        "image_size": 336,
    },
    _llava,
    is_fixed=True,
    is_rotated=False,
)
LLAVA_NEXT = CLIP._replace(picture=_llava_next, is_fixed=False, axes=_lined)
INTERNVL = CLIP._replace(defaults={**CLIP.defaults, "image_size": 448}, picture=_internvl, pictures=_frames)
PALIGEMMA = CLIP._replace(
    defaults={**CLIP.defaults, "hidden_size": 1152, "num_hidden_layers": 27, "image_size": 224}, picture=_fixed
)
SIGLIP = CLIP._replace(
    defaults={
        **CLIP.defaults,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "image_size": 384,
    },
    picture=None,
    is_called=False,
)
ONEVISION = SIGLIP._replace(picture=_llava_onevision, is_called=True, is_fixed=False, axes=_only_image)
COHERE2 = SIGLIP._replace(
    defaults={
        **SIGLIP.defaults,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_hidden_layers": 27,
        "patch_size": 16,
        "image_size": 512,
    }
)
SIGLIP_2 = SIGLIP._replace(defaults={**GEMMA3.defaults, "num_patches": 256})
IDEFICS3 = CLIP._replace(
    defaults={
        **CLIP.defaults,
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
    },
    picture=_smolvlm,
)
SMOLVLM = IDEFICS3._replace(pictures=_frames)
