"""Report of the advice: each step's question, its answer with figures, and every option that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.frameworks import lines
from memplan.planning.advice import Advice, AdviceOption, AdviceStep
from memplan.report import wording as words
from memplan.report.blocks import Block, Heading, Pairs, Paste, Table, Text
from memplan.report.plans.wording import change_dump, conditions, factors, figures, state, time_dump
from memplan.report.table import COLOURS
from memplan.report.text import Column
from memplan.spec.run import RunSpec


class AdviceReport(NamedTuple):
    """The estimate of the run as given, and the advice for its model, batch, sequence and GPU."""

    answer: Estimate
    demand: Demand
    advice: Advice

    @property
    def found(self) -> list[Estimate]:
        return [choice.answer for step in self.advice.steps for choice in step.options if choice.fits]


def blocks(advised: AdviceReport, explain: bool = False) -> Iterator[Block]:
    run, best = advised.answer.run, advised.advice.best
    gpu, condition = words.card(advised.answer), conditions(advised.demand)
    on = f" on {gpu.title}, {words.tenths(gpu.usable)} GiB usable" if gpu else ""
    batch = f"batch {run.batch.micro:,} of {run.batch.sequence:,} tokens"
    yield Text(f"{words.model(advised.answer)}, {batch}{on}{f' ({condition})' if condition else ''}", "bold")
    if best is None:
        yield Text("None of the options fits.", "bold red")
    else:
        style = f"bold {COLOURS[str(best.answer.verdict.answer)]}"
        yield Text(f"Changes the result least: {best.title}: {state(best.answer)}.", style)
    for n, step in enumerate(advised.advice.steps, 1):
        yield Heading(f"{n}. {step.title}: {step.answer}")
        yield Text(f"{step.question} {step.answer.capitalize()}: {step.reason}.")
        yield from _options(step, explain)
    if best is not None:
        yield Heading(f"How: {best.title}")
        yield from _how(best, advised.answer)
    yield Text("× time: step time for the same number of tokens, relative to full fine-tuning in pure bf16.")
    if explain:
        for step in advised.advice.steps:
            for choice in step.options:
                if choice.fits and choice is not best:
                    yield Heading(f"How: {choice.title}")
                    yield from _how(choice, advised.answer)


def _options(step: AdviceStep, explain: bool) -> Iterator[Block]:
    """Yield the options that fit; with `explain` also the others, and sources."""
    shown = [choice for choice in step.options if choice.fits or explain]
    if not shown:
        return
    columns = (
        Column("option", wraps=True),
        Column("answer", optional=True),
        Column("GiB", right=True),
        Column("free", right=True),
        Column("× time", right=True, optional=True),
        Column("effect on the result", wraps=True, optional=True),
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


def _beyond(choice: AdviceOption, above: Sequence[AdviceOption]) -> str:
    """Return the effect on the result, relative to an option above with the same effect or part of it."""
    for other in reversed(above):
        if choice.quality == other.quality and choice.quality != _NOTHING:
            return f"as {other.title}"
        if choice.quality.startswith(f"{other.quality}; "):
            return f"as {other.title}; {choice.quality.removeprefix(f'{other.quality}; ')}"
    return choice.quality


_NOTHING = "none"


def simplest_run(asked: Estimate, answer: Estimate) -> RunSpec:
    """Return the run of `answer` with the fewest explicit fields.

    Parts that are decided as in `asked` keep what the user wrote, if the result is the same run.
    """
    same = {
        part: getattr(asked.asked, part) for part in _PARTS if getattr(asked.run, part) == getattr(answer.run, part)
    }
    fewer = answer.asked.model_copy(update=same)
    return fewer if estimate(fewer).run == answer.run else answer.asked


_PARTS = ("method", "precision", "optimizer", "batch", "kernels", "loop", "parallelism")


def _how(choice: AdviceOption, asked: Estimate) -> Iterator[Block]:
    own, *frameworks = lines(asked.asked, simplest_run(asked, choice.answer))
    yield Pairs([("options", " ".join(own.lines) or "as asked"), *([("", own.note)] if own.note else [])])
    yield from (Paste(config.title, config.lines, config.note) for config in frameworks if config.lines or config.note)


def dump(advised: AdviceReport) -> dict[str, Any]:
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


def choice_dump(choice: AdviceOption, asked: Estimate) -> dict[str, Any]:
    return {
        "title": choice.title,
        "fits": choice.fits,
        "time": time_dump(choice.time),
        "quality": choice.quality,
        "quality_source": choice.source,
        **change_dump(asked.asked, simplest_run(asked, choice.answer)),
        **figures(choice.answer),
    }
