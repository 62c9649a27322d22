"""Assisted generation: an assistant proposes several tokens per round, and the model checks them in one pass.

A round is the assistant's passes, one token each, and one pass of the model over the proposed tokens and the token
before them, which returns the logits of all of them. How many proposals are accepted depends on the data. We assume
none, only the model's own token: then there are as many rounds as new tokens, each as long as possible, and every cache
gets as long as any data could make it. An assistant that stops early because it is unsure takes less.

The rounds walked are the first, the second, the last one that proposes the full number of tokens, the one after it, and
the last two.

Source: transformers 5.24 generation/utils.py _assisted_decoding, candidate_generator.py, cache_utils.py crop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.catalogue.inference.caches import caches as caches_of
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import ConfigError, MemplanError, errors_about, refused
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.program.inference.assisted import longest_draft
from memplan.program.run import TOKENS, Assistant, ResolvedRun
from memplan.spec.generation import Generation
from memplan.spec.run import RunSpec
from memplan.spec.training import Method

MOST_PROPOSED = 16_384  # tokens per round: each one's logits are a separate allocation to replay
_MODEL, _EXIT = "generation.assistant_model", "generation.assistant_early_exit"


Decide = Callable[[RunSpec, ModelSpec | None], ResolvedRun]


def with_assistant(run: RunSpec, model: ModelSpec, decided: ResolvedRun, decide: Decide) -> ResolvedRun:
    """Return the decided run with its assistant filled in. Raises as `decide_assistant` does."""
    generation = decided.parts["generation"]
    assert isinstance(generation, Generation)
    assistant = decide_assistant(run, model, decided, decide) if generation != Generation() else None
    if assistant is None:
        return decided
    parts = {**decided.parts, "generation": assistant.with_assistant_defaults(generation)}
    return decided._replace(assistant=assistant, notes=(*decided.notes, *assistant.notes), parts=parts)


def decide_assistant(run: RunSpec, model: ModelSpec, decided: ResolvedRun, decide: Decide) -> Assistant | None:
    """Return what proposes the run's tokens, or None if nothing does. `decide` resolves the assistant's own run.

    Raises SpecError for what transformers rejects or memplan does not support yet.
    """
    asked = run.generation
    _refuse(run, model, find_profile(run.profile).name == "transformers-5")
    if not asked.assisted:
        return None
    if asked.prompt_lookup_num_tokens:
        return Assistant(asked.prompt_lookup_num_tokens, None, False, True)
    tokens = asked.num_assistant_tokens or TOKENS
    if asked.num_assistant_tokens_schedule in ("heuristic", "heuristic_transient"):
        tokens = max(tokens, longest_draft(tokens, run.batch.new_tokens))
    proposed = min(tokens, run.batch.new_tokens - 1)
    if proposed > MOST_PROPOSED:
        is_growing = asked.num_assistant_tokens is None or tokens > asked.num_assistant_tokens
        field = f"generation.num_assistant_tokens{'_schedule' if is_growing else ''}"
        raise refused(
            field,
            f"up to {proposed:,} tokens would be proposed per round (batch.new_tokens {run.batch.new_tokens:,}), and "
            f"memplan counts at most {MOST_PROPOSED:,}; use {'constant' if is_growing else 'fewer'}",
        )
    drafting_run, draft_model = _assistant_run(run), None
    if asked.assistant_early_exit:
        draft_model = model_of_first_layers(model, asked.assistant_early_exit)
        drafting_run = drafting_run.model_copy(update={"model": run.model})
    elif asked.assistant_model is not None:
        with errors_about(_MODEL):
            draft_model = find_model(asked.assistant_model)
        drafting_run = drafting_run.model_copy(update={"model": asked.assistant_model})
        _refuse_pair(model, draft_model)
    try:
        drafts = decide(drafting_run, draft_model)
    except MemplanError as error:
        field = _EXIT if asked.assistant_early_exit else _MODEL
        raise refused(field, f"{error}") from None
    if asked.assistant_early_exit:  # the assistant shares the model's weights
        graph = decided.structure.graph
        first = drafts.structure.graph._replace(recipe=graph.recipe, wiring=graph.wiring, rank=graph.rank)
        drafts = drafts._replace(structure=drafts.structure._replace(graph=first))
    return Assistant(tokens, drafts, bool(asked.assistant_early_exit), False)


def _assistant_run(run: RunSpec) -> RunSpec:
    """Return the assistant's own run, still without its model."""
    asked = run.generation
    weights = asked.assistant_dtype or run.precision.weights
    update: dict[str, Any] = {
        "method": Method(quantization=asked.assistant_quantization),
        "precision": run.precision.model_copy(update={"weights": weights, "compute": None}),
        "generation": Generation(do_sample=asked.do_sample),
        "batch": run.batch.model_copy(update={"images": 0, "frames": 0, "image_size": None}),
        "objective": None,
    }
    return run.model_copy(update=update)


