"""The current work of a long answer, which a command shows while it waits."""

from __future__ import annotations

_NOW = ["", 0]


def note(text: str) -> None:
    """Say what is being estimated, and count it."""
    _NOW[:] = [text, int(_NOW[1]) + 1]


def now() -> tuple[str, int]:
    """Return what is being estimated, and how many runs were noted so far."""
    return str(_NOW[0]), int(_NOW[1])
