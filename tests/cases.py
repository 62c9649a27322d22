"""Many small cases in one test, as a test of its own takes longer than such a case; a library that tests import."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")


def each(
    cases: Iterable[Case] | Callable[[], Iterable[Case]], name: Callable[[Case], object] = str
) -> Callable[[Callable[[Case], None]], Callable[[], None]]:
    """Turn a check of one case into a test of all cases, which names every case that fails, and why.

    cases   at least one; those of a function are made when the test runs
    name    a case's name in the message
    """

    def checked(check: Callable[[Case], None]) -> Callable[[], None]:
        def test() -> None:
            tried = list(cases() if callable(cases) else cases)
            failed: list[str] = []
            for case in tried:
                try:
                    check(case)
                except (Exception, pytest.fail.Exception) as failure:
                    failed.append(f"{name(case)}: {type(failure).__name__}: {failure}")
            assert tried
            assert not failed, "\n".join([f"{len(failed)} of {len(tried)} cases fail", *failed])

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return checked


def in_groups(
    cases: Sequence[Case], name: Callable[[Case], object] = str, size: int = 16
) -> Callable[[Callable[[Case], None]], Any]:
    """Like `each`, for cases that take long together: a test for every `size` of them, named by its first and last."""
    groups = [cases[i : i + size] for i in range(0, len(cases), size)]

    def named(group: Sequence[Case]) -> str:
        return f"{name(group[0])} to {name(group[-1])}"

    def checked(check: Callable[[Case], None]) -> Any:
        @pytest.mark.parametrize("group", groups, ids=named)
        def test(group: Sequence[Case]) -> None:
            each(group, name)(check)()

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return checked


class Lazy:
    """A library, imported when a test uses it: every process of pytest-xdist collects its tests, and one runs them."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_"):  # pytest looks for marks of tests in everything that a file of tests names
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)
