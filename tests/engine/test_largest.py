"""The compiled comparison of moments finds the moment that the one in Python finds, for numbers of any size."""

from __future__ import annotations

from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.engine import largest as module
from memplan.engine.largest import PhaseTerms
from memplan.engine.walk import ONE, Term, Variable, largest
from tests.estimate.test_laws import laws
from tests.sampling import examples

VARIABLES = (ONE, Variable(("b", "s")), Variable(("s",)))
NUMBERS = st.integers(-9, 9) | st.integers(-(2**66), 2**66)
ROWS = st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), max_size=5)
SIZES = st.integers(1, 99) | st.integers(1, 2**40)


def terms(rows: list[tuple[int, ...]]) -> tuple[Term, ...]:
    """Return moments whose variables are all outside the chain, so that their sums are compared as they are."""
    return tuple(Term(row, (0,), None, 10 + i) for i, row in enumerate(rows))


@settings(laws, max_examples=examples(500))
@given(st.lists(ROWS, min_size=1, max_size=4), SIZES, SIZES)
def test_every_phase_has_its_first_largest_moment(rows: list[list[tuple[int, ...]]], b: int, s: int) -> None:
    phases, numbers = [terms(of_phase) for of_phase in rows], [1, b * s, s]
    most = [largest(of_phase, numbers, [1]) if of_phase else (0, -1) for of_phase in phases]
    assert PhaseTerms(phases, (ONE,)).largest(numbers, {"b": b, "s": s}) == most
    with patch.object(module, "library", lambda: None):
        assert PhaseTerms(phases, (ONE,)).largest(numbers, {"b": b, "s": s}) == most
