"""Parts of the page about one run: the bar that follows a slider, and tables of the same run with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from memplan.cli.commands import Subcommand
from memplan.cli.run_files import run_file
from memplan.cli.runs import runs_of
from memplan.core.units import GIB
from memplan.estimate.estimate import estimate
from memplan.planning.fitting import Fit, fits
from memplan.planning.reach import frontier
from memplan.planning.stacks import StackAnswer, other_stacks
from memplan.report import heat, html
from memplan.report import wording as words_
from memplan.report.blocks import Column, Table, Text
from memplan.report.html import Part
from memplan.resolve.request import errors_of
from memplan.spec.run import RunSpec

_NO_STACKS = "Stacks are compared for training runs on one GPU."


def part_of(part: str, words: Sequence[str]) -> str:
    """Return a part as HTML, for the run of a command's words. Raises MemplanError as the command does."""
    return html.fragment(_PARTS[part](_run(words)))


def _run(words: Sequence[str]) -> RunSpec:
    from memplan.cli.plain import command_of

    command: Subcommand = command_of("estimate")
    given = command.given(words)
    if given is None:
        from memplan.cli.typer_commands import given_by_typer

        given = given_by_typer(command, words)
    file = run_file(given)
    with errors_of(file):
        return runs_of(given, file)[0]


def _bar(run: RunSpec) -> Iterator[Part]:
    yield from html.summary(estimate(run))


def _map(run: RunSpec) -> Iterator[Part]:
    yield heat.drawing(frontier(run))


def _cards(run: RunSpec) -> Iterator[Part]:
    found = sorted(fits(run), key=lambda fit: (fit.gpu.usable, fit.gpu.name))
    yield Table(_CARDS, found)


def _stacks(run: RunSpec) -> Iterator[Part]:
    answer = estimate(run)
    found = [StackAnswer(answer.run.profile, answer), *other_stacks(answer)]
    yield Table(_STACKS, found) if len(found) > 1 else Text(_NO_STACKS)


_PARTS: Mapping[str, Callable[[RunSpec], Iterator[Part]]] = {
    "bar": _bar,
    "map": _map,
    "cards": _cards,
    "stacks": _stacks,
}
_CARDS: tuple[Column[Fit], ...] = (
    Column("card", lambda fit: fit.gpu.name),
    Column("GiB usable", lambda fit: f"{fit.gpu.usable / GIB:.1f}", right=True),
    Column("sold for", lambda fit: fit.gpu.market),
    Column(
        "answer", lambda fit: fit.answer or fit.refusal, style=lambda fit: words_.COLOURS.get(str(fit.answer), "dim")
    ),
)
_STACKS: tuple[Column[StackAnswer], ...] = (
    Column("stack", lambda stack: stack.profile),
    Column("GiB used", lambda stack: words_.tenths(stack.answer.bytes.used) if stack.answer else "", right=True),
    Column(
        "answer",
        lambda stack: str(stack.answer.verdict.answer or "") if stack.answer else "cannot run it",
        style=lambda stack: words_.COLOURS.get(str(stack.answer and stack.answer.verdict.answer), "dim"),
    ),
)
