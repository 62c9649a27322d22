"""The layers of a model, one by one and as runs: a short pattern of layers and how often it repeats.

The number of repetitions is an axis, so models that differ only in depth share a stack.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from typing import TypeVar

from memplan.core.errors import ConfigError
from memplan.core.records import NamedTuple

K = TypeVar("K", bound=Hashable)

_MAX_PERIOD = 16  # no known model has a longer pattern of layers
MOST_LAYERS = 1_000  # no known model has 200
MOST_DIFFERENT = 192  # layers that repeat no pattern, at about 20 ms each; no known model has 100


class Layer(NamedTuple):
    """One layer.

    sliding         attention has a window
    rotary          attention has rotary positions
    k               key/value heads; 0 for a layer without attention
    f               FFN width; 0 for a layer without an FFN
    mixer           kind of token mixer, in words shared by the family's config module and its stack builder
    ffn             kind of FFN, likewise
    a               query heads, if the layers differ in them
    choosable_sums  Kimi K3: number of sums of earlier layers' outputs that the layer chooses from, in addition to its
                    input
    opens_sum       Kimi K3: the layer adds its input to those sums and starts the next one
    """

    sliding: bool
    rotary: bool
    k: int
    f: int
    mixer: str = "attention"
    ffn: str = "dense"
    a: int = 0
    choosable_sums: int = 0
    opens_sum: bool = False


class LayerRun(NamedTuple):
    """A `pattern` of layers repeated `number` times; `times` is the axis of that number."""

    pattern: tuple[Layer, ...]
    times: str
    number: int


def as_json(value: object) -> str:
    """Return an invalid config value as JSON for an error message, cut off at 60 characters."""
    return json.dumps(value, default=repr)[:60]


def runs_of(layers: Sequence[Layer]) -> tuple[LayerRun, ...]:
    """Return the layers as runs, greedily from the front: a single run `L`, or `L1`, `L2` and so on.

    Raises ConfigError if too many layers repeat no pattern.
    """
    patterns = repetitions(layers)
    different = sum(len(pattern) for pattern, _ in patterns)
    if different > MOST_DIFFERENT:
        raise ConfigError(
            f"config: num_hidden_layers: {different:,} of the {len(layers):,} layers repeat no pattern; at most "
            f"{MOST_DIFFERENT} such layers are supported",
            "num_hidden_layers",
        )
    if len(patterns) == 1 and len(patterns[0][0]) == 1:
        return (LayerRun(patterns[0][0], "L", patterns[0][1]),)
    return tuple(LayerRun(pattern, f"L{i}", count) for i, (pattern, count) in enumerate(patterns, 1))


def repetitions(items: Sequence[K]) -> list[tuple[tuple[K, ...], int]]:
    """Split a sequence into repeated patterns, each with its number of repetitions.

    >>> repetitions("aaab" * 3 + "aa")
    [(('a', 'a', 'a', 'b'), 3), (('a',), 2)]
    >>> repetitions("aaabb")
    [(('a',), 3), (('b',), 2)]
    """
    out: list[tuple[tuple[K, ...], int]] = []
    start = 0
    while start < len(items):
        best, covered = 1, _repeats(items, start, 1)
        longest = 0 if start + covered == len(items) else min(_MAX_PERIOD, (len(items) - start) // 2)
        for period in range(2, longest + 1):
            length = period * _repeats(items, start, period)
            if length > covered and length > period:
                best, covered = period, length
        out.append((tuple(items[start : start + best]), covered // best))
        start += covered
    return out


def _repeats(items: Sequence[Hashable], start: int, period: int) -> int:
    n = 1
    while items[start + n * period : start + (n + 1) * period] == items[start : start + period]:
        n += 1
    return n
