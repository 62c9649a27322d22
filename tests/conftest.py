"""What holds for every test: no profile of the machine's own changes an answer."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _no_profile_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> None:  # pyright: ignore[reportUnusedFunction]
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
