"""Model cards: every parameter accounted for by layer and kind, and what a config must not say."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.cards import card_folder, card_names, find_model, load_card
from memplan.catalogue import build
from memplan.catalogue.attention import Wiring
from memplan.errors import ConfigError, FactsMissingError, MemplanError, UnknownNameError, UnsupportedModelError
from memplan.models import MODEL_TYPES, ModelSpec
from tests.tiny import TINY

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "parameters.json").read_text("utf-8"))
KINDS = ("embedding", "attention", "mlp", "norm", "lm_head")


def read_card(name: str) -> dict[str, Any]:
    return tomllib.loads((card_folder() / f"{name}.toml").read_text("utf-8"))


def elements(shape: str, axes: dict[str, int]) -> int:
    n = 1
    for axis in shape.split():
        n *= int(axis) if axis.isdigit() else axes[axis]
    return n


def counts(model: ModelSpec) -> tuple[dict[str, int], list[list[int]]]:
    """Parameters by kind, and runs of layers as [how many, parameters in each]."""
    stack, axes = build(model, Wiring("flash", "efficient")), model.axes()
    kinds = dict.fromkeys(KINDS, 0)
    outside = {w.name: w for op in (*stack.before, *stack.after) for w in op.weights if w.group != "buffer"}
    for w in outside.values():
        kinds[w.group] += elements(w.shape, axes)
    layers: list[int] = []
    for run in stack.runs:
        pattern: list[int] = []
        for block in run.blocks:
            inside = {w.name: w for op in block.ops for w in op.weights if w.group != "buffer"}
            pattern.append(sum(elements(w.shape, axes) for w in inside.values()))
            for w in inside.values():
                kinds[w.group] += elements(w.shape, axes) * axes[run.times]
        layers += pattern * axes[run.times]
    runs: list[list[int]] = []
    for n in layers:
        if runs and runs[-1][1] == n:
            runs[-1][0] += 1
        else:
            runs.append([1, n])
    return kinds, runs


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_a_card_has_exactly_the_parameters_the_model_builds(name: str) -> None:
    golden = GOLDEN[name]
    kinds, layers = counts(load_card(name))
    assert kinds == {kind: golden[kind] for kind in KINDS}
    assert layers == golden["layers"]
    assert sum(kinds.values()) == golden["total"] == read_card(name)["parameters"]
    assert estimate(RunSpec(model=name, batch={"sequence": 64})).parameters.total == golden["total"]


def test_there_is_a_golden_count_for_every_card() -> None:
    assert sorted(GOLDEN) == list(card_names())


@pytest.mark.parametrize("name", card_names())
def test_a_card_names_its_sources_and_explains_what_a_checkpoint_stores_otherwise(name: str) -> None:
    card = read_card(name)
    assert card["source"]
    assert card["checked"].isoformat() >= "2026-01-01"
    assert card["config"]["model_type"] in MODEL_TYPES
    if "published" in card:
        assert card["published_source"]
        if card["published"] != card["parameters"]:
            assert card["difference"]


def test_every_supported_family_has_a_card_or_a_small_config_here() -> None:
    carded = {read_card(name)["config"]["model_type"] for name in card_names()}
    assert carded | set(TINY) == set(MODEL_TYPES)


def test_a_config_json_works_like_its_card(tmp_path: Path) -> None:
    for name in ("qwen2-7b", "gemma-2-9b", "gpt2", "phi-4"):
        card = read_card(name)
        file = tmp_path / name / "config.json"
        file.parent.mkdir()
        config = {**card["config"], **dict.fromkeys(card.get("nulls", ()))}
        file.write_text(json.dumps(config), "utf-8")
        by_card = estimate(RunSpec(model=name, batch={"sequence": 512}))
        for path in (file, file.parent):
            by_path = estimate(RunSpec(model=str(path), batch={"sequence": 512}))
            assert (by_path.bytes, by_path.phases) == (by_card.bytes, by_card.phases)
        inline = estimate(RunSpec(model={"config": config}, batch={"sequence": 512}))
        assert (inline.bytes, inline.phases) == (by_card.bytes, by_card.phases)


def test_a_model_answers_to_its_hub_id_and_its_aliases_in_any_case() -> None:
    for name in ("qwen2-7b", "llama-3.1-8b"):
        card = read_card(name)
        for alias in (card["hf_id"], card["hf_id"].upper(), name.upper(), *card["aliases"]):
            assert find_model(alias) == load_card(name)


def test_no_alias_names_two_cards() -> None:
    owner: dict[str, str] = {}
    for name in card_names():
        card = read_card(name)
        for alias in {alias.lower() for alias in (name, card["hf_id"], *card.get("aliases", ()))}:
            assert owner.setdefault(alias, name) == name


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="qwen2-7b"):
        find_model("qwen2-7")
    for nonsense in ("", " ", "x" * 5000, "~nobody-of-that-name/x", "\0.json", "a" * 300 + ".json", "qwen2-7b\n"):
        with pytest.raises(UnknownNameError, match="did you mean") as caught:
            find_model(nonsense)
        assert len(str(caught.value)) < 300


def test_an_id_without_a_card_is_looked_up_on_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--finetune" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(read_card("qwen2-7b")["config"]), "utf-8")
    (tmp_path / "models--someone--finetune" / "refs").mkdir()
    (tmp_path / "models--someone--finetune" / "refs" / "main").write_text("0123", "utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_model("someone/finetune").num_hidden_layers == 28
    with pytest.raises(FactsMissingError) as caught:
        find_model("someone/else")
    assert caught.value.exit_code == 3


LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_a_missing_key_is_named(key: str) -> None:
    config = {k: v for k, v in LLAMA.items() if k != key}
    with pytest.raises(ConfigError, match=key) as caught:
        ModelSpec(config)
    assert caught.value.field == key


@pytest.mark.parametrize("bad", [0, -1, 1.5, 4096.0, "4096", True, float("nan"), 10**30, [4096], {"a": 1}, ""])
@pytest.mark.parametrize("key", [key for key in LLAMA if key != "model_type"])
def test_a_size_must_be_a_whole_number_within_reason(key: str, bad: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelSpec({**LLAMA, key: bad})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_no_value_in_any_config_makes_anything_but_one_clear_line(model_type: str) -> None:
    """Each key in turn takes a broken value: an answer in whole bytes or a MemplanError, whatever it is."""
    named = (read_card(n)["config"] for n in card_names())
    config = TINY.get(model_type) or next(c for c in named if c["model_type"] == model_type)
    base = {"model_type": model_type, **config}
    for key in base:
        for bad in (None, 0, -3, 2.5, "x", True, 10**30, [], {}, [1, 2], [[]], {"a": None}):
            changed = {**copy.deepcopy(base), key: bad}
            try:
                answer = estimate(RunSpec(model={"config": changed}, batch={"sequence": 64}))
            except MemplanError as error:
                assert "\n" not in str(error), (key, bad)
                assert str(error), (key, bad)
            else:
                assert isinstance(answer.bytes.allocated, int), (key, bad)
                assert answer.bytes.allocated > 0, (key, bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 30}, "num_attention_heads 30 does not divide hidden_size 4096"),
        ({"num_key_value_heads": 5}, "num_key_value_heads 5 does not divide num_attention_heads 32"),
        ({"num_key_value_heads": 64}, "num_key_value_heads 64 does not divide num_attention_heads 32"),
    ],
)
def test_heads_must_divide(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelSpec({**LLAMA, **change})


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"model_type": "mixtral", "num_local_experts": 8}, "mixtral.*mixture of experts"),
        ({"model_type": "qwen3_moe", "num_experts": 128}, "qwen3_moe.*mixture of experts"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "n_routed_experts": 256}, "deepseek_v3"),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, "minicpm3.*multi-head latent attention"),
        ({"model_type": "mamba", "state_size": 16}, "mamba.*state space"),
        ({"model_type": "llava", "vision_config": {"depth": 27}}, "llava.*vision"),
        ({"model_type": "llama", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "bert"}, "bert"),
        ({}, "model_type"),
        ({"model_type": 7}, "model_type"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_family(config: dict[str, Any], family: str) -> None:
    with pytest.raises(ConfigError, match=family) as caught:
        ModelSpec({**{k: v for k, v in LLAMA.items() if k != "model_type"}, **config})
    assert caught.value.exit_code == 2
    if "model_type" in config and isinstance(config["model_type"], str):
        assert isinstance(caught.value, UnsupportedModelError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"hidden_size": NaN}', "NaN"),
        ('{"hidden_size": -Infinity}', "Infinity"),
        ("[" * 100_000, "not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not JSON"),
        ('{"model_type": "llama", "hidden_size": 1e400}', "hidden_size|no num_hidden_layers"),
    ],
)
def test_a_file_that_is_no_config_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        find_model(str(file))
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no file"):
        find_model(str(tmp_path / "absent.json"))
    with pytest.raises(ConfigError, match=r"no file.*config.json"):
        find_model(str(tmp_path))
    with pytest.raises(ConfigError, match="no file"):
        find_model(f"{tmp_path}/nothing-here")
    binary = tmp_path / "config.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        find_model(str(binary))
    with binary.open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ConfigError, match="larger than"):
        find_model(str(binary))
