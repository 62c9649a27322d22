"""A check, or the changes between two, as JSON."""

from __future__ import annotations

import json

from memplan.gate.difference import Changes
from memplan.gate.rows import Check


def render(found: Check | Changes) -> str:
    return json.dumps(found.model_dump(), indent=1, ensure_ascii=False) + "\n"
