"""The memory that each kernel, method and optimizer takes, as data in the language of `memplan.core.ir`.

Each module of `families` covers one family, or many that differ little. Its `BUILDERS` maps a model_type to its row of
`Decoder`, or to the function that returns the model's stack.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib import import_module

from memplan.catalogue.attention.attention import FLATTENING, flattened
from memplan.catalogue.decoder.decoder import stack_of
from memplan.catalogue.kernels.rewriting import first_equal, rewrite
from memplan.catalogue.kernels.wiring import DISTILLING, GENERATING, TRAINERS, Trainer, Wiring
from memplan.core.ir import Stack
from memplan.models.model import ModelSpec


@lru_cache(maxsize=16)
def build(model: ModelSpec, wiring: Wiring, code: str = "transformers") -> Stack:
    """Return the model as a stack of operations with its weights, but without dtypes, method or loss.

    `code`: whose implementation to describe: `transformers`, `litgpt` or `torchtitan`. Models with equal operations
    share one stack.
    """
    return first_equal(_built(model, wiring, code))


def _built(model: ModelSpec, wiring: Wiring, code: str) -> Stack:
    if code == "torchtitan":
        return import_module("memplan.catalogue.families.torchtitan").build(model, wiring)
    if code == "litgpt":
        return import_module("memplan.catalogue.families.litgpt").build(model, wiring)
    wiring = wiring._replace(drops=model.probability("attention_dropout") > 0)
    stack = stack_of(model, wiring, model.family.stack, model.model_type)
    if model.objective == "sequence_classification" and model.objectives[0] == "causal_lm":
        from memplan.catalogue.decoder.task_heads import classifying

        stack = classifying(model, stack)
    if model.objective == "feature_extraction" and model.objectives[0] == "causal_lm":
        from memplan.catalogue.decoder.task_heads import without_head

        stack = without_head(stack)
    if model.get("output_router_logits", False):
        from memplan.catalogue.experts.routers import hold_router_logits

        stack = rewrite(stack, lambda op: (hold_router_logits(op),))
    flattens = model.family.attention.single_sequence == "views" or wiring.backend in FLATTENING
    if not (wiring.is_single_sequence and flattens):
        return stack
    return rewrite(stack, lambda op: (flattened(op),))


def with_trainer(stack: Stack, trainer: Trainer, others: Mapping[str, Stack], autocast: str | None) -> Stack:
    """Return the stack with what a trainer of TRL computes: see `memplan.catalogue.kernels.preference.attach`.

    others  operations of the models that run inside the step, by the phase in which they do
    """
    if trainer.name in DISTILLING:
        from memplan.catalogue.kernels import distillation

        return distillation.attach(stack, trainer, others.get("teacher"), autocast)
    reference, first_pass = others.get("reference"), others.get("forward")
    if TRAINERS[trainer.name].own_loop:
        from memplan.catalogue.inference.decoding import with_caches
        from memplan.catalogue.kernels import ppo

        return ppo.attach(with_caches(stack), trainer, others.get("value"), autocast)
    if trainer.name in GENERATING:
        from memplan.catalogue.kernels import policy_gradient

        return policy_gradient.attach(stack, trainer, reference, first_pass, autocast)
    from memplan.catalogue.kernels.preference import attach

    return attach(stack, trainer, reference, first_pass, autocast)
