"""The weights on one rank of a serving engine: the model's and its draft's."""

from __future__ import annotations

from functools import lru_cache

from memplan.program.serving.draft_weights import draft_weights
from memplan.program.serving.model_weights import WeightGroup, model_weights
from memplan.program.serving.settings import Settings


@lru_cache(maxsize=256)
def rank_weights(s: Settings) -> tuple[WeightGroup, ...]:
    """Return the weights on one GPU, by group and dtype."""
    return (*model_weights(s), *draft_weights(s))
