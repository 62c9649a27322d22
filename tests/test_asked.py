"""The file of what libraries answered before holds for the code that asks, and only for it and the same versions."""

from __future__ import annotations

from typing import Any

import pytest

from tests.golden import ask_libraries

pytestmark = pytest.mark.torch


def test_the_file_is_of_the_code_that_asks() -> None:
    assert ask_libraries.lines()[0]["code"] == ask_libraries.code(), "run python tests/golden/ask_libraries.py"


def test_a_row_holds_for_the_same_libraries_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    @ask_libraries.remembered
    def double(number: int) -> int:
        asked.append(number)
        return 2 * number

    def written(**first: Any) -> None:
        key = ask_libraries._digest(["double", (2,)])  # pyright: ignore[reportPrivateUsage]
        now = {"versions": ask_libraries._versions(), "code": ask_libraries.code()}  # pyright: ignore[reportPrivateUsage]
        monkeypatch.setattr(ask_libraries, "lines", lambda: [{**now, **first}, {"key": key, "answer": 5}])
        ask_libraries._known.cache_clear()  # pyright: ignore[reportPrivateUsage]

    try:
        written()
        assert (double(2), double(3), asked) == (5, 6, [3])
        with pytest.raises(AssertionError, match=r"asked.jsonl has another answer to double\(2,\)"):
            double(2, live=True)
        for other in ({"versions": {"torch": "1.0"}}, {"code": ""}):
            written(**other)
            assert double(2) == double(2, live=True) == 4
    finally:
        ask_libraries._known.cache_clear()  # pyright: ignore[reportPrivateUsage]
