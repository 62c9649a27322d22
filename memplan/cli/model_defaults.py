"""Defaults that depend on the model: a line that names only a model and a method is one that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from memplan.core.errors import MemplanError
from memplan.models.cards import find_config, find_model, other_format
from memplan.models.model import ModelSpec


def in_other_format(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the options with the bundled model and the format that a name means, as in Qwen/Qwen3-8B-AWQ; those that
    are given override the format's. A checkpoint whose config is in the local cache is itself."""
    model = str(given.get("model", ""))
    found = other_format(model) if "-" in model else None
    if found is None:
        return given
    with suppress(MemplanError):
        find_config(model)
        return given
    card, options = found
    words = options.split()
    implied = {flag[2:].replace("-", "_"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
    if "method" in given and given["method"] not in ("generate", "forward"):
        implied = {}  # training starts from the model, quantised as the method says
    return {**implied, **given, "model": card}


def with_model_defaults(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a run's fields with those that nobody set, where the general default would not run with the model.

    A model that is not found is left to the run's own checks.
    """
    from memplan.spec.run import RunSpec

    profile = str(fields.get("profile", "")).lower()
    is_for_inference = str(fields["model"]).lower().endswith(".gguf") or _engine(profile)
    if is_for_inference and not {"method", "task"} & fields.keys():
        fields = {**fields, "task": "generate"}
    with suppress(MemplanError, ValueError):
        model = find_model(RunSpec.model_validate({"model": fields["model"]}).model)
        for part, name, value in _defaults(model, fields):
            fields = {**fields, part: {**fields.get(part, {}), name: value}}
    return fields


def _engine(profile: str) -> bool:
    if not profile or profile.startswith(("transformers", "trl", "axolotl", "unsloth")):
        return False
    from memplan.catalogue.profiles.engines import engine_names
    from memplan.spec.run import RunSpec

    return RunSpec.model_validate({"model": "", "profile": profile}).profile in engine_names()


def _defaults(model: ModelSpec, fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield the part, the field and its value."""
    from memplan.catalogue.kernels.wiring import TRAINERS
    from memplan.catalogue.methods.methods import LORA
    from memplan.resolve.defaults import NEW_TOKENS
    from memplan.resolve.method import targets_that_peft_takes
    from memplan.spec.run import Batch

    batch: Mapping[str, Any] = fields.get("batch", {})
    method: Mapping[str, Any] | str = fields.get("method", {})
    longest, usual = model.longest_sequence, Batch.defaults["sequence"]
    bounded = model.learned_positions or "masked_lm" in model.objectives  # encoders are trained at their full length
    if bounded and model.only_sequence is None and longest is not None and "sequence" not in batch:
        generated = batch.get("new_tokens", NEW_TOKENS) if fields.get("task") == "generate" else 0
        if longest - generated < usual:
            yield "batch", "sequence", max(1, longest - generated)
    trainer = fields.get("trainer", "sft")
    together = batch.get("generations") or (TRAINERS[trainer].together if trainer in TRAINERS else 1)
    if together > 1 and not {"micro", "accumulation"} & batch.keys():
        yield "batch", "micro", together
    if not isinstance(method, str) and method.get("kind") in LORA and "targets" not in method:
        targets = targets_that_peft_takes(model)
        if targets:
            yield "method", "targets", targets
