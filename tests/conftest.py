"""What holds for every test: no profile of the machine's own and no terminal's width changes an answer, garbage is
seldom collected, of the processes that tests start only the first compiles what it imports, and examples are as many as
`tests.sampling` says, however long one takes."""

from __future__ import annotations

import gc
import sys

import pytest
from hypothesis import settings

from tests.sampling import examples

gc.set_threshold(2_000_000, 10, 10)  # lowering makes tuples by the thousand, which are in no cycle: a fifth of the time

settings.register_profile("memplan", max_examples=examples(100), deadline=None)
settings.load_profile("memplan")


@pytest.fixture(autouse=True, scope="session")
def _no_profile_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:  # pyright: ignore[reportUnusedFunction]
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    patch.delenv("COLUMNS", raising=False)  # pytest-xdist tells its processes how wide the terminal is
    if sys.dont_write_bytecode:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
