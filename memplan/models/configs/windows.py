"""The layers of dense decoders: which of them have a window, and rotary positions.

Source: transformers 5.24 configuration classes, unless stated otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.configs.layer_lists import SLIDING, kinds, listed
from memplan.models.facts import ModelFacts
from memplan.models.layers import Layer, as_json

_MAX_WIDTH = 2**21  # a larger width is a mistake


def _layers(m: ModelFacts, sliding: Sequence[bool], rotary: Sequence[bool]) -> tuple[Layer, ...]:
    layer = m.equal_layer
    return tuple(layer._replace(sliding=s, rotary=r) for s, r in zip(sliding, rotary, strict=True))


def _windows(m: ModelFacts, default: list[bool]) -> list[bool]:
    return kinds(m, "layer_types", SLIDING, default)


def windows_after(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Qwen2's and Qwen3's layers, whose windows begin with layer `max_window_layers`."""
    first = _whole(m, "max_window_layers", 28)
    count, window = m.num_hidden_layers, m.sliding_window
    return _layers(m, _windows(m, [window is not None and i >= first for i in range(count)]), [True] * count)


def windows_everywhere(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Ministral's layers, which all have a window by default."""
    count = m.num_hidden_layers
    return _layers(m, _windows(m, [m.sliding_window is not None] * count), [True] * count)


def half_the_heads(m: ModelFacts) -> dict[str, int]:
    """Return DiffLlama's axes: the query heads and key heads that it subtracts from as many others."""
    return {"a_half": m.num_attention_heads // 2, "k_half": m.num_key_value_heads // 2}


def some_rotary(m: ModelFacts) -> tuple[Layer, ...]:
    """Return SmolLM3's layers. One in a few has no rotary positions, and only these may have a window."""
    count, every = m.num_hidden_layers, max(1, _whole(m, "no_rope_layer_interval", 4))
    flags = listed(m, "no_rope_layers") if m.config.get("no_rope_layers") else None
    rotary = [bool(r) for r in flags] if flags is not None else [(i + 1) % every != 0 for i in range(count)]
    return _layers(m, _windows(m, [m.sliding_window is not None and not r for r in rotary]), rotary)


def all_but_every(
    period: int,
    fixed: bool = False,
    unrotated: Literal["", "always", "among windows"] = "",
    first: bool = False,
    key: str = "sliding_window_pattern",
) -> Callable[[ModelFacts], tuple[Layer, ...]]:
    """Return a function for layers with a window, except every `period`-th.

    fixed      no `key` of a config overrides the period
    unrotated  whether layers without a window have no rotary positions: always, or only if other layers have a window
    first      a period begins with the layer without a window, instead of ending with it
    """

    def layers(m: ModelFacts) -> tuple[Layer, ...]:
        if m.sliding_window is None:
            return (m.equal_layer._replace(rotary=unrotated != "always"),) * m.num_hidden_layers
        sliding = _windows(m, _pattern(m, period, fixed, 0 if first else 1, key))
        return _layers(m, sliding, sliding if unrotated else [True] * len(sliding))

    return layers


def _pattern(m: ModelFacts, period: int, fixed: bool, start: int, key: str) -> list[bool]:
    """Return whether each layer has a window. In a pattern of letters, L has one and G has none; nor has the last."""
    count, letters = m.num_hidden_layers, m.config.get(key)
    if not fixed and letters is not None and not isinstance(letters, str):
        period = max(1, _whole(m, key, period))
    if fixed or not isinstance(letters, str):
        return [(i + start) % period != 0 for i in range(count)]
    if not letters or not set(letters) <= {"L", "G"}:
        raise ConfigError(
            f"config: {key} must be a number or the letters L and G, not {as_json(letters)}",
            key,
        )
    return [letters[i % len(letters)] == "L" and i < count - 1 for i in range(count)]


def _whole(m: ModelFacts, key: str, default: int) -> int:
    value = m.config.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigError(f"config: {key} must be a whole number, not {as_json(value)}", key)
    return value


def nas_layers(m: ModelFacts) -> tuple[Layer, ...]:
    """Return Nemotron-NAS's layers, one for each of `block_configs`."""
    blocks = listed(m, "block_configs")
    if blocks is None:
        raise ConfigError(
            f"config: block_configs must be a list of at least {m.num_hidden_layers} layers", "block_configs"
        )
    return tuple(_nas_layer(block, m.num_attention_heads, m.hidden_size) for block in blocks)


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
