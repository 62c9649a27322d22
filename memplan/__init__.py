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
    from memplan.gate.check import check as check
    from memplan.gate.rows import Check as Check
    from memplan.models.cards import card_names as card_names
    from memplan.models.cards import find_model as find_model
    from memplan.models.cards import load_card as load_card
    from memplan.models.model import ModelSpec as ModelSpec
    from memplan.planning.comparison import Comparison as Comparison
    from memplan.planning.comparison import compare as compare
    from memplan.planning.inference import Questions as Questions
    from memplan.planning.inference import questions as questions
    from memplan.planning.plan import Plan as Plan
    from memplan.planning.plan import plan as plan
    from memplan.planning.sweep import Grid as Grid
    from memplan.planning.sweep import grid as grid
    from memplan.probe.route import estimate as estimate
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
    "MemplanError": "core.errors",
    "Check": "gate.rows",
    "check": "gate.check",
    "estimate": "probe.route",
    "GPU": "catalogue.hardware.gpu",
    "find_gpu": "catalogue.hardware.gpus",
    "all_gpus": "catalogue.hardware.gpus",
    "ModelSpec": "models.model",
    "Questions": "planning.inference",
    "questions": "planning.inference",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "RunSpec": "spec.run",
    "Grid": "planning.sweep",
    "grid": "planning.sweep",
}


# Importing the sub-package `memplan.estimate` would make it an attribute that hides the function of that name, so it is
# imported now and the attribute removed.
import_module("memplan.estimate")
del globals()["estimate"]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    value = getattr(import_module(f"memplan.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*_NAMES, "__version__"))
