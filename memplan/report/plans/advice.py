"""Report of the advice: each step's question, its answer with figures, and every option that fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import Demand
from memplan.estimate.estimate import estimate
from memplan.frameworks import lines
from memplan.planning.advice import Advice, AdviceOption
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Heading, Pairs, Paste, Table, Text
from memplan.report.plans.changes import change_dump, conditions, factors, figures, option_rows, state, time_dump
from memplan.spec.run import RunSpec


class AdviceReport(NamedTuple):
    """The estimate of the run as given, and the advice for its model, batch, sequence and GPU."""

    answer: Estimate
    demand: Demand
    advice: Advice

    mode = "advice"

    @property
    def found(self) -> list[Estimate]:
        return [answer for _, answer in self.named]

    @property
    def named(self) -> list[tuple[str, Estimate]]:
        """The runs that it shows, with what it calls them."""
        return [(choice.title, choice.answer) for step in self.advice.steps for choice in step.options if choice.fits]

    def blocks(self, explain: bool = False) -> Iterator[Block]:
        run, best = self.answer.run, self.advice.best
        batch = f"batch {run.batch.micro:,} of {run.batch.sequence:,} tokens"
        where = f"{words.on_card(self.answer)}{conditions(self.demand)}"
        yield Text(f"{words.model(self.answer)}, {batch}{where}", "bold")
        if best is None:
            yield Text("None of the options fits.", "bold red")
        else:
            style = f"bold {words.colour(best.answer)}"
            yield Text(f"Changes the result least: {best.title}: {state(best.answer)}.", style)
        for n, step in enumerate(self.advice.steps, 1):
            yield Heading(f"{n}. {step.title}: {step.answer}")
            yield Text(f"{step.question} {step.answer.capitalize()}: {step.reason}.")
            shown = [choice for choice in step.options if choice.fits or explain]
            if shown:
                yield _options(shown, explain)
        if best is not None:
            yield from _how(best, self.answer)
        yield Text("× time: step time for the same number of tokens, relative to full fine-tuning in pure bf16.")
        for step in self.advice.steps if explain else ():
            for choice in step.options:
                if choice.fits and choice is not best:
                    yield from _how(choice, self.answer)

    def dump(self) -> dict[str, Any]:
        asked, best = self.answer, self.advice.best
        return {
            "steps": [
                {
                    "title": step.title,
                    "question": step.question,
                    "answer": step.answer,
                    "reason": step.reason,
                    "choices": [choice_dump(choice, asked) for choice in step.options],
                }
                for step in self.advice.steps
            ],
            "best": choice_dump(best, asked) if best else None,
        }


def _options(shown: Sequence[AdviceOption], explain: bool) -> Table[AdviceOption]:
    """Return the options that fit; with `explain` also the others, and sources."""

    def effect(choice: AdviceOption) -> str:
        if explain and choice.source:
            return f"{choice.quality} [{choice.source}]"
        return _beyond(choice, list(takewhile(lambda other: other is not choice, shown)))

    columns: list[Column[AdviceOption]] = [
        Column("option", lambda choice: choice.title, wraps=True),
        Column("answer", _verdict, optional=True, style=lambda choice: words.colour(choice.answer)),
        Column("GiB", lambda choice: words.tenths(choice.answer.bytes.used), right=True),
        Column("free", lambda choice: words.tenths(choice.answer.verdict.headroom or 0), right=True),
        Column("× time", lambda choice: factors(choice.time, "–"), right=True, optional=True),
        Column("effect on the result", effect, wraps=True, optional=True),
    ]
    return Table(columns, shown)


def _verdict(choice: AdviceOption) -> str:
    return str(choice.answer.verdict.answer)


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
    yield Heading(f"How: {choice.title}")
    own, *frameworks = lines(asked.asked, simplest_run(asked, choice.answer))
    yield Pairs(option_rows(own, without="as asked"))
    yield from (Paste(config.title, config.lines, config.note) for config in frameworks if config.lines or config.note)


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
