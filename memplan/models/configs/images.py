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
from math import sqrt

from memplan.core.errors import SpecError, refused
from memplan.models.configs import processors
from memplan.models.configs.towers import size, without_patches
from memplan.models.facts import ImageFacts, ModelFacts
from memplan.models.family_facts import Picture


def _frames(m: ModelFacts, frames: int, height: int, width: int) -> tuple[int, Picture]:
    """Return a video whose frames are images of one tile."""
    return frames, _picture(m, height, width)


def _lined(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of LLaVA-NeXT's images: the patches (`cells`) and tokens (`lined`) of one image's tiles, without
    the one that is the whole image."""
    cells, lined = picture.patches * (picture.tiles - 1), picture.tokens - picture.patches
    return {**grid_axes(images, picture), "merged": images * picture.tokens, "cells": cells, "lined": lined}


def padded_axes(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of images whose tiles all have as many rows as the largest: LFM2-VL's, and Gemma 4's.

    slots   tokens of the rows of all tiles
    unread  those among them that padding fills
    """
    slots = images * picture.tiles * picture.patches // picture.merge**2
    merged = images * (picture.tokens - (picture.tiles + 2 if picture.tiles > 1 else 2))
    return {**grid_axes(images, picture), "merged": merged, "slots": slots, "unread": slots - merged}


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


def pictures_of(
    m: ModelFacts,
    images: int,
    frames: int,
    pixels: int | tuple[int, int] | None,
    clips: int = 0,
    seconds: int | None = None,
) -> tuple[int, Picture]:
    """Return how many pictures the tower reads of a sequence's images, video or audio clips, and one of them.

    Raises SpecError if there are several of these, or the model takes no videos or clips, and as `picture_of`.
    """
    if clips:
        clip = tower_of(m).clip
        if images or frames or clip is None:
            why = "clips next to images or a video are" if images or frames else "audio is"
            raise refused("batch.clips", f"{why} not supported yet for {m.model_type}; use 0")
        windows, picture = clip(m, seconds)
        return clips * windows, picture
    picture, several = picture_of(m, pixels), tower_of(m).several
    if not frames:
        return images, picture if several is None or images < 2 else several(m)
    pictures = tower_of(m).pictures
    if images or pictures is None:
        other = f"a video is not supported yet for {m.model_type}; use batch.images"
        why = "a sequence has images or a video, not both; leave batch.images out" if images else other
        raise refused("batch.frames", why)
    height, width = pixels if isinstance(pixels, tuple) else (pixels or 1, pixels or 1)
    return pictures(m, frames, height, width)


def takes_images(m: ModelFacts, hears: bool = False) -> bool:
    """Whether the model has a vision tower whose memory is estimated, or if it `hears` an audio encoder."""
    tower = m.family.images
    return tower is not None and (tower.clip if hears else tower.picture) is not None


def tower_of(m: ModelFacts) -> ImageFacts:
    """Return the facts of the model's vision tower, which it must have."""
    assert m.family.images is not None
    return m.family.images


def _picture(m: ModelFacts, height: int, width: int) -> Picture:
    picture = tower_of(m).picture
    assert picture is not None
    resized = picture(m, height, width)
    if not resized.patches or not resized.tokens:
        without_patches()
    return resized


def largest_picture(m: ModelFacts) -> Picture:
    """Return the image with the most tokens."""
    largest = tower_of(m).largest
    if largest is not None:
        return largest(m)
    side = size(m, "image_size")
    return _picture(m, side, side)


def largest_merged(most: int, m: ModelFacts) -> Picture:
    """Return one row of merged patches: only their number matters."""
    merge = size(m, "spatial_merge_size")
    tokens = most // (size(m, "patch_size") * merge) ** 2
    return Picture(merge, merge * tokens, tokens, merge)


def _largest_tiled(m: ModelFacts) -> Picture:
    side = size(m, "image_size") * round(sqrt(processors.MAX_TILES))
    return _picture(m, side, side)


def axes_of(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes set by the images of a run: of all images of a sequence, of one image, and of its windows."""
    axes = tower_of(m).axes
    return axes(m, images, picture) if axes is not None else grid_axes(images, picture)


def grid_axes(images: int, picture: Picture) -> Mapping[str, int]:
    """Return the number and sizes of grids."""
    grid, images = picture.patches + picture.added_rows, images * picture.tiles
    rows, columns = picture.rows // picture.merge, picture.columns // picture.merge
    return {
        "images": images,
        "patches": images * picture.patches,
        "merged": images * rows * columns,
        "tile": picture.patches,
        **rounded("grid", grid),
    }


def rounded(name: str, rows: int) -> dict[str, int]:
    """Return the rows of one attention call, exact and rounded up as its kernels do."""
    return {name: rows, **{f"{name}{n}": -(-rows // n) * n for n in (32, 128)}}


def windowed(m: ModelFacts, images: int, picture: Picture) -> Mapping[str, int]:
    """Return the axes of Qwen2.5-VL's images and attention windows: their number, the patches of a full window,
    and the pairs of patches of all windows."""
    merge, rows, columns = picture.merge, picture.rows // picture.merge, picture.columns // picture.merge
    side = max(1, size(m, "window_size") // merge // size(m, "patch_size"))
    squares = [n // side * side**2 + (n % side) ** 2 for n in (rows, columns)]
    return {
        **grid_axes(images, picture),
        "window_pairs": images * picture.tiles * squares[0] * squares[1] * merge**4,
        "windows": images * picture.tiles * -(-rows // side) * -(-columns // side),
        **rounded("window", min(side, rows) * min(side, columns) * merge**2),
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
        **rounded("grid", grid),
        "seen": seen,
        "seen8": -(-seen // 8) * 8,
    }


# Fewest and most pixels of an image. Source: preprocessor_config.json as published with Qwen2-VL 2B to 72B and
# Qwen2.5-VL 3B to 72B; with Qwen3-VL, Qwen3.5 and Qwen3.6. (Without that file, transformers 5.24's
# Qwen2VLImageProcessor takes 56 x 56 to 28 x 28 x 1280 for all.)
PIXELS_2, _PIXELS_3 = (56 * 56, 3584 * 3584), (256 * 256, 4096 * 4096)
# Fewest and most pixels of all frames of a video. Source: video_preprocessor_config.json as published with Qwen3-VL.
# (Qwen2-VL and Qwen2.5-VL publish none, and transformers then reads PIXELS_2 for each frame.)
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
    partial(processors.qwen, *PIXELS_2),
    partial(largest_merged, PIXELS_2[1]),
    is_packed=True,
    pictures=partial(processors.pairs, *PIXELS_2),
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
    axes=windowed,
    ffn="fused",
)
# Fewest and most pixels. Source: preprocessor_config.json as published with GLM-OCR.
_PIXELS_GLM = (112 * 112, 14 * 14 * 2 * 2 * 2 * 6144)
GLM_OCR = ImageFacts(
    {
        **_QWEN,
        "depth": 24,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "out_hidden_size": 1536,
    },
    partial(processors.glm, *_PIXELS_GLM),
    partial(largest_merged, _PIXELS_GLM[1] // 2),
    is_packed=True,
    ffn="gated",
)
GLM_4V = GLM_OCR._replace(
    defaults={
        **GLM_OCR.defaults,
        "hidden_size": 1536,
        "num_heads": 12,
        "intermediate_size": 13696,
        "out_hidden_size": 4096,
        "image_size": 336,
    }
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
    partial(processors.qwen, *_PIXELS_3),
    partial(largest_merged, _PIXELS_3[1]),
    is_packed=True,
    pictures=partial(processors.budgeted_pairs, *_PIXELS_OF_VIDEO),
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
    processors.gemma3,
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
    processors.mistral3,
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
    processors.mllama,
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
    processors.llama4,
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
    processors.llava,
    is_fixed=True,
    is_rotated=False,
)
LLAVA_NEXT = CLIP._replace(picture=processors.llava_next, is_fixed=False, axes=_lined)
INTERNVL = CLIP._replace(defaults={**CLIP.defaults, "image_size": 448}, picture=processors.internvl, pictures=_frames)
PALIGEMMA = CLIP._replace(
    defaults={**CLIP.defaults, "hidden_size": 1152, "num_hidden_layers": 27, "image_size": 224},
    picture=processors.fixed,
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
ONEVISION = SIGLIP._replace(
    picture=processors.llava_onevision, is_called=True, is_fixed=False, axes=_lined, several=processors.whole
)
AYA = SIGLIP._replace(picture=processors.aya, is_called=True)
COHERE2 = AYA._replace(
    picture=processors.cohere2,
    is_fixed=False,
    defaults={
        **SIGLIP.defaults,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "num_hidden_layers": 27,
        "patch_size": 16,
        "image_size": 512,
    },
)
SIGLIP_2 = SIGLIP._replace(
    defaults={**GEMMA3.defaults, "num_patches": 256},
    picture=processors.lfm2,
    axes=padded_axes,
    is_called=True,
    is_fixed=False,
    has_masks=True,
    sets_dtype="patch_embedding",
)
IDEFICS3 = CLIP._replace(
    defaults={
        **CLIP.defaults,
        "hidden_size": 1152,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "patch_size": 32,
        "image_size": 224,
    },
    picture=processors.smolvlm,
)
SMOLVLM = IDEFICS3._replace(pictures=_frames)