def model_of_first_layers(model: ModelSpec, layers: int) -> ModelSpec:
    """Return the model cut down to its first layers and its head.

    Raises SpecError if a model with that many layers would have different ones.
    """
    config = {**model.config, "num_hidden_layers": layers}
    try:
        shortened = ModelSpec(config, model.name, model.card, model.checkpoint)
    except ConfigError:
        shortened = None
    if shortened is None or shortened.layers != model.layers[:layers]:
        raise refused(
            _EXIT,
            f"is not supported yet for {model.name or model.model_type}, whose layers depend on the number of layers; "
            "use assistant_model",
        )
    return shortened


def _refuse(run: RunSpec, model: ModelSpec, current: bool) -> None:
    asked = run.generation
    sources = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    given = [name for name in sources if getattr(asked, name) is not None]
    assistants = [name for name in given if name != "prompt_lookup_num_tokens"]
    if len(given) > 1:
        field = f"generation.{given[1]}"
        raise refused(field, f"cannot be combined with {given[0]}; set only one of them")
    for name in ("num_assistant_tokens", "num_assistant_tokens_schedule"):
        if getattr(asked, name) is not None and not assistants:
            field = f"generation.{name}"
            raise refused(field, "needs an assistant; set assistant_model or assistant_early_exit")
    for name in ("assistant_dtype", "assistant_quantization"):
        if getattr(asked, name) is not None and asked.assistant_model is None:
            field = f"generation.{name}"
            raise refused(field, "only applies to an assistant with weights of its own; set assistant_model")
    if not given:
        return
    field = f"generation.{given[0]}"
    if not current:
        raise refused(field, "is only modelled for transformers 5; use profile transformers-5")
    if run.batch.micro > 1:
        raise refused(
            "batch.micro",
            f"with an assistant transformers generates one sequence at a time, not {run.batch.micro}; use 1",
        )
    if asked.num_beams > 1:
        raise refused(
            "generation.num_beams", f"transformers has no beam search with an assistant; use 1, not {asked.num_beams}"
        )
    if asked.cache_implementation == "legacy":
        raise refused(
            "generation.cache_implementation",
            "legacy belongs to versions whose assistants are not supported yet; use dynamic or static",
        )
    window, cache_length = model.sliding_window, run.batch.sequence + run.batch.new_tokens - 1
    if asked.cache_implementation == "static" and window is not None and cache_length > window:
        raise refused(
            "generation.cache_implementation",
            f"an assistant has to crop the cache, and a static cache with a window of {window} tokens cannot be "
            f"cropped once it holds {cache_length}; use dynamic",
        )
    if run.batch.sees:
        raise refused("batch.images", "is not supported yet with an assistant; supported: 0")
    if model.family.generation.published_cache:
        raise refused(field, "is not supported yet for models that run code published with their weights")
    if model.is_encoder_decoder:
        raise refused(
            field, f"an assistant is not supported yet for encoder-decoders such as {model.name or model.model_type}"
        )
    _refuse_states(model, field)
    if asked.assistant_early_exit is not None:
        _refuse_exit(model, asked.assistant_early_exit, field)


def _refuse_exit(model: ModelSpec, layers: int, field: str) -> None:
    """Raise SpecError if the early exit is none, or makes transformers fail for this model."""
    name = model.name or model.model_type
    if layers >= model.num_hidden_layers:
        raise refused(field, f"{layers} of {model.num_hidden_layers} layers is not an early exit; use fewer layers")
    if model.family.generation.ignores_early_exit:
        raise refused(
            field, f"transformers runs all layers of {name} with a cache for {layers} and fails; use assistant_model"
        )
    if model.config.get("text_config"):
        raise refused(
            field,
            f"transformers sets num_hidden_layers on {name}'s outer config instead of its text_config, and fails; use "
            "assistant_model",
        )


def _refuse_states(model: ModelSpec, field: str) -> None:
    if any(part.per in ("sequence", "rest") for layer in caches_of(model) for part in layer.parts):
        raise refused(
            field, f"{model.name or model.model_type} keeps states, which cannot be rolled back to an earlier token"
        )


def _refuse_pair(model: ModelSpec, assistant: ModelSpec) -> None:
    field = _MODEL
    if assistant.objective != "causal_lm":
        raise refused(field, f"{assistant.name or assistant.model_type} is not a causal language model")
    _refuse_states(assistant, field)
    if model.vocab_size != assistant.vocab_size:
        raise refused(
            field,
            f"{assistant.name or assistant.model_type} has a vocabulary of {assistant.vocab_size}, "
            f"{model.name or model.model_type} one of {model.vocab_size}: transformers would translate between the "
            "two tokenizers (universal assisted decoding), which is not supported yet",
        )
