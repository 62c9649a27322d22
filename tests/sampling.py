"""How much is tested: everything if the tracing libraries are installed.

Without them only every 128th golden trace, and a few of other lists and drawn examples, so that the tests stay short
without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TypeVar

import pytest

from memplan.probe.libraries import NAMES

COMPLETE = all(find_spec(name) is not None for name in NAMES)
ALL = pytest.mark.skipif(not COMPLETE, reason="takes long, and is done where torch is installed")
Row = TypeVar("Row")


def sampled(rows: Sequence[Row], every: int = 128) -> list[Row]:
    return list(rows if COMPLETE else rows[::every])


def examples(most: int) -> int:
    """Return how many examples hypothesis draws."""
    return most if COMPLETE else max(1, most // 12)
