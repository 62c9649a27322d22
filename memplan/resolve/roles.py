"""The other models of a trainer's step, each decided as a run of its own, which trains nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from memplan.catalogue.inference.one_pass import Pass
from memplan.catalogue.kernels.wiring import TRAINERS
from memplan.catalogue.profiles.profiles import library_behaviour
from memplan.core.errors import MemplanError, errors_about, refused
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec, with_objective, without_dropout
from memplan.program.graph import Graph, TensorGroup, tensor_group
from memplan.program.run import ResolvedRun
from memplan.resolve.card import GPUFacts
from memplan.resolve.open_run import BatchFacts, Parts
from memplan.resolve.ranks import without_preparation
from memplan.resolve.refusals import trainers
from memplan.resolve.refusals.refuse import refuse
from memplan.spec.generation import InlineModel
from memplan.spec.parallelism import Parallelism
from memplan.spec.roles import RoleModel, Roles
from memplan.spec.run import Batch, RunSpec
from memplan.spec.serving import Serving
from memplan.spec.training import Method, Precision

Decide = Callable[[ModelSpec, Parts, GPUFacts | None, BatchFacts], ResolvedRun]
DecideForward = Callable[[RunSpec, ModelSpec], ResolvedRun]
_SEVERAL = Batch(micro=2)  # sequences


def step_precision(trainer: str, loss: str | None, precision: Precision) -> Precision:
    """Return the precision in which a trainer's step computes: without autocast, if it calls the model's backbone."""
    if TRAINERS[trainer].backbone in ("every", loss):
        return precision.model_copy(update={"autocast": False, "compute": None})
    return precision


@lru_cache(maxsize=256)
def fields_of_role(precision: Precision, other: RoleModel) -> Mapping[str, Any]:
    """Return the fields in which the run of another model differs from the run whose step it is in.

    It is loaded in the dtype of that run's weights, unless it has its own, and computes as that run does.
    """
    q = other.quantization
    dtypes = {"weights": other.dtype or precision.weights, "grads": None, "master": None}
    return {
        "trainer": "sft",
        "reference": None,
        "roles": Roles(),
        "rollout": "transformers",
        "parallelism": Parallelism(),
        "method": other.method or (Method() if q is None else Method(kind="qlora", quantization=q)),
        "precision": precision.model_copy(update=dtypes),
    }


def graphs_of_roles(
    run: RunSpec,
    model: ModelSpec,
    tokens: int,
    facts: BatchFacts,
    card: GPUFacts | None,
    decide: Decide,
    decide_forward: DecideForward,
) -> tuple[tuple[str, Graph], ...]:
    """Return the graph of every other model that is on the GPUs that train, by its role.

    They are decided once for all batches whose operations are the same.

    Raises SpecError for one that the step cannot have.
    """
    if run.roles.reference is not None:
        _refuse_vocabulary("reference", model, find_model(run.roles.reference.model), pads=False)
    refuse(trainers.roles(run))
    found: list[tuple[str, ModelSpec]] = []
    for role, other in models_of(run).items():
        with errors_about(f"roles.{role}.model"):
            found.append((role, find_model(other.model)))
    if run.batch.micro > 1 and not any(depends_on_lengths(other) for _, other in found):
        run, tokens = run.model_copy(update={"batch": _SEVERAL}), 0
    return _graphs_of_roles(run, model, tuple(found), tokens, facts, card, decide, decide_forward)


@lru_cache(maxsize=256)
def _graphs_of_roles(
    run: RunSpec,
    model: ModelSpec,
    models: tuple[tuple[str, ModelSpec], ...],
    tokens: int,
    facts: BatchFacts,
    card: GPUFacts | None,
    decide: Decide,
    decide_forward: DecideForward,
) -> tuple[tuple[str, Graph], ...]:
    graphs: list[tuple[str, Graph]] = []
    facts_of_trainer = TRAINERS[run.trainer]
    for role, found in models:
        other, field = models_of(run)[role], f"roles.{role}.model"
        if role in ("teacher", "reference"):
            _refuse_vocabulary(role, model, found, pads=_by_chunk(run, model))
        if facts_of_trainer.own_loop and found.objectives[0] != "causal_lm":
            raise refused(field, f"PPOTrainer calls the score of a decoder; {found.model_type} has none")
        if other.location != "gpu" or role not in facts_of_trainer.models:  # a program of its own
            continue
        window = found.sliding_window
        own = facts._replace(windowed=window is not None and tokens >= window, accumulates=False)
        parts = _parts(Parts.of(run), other)
        try:
            if role == "reward":
                graph = scoring_pass(run, decide_forward).structure.graph
            elif role == "value":
                alone = scoring_run(run, role)
                scalar = without_dropout(with_objective(find_model(alone.model), alone.objective))
                graph = decide(scalar, parts._replace(profile=alone.profile), card, own).structure.graph
            else:
                graph = _teacher(run, decide(found, parts, card, own).structure.graph)
        except MemplanError as error:
            raise refused(field, f"{error}") from None
        graphs.append((role, graph))
    return tuple(graphs)


def critic_run(run: RunSpec) -> RunSpec | None:
    """Return the update of a value model that trains by itself on the run's GPUs, as its policy does; None without one.

    Source: openrlhf 0.11.2 trainer/ray/ppo_critic.py CriticModelActor, models/model.py get_llm_for_sequence_regression.
    """
    other = run.roles.value
    if other is None or "value" in TRAINERS[run.trainer].models or other.location != "gpu":
        return None
    rows, micro = run.batch.micro * run.batch.accumulation, other.micro or run.batch.micro
    batch = {"micro": micro, "accumulation": -(-rows // micro), "sequence": run.batch.tokens}
    kernels = run.kernels.model_copy(update={"fused": None, "loss": None})
    fields = {**fields_of_role(run.precision, other), "method": other.method or run.method}
    fields |= {"parallelism": run.parallelism}
    fields |= {"profile": RunSpec.model_fields["profile"].default, "serving": Serving(), "kernels": kernels}
    fields |= {"model": _with_score(find_model(other.model)), "objective": "sequence_classification", "batch": batch}
    return RunSpec.model_validate({**dict(run), **fields})


@lru_cache(maxsize=256)
def _with_score(model: ModelSpec) -> InlineModel:
    """Return the model with a head of one score."""
    return InlineModel(config={**model.config, "num_labels": 1})


def models_of(run: RunSpec) -> Mapping[str, RoleModel]:
    """Return the other models of the run's step by role. A value model in it is like the reward model unless named."""
    return _models_of(run.roles, run.trainer)


