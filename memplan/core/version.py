"""The version of memplan, recorded in answers and files."""

from __future__ import annotations

__version__ = "0.1.0"
