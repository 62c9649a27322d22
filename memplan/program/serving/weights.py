"""The weights that one rank of a serving engine holds: the model's and its draft's."""

from __future__ import annotations

from functools import lru_cache

from memplan.program.serving.draft_weights import draft_weights
from memplan.program.serving.model_weights import Held, model_weights
from memplan.program.serving.settings import Settings


@lru_cache(maxsize=256)
def held(s: Settings) -> tuple[Held, ...]:
    """What one card has of the weights, by group and dtype."""
    return (*model_weights(s), *draft_weights(s))
