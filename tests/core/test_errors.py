"""The nearest names to a wrong one."""

from __future__ import annotations

import difflib

from hypothesis import given
from hypothesis import strategies as st

from memplan.core.errors import most_similar

WORDS = st.text("ab1-", max_size=6)


@given(WORDS, st.lists(WORDS, unique=True, max_size=20), st.integers(1, 9))
def test_the_most_similar_words_are_those_of_difflib(value: str, words: list[str], most: int) -> None:
    assert most_similar(value, words, most) == difflib.get_close_matches(value, words, most, cutoff=0.0)
