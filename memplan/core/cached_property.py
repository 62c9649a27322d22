"""`functools.cached_property` without the lock of Python 3.11, which can deadlock a forked child process.

Python 3.11 holds one lock per property while any instance computes its value. If another thread holds it when the
process forks, nothing in the child ever releases it. Python 3.12 removed the lock.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801 (a decorator, named like the one it replaces)
    """A method's value, computed on first access and then kept in the instance's `__dict__`.

    Concurrent threads may each compute the value; all of them get the one that was stored first.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> Self | T:
        if instance is None:
            return self
        return vars(instance).setdefault(self._name, self._compute(instance))
