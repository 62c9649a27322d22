"""Model names other than cards: paths and Hugging Face ids, and their errors."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from memplan.core.errors import ConfigError, FactsMissingError, MemplanError, UnknownNameError, nearest, printable
from memplan.models.cards import find_model
from tests.tiny import SMALLEST


def write(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(SMALLEST), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["mine", "./mine", "mine/config.json", "some/where", "some/where/config.json"])
def test_a_folder_or_a_file_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "mine")
    write(tmp_path / "some" / "where")
    assert find_model(name).num_hidden_layers == 2


def test_a_folder_named_like_a_hub_id_with_a_config_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen" / "Qwen2-7B").mkdir(parents=True)
    assert find_model("Qwen/Qwen2-7B").name == "qwen2-7b"
    write(tmp_path / "Qwen" / "Qwen2-7B")
    assert find_model("Qwen/Qwen2-7B").num_hidden_layers == 2


def test_a_model_cards_name_is_not_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "qwen2-7b")
    assert find_model("qwen2-7b").num_hidden_layers == 28
    assert find_model("./qwen2-7b").num_hidden_layers == 2


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(SMALLEST).encode())
    assert find_model(str(tmp_path)).num_hidden_layers == 2


def test_a_path_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    (tmp_path / "folder" / "config.json").mkdir(parents=True)
    reasons = {
        str(loop): "symbolic links",
        str(loop / "config.json"): "symbolic links",
        str(tmp_path / "folder"): "Is a directory",
        "~nobody-of-that-name/x": "home directory",
        "./a\0b": "null byte",
        "a" * 300 + ".json": "File name too long",
        str(tmp_path / "none.json"): "no file",
        "./a\x1b[31m\nb": r"no file a\x1b[31m\nb",
    }
    for path, reason in reasons.items():
        with pytest.raises(ConfigError) as caught:
            find_model(path)
        assert reason in str(caught.value)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="no devices")
def test_an_endless_device_is_read_only_up_to_a_configs_limit() -> None:
    with pytest.raises(ConfigError, match="larger than"):
        find_model("/dev/zero")
    with pytest.raises(ConfigError, match="it is empty"):
        find_model(os.devnull)


def test_an_id_that_is_not_here_names_the_nearest_card() -> None:
    with pytest.raises(FactsMissingError, match=r"did you mean Qwen/Qwen2-7B-Instruct\? Otherwise ask the Hub"):
        find_model("Qwen/Qwen2-7B-Instrct")
    with pytest.raises(FactsMissingError) as caught:
        find_model("nobody/at-all-like-that\x1b[0m\n")
    assert "did you mean" not in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name", ["", " ", "nope", "x" * 5000, "\0", "a\n", "\ud800", "Qwen/" + "x" * 5000, "a//b", "a/../b"]
)
def test_any_text_at_all_is_a_model_or_one_line(name: str) -> None:
    with pytest.raises(MemplanError) as caught:
        find_model(name)
    assert isinstance(caught.value, (UnknownNameError, FactsMissingError))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_the_nearest_names_begin_with_what_was_typed() -> None:
    assert nearest("adamw", ["grokadamw", "sgd", "adamw_torch"], 2) == ["adamw_torch", "grokadamw"]
    assert nearest("", ["b", "a"], 1) in (["a"], ["b"])


def test_nothing_unprintable_is_repeated() -> None:
    assert printable("a\x1b[31m\u202eb\n") == r"a\x1b[31m\u202eb\n"
    assert printable("é模") == "é模"
    assert printable("x" * 10, 3) == "xxx..."
