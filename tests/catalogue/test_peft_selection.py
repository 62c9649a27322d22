"""Which modules peft adapts: targets that a model only has some of, layers, patterns, ranks, biases; against peft."""

from __future__ import annotations

from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.core.errors import MemplanError
from memplan.spec.options import names, settings
from tests.catalogue.test_peft_methods import peft_trains, run
from tests.tiny import TINY

QV = ["q_proj", "v_proj"]
FAMILIES: dict[str, list[str]] = {
    **dict.fromkeys(("llama", "qwen2", "gemma2", "gemma3_text", "mistral", "cohere"), QV),
    "bloom": ["query_key_value"],
    "deepseek_v3": ["o_proj", "kv_b_proj"],
    "falcon": ["query_key_value"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value"],
    "opt": ["q_proj", "fc1"],
    "phi3": ["qkv_proj", "down_proj"],
}


def chosen(targets: list[str]) -> list[dict[str, Any]]:
    """Return the settings of LoRA that choose modules by their paths, and those that train biases."""
    first, last = targets[0], targets[-1]
    return [
        {"targets": targets, "options": {"bias": "all"}},
        {"targets": targets, "options": {"bias": "lora_only"}},
        {"targets": targets, "options": {"layers_to_transform": [1]}},
        {"targets": targets, "options": {"layers_to_transform": 0, "layers_pattern": ["layers", "h"]}},
        {"targets": targets, "options": {"rank_pattern": {first: 5}}},
        {"targets": targets, "options": {"exclude_modules": rf".*\.1\..*{first}"}},
        {"targets": ["layers.1.self_attn.o_proj", "h.1.attn.c_attn", last]},
        {"targets": targets, "modules_to_save": ["lm_head"], "options": {"ensure_weight_tying": True}},
    ]


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_chosen_modules_train_as_many_parameters_as_in_peft(model_type: str) -> None:
    targets = FAMILIES[model_type]
    wanted = chosen(targets)
    if model_type != "deepseek_v3":  # whose experts a pattern may take
        wanted.append({"targets": rf".*\.(0|2)\..*({'|'.join(targets)})"})
        wanted.append({"targets": "all-linear", "options": {"rank_pattern": {r".*\.1\..*": 3, targets[0]: 4}}})
    for settings_ in wanted:
        method = {"kind": "lora", "rank": 2, **settings_}
        assert estimate(run(model_type, **method)).parameters.trainable == peft_trains(
            model_type, model_type == "llama", **method
        ), settings_


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "targets"),
    [
        ("gpt_oss", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
        ("deepseek_v3", ["q_a_proj", "v_proj"]),
        ("llama", ["q_proj", "query_key_value"]),
    ],
)
def test_targets_that_a_model_does_not_have_are_ignored_and_noted(model_type: str, targets: list[str]) -> None:
    method = {"kind": "lora", "rank": 2, "targets": targets}
    answer = estimate(run(model_type, **method))
    assert answer.parameters.trainable == peft_trains(model_type, **method)
    assert any("that peft finds: only" in note for note in answer.notes)


