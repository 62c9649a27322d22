"""The cache of every layer of a model while it generates, as data.

A layer's cache has parts. Some grow by one entry per token (or per several tokens), for a window of the last tokens, or
for the tokens an encoder has read. States have a size that does not depend on the number of tokens. How entries are
stored and how much room is reserved is up to the framework; the elements of an entry are up to the model.

Source: transformers 5.24 cache_utils.py DynamicCache and the modeling files that the rows name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Literal

from memplan.core.errors import UnsupportedModelError
from memplan.core.records import NamedTuple
from memplan.core.units import ITEMSIZE
from memplan.models.configs.gemma import REUSED
from memplan.models.family_facts import Cache
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

# What an entry stands for. "token": a token, or `every` tokens. "rest": a token of an entry that is not full yet.
# "source": a token that an encoder has read. "sequence": the entire sequence.
Per = Literal["token", "rest", "source", "sequence"]
# Dtype of an entry. "cache": as the user asks (`kv_cache_dtype`), by default the model's dtype. "model": always the
# model's dtype. "fp32": always fp32.
StoredIn = Literal["cache", "model", "fp32"]
# How latent attention is cached: as its latent and the key's rotated part, or as keys and values expanded from them.
Latent = Literal["latent", "expanded"]


class CachePart(NamedTuple):
    """One tensor that a layer caches for a sequence.

    name      the field's term for it
    shape     an entry's shape, in letters of the glossary
    elements  numbers in one entry
    per       what an entry stands for
    every     tokens per entry
    heads     equal shares into which tensor parallelism can cut an entry; 0 if every rank keeps all of it
    dtype     how it is stored
    windowed  whether only the entries of the layer's window are kept
    """

    name: str
    shape: str
    elements: int
    per: Per = "token"
    every: int = 1
    heads: int = 0
    dtype: StoredIn = "cache"
    windowed: bool = True

    def on(self, tp: int) -> int:
        """Return an entry's elements on each of `tp` ranks. If heads are fewer than ranks, ranks hold copies."""
        return self.elements // self.heads * -(-self.heads // tp) if self.heads else self.elements

    def bytes_of(self, tokens: int, window: int | None, source: int, dtype: str, cache_dtype: str, tp: int = 1) -> int:
        """Return the bytes of `tokens` tokens with that `window`, and of `source` tokens read by an encoder."""
        return self.entries(tokens, window, source) * self.on(tp) * ITEMSIZE[self.stored_in(dtype, cache_dtype)]

    def entries(self, tokens: int, window: int | None, source: int) -> int:
        """Return the number of entries of a sequence of `tokens`, at most `window` of them if it is windowed."""
        if self.per == "token" and self.windowed and window is not None:
            tokens = min(tokens, window)
        counts = {"token": tokens // self.every, "rest": tokens % self.every, "source": source, "sequence": 1}
        return counts[self.per]

    def stored_in(self, dtype: str, cache_dtype: str) -> str:
        """Return its dtype if the model computes in `dtype` and the user asks for `cache_dtype`."""
        return {"cache": cache_dtype, "model": dtype, "fp32": "fp32"}[self.dtype]


class LayerCache(NamedTuple):
    """The cache of one layer for one sequence.

    kind    attention, sliding, chunked, latent, compressed, state or cross; "" if it caches nothing
    parts   its tensors
    window  tokens that its attention sees, including the newest; None for all
    source  where this was read
    """

    kind: str
    parts: tuple[CachePart, ...] = ()
    window: int | None = None
    source: str = ""

    @property
    def last(self) -> int | None:
        """The tokens kept between steps: the window without the newest, which comes with the step; None for all."""
        return None if self.window is None else max(0, self.window - 1)

    @property
    def token_elements(self) -> int:
        """Elements cached for every token in the layer's window."""
        return sum(p.elements // p.every for p in self.parts if p.per == "token")

    def bytes_of(self, tokens: int, dtype: str = "bf16", cache_dtype: str = "", source: int = 0, tp: int = 1) -> int:
        """Return the bytes of a sequence of `tokens` on each of `tp` ranks, with `source` tokens read by an encoder."""
        stored = cache_dtype or dtype
        return sum(p.bytes_of(tokens, self.last, source, dtype, stored, tp) for p in self.parts)


@lru_cache(maxsize=512)
def caches(model: ModelSpec, latent: Latent = "latent") -> tuple[LayerCache, ...]:
    """Return what each layer of the model's decoder caches, from first to last.

    `latent`: how latent attention is cached. transformers 5 and serving engines keep the latent. transformers 4, code
    modelled on it, and engines without kernels for the latent keep expanded keys and values.

    Raises UnsupportedModelError for an encoder, which cannot generate.
    """
    if model.objectives[0] not in ("causal_lm", "seq2seq_lm"):
        raise UnsupportedModelError(
            f"model_type: {model.model_type} is an encoder, which generates nothing", "model_type"
        )
    axes = model.axes()
    if model.is_encoder_decoder:
        return (_encoder_decoder(model, axes),) * axes_of_decoder(axes)
    cache_of = _KINDS[model.family.generation.cache]
    return tuple(
        LayerCache("") if keeps_nothing(layer) else cache_of(model, axes, layer, latent) for layer in model.layers
    )


def bytes_per_token(layers: tuple[LayerCache, ...], dtype: str = "bf16", cache_dtype: str = "", tp: int = 1) -> int:
    """Return the bytes that one more token adds on each of `tp` ranks while no window is full.

    An entry of several tokens counts by its share, rounded down.
    """
    stored = cache_dtype or dtype
    return sum(
        p.on(tp) * ITEMSIZE[p.stored_in(dtype, stored)] // p.every for c in layers for p in c.parts if p.per == "token"
    )


def bytes_of(
    layers: tuple[LayerCache, ...],
    tokens: int,
    dtype: str = "bf16",
    cache_dtype: str = "",
    source: int = 0,
    tp: int = 1,
) -> int:
    """Return the bytes of a sequence of `tokens` on each of `tp` ranks, with `source` tokens read by an encoder."""
    return sum(c.bytes_of(tokens, dtype, cache_dtype, source, tp) for c in layers)


def keeps_nothing(layer: Layer) -> bool:
    """Return whether a layer has no mixer, or reads another layer's cache."""
    return layer.mixer in (REUSED, "none") or (layer.k == 0 and layer.mixer == "attention")


_Axes = Mapping[str, int]


def axes_of_decoder(axes: _Axes) -> int:
    """Return the number of layers in an encoder-decoder's decoder."""
    return axes["D"] if "D" in axes else axes["D1"] + axes["D2"]


def keys_and_values(k: int, d: int, dv: int, per: Per = "token") -> tuple[CachePart, ...]:
    """Return `k` heads of keys of width `d` and of values of width `dv`."""
    return (CachePart("keys", "k d", k * d, per, heads=k), CachePart("values", "k dv", k * dv, per, heads=k))


def _attention(m: ModelSpec, axes: _Axes, layer: Layer, _: Latent) -> LayerCache:
    """Return the keys and values of multi-head, grouped or multi-query attention."""
    parts = keys_and_values(layer.k, axes["d"], axes.get("dv", axes["d"]))
    source = "transformers 5.24 cache_utils.py DynamicLayer, DynamicSlidingWindowLayer"
    if not layer.sliding:
        return LayerCache("attention", parts, None, source)
    return LayerCache("sliding", parts, m.sliding_window, source)


def _chunked(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    cache = _attention(m, axes, layer, kept)
    return cache._replace(kind="chunked") if layer.sliding else cache


def _gemma4(m: ModelSpec, axes: _Axes, layer: Layer, _: Latent) -> LayerCache:
    """Heads have another width without a window. Keys that are also values are cached twice, with different norms."""
    width = axes["d"] if layer.sliding else axes["dg"]
    source = "transformers 5.24 models/gemma4/modeling_gemma4.py Gemma4TextAttention.forward"
    parts = keys_and_values(layer.k, width, width)
    return LayerCache("sliding" if layer.sliding else "attention", parts, _window(m, layer), source)


def _window(m: ModelSpec, layer: Layer) -> int | None:
    return m.sliding_window if layer.sliding else None


def _cross_layers(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Llama 3.2's cross-attention layers cache keys and values of the tower's features."""
    if layer.mixer != "cross_attention":
        return _attention(m, axes, layer, kept)
    source = "transformers 5.24 models/mllama/modeling_mllama.py MllamaTextCrossAttention.forward"
    return LayerCache("cross", keys_and_values(layer.k, axes["d"], axes["d"], "source"), None, source)


def _encoder_decoder(m: ModelSpec, axes: _Axes) -> LayerCache:
    """A decoder layer also caches keys and values of the encoder's output, which are computed once."""
    own = keys_and_values(m.num_attention_heads, axes["d"], axes["d"])
    cross = tuple(
        p._replace(name=f"cross {p.name}")
        for p in keys_and_values(m.num_attention_heads, axes["d"], axes["d"], "source")
    )
    return LayerCache("cross", (*own, *cross), None, "transformers 5.24 cache_utils.py EncoderDecoderCache")


def _latent(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Multi-head latent attention, with an indexer's keys if the layer has its own indexer."""
    a, rank, rotated = m.num_attention_heads, axes["kl"], axes["klr"] - axes["kl"]
    if kept == "expanded":
        parts: tuple[CachePart, ...] = keys_and_values(a, axes["d"], axes["dv"])
        source = "transformers 4.51.3 models/deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention.forward"
    else:
        parts = (CachePart("latent", "kl", rank), CachePart("rotated keys", "rot", rotated))
        source = "transformers 5.24 models/deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention.forward, and alike"
    if "id" in axes and layer.mixer != "shared":
        parts = (*parts, CachePart("index keys", "id", axes["id"], dtype="model"))
        source = "transformers 5.24 cache_utils.py DynamicIndexedLayer"
    return LayerCache("latent", parts, None, source)


def _indexed_blocks(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """MiniMax-M3 caches keys and values, and a head of index keys in layers that select blocks of keys."""
    cache = _attention(m, axes, layer, kept)
    if layer.mixer == "attention":
        return cache
    source = "transformers 5.24 models/minimax_m3_vl/modeling_minimax_m3_vl.py MiniMaxM3VLSparseCacheLayer"
    return cache._replace(parts=(*cache.parts, CachePart("index keys", "di", axes["di"], dtype="model")), source=source)


def _compressed(m: ModelSpec, axes: _Axes, layer: Layer, _: Latent) -> LayerCache:
    """DeepSeek V4 caches a window of keys, which are also the values, and one compressed entry per several tokens.

    It also caches both compressors' projections and gates of tokens that do not fill an entry yet, and of the previous
    entry the half that overlaps the next.
    """
    d, kind = axes["d"], layer.mixer
    window = CachePart("keys that are values", "d", d)
    if kind == "sliding":
        parts: tuple[CachePart, ...] = (window, window._replace(name="values"))
        return LayerCache("sliding", parts, m.sliding_window, f"{_V4} DeepseekV4Attention.forward")
    if kind == "heavy":
        rate = axes["rh"]
        entry = CachePart("compressed keys", "d", d, every=rate, windowed=False)
        waiting = CachePart("tokens not compressed yet", "2 d", 2 * d, "rest", rate, dtype="model")
        return LayerCache("compressed", (window, entry, waiting), m.sliding_window, f"{_V4} DeepseekV4HCACache")
    rate, index = axes["rc"], axes["id"]
    pair = d + index
    return LayerCache(
        "compressed",
        (
            window,
            CachePart("compressed keys", "d", d, every=rate, windowed=False),
            CachePart("index keys", "id", index, every=rate, windowed=False, dtype="model"),
            CachePart("tokens not compressed yet", "4 d+id", 4 * pair, "rest", rate, dtype="model"),
            CachePart("the half that overlaps", "rc d+id", rate * pair, "sequence", dtype="model"),
            CachePart("its gates", "rc d+id", rate * pair, "sequence", dtype="fp32"),
        ),
        m.sliding_window,
        f"{_V4} DeepseekV4CSACache",
    )


_V4 = "transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py"


def _convolved(channels: int, kernel: int, heads: int, what: str = "") -> CachePart:
    """Return the last `kernel` columns of the convolved channels."""
    return CachePart(
        f"{CONVOLUTION}{what}", "channels kernel", channels * kernel, "sequence", heads=heads, dtype="model"
    )


def _state(shape: str, numbers: int, heads: int) -> CachePart:
    return CachePart("state", shape, numbers, "sequence", heads=heads, dtype="fp32")


def _mamba1(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Mamba 1: `kernel` columns of every channel, and a state of `mn` numbers per channel."""
    if layer.mixer == "attention":
        return _attention(m, axes, layer, kept)
    inner, n = axes["inner"], axes["mn"]
    parts = (_convolved(inner, axes["kernel"], inner), _state("inner mn", inner * n, inner))
    return LayerCache("state", parts, None, "transformers 5.24 models/mamba/modeling_mamba.py, and alike")


def _mamba2(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Mamba 2: also convolves the groups' projections; a head's state is `mp` by `mn`."""
    if layer.mixer == "attention":
        return _attention(m, axes, layer, kept)
    heads, groups, n = axes["mh"], axes["mg"], axes["mn"]
    parts = (
        _convolved(axes["inner"], axes["kernel"], heads),
        _convolved(2 * groups * n, axes["kernel"], groups, " of groups"),
        _state("mh mp mn", heads * axes["mp"] * n, heads),
    )
    return LayerCache("state", parts, None, "transformers 5.24 models/mamba2/modeling_mamba2.py, and alike")


def _side_by_side(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Falcon-H1: keys and values, and Mamba 2's states, in every layer."""
    states = _mamba2(m, axes, layer, kept)
    return states._replace(parts=(*_attention(m, axes, layer, kept).parts, *states.parts))


def _convolution(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """LFM2: `kernel` columns of every channel, and no state."""
    if layer.mixer == "attention":
        return _attention(m, axes, layer, kept)
    h = axes["h"]
    part = _convolved(h, axes["kernel"], h)
    return LayerCache("state", (part,), None, "transformers 5.24 models/lfm2/modeling_lfm2.py")


def _delta(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Gated delta rules: a matrix for each value head. Kimi's attention layers are latent."""
    if layer.mixer == "attention":
        return _latent(m, axes, layer, kept) if "kl" in axes else _attention(m, axes, layer, kept)
    heads, width, values = axes["lv"], axes["ldk"], axes.get("ldv", axes["ldk"])
    value_channels = heads * values
    parts = (
        _convolved(value_channels, axes["kernel"], heads),
        _convolved(axes["convolved"] - value_channels, axes["kernel"], axes.get("lk", heads), " of keys"),
        _state("lv ldk ldv", heads * width * values, heads),
    )
    return LayerCache("state", parts, None, "transformers 5.24 models/qwen3_next/modeling_qwen3_next.py, and alike")


CONVOLUTION = "convolution's last tokens"  # prefix of the names of the convolutions' parts
_CacheOf = Callable[[ModelSpec, _Axes, Layer, Latent], LayerCache]


_KINDS: dict[Cache, _CacheOf] = {
    "attention": _attention,
    "chunked": _chunked,
    "compressed": _compressed,
    "convolution": _convolution,
    "cross_layers": _cross_layers,
    "delta": _delta,
    "indexed_blocks": _indexed_blocks,
    "latent": _latent,
    "mamba-1": _mamba1,
    "mamba-2": _mamba2,
    "side_by_side": _side_by_side,
    "two_widths": _gemma4,
}
