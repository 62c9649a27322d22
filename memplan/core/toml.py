"""TOML without tomllib, where JSON writes the values alike: importing it takes longer than reading a model card."""

from __future__ import annotations

import json
import re
from typing import Any

_decode = json.JSONDecoder().raw_decode
_DATE = r"\d{4}-\d\d-\d\d"
_PART = r"[A-Za-z0-9_-]+"


def parsed(text: str) -> dict[str, Any]:
    """Return the tables of a text. If a line is not a plain header, comment, date or JSON value, tomllib reads them."""
    tables: dict[str, Any] = {}
    table = tables
    for line in text.split("\n"):
        if line.startswith("[") and re.fullmatch(rf"\[{_PART}(\.{_PART})*\]", line):
            table = tables
            for part in line[1:-1].split("."):
                table = table.setdefault(part, {})
            continue
        key, _, value = line.partition(" = ")
        if line and not line.startswith("#"):
            try:
                table[key], end = _date(value) or _decode(value)
            except ValueError:
                end = -1
            if end != len(value) or not re.fullmatch(_PART, key):
                import tomllib

                return tomllib.loads(text)
    return tables


def _date(value: str) -> Any:
    if not re.fullmatch(_DATE, value):
        return None
    from datetime import date

    return date.fromisoformat(value), len(value)
