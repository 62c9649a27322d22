"""The search of a plan's mode, as the report that shows it: of the command, and of the service."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration
    from memplan.planning.cluster import FixedDegrees
    from memplan.planning.levers import Lever
    from memplan.planning.offers import CardFilter, Offers
    from memplan.planning.traffic import Cluster
    from memplan.report.plans import Planned
    from memplan.report.plans.levers import Levers
    from memplan.report.plans.offers import OffersReport

MODES: Mapping[str, tuple[str, ...]] = {  # of a run that does not train, by its task
    "generate": ("levers", "buy", "max"),
    "forward": ("max",),
}


class PlanRequest(NamedTuple):
    """A question of a plan.

    mode     levers, max, ladder, advice, buy or nodes
    axis     what is as large as it can be, of mode `max`
    levers   returns the changes to try, of mode `levers`; by default all
    cards    those to consider, of mode `buy`; by default all
    tokens   training tokens to price, of mode `buy`
    each     every number of a card, not only the smallest that fits, of mode `buy`
    to       own or rent, of mode `buy`
    most     offers or grids to list; None for all grids
    cluster  the GPUs that the run is divided over, of mode `nodes`
    pinned   what is fixed of that division
    """

    mode: str
    run: RunSpec
    demand: Demand
    calibration: Calibration | None = None
    axis: str = "sequence"
    levers: Callable[[RunSpec], tuple[Lever, ...]] | None = None
    cards: CardFilter | None = None
    tokens: int | None = None
    each: bool = False
    to: str = "rent"
    most: int | None = 20
    cluster: Cluster | None = None
    pinned: FixedDegrees | None = None


def planned(asked: PlanRequest) -> Planned:
    """Return the plan of a mode that the run's task has: see `MODES`."""
    run, demand, own = asked.run, asked.demand, asked.calibration
    if run.task == "generate" and asked.mode in ("levers", "buy"):
        from memplan.planning.inference import places, questions
        from memplan.planning.offers import ANY
        from memplan.report.plans.inference import Places, QuestionsReport

        if asked.mode == "levers":
            return QuestionsReport(questions(run, demand, own))
        found = places(run, asked.cards or ANY, asked.most or 20, demand)
        return Places(estimate(run.model_copy(update={"gpu": None})), demand, found, asked.to)
    match asked.mode:
        case "levers":
            return _levers(asked)
        case "nodes":
            from memplan.planning.cluster import ANY as ALL_DEGREES
            from memplan.planning.cluster import search
            from memplan.report.plans.cluster import ClusterReport

            assert asked.cluster is not None
            pinned = asked.pinned or ALL_DEGREES
            found = search(run, asked.cluster, pinned, most=asked.most, demand=demand, calibration=own)
            return ClusterReport(demand, found)
        case "max":
            from memplan.planning.reach import frontier, reach
            from memplan.report.plans.reach import ReachReport

            answer = estimate(run, own)
            limit = reach(run, asked.axis, demand, own)
            has_frontier = asked.axis in ("batch", "sequence") and limit.answer is not None and run.task == "train"
            return ReachReport(answer, demand, limit, frontier(run, demand, own) if has_frontier else None)
        case "ladder":
            from memplan.planning.ladder import ladder
            from memplan.report.plans.ladder import LadderReport

            return LadderReport(estimate(run, own), demand, ladder(run, own))
        case "advice":
            from memplan.planning.advice import advise
            from memplan.report.plans.advice import AdviceReport

            return AdviceReport(estimate(run, own), demand, advise(run, demand, own))
        case _:
            return _bought(asked)


def _levers(asked: PlanRequest) -> Levers:
    from memplan.catalogue.methods.methods import ADAPTERS
    from memplan.models.peft_methods import has_rank
    from memplan.planning.levers import levers_of
    from memplan.planning.plan import plan
    from memplan.planning.reach import reach
    from memplan.report.plans.levers import Levers

    run, demand, own = asked.run, asked.demand, asked.calibration
    levers = asked.levers or levers_of
    found = plan(run, headroom=demand.headroom, tight=demand.tight, calibration=own, levers=levers)
    axes = ("batch", "sequence", *(("rank",) if run.method.kind in ADAPTERS and has_rank(run.method.kind) else ()))
    return Levers(found, tuple(reach(found.answer.asked, axis, demand, own) for axis in axes))


def _bought(asked: PlanRequest) -> OffersReport:
    from memplan.planning.offers import ANY, offers
    from memplan.report.plans.offers import OffersReport

    run, demand = asked.run, asked.demand
    answer, most = estimate(run, asked.calibration), asked.most or 20
    found = offers(run, asked.cards or ANY, tokens=asked.tokens, most=most, each=asked.each, demand=demand)
    return OffersReport(answer, demand, found, asked.tokens, _nearest(run, found), asked.to)


def _nearest(run: RunSpec, found: Offers) -> Estimate | None:
    """Return the estimate on the nearest miss, if there is no offer."""
    from memplan.planning.levers import spread, with_fields

    miss = found.nearest
    if miss is None:
        return None
    single = with_fields(run.model_copy(update={"gpu": miss.gpu.name}), spread(run, 1, "none"))
    return estimate(with_fields(single, spread(single, miss.count, miss.strategy)) if miss.count > 1 else single)
