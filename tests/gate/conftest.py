"""The folder of a team with a budget and one run, as the working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gate.team import AXOLOTL, BUDGET, write


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path, {"memplan.toml": BUDGET, "configs/a.yaml": AXOLOTL})
