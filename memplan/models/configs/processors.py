"""The patches and tokens that each vision-language model's processor makes of an image, by its height and width."""

from __future__ import annotations

from math import ceil, floor, sqrt
from typing import Any, cast

from memplan.core.errors import ConfigError, SpecError, refused
from memplan.models.configs.towers import llama4 as llama4_axes
from memplan.models.configs.towers import merged_patches, rows, size
from memplan.models.facts import ModelFacts
from memplan.models.family_facts import Picture
from memplan.models.layers import as_json

_VISION = "vision_config"


def qwen(least: float, most: float, m: ModelFacts, height: int, width: int) -> Picture:
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


def glm(least: float, most: float, m: ModelFacts, height: int, width: int) -> Picture:
    """Enlarge to a merged patch, then resize as Qwen2-VL. The pixels of two frames of the image count.

    Source: transformers 5.24 models/glm46v/image_processing_glm46v.py smart_resize.
    """
    side = size(m, "patch_size") * size(m, "spatial_merge_size")
    scale = max(1, side / height, side / width)
    return qwen(least / 2, most / 2, m, int(height * scale), int(width * scale))


def pairs(least: float, most: float, m: ModelFacts, frames: int, height: int, width: int) -> tuple[int, Picture]:
    """Return a video of which two frames make one picture, each resized as an image.

    Source: transformers 5.24 models/qwen2_vl/video_processing_qwen2_vl.py.
    """
    return -(-frames // size(m, "temporal_patch_size")), qwen(least, most, m, height, width)


def budgeted_pairs(least: int, most: int, m: ModelFacts, frames: int, height: int, width: int) -> tuple[int, Picture]:
    """Return a video of which two frames make one picture, whose pixels are limited in all.

    Source: transformers 5.24 models/qwen3_vl/video_processing_qwen3_vl.py smart_resize.
    """
    return pairs(least / frames, most / frames, m, frames, height, width)


def gemma3(m: ModelFacts, height: int, width: int) -> Picture:
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


def mistral3(m: ModelFacts, height: int, width: int) -> Picture:
    """Shrink to fit the tower's image size, rounded up to whole merged patches, each row followed by one more token.

    Source: transformers 5.24 models/pixtral/image_processing_pixtral.py, processing_pixtral.py.
    """
    longest, patch, merge = size(m, "image_size"), size(m, "patch_size"), m.config_int("spatial_merge_size", 2)
    ratio = max(height / longest, width / longest)
    if ratio > 1:
        height, width = floor(height / ratio), floor(width / ratio)
    high, wide = ((n - 1) // (patch * merge) + 1 for n in (height, width))
    return Picture(high * merge, wide * merge, high * (wide + 1), merge)


def fixed(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the tower's image size; every patch is a token, as in PaliGemma."""
    side = rows(m)
    return Picture(side, side, side**2)


def llava(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the tower's image size, whose class token becomes a token only if all features are read.

    Source: transformers 5.24 models/llava/processing_llava.py.
    """
    side, full = rows(m), m.config.get("vision_feature_select_strategy", "default") == "full"
    return Picture(side, side, side**2 + full, added_rows=1)


# The resolutions of transformers' config classes.
_NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))

_ONEVISION = tuple((384 * down, 384 * across) for down in range(1, 7) for across in range(1, 7))


def llava_next(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the best of the config's resolutions, cut that into tiles, and add the whole image as one more tile.

    Rows and columns that only pad are dropped, and each row of patches is followed by one more token.

    Source: transformers 5.24 image_processing_utils.py select_best_resolution, models/llava_next.
    """
    full = m.config.get("vision_feature_select_strategy", "default") == "full"
    tiles, high, wide = _tiles_of(m, height, width, _NEXT)
    return Picture(rows(m), rows(m), rows(m) ** 2 + full + high * (wide + 1), tiles=tiles, added_rows=1)


def llava_onevision(m: ModelFacts, height: int, width: int) -> Picture:
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


def whole(m: ModelFacts) -> Picture:
    """Return one of several images of LLaVA-OneVision, which are not cut: a tile, followed by one more token."""
    return Picture(rows(m), rows(m), rows(m) ** 2 + 1)


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


def internvl(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to one tile of the tower's image size, whose patches are merged.

    Source: transformers 5.24 models/internvl/modeling_internvl.py pixel_shuffle.
    """
    side, merge = rows(m), merged_patches(m)
    return Picture(side, side, (side // merge) ** 2, merge, added_rows=1)


def smolvlm(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to one tile of the tower's image size, whose patches are merged."""
    side, merge = rows(m), m.config_int("scale_factor", 2)
    if side % merge:
        raise ConfigError(f"config: scale_factor {merge} does not divide {side} patches of a side", "scale_factor")
    return Picture(side, side, (side // merge) ** 2, merge)


# Source: `max_patches` of transformers 5.24 Llama4ImageProcessor and of the preprocessor_config.json of Llama 4.
MAX_TILES = 16  # not counting the downscaled image that follows them


def llama4(m: ModelFacts, height: int, width: int) -> Picture:
    """Scale the image up as little as possible, or down if it must be, to fill a rectangle of tiles.

    If there are several tiles, the whole image is one more. Each tile's tokens are followed by a separator, and the
    image has three more tokens.

    Source: transformers 5.24 models/llama4/image_processing_llama4.py get_best_fit, processing_llama4.py.
    """
    merge, high = _shuffled(m), rows(m)
    tiles = _filled(m, MAX_TILES, height, width)
    seen, separators = (tiles + 1, tiles) if tiles > 1 else (1, 0)
    return Picture(high, high, seen * (high // merge) ** 2 + separators + 3, merge, seen, added_rows=1)


def _filled(m: ModelFacts, most: int, height: int, width: int) -> int:
    """Return the tiles, at most `most`, of the rectangle that the image fills with least scaling up, or else down."""
    side = size(m, "image_size")
    fits = [
        (min(down * side / height, tiles // down * side / width), tiles)
        for tiles in range(1, most + 1)
        for down in range(1, tiles + 1)
        if tiles % down == 0
    ]
    grown = [scale for scale, _ in fits if scale >= 1]
    chosen = min(grown) if grown else max(scale for scale, _ in fits)
    return min(n for scale, n in fits if scale == chosen)


def cohere2(m: ModelFacts, height: int, width: int) -> Picture:
    """Cut the image into at most 12 tiles as Llama 4 does; each tile's tokens end a line, and two more frame the image.

    Source: transformers 5.24 models/cohere2_vision/image_processing_cohere2_vision.py, processing_cohere2_vision.py.
    """
    tiles, (side, merge) = _filled(m, 12, height, width), _downsampled(m)
    seen = tiles + (tiles > 1)
    return Picture(side, side, seen * ((side // merge) ** 2 + 1) + 2, merge, seen)


# Source: transformers 5.24 models/lfm2_vl/image_processing_lfm2_vl.py Lfm2VlImageProcessor.
_LFM2_TOKENS, _LFM2_TILE = (64, 256), 512  # fewest and most tokens of an image, and pixels of a tile's side


def lfm2(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to whole merged patches; cut an image of twice the most pixels into 2 to 10 tiles, and add all of it.

    Each tile has as many rows as the most patches. Two tokens frame the image, and one comes before each of several
    tiles.

    Source: transformers 5.24 models/lfm2_vl/image_processing_lfm2_vl.py, processing_lfm2_vl.py.
    """
    patch, merge = size(m, "patch_size"), m.config_int("downsample_factor", 2)
    factor, (least, most) = patch * merge, _LFM2_TOKENS
    side = max(1, _LFM2_TILE // patch)
    h, w = (max(1, round(n / factor)) for n in (height, width))
    cut = _closest(height, width, 10) if h * w > 2 * most else 0
    if h * w > most:
        beta = sqrt(height * width / (most * factor**2))
        h, w = (max(1, floor(n / beta / factor)) for n in (height, width))
    elif h * w < least:
        beta = sqrt(least * factor**2 / (height * width))
        h, w = (ceil(n * beta / factor) for n in (height, width))
    patches = max(most * merge**2, side**2)
    return Picture(1, patches, cut * (ceil(side / merge) ** 2 + 1) + h * w + (3 if cut else 2), merge, cut + 1)


_GEMMA_TOKENS = 280  # of an image. Source: transformers 5.24 models/gemma4/image_processing_gemma4.py max_soft_tokens


def gemma4(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to the most whole merged patches that keep the sides' ratio; two more tokens frame the image.

    Source: transformers 5.24 models/gemma4/image_processing_gemma4.py get_aspect_ratio_preserving_size. Raises
    SpecError for a model without `vision_config`.
    """
    if not m.part(_VISION):
        raise refused("batch.images", f"{m.name or m.model_type} has no vision tower; use 0")
    most, merge = _GEMMA_TOKENS, size(m, "pooling_kernel_size", 3)
    side = size(m, "patch_size", 16) * merge
    factor = sqrt(most * side**2 / (height * width))
    high, wide = (floor(factor * n / side) for n in (height, width))
    if not high or not wide:
        long, short = max(height, width), min(height, width)
        high, wide = (1, min(long // short, most)) if not high else (min(long // short, most), 1)
    return Picture(1, most * merge**2, high * wide + 2, merge)


def gemma4_unified(m: ModelFacts, height: int, width: int) -> Picture:
    """Return the image as the unified Gemma 4 reads it, whose patches are merged already."""
    picture = gemma4(m, height, width)
    return picture._replace(columns=picture.columns // picture.merge**2, merge=1)


def _closest(height: int, width: int, most: int) -> int:
    """Return the tiles of the rectangle, of 2 to `most` tiles, whose sides are most like the image's.

    Of equal ones the first is taken, or the last that has no more than twice the image's pixels.
    """
    found, difference = 1, float("inf")
    sides = {(w, h) for n in range(2, most + 1) for w in range(1, n + 1) for h in range(1, n + 1) if 2 <= w * h <= most}
    for w, h in sorted(sides, key=lambda pair: (pair[0] * pair[1], pair)):
        apart = abs(width / height - w / h)
        if apart < difference or (apart == difference and 2 * width * height > _LFM2_TILE**2 * w * h):
            found, difference = w * h, apart
    return found


def aya(m: ModelFacts, height: int, width: int) -> Picture:
    """Resize to one tile of the tower's image size, whose patches are merged.

    Source: transformers 5.24 models/got_ocr2/image_processing_got_ocr2.py, whose class cuts no tiles by default.
    """
    side, merge = _downsampled(m)
    return Picture(side, side, (side // merge) ** 2, merge)


def _downsampled(m: ModelFacts) -> tuple[int, int]:
    """Return the patches per side, and how many of them are merged. Raises ConfigError if these do not divide them."""
    side, merge = rows(m), m.config_int("downsample_factor", 2)
    if side % merge:
        raise ConfigError(
            f"config: downsample_factor {merge} does not divide {side} patches of a side", "downsample_factor"
        )
    return side, merge


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
    axes, high = llama4_axes(m), rows(m)
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


def mllama(m: ModelFacts, height: int, width: int) -> Picture:
    """Pad to the largest number of tiles, whatever the image's size.

    One token of the sequence stands for the image; every token after it can attend to the whole image.

    Source: transformers 5.24 models/mllama/image_processing_mllama.py pad_batches_and_tiles.
    """
    return Picture(rows(m) * size(m, "max_num_tiles"), rows(m), 1)


def clip_length(m: ModelFacts, seconds: int | None, longest: int) -> int:
    """Return a clip's seconds, of which the processor reads the `longest` at most.

    Raises SpecError without its length, and for a model without `audio_config`.
    """
    name = m.name or m.model_type
    if not m.part("audio_config"):
        raise refused("batch.clips", f"{name} has no audio encoder; use 0")
    if seconds is None:
        why = f"the tokens of a clip of {name} depend on its length; give it (--clip-seconds 30)"
        raise refused("batch.clip_seconds", why)
    return min(seconds, longest)


_MAX_ASPECT_RATIO = 200  # source: `smart_resize`
