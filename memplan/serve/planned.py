"""The plan for a question: the mode's search, as the report that writes it."""

from __future__ import annotations

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.methods.methods import ADAPTERS
from memplan.core.errors import SpecError
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.models.peft_methods import has_rank
from memplan.planning.advice import advise
from memplan.planning.inference import places, questions
from memplan.planning.ladder import ladder
from memplan.planning.offers import ANY, offers
from memplan.planning.plan import plan
from memplan.planning.reach import frontier, reach
from memplan.report.plans import Planned
from memplan.report.plans.advice import AdviceReport
from memplan.report.plans.inference import Places, QuestionsReport
from memplan.report.plans.ladder import LadderReport
from memplan.report.plans.levers import Levers
from memplan.report.plans.offers import OffersReport
from memplan.report.plans.reach import ReachReport
from memplan.serve.questions import PlanQuestion
from memplan.spec.run import RunSpec


def planned(asked: PlanQuestion, demand: Demand) -> Planned:
    """Return the plan. Raises MemplanError for a mode that the run cannot have."""
    run, generates = asked.run, asked.run.task == "generate"
    if asked.mode == "buy":
        return _bought(asked, demand, generates)
    if run.gpu is None:
        raise SpecError(f"run.gpu: mode {asked.mode} needs a card", "run.gpu")
    demand.check(find_gpu(run.gpu))
    if asked.mode in ("ladder", "advise") and run.task != "train":
        raise SpecError(f"mode: {asked.mode} only applies to training, not to task {run.task}", "mode")
    match asked.mode:
        case "max":
            limit = reach(run, asked.axis, demand)
            has_frontier = asked.axis in ("batch", "sequence") and limit.answer is not None and run.task == "train"
            return ReachReport(estimate(run), demand, limit, frontier(run, demand) if has_frontier else None)
        case "ladder":
            return LadderReport(estimate(run), demand, ladder(run))
        case "advise":
            return AdviceReport(estimate(run), demand, advise(run, demand))
        case _:
            return QuestionsReport(questions(run, demand)) if generates else _fitted(run, demand)


def _fitted(run: RunSpec, demand: Demand) -> Levers:
    if run.task != "train":
        raise SpecError(f"mode: for task {run.task}, plan only has max", "mode")
    found = plan(run, headroom=demand.headroom, tight=demand.tight)
    has_adapters = run.method.kind in ADAPTERS and has_rank(run.method.kind)
    return Levers(found, tuple(reach(run, axis, demand) for axis in ("batch", "sequence", *["rank"] * has_adapters)))


def _bought(asked: PlanQuestion, demand: Demand, generates: bool) -> Planned:
    run = asked.run
    if generates:
        found = places(run, ANY, asked.most, demand)
        return Places(estimate(run.model_copy(update={"gpu": None})), demand, found)
    if run.task != "train":
        raise SpecError(f"mode: for task {run.task}, plan only has max", "mode")
    offered = offers(run, tokens=asked.tokens, most=asked.most, demand=demand)
    return OffersReport(estimate(run), demand, offered, asked.tokens)
