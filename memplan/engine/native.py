"""The allocator's model compiled from native.c, which replays some twenty times faster than the one in Python.

The library is built when memplan is installed, if there is a C compiler (hatch_build.py), and is found by the checksum
of its source. Without it replays run in Python, with the same results.
"""

from __future__ import annotations

import ctypes
import zlib
from array import array
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from memplan.engine.allocator import Allocator, LiveBlocks, OutOfMemoryError, PythonAllocator
from memplan.engine.events import Events

SOURCE = Path(__file__).with_name("native.c")
NONE = 0  # the block of no storage
_NO_EVENT = -1
_COUNTERS = ("allocated", "reserved", "peak_allocated", "peak_reserved", "requests", "refused", "capacity", "missing")


_MOST = 2**61  # bytes that native.c counts exactly
_in_python: ContextVar[bool] = ContextVar("in_python", default=False)
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def new_allocator(expandable: bool = False, capacity: int | None = None, streams: int = 1) -> Allocator:
    """Return an empty allocator, compiled if the library is there. Arguments as of `PythonAllocator`.

    The compiled one raises OverflowError beyond 2**61 bytes: see `exact`.
    """
    kind = PythonAllocator if _in_python.get() or library() is None else NativeAllocator
    return kind(expandable, capacity, streams)


def exact(replay: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate a function that replays on new allocators, so that it replays in Python what 64 bits do not hold."""

    @wraps(replay)
    def replay_exactly(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return replay(*args, **kwargs)
        except OverflowError:
            token = _in_python.set(True)
            try:
                return replay(*args, **kwargs)
            finally:
                _in_python.reset(token)

    return replay_exactly


def library_path() -> Path:
    """Return where the library built from this source is."""
    return SOURCE.with_name(f"native-{zlib.crc32(SOURCE.read_bytes()):08x}.lib")  # .so would be a module


class _State(ctypes.Structure):
    """The fields of native.c's `Allocator` that are read here."""

    _fields_ = tuple((name, ctypes.c_int64) for name in _COUNTERS)


@cache
def library() -> Any:
    """Return the compiled library, or None if it was not built or does not load."""
    try:
        loaded = ctypes.CDLL(str(library_path()))
    except OSError:
        return None
    state, pointer, i32, i64 = ctypes.POINTER(_State), ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    for name, returns, *takes in (
        ("allocator_new", state, i32, i64, i32),
        ("allocator_delete", None, state),
        ("alloc", pointer, state, i64, i32),
        ("free_block", None, state, pointer),
        ("release", None, state),
        ("replay", i64, state, pointer, pointer, pointer, pointer, i64, pointer, pointer),
        ("largest", None, pointer, pointer, i64, pointer, i64, pointer),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = returns, takes
    return loaded


def _counter(name: str) -> Any:
    return property(lambda self: getattr(self._state.contents, name))  # pyright: ignore[reportUnknownLambdaType]


class NativeAllocator:
    """One device's allocator, like `PythonAllocator`; its blocks' handles are their addresses."""

    allocated, reserved, peak_allocated, peak_reserved, requests, refused = map(_counter, _COUNTERS[:6])

    def __init__(self, expandable: bool = False, capacity: int | None = None, streams: int = 1) -> None:
        self._library = library()
        self._state = self._library.allocator_new(
            expandable, -1 if capacity is None else max(0, min(capacity, 2 * _MOST)), streams
        )

    def __del__(self) -> None:
        self._library.allocator_delete(self._state)

    def alloc(self, size: int, stream: int = 0) -> int:
        if size > _MOST:
            raise OverflowError(size)
        block: int | None = self._library.alloc(self._state, size, stream)
        if block is None:
            raise self._full()
        return block

    def free(self, block: int) -> None:
        self._library.free_block(self._state, block)

    def release(self) -> None:
        self._library.release(self._state)

    def live_blocks(self, storages: int) -> LiveBlocks:
        return array("q", (NONE,)) * storages

    def replay(self, events: Events, sizes: Sequence[int], live: LiveBlocks) -> None:
        if max(sizes, default=0) > _MOST:
            raise OverflowError(max(sizes))
        assert isinstance(live, array)
        assert len(live) >= events.storages
        by_key, spans = array("q", sizes), len(events.spans) // 4
        arrays = map(address_of, (live, events.numbers, events.keys, events.spans))
        failed: int = self._library.replay(self._state, *arrays, spans, address_of(by_key), address_of(events.streams))
        if failed != _NO_EVENT:
            raise self._full() if events.keys[failed] >= 0 else KeyError(self._state.contents.missing)

    def _full(self) -> OutOfMemoryError | OverflowError:
        state = self._state.contents
        if not state.missing:
            return OverflowError(state.reserved)
        return OutOfMemoryError(f"{state.missing} bytes more than {state.reserved} of {state.capacity}")


def address_of(values: array[int]) -> int:
    """Return where an array's numbers are in memory, for as long as it neither grows nor goes."""
    return values.buffer_info()[0]
