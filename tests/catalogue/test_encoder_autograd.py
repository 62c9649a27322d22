"""BERT with each of its heads keeps what autograd saves; classifying decoders have transformers' parameters."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue import build
from memplan.catalogue.kernels import losses
from memplan.catalogue.kernels.wiring import Wiring
from memplan.catalogue.methods import methods
from memplan.engine.step import lower
from memplan.models.configs import families
from memplan.models.model import ModelSpec, with_objective
from memplan.models.objectives import CLASSIFIER
from memplan.probe.libraries import model_class
from tests.cases import Lazy
from tests.encoders import SMALL
from tests.tiny import TINY

torch: Any = Lazy("torch")
pytestmark = pytest.mark.torch


def saves(objective: str, dtype: Any) -> int:
    """Return the bytes that autograd saves in one forward pass of transformers' class on the CPU."""
    transformers = pytest.importorskip("transformers")
    from tests.catalogue.test_autograd import saved_bytes

    config = transformers.AutoConfig.for_model(**SMALL["bert"])
    made = getattr(transformers, model_class("bert", objective=objective))
    model = made.from_config(config, attn_implementation="eager", dtype=dtype).train()
    ids = torch.zeros(2, 40, dtype=torch.int64)
    labels = torch.zeros(2, dtype=torch.int64) if objective == "sequence_classification" else ids.clone()
    return saved_bytes(
        lambda: model(input_ids=ids, labels=labels).loss,
        held=(ids, labels),
        own=(*model.parameters(), *model.buffers()),
    )


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("objective", ["masked_lm", "sequence_classification", "token_classification"])
def test_a_bert_keeps_what_autograd_saves(objective: str, dtype: str) -> None:
    from tests.catalogue.test_autograd import DTYPES, in_bytes

    model = with_objective(ModelSpec(SMALL["bert"]), objective)
    stack = methods.apply(build(model, Wiring("eager", "eager")), methods.Recipe("full", dtype, dtype))
    axes = {**model.axes(), "b": 2, "s": 40, "sorted_ids": 0, "segments": 0, "segments_2": 0}
    low = lower(losses.attach(stack, "hf"), {r.times: axes[r.times] for r in stack.runs}, labelled=True)
    mine = in_bytes(low, axes, ("position_ids",), statistics=dtype, masks=dtype)
    assert mine == saves(objective, DTYPES[dtype])


@pytest.mark.parametrize("model_type", [name for name, row in families().items() if row.objectives == CLASSIFIER])
def test_a_decoder_that_classifies_has_the_parameters_transformers_builds(model_type: str) -> None:
    transformers = pytest.importorskip("transformers")
    name = model_class(model_type, objective="sequence_classification")
    config = transformers.AutoConfig.for_model(model_type, **TINY[model_type])
    with torch.device("meta"):
        built = getattr(transformers, name).from_config(config)
    options = {"objective": "sequence_classification", "batch": {"sequence": 16}}
    answer = estimate(RunSpec(model={"config": {"model_type": model_type, **TINY[model_type]}}, **options))
    assert answer.parameters.total == sum(p.numel() for p in built.parameters())
