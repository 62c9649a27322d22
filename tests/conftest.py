"""Settings for every test.

No machine profile or terminal width changes an answer, garbage is rarely collected, torch computes on one thread, only
the first of the processes that tests start compiles its imports, a traced run is estimated once for all tests of it,
one process imports torch and traces what tests trace, and hypothesis draws `tests.sampling`'s number of examples, the
same in each run, without a deadline.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import just

from benchmarks.golden import SHARED
from memplan.probe.limits import DEFAULT_LIMITS
from memplan.probe.run.trace import Tracer
from tests.sampling import ALL, examples

os.environ["OMP_NUM_THREADS"] = "1"  # there is a process per core, and threads wait for each other in a loop
gc.set_threshold(2_000_000, 10, 10)  # lowering creates many acyclic tuples: saves a fifth of the time
atexit.register(gc.freeze)  # a process that ends need not visit what its caches have

settings.register_profile("memplan", max_examples=examples(100), deadline=None, derandomize=True)
settings.load_profile("memplan")


@pytest.fixture(autouse=True, scope="session")
def _no_profile_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:  # pyright: ignore[reportUnusedFunction]
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets the terminal's width in its processes
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # by the processes of one session
    (shared / "figures").mkdir(exist_ok=True)
    patch.setenv(SHARED, str(shared / "figures"))
    if sys.dont_write_bytecode:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(shared / "compiled"))


@pytest.fixture(scope="session")
def tracer() -> Iterator[Tracer]:
    """One process for the traces of all tests, so that torch is imported once; restricted, as that of an answer is."""
    with Tracer(DEFAULT_LIMITS) as shared:
        yield shared


def pytest_collection(session: pytest.Session) -> None:
    """Import the files of tests from the last to the first in every second process, if all are collected.

    Processes that start together compile the same files at the same time; two that meet in the middle do half each.
    """
    tests, config = Path(__file__).parent, session.config
    is_second = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
    if is_second and [config.rootpath / path for path in config.args] == [tests]:
        for path in sorted(tests.rglob("test_*.py"), reverse=True):
            with suppress(Exception, pytest.skip.Exception):  # which pytest tells when it collects the file
                import_module(".".join(path.relative_to(tests.parent).with_suffix("").parts))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests marked `torch` first, where pytest-xdist gives them to one process: the others import it less."""
    items.sort(key=lambda item: item.get_closest_marker("torch") is None)
    for item in takewhile(lambda item: item.get_closest_marker("torch"), items):
        item.add_marker(ALL)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and collected tests stay: later collections need not visit them
    given(just(None))(lambda _: None)()  # hypothesis collects garbage in its first test: there is none yet


def pytest_sessionfinish() -> None:
    """Collect what is left, as pytest fails for an error in it; nothing tells of one in a process of pytest-xdist."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        gc.collect()
    gc.freeze()
