"""vLLM's pool: layers with the same kind of cache form groups of equal size, and all groups share the same blocks.

Source: vllm 0.33.0 v1/core/kv_cache_planning.py, v1/kv_cache_interface.py, platforms/interface.py
_align_hybrid_block_size. Differences in 0.11 are in the engine's rows.
"""

from __future__ import annotations

from memplan.catalogue.inference.caches import LayerCache, caches
from memplan.core.errors import refused
from memplan.core.records import NamedTuple
from memplan.program.serving import compressed
from memplan.program.serving.draft import layers_of, lookahead_slots
from memplan.program.serving.pool import Blocks, CacheGroup, block_bytes
from memplan.program.serving.settings import Settings


class _Kind(NamedTuple):
    """The facts that decide which group a layer's cache belongs to.

    kind    full, sliding, chunked, or state
    page    bytes of one token, or of an entire state
    window  tokens of the window
    """

    kind: str
    page: int
    window: int = 0


def pool(s: Settings, available: int) -> Blocks:
    """Return the blocks that fit in `available` bytes on each rank."""
    groups = groups_of(s)
    return Blocks(
        groups,
        max(0, available) // block_bytes(groups),
        _in_flight(s) * s.steps,
        s.longest,
        s.behaviour.group_tokens,
        int(s.behaviour.null_block),
        lookahead_slots(s),
    )


def _in_flight(s: Settings) -> int:
    """Return the steps in flight: one for each pipeline stage, and one more if the next is scheduled ahead. 0.11 counts
    only one."""
    steps = s.behaviour.steps_in_flight
    return steps if steps == 1 else s.ranks.pp - 1 + steps


def groups_of(s: Settings) -> tuple[CacheGroup, ...]:
    """Return the groups of the entire model's layers, each with the number of its layers that the stage has.

    Raises SpecError for a model whose caches this version cannot put into one pool.
    """
    if s.model.has_compressed_cache:
        return compressed.groups_of(s)
    model_caches = caches(s.model)
    layers = [c for c in (*model_caches, *layers_of(s)) if c.parts]
    in_stage = [s.stage.first <= i < s.stage.last for i, c in enumerate(model_caches) if c.parts]
    in_stage += [True] * (len(layers) - len(in_stage))
    kind_of = {c: _kind(s, c) for c in dict.fromkeys(layers)}
    kinds = [kind_of[c] for c in layers]
    if not s.serving.hybrid_cache and len(set(kinds)) > 1:
        kinds = [k._replace(kind="full", window=0) if k.kind in ("sliding", "chunked") else k for k in kinds]
    attention = [k for k in kinds if k.kind != "state"]
    states = [k for k in kinds if k.kind == "state"]
    block = s.block
    if states and attention:
        per_token = max(k.page for k in attention)
        block = _aligned(s, max(k.page for k in states), per_token)
    groups = [_group(s, k, block, states=2 if s.serving.prefix_caching else 1) for k in kinds]
    if len({(g.kind, g.window) for g in groups}) == 1:  # one table for all layers, even if their heads differ in width
        page = sum(g.page for g, mine in zip(groups, in_stage, strict=True) if mine)
        return (groups[0]._replace(layers=1, page=page, own=page),)
    return _equal_groups(_equal_pages(s, groups), in_stage)


def _kind(s: Settings, c: LayerCache) -> _Kind:
    if c.kind == "state":
        return _Kind("state", s.state_bytes(c, _state_dtype(s)))
    kind = {"sliding": "sliding", "chunked": "chunked"}.get(c.kind, "full")
    packed = s.packed or (s.behaviour.packs_latents and s.serving.cache_dtype == "auto")
    return _Kind(kind, s.token_bytes(c, packed), c.window or 0)


def _state_dtype(s: Settings) -> str:
    """Return the dtype of states: as the config says, fp32 for Nemotron-H and Kimi, otherwise the engine's default."""
    name = s.model.config.get("mamba_ssm_dtype") or s.model.config.get("mamba_ssm_cache_dtype")
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(name))
    if dtype is not None:
        return dtype
    if s.model.family.serving.fp32_states:
        return "fp32"
    return s.dtype if s.behaviour.state_dtype == "model" else s.behaviour.state_dtype


def _aligned(s: Settings, state: int, per_token: int) -> int:
    """Return the tokens of a block that is at least as large as a state."""
    least = max(s.block, s.behaviour.latent_block if "kl" in s.model.axes() else 16)
    return max(s.block, least * -(-state // (least * per_token)))


def _group(s: Settings, k: _Kind, block: int, states: int) -> CacheGroup:
    if k.kind == "state":
        return CacheGroup("state", 1, k.page, s.longest, k.page, states=states)
    return CacheGroup(k.kind, 1, k.page * block, block, k.page * block, k.window)


def _equal_pages(s: Settings, groups: list[CacheGroup]) -> list[CacheGroup]:
    """Return the groups with pages of one size: states are padded, and smaller pages get more tokens if they divide the
    largest page, else padding."""
    largest = max(g.page for g in groups)
    out: list[CacheGroup] = []
    for g in groups:
        if g.page == largest or g.kind == "state":
            out.append(g._replace(page=largest))
            continue
        if not s.behaviour.mixes_pages:
            raise refused(
                "profile",
                f"{s.engine.name} cannot have caches of {g.page:,} and {largest:,} bytes a block in one pool; "
                "vllm-0.33 can",
            )
        if largest % g.page == 0:
            out.append(g._replace(page=largest, own=largest, block=g.block * (largest // g.page)))
        else:
            out.append(g._replace(page=largest))
    return out


def _equal_groups(layers: list[CacheGroup], in_stage: list[bool]) -> tuple[CacheGroup, ...]:
    """Return groups with equally many layers: as many as the smallest kind has, or the largest if that is less than 1.5
    times as many.

    The last group of a kind may be short of layers. If a kind has n groups, each has every n-th of its layers, so that
    all pipeline stages have equally many of each.
    """
    kinds: dict[CacheGroup, list[bool]] = {}
    for layer, mine in zip(layers, in_stage, strict=True):
        kinds.setdefault(layer, []).append(mine)
    fewest, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = most if most < fewest * 1.5 else fewest
    out: list[CacheGroup] = []
    for kind, mine in kinds.items():
        groups = -(-len(mine) // size)
        out += [kind._replace(layers=size if all(in_stage) else sum(mine[i::groups])) for i in range(groups)]
    return tuple(out)
