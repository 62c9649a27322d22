"""The decision in steps: what was asked at each, the answer with its figures, and every way that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.frameworks import lines
from memplan.planning.advice import Advice, Choice, Step
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Pairs, Paste, Table, Text
from memplan.report.plans.wording import change_dump, factors, figures, state, time_dump, wish
from memplan.report.table import COLOURS
from memplan.report.text import Column
from memplan.spec.run import RunSpec


class Advised(NamedTuple):
    """The answer as asked, and the advice on its model, batch, sequence and GPU."""

    answer: Estimate
    demand: Demand
    advice: Advice

    @property
    def found(self) -> list[Estimate]:
        return [choice.answer for step in self.advice.steps for choice in step.options if choice.fits]


def blocks(advised: Advised, explain: bool = False) -> Iterator[Block]:
    run, best = advised.answer.run, advised.advice.best
    gpu, asked = words.card(advised.answer), wish(advised.demand)
    on = f" on {gpu.title}, {words.tenths(gpu.usable)} GiB usable" if gpu else ""
    batch = f"batch {run.batch.micro:,} of {run.batch.sequence:,} tokens"
    yield Text(f"{words.model(advised.answer)}, {batch}{on}{f' ({asked})' if asked else ''}", "bold")
    if best is None:
        yield Text("Nothing that was tried fits.", "bold red")
    else:
        style = f"bold {COLOURS[str(best.answer.verdict.answer)]}"
        yield Text(f"The way that changes the result least: {best.title}: {state(best.answer)}.", style)
    for n, step in enumerate(advised.advice.steps, 1):
        yield Heading(f"{n}. {step.title}: {step.answer}")
        yield Text(f"{step.question} {step.answer.capitalize()}: {step.reason}.")
        yield from _ways(step, explain)
    if best is not None:
        yield Heading(f"How: {best.title}")
        yield from _how(best, advised.answer)
    yield Text("× time is of a step over as many tokens, full fine-tuning in pure bf16 being 1.")
    if explain:
        for step in advised.advice.steps:
            for choice in step.options:
                if choice.fits and choice is not best:
                    yield Heading(f"How: {choice.title}")
                    yield from _how(choice, advised.answer)


def _ways(step: Step, explain: bool) -> Iterator[Block]:
    """Those that fit; with `explain` the others too, and who says what of the result."""
    shown = [choice for choice in step.options if choice.fits or explain]
    if not shown:
        return
    columns = (
        Column("way", wraps=True),
        Column("answer", optional=True),
        Column("GiB", right=True),
        Column("free", right=True),
        Column("× time", right=True, optional=True),
        Column("what it does to the result", wraps=True, optional=True),
    )
    rows = [
        (
            choice.title,
            str(choice.answer.verdict.answer),
            words.tenths(choice.answer.bytes.used),
            words.tenths(choice.answer.verdict.headroom or 0),
            factors(choice.time, "–"),
            f"{choice.quality} [{choice.source}]" if explain and choice.source else _beyond(choice, shown[:n]),
        )
        for n, choice in enumerate(shown)
    ]
    yield Table(columns, rows, [f"|{COLOURS[row[1]]}||||" for row in rows])


def _beyond(choice: Choice, above: Sequence[Choice]) -> str:
    """What it does to the result beyond what one above does."""
    for other in reversed(above):
        if choice.quality == other.quality and choice.quality != _NOTHING:
            return f"as {other.title}"
        if choice.quality.startswith(f"{other.quality}; "):
            return f"as {other.title}; {choice.quality.removeprefix(f'{other.quality}; ')}"
    return choice.quality


_NOTHING = "none"


def least(asked: Estimate, answer: Estimate) -> RunSpec:
    """The run of `answer`, with the parts that come out as those of the run asked left as they were asked."""
    same = {
        part: getattr(asked.asked, part) for part in _PARTS if getattr(asked.run, part) == getattr(answer.run, part)
    }
    fewer = answer.asked.model_copy(update=same)
    return fewer if estimate(fewer).run == answer.run else answer.asked


_PARTS = ("method", "precision", "optimizer", "batch", "kernels", "loop", "parallelism")


def _how(choice: Choice, asked: Estimate) -> Iterator[Block]:
    own, *frameworks = lines(asked.asked, least(asked, choice.answer))
    yield Pairs([("options", " ".join(own.lines) or "as asked"), *([("", own.note)] if own.note else [])])
    yield from (Paste(of.title, of.lines, of.note) for of in frameworks if of.lines or of.note)


def dump(advised: Advised) -> dict[str, Any]:
    asked, best = advised.answer, advised.advice.best
    return {
        "steps": [
            {
                "title": step.title,
                "question": step.question,
                "answer": step.answer,
                "reason": step.reason,
                "choices": [choice_dump(choice, asked) for choice in step.options],
            }
            for step in advised.advice.steps
        ],
        "best": choice_dump(best, asked) if best else None,
    }


def choice_dump(choice: Choice, asked: Estimate) -> dict[str, Any]:
    return {
        "title": choice.title,
        "fits": choice.fits,
        "time": time_dump(choice.time),
        "quality": choice.quality,
        "quality_source": choice.source,
        **change_dump(asked.asked, least(asked, choice.answer)),
        **figures(choice.answer),
    }
