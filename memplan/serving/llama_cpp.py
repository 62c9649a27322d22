"""llama.cpp: a cache for so many slots of so many tokens, made at the start, and one buffer to compute in.

Source: llama.cpp (llama-cpp-python 0.3.36) src/llama-context.cpp, src/llama-kv-cache.cpp, src/llama-kv-cache-iswa.cpp,
src/llama-memory-recurrent.cpp, src/llama-graph.cpp.
"""

from __future__ import annotations

from typing import NamedTuple

from memplan.catalogue.caches import CONVOLUTION, LayerCache, caches
from memplan.serving.pool import Slots
from memplan.serving.settings import Settings
from memplan.units import ITEMSIZE

_PAD = 256  # tokens that lengths are rounded up to


def padded(tokens: int) -> int:
    return -(-tokens // _PAD) * _PAD


def offloaded(s: Settings) -> int:
    """Layers in the card's memory, from the last; the head counts as one more, and comes before any of them."""
    return min(s.model.num_hidden_layers, max(0, (s.serving.gpu_layers or 0) - 1))


def pool(s: Settings, available: int) -> Slots:
    """The cache of the layers in the card's memory, whatever is left there."""
    del available
    slots, longest = s.serving.max_num_seqs or 1, padded(s.longest)
    layers = caches(s.model)[s.model.num_hidden_layers - offloaded(s) :]
    total = sum(_layer(s, c, slots, longest) for c in layers)
    return Slots(longest * slots, slots, total, longest)


def _layer(s: Settings, c: LayerCache, slots: int, longest: int) -> int:
    """Bytes of one layer's cells. A layer with a window has those of it, of one step, and no more than the others."""
    if c.kind == "state":
        kernel = s.model.axes()["kernel"]
        shifted = sum(p.elements // kernel for p in c.parts if p.name.startswith(CONVOLUTION))  # a column less is kept
        return slots * (sum(p.elements for p in c.parts) - shifted) * ITEMSIZE["fp32"]
    cells = longest
    if c.window is not None and c.kind == "sliding" and s.serving.hybrid_cache:
        cells = padded(min(longest, c.window + s.steps))
    return slots * cells * sum(s.cache_bytes(p.elements) for p in c.parts)


class Buffer(NamedTuple):
    """What is alive at the largest moment of a graph: what it is, its shape in numbers, bytes; all in fp32."""

    where: str
    alive: tuple[tuple[str, tuple[int, ...], int], ...]

    @property
    def bytes(self) -> int:
        return sum(bytes_ for _, _, bytes_ in self.alive)


def compute_buffer(s: Settings) -> Buffer:
    """The graph of a step of `ubatch` tokens, all of which have logits, at the cache's full length.

    Four rows of the hidden width beside scores that are written out were seen in logs: 560.00 MiB of Llama 3 8B and
    296.00 MiB of Llama 2 7B; with flash attention, logits and one row: 258.50, 304.00 (Qwen2.5 7B) and 70.50 MiB.
    """
    m, ubatch = s.model, s.steps
    h, f, a = m.hidden_size, max(layer.f for layer in m.layers), m.num_attention_heads
    cells = padded(s.longest)

    def row(what: str, *shape: int, size: int = 4) -> tuple[str, tuple[int, ...], int]:
        total = size
        for n in shape:
            total *= n
        return what, shape, total

    whole = (s.serving.gpu_layers or 0) > 0
    hidden = row("hidden", ubatch, h)
    found = [
        Buffer("mlp", (hidden, row("normed", ubatch, h), row("gate", ubatch, f), row("up", ubatch, f))),
    ]
    if whole:
        found.append(Buffer("output", (row("logits", ubatch, m.vocab_size), hidden)))
    mask = row("mask", ubatch, cells, size=2 if s.serving.flash_attention else 4)
    if not s.serving.flash_attention:
        found.append(
            Buffer("attention.scores", (row("scores", a, ubatch, cells), mask, row("hidden, q, k and v", 4, ubatch, h)))
        )
    return max(found, key=lambda b: b.bytes)
