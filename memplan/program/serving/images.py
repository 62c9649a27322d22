"""The images or videos that vLLM profiles its encoder with before it makes the pool: the most that a batch may have.

Source: vllm 0.33.0 multimodal/encoder_budget.py MultiModalBudget, v1/core/encoder_cache_manager.py
compute_mm_encoder_budget, model_executor/models/qwen2_vl.py Qwen2VLProcessingInfo, qwen3_vl.py.
"""

from __future__ import annotations

from memplan.core.records import NamedTuple
from memplan.models.configs.images import largest_picture, takes_images, tower_of
from memplan.models.configs.towers import places, size
from memplan.program.serving.settings import Settings

_DEEP = "deepstack_visual_indexes"
_UNLIMITED = 999  # config/multimodal.py MultiModalConfig.get_limit_per_prompt
_FRAMES = 14  # qwen2_vl.py _MAX_FRAMES_PER_VIDEO; two frames are one row of patches
_VIDEO_PIXELS = 25_165_824 // 2  # pixels of a pair of frames: Qwen3-VL video_preprocessor_config.json size.longest_edge


class ProfiledItems(NamedTuple):
    """The items that the encoder is profiled with.

    kind     image or video
    items    items at once
    patches  patches of one item
    tokens   tokens of one item
    levels   outputs of the tower that are kept
    """

    kind: str
    items: int
    patches: int
    tokens: int
    levels: int


def profiled_items(s: Settings) -> ProfiledItems | None:
    """Return what the encoder is profiled with, or None if there is no encoder or the engine does not profile it."""
    m, limits = s.model, {"image": s.serving.limit_images, "video": s.serving.limit_videos}
    if s.engine.kind != "vllm" or not takes_images(m) or s.stage.number:
        return None
    allowed = {kind: item for kind, item in _largest(s).items() if limits[kind] != 0}
    if not allowed:
        return None
    kind = max(allowed, key=lambda k: (allowed[k][1], k if s.behaviour.counts_only_embeddings else ""))
    patches, tokens = allowed[kind]
    limit = _UNLIMITED if limits[kind] is None else limits[kind] or 0
    room = max(s.steps, tokens) // tokens
    requested = (s.serving.max_num_seqs or 1) * max(1, min(limit, s.longest // tokens))
    levels = 1 + len(places(m, _DEEP)) if _DEEP in tower_of(m).defaults else 1
    return ProfiledItems(kind, max(1, min(room, requested)), patches, tokens, levels)


def _largest(s: Settings) -> dict[str, tuple[int, int]]:
    """Return the patches and tokens of the largest item of each kind."""
    m, embeds = s.model, s.behaviour.counts_only_embeddings
    picture, tower = largest_picture(m), tower_of(m)
    patches = (picture.patches + picture.added_rows) * picture.tiles
    tokens = picture.tokens + tower.boundary_tokens
    if embeds:
        tokens = picture.patches // picture.merge**2 * picture.tiles
    items = {"image": (patches, tokens)}
    if tower.video == "frames":  # as many pairs of frames as the longest request has room for
        frames = max(1, s.longest // tokens * 2)
        limit = 1 if embeds else s.serving.limit_videos or _UNLIMITED  # 0.11 divides frames among videos
        rows = -(-max(1, min(frames // limit, _FRAMES)) // 2)
        items["video"] = (rows * patches, rows * tokens)
    elif tower.video == "pixels" and embeds:  # 0.11 also counts timestamps of a video: not modelled
        merged = size(m, "spatial_merge_size")
        tokens = max(1, _VIDEO_PIXELS // (size(m, "patch_size") * merged) ** 2)
        items["video"] = (tokens * merged**2, tokens)
    return items
