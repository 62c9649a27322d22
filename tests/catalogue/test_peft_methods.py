"""peft's methods other than LoRA against peft: names, settings, default targets, and trained parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue.methods.peft_layers import LAYERS, factorization, nearest_divisor
from memplan.core.errors import MemplanError
from memplan.models.peft_methods import FEEDFORWARD, PEFT_METHODS, default_targets, filled_options
from memplan.spec.training import LATER_METHODS, Method, MethodKind
from tests.tiny import TINY

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "gemma2", "gpt_neox", "opt", "bloom", "falcon", "phi", "gpt2")
# Settings of each method that change its number of parameters.
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "adalora": ({"rank": 5},),
    "boft": ({"options": {"boft_block_size": 8}}, {"options": {"boft_block_size": 0, "boft_block_num": 4}}),
    "ia3": ({"options": {"feedforward_modules": "q_proj"}},),
    "loha": ({"rank": 3},),
    "lokr": ({"rank": 3}, {"options": {"decompose_both": True}, "rank": 2}, {"options": {"decompose_factor": 4}}),
    "oft": (
        {"options": {"oft_block_size": 24}},
        {"options": {"r": 3, "oft_block_size": 0}},
        {"options": {"block_share": True}},
    ),
    "vera": ({"rank": 6},),
}


def run(model_type: str, **method: Any) -> RunSpec:
    model = {"config": {"model_type": model_type, **TINY[model_type]}}
    return RunSpec(model=model, method=method, batch={"sequence": 64})


def peft_trains(model_type: str, **fields: Any) -> int:
    """Return the parameters that peft trains in a bf16 model, as it does in one on a GPU."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from memplan.probe.script.model import adapter_config

    config = transformers.AutoConfig.for_model(model_type, **TINY[model_type])
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    method = Method.model_validate(fields)
    targets: Any = method.targets if isinstance(method.targets, str) else list(method.targets)
    targets = None if targets == "default" else targets
    wanted = adapter_config(method, model_type, target_modules=targets, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, wanted).get_nb_trainable_parameters()[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(PEFT_METHODS))
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_method_trains_as_many_parameters_as_in_peft(kind: str, model_type: str) -> None:
    for targets in ("default", "all-linear"):
        method: dict[str, Any] = {"kind": kind, "targets": targets}
        if PEFT_METHODS[kind].rank:
            method["rank"] = 4
        row = PEFT_METHODS[kind]
        if (model_type == "gpt2" and not row.conv1d) or (targets == "default" and model_type not in row.targets):
            with pytest.raises(MemplanError, match=r"peft has no default|cannot wrap the Conv1D layers"):
                estimate(run(model_type, **method))
            with pytest.raises((ValueError, TypeError)):
                peft_trains(model_type, **method)
        else:
            mine = estimate(run(model_type, **method)).parameters.trainable
            assert mine == peft_trains(model_type, **method), targets


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "settings"), [(kind, s) for kind, each in SETTINGS.items() for s in each], ids=str)
def test_every_setting_counts_as_in_peft(kind: str, settings: dict[str, Any]) -> None:
    for model_type in ("llama", "qwen2"):
        method = {"kind": kind, "targets": ["q_proj", "down_proj"], **settings}
        assert estimate(run(model_type, **method)).parameters.trainable == peft_trains(model_type, **method)


def test_methods_are_pefts() -> None:
    peft = pytest.importorskip("peft")
    known = {t.value.lower() for t in peft.PeftType} - {"lora"}
    assert {*PEFT_METHODS} | LATER_METHODS == known
    assert not LATER_METHODS & {*PEFT_METHODS}
    assert {*PEFT_METHODS} == {*get_args(MethodKind)} - {"full", "freeze", "lora", "qlora", "dora", "qdora"}
    assert {*LAYERS} <= {*PEFT_METHODS}


@pytest.mark.parametrize("kind", sorted(PEFT_METHODS))
def test_defaults_are_pefts(kind: str) -> None:
    peft = pytest.importorskip("peft")
    constants = pytest.importorskip("peft.utils.constants")
    config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[kind.upper()]]
    theirs = {field.name: field.default for field in dataclasses.fields(config)}
    row = PEFT_METHODS[kind]
    if row.rank:
        assert theirs[row.r] == row.rank
    assert all(theirs[name] == value for name, value in row.options.items())
    assert all(name in theirs for name in (row.alpha, row.dropout) if name)
    targets = getattr(constants, f"TRANSFORMERS_MODELS_TO_{kind.upper()}_TARGET_MODULES_MAPPING")
    for model_type, names in targets.items():
        if model_type in row.targets or (model_type in TINY and isinstance(names, list)):
            assert default_targets(kind, model_type) == tuple(names), model_type


def test_the_inputs_that_ia3_scales_are_pefts() -> None:
    constants = pytest.importorskip("peft.utils.constants")
    for model_type, names in constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items():
        if model_type in FEEDFORWARD:
            assert FEEDFORWARD[model_type].split() == names
    assert filled_options("ia3", {}, "llama") == {"feedforward_modules": "down_proj"}


def test_dimensions_are_divided_as_in_peft() -> None:
    lokr = pytest.importorskip("peft.tuners.lokr.layer")
    oft = pytest.importorskip("peft.tuners.oft.layer").OFTLayer
    for dimension in (*range(1, 70), 96, 100, 127, 128, 1408, 3584, 18944):
        for factor in (-1, 1, 4, 6, 8, 40):
            assert factorization(dimension, factor) == lokr.factorization(dimension, factor)
        for wanted in (1, 3, 8, 24, 32):
            assert nearest_divisor(dimension, wanted) == oft.adjust_oft_parameters(None, dimension, wanted)


REFUSED = [
    ({"kind": "ia3", "rank": 8}, "method.rank: ia3 has no rank in peft"),
    ({"kind": "oft", "dropout": 0.1}, "method.dropout: oft has no dropout in peft"),
    ({"kind": "vera", "alpha": 8}, "method.alpha: vera has no alpha in peft"),
    ({"kind": "oft", "options": {"oft_blocksize": 64}}, "did you mean oft_block_size?"),
    ({"kind": "oft", "options": {"oft_block_size": "large"}}, "must be a whole number, not 'large'"),
    ({"kind": "lokr", "quantization": {"format": "nf4"}}, "peft has no lokr over quantised weights"),
    (
        {"kind": "vera", "quantization": {"format": "gptq-int4"}},
        "peft has vera over nf4, fp4, int8 only, not gptq-int4",
    ),
    ({"kind": "ia3", "targets": ["q_prj"]}, "unknown name 'q_prj'; did you mean q_proj"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED, ids=str)
def test_settings_that_a_method_does_not_have_are_refused(method: dict[str, Any], message: str) -> None:
    with pytest.raises(MemplanError) as error:
        estimate(run("qwen2", **method))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_names_are_read_as_people_write_them() -> None:
    for name in ("IA3", "ia3"):
        assert Method.model_validate(name).kind == "ia3"
    assert Method.model_validate("vera").rank == 256
    assert Method.model_validate({"kind": "vera", "rank": 8}).rank == 8
    assert Method.model_validate("vera").targets == "default"
    assert Method.model_validate("lora").targets == "all-linear"
