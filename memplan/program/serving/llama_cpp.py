"""llama.cpp: a cache for so many slots of so many tokens, made at the start, and one buffer to compute in.

Source: llama.cpp (llama-cpp-python 0.3.36) src/llama-context.cpp, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp,
src/llama-memory-recurrent.cpp, src/llama-graph.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from memplan.catalogue.inference.caches import CONVOLUTION, LayerCache, caches
from memplan.core.units import ITEMSIZE
from memplan.models.layers import Layer
from memplan.program.serving.pool import Slots
from memplan.program.serving.rank_share import TOWERS, layer_of
from memplan.program.serving.settings import Settings
from memplan.program.stored.weights import stored_weights

_PAD = 256  # tokens that lengths are rounded up to


def padded(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def pool(s: Settings, available: int) -> Slots:
    """The cache of the card's layers, whatever is left there."""
    del available
    slots, longest = s.serving.max_num_seqs or 1, padded(s.longest)
    total = sum(_layer(s, c, slots, longest) for c in s.caches)
    if s.draft is not None and s.draft.settings is not None:  # a context of its own, as long and of as many slots
        total += pool(s.draft.settings, 0).total
    return Slots(longest * slots, slots, total, longest)


def _layer(s: Settings, c: LayerCache, slots: int, longest: int) -> int:
    """Bytes of one layer's cells. A layer with a window has those of it, of one step, and no more than the others."""
    if c.kind == "state":
        kernel = s.model.axes()["kernel"]
        shifted = sum(p.elements // kernel for p in c.parts if p.name.startswith(CONVOLUTION))  # a column less is kept
        return slots * (sum(p.elements for p in c.parts) - shifted) * ITEMSIZE["fp32"]
    return slots * _cells(s, c, longest) * sum(s.cache_bytes(p) for p in c.parts)


# Families of whose windows llama.cpp's graphs know nothing: src/models/llama.cpp, phi3.cpp, phimoe.cpp, starcoder2.cpp.
_WINDOWLESS = frozenset(("mistral", "phi3", "phimoe", "starcoder2"))


def _cells(s: Settings, c: LayerCache, longest: int) -> int:
    if _windowed(s, c) and c.window is not None:
        return padded(min(longest, c.window + s.steps))
    return longest


def _windowed(s: Settings, c: LayerCache) -> bool:
    """Whether a layer keeps a window alone: chunks are one too. Source: src/llama-kv-cache-iswa.cpp."""
    known = c.kind in ("sliding", "chunked") and s.model.model_type not in _WINDOWLESS
    return known and bool(s.serving.hybrid_cache)


class Buffer(NamedTuple):
    """What is alive at the largest moment of a graph: what it is, its shape in numbers, bytes; all in fp32."""

    where: str
    alive: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        return sum(bytes_ for _, _, bytes_ in self.alive)


_COPIES = 4  # ggml/src/ggml-backend.cpp GGML_SCHED_MAX_COPIES
_I32, _I64, _F32 = 4, 8, 4
_Row = tuple[str, tuple[int, ...], int]


def pipelined(s: Settings) -> bool:
    """Whether steps follow each other through the cards, so that what a card is given is there four times: where all
    layers are on several cards. Source: src/llama-context.cpp, pipeline_parallel."""
    return s.ranks.cards > 1 and (s.serving.gpu_layers or 0) > s.model.num_hidden_layers


def outputs(s: Settings) -> int:
    """Tokens of a step that have logits: llama-server's, one for each slot. Source: tools/server/server-context.cpp
    server_output_limits."""
    return min(s.steps, s.serving.max_num_seqs or 1)


def compute_buffer(s: Settings, logits: int | None = None) -> Buffer:
    """The card's graph of a step of `ubatch` tokens at the cache's full length; `logits` of them have some.

    llama.cpp reserves it without data, and what it reserves for 40 models, cards and settings is what tests hold this
    to. A dense layer is met to the byte: at the largest moment three rows of the FFN's width are there, and three of
    the hidden width, one of which is a hole that a freed row has left. What is an input stays there four times where
    steps follow each other through several cards.
    """
    logits = outputs(s) if logits is None else logits
    layers = _computed(s)
    if not layers and not s.stage.headed:
        return Buffer("nothing", ())
    found = [_drawing(s, logits)] if s.stage.headed else []
    if layers:
        found += [*_feeding(s, layers), *_mixing(s, layers)]
    given = tuple(_given(s, logits))
    if pipelined(s):
        crossing = ("hidden", "the FFN's output") if s.stage.fed else ("embeddings",)
        given = (*given, *(_row(what, s.steps, s.model.hidden_size) for what in crossing))
        given = tuple((f"{what}, {_COPIES} times", shape, _COPIES * bytes_) for what, shape, bytes_ in given)
        return max((b._replace(alive=(*b.alive, *given)) for b in found), key=lambda b: b.bytes)
    later = tuple(row for row in given if row[0] != "mask") if _left(s) else given  # by then the mask is gone
    beside = {"output": (), "attention": given}
    held = [b._replace(alive=(*b.alive, *beside.get(b.where, later))) for b in found]
    return max((*held, *_of_the_host(s, layers)), key=lambda b: b.bytes)


def _left(s: Settings) -> int:
    """Layers that the host has."""
    return max(0, s.model.num_hidden_layers + 1 - (s.serving.gpu_layers or 0))


def _computed(s: Settings) -> tuple[Layer, ...]:
    """The layers that the card computes: its own, and the first card those of the host too, of a step of 32 tokens or
    more. Source: ggml-cuda.cu ggml_backend_cuda_device_offload_op."""
    first, last = s.stage.first, s.stage.last
    mine = s.model.layers[first:last]
    return (
        (*s.model.layers[: _left(s)], *mine) if _left(s) and not s.stage.number and s.steps >= _LEAST_COPIED else mine
    )


_LEAST_COPIED = 32  # tokens: ggml-cuda.cu ggml_backend_cuda_device_offload_op min_batch_size


def _row(what: str, *shape: int, size: int = _F32) -> _Row:
    return what, shape, size * prod(shape)


def _given(s: Settings, logits: int) -> Iterator[_Row]:
    """What a step is given beside tokens: masks, positions, where keys and values go, and which tokens have logits.
    Source: src/llama-graph.cpp build_attn_inp_kv, build_inp_pos, build_inp_out_ids; src/llama-kv-cache.cpp
    build_input_v_idxs, which has an index for every number of values that are stored turned."""
    steps, longest, flash = s.steps, padded(s.longest), s.serving.flash_attention
    kinds = dict.fromkeys((_cells(s, c, longest), _windowed(s, c)) for c in caches(s.model) if c.kind != "state")
    yield _row("positions", steps, size=_I32)
    for cells, _ in kinds:
        yield _row("mask", steps, cells, size=2 if flash else 4)
        yield _row("where keys go", steps, size=_I64)
        if "kl" in s.model.axes():
            continue
        values = 1 if flash else max(p.elements for c in caches(s.model) for p in c.parts if p.name == "values")
        yield _row("where values go", steps, values, size=_I64)
    if s.stage.headed:
        yield "which tokens have logits", (logits,), -(-logits * _I32 // 32) * 32


def _drawing(s: Settings, logits: int) -> Buffer:
    hidden = _row("hidden", s.steps, s.model.hidden_size)
    return Buffer("output", (_row("logits", logits, s.model.vocab_size), hidden))


def _feeding(s: Settings, layers: tuple[Layer, ...]) -> Iterator[Buffer]:
    """The FFN, or the experts, whose outputs lie beside the rows they are made of where no freed row is as wide."""
    m, steps = s.model, s.steps
    axes, h = m.axes(), m.hidden_size
    width = max((layer.f for layer in layers if layer.ffn not in ("experts", "hashed", "none", "")), default=0)
    three = (_row("hidden", steps, h), _row("residual", steps, h), _row("room of a freed row", steps, h))
    if width:
        rows = three[:2] if m.model_type in _ONE_PRODUCT else three
        gates = tuple(_row(what, steps, width) for what in ("gate", "up", "activated"))
        yield Buffer("mlp", (*rows, *gates))
    if "E" in axes and any(layer.ffn in ("experts", "hashed") for layer in layers):
        e, wide = axes["e"], axes.get("m") or max(layer.f for layer in layers)
        gates = tuple(_row(f"experts' {what}", steps, e, wide) for what in ("gate", "up", "activated"))
        if h <= 2 * wide:
            yield Buffer("experts", (*three, *gates))
        else:
            more = (_row("experts' outputs", steps, e, h), _row("their sum", steps, h))
            yield Buffer("experts", (*three, *gates, *more))


# Families whose gate and up are one product in a GGUF file.
_ONE_PRODUCT = frozenset(("phi3", "glm", "glm4", "chatglm"))


def _mixing(s: Settings, layers: tuple[Layer, ...]) -> Iterator[Buffer]:
    """Attention: of latents in their space, with keys as wide as a latent; scores where they are written out. And scans
    of state spaces, whose states lie behind what they make."""
    m, steps = s.model, s.steps
    axes, h, a = m.axes(), m.hidden_size, m.num_attention_heads
    rows = (_row("hidden", steps, h), _row("residual", steps, h))
    mixers = {layer.mixer for layer in layers}
    if "mamba" in mixers:
        inner, state = axes["inner"], (_row("states", 1, axes["inner"] * axes["mn"]))
        if "convolved" in axes:
            wide, ahead = axes["convolved"], steps + axes["kernel"] - 1
            own = (_row("projected", steps, axes["projected"]), _row("with earlier columns", ahead, wide))
            own = (*own, _row("convolved", steps, wide))
        else:
            own = (_row("projected", steps, 2 * inner), _row("convolved", steps, inner), _row("steps", steps, inner))
        yield Buffer("scan", (*rows, *own, _row("output", steps, inner), state))
    if not mixers - {"mamba", "none", "linear_attention"}:
        return
    if "kl" in axes:
        latent, whole = axes["kl"], axes["klr"]
        own = (
            *(_row("q", steps, a, axes["d"]), _row("q in the latent's space", steps, a, whole)),
            *(_row("output in the latent's space", steps, a, latent), _row("latent, and normed", 2, steps, latent)),
        )
        rows = (*rows, _row("normed", steps, h), _row("room of a freed row", steps, h))
    elif "d" in axes:
        own = (_row("q", steps, a, axes["d"]), _row("output", steps, a, axes["d"]))
    else:
        return
    scores = () if s.serving.flash_attention else (_row("scores", a, steps, padded(s.longest)),)
    yield Buffer("attention", (*rows, *own, *scores))


def _of_the_host(s: Settings, layers: tuple[Layer, ...]) -> Iterator[Buffer]:
    """What the first card has of a layer of the host's: its largest matrix beside the FFN's rows, or its keys and
    values. Source: ggml/src/ggml-backend.cpp ggml_backend_sched_backend_id_from_cur, ggml_backend_sched_split_graph."""
    left = _left(s)
    if s.stage.number or not left or s.steps < _LEAST_COPIED:
        return
    largest = 0
    for w in stored_weights(s.model, s.quantization, s.dtype):
        layer = layer_of(w.name)
        if w.group not in TOWERS and layer is not None and layer < left:
            both = w.shape[1:2] == (2 * s.model.axes().get("m", 0),)  # gates and ups, which a file has one by one
            largest = max(largest, w.bytes // 2 if both else w.bytes)
    rows = max(_feeding(s, layers), key=lambda b: b.bytes, default=Buffer("", ()))
    yield Buffer("a layer of the host's", (*rows.alive, ("a matrix of the host's", (), largest)))
    longest = padded(s.longest)
    caches_ = [c for c in caches(s.model)[:left] if c.parts and c.kind != "state"]
    kept = max((_cells(s, c, longest) * sum(s.cache_bytes(p) for p in c.parts) for c in caches_), default=0)
    mask = _row("mask", s.steps, longest, size=2 if s.serving.flash_attention else 4)
    cache = ("keys and values of the host's", (), kept)
    yield Buffer("attention of the host's", (_row("six rows", 6, s.steps, s.model.hidden_size), mask, cache))
