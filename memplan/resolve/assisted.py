"""Assisted generation: in rounds some tokens are proposed, and the model reads them all at once.

A round's passes are those of the assistant, a token each, and one of the model: over the tokens proposed and the one
before them, all of whose logits it returns. How many of them stay is in the data. None is taken to do, but for the
model's own one: so there are as many rounds as new tokens, each as long as it may be, and every cache has been as long
as any that the data could make it. An assistant that is unsure stops early, which takes less.

Walked are the first round, the second, the last that proposes as many tokens as any, the one after it, and the last
two.

Source: transformers 5.24 generation/utils.py _assisted_decoding, candidate_generator.py, cache_utils.py crop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from memplan.catalogue.inference.caches import caches as caches_of
from memplan.catalogue.inference.decoding import CACHED_BY_ITS_CODE
from memplan.catalogue.profiles.profiles import find_profile
from memplan.core.errors import ConfigError, MemplanError, SpecError, about
from memplan.models.cards import find_model
from memplan.models.model import ModelSpec
from memplan.program.inference.assisted import longest_draft
from memplan.program.run import TOKENS, Assistant, Decided
from memplan.spec.generation import Generation
from memplan.spec.run import RunSpec
from memplan.spec.training import Method

MOST_PROPOSED = 16_384  # in a round: the logits of each are an allocation of its own to replay
_MODEL, _EXIT = "generation.assistant_model", "generation.assistant_early_exit"


Decide = Callable[[RunSpec, ModelSpec | None], Decided]


def with_assistant(run: RunSpec, model: ModelSpec, decided: Decided, decide: Decide) -> Decided:
    """The decided run with what proposes its tokens. Raises as `decide_assistant` does."""
    generation = decided.parts["generation"]
    assert isinstance(generation, Generation)
    assistant = decide_assistant(run, model, decided, decide) if generation != Generation() else None
    if assistant is None:
        return decided
    parts = {**decided.parts, "generation": assistant.said(generation)}
    return decided._replace(assistant=assistant, notes=(*decided.notes, *assistant.notes), parts=parts)


def decide_assistant(run: RunSpec, model: ModelSpec, decided: Decided, decide: Decide) -> Assistant | None:
    """What proposes the run's tokens, None where nothing does. `decide` is asked for the assistant's own run.

    Raises SpecError for what transformers does not take, or memplan not yet.
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
        grows = asked.num_assistant_tokens is None or tokens > asked.num_assistant_tokens
        field = f"generation.num_assistant_tokens{'_schedule' if grows else ''}"
        raise SpecError(
            f"{field}: {proposed:,} tokens are proposed in a round of batch.new_tokens {run.batch.new_tokens:,}, and "
            f"at most {MOST_PROPOSED:,} are counted; say {'constant' if grows else 'fewer'}",
            field,
        )
    one, own = _alone(run), None
    if asked.assistant_early_exit:
        own = model_of_first_layers(model, asked.assistant_early_exit)
        one = one.model_copy(update={"model": run.model})
    elif asked.assistant_model is not None:
        with about(_MODEL):
            own = find_model(asked.assistant_model)
        one = one.model_copy(update={"model": asked.assistant_model})
        _refuse_pair(model, own)
    try:
        drafts = decide(one, own)
    except MemplanError as error:
        field = _EXIT if asked.assistant_early_exit else _MODEL
        raise SpecError(f"{field}: {error}", field) from None
    if asked.assistant_early_exit:  # weights as the model's own
        graph = decided.structure.graph
        first = drafts.structure.graph._replace(recipe=graph.recipe, wiring=graph.wiring, rank=graph.rank)
        drafts = drafts._replace(structure=drafts.structure._replace(graph=first))
    return Assistant(tokens, drafts, bool(asked.assistant_early_exit), False)


def _alone(run: RunSpec) -> RunSpec:
    """The assistant's own run, but for its model."""
    asked = run.generation
    weights = asked.assistant_dtype or run.precision.weights
    update: dict[str, Any] = {
        "method": Method(quantization=asked.assistant_quantization),
        "precision": run.precision.model_copy(update={"weights": weights, "compute": None}),
        "generation": Generation(do_sample=asked.do_sample),
        "batch": run.batch.model_copy(update={"images": 0, "image_size": None}),
        "objective": None,
    }
    return run.model_copy(update=update)


def model_of_first_layers(model: ModelSpec, layers: int) -> ModelSpec:
    """The model with its first layers alone, and its head. Raises SpecError where a model of so many has others."""
    config = {**model.config, "num_hidden_layers": layers}
    try:
        found = ModelSpec(config, model.name, model.card, model.checkpoint)
    except ConfigError:
        found = None
    if found is None or found.layers != model.layers[:layers]:
        raise SpecError(
            f"{_EXIT}: is not supported yet for {model.name or model.model_type}, whose layers differ by how many of "
            "them there are; assistant_model is",
            _EXIT,
        )
    return found


