"""The allocator's model compiled from native.c, which replays some twenty times faster than the one in Python.

The library is built when memplan is installed, if there is a C compiler (hatch_build.py), and is found by the checksum
of its source. Without it replays run in Python, with the same results.
"""

from __future__ import annotations

import ctypes
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache, wraps
from itertools import chain
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from memplan.engine.allocator import Allocator, Event, LiveBlocks, OutOfMemoryError, PythonAllocator

SOURCE = Path(__file__).with_name("native.c")
_NONE = -1  # the handle of no block; the index of no event
_COUNTERS = ("allocated", "reserved", "peak_allocated", "peak_reserved", "requests", "capacity", "missing")


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
        ("alloc", i32, state, i64, i32),
        ("free_block", None, state, i32),
        ("release", None, state),
        ("live_new", pointer),
        ("live_delete", None, pointer),
        ("live_set", None, pointer, i64, i32),
        ("live_pop", i32, pointer, i64),
        ("live_blocks", i64, pointer, pointer),
        ("replay", i64, state, pointer, pointer, i64, i64, pointer, pointer),
    ):
        function = getattr(loaded, name)
        function.restype, function.argtypes = returns, takes
    return loaded


class NativeLiveBlocks:
    """The handles of live storages' blocks, by the storages' numbers."""

    def __init__(self) -> None:
        self._library = library()
        self.pointer = self._library.live_new()

    def __del__(self) -> None:
        self._library.live_delete(self.pointer)

    def __setitem__(self, number: int, block: int) -> None:
        self._library.live_set(self.pointer, number, block)

    def pop(self, number: int) -> int:
        block = self._library.live_pop(self.pointer, number)
        if block == _NONE:
            raise KeyError(number)
        return block

    def values(self) -> Iterator[int]:
        out = array("i", bytes(4 * self._library.live_blocks(self.pointer, None)))
        self._library.live_blocks(self.pointer, out.buffer_info()[0])
        return iter(out)


class NativeAllocator:
    """One device's allocator, like `PythonAllocator`; its blocks' handles are numbers."""

    def __init__(self, expandable: bool = False, capacity: int | None = None, streams: int = 1) -> None:
        self._library = library()
        self._state = self._library.allocator_new(
            expandable, -1 if capacity is None else min(capacity, 2 * _MOST), streams
        )
        self._arrays: dict[int, tuple[object, array[int]]] = {}  # id of a sequence -> itself, and its copy for C

    def __del__(self) -> None:
        self._library.allocator_delete(self._state)

    @property
    def allocated(self) -> int:
        return self._state.contents.allocated

    @property
    def reserved(self) -> int:
        return self._state.contents.reserved

    @property
    def peak_allocated(self) -> int:
        return self._state.contents.peak_allocated

    @property
    def peak_reserved(self) -> int:
        return self._state.contents.peak_reserved

    @property
    def requests(self) -> int:
        return self._state.contents.requests

    def alloc(self, size: int, stream: int = 0) -> int:
        if size > _MOST:
            raise OverflowError(size)
        block = self._library.alloc(self._state, size, stream)
        if block == _NONE:
            raise self._full()
        return block

    def free(self, block: int) -> None:
        self._library.free_block(self._state, block)

    def release(self) -> None:
        self._library.release(self._state)

    def live_blocks(self) -> LiveBlocks:
        return NativeLiveBlocks()

    def replay(
        self, events: Sequence[Event], sizes: Sequence[int], streams: Sequence[int], live: LiveBlocks, shift: int = 0
    ) -> None:
        assert isinstance(live, NativeLiveBlocks)
        if max(sizes, default=0) > _MOST:
            raise OverflowError(max(sizes))
        pairs = self._array(events, "q")
        failed: int = self._library.replay(
            self._state,
            live.pointer,
            pairs.buffer_info()[0],
            len(events),
            shift,
            self._array(sizes, "q").buffer_info()[0],
            self._array(streams, "i").buffer_info()[0],
        )
        if failed != _NONE:
            number, key = events[failed]
            raise self._full() if key >= 0 else KeyError(number + shift)

    def _array(self, values: Sequence[Any], kind: str) -> array[int]:
        known = self._arrays.get(id(values))
        if known is None:
            flat = chain.from_iterable(values) if values and isinstance(values[0], tuple) else values
            known = self._arrays[id(values)] = values, array(kind, flat)
        return known[1]

    def _full(self) -> OutOfMemoryError | OverflowError:
        state = self._state.contents
        if not state.missing:
            return OverflowError(state.reserved)
        return OutOfMemoryError(f"{state.missing} bytes more than {state.reserved} of {state.capacity}")
