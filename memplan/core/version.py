"""The version of memplan, which answers and files carry."""

from __future__ import annotations

__version__ = "0.1.0"
