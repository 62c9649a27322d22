"""Files whose text is given: they are read as files are, and no other file is."""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan.core.errors import ConfigError, FactsMissingError, SpecError
from memplan.core.files import are_given, exists, given_files, is_file, is_folder, open_file
from memplan.frameworks.reading.run_file import read_run
from memplan.models.cards import find_model

HERE = Path(__file__)


def test_only_given_texts_are_there() -> None:
    with given_files({"a/b.yaml": "x: é", "./c": ""}):
        assert open_file(Path("a/b.yaml")).read() == "x: é".encode()
        assert [is_file(Path(name)) for name in ("a/b.yaml", "c", "a/../c", "a", str(HERE))] == [True] * 3 + [False] * 2
        assert not exists(HERE)
        assert not is_folder(HERE.parent)
        with pytest.raises(FileNotFoundError):
            open_file(HERE)
        with given_files({}):
            assert not exists(Path("c"))
    assert not are_given()
    assert exists(HERE)


def test_a_run_is_read_with_the_files_that_it_names() -> None:
    text = "base_model: Qwen/Qwen2-7B\nmicro_batch_size: 1\ndeepspeed: zero.json\n"
    with given_files({"run.yaml": text, "zero.json": '{"zero_optimization": {"stage": 2}}'}):
        assert read_run("run.yaml").fields["parallelism"]["strategy"] == "zero2"
    with given_files({"run.yaml": text.replace("zero.json", str(HERE))}), pytest.raises(SpecError, match="no file"):
        read_run("run.yaml")


def test_a_path_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with given_files({}):
        for name in (str(tmp_path), f"{tmp_path}/config.json", "~/model", "./model", "model.gguf"):
            with pytest.raises(ConfigError, match="is a path"):
                find_model(name)
        with pytest.raises(FactsMissingError, match="no card for 'an-owner/a-model'; give its config"):
            find_model("an-owner/a-model")
        assert find_model("Qwen/Qwen2-7B").name == "qwen2-7b"
