"""What a model is trained for: the class that transformers builds, its head and its loss.

The words are those of transformers' Auto classes: AutoModelForMaskedLM is `masked_lm`. `feature_extraction`, the
pipeline's word, is AutoModel: the model without a head, whose loss is the script's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from memplan.core.errors import SpecError, UnsupportedModelError

Objective = Literal[
    "causal_lm",
    "masked_lm",
    "seq2seq_lm",
    "sequence_classification",
    "token_classification",
    "image_classification",
    "feature_extraction",
]

# What the name of a class in a config's `architectures` ends in, and the objective; the first is how it is written.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "seq2seq_lm": ("ForConditionalGeneration", "T5WithLMHeadModel"),
    "causal_lm": ("ForCausalLM", "LMHeadModel"),
    "masked_lm": ("ForMaskedLM", "ForPreTraining"),
    "sequence_classification": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "image_classification": ("ForImageClassification",),
    "feature_extraction": ("Model",),
}
# The head that peft trains as a copy beside its adapters where the task is classification: of images too, as the guides
# have it, though peft has no task of that kind.
# Source: peft 0.21 peft_model.py PeftModelForSequenceClassification, PeftModelForTokenClassification.
_CLASSIFIES = ("sequence_classification", "token_classification", "image_classification")
_HEADS = {False: "classifier", True: "score"}  # of a decoder
_OTHER_HEADS = ("QuestionAnswering", "MultipleChoice", "Reward")
_LONGEST = 80  # letters of a name that an error repeats


def saved_with(objective: str, named: tuple[str, ...], decodes: bool = False) -> tuple[str, ...]:
    """The modules that train as a copy beside adapters: those `named`, and the head of a classification, which has
    another name where a model `decodes`."""
    head = _HEADS[decodes]
    return (*named, head) if objective in _CLASSIFIES and head not in named else named


def objective_of(config: Mapping[str, Any], able: tuple[str, ...]) -> str:
    """The objective that a config's `architectures` say, among those its family is `able` to; the first without any.

    A decoder's class may be called anything but a classifier. Raises UnsupportedModelError for a class of another kind.
    """
    names: Any = config.get("architectures")
    if not isinstance(names, (list, tuple)) or not names:
        return able[0]
    name = str(cast(tuple[Any, ...], names)[0])
    found = next((o for o, endings in _ENDINGS.items() if any(name.endswith(end) for end in endings)), "")
    if found in able:
        return found
    decodes = able[0] == "causal_lm" and found not in _CLASSIFIES and not any(head in name for head in _OTHER_HEADS)
    if decodes:
        return able[0]
    raise UnsupportedModelError(
        f"architectures: {name[:_LONGEST]} has a head of its own; supported are {', '.join(able)}", "architectures"
    )


def trained_for(config: Mapping[str, Any], objective: str, able: tuple[str, ...]) -> dict[str, Any]:
    """The config of a model trained for `objective`. Raises SpecError where its family has no such class."""
    if objective not in able:
        raise SpecError(
            f"objective: {objective} is not supported for model_type {config.get('model_type')}; "
            f"supported: {', '.join(able)}",
            "objective",
        )
    return {**config, "architectures": [_ENDINGS[objective][0]]}
