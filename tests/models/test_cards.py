"""Model cards: every parameter accounted for by layer and kind, and invalid configs."""

from __future__ import annotations

import copy
import json
import random
import tomllib
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from memplan import RunSpec, estimate
from memplan.catalogue import build
from memplan.catalogue.families.megatron import KIND
from memplan.catalogue.kernels.wiring import Wiring
from memplan.core.errors import ConfigError, FactsMissingError, MemplanError, UnknownNameError, UnsupportedModelError
from memplan.core.ir import outside
from memplan.models import cards
from memplan.models.cards import card_folder, card_names, find_config, find_model, load_card
from memplan.models.configs import DENSE, MODULES, family
from memplan.models.model import ModelSpec
from memplan.program.stored.weights import format_of
from tests.cases import each, in_groups
from tests.encoders import SMALL
from tests.golden.ask_libraries import built
from tests.sampling import sampled
from tests.tiny import SMALLEST, TINY
from tests.tiny_towers import TINY as TOWERS

BUILT_AS = {  # decoders that transformers builds as another family
    "exaone": "llama",
    "iquestcoder": "llama",
    "sarvam_mla": "deepseek_v3",
    "sarvam_moe": "glm4_moe",
}

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "parameters.json").read_text("utf-8"))
KINDS = ("embedding", "attention", "mixer", "mlp", "router", "norm", "vision", "audio", "lm_head", "head")

PART_OF = {"projector": "vision"}  # kinds with several groups


def read_card(name: str) -> dict[str, Any]:
    return tomllib.loads((card_folder() / f"{name}.toml").read_text("utf-8"))


def elements(shape: str, axes: dict[str, int]) -> int:
    n = 1
    for axis in shape.split():
        n *= int(axis) if axis.isdigit() else axes[axis]
    return n


def counts(model: ModelSpec) -> tuple[dict[str, int], list[list[int]]]:
    """Return parameters by kind, and runs of layers as [number of layers, parameters per layer]."""
    stack, axes = build(model, Wiring("flash", "efficient")), model.axes()
    kinds = dict.fromkeys(KINDS, 0)
    every = {w.name: w for some in outside(stack) for op in some for w in op.weights if w.group != "buffer"}
    for w in every.values():
        kinds[PART_OF.get(w.group, w.group)] += elements(w.shape, axes)
    layers: list[int] = []
    for run in stack.runs:
        pattern: list[int] = []
        for block in run.blocks:
            inside = {w.name: w for op in block.ops for w in op.weights if w.group != "buffer"}
            pattern.append(sum(elements(w.shape, axes) for w in inside.values()))
            for w in inside.values():
                kinds[PART_OF.get(w.group, w.group)] += elements(w.shape, axes) * axes[run.times]
        layers += pattern * axes[run.times] if any(pattern) else []
    runs: list[list[int]] = []
    for n in layers:
        if runs and runs[-1][1] == n:
            runs[-1][0] += 1
        else:
            runs.append([1, n])
    return kinds, runs


@in_groups(sampled(sorted(GOLDEN), 8))
def test_a_card_has_exactly_the_parameters_the_model_builds(name: str) -> None:
    golden = GOLDEN[name]
    kinds, layers = counts(load_card(name))
    assert kinds == {kind: golden.get(kind, 0) for kind in KINDS}
    # a tower may come after the text model
    streams = len(outside(build(load_card(name), Wiring("flash", "efficient")))) > 2 or "audio" in golden
    assert sorted(layers) == sorted(golden["layers"]) if streams else layers == golden["layers"]
    assert sum(kinds.values()) == golden["total"] == read_card(name)["parameters"]
    batch = {} if load_card(name).only_sequence else {"sequence": 64}
    assert estimate(RunSpec(model=name, batch=batch)).parameters.total == golden["total"]


def test_there_is_a_golden_count_for_every_card() -> None:
    assert sorted(GOLDEN) == list(card_names())


