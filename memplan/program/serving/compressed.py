"""DeepSeek V4 in vLLM: the groups of its caches, of unlike pages, and what its attention has room for.

A layer keeps the last tokens of a window; beside them, where it compresses, one entry for so many tokens and what its
compressor has not compressed yet, and where entries are chosen from an indexer's keys and what its own compressor has.
Caches whose blocks have as many tokens and that see as much are in one group, which stays whole where a layer has
pages of several sizes; the others are parted to have about as many layers as it.

Source: vllm 0.33.0 models/deepseek_v4/attention.py get_kv_cache_spec, compressor.py CompressorStateCache,
v1/attention/backends/mla/sparse_swa.py DeepseekV4SWACache, v1/core/kv_cache_planning.py _get_packed_kv_cache_groups.
"""

from __future__ import annotations

from collections.abc import Mapping

from memplan.program.serving.pool import Group
from memplan.program.serving.settings import Settings

MODEL_TYPE = "deepseek_v4"
_ALIGNED = 576  # bytes that a page is a multiple of
_LATENT, _INDEX = 584, 132  # bytes of a token: 448 in fp8, 64 in bf16 and 8 scales; 128 in fp8 and a scale
_BLOCK, _WINDOW_BLOCK = 256, 64
_STATES = {"sparse": 4, "heavy": 8}  # tokens of a compressor's block
_CHUNK = 4  # requests whose entries are gathered at once


def _page(bytes_: int) -> int:
    return -(-bytes_ // _ALIGNED) * _ALIGNED


def groups_of(s: Settings) -> tuple[Group, ...]:
    """The groups of the whole model, with the pages of the stage's layers. A page here is that of all of them."""
    axes, kinds = s.model.axes(), [layer.mixer for layer in s.model.layers]
    here = [s.stage.first <= i < s.stage.last for i in range(len(kinds))]
    d, chosen, window = axes["d"], axes["id"], s.model.sliding_window or 0
    rates = {"sparse": axes["rc"], "heavy": axes["rh"]}
    entries = {kind: _page(_BLOCK // rate * _LATENT) for kind, rate in rates.items()}
    entries["sparse"] += _page(_BLOCK // rates["sparse"] * _INDEX)
    # Keys and gates in fp32, twice as many where an entry overlaps the next.
    waiting = {"sparse": _page(_STATES["sparse"] * 4 * d * 4) + _page(_STATES["sparse"] * 4 * chosen * 4)}
    waiting["heavy"] = _page(_STATES["heavy"] * 2 * d * 4)
    sees = {"sparse": 2 * rates["sparse"], "heavy": rates["heavy"]}
    counts = {kind: kinds.count(kind) for kind in rates}
    alike = [counts["sparse"]] if len(set(counts.values())) == 1 else []  # entries' own group is a pattern then too
    repeats = _repeats([len(kinds), *(n for n in counts.values() if n), *alike], counts["sparse"])
    pages = [entries.get(kind, 0) for kind in kinds]
    found = [_group("full", _BLOCK, 0, [(page, mine) for page, mine in zip(pages, here, strict=True) if page])]
    every = [(_page(_WINDOW_BLOCK * _LATENT), mine) for mine in here]
    found += _split("sliding", _WINDOW_BLOCK, window, every, repeats)
    for kind in rates:
        layers = [(waiting[kind], mine) for of, mine in zip(kinds, here, strict=True) if of == kind]
        found += _split("sliding", _STATES[kind], sees[kind], layers, repeats)
    return tuple(found)


def _repeats(counts: list[int], least: int) -> int:
    """Layers of a group that pad the least, the more where as much. Source: _approximate_gcd."""
    sizes = range(max(1, least), max(counts) + 1)
    return min(sizes, key=lambda size: (sum(-n % size for n in counts), -size))


def _split(kind: str, block: int, window: int, layers: list[tuple[int, bool]], repeats: int) -> list[Group]:
    number = -(-len(layers) // repeats)
    return [_group(kind, block, window, layers[i::number]) for i in range(number)]


def _group(kind: str, block: int, window: int, layers: list[tuple[int, bool]]) -> Group:
    page = sum(page for page, mine in layers if mine)
    return Group(kind, 1, page, block, page, window)


def room_of(s: Settings) -> Mapping[str, int]:
    """Axes of the bytes that attention reserves for itself, and of its heads, which a kernel has 64 or 128 of.

    Source: vllm 0.33.0 models/deepseek_v4/nvidia/flashmla.py forward_mqa, get_padded_num_q_heads;
    model_executor/layers/sparse_attn_indexer.py, v1/attention/backends/mla/indexer.py get_max_prefill_buffer_size.
    """
    axes, window = s.model.axes(), s.model.sliding_window or 0
    heads = -(-s.model.num_attention_heads // s.tp)
    entries = -(-s.longest // axes["rc"])
    chosen = -(-(s.model.whole("index_topk") + window) // 128) * 128
    gathered = _CHUNK * (entries + window + s.steps) * axes["d"] * 2 + s.steps * (chosen + 1) * 4
    indexed = _GATHERED * s.longest // axes["rc"] * _INDEX + _TOP_K
    return {"qp": 64 if heads <= 64 else 128, "reserved": max(gathered, indexed), "tk": s.model.whole("index_topk")}


_GATHERED, _TOP_K = 40, 2**20  # sequences whose keys are gathered at most, and a scratch to choose by
