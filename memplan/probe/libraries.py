"""The libraries a probe needs, imported by name, so that a missing one gives a clear one-line error."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any, cast

from memplan.core.errors import ProbeError, nearest
from memplan.models.cards import find_config
from memplan.models.configs import MODULES
from memplan.models.objectives import objective_named
from memplan.resolve.decide import objective_of as decided_objective
from memplan.spec.run import RunSpec

NAMES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
LISTED = (*NAMES, "trl")  # whose versions a trace names
QUIET = {
    "HF_HUB_OFFLINE": "1",  # the config is enough; nothing needs to be downloaded
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "BITSANDBYTES_NOWELCOME": "1",
}


def require(*names: str) -> None:
    """Raise ProbeError, naming the missing libraries and the extra that installs them, unless all are installed."""
    missing = [name for name in names or NAMES if name not in sys.modules and importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ProbeError(
            f"probe: {', '.join(missing)} {verb} not installed; what a probe needs: pip install 'memplan[probe]'"
        )


def library(name: str) -> Any:
    """Return a module of an installed library. Raises ProbeError, with the library's reason, if the import fails."""
    require(name.partition(".")[0])
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    try:
        module: ModuleType = importlib.import_module(name)
    except Exception as error:  # a broken installation: mismatched versions, or half installed
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ProbeError(f"probe: {name} cannot be imported ({reason:.300})") from error
    return module


def versions() -> dict[str, str]:
    """Return the versions of the installed libraries by name."""
    installed: dict[str, str] = {}
    for name in LISTED:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


# By objective: the middle of transformers' MODEL_FOR_*_MAPPING_NAMES, the auto class, and a name for messages.
_CLASSES = {
    "causal_lm": ("CAUSAL_LM", "AutoModelForCausalLM", "causal language models"),
    "masked_lm": ("MASKED_LM", "AutoModelForMaskedLM", "masked language models"),
    "seq2seq_lm": ("SEQ_TO_SEQ_CAUSAL_LM", "AutoModelForSeq2SeqLM", "encoder-decoders"),
    "sequence_classification": (
        "SEQUENCE_CLASSIFICATION",
        "AutoModelForSequenceClassification",
        "sequence classification",
    ),
    "token_classification": ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification", "token classification"),
    "image_classification": ("IMAGE_CLASSIFICATION", "AutoModelForImageClassification", "image classification"),
    "feature_extraction": ("", "AutoModel", "models without a head"),
}


def class_named(config: Mapping[str, Any]) -> str:
    """Return the name of the class that the config's `architectures` names, or else the first of transformers' tables.

    "" if the installed transformers has no such class. One for several losses of pretraining is a masked language model
    here, whose labels are the tokens.
    """
    auto, listed = library("transformers.models.auto.modeling_auto"), config.get("architectures")
    tables = (getattr(auto, f"MODEL_{kind}MAPPING_NAMES", {}) for kind in _TABLES)
    names: tuple[Any, ...] = tuple(cast(Iterable[Any], listed)) if isinstance(listed, (list, tuple)) else ()
    names = (*names, *(table.get(config.get("model_type"), "") for table in tables))
    named = (str(n) for n in names if n and not str(n).endswith("ForPreTraining"))
    known = {*library("transformers").__all__}  # to ask for a class imports its module
    return next((n for n in named if n in known), "")


_TABLES = (  # the middle of their names, in the order they are looked up
    *("FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_MASKED_LM_", "FOR_IMAGE_TEXT_TO_TEXT_", "FOR_CAUSAL_LM_"),
    *("FOR_SPEECH_SEQ_2_SEQ_", "FOR_IMAGE_CLASSIFICATION_", ""),
)


def objective_of(run: RunSpec) -> str:
    """Return the objective of the run's model: that of the class that its config names, if memplan has no stack for it.

    Raises ProbeError for a class whose labels a probe cannot make.
    """
    config = find_config(run.model)
    if run.objective is not None or config.get("model_type") in MODULES:
        return decided_objective(run)
    name = class_named(config)
    if not name:
        return "causal_lm"
    objective = objective_named(name, sees=bool(config.get("vision_config")))
    if objective not in _CLASSES:
        known = ", ".join(_CLASSES)
        raise ProbeError(f"architectures: a probe makes no labels for {name:.80}; objectives it runs: {known}", "model")
    return objective


def model_class(model_type: str, sees: bool = False, objective: str = "causal_lm") -> str:
    """Return the name of transformers' auto class that builds the model for the objective.

    Vision-language models (`sees`) and speech models have auto classes of their own. Raises ProbeError if the installed
    transformers has no class for this `model_type`.
    """
    auto = library("transformers.models.auto.modeling_auto")
    images: Any = getattr(auto, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES", {})
    is_listed = objective == "causal_lm" and model_type not in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # Mistral 4
    if (sees or is_listed) and model_type in images:
        return "AutoModelForImageTextToText"
    if is_listed and model_type in getattr(auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {}):  # with an audio tower
        return "AutoModelForMultimodalLM"
    if objective == "seq2seq_lm" and model_type in auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES:
        return "AutoModelForSpeechSeq2Seq"
    key, name, described = _CLASSES[objective]
    mapping = getattr(auto, f"MODEL_FOR_{key}_MAPPING_NAMES" if key else "MODEL_MAPPING_NAMES")
    if model_type not in mapping:
        near = nearest(model_type, map(str, mapping), 1)
        raise ProbeError(
            f"model: transformers {versions().get('transformers', '?')} has no class for {described} of "
            f"model_type {model_type!r:.60}{f'; the nearest it has is {near[0]}' if near else ''}",
            "model",
        )
    return name
