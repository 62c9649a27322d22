"""Lists of a config that say something of every layer, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from memplan.core.errors import ConfigError, UnsupportedModelError
from memplan.models.facts import ModelFacts
from memplan.models.layers import as_json


def listed(m: ModelFacts, key: str) -> Sequence[Any] | None:
    """The list of the config with an item for each layer; None where it has none.

    Raises ConfigError where it is no list, or too short.
    """
    value = m.config.get(key)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(cast(Sequence[Any], value)) < m.num_hidden_layers:
        raise ConfigError(f"config: {key} must be a list of at least {m.num_hidden_layers} layers", key)
    return cast(Sequence[Any], value)[: m.num_hidden_layers]


def kinds(m: ModelFacts, key: str, known: Mapping[str, bool], default: Sequence[bool]) -> list[bool]:
    """What a list of words says of every layer, by the words it may have; `default` where the config has no such list.

    Raises UnsupportedModelError for another word.
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
    """Every layer has a window, but each `period`-th."""
    return [(i + 1) % period != 0 for i in range(m.num_hidden_layers)]
