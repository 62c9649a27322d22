"""The compiled comparison of moments finds the moment that the one in Python finds, for numbers of any size."""

from __future__ import annotations

import pickle
from operator import mul
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.engine import largest as module
from memplan.engine.largest import PhaseTerms, RowGroups
from memplan.engine.walk import Term
from tests.estimate.test_laws import laws
from tests.sampling import examples

NUMBERS = st.integers(-9, 9) | st.integers(-(2**66), 2**66)
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=5)
SIZES = st.integers(1, 99) | st.integers(1, 2**40)


@settings(laws, max_examples=examples(500))
@given(st.lists(ROWS, min_size=1, max_size=4), SIZES, SIZES)
def test_every_phase_has_its_first_largest_moment(rows: list[list[tuple[int, ...]]], b: int, s: int) -> None:
    numbers = [1, b * s, s]
    sums = [[sum(map(mul, row, numbers)) for row in of_phase] for of_phase in rows]
    most = [(max(of_phase), 10 + of_phase.index(max(of_phase))) if of_phase else (0, -1) for of_phase in sums]
    phases = [[Term(row, 10 + i) for i, row in enumerate(of_phase)] for of_phase in rows]
    assert PhaseTerms(phases).largest(numbers) == most
    with patch.object(module, "library", lambda: None):
        assert PhaseTerms(phases).largest(numbers) == most
    groups = RowGroups(rows)
    assert pickle.loads(pickle.dumps(groups)).largest(numbers) == groups.largest(numbers)