@each(sampled(list(card_names()), 8))
def test_a_card_names_its_sources_and_explains_what_a_checkpoint_stores_otherwise(name: str) -> None:
    card = read_card(name)
    assert card["source"]
    assert "/" in card["hf_id"]
    assert card["hf_id"] != "owner/name"  # the placeholder of `memplan card new`
    assert card["checked"].isoformat() >= "2026-01-01"
    assert card["config"]["model_type"] in set(MODULES)
    assert card["published_source"]
    if "stored" in card:
        assert card["stored_source"]
        assert format_of(card["stored"]) == card["stored"]
        assert "quantization_config" not in card["config"]
    if "nominal" in card["published_source"]:
        assert card["published"] == pytest.approx(card["parameters"], rel=0.1)
        assert card["difference"] == "the published figure is nominal"
    elif card["published"] == card["parameters"]:
        assert "difference" not in card
    else:
        # The text ends in arithmetic: the tensors the checkpoint stores in addition, or their number times a shape.
        stored = card["difference"].rpartition(", ")[2]
        product, _, result = stored.partition(" = ")
        assert set(product) <= set("0123456789x +-()"), stored
        assert eval(product.replace("x", "*")) == int(result) == card["published"] - card["parameters"]


def test_every_supported_family_has_a_card_or_a_small_config_here() -> None:
    carded = {read_card(name)["config"]["model_type"] for name in card_names()}
    # Megatron-core's layers, which no published model uses, and the published name of minimax_m3_vl_text's config: see
    # tests/catalogue/test_megatron.py and tests/models/test_families.py.
    own = {KIND, "minimax_m3"}
    small = {config["model_type"] for config in (*SMALL.values(), *TOWERS.values())}
    assert carded | set(TINY) | small | set(BUILT_AS) | own == set(MODULES)
    assert set(BUILT_AS.values()) <= carded


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


def test_a_model_is_found_by_hub_id_and_aliases_in_any_case() -> None:
    for name in ("qwen2-7b", "llama-3.1-8b"):
        card = read_card(name)
        for alias in (card["hf_id"], card["hf_id"].upper(), name.upper(), *card["aliases"]):
            own = alias in card.get("own", {})
            assert find_model(alias).axes() == load_card(name).axes()
            assert (find_model(alias) != load_card(name)) == own


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("Llama 3.1 8B", "llama-3.1-8b"),
        ("llama3.1:8b", "llama-3.1-8b"),
        ("qwen 2.5 7b", "qwen2.5-7b"),
        ("qwen2_7b", "qwen2-7b"),
        ("gpt-2", "gpt2"),
        ("zephyr-7b-beta", "mistral-7b-v0.1"),  # ids without their owner
        ("Qwen3 VL 8B Thinking", "qwen3-vl-8b"),
        ("Ministral-3-3B-Instruct-2512", "ministral-3-3b-instruct"),  # and an alias before an id of another card
    ],
)
def test_a_name_is_the_same_however_its_parts_are_joined(typed: str, name: str) -> None:
    assert find_model(typed) == load_card(name)


def test_an_id_without_owner_is_a_name_unless_cards_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cards, "_aliases", lambda: {"a/one": "gpt2", "b/both": "gpt2", "c/both": "qwen2-7b"})
    names = cards._names_by_letters.__wrapped__()
    assert names["one"] == "gpt2"
    assert "both" not in names


def test_no_alias_names_two_cards() -> None:
    owner: dict[str, str] = {}
    for name in card_names():
        card = read_card(name)
        for alias in (name, card["hf_id"], *card.get("aliases", ())):
            joined = alias.lower().translate({ord(mark): None for mark in " -_:"})
            assert owner.setdefault(joined, name) == name
        own = {cards._letters(alias.lower().rpartition("/")[2]) for alias in card.get("own", {})}
        assert own.isdisjoint(cards._letters(own_name.lower().rpartition("/")[2]) for own_name in (name, card["hf_id"]))


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="qwen2-7b"):
        find_model("qwen2-7")
    for nonsense in ("", " ", "x" * 5000, "qwen2-7b\n"):
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


BAD_SIZES = (0, -1, 1.5, 4096.0, "4096", True, float("nan"), 10**30, [4096], {"a": 1}, "")


@each(product([key for key in LLAMA if key != "model_type"], BAD_SIZES))
def test_a_size_must_be_a_whole_number_within_reason(case: tuple[str, Any]) -> None:
    key, bad = case
    with pytest.raises(ConfigError) as caught:
        ModelSpec({**LLAMA, key: bad})
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


def is_one_line(text: str, *case: object) -> None:
    assert text, case
    assert "\n" not in text, case


