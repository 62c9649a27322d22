"""`without_collection`: Python's garbage collector waits while objects are made that a cache keeps."""

from __future__ import annotations

import gc
import os
from _thread import get_ident
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")

_pausing: set[int] = set()  # threads that have paused it


def without_collection(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that makes hundreds of thousands of objects, which a cache keeps.

    The collector would look at all of them again and again, for a third of the time, and find nothing to free.
    """

    @wraps(function)
    def paused(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        if not gc.isenabled():  # or another thread has paused it, which starts it again
            return function(*args, **kwargs)
        _pausing.add(get_ident())
        gc.disable()
        try:
            return function(*args, **kwargs)
        finally:
            gc.enable()
            _pausing.discard(get_ident())

    return paused


def _start_again() -> None:
    """Start the collector in a forked process if it was paused by a thread that is not there."""
    if _pausing - {get_ident()}:
        gc.enable()
        _pausing.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_again)
