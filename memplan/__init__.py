"""memplan: how much GPU memory a language model takes to train or run, when, and whether it fits.

import memplan
answer = memplan.estimate(memplan.RunSpec(model="qwen2-7b", method="qlora", gpu="3090"))
answer.verdict.answer, answer.bytes.used
"""

from __future__ import annotations

from importlib import import_module

from memplan.core.version import __version__ as __version__

TYPE_CHECKING = False  # typing.TYPE_CHECKING: an interrupt while typing is imported here would end in a traceback
if TYPE_CHECKING:
    from typing import Any

    from memplan.catalogue.hardware.gpu import GPU as GPU
    from memplan.catalogue.hardware.gpus import all_gpus as all_gpus
    from memplan.catalogue.hardware.gpus import find_gpu as find_gpu
    from memplan.core.errors import MemplanError as MemplanError
    from memplan.estimate.answer import Estimate as Estimate
    from memplan.estimate.answer import Verdict as Verdict
    from memplan.explain.explanation import explain as explain
    from memplan.explain.findings import Explanation as Explanation
    from memplan.explain.guard import guard as guard
    from memplan.gate.check import check as check
    from memplan.gate.rows import Check as Check
    from memplan.models.cards import card_names as card_names
    from memplan.models.cards import find_model as find_model
    from memplan.models.cards import load_card as load_card
    from memplan.models.model import ModelSpec as ModelSpec
    from memplan.planning.comparison import Comparison as Comparison
    from memplan.planning.comparison import compare as compare
    from memplan.planning.fitting import Fit as Fit
    from memplan.planning.fitting import fits as fits
    from memplan.planning.inference import Questions as Questions
    from memplan.planning.inference import questions as questions
    from memplan.planning.many import estimate_many as estimate_many
    from memplan.planning.many import warm as warm
    from memplan.planning.placement import Placement as Placement
    from memplan.planning.placement import place as place
    from memplan.planning.plan import Plan as Plan
    from memplan.planning.plan import plan as plan
    from memplan.planning.sweep import Grid as Grid
    from memplan.planning.sweep import grid as grid
    from memplan.probe.route import estimate as estimate
    from memplan.spec.pool import Job as Job
    from memplan.spec.pool import NodeShape as NodeShape
    from memplan.spec.run import RunSpec as RunSpec

# Public name -> its module, which is imported when the name is first used.
_NAMES = {
    "Estimate": "estimate.answer",
    "Verdict": "estimate.answer",
    "card_names": "models.cards",
    "find_model": "models.cards",
    "load_card": "models.cards",
    "Comparison": "planning.comparison",
    "compare": "planning.comparison",
    "Fit": "planning.fitting",
    "fits": "planning.fitting",
    "MemplanError": "core.errors",
    "Check": "gate.rows",
    "check": "gate.check",
    "estimate": "probe.route",
    "Explanation": "explain.findings",
    "explain": "explain.explanation",
    "guard": "explain.guard",
    "GPU": "catalogue.hardware.gpu",
    "find_gpu": "catalogue.hardware.gpus",
    "all_gpus": "catalogue.hardware.gpus",
    "ModelSpec": "models.model",
    "estimate_many": "planning.many",
    "warm": "planning.many",
    "Job": "spec.pool",
    "NodeShape": "spec.pool",
    "Placement": "planning.placement",
    "place": "planning.placement",
    "Questions": "planning.inference",
    "questions": "planning.inference",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "RunSpec": "spec.run",
    "Grid": "planning.sweep",
    "grid": "planning.sweep",
}


# Importing the sub-packages `memplan.estimate` and `memplan.explain` would make them attributes that hide the functions
# of these names, so they are imported now and the attributes removed.
for _room in ("estimate", "explain"):
    import_module(f"memplan.{_room}")
    del globals()[_room]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    value = getattr(import_module(f"memplan.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*_NAMES, "__version__"))
