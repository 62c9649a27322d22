"""A server that the tests of this folder share, started as a user starts it."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from benchmarks.serve import Served, server


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    options = ("--workers", "2", "--gpu", "l4", "--fill", "nvidia.com/gpumem", "--seconds", "60", "--body", "1MiB")
    with server(*options, command="webhook") as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://127.0.0.1:{served.port}", timeout=120) as opened:
        yield opened
