"""Other models of a trainer's step, by the role that each plays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from memplan.spec.base import Count, Dtype, Part
from memplan.spec.formats import Quantization
from memplan.spec.generation import InlineModel
from memplan.spec.training import Method


class RoleModel(Part):
    """A model that runs in the step of another one. A name is accepted for the whole.

    model         name, id, path or config, as of the run's own model
    dtype         dtype of its weights; None for that of the run's
    quantization  how its weights are quantised, if they are
    location      where it is: on every `gpu` that trains, or on a `server`, which takes none of their memory
    micro         sequences of one pass; None: all completions for a reward model, the policy's for a critic
    method        how a value model trains; None: in full in the policy's pass (ppo), as the policy by itself
    """

    model: str | InlineModel
    dtype: Dtype | None = None
    quantization: Quantization | None = None
    location: Literal["gpu", "server"] = "gpu"
    micro: Count | None = None
    method: Method | None = None

    @classmethod
    def expanded(cls, value: Any) -> Any:
        return {"model": value} if isinstance(value, (str, InlineModel)) else value


class Roles(Part):
    """The other models of a trainer's step.

    teacher    model whose distribution of tokens the run's model learns (gkd, distill)
    reference  model that the run's is compared with, if it is no copy of it (dpo, kto, grpo, rloo, ppo)
    reward     model that scores completions (grpo, rloo, ppo)
    value      model that predicts scores, and trains: in the policy's pass (ppo), or by itself (grpo, rloo)
    """

    teacher: RoleModel | None = None
    reference: RoleModel | None = None
    reward: RoleModel | None = None
    value: RoleModel | None = None

    def written(self, values: dict[str, Any]) -> dict[str, Any]:
        """Leave out the roles that no model has."""
        return {role: model for role, model in values.items() if model is not None}

    @property
    def named(self) -> Iterator[tuple[str, RoleModel]]:
        """The roles that a model has, with it."""
        yield from ((role, model) for role, model in self if model is not None)
