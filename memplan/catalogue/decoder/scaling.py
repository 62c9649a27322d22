"""Scaled embeddings, branches and logits, as in Gemma and Granite."""

from __future__ import annotations

from collections.abc import Callable

from memplan.catalogue.kernels import ops
from memplan.core.ir import Op, Tensor, Weight
from memplan.models.model import ModelSpec


def scaled_branches(m: ModelSpec) -> Callable[[str, str, str], tuple[Op, ...]]:
    return scaled_branch


def scaled_embeddings() -> tuple[Op, ...]:
    return (
        ops.embedding("model.embed_tokens", "ids", "unscaled_embeds", "v", "h"),
        ops.scale("embedding_multiplier", "unscaled_embeds", "embeds", "b s h"),
    )


def scaled_branch(name: str, x: str, y: str) -> tuple[Op, ...]:
    return (ops.scale(f"{name}.residual_multiplier", x, y, "b s h"),)


def scaled_logits(last: tuple[Op, ...]) -> tuple[Op, ...]:
    """Return `last` with the output projection at its end scaled before the loss."""
    projection = last[-1]
    unscaled = projection._replace(writes=(projection.writes[0]._replace(name="unscaled_logits"),))
    return (*last[:-1], unscaled, ops.scale("logits_scaling", "unscaled_logits", "logits", "b s v"))


def scaled_embedding() -> Op:
    """Return an embedding whose module multiplies the rows it looks up by a scale stored as a buffer."""
    name = "model.embed_tokens"
    lookup = ops.embedding(name, "ids", "embeds", "v", "h")
    scale = Weight(f"{name}.embed_scale", "", "buffer", "fp32", False)
    unscaled = Tensor("unscaled", "b s h", f"={lookup.weights[0].name}")
    return lookup._replace(weights=(*lookup.weights, scale), scratch=(unscaled,))
