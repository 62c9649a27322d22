"""The values of a run's file as a table: field, value, what it changes, and where it is from."""

from __future__ import annotations

import json
from collections.abc import Sequence

from memplan.core.units import GIB
from memplan.estimate.effects import ValueEffect
from memplan.report.blocks import Column, Table
from memplan.report.display import display
from memplan.report.text import Screen


def render(effects: Sequence[ValueEffect], to: Screen) -> str:
    columns: list[Column[ValueEffect]] = [
        Column("field", lambda effect: effect.field),
        Column("value", _value, wraps=True),
        Column("GiB", lambda effect: f"{effect.bytes / GIB:+.2f}" if effect.bytes else "", right=True),
        Column("why", lambda effect: effect.why, wraps=True),
    ]
    return display([Table(columns, effects)], to)


def _value(effect: ValueEffect) -> str:
    value = effect.value
    return value if isinstance(value, str) else json.dumps(value)
