"""Defaults that depend on the model: a line that names only a model and a method is one that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from memplan.core.errors import MemplanError
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec


def with_model_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a run's fields with those that nobody set, where the general default would not run with the model.

    A model that is not found is left to the run's own checks.
    """
    from memplan.spec.run import RunSpec

    if str(fields["model"]).lower().endswith(".gguf") and not {"method", "task"} & fields.keys():
        fields = {**fields, "task": "generate"}  # such files are for inference
    with suppress(MemplanError, ValueError):
        model = find_model(RunSpec.model_validate({"model": fields["model"]}).model)
        for part, name, value in _defaults(model, fields):
            fields = {**fields, part: {**fields.get(part, {}), name: value}}
    return fields


def _defaults(model: ModelSpec, fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield the part, the field and its value."""
    from memplan.catalogue.methods.methods import LORA
    from memplan.resolve.defaults import NEW_TOKENS
    from memplan.resolve.method import targets_that_peft_takes
    from memplan.spec.run import Batch

    batch: Mapping[str, Any] = fields.get("batch", {})
    method: Mapping[str, Any] | str = fields.get("method", {})
    longest, usual = model.longest_sequence, Batch.defaults["sequence"]
    if model.learned_positions and model.only_sequence is None and longest is not None and "sequence" not in batch:
        generated = batch.get("new_tokens", NEW_TOKENS) if fields.get("task") == "generate" else 0
        if longest - generated < usual:
            yield "batch", "sequence", max(1, longest - generated)
    if not isinstance(method, str) and method.get("kind") in LORA and "targets" not in method:
        targets = targets_that_peft_takes(model)
        if targets:
            yield "method", "targets", targets
