"""memplan: how much GPU memory a language model takes to train or run, when, and whether it fits.

import memplan
answer = memplan.estimate(memplan.RunSpec(model="qwen2-7b", method="qlora", gpu="3090"))
answer.verdict.answer, answer.bytes.used
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.answer import Estimate as Estimate
    from memplan.answer import Verdict as Verdict
    from memplan.cards import card_names as card_names
    from memplan.cards import find_model as find_model
    from memplan.cards import load_card as load_card
    from memplan.comparison import Comparison as Comparison
    from memplan.comparison import compare as compare
    from memplan.errors import MemplanError as MemplanError
    from memplan.gpus import GPU as GPU
    from memplan.gpus import all_gpus as all_gpus
    from memplan.gpus import find_gpu as find_gpu
    from memplan.models import ModelSpec as ModelSpec
    from memplan.planning.inference import Questions as Questions
    from memplan.planning.inference import questions as questions
    from memplan.planning.plan import Plan as Plan
    from memplan.planning.plan import plan as plan
    from memplan.spec import RunSpec as RunSpec
    from memplan.sweep import Grid as Grid
    from memplan.sweep import grid as grid
    from memplan.via import estimate as estimate

__version__ = "0.1.0"

# Each public name and the module it is in: a module is imported when a name of it is first used.
_NAMES = {
    "Estimate": "answer",
    "Verdict": "answer",
    "card_names": "cards",
    "find_model": "cards",
    "load_card": "cards",
    "Comparison": "comparison",
    "compare": "comparison",
    "MemplanError": "errors",
    "estimate": "via",
    "GPU": "gpus",
    "find_gpu": "gpus",
    "all_gpus": "gpus",
    "ModelSpec": "models",
    "Questions": "planning.inference",
    "questions": "planning.inference",
    "Plan": "planning.plan",
    "plan": "planning.plan",
    "RunSpec": "spec",
    "Grid": "sweep",
    "grid": "sweep",
}


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'memplan' has no attribute {name!r}")
    value = getattr(import_module(f"memplan.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted((*_NAMES, "__version__"))
