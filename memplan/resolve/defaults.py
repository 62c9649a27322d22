"""Defaults that training and inference share."""

from __future__ import annotations

from memplan.catalogue.methods.methods import ADAPTERS
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import SpecError
from memplan.models.model import ModelSpec
from memplan.program.stack_facts import stacks
from memplan.spec.run import RunSpec
from memplan.spec.training import Kernels, Method


def adapted_experts(model: ModelSpec, method: Method) -> tuple[str, ...]:
    """The targets of adapters that stacks of experts' matrices stand for."""
    if method.kind not in ADAPTERS:
        return ()
    names = [name for stood in stacks(model).values() for name in stood]
    return tuple(name for name in names if method.targets == "all-linear" or name in method.targets)


NEW_TOKENS = 256  # generated where none are asked for


def with_new_tokens(run: RunSpec) -> RunSpec:
    """The run with how many tokens it generates, where it leaves that open."""
    if run.task != "generate" or run.batch.new_tokens:
        return run
    return run.model_copy(update={"batch": run.batch.model_copy(update={"new_tokens": NEW_TOKENS})})


def with_use_cache(run: RunSpec) -> RunSpec:
    """The run with whether the model is asked for its cache, where it leaves that open: as transformers' models do
    where nothing trains, which in training is turned off or changes nothing."""
    if run.loop.use_cache is not None:
        return run
    return run.model_copy(update={"loop": run.loop.model_copy(update={"use_cache": run.task != "train"})})


def check_classes(model: ModelSpec, kernels: Kernels, profile: str) -> None:
    """Raise SpecError for a kernel of attention that the model's classes do not take, or, of another model than a
    causal language model, for a version whose classes are not read."""
    if kernels.attention in model.lacks:
        raise SpecError(
            f"kernels.attention: {kernels.attention} is not supported for {model.name or model.model_type}, whose "
            "positions are a bias of the scores; supported: sdpa, sdpa_efficient, eager",
            "kernels.attention",
        )
    if model.objective != "causal_lm" and find_profile(profile).name != "transformers-5":
        raise SpecError(
            f"profile: {profile} is not supported yet for {model.objective}; supported: transformers-5", "profile"
        )
