"""Markdown, for pull requests and issues: the report of an answer, and the blocks of other reports as a page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from memplan.estimate.answer import Estimate
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.blocks import Block, Column, Drawing, Facts, Heading, Notes, Pairs, Paste, Table, Text, Verbatim
from memplan.report.text import Screen


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False) -> str:
    return page(_blocks(answers, explain, ranks))


def _blocks(answers: Sequence[Estimate], explain: bool, ranks: bool) -> Iterator[Block]:
    first, several = answers[0], len(answers) > 1
    if several:
        yield _verdicts(answers)
        yield Text(words.host(first) if first.host_bytes else "")
    else:
        yield Text(words.verdict(first), "bold")
        yield Text(assumptions_.question(first))
        yield Text(words.summary(first))
    for answer in answers if explain else answers[:1]:
        yield Text(f"On {answer.run.gpu}:" if several else "")
        yield from (words.part_table(answer), words.phase_table(answer))
        if answer.serving is not None:
            from memplan.report.serving import pool

            yield Facts("Keys and values", pool(answer))
        if explain:
            yield words.ledger_table(answer)
    for answer in answers if ranks else ():
        if answer.ranks:
            yield Text(f"{f'{answer.run.gpu}: ' if several else ''}{words.ranks_title(answer)}")
            yield words.ranks_table(answer)
    for answer in answers:
        yield from _next_steps(answer, several)
    yield Facts("Assumed", assumptions_.assumptions(first))
    yield Notes(words.notes(answers))


def _verdicts(answers: Sequence[Estimate]) -> Table[Estimate]:
    columns: list[Column[Estimate]] = [
        Column("GPU", lambda answer: str(answer.run.gpu)),
        Column("answer", lambda answer: str(answer.verdict.answer), style="bold"),
        Column("used, GiB", lambda answer: words.tenths(answer.bytes.used), right=True),
        Column("usable, GiB", lambda answer: words.tenths(answer.gpu.usable if answer.gpu else 0), right=True),
        Column("free, GiB", lambda answer: words.tenths(answer.verdict.headroom or 0), right=True),
        Column(f"{answers[0].band.coverage:.0%} of runs, GiB", words.band_ends, right=True),
    ]
    return Table(columns, answers)


def _next_steps(answer: Estimate, several: bool) -> Iterator[Block]:
    from memplan.report.next_steps import cards, help_line

    line = help_line(answer)
    yield Text(f"{answer.run.gpu}: {line}" if several and line else line)
    for title, by_size in cards(answer):
        yield Text(f"{title}:" if by_size else title)
        yield Notes([f"{size}: {', '.join(names)}" for size, names in by_size.items()])


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
            if lines:
                yield ""
                yield from (f"```{language}", *lines, "```")
        case Verbatim(lines, language):
            yield from (f"```{language}", *lines, "```")
        case Drawing(draw):
            yield "```text"
            yield from ("".join(text for text, _ in line).rstrip() for line in draw(Screen()))
            yield "```"


def _cell(text: str, style: str) -> str:
    return f"**{text}**" if style == "bold" else text


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
