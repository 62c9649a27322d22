"""Report of the ladder: a plain run, and what each change saves on top of the previous ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.ladder import Ladder
from memplan.planning.plan import SEVERITIES, Effect
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Heading, Pairs, Table, Text
from memplan.report.csv import CsvRows
from memplan.report.plans.changes import (
    change_dump,
    conditions,
    factors,
    figures,
    freed,
    lever_dump,
    qualities,
    signed,
    state,
)


class Rung(NamedTuple):
    """A row of the ladder: the plain run, without an effect, or the run after one more change."""

    answer: Estimate
    effect: Effect | None = None

    @property
    def title(self) -> str:
        return self.effect.lever.title if self.effect else "plain"


class LadderReport(NamedTuple):
    """The estimate of the run as given, and the ladder for its model, batch and GPU."""

    answer: Estimate
    demand: Demand
    ladder: Ladder

    mode = "ladder"

    @property
    def every(self) -> list[Rung]:
        """The plain run, then each rung."""
        return [Rung(self.ladder.plain), *(Rung(effect.after, effect) for effect in self.ladder.rungs)]

    @property
    def found(self) -> list[Estimate]:
        """Answers that meet the demand; all of them if there is no GPU."""
        return [answer for answer, _ in self.every if answer.gpu is None or self.demand.met(answer)]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(rung.title, rung.answer) for rung in self.every]

    @property
    def lowest(self) -> Estimate:
        return min((answer for answer, _ in self.every), key=lambda answer: answer.bytes.used)

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        plain, condition = self.ladder.plain, conditions(self.demand)
        batch = plain.run.batch
        yield Text(
            f"{words.model(plain)}, batch {batch.micro:,} of {batch.sequence:,} tokens{words.on_card(plain)}: from "
            f"{words.tenths(plain.bytes.used)} to {words.tenths(self.lowest.bytes.used)} GiB used",
            "bold",
        )
        if not self.found:
            yield Text(f"No rung fits{condition}. The lowest: {state(self.lowest)}.", "bold red")
        elif plain.gpu:
            first = next(rung for rung in self.every if rung.answer in self.found)
            title = first.title if first.effect else "the plain run"
            yield Text(f"The first to fit{condition} is {title}: {state(first.answer)}.")
        yield self._table()
        yield Text(
            "Each rung includes all those above it. GiB are used memory; × time is the effect of the rung alone, for "
            "the same number of tokens."
        )
        if explain:
            yield Heading("Results")
            effects = self.ladder.rungs
            yield Pairs([(e.lever.title, text) for e in effects for text in qualities((e.lever,), explain=True)])

    def _table(self) -> Table[Rung]:
        usable = self.ladder.plain.gpu.usable if self.ladder.plain.gpu else 0
        full = max(usable, *(answer.bytes.used for answer, _ in self.every))

        def of(cell: Callable[[Effect], str]) -> Callable[[Rung], str]:
            return lambda rung: cell(rung.effect) if rung.effect else ""

        def colour(rung: Rung) -> str:
            return words.colour(rung.answer) or "blue"

        columns: list[Column[Rung]] = [
            Column("rung", lambda rung: rung.title, wraps=True),
            Column("saves", of(lambda effect: signed(freed(effect))), right=True),
            Column("GiB", lambda rung: words.tenths(rung.answer.bytes.used), right=True),
            *([Column("answer", lambda rung: rung.answer.verdict.answer or "", style=colour)] if usable else []),
            Column("× time", of(lambda effect: factors(effect.time, "–")), right=True, optional=True),
            Column("", lambda rung: _bar(rung.answer, full), optional=True, style=colour),
            Column("most saved in", of(_most_saved_in), optional=True),
            Column("result", of(lambda effect: SEVERITIES[effect.lever.severity]), optional=True),
        ]
        return Table(columns, self.every)

    def dump(self) -> dict[str, Any]:
        asked = self.answer.asked
        return {
            "plain": {**change_dump(asked, self.ladder.plain.asked), **figures(self.ladder.plain)},
            "rungs": [
                {**lever_dump(rung), **change_dump(asked, rung.after.asked), **figures(rung.after)}
                for rung in self.ladder.rungs
            ],
        }

    def rows(self) -> CsvRows:
        """Return the plain run, then each rung."""
        return CsvRows([self._row(rung) for rung in self.every])

    @staticmethod
    def _row(rung: Rung) -> dict[str, object]:
        time = rung.effect.time if rung.effect else None
        return {
            "rung": rung.title,
            "saves": rung.effect.saves if rung.effect else 0,
            "allocated": rung.answer.bytes.allocated,
            "used": rung.answer.bytes.used,
            "headroom": "" if rung.answer.verdict.headroom is None else rung.answer.verdict.headroom,
            "verdict": rung.answer.verdict.answer or "",
            "time_low": time.low if time else "",
            "time_high": time.high if time else "",
            "severity": rung.effect.lever.severity if rung.effect else 0,
        }


def _most_saved_in(rung: Effect) -> str:
    """Return the phase whose peak falls most; a tie goes to the phase of the previous peak."""
    fallen = {(n, phase == rung.before.peak.phase): phase for phase, n in rung.phases.items() if n > 0}
    return fallen[max(fallen)] if fallen else ""


_BAR_WIDTH = 14


def _bar(answer: Estimate, full: int) -> str:
    """Return a bar of the used memory, with a mark where the card ends."""
    length = (answer.bytes.used * _BAR_WIDTH + full // 2) // full
    bar = "█" * length + " " * (_BAR_WIDTH + 1 - length)
    if answer.gpu is None:
        return bar.rstrip()
    end = (answer.gpu.usable * _BAR_WIDTH + full // 2) // full
    return f"{bar[:end]}│{bar[end + 1 :]}".rstrip()
