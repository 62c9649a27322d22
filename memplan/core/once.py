"""`once`: a value that several threads ask for at the same time is computed by one of them."""

from __future__ import annotations

import os
from _thread import LockType, allocate_lock
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any, TypeVar

_Result = TypeVar("_Result")

_computing: dict[Hashable, tuple[LockType, list[Any]]] = {}


def once(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Decorate what a cache wraps: threads that miss it with equal arguments wait for the first one's result.

    If that raises an error, each thread computes the value itself.
    """

    @wraps(function)
    def computed(*args: Any, **kwargs: Any) -> _Result:
        key = (function, args, tuple(kwargs.items()))
        lock, results = allocate_lock(), list[Any]()
        lock.acquire()
        first_lock, first_results = _computing.setdefault(key, (lock, results))
        if first_lock is not lock:
            with first_lock:
                pass
            return first_results[0] if first_results else function(*args, **kwargs)
        try:
            results.append(function(*args, **kwargs))
            return results[0]
        finally:
            _computing.pop(key, None)  # a forked process has none
            lock.release()

    return computed


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_computing.clear)  # the threads that were computing are not there
