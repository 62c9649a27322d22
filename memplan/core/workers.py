"""Map a function over many items in forked processes: each has what is imported and cached so far."""

from __future__ import annotations

import gc
import os
import pickle
import selectors
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeVar

from memplan.core.collection import without_collection

FEWEST = 8  # items for which another process pays off

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def processes_for(count: int) -> int:
    """Return how many processes to use for a number of items: one per core, and one where there is no fork."""
    if not hasattr(os, "fork") or count < FEWEST:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, count // (FEWEST // 2))


def mapped(
    function: Callable[[_Item], _Result],
    items: Sequence[_Item],
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[_Result]:
    """Return the function's result for each item, in order. Neighbours share a process, and so its caches; a process
    that is done takes the next of the others.

    progress  is called with how many items are done, and of how many

    Raises RuntimeError if a process ends before its items do.
    """
    processes = min(processes, len(items))
    if processes <= 1:
        results: list[_Result] = []
        for item in items:
            if progress is not None:
                progress(len(results), len(items))
            results.append(function(item))
        return results
    found: dict[int, _Result] = {}
    size = -(-len(items) // (processes * _SHARES))
    taking, giving = os.pipe()
    os.write(giving, b"".join(start.to_bytes(_LENGTH, "big") for start in range(0, len(items), size)))
    os.close(giving)  # there is nothing to take once it is read
    with selectors.DefaultSelector() as selector:
        for _ in range(processes):
            pipe, pid = _start(function, items, taking, size)
            selector.register(pipe, selectors.EVENT_READ, _Worker(pid))
        os.close(taking)
        while selector.get_map():
            for key, _ in selector.select():
                pipe: IO[bytes] = key.fileobj  # pyright: ignore[reportAssignmentType]
                worker: _Worker = key.data
                received = pipe.read(_MOST_READ)
                found.update(worker.results(received))
                if not received:
                    selector.unregister(pipe)
                    pipe.close()
                    os.waitpid(worker.pid, 0)
                if progress is not None:
                    progress(len(found), len(items))
    if len(found) < len(items):
        raise RuntimeError("a process ended before its work")
    return [found[index] for index in range(len(items))]


_loads = without_collection(pickle.loads)


class _Worker:
    """A process, and the beginning of a result that it has sent."""

    def __init__(self, pid: int) -> None:
        self.pid, self._begun = pid, bytearray()

    def results(self, received: bytes) -> Iterator[tuple[int, Any]]:
        """Yield the index and the result of each item that is there entirely."""
        self._begun += received
        while len(self._begun) >= _LENGTH:
            end = _LENGTH + int.from_bytes(self._begun[:_LENGTH], "big")
            if len(self._begun) < end:
                return
            yield _loads(self._begun[_LENGTH:end])
            del self._begun[:end]


_SHARES = 8  # of the items for each process: it takes them one by one
_LENGTH = 8  # bytes that say how long a result is, or where a share begins
_MOST_READ = 1 << 20


def _start(
    function: Callable[[_Item], _Result], items: Sequence[_Item], taking: int, size: int
) -> tuple[IO[bytes], int]:
    """Start a process, and return the pipe that its results come from, and its id.

    taking  the pipe that says where each share of the items begins; every process reads the next one from it
    size    number of items in a share
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        return os.fdopen(reading, "rb", buffering=0), pid
    status = 1
    try:
        gc.freeze()  # what was there before stays: a collection would visit it, and copy its pages
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            while share := os.read(taking, _LENGTH):
                start = int.from_bytes(share, "big")
                for index in range(start, min(start + size, len(items))):
                    result = pickle.dumps((index, function(items[index])))
                    pipe.write(len(result).to_bytes(_LENGTH, "big") + result)
                    pipe.flush()
        status = 0
    finally:
        os._exit(status)
