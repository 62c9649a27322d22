"""How much of the golden traces is compared: all of it where the libraries that made them are installed.

Without them every eighth trace is, so that the tests stay short where torch is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TypeVar

import pytest

COMPLETE = find_spec("torch") is not None
ALL = pytest.mark.skipif(not COMPLETE, reason="is about every golden trace")
Row = TypeVar("Row")


def sampled(rows: Sequence[Row]) -> list[Row]:
    return list(rows if COMPLETE else rows[::8])
