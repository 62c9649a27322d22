"""TOML is read as tomllib reads it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from memplan.core.toml import parsed
from memplan.models.cards import card_folder


@pytest.mark.parametrize("path", sorted(card_folder().glob("*.toml")), ids=lambda path: path.stem)
def test_a_card_is_read_as_tomllib_reads_it(path: Path) -> None:
    text = path.read_text("utf-8")
    assert repr(parsed(text)) == repr(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "a = 1_000",
        "a = 'x'",
        "a.b = 1",
        '"a" = 1',
        "[[a]]\nb = 1",
        "a = [\n1,\n]",
        "a = {b = 1}",
        "a=1",
        "a = 1 # x",
        "",
    ],
)
def test_what_json_writes_otherwise_is_left_to_tomllib(text: str) -> None:
    assert parsed(text) == tomllib.loads(text)


@pytest.mark.parametrize("text", ["a = ", "a = 1 2", "a", "[a", "a = 2026-13-40"])
def test_a_wrong_line_is_tomllibs_error(text: str) -> None:
    with pytest.raises(tomllib.TOMLDecodeError):
        parsed(text)
