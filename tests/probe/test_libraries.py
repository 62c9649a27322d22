"""The class of transformers that a trace builds, and its objective, for configs that memplan has no stack for."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.core.errors import ProbeError
from memplan.probe.libraries import class_named, library, objective_of
from memplan.spec.run import RunSpec

pytestmark = pytest.mark.torch


def objective(**config: Any) -> str:
    return objective_of(RunSpec(model={"config": config}))


@pytest.mark.parametrize(
    ("config", "name", "named"),
    [
        ({"model_type": "blenderbot"}, "BlenderbotForConditionalGeneration", "seq2seq_lm"),
        (
            {"model_type": "blenderbot", "architectures": ["BlenderbotForCausalLM"]},
            "BlenderbotForCausalLM",
            "causal_lm",
        ),
        (
            {"model_type": "blenderbot", "architectures": ["NoSuchClass"]},
            "BlenderbotForConditionalGeneration",
            "seq2seq_lm",
        ),
        ({"model_type": "squeezebert"}, "SqueezeBertForMaskedLM", "masked_lm"),
        (
            {"model_type": "squeezebert", "architectures": ["SqueezeBertForPreTraining"]},
            "SqueezeBertForMaskedLM",
            "masked_lm",
        ),
        (
            {"model_type": "squeezebert", "architectures": ["SqueezeBertModel"]},
            "SqueezeBertModel",
            "feature_extraction",
        ),
        ({"model_type": "llava_next", "vision_config": {"depth": 1}}, "LlavaNextForConditionalGeneration", "causal_lm"),
        ({"model_type": "minimax"}, "MiniMaxForCausalLM", "causal_lm"),
    ],
)
def test_a_trace_takes_the_class_that_the_config_names(config: dict[str, Any], name: str, named: str) -> None:
    assert class_named(config) == name
    assert objective(**config) == named


def test_a_class_whose_labels_a_probe_cannot_make_is_refused() -> None:
    with pytest.raises(
        ProbeError, match="makes no labels for SqueezeBertForQuestionAnswering; objectives it runs: causal"
    ):
        objective(model_type="squeezebert", architectures=["SqueezeBertForQuestionAnswering"])


def test_every_model_type_has_a_class_of_transformers_or_none() -> None:
    transformers, auto = library("transformers"), library("transformers.models.auto.configuration_auto")
    found = [*filter(None, (class_named({"model_type": kind}) for kind in auto.CONFIG_MAPPING_NAMES))]
    assert len(found) > 300
    assert all(isinstance(getattr(transformers, name), type) for name in found[::32])  # importing all takes seconds
