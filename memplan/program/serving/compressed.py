"""DeepSeek V4 in vLLM: the groups of its caches, whose pages differ in size, and the workspaces of its attention.

Every layer caches the last tokens of a window. A compressing layer also caches one entry for several tokens, and the
tokens its compressor has not compressed yet; if entries are selected, also an indexer's keys and the tokens that the
indexer's compressor has not compressed yet. Caches with equal blocks and windows form a group. The group of entries,
whose layers have pages of several sizes, stays whole; the others are split into groups of about as many layers.

Source: vllm 0.33.0 models/deepseek_v4/attention.py get_kv_cache_spec, compressor.py CompressorStateCache,
v1/attention/backends/mla/sparse_swa.py DeepseekV4SWACache, v1/core/kv_cache_planning.py _get_packed_kv_cache_groups.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.program.serving.pool import CacheGroup
from memplan.program.serving.settings import Settings

_ALIGNMENT = 576  # bytes: pages are multiples of it
_LATENT, _INDEX = 584, 132  # bytes of a token: 448 in fp8, 64 in bf16 and 8 scales; 128 in fp8 and a scale
_BLOCK, _WINDOW_BLOCK = 256, 64
_STATES = {"sparse": 4, "heavy": 8}  # tokens of a compressor's block
_CHUNK = 4  # requests whose entries are gathered at once


def _page(bytes_: int) -> int:
    return -(-bytes_ // _ALIGNMENT) * _ALIGNMENT


def groups_of(s: Settings) -> tuple[CacheGroup, ...]:
    """Return the groups of the entire model's layers. A page has the bytes of all of a group's layers on the stage."""
    axes, kinds = s.model.axes(), [layer.mixer for layer in s.model.layers]
    in_stage = [s.stage.first <= i < s.stage.last for i in range(len(kinds))]
    d, chosen, window = axes["d"], axes["id"], s.model.sliding_window or 0
    rates = {"sparse": axes["rc"], "heavy": axes["rh"]}
    entries = {kind: _page(_BLOCK // rate * _LATENT) for kind, rate in rates.items()}
    entries["sparse"] += _page(_BLOCK // rates["sparse"] * _INDEX)
    # Keys and gates in fp32, twice as many if an entry overlaps the next.
    waiting = {"sparse": _page(_STATES["sparse"] * 4 * d * 4) + _page(_STATES["sparse"] * 4 * chosen * 4)}
    waiting["heavy"] = _page(_STATES["heavy"] * 2 * d * 4)
    sees = {"sparse": 2 * rates["sparse"], "heavy": rates["heavy"]}
    counts = {kind: kinds.count(kind) for kind in rates}
    equal = [counts["sparse"]] if len(set(counts.values())) == 1 else []  # then the group of entries counts too
    repeats = _repeats([len(kinds), *(n for n in counts.values() if n), *equal], counts["sparse"])
    pages = [entries.get(kind, 0) for kind in kinds]
    groups = [_group("full", _BLOCK, 0, [(page, mine) for page, mine in zip(pages, in_stage, strict=True) if page])]
    windows = [(_page(_WINDOW_BLOCK * _LATENT), mine) for mine in in_stage]
    groups += _split("sliding", _WINDOW_BLOCK, window, windows, repeats)
    for kind in rates:
        layers = [(waiting[kind], mine) for mixer, mine in zip(kinds, in_stage, strict=True) if mixer == kind]
        groups += _split("sliding", _STATES[kind], sees[kind], layers, repeats)
    return tuple(groups)


def _repeats(counts: list[int], least: int) -> int:
    """Return the number of layers per group with the least padding, or the largest such number.

    Source: _approximate_gcd.
    """
    sizes = range(max(1, least), max(counts) + 1)
    return min(sizes, key=lambda size: (sum(-n % size for n in counts), -size))


def _split(kind: str, block: int, window: int, layers: list[tuple[int, bool]], repeats: int) -> list[CacheGroup]:
    number = -(-len(layers) // repeats)
    return [_group(kind, block, window, layers[i::number]) for i in range(number)]


def _group(kind: str, block: int, window: int, layers: list[tuple[int, bool]]) -> CacheGroup:
    page = sum(page for page, mine in layers if mine)
    return CacheGroup(kind, 1, page, block, page, window)


def room_of(s: Settings) -> Mapping[str, int]:
    """Return the axes of attention: bytes of its workspaces, its heads padded to 64 or 128, and the entries it selects.

    Source: vllm 0.33.0 models/deepseek_v4/nvidia/flashmla.py forward_mqa, get_padded_num_q_heads;
    model_executor/layers/sparse_attn_indexer.py, v1/attention/backends/mla/indexer.py get_max_prefill_buffer_size.
    """
    axes, window = s.model.axes(), s.model.sliding_window or 0
    heads = -(-s.model.num_attention_heads // s.tp)
    entries = -(-s.longest // axes["rc"])
    chosen = -(-(s.model.config_int("index_topk") + window) // 128) * 128
    gathered = _CHUNK * (entries + window + s.steps) * axes["d"] * 2 + s.steps * (chosen + 1) * 4
    indexed = _GATHERED * s.longest // axes["rc"] * _INDEX + _TOP_K
    return {
        "qp": 64 if heads <= 64 else 128,
        "reserved": max(gathered, indexed),
        "tk": s.model.config_int("index_topk"),
    }


_GATHERED, _TOP_K = 40, 2**20  # most sequences whose keys are gathered at once, and bytes of scratch to select entries
