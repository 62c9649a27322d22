"""The layers of a model, one by one and as runs: a short pattern of layers and how often it repeats.

The number of repetitions is an axis, so models that differ only in depth share a stack.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from memplan.core.errors import ConfigError, UnsupportedModelError

K = TypeVar("K", bound=Hashable)

_MAX_PERIOD = 16  # no known model has a longer pattern of layers
_MAX_WIDTH = 2**21  # a larger width is a mistake
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


def layers_of(
    model_type: str, config: Mapping[str, Any], count: int, window: int | None, a: int, k: int, f: int, h: int
) -> tuple[Layer, ...]:
    """Return the `count` layers of a config, with `k` key/value heads and FFN width `f` unless it says otherwise.

    Raises ConfigError for an invalid or too short list of layers, UnsupportedModelError for an unknown kind of layer.
    """
    match model_type:
        case "nemotron-nas":
            blocks = _list(config, "block_configs", count)
            return tuple(_nas_layer(block, a, h) for block in blocks)
        case "qwen2" | "qwen3":
            first = _whole(config, "max_window_layers", 28)
            kinds = sliding_layers(config, [window is not None and i >= first for i in range(count)])
            return tuple(Layer(sliding, True, k, f) for sliding in kinds)
        case "ministral":
            kinds = sliding_layers(config, [window is not None] * count)
            return tuple(Layer(sliding, True, k, f) for sliding in kinds)
        case "smollm3":
            every = max(1, _whole(config, "no_rope_layer_interval", 4))
            if config.get("no_rope_layers"):
                rotary = [bool(r) for r in _list(config, "no_rope_layers", count)]
            else:
                rotary = [(i + 1) % every != 0 for i in range(count)]
            kinds = sliding_layers(config, [window is not None and not r for r in rotary])
            return tuple(Layer(s, r, k, f) for s, r in zip(kinds, rotary, strict=True))
        case "gemma2" | "gemma3_text" | "cohere2" | "olmo3" | "exaone4":
            kinds = (
                sliding_layers(config, _pattern(config, model_type, count)) if window is not None else [False] * count
            )
            everywhere = model_type != "cohere2" and (model_type != "exaone4" or window is None)
            return tuple(Layer(sliding, sliding or everywhere, k, f) for sliding in kinds)
        case _:
            return (Layer(window is not None, True, k, f),) * count


# Every n-th layer has no window. A config's `sliding_window_pattern` overrides n, except for `_FIXED`.
_PERIODS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4, "olmo3": 4, "exaone4": 4}
_FIXED = ("gemma2", "olmo3")


def _pattern(config: Mapping[str, Any], model_type: str, count: int) -> list[bool]:
    """Return whether each layer has a window. In a pattern of letters, L has one and G has none; nor has the last."""
    period, letters = _PERIODS[model_type], config.get("sliding_window_pattern")
    if model_type in _FIXED or letters is None:
        return [(i + 1) % period != 0 for i in range(count)]
    if not isinstance(letters, str):
        period = max(1, _whole(config, "sliding_window_pattern", period))
        return [(i + 1) % period != 0 for i in range(count)]
    if not letters or not set(letters) <= {"L", "G"}:
        raise ConfigError(
            f"config: sliding_window_pattern must be a number or the letters L and G, not {as_json(letters)}",
            "sliding_window_pattern",
        )
    return [letters[i % len(letters)] == "L" and i < count - 1 for i in range(count)]


def sliding_layers(config: Mapping[str, Any], default: list[bool]) -> list[bool]:
    """Return whether each layer has a window: by the config's `layer_types`, else the config class's `default`."""
    if config.get("layer_types") is None:
        return default
    kinds = _list(config, "layer_types", len(default))
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        raise UnsupportedModelError(f"layer_types: {as_json(unknown[0])} is not supported yet", "layer_types")
    return [kind == "sliding_attention" for kind in kinds]


def _whole(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config: {key} must be a whole number, not {as_json(value)}", key)
    return value


def _list(config: Mapping[str, Any], key: str, count: int) -> Sequence[Any]:
    value = config.get(key)
    if not isinstance(value, (list, tuple)) or len(value) < count:  # pyright: ignore[reportUnknownArgumentType]
        raise ConfigError(f"config: {key} must be a list of at least {count} layers", key)
    return value[:count]  # pyright: ignore[reportUnknownVariableType]


def _nas_layer(block: Any, a: int, h: int) -> Layer:
    """Return one layer of a Nemotron-NAS `block_configs`, which gives heads per group and the FFN width over `h`.

    Source: the code published with DeciLM, `_ffn_mult_to_intermediate_size`: two thirds of it, rounded up to 256.
    """
    try:
        attention, ffn = block["attention"], block["ffn"]
        if attention.get("replace_with_linear") or ffn.get("replace_with_linear"):
            raise UnsupportedModelError("block_configs: replace_with_linear is not supported", "block_configs")
        k = f = 0
        if not attention.get("no_op"):
            k, rest = divmod(a, attention["n_heads_in_group"])
            if rest or not 1 <= k <= a:
                raise ValueError("groups do not divide the heads")
        if not ffn.get("no_op"):
            f = int(ffn.get("intermediate_size") or -(-int(2 * float(ffn["ffn_mult"]) * h / 3) // 256) * 256)
            if not 1 <= f <= _MAX_WIDTH:
                raise ValueError("no width")
    except (KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise ConfigError(f"config: block_configs: invalid block {as_json(block)}", "block_configs") from error
    return Layer(False, True, int(k), f)
