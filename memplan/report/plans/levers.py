"""Report of the changes that make a run fit, or of what each would free in a run that fits, and their costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.frameworks import lines
from memplan.planning.plan import SEVERITIES, Effect, Plan
from memplan.planning.reach import Reach
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Heading, Table, Text, Verbatim
from memplan.report.plans.changes import (
    conditions,
    factors,
    figures,
    freed,
    lever_dump,
    proposal_dump,
    proposed,
    qualities,
    signed,
    state,
    titles,
)
from memplan.report.plans.reach import limits_table, reach_dump

if TYPE_CHECKING:
    from memplan.planning.file_levers import FilePatch


class Levers(NamedTuple):
    """A plan, the limits of the unchanged run, and the patch of the run's file if it is of one that does not fit."""

    plan: Plan
    reach: tuple[Reach, ...]
    patch: FilePatch | None = None

    mode = "levers"

    @property
    def answer(self) -> Estimate:
        return self.plan.answer

    @property
    def demand(self) -> Demand:
        return self.plan.demand

    @property
    def found(self) -> list[Estimate]:
        """Answers that meet the demand: the unchanged run, or the proposals."""
        return [self.plan.answer] if self.plan.fits else [p.answer for p in self.plan.proposals]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(titles(proposal.levers), proposal.answer) for proposal in self.plan.proposals]

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        plan, condition = self.plan, conditions(self.demand)
        yield Text(words.verdict(plan.answer), f"bold {words.colour(plan.answer)}")
        if plan.asked != plan.answer.asked:
            own, *_ = lines(plan.asked, plan.answer.asked)
            yield Text(f"It starts only with {' '.join(own.lines)}, which is counted.")
        if plan.fits:
            yield Text(f"Nothing has to change{condition}. Each change alone would free:")
            yield _singles(plan, explain)
        elif plan.proposals:
            yield from _proposals(plan, condition, explain, self.patch is not None)
        else:
            yield from _nearest(plan, condition, explain)
        if self.patch is not None:
            yield from patch_blocks(self.patch)
        yield Heading("Limits, with everything else unchanged")
        yield limits_table(self.reach)

    def dump(self) -> dict[str, Any]:
        plan, asked = self.plan, self.plan.asked
        return {
            "fits": plan.fits,
            "proposals": [proposal_dump(proposal, asked) for proposal in plan.proposals],
            "nearest": proposal_dump(plan.nearest, asked) if plan.nearest else None,
            "tried": plan.tried,
            "levers": [lever_dump(effect) for effect in singles(plan)] if plan.fits else [],
            "reach": [reach_dump(reach) for reach in self.reach],
            **({"patch": patch_dump(self.patch)} if self.patch is not None else {}),
        }


def _proposals(plan: Plan, condition: str, explain: bool, has_patch: bool) -> Iterator[Block]:
    n_proposals = len(plan.proposals)
    ways = f"{n_proposals} ways to make it fit" if n_proposals > 1 else "One way to make it fit"
    order = ", those that change the result least first, then the quickest; more GPUs last" if n_proposals > 1 else ""
    yield Text(f"{ways}{condition}{order}.")
    for n, proposal in enumerate(plan.proposals):
        number = f"{n + 1}. " if n_proposals > 1 else ""
        full = explain or n == 0
        yield from proposed(proposal, plan.asked, number, explain=explain, full=full, to_paste=not has_patch)


def _nearest(plan: Plan, condition: str, explain: bool) -> Iterator[Block]:
    nearest = plan.nearest
    yield Text(f"None of the {plan.tried:,} runs tried fits{condition}.")
    if nearest is None or not nearest.levers:
        return
    missing = missing_bytes(plan)
    miss = f"needs {gib(missing)} more" if missing else "is only tight (--tight accepts it)"
    yield Text(f"Even with every change that lowers the peak it {miss}:")
    yield from proposed(nearest, plan.asked, "", explain=explain, full=explain)


def patch_blocks(patch: FilePatch) -> Iterator[Block]:
    if patch.answer is None:
        yield Heading(f"{patch.name} can say none of these changes")
    else:
        yield Heading(f"Patch of {patch.name}, {titles(patch.levers)}: {state(patch.answer)}")
        yield Verbatim(patch.diff.splitlines(), "diff")
    if patch.typed:
        yield Text(f"{patch.name} cannot say all options that were typed: type them again with the patched file.")
    for levers, reason in patch.left:
        yield Text(f"Not in {patch.name}: {titles(levers)} ({reason}).")


def patch_dump(patch: FilePatch) -> dict[str, Any]:
    return {
        "file": patch.name,
        "diff": patch.diff,
        "levers": [lever.title for lever in patch.levers],
        "at": figures(patch.answer) if patch.answer is not None else None,
        "left_out": [{"levers": [lever.title for lever in levers], "reason": reason} for levers, reason in patch.left],
    }


def missing_bytes(plan: Plan) -> int:
    """Return the bytes by which the nearest proposal misses; 0 is possible if it is tight."""
    answer = plan.nearest.answer if plan.nearest else plan.answer
    return max(0, plan.demand.headroom - (answer.verdict.headroom or 0))


def singles(plan: Plan) -> list[Effect]:
    """Return the effect of every change that saves anything alone, largest saving first."""
    return sorted((e for e in plan.levers if freed(e) > 0), key=lambda effect: (-freed(effect), effect.lever.severity))


def _singles(plan: Plan, explain: bool) -> Table[Effect]:
    def result(effect: Effect) -> str:
        return "; ".join(qualities((effect.lever,), explain=True)) if explain else SEVERITIES[effect.lever.severity]

    columns: list[Column[Effect]] = [
        Column("change", lambda effect: effect.lever.title, wraps=True),
        Column("GiB freed", lambda effect: signed(freed(effect)), right=True),
        Column("then", lambda effect: words.tenths(effect.after.bytes.used), right=True),
        Column("× time", lambda effect: factors(effect.time, "–"), right=True),
        Column("result", result, wraps=True, optional=True),
    ]
    return Table(columns, singles(plan))
