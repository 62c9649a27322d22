"""What makes a run fit, and what each change saves and costs; of a run that fits, what every change would free."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.planning.plan import SEVERITIES, Effect, Plan
from memplan.planning.reach import Reach
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Table, Text
from memplan.report.plans.reach import how_far, reach_dump
from memplan.report.plans.wording import factors, freed, lever_dump, proposal_dump, proposed, qualities, signed, wish
from memplan.report.table import COLOURS
from memplan.report.text import Column


class Levers(NamedTuple):
    """A plan, and how far the run goes as it is."""

    plan: Plan
    reach: tuple[Reach, ...]

    @property
    def found(self) -> list[Estimate]:
        """What meets the demand: the run as asked, or what is proposed."""
        return [self.plan.answer] if self.plan.fits else [p.answer for p in self.plan.proposals]


def blocks(levers: Levers, explain: bool = False) -> Iterator[Block]:
    plan = levers.plan
    yield Text(words.verdict(plan.answer), f"bold {COLOURS[plan.answer.verdict.answer or '']}")
    asked = wish(plan.demand)
    if plan.fits:
        yield Text(f"Nothing has to change{f' ({asked})' if asked else ''}. What each change alone would free:")
        yield _singles(plan, explain)
    elif plan.proposals:
        yield from _ways(plan, asked, explain)
    else:
        yield from _none(plan, asked, explain)
    yield Heading("How far it goes, all else as asked")
    yield how_far(levers.reach)


def _ways(plan: Plan, asked: str, explain: bool) -> Iterator[Block]:
    many = len(plan.proposals)
    ways = f"{many} ways to make it fit" if many > 1 else "One way to make it fit"
    first = ", those that change the result least first, more GPUs last" if many > 1 else ""
    yield Text(f"{ways}{f' ({asked})' if asked else ''}{first}.")
    for n, proposal in enumerate(plan.proposals):
        number = f"{n + 1}. " if many > 1 else ""
        yield from proposed(proposal, plan.answer.asked, number, explain=explain, full=explain or n == 0)


def _none(plan: Plan, asked: str, explain: bool) -> Iterator[Block]:
    nearest = plan.nearest
    yield Text(f"Nothing that was tried makes it fit{f' ({asked})' if asked else ''}: {plan.tried:,} runs.")
    if nearest is None or not nearest.levers:
        return
    missing = lacks(plan)
    miss = f"lacks {gib(missing)}" if missing else "is only tight (--tight would take it)"
    yield Text(f"The nearest is all that lowers the peak, which {miss}:")
    yield from proposed(nearest, plan.answer.asked, "", explain=explain, full=explain)


def lacks(plan: Plan) -> int:
    """The bytes by which the nearest misses; of a run that is tight, none may be missing."""
    answer = plan.nearest.answer if plan.nearest else plan.answer
    return max(0, plan.demand.headroom - (answer.verdict.headroom or 0))


def singles(plan: Plan) -> list[Effect]:
    """Every change alone, the largest saving first, those that save nothing left out."""
    return sorted((e for e in plan.levers if freed(e) > 0), key=lambda effect: (-freed(effect), effect.lever.severity))


def _singles(plan: Plan, explain: bool) -> Table:
    columns = [
        Column("change", wraps=True),
        Column("GiB freed", right=True),
        Column("then", right=True),
        Column("× time", right=True),
        Column("result", wraps=True, optional=True),
    ]
    rows = [
        (
            effect.lever.title,
            signed(freed(effect)),
            words.tenths(effect.after.bytes.used),
            factors(effect.time, "–"),
            "; ".join(qualities((effect.lever,), explain=True)) if explain else SEVERITIES[effect.lever.severity],
        )
        for effect in singles(plan)
    ]
    return Table(columns, rows)


def dump(levers: Levers) -> dict[str, Any]:
    plan = levers.plan
    asked = plan.answer.asked
    return {
        "fits": plan.fits,
        "proposals": [proposal_dump(proposal, asked) for proposal in plan.proposals],
        "nearest": proposal_dump(plan.nearest, asked) if plan.nearest else None,
        "tried": plan.tried,
        "levers": [lever_dump(effect) for effect in singles(plan)] if plan.fits else [],
        "reach": [reach_dump(reach) for reach in levers.reach],
    }