def _refuse(run: RunSpec, model: ModelSpec, current: bool) -> None:
    asked = run.generation
    ways = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
    said = [name for name in ways if getattr(asked, name) is not None]
    drafts = [name for name in said if name != "prompt_lookup_num_tokens"]
    if len(said) > 1:
        field = f"generation.{said[1]}"
        raise SpecError(f"{field}: excludes {said[0]}: one thing proposes tokens", field)
    for name in ("num_assistant_tokens", "num_assistant_tokens_schedule"):
        if getattr(asked, name) is not None and not drafts:
            field = f"generation.{name}"
            raise SpecError(f"{field}: is of an assistant; say assistant_model or assistant_early_exit", field)
    for name in ("assistant_dtype", "assistant_quantization"):
        if getattr(asked, name) is not None and asked.assistant_model is None:
            field = f"generation.{name}"
            raise SpecError(f"{field}: is of an assistant's own weights; say assistant_model", field)
    if not said:
        return
    field = f"generation.{said[0]}"
    if not current:
        raise SpecError(f"{field}: is counted as transformers 5.24 has it; say profile transformers-5", field)
    if run.batch.micro > 1:
        raise SpecError(
            f"batch.micro: transformers generates with an assistant for one sequence at a time, not {run.batch.micro}",
            "batch.micro",
        )
    if asked.num_beams > 1:
        raise SpecError(
            f"generation.num_beams: transformers searches no {asked.num_beams} beams with an assistant; say one",
            "generation.num_beams",
        )
    if asked.cache_implementation == "legacy":
        raise SpecError(
            "generation.cache_implementation: legacy is of versions whose assistants are not supported yet; dynamic or "
            "static",
            "generation.cache_implementation",
        )
    window, room = model.sliding_window, run.batch.sequence + run.batch.new_tokens - 1
    if asked.cache_implementation == "static" and window is not None and room > window:
        raise SpecError(
            f"generation.cache_implementation: a static cache of a window of {window} tokens cannot be cut back to an "
            f"earlier one, as an assistant needs it of {room}; say dynamic",
            "generation.cache_implementation",
        )
    if run.batch.images:
        raise SpecError(
            f"batch.images: {run.batch.images} is not supported yet with an assistant; supported: 0", "batch.images"
        )
    if model.model_type in CACHED_BY_ITS_CODE:
        raise SpecError(f"{field}: is not supported yet with code that is published with the weights", field)
    if model.is_encoder_decoder:
        raise SpecError(
            f"{field}: an assistant is not supported yet for {model.name or model.model_type}, which decodes what an "
            "encoder has read",
            field,
        )
    _refuse_states(model, field)
    if asked.assistant_early_exit is not None:
        _refuse_exit(model, asked.assistant_early_exit, field)


# Families whose code does not end at `layers[: config.num_hidden_layers]`, which an early exit sets: all layers run,
# and find no place in a cache of fewer.
# Source: transformers 5.24 models/*/modeling_*.py; candidate_generator.py EarlyExitCandidateGenerator.get_candidates
_RUN_ALL = frozenset(
    (
        *("bloom", "cohere2", "exaone4", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj"),
        *("mpt", "nemotron", "opt", "stablelm"),
    )
)


def _refuse_exit(model: ModelSpec, layers: int, field: str) -> None:
    """Raise SpecError for models that transformers' early exit ends with an error for, and for no exit at all."""
    name = model.name or model.model_type
    if layers >= model.num_hidden_layers:
        raise SpecError(
            f"{field}: {layers} of {model.num_hidden_layers} layers are no early exit; say fewer than those", field
        )
    if model.model_type in _RUN_ALL:
        raise SpecError(
            f"{field}: transformers runs all layers of {name} over a cache of {layers}, and ends with an error; say "
            "assistant_model",
            field,
        )
    if model.config.get("text_config"):
        raise SpecError(
            f"{field}: transformers sets num_hidden_layers of the config around {name}'s text_config, which has none, "
            "and ends with an error; say assistant_model",
            field,
        )


def _refuse_states(model: ModelSpec, field: str) -> None:
    if any(part.per in ("sequence", "rest") for layer in caches_of(model) for part in layer.parts):
        raise SpecError(
            f"{field}: {model.name or model.model_type} keeps states, which cannot be taken back to an earlier token",
            field,
        )


def _refuse_pair(model: ModelSpec, assistant: ModelSpec) -> None:
    field = _MODEL
    if assistant.objective != "causal_lm":
        raise SpecError(f"{field}: {assistant.name or assistant.model_type} is no decoder that proposes tokens", field)
    _refuse_states(assistant, field)
    if model.vocab_size != assistant.vocab_size:
        raise SpecError(
            f"{field}: {assistant.name or assistant.model_type} has a vocabulary of {assistant.vocab_size}, "
            f"{model.name or model.model_type} of {model.vocab_size}: transformers takes them for other tokens and "
            "translates with both tokenizers (universal assisted decoding), which is not supported yet",
            field,
        )
