"""vLLM's pool: layers with the same kind of cache in groups of equal size, whose blocks lie over each other.

Source: vllm 0.33.0 v1/core/kv_cache_planning.py, v1/kv_cache_interface.py, platforms/interface.py
_align_hybrid_block_size; what 0.11 does otherwise is in the engine's rows.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from memplan.catalogue.inference.caches import CONVOLUTION, LayerCache, Part, caches
from memplan.core.errors import SpecError
from memplan.core.units import ITEMSIZE
from memplan.program.serving import compressed
from memplan.program.serving.draft import ahead_of, layers_of
from memplan.program.serving.pool import Blocks, Group, block_bytes
from memplan.program.serving.settings import Settings

_FP8_LATENT = 656  # bytes of a sparse latent: 512 in fp8, 4 scales in fp32 and 64 rotated ones in bf16
_FP8_INDEX = 4  # bytes of the scale of an index key in fp8


class _Kind(NamedTuple):
    """What decides which group a layer's cache is in."""

    kind: str
    page: int  # bytes of a token, or of a whole state
    window: int = 0


def pool(s: Settings, available: int) -> Blocks:
    """What `available` bytes on each rank become."""
    groups = groups_of(s)
    return Blocks(
        groups,
        max(0, available) // block_bytes(groups),
        _in_flight(s) * s.steps,
        s.longest,
        s.words["group_tokens"],
        int(s.words["null_block"]),
        ahead_of(s),
    )


def _in_flight(s: Settings) -> int:
    """Steps under way at once: one for every stage, and one more where the next is scheduled ahead; 0.11 counts one."""
    steps = int(s.words["in_flight"])
    return steps if steps == 1 else s.ranks.pp - 1 + steps


def groups_of(s: Settings) -> tuple[Group, ...]:
    """The groups of layers, with the tokens and bytes of their blocks, and how many of them the stage has. Groups are
    those of the whole model.

    Raises SpecError for a model whose caches the version does not lay out together, or that has none.
    """
    if s.model.model_type == compressed.MODEL_TYPE:
        return compressed.groups_of(s)
    every = caches(s.model)
    layers = [c for c in (*every, *layers_of(s)) if c.parts]
    here = [s.stage.first <= i < s.stage.last for i, c in enumerate(every) if c.parts]
    here += [True] * (len(layers) - len(here))
    kinds = [_kind(s, c) for c in layers]
    if not s.serving.hybrid_cache and len(set(kinds)) > 1:
        kinds = [k._replace(kind="full", window=0) if k.kind in ("sliding", "chunked") else k for k in kinds]
    attention = [k for k in kinds if k.kind != "state"]
    states = [k for k in kinds if k.kind == "state"]
    block = s.block
    if states and attention:
        per_token = max(k.page for k in attention)
        block = _aligned(s, max(k.page for k in states), per_token)
    made = [_group(s, k, block, states=2 if s.serving.prefix_caching else 1) for k in kinds]
    whole = {(g.kind, g.window) for g in made}
    if len(whole) == 1:  # one table for all, whatever the widths of their heads
        page = sum(g.page for g, mine in zip(made, here, strict=True) if mine)
        return (made[0]._replace(layers=1, page=page, own=page),)
    return _equal(_one_size(s, made), here)


def _kind(s: Settings, c: LayerCache) -> _Kind:
    if c.kind == "state":
        return _Kind("state", sum(_state_bytes(s, p) for p in c.parts))
    kind = {"sliding": "sliding", "chunked": "chunked"}.get(c.kind, "full")
    return _Kind(kind, _token_bytes(s, c), c.window or 0)


def _state_bytes(s: Settings, p: Part) -> int:
    """A state on one rank; a convolution keeps one column less than its kernel."""
    kernel = s.model.axes()["kernel"]
    elements = p.on(s.tp)
    if p.name.startswith(CONVOLUTION):
        return elements // kernel * (kernel - 1) * ITEMSIZE[s.dtype]
    return elements * ITEMSIZE[_state_dtype(s)]


def _state_dtype(s: Settings) -> str:
    """Nemotron-H's and Kimi's states are in fp32, and those of which the config says so."""
    said = s.model.config.get("mamba_ssm_dtype") or s.model.config.get("mamba_ssm_cache_dtype")
    named = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(str(said))
    if named is not None:
        return named
    if s.model.model_type in ("nemotron_h", "kimi_linear", "kimi_k3"):
        return "fp32"
    return s.dtype if s.words["state_dtype"] == "model" else s.words["state_dtype"]


def _token_bytes(s: Settings, c: LayerCache) -> int:
    """A token in one layer on one rank."""
    index = sum(p.elements + _FP8_INDEX for p in c.parts if p.name == "index keys")
    kept = [p for p in c.parts if p.name != "index keys"]
    packed = s.packed or (s.words["packs_latents"] and s.serving.cache_dtype == "auto")
    if index and c.kind == "latent" and packed:
        return _FP8_LATENT + index
    return sum(s.cache_bytes(p) for p in kept) + index


def _aligned(s: Settings, state: int, per_token: int) -> int:
    """The tokens of a block that is no smaller than a state."""
    least = max(s.block, s.words["latent_block"] if "kl" in s.model.axes() else 16)
    return max(s.block, least * -(-state // (least * per_token)))


def _group(s: Settings, k: _Kind, block: int, states: int) -> Group:
    if k.kind == "state":
        return Group("state", 1, k.page, s.longest, k.page, states=states)
    return Group(k.kind, 1, k.page * block, block, k.page * block, k.window)


def _one_size(s: Settings, made: list[Group]) -> list[Group]:
    """Pages of one size: states are padded, smaller pages have more tokens, or are padded where none fit evenly."""
    largest = max(g.page for g in made)
    out: list[Group] = []
    for g in made:
        if g.page == largest or g.kind == "state":
            out.append(g._replace(page=largest))
            continue
        if not s.words["mixes_pages"]:
            raise SpecError(
                f"profile: {s.engine.name} does not lay caches of {g.page:,} and {largest:,} bytes a block together; "
                "vllm-0.33 does",
                "profile",
            )
        if largest % g.page == 0:
            out.append(g._replace(page=largest, own=largest, block=g.block * (largest // g.page)))
        else:
            out.append(g._replace(page=largest))
    return out


def _equal(made: list[Group], here: list[bool]) -> tuple[Group, ...]:
    """Groups of equally many layers: the fewest that a kind has, or the most, where that is less than half as many
    again. The last group of a kind may be short of some. Of n groups each has every n-th layer of its kind, so that the
    stages of a pipeline have as many of each."""
    kinds: dict[Group, list[bool]] = {}
    for g, mine in zip(made, here, strict=True):
        kinds.setdefault(g, []).append(mine)
    fewest, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = most if most < fewest * 1.5 else fewest
    found: list[Group] = []
    for g, layers in kinds.items():
        groups = -(-len(layers) // size)
        found += [g._replace(layers=size if all(here) else sum(layers[i::groups])) for i in range(groups)]
    return tuple(found)


def requested(s: Settings, total: int) -> int:
    """Bytes of the card that the engine takes for itself. Source: v1/worker/utils.py request_memory."""
    return math.ceil(total * (s.serving.memory_utilization or 1))