@pytest.mark.parametrize("model_type", sampled(sorted(name for name, module in MODULES.items() if module == DENSE), 4))
def test_any_bad_config_value_gives_one_clear_line(model_type: str) -> None:
    """Each key in turn gets broken values: the result is an answer in whole bytes or a MemplanError."""
    named = (read_card(n)["config"] for n in card_names())
    like = BUILT_AS.get(model_type, model_type)
    config = TINY.get(like) or {**next(c for c in named if c["model_type"] == like), "num_hidden_layers": 4}
    base = {**config, "model_type": model_type}
    broken = (None, -3, 2.5, True, 10**30, [[]], {"a": None})
    for i, key in enumerate(base):
        for bad in (broken[(i + n) % len(broken)] for n in (0, 3)):
            changed = {**copy.deepcopy(base), key: bad}
            try:
                answer = estimate(RunSpec(model={"config": changed}, batch={"sequence": 64}))
            except MemplanError as error:
                is_one_line(str(error), key, bad)
            else:
                assert isinstance(answer.bytes.allocated, int), (key, bad)
                assert answer.bytes.allocated > 0, (key, bad)


@pytest.mark.parametrize("share", [0, -0.5, 1.5, "half", True, [0.5]])
def test_a_share_of_rotated_dimensions_is_above_none_and_at_most_all(share: Any) -> None:
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        _ = ModelSpec({"model_type": "phi", **TINY["phi"], "partial_rotary_factor": share}).rotary_width


