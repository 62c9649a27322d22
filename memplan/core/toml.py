"""TOML without tomllib, where JSON writes the values alike: tomllib takes longer than many commands take to answer."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from memplan.core.frozen import frozen

_decode = json.JSONDecoder().raw_decode
_DATE = re.compile(r"\d{4}-\d\d-\d\d")
_NAME = r'[A-Za-z0-9_-]+|"[^"\\]*"'
_KEY = re.compile(_NAME)
_HEADER = re.compile(rf"\[(?:{_NAME})(?:\.(?:{_NAME}))*\]")


def read_tables(path: Path) -> dict[str, Any]:
    """Return the tables of a file, nested as their headers say, with tuples for lists."""
    return frozen(parsed(path.read_text("utf-8")))


def parsed(text: str) -> dict[str, Any]:
    """Return the tables of a text.

    Plain lines are headers, comments, `key = value` with a date or a value in JSON, and lists over several lines whose
    values are JSON. If a line is not plain, tomllib reads the text.
    """
    tables: dict[str, Any] = {}
    table, name = tables, ""
    items: list[str] | None = None  # the lines of a list
    try:
        for line in text.split("\n"):
            if not line or line.startswith("#"):
                continue
            if items is not None:
                if line != "]":
                    items.append(line)
                    continue
                table[name] = _value("[" + "\n".join(items).removesuffix(",") + "]")
                items = None
            elif _HEADER.fullmatch(line):
                table = tables
                for part in _KEY.findall(line):
                    table = table.setdefault(part.strip('"'), {})
            else:
                key, _, value = line.partition(" = ")
                if not _KEY.fullmatch(key):
                    raise ValueError(key)
                name = key.strip('"')
                if value == "[":
                    items = []
                else:
                    table[name] = _value(value)
        if items is not None:
            raise ValueError(items)
    except ValueError:
        import tomllib

        return tomllib.loads(text)
    return tables


def _value(text: str) -> Any:
    """Return the value of a text. Raises ValueError if it is not plain."""
    if _DATE.fullmatch(text):
        from datetime import date

        return date.fromisoformat(text)
    value, length = _decode(text)
    if length < len(text):
        raise ValueError(text)
    return value
