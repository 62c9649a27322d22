"""Report of the ladder: a plain run, and what each change saves on top of the previous ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.planning.ladder import Ladder
from memplan.planning.plan import SEVERITIES, Effect
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Pairs, Table, Text
from memplan.report.plans.wording import (
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
from memplan.report.table import COLOURS
from memplan.report.text import Column


class LadderReport(NamedTuple):
    """The estimate of the run as given, and the ladder for its model, batch and GPU."""

    answer: Estimate
    demand: Demand
    ladder: Ladder

    @property
    def every(self) -> list[Estimate]:
        """The plain run's answer, then each rung's."""
        return [self.ladder.plain, *(rung.after for rung in self.ladder.rungs)]

    @property
    def found(self) -> list[Estimate]:
        """Answers that meet the demand; all of them if there is no GPU."""
        return [answer for answer in self.every if answer.gpu is None or self.demand.met(answer)]

    @property
    def lowest(self) -> Estimate:
        return min(self.every, key=lambda answer: answer.bytes.used)


def blocks(rungs: LadderReport, explain: bool = False) -> Iterator[Block]:
    plain = rungs.ladder.plain
    gpu, batch = words.card(plain), plain.run.batch
    on = f" on {gpu.title}, {words.tenths(gpu.usable)} GiB usable" if gpu else ""
    yield Text(
        f"{words.model(plain)}, batch {batch.micro:,} of {batch.sequence:,} tokens{on}: from "
        f"{words.tenths(plain.bytes.used)} to {words.tenths(rungs.lowest.bytes.used)} GiB used",
        "bold",
    )
    condition = conditions(rungs.demand)
    suffix = f" ({condition})" if condition else ""
    if not rungs.found:
        yield Text(f"No rung fits{suffix}. The lowest: {state(rungs.lowest)}.", "bold red")
    elif gpu:
        first = next(n for n, answer in enumerate(rungs.every) if answer in rungs.found)
        title = rungs.ladder.rungs[first - 1].lever.title if first else "the plain run"
        yield Text(f"The first to fit{suffix} is {title}: {state(rungs.every[first])}.")
    yield _table(rungs)
    yield Text(
        "Each rung includes all those above it. GiB are used memory; × time is the effect of the rung alone, for the "
        "same number of tokens."
    )
    if explain:
        yield Heading("Results")
        effects = rungs.ladder.rungs
        yield Pairs([(e.lever.title, text) for e in effects for text in qualities((e.lever,), explain=True)])


_BAR_WIDTH = 14


def _table(rungs: LadderReport) -> Table:
    plain = rungs.ladder.plain
    columns = [
        Column("rung", wraps=True),
        Column("saves", right=True),
        Column("GiB", right=True),
        *([Column("answer")] if plain.gpu else []),
        Column("× time", right=True, optional=True),
        Column("", optional=True),
        Column("most saved in", optional=True),
        Column("result", optional=True),
    ]
    rows = [("plain", "", plain, "", "", "")]
    for rung in rungs.ladder.rungs:
        time = factors(rung.time, "–")
        result = SEVERITIES[rung.lever.severity]
        rows.append((rung.lever.title, signed(freed(rung)), rung.after, time, _most_saved_in(rung), result))
    full = max(answer.bytes.used for answer in rungs.every)
    full = max(full, plain.gpu.usable if plain.gpu else 0)
    cells: list[tuple[str, ...]] = []
    styles: list[str] = []
    for title, saves, answer, time, phase, result in rows:
        verdict = answer.verdict.answer or ""
        middle = (verdict,) if plain.gpu else ()
        cells.append((title, saves, words.tenths(answer.bytes.used), *middle, time, _bar(answer, full), phase, result))
        colour = COLOURS.get(verdict, "blue")
        styles.append("|".join(("", "", "", *((colour,) if plain.gpu else ()), "", colour, "", "")))
    return Table(columns, cells, styles)


def _most_saved_in(rung: Effect) -> str:
    """Return the phase whose peak falls most; a tie goes to the phase of the previous peak."""
    fallen = {(n, phase == rung.before.peak.phase): phase for phase, n in rung.phases.items() if n > 0}
    return fallen[max(fallen)] if fallen else ""


def _bar(answer: Estimate, full: int) -> str:
    """Return a bar of the used memory, with a mark where the card ends."""
    length = (answer.bytes.used * _BAR_WIDTH + full // 2) // full
    bar = "█" * length + " " * (_BAR_WIDTH + 1 - length)
    if answer.gpu is None:
        return bar.rstrip()
    end = (answer.gpu.usable * _BAR_WIDTH + full // 2) // full
    return f"{bar[:end]}│{bar[end + 1 :]}".rstrip()


def dump(rungs: LadderReport) -> dict[str, Any]:
    asked = rungs.answer.asked
    return {
        "plain": {**change_dump(asked, rungs.ladder.plain.asked), **figures(rungs.ladder.plain)},
        "rungs": [
            {**lever_dump(rung), **change_dump(asked, rung.after.asked), **figures(rung.after)}
            for rung in rungs.ladder.rungs
        ],
    }


def rows(rungs: LadderReport) -> list[dict[str, object]]:
    """Return CSV rows: the plain run, then each rung."""
    plain = rungs.ladder.plain
    out = [_row("plain", plain, 0, ("", ""), 0)]
    for rung in rungs.ladder.rungs:
        time = rung.time[:2] if rung.time else ("", "")
        out.append(_row(rung.lever.title, rung.after, rung.saves, time, rung.lever.severity))
    return out


def _row(title: str, answer: Estimate, saves: int, time: tuple[object, object], severity: int) -> dict[str, object]:
    return {
        "rung": title,
        "saves": saves,
        "allocated": answer.bytes.allocated,
        "used": answer.bytes.used,
        "headroom": "" if answer.verdict.headroom is None else answer.verdict.headroom,
        "verdict": answer.verdict.answer or "",
        "time_low": time[0],
        "time_high": time[1],
        "severity": severity,
    }