def test_infinity_is_allowed_in_fields_that_are_not_sizes(tmp_path: Path) -> None:
    """Python writes infinity, and published configs contain it, for example a refused state space model's."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**LLAMA, "initializer_range": float("inf")}), "utf-8")
    assert find_model(str(file)).hidden_size == 4096
    file.write_text('{"model_type": "zamba2", "n_routed_experts": 512, "time_step_limit": [0.0, Infinity]}', "utf-8")
    with pytest.raises(UnsupportedModelError, match=r"zamba2.*mixture of experts"):
        find_model(str(file))


def test_a_model_of_one_expert_is_dense() -> None:
    assert ModelSpec({**LLAMA, "num_experts": 1}).layers == ModelSpec(LLAMA).layers


@pytest.mark.parametrize(
    "block",
    [
        {"attention": {"n_heads_in_group": -8}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"n_heads_in_group": 5}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"n_heads_in_group": 64}, "ffn": {"ffn_mult": 1.0}},
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": float("inf")}},
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 1e30}},
        {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": -1.0}},
        {"attention": {"n_heads_in_group": 8}, "ffn": {"intermediate_size": 10**30}},
        {"attention": {"n_heads_in_group": 8}},
    ],
)
def test_blocks_found_by_architecture_search_need_valid_sizes(block: dict[str, Any]) -> None:
    fine = {"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 1.0}}
    config = {**LLAMA, "model_type": "nemotron-nas", "num_hidden_layers": 2}
    assert ModelSpec({**config, "block_configs": [fine, fine]}).layers[0].k == 32 // 8
    with pytest.raises(ConfigError, match="block_configs"):
        ModelSpec({**config, "block_configs": [fine, block]})


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
        ({"model_type": "aria", "num_local_experts": 8}, "aria.*mixture of experts"),
        ({"model_type": "jetmoe", "num_experts": 128}, "jetmoe.*mixture of experts"),
        ({"model_type": "longcat_flash", "kv_lora_rank": 512, "n_routed_experts": 512}, "longcat_flash"),
        ({"model_type": "bailing_hybrid", "kv_lora_rank": 512}, "bailing_hybrid.*multi-head latent attention"),
        ({"model_type": "zamba", "state_size": 16}, "zamba.*state space"),
        ({"model_type": "vipllava", "vision_config": {"depth": 27}}, "vipllava.*vision"),
        ({"model_type": "llama", "num_local_experts": 8}, "mixture of experts"),
        ({"model_type": "squeezebert"}, "squeezebert.*encoder"),
        ({"model_type": "blenderbot", "is_encoder_decoder": True}, "blenderbot.*encoder-decoder"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "gemma3_text.*encoder"),
        ({"model_type": "jetmoe"}, "jetmoe.*mixture of experts"),
        ({"model_type": "zamba2", "num_experts": 16, "mamba_d_state": 16}, "zamba2.*mixture of experts, state space"),
        ({"model_type": "gemma5n", "hidden_size_per_layer_input": 256}, "gemma5n.*embeddings in every layer"),
        ({"model_type": "qwen", "visual": {"layers": 48}}, "qwen.*vision"),
        ({"model_type": "qwen", "audio": {"n_layer": 32}}, "qwen.*audio"),
        ({"model_type": "fuyu", "text_config": {"hidden_size": 2560}}, "fuyu.*multimodal"),
        ({"model_type": "chatglm", "position_encoding_2d": True}, "chatglm.*first ChatGLM"),
        ({"model_type": "qwen2", "layer_types": ["linear_attention"] * 32}, "linear_attention"),
        ({"model_type": "llama", "architectures": ["LlamaForQuestionAnswering"]}, "ForQuestionAnswering"),
        ({"model_type": "lama"}, "lama.*did you mean llama"),
        ({"model_type": "moe" * 1000}, "mixture of experts"),
        ({}, "model_type"),
        ({"model_type": 7}, "model_type"),
    ],
)
def test_another_kind_of_model_is_refused_by_its_family(config: dict[str, Any], family: str) -> None:
    with pytest.raises(ConfigError, match=family) as caught:
        ModelSpec({**{k: v for k, v in LLAMA.items() if k != "model_type"}, **config})
    assert caught.value.exit_code == 2
    assert len(str(caught.value)) < 200
    if "model_type" in config and isinstance(config["model_type"], str):
        assert isinstance(caught.value, UnsupportedModelError)


def test_an_unknown_family_is_not_taken_for_another() -> None:
    for model_type in ("persimmon", "fuyu"):
        with pytest.raises(
            UnsupportedModelError, match=f"'{model_type}'.*, and no supported family has a similar name"
        ):
            ModelSpec({**{k: v for k, v in LLAMA.items() if k != "model_type"}, "model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "keys", "nearest"),
    [
        ("kimi_k4", {"vision_config": {"patch_size": 14}}, "kimi_k3 or kimi_k25 or kimi_k2"),
        ("kimi_linear2", {"num_experts": 64}, "kimi_linear or "),
        ("qwen4", {}, "qwen3 or qwen2 or qwen"),
        ("qwen4_moe", {"num_experts": 64}, "qwen3_moe or "),
        ("qwen4_vl", {"vision_config": {"depth": 27}}, "qwen3_vl or "),
        ("llama5", {}, "llama or "),
        ("llama5_text", {"num_local_experts": 16}, "llama4_text or "),
        ("deepseek_v5", {"kv_lora_rank": 512, "n_routed_experts": 64}, "deepseek_v4 or deepseek_v3 or "),
        ("gemma5", {}, "gemma4_text or "),
        ("gpt_oss2", {"num_local_experts": 64}, "gpt_oss or "),
        ("zamba2", {"mamba_d_state": 16}, "mamba2 or bamba or "),
        ("bertx", {}, "bert or "),
        ("llama", {"num_local_experts": 8}, "llama4_text or "),
    ],
)
def test_a_family_without_a_stack_is_refused_with_the_nearest_known(
    model_type: str, keys: dict[str, Any], nearest: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"not supported yet; did you mean ({nearest})") as caught:
        ModelSpec({**{k: v for k, v in LLAMA.items() if k != "model_type"}, "model_type": model_type, **keys})
    assert caught.value.field == "model_type"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
        ('{"model_type": "llama", "hidden_size": NaN}', "hidden_size must be a whole number.*not NaN"),
        ('{"model_type": "llama", "hidden_size": -Infinity}', "hidden_size must be a whole number.*not -Infinity"),
        ('{"model_type": "llama", "hidden_size": "40\\n96"}', "hidden_size must be a whole number"),
        ("[" * 100_000, "not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", "not JSON"),
        ('{"model_type": "llama", "hidden_size": 1e400}', "hidden_size|no num_hidden_layers"),
    ],
)
def test_a_file_without_a_config_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
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


# --- missing keys ---


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in LLAMA.items() if key not in keys}


def test_missing_config_keys_get_the_familys_value() -> None:
    assert ModelSpec(without("intermediate_size")).intermediate_size == 11008
    assert ModelSpec({**without("intermediate_size"), "model_type": "qwen2"}).intermediate_size == 22016
    assert ModelSpec(without("num_key_value_heads")).num_key_value_heads == 32
    assert ModelSpec({**without("num_key_value_heads"), "model_type": "mistral"}).num_key_value_heads == 8
    gpt2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300}
    assert ModelSpec(gpt2).intermediate_size == ModelSpec({**gpt2, "n_inner": None}).intermediate_size == 4 * 64
    assert ModelSpec(gpt2).max_position_embeddings == 1024
    with pytest.raises(ConfigError, match="no intermediate_size"):
        ModelSpec({**LLAMA, "intermediate_size": None})


def test_custom_code_fills_in_missing_config_keys() -> None:
    """InternLM 2's class has biases by default; Baichuan's two classes disagree on the FFN's width."""
    card = read_card("internlm2-7b")["config"]
    h, kd = card["hidden_size"], card["num_key_value_heads"] * 128
    with_biases, _ = counts(ModelSpec({key: value for key, value in card.items() if key != "bias"}))
    without_biases, _ = counts(ModelSpec(card))
    assert with_biases["attention"] - without_biases["attention"] == 32 * ((h + 2 * kd) + h)
    card = read_card("baichuan2-13b")["config"]
    with pytest.raises(ConfigError, match="no intermediate_size"):
        ModelSpec({key: value for key, value in card.items() if key != "intermediate_size"})


