"""Arithmetic that is written down gives the same numbers as arithmetic on ints, as far as it is decided the same."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memplan.core.arithmetic import ONE_RUN, Arithmetic
from memplan.core.expression import WRITTEN, Argument, arithmetic_of, compiled
from tests.sampling import examples

POSITIVE = st.integers(1, 2**40)


def every_operation(by: Arithmetic[Any], a: Any, b: Any) -> list[Any]:
    """Return results of every operation that axes and variables are made with, nested and repeated."""
    rest, up = a % 8, -(-a // 8) * 8
    chosen = by.choose(rest == 0, a, by.choose(a > b, up, 0))
    orders = [by.choose(each, 1, 2) for each in (a > 3072, a >= b, a < b, b >= 7, b == 5)]
    parts = [by.least(a, 77), by.most(b, up), by.power_of_two(a), 200 // b, 5 - a, 3 + b, a - b - 0, 1 * a * 4 + 0]
    return [1, *orders, *parts, chosen, (a * b * 28 + 511) & -512, -(-a // 1), -a // b, True]


@settings(max_examples=examples(200), deadline=None)
@given(POSITIVE, POSITIVE)
def test_written_arithmetic_gives_the_numbers_of_ints(a: int, b: int) -> None:
    written = [Argument("a"), Argument("b")]
    assert compiled(every_operation(arithmetic_of(b, *written), *written), *written)(a, b) == every_operation(
        ONE_RUN, a, b
    )


def decided(a: Any, b: Any) -> list[Any]:
    """Return results that are chosen, ordered and left out by what the numbers are."""
    parts = [-(-a // part) for part in (3, b) if a > part]
    return [min(a, b, 7), *sorted((a, 2 * b, a + b)), a if a % 2 else -b, *parts, a == b or 5]


@settings(max_examples=examples(200), deadline=None)
@given(*[POSITIVE | st.integers(1, 9)] * 4)
def test_a_function_is_of_the_runs_that_decide_the_same(a: int, b: int, x: int, y: int) -> None:
    one = [Argument("a", a), Argument("b", b)]
    written = compiled(decided(*one), *one)
    assert written(a, b) == decided(a, b)
    assert written(x, y) in (None, decided(x, y))


def test_what_an_expression_decides_is_never_decided_early() -> None:
    with pytest.raises(TypeError, match="chosen by `WRITTEN`"):
        bool(every_operation(WRITTEN, Argument("a"), 3)[1] > 1)
    with pytest.raises(TypeError, match="unhashable"):
        hash(Argument("a", 1))
