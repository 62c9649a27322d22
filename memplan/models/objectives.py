"""Objectives: which of a family's classes transformers builds, with its head and loss.

Named after transformers' Auto classes: `masked_lm` is AutoModelForMaskedLM. `feature_extraction`, a pipeline's name, is
AutoModel: the model without a head, with a loss of the script's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from memplan.core.errors import UnsupportedModelError, refused

Objective = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "image_classification",
    "feature_extraction",
]

# Objective -> endings of class names in `architectures`; the first is the one that `config_for_objective` writes.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "seq2seq_lm": ("ForConditionalGeneration", "T5WithLMHeadModel"),
    "causal_lm": ("ForCausalLM", "LMHeadModel"),
    "masked_lm": ("ForMaskedLM", "ForPreTraining"),
    "sequence_classification": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "image_classification": ("ForImageClassification",),
    "feature_extraction": ("Model",),
}
# Objectives for which peft also trains a copy of the head. peft itself has no task type for images; its guides set
# `modules_to_save=["classifier"]`.
# Source: peft 0.21 peft_model.py PeftModelForSequenceClassification, PeftModelForTokenClassification.
_CLASSIFIES = ("sequence_classification", "token_classification", "image_classification")
# Objectives of decoders that have a class for sequence classification and reward models, and of embedding models.
# Source: transformers 5.24 modeling_layers.py GenericForSequenceClassification.
CLASSIFIER = ("causal_lm", "sequence_classification", "feature_extraction")
# Objectives of encoders, whose head is a matrix of the vocabulary, of classes or none.
ENCODER = ("masked_lm", "sequence_classification", "token_classification", "feature_extraction")
_OTHER_HEADS = ("QuestionAnswering", "MultipleChoice", "Reward")
_MAX_SHOWN = 80  # characters of a name that an error message repeats


HEADS = ("lm_head", "score", "classifier")  # of which a model has one at most


def modules_to_train(objective: str, named: tuple[str, ...], decodes: bool = False) -> tuple[str, ...]:
    """Return the modules that peft trains in full: those `named` and, for classification, the head.

    The head is called `score` if the model `decodes`, else `classifier`.
    """
    head = "score" if decodes else "classifier"
    return (*named, head) if objective in _CLASSIFIES and head not in named else named


def objective_of(config: Mapping[str, Any], able: tuple[str, ...]) -> str:
    """Return the objective of a config's `architectures` among the family's `able` ones, by default the first.

    Any class name counts as a decoder's unless it ends like another head. Raises UnsupportedModelError for other heads.
    """
    names: Any = config.get("architectures")
    if not isinstance(names, (list, tuple)) or not names:
        return able[0]
    name = str(cast(tuple[Any, ...], names)[0])
    named = objective_named(name)
    if named in able:
        return named
    decodes = able[0] == "causal_lm" and named not in _CLASSIFIES and not any(head in name for head in _OTHER_HEADS)
    if decodes:
        return able[0]
    raise UnsupportedModelError(
        f"architectures: {name[:_MAX_SHOWN]} has a head of its own; supported are {', '.join(able)}", "architectures"
    )


def objective_named(name: str, sees: bool = False) -> str:
    """Return the objective of a class of transformers by its name; "" if it is none of these.

    `sees`: it is a vision-language model, whose conditional generation is that of a decoder.
    """
    if any(head in name for head in _OTHER_HEADS):
        return ""
    named = next((o for o, endings in _ENDINGS.items() if any(name.endswith(end) for end in endings)), "")
    return "causal_lm" if named == "seq2seq_lm" and sees else named


def config_for_objective(config: Mapping[str, Any], objective: str, able: tuple[str, ...]) -> dict[str, Any]:
    """Return the config with `architectures` set for `objective`. Raises SpecError if its family has no such class."""
    if objective not in able:
        raise refused(
            "objective",
            f"{objective} is not supported for model_type {config.get('model_type')}; supported: {', '.join(able)}",
        )
    return {**config, "architectures": [_ENDINGS[objective][0]]}
