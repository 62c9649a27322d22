"""The values of a run's file: field, value, what it changes, and where it is from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from memplan.core.units import GIB
from memplan.estimate.effects import ValueEffect
from memplan.report.blocks import Column, Table
from memplan.report.csv import written
from memplan.report.display import display
from memplan.report.text import Screen


def render(format: str, effects: Sequence[ValueEffect], to: Screen) -> str:
    """Return the values as table, json or csv; a table fits the screen `to`."""
    match format:
        case "json":
            return json.dumps([effect._asdict() for effect in effects], indent=2, ensure_ascii=False) + "\n"
        case "csv":
            return written([{**effect._asdict(), "value": _value(effect)} for effect in effects])
        case _:
            return display([_table(effects)], to)


def _table(effects: Sequence[ValueEffect]) -> Table[ValueEffect]:
    columns: list[Column[ValueEffect]] = [
        Column("field", lambda effect: effect.field),
        Column("value", _value, wraps=True),
        Column("GiB", lambda effect: f"{effect.bytes / GIB:+.2f}" if effect.bytes else "", right=True),
        Column("why", lambda effect: effect.why, wraps=True),
    ]
    return Table(columns, effects)


def _value(effect: ValueEffect) -> str:
    value = effect.value
    if isinstance(value, dict) and (config := cast("dict[str, Any]", value).get("config")):
        value = str(config.get("_name_or_path", value))
    return value if isinstance(value, str) else json.dumps(value)
