"""`functools.cached_property` without its lock, which a fork could leave held for ever in the child process.

Python 3.11 holds one lock for each property of a class while any instance computes its value. If another thread is
inside when the process forks, nobody in the child ever releases that lock. Python 3.12 removed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

T = TypeVar("T")


class cached_property(Generic[T]):  # noqa: N801 (a decorator, named as the one it replaces)
    """A method's value, computed when it is first asked for and then kept in the instance's `__dict__`.

    Threads that ask at the same time may each compute the value; all of them get the one that was kept first.
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
