"""Threads that miss a cache with equal arguments compute its value once, and no thread waits for ever."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Lock, Semaphore

import pytest

from memplan.core.once import once


class Work:
    """A function that waits until it is allowed to go on, and counts its calls."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[int] = []
        self.begun, self.goes_on = Event(), Event()
        self.fails = fails

    def __call__(self, n: int) -> list[int]:
        self.calls.append(n)
        self.begun.set()
        assert self.goes_on.wait(60)
        if self.fails:
            raise ValueError(n)
        return [n]


def test_threads_with_equal_arguments_get_the_first_ones_value(monkeypatch: pytest.MonkeyPatch) -> None:
    work, waiting = Work(), Semaphore(0)

    class TellingLock:
        """A lock that tells when a thread begins to wait for it."""

        def __init__(self) -> None:
            lock = Lock()
            self.acquire, self.release = lock.acquire, lock.release

        def __enter__(self) -> None:
            waiting.release()
            self.acquire()

        def __exit__(self, *_: object) -> None:
            self.release()

    monkeypatch.setattr("memplan.core.once.allocate_lock", TellingLock)
    computed = once(work.__call__)
    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(computed, n) for n in (1, 1, 1, 2, 2, 2)]
        for _ in range(4):
            assert waiting.acquire(timeout=60)
        work.goes_on.set()
        values = [answer.result(60) for answer in answers]
    assert values == [[1]] * 3 + [[2]] * 3
    assert sorted(work.calls) == [1, 2]
    assert computed(1) is not values[0]  # it is no cache


def test_after_an_error_each_thread_computes_for_itself() -> None:
    work = Work(fails=True)
    computed = once(work.__call__)
    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(computed, 1) for _ in range(2)]
        assert work.begun.wait(60)
        work.goes_on.set()
        for answer in answers:
            with pytest.raises(ValueError, match="1"):
                answer.result(60)
    assert work.calls == [1, 1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_process_waits_for_no_thread() -> None:
    work = Work()
    computed = once(work.__call__)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(computed, 1)
        assert work.begun.wait(60)
        child = os.fork()
        if not child:
            work.goes_on.set()
            os._exit(computed(1) != [1])
        work.goes_on.set()
        assert os.waitpid(child, 0)[1] == 0
        assert answer.result(60) == [1]
