"""A model: its facts, with those of the family that its config names."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from memplan.models.configs import family
from memplan.models.configs.model_types import model_type_of
from memplan.models.facts import ModelFacts
from memplan.models.headers import Checkpoint
from memplan.models.objectives import trained_for


class ModelSpec(ModelFacts):
    """One model, in Hugging Face's words. Immutable; equal if name, config and checkpoint are.

    `checkpoint` is what was seen of its weights, if anything. Sizes are positive ints. `get` reads any further key of
    the config, with the model class's own default.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        name: str = "",
        published: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Check `config` and fill in the model class's defaults.

        Raises ConfigError where a key is missing or no size, UnsupportedModelError for another kind of model.
        """
        model_type = model_type_of(config)
        super().__init__(config, model_type, family(model_type), name, published, checkpoint)

    def narrowed(self, heads: int, key_value_heads: int, intermediate_size: int, vocab_size: int) -> ModelSpec:
        """The model with so many heads, as wide as they are, an FFN of that width and so many tokens."""
        wanted = {
            "num_attention_heads": heads,
            "num_key_value_heads": key_value_heads,
            "intermediate_size": intermediate_size,
            "vocab_size": vocab_size,
            "head_dim": self.head_dim,
        }
        keys = ((self._key(name) or next(iter(self._names[name]), ""), n) for name, n in wanted.items())
        config = {key: n for key, n in keys if key}
        made = ModelSpec({**self.config, **config}, self.name, self.card, self.checkpoint)
        made.head_dim = self.head_dim  # of families whose config has no word for it
        return made


@lru_cache(maxsize=1024)
def with_objective(model: ModelSpec, objective: str | None) -> ModelSpec:
    """The model with the head of `objective`; as its config has it, if None. Raises SpecError where it has no such."""
    if objective is None or objective == model.objective:
        return model
    return ModelSpec(trained_for(model.config, objective, model.objectives), model.name, model.card)
