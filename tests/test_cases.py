"""A test of many cases names those that fail."""

from __future__ import annotations

import pytest

from tests.cases import each, in_groups


def is_even(n: int) -> None:
    """Even numbers."""
    if n == 5:
        with pytest.raises(ValueError, match="never"):
            pass
    assert n % 2 == 0


def test_every_failing_case_is_named_with_its_reason() -> None:
    test = each(lambda: range(6), name=lambda n: f"case {n}")(is_even)
    with pytest.raises(AssertionError) as failed:
        test()
    assert [f"case {n}" in str(failed.value) for n in range(6)] == [False, True, False, True, False, True]
    assert "Failed: DID NOT RAISE" in str(failed.value)
    assert (test.__name__, test.__doc__) == ("is_even", "Even numbers.")


def test_cases_that_all_hold_are_needed() -> None:
    each([0, 2, 4])(is_even)()
    with pytest.raises(AssertionError):
        each(range(0))(is_even)()


def test_groups_have_every_case_once_and_name_those_that_fail() -> None:
    seen: list[int] = []
    test = in_groups(range(7), size=3)(seen.append)
    groups = test.pytestmark[0].args[1]
    for group in groups:
        test(group)
    assert (seen, len(groups)) == ([*range(7)], 3)
    with pytest.raises(AssertionError, match="1 of 2 cases fail\n3: "):
        in_groups([2, 3])(is_even)([2, 3])