def test_a_key_of_another_family_means_nothing() -> None:
    foreign = {"n_inner": 64, "ffn_hidden_size": 64, "num_kv_heads": 1, "kv_channels": 8, "sliding_window": 16}
    ours, theirs = ModelSpec(LLAMA), ModelSpec({**LLAMA, **foreign, "partial_rotary_factor": 0.5})
    assert ours.axes() == theirs.axes()
    assert (theirs.sliding_window, theirs.layers) == (None, ours.layers)


def test_the_first_qwens_config_was_written_like_gpt_2s() -> None:
    card = read_card("qwen-7b")["config"]
    names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    names["intermediate_size"] = "ffn_hidden_size"
    old = {names.get(key, key): value for key, value in card.items()}
    assert old != card
    assert ModelSpec(old).axes() == load_card("qwen-7b").axes()


def test_chatglm_shares_heads_only_if_it_says_so() -> None:
    card = read_card("chatglm3-6b")["config"]
    assert ModelSpec(card).num_key_value_heads == card["multi_query_group_num"] == 2
    assert ModelSpec({**card, "multi_query_attention": False}).num_key_value_heads == 32
    silent = {key: value for key, value in card.items() if key not in ("multi_query_attention", "add_qkv_bias")}
    kinds, _ = counts(ModelSpec(silent))
    assert kinds["attention"] == 28 * 4 * 4096**2


def test_exaone_3_is_a_llama_by_other_names() -> None:
    """EXAONE 3.0 7.8B, with the config.json for its custom code: 7,818,448,896 parameters."""
    names = {"num_layers": 32, "activation_function": "silu", "layer_norm_epsilon": 1e-5}
    config = {**without("num_hidden_layers"), "model_type": "exaone", "intermediate_size": 14336, **names}
    kinds, layers = counts(ModelSpec({**config, "num_key_value_heads": 8, "vocab_size": 102400}))
    assert layers == [[32, (2 * 32 + 2 * 8) * 128 * 4096 + 3 * 4096 * 14336 + 2 * 4096]]
    assert sum(kinds.values()) == 7_818_448_896


