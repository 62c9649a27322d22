"""TOML is read as tomllib reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from memplan.core.package_data import data_path
from memplan.core.toml import parsed
from memplan.models.cards import card_folder
from tests.cases import in_groups

TABLES = {data_path("profiles.toml"), *data_path("core").parent.rglob("*.toml")} - {data_path("gpus.toml")}
CARDS = set(card_folder().glob("*.toml"))


@in_groups(sorted(TABLES | CARDS), lambda path: path.stem)
def test_a_file_is_read_as_tomllib_reads_it(path: Path) -> None:
    text = path.read_text("utf-8")
    assert repr(parsed(text)) == repr(tomllib.loads(text))


@pytest.mark.parametrize("path", sorted(TABLES - CARDS), ids=lambda path: path.stem)
def test_a_table_needs_no_tomllib(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tomllib, "loads", pytest.fail)
    assert parsed(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "a = 1_000",
        "a = 'x'",
        "a.b = 1",
        '"a" = 1',
        "[[a]]\nb = 1",
        "a = [\n1\n]",
        "a = [1,\n2]",
        "a = [\n1, # x\n]",
        "a = [\n1, 2,\n3,\n]",
        '"a.b" = [\n["x", 1],\n# x\n]',
        '[a."b.c".d]\ne = 1',
        r'"a\"b" = 1',
        "a = {b = 1}",
        "a=1",
        "a = 1 # x",
        "",
    ],
)
def test_what_json_writes_otherwise_is_left_to_tomllib(text: str) -> None:
    assert parsed(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "text", ["a = ", "a = 1 2", "a", "[a", "a = 2026-13-40", "a = [\n1,", "a = [\n1\n2,\n]", "a = [\n1,,\n]"]
)
def test_a_wrong_line_is_tomllibs_error(text: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        parsed(text)
