"""Reading a config's lists with one item per layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.facts import ModelFacts
from memplan.models.layers import as_json


def listed(m: ModelFacts, key: str, config: Mapping[str, Any] | None = None) -> Sequence[Any] | None:
    """Return a list of the config, or of a nested one, with one item per layer, or None if it has no such key.

    Raises ConfigError if it is not a list, or too short.
    """
    value = (m.config if config is None else config).get(key)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(cast(Sequence[Any], value)) < m.num_hidden_layers:
        raise ConfigError(f"config: {key} must be a list of at least {m.num_hidden_layers} layers", key)
    return cast(Sequence[Any], value)[: m.num_hidden_layers]


def kinds(m: ModelFacts, key: str, known: Mapping[str, bool], default: Sequence[bool]) -> list[bool]:
    """Return a flag per layer, translating the words of a config's list by `known`; `default` if there is no list.

    Raises UnsupportedModelError for an unknown word.
    """
    words = listed(m, key)
    if words is None:
        return list(default)
    unknown = [word for word in words if word not in known]
    if unknown:
        raise UnsupportedModelError(f"{key}: {as_json(unknown[0])} is not supported yet", key)
    return [known[word] for word in words]


SLIDING = {"sliding_attention": True, "full_attention": False}
SPARSE = {"sparse": True, "dense": False}


def window_everywhere_but(m: ModelFacts, period: int) -> list[bool]:
    """Return flags that are true except for every `period`-th layer."""
    return [(i + 1) % period != 0 for i in range(m.num_hidden_layers)]
