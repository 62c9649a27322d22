"""The images or videos that vLLM's encoder is run on before its pool is made: the most that a batch may have.

Source: vllm 0.33.0 multimodal/encoder_budget.py MultiModalBudget, v1/core/encoder_cache_manager.py
compute_mm_encoder_budget, model_executor/models/qwen2_vl.py Qwen2VLProcessingInfo, qwen3_vl.py.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.models.configs.images import largest_picture, sees
from memplan.models.configs.vision import places, size
from memplan.program.serving.settings import Settings

_AROUND = 4  # Gemma 3's tokens around those of an image: transformers processing_gemma3.py full_image_sequence
_UNLIMITED = 999  # config/multimodal.py MultiModalConfig.get_limit_per_prompt
_FRAMES = 14  # qwen2_vl.py _MAX_FRAMES_PER_VIDEO, two of which are one row of patches
_VIDEO_PIXELS = 25_165_824 // 2  # of two frames: size.longest_edge of the video_preprocessor_config.json of Qwen3-VL
VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


class Seen(NamedTuple):
    """So many items of a kind at once, each so many patches, which become so many tokens; `levels` of what the tower
    makes are kept."""

    kind: str
    items: int
    patches: int
    tokens: int
    levels: int


def seen(s: Settings) -> Seen | None:
    """What the encoder is run on; None where there is none, or where the engine does not run it beforehand."""
    m, limits = s.model, {"image": s.serving.limit_images, "video": s.serving.limit_videos}
    if s.engine.kind != "vllm" or not sees(m.model_type) or s.stage.number:
        return None
    found = {kind: made for kind, made in _largest(s).items() if limits[kind] != 0}
    if not found:
        return None
    kind = max(found, key=lambda k: (found[k][1], k if s.words["embeds"] else ""))
    patches, tokens = found[kind]
    limit = _UNLIMITED if limits[kind] is None else limits[kind] or 0
    room = max(s.steps, tokens) // tokens
    asked = (s.serving.max_num_seqs or 1) * max(1, min(limit, s.longest // tokens))
    levels = 1 + len(places(m, "deepstack_visual_indexes")) if m.model_type in VIDEOS[2:] else 1
    return Seen(kind, max(1, min(room, asked)), patches, tokens, levels)


def _largest(s: Settings) -> dict[str, tuple[int, int]]:
    """Patches and tokens of the largest item of each kind."""
    m = s.model
    picture = largest_picture(m)
    patches = (picture.patches + picture.own) * picture.tiles
    tokens = picture.tokens + (_AROUND if m.model_type == "gemma3" else 0)
    if s.words["embeds"]:
        tokens = picture.patches // picture.merge**2 * picture.tiles
    found = {"image": (patches, tokens)}
    if m.model_type in VIDEOS[:2]:  # as many frames, two by two, as the longest request has room for
        frames = max(1, s.longest // tokens * 2)
        limit = 1 if s.words["embeds"] else s.serving.limit_videos or _UNLIMITED  # 0.11 shares frames among videos
        rows = -(-max(1, min(frames // limit, _FRAMES)) // 2)
        found["video"] = (rows * patches, rows * tokens)
    elif m.model_type in VIDEOS and s.words["embeds"]:  # 0.11 counts a video's time stamps too, which is not described
        merged = size(m, "spatial_merge_size")
        tokens = _VIDEO_PIXELS // (size(m, "patch_size") * merged) ** 2
        found["video"] = (tokens * merged**2, tokens)
    return found