@lru_cache(maxsize=256)
def _models_of(roles: Roles, trainer: str) -> Mapping[str, RoleModel]:
    models = dict(roles.named)
    if "value" in TRAINERS[trainer].models and roles.value is None and roles.reward is not None:
        models["value"] = roles.reward.model_copy(update={"location": "gpu", "quantization": None})
    return models


@lru_cache(maxsize=256)
def _parts(parts: Parts, other: RoleModel) -> Parts:
    """Return the parts of another model's run, given those of the run whose step it is in."""
    precision, kernels = step_precision(parts.trainer, parts.kernels.loss, parts.precision), parts.kernels
    fields = {**fields_of_role(precision, other)}
    if TRAINERS[parts.trainer].own_loop:
        kernels = kernels.model_copy(update={"checkpointing": "none"})
        fields["method"] = without_preparation(fields["method"].model_copy(update={"dropout": 0.0}))
    return parts._replace(kernels=kernels, **fields)


def _teacher(run: RunSpec, graph: Graph) -> Graph:
    """Return the graph of a teacher, given that of its model as if it trained: without adapters or preparation."""
    recipe = graph.recipe._replace(
        targets=(), saved=(), selection=None, bias="none", tokens=0, fused="", preparation=""
    )
    graph = graph._replace(recipe=recipe)
    if run.trainer != "gkd" or _by_chunk(run, graph.model):  # which sets use_cache to false
        return graph
    cache = library_behaviour(run.profile, graph.model.model_type, False).generation.cache  # it does not set use_cache
    one_pass = Pass("teacher", cache, last_only=False)
    return graph._replace(wiring=graph.wiring._replace(caching=True), inference=one_pass)


def _by_chunk(run: RunSpec, model: ModelSpec) -> bool:
    """Return whether the trainer is ms-swift's GKD, which pads the logits of the smaller vocabulary."""
    return (
        run.trainer == "gkd" and library_behaviour(run.profile, model.model_type, False).trainer.log_probs == "rolled"
    )


