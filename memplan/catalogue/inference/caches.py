"""What every layer of a model keeps from token to token while it generates, as data.

A layer keeps parts: tensors that grow by an entry for every token (or for so many), for a window of the last tokens, or
for what an encoder has read; and states, which are as large after one token as after a million. How entries are stored
is the framework's business, and so is how much room it sets aside for them; how many numbers an entry has is the
model's.

Source: transformers 5.24 cache_utils.py DynamicCache and the modeling files that the rows name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Literal, NamedTuple

from memplan.core.errors import UnsupportedModelError
from memplan.core.units import ITEMSIZE
from memplan.models.configs.gemma import REUSED
from memplan.models.layers import Layer
from memplan.models.model import ModelSpec

# What an entry is of: a token, or `every` tokens; a token that does not fill such an entry yet; a token that an encoder
# has read; the whole sequence.
Per = Literal["token", "rest", "source", "sequence"]
# In what an entry is stored: "cache" as the user asks (`kv_cache_dtype`), the model's own dtype where nothing is asked;
# "model" always in the model's own dtype; "fp32" always so.
StoredIn = Literal["cache", "model", "fp32"]
# How latent attention is kept: as its latent and the rotated part of the key, or as the keys and values made of them.
Latent = Literal["latent", "expanded"]


class Part(NamedTuple):
    """One tensor that a layer keeps of a sequence.

    name      what it is, in the words of the field
    shape     an entry's shape, in letters of the glossary
    elements  the numbers of one entry
    per       what an entry is of
    every     one entry for so many tokens
    heads     how many equal shares tensor parallelism may cut an entry into; 0 where every rank keeps all of it
    dtype     in what it is stored
    windowed  whether only the layer's window of entries is kept
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
        """The numbers of an entry on each of `tp` ranks. Heads that are fewer than ranks are there several times."""
        return self.elements // self.heads * -(-self.heads // tp) if self.heads else self.elements

    def bytes_of(self, tokens: int, window: int | None, source: int, dtype: str, cache_dtype: str, tp: int = 1) -> int:
        """Bytes that `tokens` take, with a `window` of so many, and `source` tokens read by an encoder."""
        return self.entries(tokens, window, source) * self.on(tp) * ITEMSIZE[self.stored_in(dtype, cache_dtype)]

    def entries(self, tokens: int, window: int | None, source: int) -> int:
        """How many entries there are of a sequence of `tokens`, of which a window keeps so many."""
        if self.per == "token" and self.windowed and window is not None:
            tokens = min(tokens, window)
        found = {"token": tokens // self.every, "rest": tokens % self.every, "source": source, "sequence": 1}
        return found[self.per]

    def stored_in(self, dtype: str, cache_dtype: str) -> str:
        """Its dtype where the model computes in `dtype` and the cache is asked for in `cache_dtype`."""
        return {"cache": cache_dtype, "model": dtype, "fp32": "fp32"}[self.dtype]


class LayerCache(NamedTuple):
    """What one layer keeps of a sequence.

    kind    what mixes tokens: attention, sliding, chunked, latent, compressed, state, cross; "" where it keeps nothing
    parts   its tensors
    window  the tokens that its attention sees, the newest among them; None for all. Between steps it keeps one less,
            `last`, since the newest comes with the step
    source  where it is read
    """

    kind: str
    parts: tuple[Part, ...] = ()
    window: int | None = None
    source: str = ""

    @property
    def last(self) -> int | None:
        """The tokens that are kept between steps; None for all."""
        return None if self.window is None else max(0, self.window - 1)

    @property
    def token_elements(self) -> int:
        """Numbers that the layer keeps of every token, as long as that is in its window."""
        return sum(p.elements // p.every for p in self.parts if p.per == "token")

    @property
    def sequence_elements(self) -> int:
        """Numbers of its states: what it keeps of a sequence of any length."""
        return sum(p.elements for p in self.parts if p.per == "sequence")

    def bytes_of(self, tokens: int, dtype: str = "bf16", cache_dtype: str = "", source: int = 0, tp: int = 1) -> int:
        """Bytes of a sequence of `tokens` on each of `tp` ranks; an encoder has read `source` tokens."""
        kept = cache_dtype or dtype
        return sum(p.bytes_of(tokens, self.last, source, dtype, kept, tp) for p in self.parts)


@lru_cache(maxsize=512)
def caches(model: ModelSpec, latent: Latent = "latent") -> tuple[LayerCache, ...]:
    """What each layer of the model's decoder keeps, from the first to the last.

    `latent`: how latent attention is kept. transformers 5 and serving engines keep the latent; transformers 4 and what
    was written like it, and engines without kernels for it, keep expanded keys and values.

    Raises UnsupportedModelError for an encoder, which generates nothing.
    """
    model_type = model.model_type
    if model_type in _NO_DECODER:
        raise UnsupportedModelError(f"model_type: {model_type} is an encoder, which generates nothing", "model_type")
    axes = model.axes()
    if model_type in _ENCODER_DECODERS:
        return (_crossing(model, axes),) * axes_of_decoder(axes)
    of = _LATENT.get(model_type) or _OTHERS.get(model_type) or _attention
    return tuple(LayerCache("") if keeps_nothing(layer) else of(model, axes, layer, latent) for layer in model.layers)


def bytes_per_token(layers: tuple[LayerCache, ...], dtype: str = "bf16", cache_dtype: str = "", tp: int = 1) -> int:
    """Bytes that one further token adds on each of `tp` ranks as long as no window is full.

    An entry of several tokens counts by its share, rounded down.
    """
    kept = cache_dtype or dtype
    return sum(
        p.on(tp) * ITEMSIZE[p.stored_in(dtype, kept)] // p.every for c in layers for p in c.parts if p.per == "token"
    )


def bytes_of(
    layers: tuple[LayerCache, ...],
    tokens: int,
    dtype: str = "bf16",
    cache_dtype: str = "",
    source: int = 0,
    tp: int = 1,
) -> int:
    """Bytes that a sequence of `tokens` takes on each of `tp` ranks; an encoder has read `source` tokens."""
    return sum(c.bytes_of(tokens, dtype, cache_dtype, source, tp) for c in layers)


def keeps_nothing(layer: Layer) -> bool:
    """Whether a layer has no mixer, or reads what another keeps."""
    return layer.mixer in (REUSED, "none") or (layer.k == 0 and layer.mixer == "attention")


_NO_DECODER = frozenset(("bert", "roberta", "xlm-roberta", "vit"))
_ENCODER_DECODERS = frozenset(("t5", "whisper"))
_Axes = Mapping[str, int]


def axes_of_decoder(axes: _Axes) -> int:
    """How many layers an encoder-decoder's decoder has."""
    return axes["D"] if "D" in axes else axes["D1"] + axes["D2"]


def keys_and_values(k: int, d: int, dv: int, per: Per = "token") -> tuple[Part, ...]:
    """`k` heads of keys `d` wide and of values `dv` wide."""
    return (Part("keys", "k d", k * d, per, heads=k), Part("values", "k dv", k * dv, per, heads=k))


def _attention(m: ModelSpec, axes: _Axes, layer: Layer, _: Latent) -> LayerCache:
    """Multi-head, grouped and multi-query attention: keys and values of the key/value heads."""
    parts = keys_and_values(layer.k, axes["d"], axes.get("dv", axes["d"]))
    source = "transformers 5.24 cache_utils.py DynamicLayer, DynamicSlidingWindowLayer"
    if not layer.sliding:
        return LayerCache("attention", parts, None, source)
    return LayerCache("chunked" if m.model_type.startswith("llama4") else "sliding", parts, m.sliding_window, source)


def _gemma4(m: ModelSpec, axes: _Axes, layer: Layer, _: Latent) -> LayerCache:
    """Heads of another width where there is no window; keys that are values too are kept twice, normed differently."""
    width = axes["d"] if layer.sliding else axes["dg"]
    source = "transformers 5.24 models/gemma4/modeling_gemma4.py Gemma4TextAttention.forward"
    parts = keys_and_values(layer.k, width, width)
    return LayerCache("sliding" if layer.sliding else "attention", parts, _window(m, layer), source)


def _window(m: ModelSpec, layer: Layer) -> int | None:
    return m.sliding_window if layer.sliding else None


def _cross_layers(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Llama 3.2's layers that look at images keep keys and values of what the tower has seen."""
    if layer.mixer != "cross_attention":
        return _attention(m, axes, layer, kept)
    source = "transformers 5.24 models/mllama/modeling_mllama.py MllamaTextCrossAttention.forward"
    return LayerCache("cross", keys_and_values(layer.k, axes["d"], axes["d"], "source"), None, source)


def _crossing(m: ModelSpec, axes: _Axes) -> LayerCache:
    """A decoder's layer that also attends to what the encoder has read, whose keys and values are made once."""
    own = keys_and_values(m.num_attention_heads, axes["d"], axes["d"])
    read = tuple(
        p._replace(name=f"cross {p.name}")
        for p in keys_and_values(m.num_attention_heads, axes["d"], axes["d"], "source")
    )
    return LayerCache("cross", (*own, *read), None, "transformers 5.24 cache_utils.py EncoderDecoderCache")


def _latent(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Multi-head latent attention, with the keys of an indexer where the layer has one of its own."""
    a, rank, turned = m.num_attention_heads, axes["kl"], axes["klr"] - axes["kl"]
    if kept == "expanded":
        parts: tuple[Part, ...] = keys_and_values(a, axes["d"], axes["dv"])
        source = "transformers 4.51.3 models/deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention.forward"
    else:
        parts = (Part("latent", "kl", rank), Part("rotated keys", "rot", turned))
        source = "transformers 5.24 models/deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention.forward, and alike"
    if "id" in axes and layer.mixer != "shared":
        parts = (*parts, Part("index keys", "id", axes["id"], dtype="model"))
        source = "transformers 5.24 cache_utils.py DynamicIndexedLayer"
    return LayerCache("latent", parts, None, source)


def _indexed_blocks(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """MiniMax-M3: keys and values, and where blocks of keys are chosen one head of keys to choose by."""
    made = _attention(m, axes, layer, kept)
    if layer.mixer == "attention":
        return made
    source = "transformers 5.24 models/minimax_m3_vl/modeling_minimax_m3_vl.py MiniMaxM3VLSparseCacheLayer"
    return made._replace(parts=(*made.parts, Part("index keys", "di", axes["di"], dtype="model")), source=source)


def _compressed(m: ModelSpec, axes: _Axes, layer: Layer, _: Latent) -> LayerCache:
    """DeepSeek V4: a window of keys that are the values too, and beside it one entry for so many tokens.

    The two compressors' projections of tokens that do not fill an entry yet wait, with their gates; and of the entry
    before, the half that the next one overlaps.
    """
    d, kind = axes["d"], layer.mixer
    window = Part("keys that are values", "d", d)
    if kind == "sliding":
        parts: tuple[Part, ...] = (window, window._replace(name="values"))
        return LayerCache("sliding", parts, m.sliding_window, f"{_V4} DeepseekV4Attention.forward")
    if kind == "heavy":
        rate = axes["rh"]
        entry = Part("compressed keys", "d", d, every=rate, windowed=False)
        waiting = Part("tokens not compressed yet", "2 d", 2 * d, "rest", rate, dtype="model")
        return LayerCache("compressed", (window, entry, waiting), m.sliding_window, f"{_V4} DeepseekV4HCACache")
    rate, chosen = axes["rc"], axes["id"]
    both = d + chosen
    return LayerCache(
        "compressed",
        (
            window,
            Part("compressed keys", "d", d, every=rate, windowed=False),
            Part("index keys", "id", chosen, every=rate, windowed=False, dtype="model"),
            Part("tokens not compressed yet", "4 d+id", 4 * both, "rest", rate, dtype="model"),
            Part("the half that overlaps", "rc d+id", rate * both, "sequence", dtype="model"),
            Part("its gates", "rc d+id", rate * both, "sequence", dtype="fp32"),
        ),
        m.sliding_window,
        f"{_V4} DeepseekV4CSACache",
    )


_V4 = "transformers 5.24 models/deepseek_v4/modeling_deepseek_v4.py"


def _convolved(channels: int, kernel: int, heads: int, what: str = "") -> Part:
    """The last `kernel` columns of so many channels that a convolution runs over."""
    return Part(f"{CONVOLUTION}{what}", "channels kernel", channels * kernel, "sequence", heads=heads, dtype="model")


def _state(shape: str, numbers: int, heads: int) -> Part:
    return Part("state", shape, numbers, "sequence", heads=heads, dtype="fp32")


def _first_scan(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Mamba 1: `kernel` columns of every channel, and a state of `mn` numbers a channel."""
    if layer.mixer == "attention":
        return _attention(m, axes, layer, kept)
    inner, n = axes["inner"], axes["mn"]
    parts = (_convolved(inner, axes["kernel"], inner), _state("inner mn", inner * n, inner))
    return LayerCache("state", parts, None, "transformers 5.24 models/mamba/modeling_mamba.py, and alike")


def _second_scan(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Mamba 2: the convolution runs over the groups' projections too, and a head's state is `mp` by `mn`."""
    if layer.mixer == "attention":
        return _attention(m, axes, layer, kept)
    heads, groups, n = axes["mh"], axes["mg"], axes["mn"]
    parts = (
        _convolved(axes["inner"], axes["kernel"], heads),
        _convolved(2 * groups * n, axes["kernel"], groups, " of groups"),
        _state("mh mp mn", heads * axes["mp"] * n, heads),
    )
    return LayerCache("state", parts, None, "transformers 5.24 models/mamba2/modeling_mamba2.py, and alike")


def _delta(m: ModelSpec, axes: _Axes, layer: Layer, kept: Latent) -> LayerCache:
    """Gated delta rules: a matrix for each value head; Kimi's attention beside them is latent."""
    if layer.mixer == "attention":
        return _latent(m, axes, layer, kept) if "kl" in axes else _attention(m, axes, layer, kept)
    heads, width, values = axes["lv"], axes["ldk"], axes.get("ldv", axes["ldk"])
    made = heads * values
    parts = (
        _convolved(made, axes["kernel"], heads),
        _convolved(axes["convolved"] - made, axes["kernel"], axes.get("lk", heads), " of keys"),
        _state("lv ldk ldv", heads * width * values, heads),
    )
    return LayerCache("state", parts, None, "transformers 5.24 models/qwen3_next/modeling_qwen3_next.py, and alike")


CONVOLUTION = "convolution's last tokens"  # what states' parts of that kind are called, and some words after it
_Of = Callable[[ModelSpec, _Axes, Layer, Latent], LayerCache]


def _each(of: _Of, model_types: str) -> Iterator[tuple[str, _Of]]:
    return ((model_type, of) for model_type in model_types.split())


_LATENT: dict[str, _Of] = dict(
    _each(_latent, "deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa kimi_k2 kimi_k25 minicpm3")
)
_OTHERS: dict[str, _Of] = {
    "deepseek_v4": _compressed,
    "minimax_m3_vl_text": _indexed_blocks,
    "mllama": _cross_layers,
    **dict(_each(_gemma4, "gemma4 gemma4_text")),
    **dict(_each(_first_scan, "falcon_mamba jamba mamba")),
    **dict(_each(_second_scan, "granitemoehybrid mamba2 nemotron_h")),
    **dict(_each(_delta, "kimi_k3 kimi_linear qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next")),
}
