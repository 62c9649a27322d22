"""How much is compared: all golden traces, and the suite of a card, where the libraries that trace are installed.

Without them every sixteenth trace is, so that the tests stay short where torch is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TypeVar

import pytest

COMPLETE = find_spec("torch") is not None
ALL = pytest.mark.skipif(not COMPLETE, reason="takes long, and is done where torch is installed")
Row = TypeVar("Row")


def sampled(rows: Sequence[Row]) -> list[Row]:
    return list(rows if COMPLETE else rows[::16])