# Flags that one family reads and the others must ignore, and each family's sizes and layer lists.
FLAGS = (
    *("attention_bias", "mlp_bias", "bias", "use_bias", "qkv_bias", "use_qkv_bias", "use_qk_norm", "qk_layernorm"),
    *("no_bias", "multi_query", "use_sliding_window", "parallel_attn", "new_decoder_architecture", "enable_bias"),
    *("do_layer_norm_before", "layer_norm_elementwise_affine", "use_parallel_residual", "lm_head_bias"),
)
VALUES: dict[str, tuple[Any, ...]] = {
    "intermediate_size": (176,),
    "n_inner": (None, 96),
    "ffn_dim": (96,),
    "ffn_hidden_size": (None, 96),
    "expansion_ratio": (2,),
    "num_key_value_heads": (1, 2, 4),
    "num_kv_heads": (1, 4),
    "rotary_pct": (0.25, 1.0),
    "partial_rotary_factor": (0.25, 0.75),
    "rope_scaling": (None, {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}),
    "rotary_dim": (8, 16),
    "sliding_window": (16, 4096),
    "sliding_window_pattern": (2, 3),
    "max_window_layers": (0, 1),
    "no_rope_layer_interval": (2,),
    "no_rope_layers": ([1, 0, 1, 0, 1, 1, 1],),
    "layer_types": (["sliding_attention", "full_attention"],),
    "word_embed_proj_dim": (64,),
    "resid_pdrop": (0.0, 0.1),
    "hidden_dropout": (0.1,),
    "max_position_embeddings": (256,),
}
CACHES = ("deepseek_v32", "glm_moe_dsa")  # whose layer_types name caches: every layer is the same
WIDTHS = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


STATED = {  # keys whose default is none, or no divisor of the heads
    "bitnet": ("num_key_value_heads",),
    "dots1": ("n_routed_experts", "n_shared_experts", "num_experts_per_tok"),
    "helium": ("head_dim", "num_key_value_heads"),
}
FAMILIES = sorted({*TINY, *BUILT_AS})
OWN_KINDS = ("lfm2", "lfm2_moe", "llama4_text")  # families with their own names for layer types


def turns_part(model_type: str) -> bool:
    return not {"partial_rotary_factor", "rotary_pct"}.isdisjoint(family(model_type).defaults)


def a_config(model_type: str, rng: random.Random) -> dict[str, Any]:
    """Draw a config: the sizes every config states, wide enough for every family's defaults, other keys at random."""
    stated = TINY[BUILT_AS.get(model_type, model_type)]
    config = {"model_type": model_type}
    for key, value in stated.items():
        if key in WIDTHS:
            config[key] = 2048
        elif key in HEADS:
            config[key] = 32
        elif key == "head_dim" and key in STATED.get(model_type, ()):  # its output projection is square
            config[key] = 2048 // 32
        elif key in (*DEPTHS, *STATED.get(model_type, ()), "vocab_size", "pad_token_id") or (
            rng.random() < 0.5 and key != "rotary_dim"
        ):
            config[key] = value
    depth = next(config[key] for key in DEPTHS if key in config)
    for flag in FLAGS:
        if rng.random() < 0.3:
            config[flag] = rng.random() < 0.5
    for key, values in VALUES.items():
        words = stated.get("layer_types", ()) if key == "layer_types" else ()
        if words and "sliding_attention" not in words:
            continue
        if key == "layer_types" and model_type in OWN_KINDS:
            continue
        if rng.random() < 0.3 and (key != "rope_scaling" or turns_part(model_type)):
            value = rng.choice(values)
            long = isinstance(value, list) and key in ("layer_types", "no_rope_layers")
            config[key] = [value[i % len(value)] for i in range(depth)] if long else copy.deepcopy(value)
    if rng.random() < 0.3:
        config["tie_word_embeddings"] = rng.random() < 0.5
    return config


@pytest.mark.torch
@pytest.mark.parametrize("model_type", FAMILIES)
def test_missing_config_keys_get_transformers_defaults(model_type: str) -> None:
    """With random missing keys, flags and foreign keys, the parameters and layers are equal."""
    rng = random.Random(model_type)
    configs = [a_config(model_type, rng) for _ in range(24)]
    asks = min(configs, key=len) if model_type in FAMILIES[::8] else None
    compared = 0
    for config in configs:
        found = built(config, live=config is asks)
        if found is None:  # transformers rejects the config too
            continue
        model = ModelSpec(config)
        kinds, runs = counts(model)
        assert {kind: number for kind, number in kinds.items() if number} == found["kinds"]
        assert runs == found["layers"], config
        if "sliding" in found and model_type not in CACHES:
            assert [layer.sliding for layer in model.layers] == found["sliding"], config
            if "window" in found:
                assert model.sliding_window == found["window"], config
        if turns_part(model_type) and "rotated" in found:
            width = int(model.head_dim * found["rotated"])
            assert model.rotary_width == min(width + width % 2, model.head_dim), config
        compared += 1
    assert compared >= 5