# Configs of mixtures of experts all of whose layers are dense.
DENSE: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"first_k_dense_replace": 9},
    "deepseek_v3": {"first_k_dense_replace": 9},
    "ernie4_5_moe": {"moe_layer_start_index": 99},
    "glm4_moe": {"first_k_dense_replace": 9},
    "qwen3_moe": {"decoder_sparse_step": 99},
    "qwen3_next": {"decoder_sparse_step": 99},
}


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", sorted(DENSE))
def test_peft_adapts_only_attention_in_a_mixture_without_experts(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TINY, model_type, {**TINY[model_type], **DENSE[model_type]})
    for targets in ("all-linear", ["o_proj", "gate_proj", "up_proj", "down_proj"]):
        method = {"kind": "lora", "rank": 2, "targets": targets}
        assert estimate(run(model_type, **method)).parameters.trainable == peft_trains(model_type, **method)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"targets": ["q_prj", "nope"]}, "method.targets: unknown name 'q_prj'; did you mean q_proj"),
    ({"targets": "q_proj"}, "matches no layer, such as model.layers.1"),
    ({"targets": ".*("}, "method.targets: '.*(' is not a regular expression"),
    ({"targets": QV, "options": {"layers_to_transform": [9]}}, "layers are numbered 0 to 2"),
    ({"targets": QV, "options": {"layers_to_transform": "1"}}, "must be numbers of layers, not '1'"),
    ({"options": {"layers_to_transform": [1]}}, "peft has it for names of targets only, not with 'all-linear'"),
    ({"targets": QV, "options": {"layers_pattern": "h"}}, "layers_pattern: needs layers_to_transform"),
    ({"targets": QV, "options": {"exclude_modules": QV}}, "exclude_modules: leaves no module to adapt"),
    ({"options": {"bias": "boft_only"}}, "method.options.bias: must be none or all or lora_only"),
    ({"options": {"rank_patern": {}}}, "did you mean rank_pattern?"),
    ({"options": {"init_lora_weights": "mica"}}, "init_lora_weights: must be true, false, gaussian"),
    ({"kind": "qlora", "options": {"init_lora_weights": "corda"}}, "peft has corda over unquantised weights only"),
    ({"kind": "qlora", "options": {"init_lora_weights": "pissa"}}, "peft has pissa over unquantised weights only"),
    ({"kind": "dora", "options": {"bias": "all"}}, "all is not supported yet with dora"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED, ids=str)
def test_a_wrong_choice_of_modules_is_one_line(method: dict[str, Any], message: str) -> None:
    with pytest.raises(MemplanError) as error:
        estimate(run("qwen2", **{"kind": "lora", "rank": 2, **method}))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_adapters_on_tied_modules_are_not_tied() -> None:
    method = {"kind": "lora", "targets": ["embed_tokens"], "options": {"ensure_weight_tying": True}}
    with pytest.raises(MemplanError, match="not supported yet with adapters on embed_tokens or lm_head; leave it out"):
        estimate(run("gemma2", **method))
    assert (
        estimate(run("llama", **method)).parameters.trainable
        == estimate(run("llama", **{**method, "options": {}})).parameters.trainable
    )  # its head is not tied


def test_an_initialisation_changes_no_step() -> None:
    def answer(**options: Any) -> Any:
        return estimate(run("qwen2", kind="lora", rank=2, options=options))

    assert answer(init_lora_weights="pissa").phases[1:] == answer().phases[1:]  # after loading
    assert any("loftq decomposes" in note for note in answer(init_lora_weights="loftq").notes)


def test_a_pattern_of_ranks_ignores_keys_without_a_module() -> None:
    answer = estimate(run("qwen2", kind="lora", rank=2, targets=QV, options={"rank_pattern": {"k_proj": 8}}))
    assert answer.parameters == estimate(run("qwen2", kind="lora", rank=2, targets=QV)).parameters
    assert any("no adapted module matches k_proj" in note for note in answer.notes)


def test_three_layers_have_three_times_the_adapters_of_one() -> None:
    method = {"kind": "lora", "targets": QV, "options": {"layers_to_transform": [0, 1, 2]}}
    h, heads, width, r = 896, 14 * 64, 2 * 64, 16  # q and v of qwen2-0.5b
    one = estimate(RunSpec(model="qwen2-0.5b", method=method))  # type: ignore[arg-type]
    assert one.parameters.trainable == 3 * r * ((h + heads) + (h + width))


def test_options_are_read_as_json_or_words() -> None:
    assert settings('rank_pattern={"q_proj": 8, "v_proj": 4},bias=all,layers_to_transform=[0,1]') == {
        "rank_pattern": {"q_proj": 8, "v_proj": 4},
        "bias": "all",
        "layers_to_transform": [0, 1],
    }
    assert names("q_proj,v_proj") == QV
    assert names(r".*\.(q|v)_proj") == r".*\.(q|v)_proj"
