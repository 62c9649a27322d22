"""JSON as the contract has it: one answer, or a list of answers where several GPUs are asked."""

from __future__ import annotations

import json
from collections.abc import Sequence

from memplan.estimate.answer import Estimate


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False) -> str:
    """`explain` and `ranks` change nothing: the ledger and the ranks are always there."""
    dumped = [answer.model_dump() for answer in answers]
    return json.dumps(dumped if len(dumped) > 1 else dumped[0], indent=2, ensure_ascii=False) + "\n"
