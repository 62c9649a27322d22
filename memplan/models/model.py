"""`ModelSpec`: a model's config, checked and completed with the defaults of its family."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, cast

from memplan.models.configs import around, family
from memplan.models.configs.model_types import model_type_of
from memplan.models.facts import Family, ModelFacts
from memplan.models.headers import Checkpoint
from memplan.models.objectives import config_for_objective


class ModelSpec(ModelFacts):
    """One model, with Hugging Face's names. Immutable; equal if name, config and checkpoint are equal.

    `checkpoint` holds the headers of its weights, if they were read. Sizes are positive ints. `get` reads any other key
    of the config.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        name: str = "",
        published: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Check `config` and fill in the config class's defaults.

        Raises ConfigError for a missing key or an invalid size, UnsupportedModelError for an unsupported model.
        """
        super().__init__(config, model_type_of(config), _family_of(config), name, published, checkpoint)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, family=_family_of(state["config"]))

    def resized(self, **sizes: int) -> ModelSpec:
        """Return the model with other sizes, by Hugging Face's names, and the same `head_dim`.

        With fewer layers, lists of layers are cut, as by transformers' config classes.
        """
        sizes = {"head_dim": self.head_dim, **sizes}
        keys = ((self._key(name) or next(iter(self._names[name]), ""), n) for name, n in sizes.items())
        config: dict[str, Any] = {**self.config, **{key: n for key, n in keys if key}}
        if "num_hidden_layers" in sizes and self.config.get("layer_types"):
            kinds = cast(tuple[str, ...], self.config["layer_types"])
            config["layer_types"] = (*kinds, *kinds[-1:] * sizes["num_hidden_layers"])[: sizes["num_hidden_layers"]]
        resized = ModelSpec(config, self.name, self.card, self.checkpoint)
        resized.head_dim = self.head_dim  # some families have no key for it and would derive another from the heads
        return resized


def _family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config, or of its vision tower and decoder together."""
    model_type = model_type_of(config)
    row = family(model_type)
    if not row.wraps:
        return row
    text: object = config.get("text_config")
    inner: Mapping[str, Any] = cast(Any, text) if isinstance(text, Mapping) else {}
    return around(model_type, model_type_of({"model_type": row.wraps, **inner}))


@lru_cache(maxsize=1024)
def with_objective(model: ModelSpec, objective: str | None) -> ModelSpec:
    """Return the model with the head of `objective`, or unchanged if None. Raises SpecError for an unsupported one."""
    if objective is None or objective == model.objective:
        return model
    return ModelSpec(config_for_objective(model.config, objective, model.objectives), model.name, model.card)


@lru_cache(maxsize=128)
def without_dropout(model: ModelSpec) -> ModelSpec:
    """Return the model with every dropout probability set to 0, as in evaluation."""

    def zeroed(config: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: zeroed(cast(Mapping[str, Any], value))
            if isinstance(value, Mapping)
            else 0.0
            if isinstance(value, (int, float)) and value and ("dropout" in key or "pdrop" in key)
            else value
            for key, value in config.items()
        }

    config = zeroed(model.config)
    return model if config == model.config else ModelSpec(config, model.name, model.card, model.checkpoint)
