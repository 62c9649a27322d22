"""JSON reports, following the published schema: one answer, or a list of answers for several GPUs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from memplan.estimate.answer import Estimate


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False) -> str:
    """Return the answers as JSON, which always has the ledger and the ranks, whatever `explain` and `ranks` are."""
    if any(answer.asked.batch.lengths for answer in answers):
        from memplan.planning.lengths import dumped

        parts = [*map(dumped, answers)]
    else:
        parts = [answer.model_dump() for answer in answers]
    return json.dumps(parts if len(parts) > 1 else parts[0], indent=2, ensure_ascii=False) + "\n"
