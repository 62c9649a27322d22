"""`memplan card new` writes a card that memplan reads as the same model, with every figure explained."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan import ModelSpec, RunSpec, card_names, estimate, find_model, load_card
from memplan.cli.app import app
from memplan.models import cards
from memplan.models.headers import Checkpoint, StoredTensor
from memplan.program.stored.checkpoint import built_tensors
from memplan.report.model_card import CardFacts, card
from tests.checkpoints import TINY, folder_of, of_model
from tests.models.test_hub import COMMIT, Served, served  # noqa: F401
from tests.sampling import examples, sampled
from tests.tiny import TINY as DECODERS

FACTS = CardFacts("some/tiny", "config.json", "2026-11-25", "mit")
Written = Callable[..., dict[str, Any]]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Written]:
    """Run `memplan card new` and read the card from its own folder of cards."""
    folder = tmp_path / "cards"
    folder.mkdir()
    cached = (cards.card_names, cards.load_card, cards._aliases, cards._names_by_letters, cards._card_name)

    def write(*args: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as end:
            app(args=["card", "new", *args, "--out", str(folder / "new.toml")])
        assert (end.value.code, capsys.readouterr()) == (0, ("", ""))
        monkeypatch.setattr(cards, "card_folder", lambda: folder)
        for one in cached:
            one.cache_clear()
        return tomllib.loads((folder / "new.toml").read_text("utf-8"))

    yield write
    for one in cached:
        one.cache_clear()


def test_a_card_of_a_folder_is_read_as_the_folder_is(tmp_path: Path, written: Written) -> None:
    config = {**TINY, "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "bos_token_id": 1, "use_cache": True}
    folder = folder_of(tmp_path / "repo", config, of_model(config))
    before = estimate(RunSpec(model=str(folder), method="lora"))
    said = written(str(folder))
    assert said["parameters"] == said["published"] == before.parameters.total
    assert said["published_source"] == f"headers of the safetensors, {folder}"
    assert said["source"] == str(folder / "config.json")
    assert "difference" not in said
    assert said["config"] == {key: value for key, value in config.items() if key not in ("bos_token_id", "use_cache")}
    assert card_names() == ("new",)
    after = estimate(RunSpec(model="new", method="lora"))
    assert (after.bytes.allocated, after.parameters) == (before.bytes.allocated, before.parameters)


def test_a_card_of_the_hub_says_commit_and_licence(
    tmp_path: Path,
    served: Served,  # noqa: F811
    written: Written,
) -> None:
    served.folders["some/tiny"] = folder_of(tmp_path / "repo", TINY, of_model(TINY), shards=2)
    said = written("some/tiny", "--online", "--revision", "v1")
    assert said["hf_id"] == "some/tiny"
    assert said["source"] == f"huggingface.co/some/tiny:config.json@{COMMIT}"
    assert said["licence"] == "apache-2.0"
    assert said["published"] == said["parameters"]
    assert find_model("some/tiny").name == "new"


def test_the_difference_is_named_with_its_arithmetic(tmp_path: Path, written: Written) -> None:
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": ("F32", (8,)) for i in range(3)}
    said = written(str(folder_of(tmp_path, TINY, {**of_model(TINY), **buffers})))
    assert said["difference"] == ("the checkpoint also stores model.layers.*.self_attn.rotary_emb.inv_freq, 3 x 8 = 24")
    assert said["published"] - said["parameters"] == 24
    part = {name: of for name, of in of_model(TINY).items() if name != "lm_head.weight"}
    said = written(str(folder_of(tmp_path / "part", TINY, part)))
    assert said["difference"] == f"the checkpoint does not store lm_head.weight {512 * 64}, {-512 * 64}"


def test_a_checkpoint_that_is_stored_quantised_has_no_published_count(tmp_path: Path, written: Written) -> None:
    said = written(str(folder_of(tmp_path, TINY, {**of_model(TINY), "lm_head.weight": ("U8", (512, 64))})))
    assert "published" not in said


def test_three_tensors_missing_from_a_checkpoint_are_named(tmp_path: Path, written: Written) -> None:
    part = {name: of for name, of in of_model(TINY).items() if ".mlp." not in name}
    said = written(str(folder_of(tmp_path, TINY, part)))["difference"]
    assert said.startswith("the checkpoint does not store model.layers.0.mlp.")
    assert said.count("mlp.") == 3


def test_a_config_without_weights_leaves_the_published_figure_open(tmp_path: Path, written: Written) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), "utf-8")
    said = written(str(tmp_path / "config.json"))
    assert said.keys() == {"hf_id", "source", "checked", "parameters", "config"}


def test_a_folders_id_is_its_origin_or_a_line_to_fill_in(tmp_path: Path, written: Written) -> None:
    path = tmp_path / "config.json"

    def said(*args: str, **more: str) -> tuple[str, str]:
        path.write_text(json.dumps({**TINY, **more}), "utf-8")
        said = written(str(path), *args)
        return said["hf_id"], (tmp_path / "cards" / "new.toml").read_text("utf-8").splitlines()[0]

    to_fill_in = ("owner/name", 'hf_id = "owner/name"  # to be filled in: its id at Hugging Face; --hf-id writes it')
    assert said() == to_fill_in
    for no_id in ("/home/me/checkpoint", "./out/checkpoint", "out/run/checkpoint", "checkpoint", "../checkpoint", ""):
        assert said(_name_or_path=no_id) == to_fill_in
    assert said(_name_or_path="some/tiny-1.5") == ("some/tiny-1.5", 'hf_id = "some/tiny-1.5"')
    assert said("--hf-id", "my/tiny", _name_or_path="some/tiny") == ("my/tiny", 'hf_id = "my/tiny"')


def test_an_invalid_id_is_one_error_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY), "utf-8")
    with pytest.raises(SystemExit) as end:
        app(args=["card", "new", str(tmp_path), "--hf-id", "tiny"])
    line = "memplan: hf_id (--hf-id): 'tiny' is not a Hugging Face id (owner/name)\n"
    assert (end.value.code, capsys.readouterr()) == (2, ("", line))


@pytest.mark.parametrize("name", [*sampled(card_names(), 16)[::4], "bge-reranker-v2-m3"])
def test_a_card_of_a_card_is_the_same_model(name: str) -> None:
    model = load_card(name)
    config = cards.find_config(name)
    said = tomllib.loads(card(model, config, FACTS))
    again = ModelSpec(cards._card_config(said))
    assert (again.axes(), again.layers) == (model.axes(), model.layers)
    assert built_tensors(again) == built_tensors(model)
    assert said["parameters"] == model.card["parameters"]


JSON = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=examples(150), deadline=None)
@given(st.dictionaries(st.text(max_size=12), JSON, max_size=5))
def test_any_config_is_written_unchanged(more: Mapping[str, Any]) -> None:
    config = {**TINY, **{f"x_{key}": value for key, value in more.items()}}
    tensor = StoredTensor("model.norm.weight", "BF16", (64,), 128)
    model = ModelSpec(config, checkpoint=Checkpoint("here", (tensor,)))
    assert tomllib.loads(card(model, config, FACTS))["config"] == config


def test_separate_experts_and_a_named_buffer_make_up_the_model(tmp_path: Path) -> None:
    """As transformers saves DeepSeek V3: one matrix per expert, and the router's correction bias, a buffer."""
    config = {"model_type": "deepseek_v3", **DECODERS["deepseek_v3"]}
    tensors = dict(of_model(config))
    layers = set()
    for name in [name for name in tensors if ".experts." in name]:
        dtype, (experts, out, into) = tensors.pop(name)
        layers.add(name.partition(".experts.")[0])
        parts = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        for i in range(experts):
            tensors |= {
                f"{name.rpartition('.')[0]}.{i}.{part}.weight": (dtype, (out // len(parts), into)) for part in parts
            }
    tensors |= {f"{layer}.gate.e_score_correction_bias": ("F32", (experts,)) for layer in layers}
    folder = folder_of(tmp_path, config, tensors)
    notes = estimate(RunSpec(model=str(folder), batch={"sequence": 64})).notes
    assert not [note for note in notes if "checkpoint" in note]
    model = find_model(str(folder))
    made = tomllib.loads(card(model, config, CardFacts("a/b", "here", "2026-01-01", "")))
    assert made["published"] - made["parameters"] == len(layers) * experts
    buffers = f"{len(layers)} x {experts} = {len(layers) * experts}"
    assert made["difference"] == (
        f"the checkpoint also stores model.layers.*.mlp.gate.e_score_correction_bias, {buffers}"
    )