@each(product(sampled(list(TINY), 8), ("fatrelu", "quick_gelu", "gelu_python", 1, ["silu"], "")))
def test_an_activation_that_no_stack_has_is_refused_by_name(case: tuple[str, Any]) -> None:
    model_type, named = case
    model = ModelSpec({"model_type": model_type, **TINY[model_type]})
    key = model._key("hidden_act")  # pyright: ignore[reportPrivateUsage]
    if key is None:
        return
    with pytest.raises(
        UnsupportedModelError, match=f"^{key}: .* is not supported yet for model_type .*silu|relu2"
    ) as e:
        ModelSpec({"model_type": model_type, **TINY[model_type], key: named})
    assert e.value.field == key


def test_gated_mlps_need_a_single_kernel_activation_and_others_do_not() -> None:
    """transformers' gelu_new is eight operations, and relu keeps its output: neither is like silu's kernel."""
    for act in ("gelu_new", "relu", "relu2"):
        with pytest.raises(
            UnsupportedModelError, match=f'hidden_act: "{act}" is not supported yet for model_type llama'
        ):
            ModelSpec({"model_type": "llama", **TINY["llama"], "hidden_act": act})
        for model_type in ("gpt_neox", "phi", "starcoder2"):
            model = ModelSpec({"model_type": model_type, **TINY[model_type], "hidden_act": act})
            assert build(model, Wiring("flash", "efficient"))
    with pytest.raises(
        UnsupportedModelError, match='feed_forward_proj: "gated-x" is not supported yet; supported: silu'
    ):
        ModelSpec({**read_card("t5-base")["config"], "feed_forward_proj": "gated-x"}).axes()


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("granitemoehybrid", "layer_types"),
        ("gemma2", "layer_types"),
        ("gpt_oss", "layer_types"),
        ("qwen3", "layer_types"),
    ],
)
def test_a_null_layer_type_is_refused(model_type: str, key: str) -> None:
    config = {"model_type": model_type, **TINY[model_type], key: [None] * 64}
    with pytest.raises(ConfigError, match=f"{key}.*null"):
        ModelSpec(config)


@pytest.mark.parametrize("key", ["compress_ratios", "layer_types", "mlp_layer_types"])
@pytest.mark.parametrize("bad", [float("inf"), 4, "moe", [None] * 4, ["x"] * 4, [4]])
def test_v4s_layer_types_are_a_list_of_known_words(key: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=f"{key}: \\S+ is not supported yet|{key} must be a list"):
        ModelSpec({"model_type": "deepseek_v4", **TINY["deepseek_v4"], key: bad})


@pytest.mark.parametrize("bad", [5, -0.1, True, "x", [0.1]])
def test_a_probability_of_dropout_is_a_number_from_0_to_1(bad: Any) -> None:
    for model_type, changed in (
        ("gpt_neox", {"attention_dropout": bad}),
        ("mpt", {"attn_config": {"attn_pdrop": bad}}),
    ):
        model = ModelSpec({"model_type": model_type, **TINY[model_type], **changed})
        with pytest.raises(ConfigError, match=r"drop.* must be a number from 0 to 1, not"):
            build(model, Wiring("flash", "efficient"))
    with pytest.raises(ConfigError, match="attn_config must be a mapping, not 5"):
        build(ModelSpec({"model_type": "mpt", **TINY["mpt"], "attn_config": 5}), Wiring("flash", "efficient"))


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen3_vl_moe"])
def test_experts_are_counted_by_the_name_that_transformers_writes_too(model_type: str) -> None:
    """Their config classes write num_experts as num_local_experts (attribute_map of transformers 5.24)."""
    like = {"qwen3_moe": {**TINY["qwen3_moe"]}, "qwen3_vl_moe": {"text_config": {**TINY["qwen3_moe"]}}}[model_type]
    config = {"model_type": model_type, **copy.deepcopy(like)}
    part = config.get("text_config", config)
    part["num_local_experts"] = part.pop("num_experts")
    assert ModelSpec(config).axes()["E"] == 8


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters", "quantization_config"])
@pytest.mark.parametrize("bad", [4.0, [1, 2], "linear"])
def test_mappings_in_a_config_cannot_be_numbers_lists_or_text(key: str, bad: Any) -> None:
    with pytest.raises(ConfigError, match=f"config: {key} must be a mapping, not ") as caught:
        ModelSpec({**SMALLEST, key: bad})
    assert caught.value.field == key


