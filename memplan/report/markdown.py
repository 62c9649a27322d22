"""Markdown, for pull requests and issues: the report of an answer, and the blocks of other reports as a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from operator import itemgetter

from memplan.estimate.answer import Estimate
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.blocks import (
    Block,
    Column,
    Drawing,
    Facts,
    Fold,
    Heading,
    Notes,
    Pairs,
    Paste,
    Table,
    Text,
    Verbatim,
)
from memplan.report.stamp import Stamp
from memplan.report.text import Screen


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False, stamp: Stamp | None = None) -> str:
    return page(_blocks(answers, explain, ranks, stamp or Stamp()))


def _blocks(answers: Sequence[Estimate], explain: bool, ranks: bool, stamp: Stamp) -> Iterator[Block]:
    """Yield what a reviewer wants first, and everything else in one fold."""
    names = assumptions_.names(answers)
    yield Text(words.verdict(answers[0]), "bold") if len(answers) == 1 else Text("")
    yield Text(assumptions_.title(answers))
    if any(answer.gpu for answer in answers):
        yield verdicts([(name or str(answer.run.gpu), answer) for name, answer in zip(names, answers, strict=True)])
    for name, answer in zip(names, answers, strict=True):
        yield from next_steps(answer, name)
    yield from assumptions_.of_lengths(answers)
    left_out = words.left_out(answers)
    yield Notes(left_out)
    details = list(_details(answers, explain, ranks))
    details += [Facts(*facts) for facts in assumptions_.assumed(answers)]
    details.append(Notes([note for note in words.notes(answers) if note not in left_out]))
    details.append(stamped(stamp))
    yield Fold("What takes the memory, when, and what was assumed", details)


def _details(answers: Sequence[Estimate], explain: bool, ranks: bool) -> Iterator[Block]:
    named = [*zip(assumptions_.names(answers), answers, strict=True)]
    yield Text(words.summary(answers[0]) if len(answers) == 1 else words.host(answers[0]))
    for name, answer in named if explain else named[:1]:
        yield Text(name and f"{'On ' if assumptions_.is_one_question(answers) else ''}{name}:")
        yield from (words.part_table(answer), words.phase_table(answer))
        if answer.serving is not None:
            from memplan.report.serving import pool

            yield Facts("Keys and values", pool(answer))
        if explain:
            yield words.ledger_table(answer)
    for name, answer in named if ranks else ():
        if answer.ranks:
            yield Text(f"{name and f'{name}: '}{words.ranks_title(answer)}")
            yield words.ranks_table(answer)


def stamped(stamp: Stamp) -> Text | Paste:
    """Return the version, and the command if it is known."""
    return Paste(stamp.line, [stamp.command], language="sh") if stamp.command else Text(stamp.line)


def verdicts(runs: Sequence[tuple[str, Estimate]], title: str = "") -> Table[tuple[str, Estimate]]:
    """Return a row per run, with its name: the verdict, and the bytes behind it."""

    title = title or ("GPU" if assumptions_.is_one_question([answer for _, answer in runs]) else "run")

    def of(cell: Callable[[Estimate], str]) -> Callable[[tuple[str, Estimate]], str]:
        return lambda run: cell(run[1])

    def usable(answer: Estimate) -> str:
        return words.tenths(answer.gpu.usable) if answer.gpu else ""

    def free(answer: Estimate) -> str:
        return "" if answer.verdict.headroom is None else words.tenths(answer.verdict.headroom)

    columns: list[Column[tuple[str, Estimate]]] = [
        Column(title, itemgetter(0)),
        Column("answer", of(lambda a: a.verdict.answer or ""), style=of(lambda a: f"bold {words.colour(a)}")),
        Column("used, GiB", of(lambda answer: words.tenths(answer.bytes.used)), right=True),
        Column("usable, GiB", of(usable), right=True),
        Column("free, GiB", of(free), right=True),
        Column(f"{runs[0][1].band.coverage:.0%} of runs, GiB", of(words.band_ends), right=True),
    ]
    return Table(columns, runs)


def next_steps(answer: Estimate, name: str) -> Iterator[Block]:
    """Yield what would make the run fit, and without a card which cards hold it. `name` is the answer's, of several."""
    from memplan.report.next_steps import cards, help_line

    line = help_line(answer)
    yield Text(f"{name}: {line}" if name and line else line)
    for title, by_size in cards(answer):
        yield Text(f"{title}:" if by_size else title)
        yield Notes([f"{size}: {', '.join(names)}" for size, names in by_size.items()], "")


def page(blocks: Iterable[Block]) -> str:
    """Return the blocks as a page, with a blank line between them."""
    parts = ("\n".join(_lines(block)) for block in blocks)
    return "\n\n".join(part for part in parts if part) + "\n"


def _lines(block: Block) -> Iterator[str]:
    match block:
        case Text(text, style):
            yield f"**{plain(text)}**" if "bold" in style else plain(text)
        case Heading(text, _):
            yield f"**{plain(text)}**"
        case Pairs(rows):
            for name, text in rows:
                yield f"- {plain(name)}: {plain(text)}" if name else f"  - {plain(text)}"
        case Facts(title, rows, heads):
            yield from _table((title.lower(), *heads), rows, "l" * (1 + len(heads)))
        case Notes(texts):
            yield from (f"- {plain(text)}" for text in texts)
        case Table(columns):
            shown = [n for n, column in enumerate(columns) if column.title or not n]
            titles = [plain(columns[n].title) for n in shown]
            cells = [[_cell(*row[n]) for n in shown] for row in block.cells()]
            yield from _table(titles, cells, "".join("r" if columns[n].right else "l" for n in shown))
        case Paste(title, lines, note, language):
            yield f"{plain(title)}:{f' {plain(note)}' if note else ''}"
            yield from ("", *_fenced(lines, language)) if lines else ()
        case Verbatim(lines, language):
            yield from _fenced(lines, language)
        case Drawing(draw):
            yield from _fenced(["".join(text for text, _ in line).rstrip() for line in draw(Screen())], "text")
        case Fold(title, blocks, is_open):
            yield f"<details{' open' if is_open else ''}>"
            yield f"<summary>{escape(title, quote=False)}</summary>"
            yield ""
            yield page(blocks)
            yield "</details>"


def _fenced(lines: Sequence[str], language: str) -> Iterator[str]:
    """Yield lines between fences that none of them can close."""
    fence = "`" * (1 + max(2, *(len(run) for line in lines for run in re.findall("`+", line)), 0))
    yield from (f"{fence}{language}", *lines, fence)


def _cell(text: str, style: str) -> str:
    return f"**{text}**" if text and "bold" in style.split() else text


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + "|".join("---:" if side == "r" else "---" for side in align) + "|"
    for row in rows:
        yield f"| {' | '.join(map(plain, row))} |"


def plain(text: str) -> str:
    """Escape characters that would end a table cell or start emphasis."""
    for sign in "\\`[|_":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;")