def scoring_run(run: RunSpec, role: str = "reward") -> RunSpec:
    """Return the pass of the reward model, or of PPO's value model, over any completions."""
    other = models_of(run)[role]
    model = _with_score(find_model(other.model)) if TRAINERS[run.trainer].own_loop else other.model
    return _scoring_run(model, other, run.precision, run.gpu)


def scoring_pass(run: RunSpec, decide_forward: DecideForward) -> ResolvedRun:
    """Return the pass of the reward model over all completions that a step generates.

    It is decided once for all batches whose operations are the same.

    Source: trl 1.16.0 trainer/grpo_trainer.py _calculate_rewards; rloo_trainer.py is the same.
    """
    other, batch, alone = models_of(run)["reward"], run.batch, scoring_run(run)
    rows = batch.micro * batch.accumulation
    lengths = alone.batch.model_copy(update={"micro": min(rows, other.micro or rows), "sequence": batch.tokens})
    return decided_at(lengths, alone, find_model(alone.model), decide_forward)


def decided_at(batch: Batch, run: RunSpec, model: ModelSpec, decide: DecideForward) -> ResolvedRun:
    """Return the decided run with another batch: decided once for all whose operations are those of `run`, a batch of
    several sequences."""
    if batch.micro == 1 or depends_on_lengths(model):
        return decide(run.model_copy(update={"batch": batch}), model)
    return _decided_once(run, model, decide)._replace(batch=batch)


def depends_on_lengths(model: ModelSpec) -> bool:
    """Return whether a model may run other operations on longer sequences."""
    return model.sliding_window is not None or bool(model.scan_chunk) or model.is_encoder_decoder


@lru_cache(maxsize=256)
def _decided_once(run: RunSpec, model: ModelSpec, decide: DecideForward) -> ResolvedRun:
    return decide(run, model)


@lru_cache(maxsize=256)
def _scoring_run(model: str | InlineModel, other: RoleModel, precision: Precision, gpu: str | None) -> RunSpec:
    return RunSpec(
        model=model,
        task="forward",
        objective="sequence_classification",
        method=Method(quantization=other.quantization),
        precision=fields_of_role(precision, other)["precision"].model_copy(update={"grads": None, "master": None}),
        batch={"micro": 2},
        gpu=gpu,
    )


def rollout_chunk(rows: int) -> int:
    """Return how many of a step's completions PPO generates and scores at once.

    Source: trl 1.12.0 experimental/ppo/ppo_config.py local_rollout_forward_batch_size; the same in trl 0.24.0.
    """
    return min(rows, 64)


def padded_rows(rows: int) -> int:
    """Return the rows of PPO's logits once all chunks are padded to the largest."""
    return -(-rows // rollout_chunk(rows)) * rollout_chunk(rows)


def logits_of_completions(batch: Batch, graph: Graph) -> TensorGroup:
    """Return the logits from which PPO's completions were chosen: a variable of its loop holds them until the next ones
    exist.

    Source: trl 1.12.0 experimental/ppo/ppo_trainer.py train: logitss; the same in trl 0.24.0.
    """
    shape = f"{padded_rows(batch.micro * batch.accumulation)} {batch.new_tokens} {graph.model.vocab_size}"
    source = "trl 1.12.0 experimental/ppo/ppo_trainer.py train: logitss"
    return tensor_group("activation", "logits of all completions", shape, "fp32", source, "rollout")


def _refuse_vocabulary(role: str, model: ModelSpec, other: ModelSpec, pads: bool) -> None:
    """Refuse a model whose tokens are compared with those of another vocabulary.

    Source: trl 1.16.0 trainer/distillation_trainer.py __init__, experimental/gkd/gkd_trainer.py __init__.
    """
    if other.vocab_size != model.vocab_size and not (pads and other.vocab_size > model.vocab_size):
        needs = "and a smaller one is not supported yet" if pads else "so they must be equal"
        raise refused(
            f"roles.{role}.model",
            f"its vocabulary has {other.vocab_size:,} tokens and the model's {model.vocab_size:,}; the step compares "
            f"both models token by token, {needs}",
        )
