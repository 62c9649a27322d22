"""Settings for every test.

No machine profile or terminal width changes an answer, garbage is rarely collected, only the first of the processes
that tests start compiles its imports, and hypothesis draws `tests.sampling`'s number of examples without a deadline.
"""

from __future__ import annotations

import gc
import sys

import pytest
from hypothesis import settings

from tests.sampling import examples

gc.set_threshold(2_000_000, 10, 10)  # lowering creates many acyclic tuples: saves a fifth of the time

settings.register_profile("memplan", max_examples=examples(100), deadline=None)
settings.load_profile("memplan")


@pytest.fixture(autouse=True, scope="session")
def _no_profile_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:  # pyright: ignore[reportUnusedFunction]
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    patch.delenv("COLUMNS", raising=False)  # pytest-xdist sets the terminal's width in its processes
    if sys.dont_write_bytecode:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        patch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path_factory.mktemp("compiled")))
