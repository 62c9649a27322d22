"""The garbage collector waits while a model is lowered, and no longer."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from threading import Event, Thread

import pytest

from memplan.core.collection import without_collection


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()


@without_collection
def is_on() -> bool:
    return gc.isenabled()


@without_collection
def inside() -> tuple[bool, bool]:
    return is_on(), gc.isenabled()


@without_collection
def fails() -> None:
    raise KeyError


def test_it_waits_and_starts_again() -> None:
    assert not is_on()
    assert gc.isenabled()
    assert inside() == (False, False)
    assert gc.isenabled()
    with pytest.raises(KeyError):
        fails()
    assert gc.isenabled()


def test_a_caller_that_stopped_it_finds_it_stopped() -> None:
    gc.disable()
    assert not is_on()
    assert not gc.isenabled()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # from Python 3.12 on, with threads
def test_a_process_forked_meanwhile_collects() -> None:
    entered, leave = Event(), Event()

    @without_collection
    def waits() -> None:
        entered.set()
        leave.wait()

    thread = Thread(target=waits)
    thread.start()
    entered.wait()
    assert not gc.isenabled()
    child = os.fork()
    if child == 0:
        os._exit(0 if gc.isenabled() else 1)
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()