@pytest.mark.parametrize("bad", [0.25, 64.0, 0, "64"])
def test_opts_embeddings_are_a_whole_number_wide(bad: Any) -> None:
    with pytest.raises(ConfigError, match="word_embed_proj_dim must be a whole number"):
        ModelSpec({"model_type": "opt", **TINY["opt"], "word_embed_proj_dim": bad}).axes()


@pytest.mark.parametrize(("head_dim", "rotated"), [(2, 2), (6, 4), (7, 4), (12, 6), (24, 12)])
def test_an_odd_share_of_a_head_is_rotated_in_pairs(head_dim: int, rotated: int) -> None:
    """There are as many frequencies as numbers in `arange(0, width, 2)`, each for two dimensions."""
    assert ModelSpec({"model_type": "glm4", **TINY["glm4"], "head_dim": head_dim}).rotary_width == rotated


@pytest.mark.parametrize("shared", [5, 6, 48])
def test_some_layer_makes_the_keys_that_gemmas_last_layers_share(shared: int) -> None:
    config = {"model_type": "gemma3n_text", **TINY["gemma3n_text"]}
    with pytest.raises(ConfigError, match=f"num_kv_shared_layers {shared} leaves no layer whose keys"):
        ModelSpec({**config, "num_kv_shared_layers": shared})


def test_a_window_of_0_is_none_as_transformers_writes_it() -> None:
    config = {"model_type": "qwen2_moe", **TINY["qwen2_moe"], "sliding_window": 0}
    assert ModelSpec(config).sliding_window is None
    with pytest.raises(ConfigError, match="sliding_window must be a whole number from 0"):
        _ = ModelSpec({**config, "sliding_window": -1})


def test_a_tower_too_shallow_for_deepstack_features_is_built() -> None:
    config = copy.deepcopy(read_card("qwen3-vl-8b")["config"])
    config["vision_config"]["depth"] = 5
    assert build(ModelSpec(config), Wiring("flash", "efficient", images=True))


def test_gemma_4s_heads_layer_by_layer_are_those_of_all_or_refused() -> None:
    config = {"model_type": "gemma4_text", **TINY["gemma4_text"]}
    same = {"1": {"head_dim": config["global_head_dim"]}}
    assert ModelSpec({**config, "per_layer_config": same}).axes() == ModelSpec(config).axes()
    with pytest.raises(UnsupportedModelError, match=r"per_layer_config: .*use global_head_dim, which is 512 here"):
        ModelSpec({**config, "global_head_dim": 512, "per_layer_config": same})


def test_an_empty_config_key_is_ignored() -> None:
    config = {"model_type": "nemotron_h", **TINY["nemotron_h"]}
    assert ModelSpec({**config, "": 5}).axes() == ModelSpec(config).axes()


def test_a_list_of_indexers_is_a_list() -> None:
    with pytest.raises(ConfigError, match="indexer_types must be a list of"):
        ModelSpec({**read_card("glm-5")["config"], "indexer_types": 5})


def test_a_config_with_nan_is_the_same_model_when_read_again(tmp_path: Path) -> None:
    """Results are cached by model, and NaN never equals itself."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "llama", **TINY["llama"], "attention_dropout": float("nan")}))
    assert find_model(str(path)) == find_model(str(path))
    assert hash(find_model(str(path))) == hash(find_model(str(path)))


def test_an_alias_has_what_its_own_config_says() -> None:
    base, instruct = find_model("qwen2.5-7b"), find_model("Qwen/Qwen2.5-7B-Instruct")
    assert (base.max_position_embeddings, instruct.max_position_embeddings) == (131072, 32768)
    assert {**base.config, "max_position_embeddings": 32768} == dict(instruct.config)
    assert find_model("unsloth/Qwen2.5-7B-Instruct") == find_model("Qwen2.5 7B Instruct") == instruct
    assert find_config("Qwen/Qwen2.5-7B-Instruct")["max_position_embeddings"] == 32768
