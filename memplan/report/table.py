"""The report as text: the verdict first, then what takes the memory, when, and the assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter

from memplan.estimate.answer import Estimate, Line
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.bar import bar
from memplan.report.blocks import Block, Column, Drawing, Facts, Heading, Notes, Pairs, Table, Text, Verbatim
from memplan.report.display import display
from memplan.report.overview import CommandLine, headline, overview, rows, settings, with_options
from memplan.report.overview import table as overview_table
from memplan.report.text import Screen, screen


def render(
    answers: Sequence[Estimate],
    explain: bool = False,
    to: Screen | None = None,
    ranks: bool = False,
    details: bool = True,
    line: CommandLine | None = None,
) -> str:
    to = to or screen()
    if len(answers) > 1:
        blocks = _comparison(answers, explain, ranks, details, line)
    elif details:
        blocks = _answer(answers[0], explain, to, ranks)
    else:
        blocks = _brief(answers[0], explain, to, ranks, line)
    lengths = display(assumptions_.of_lengths(answers), to)
    return display(blocks, to) + (lengths and f"\n{lengths}")


def stacks(answer: Estimate, to: Screen) -> str:
    """Return the line of other stacks below a first screen; empty for a run that has no others."""
    text = display(_stacks(answer), to)
    return f"\n{text}" if text else ""


def _brief(answer: Estimate, explain: bool, to: Screen, ranks: bool, line: CommandLine | None) -> Iterator[Block]:
    yield from overview(answer, to, line)
    if ranks:
        yield from _ranks(answer)
    if explain:
        yield from _ledger(answer)


def _answer(answer: Estimate, explain: bool, to: Screen, ranks: bool) -> Iterator[Block]:
    yield from headline(answer, to)
    yield Text(words.other_cards(answer), indent="")
    shares = rows(answer)
    if not to.plain:
        yield Drawing(partial(bar, answer, [(row.key, row.bytes) for row in shares]))
    yield overview_table(with_options(answer, shares, len(shares)), to)
    yield from _stacks(answer)
    yield _categories(answer)
    yield _phases(answer)
    if answer.serving is not None:
        from memplan.report.serving import pool

        yield Facts("Keys and values", pool(answer))
    yield Text(f"The peak is {words.moment(answer)}.", indent="")
    yield Text(words.headroom(answer), indent="")
    yield Text(words.host(answer), indent="")
    if ranks:
        yield from _ranks(answer)
    yield from _next_steps(answer)
    yield Facts("Assumed", assumptions_.assumptions(answer))
    yield from _notes([answer])
    if explain:
        yield from _ledger(answer)


def _stacks(answer: Estimate) -> Iterator[Block]:
    from memplan.report.next_steps import stacks

    found = [*stacks(answer)]
    if found:
        yield Pairs(found)


def _ranks(answer: Estimate) -> Iterator[Block]:
    if answer.ranks:
        yield Heading(words.ranks_title(answer), indent="")
        yield words.ranks_table(answer)
        yield Text("")  # a blank line before what follows


def _next_steps(answer: Estimate) -> Iterator[Block]:
    """Yield what would make a run fit that does not, and which cards hold a run without a GPU."""
    if answer.verdict.answer == "does not fit":
        from memplan.report.next_steps import help_line

        yield Text(help_line(answer))
    if answer.gpu is None:
        from memplan.report.next_steps import cards

        for title, by_size in cards(answer):
            yield Heading(title, indent="")
            yield Facts("", [(f"{size:4}", "  ".join(names)) for size, names in by_size.items()])


def _notes(answers: Sequence[Estimate]) -> Iterator[Block]:
    notes = words.notes(answers)
    if notes:
        yield Notes(notes)


def _comparison(
    answers: Sequence[Estimate], explain: bool, ranks: bool, details: bool, line: CommandLine | None
) -> Iterator[Block]:
    is_one = assumptions_.is_one_question(answers)
    columns: list[Column[Estimate]] = [
        *([] if is_one else [Column("run", assumptions_.question, wraps=True)]),
        Column("GPU", lambda answer: str(answer.run.gpu), wraps=True),
        Column("answer", lambda answer: str(answer.verdict.answer), style=words.colour),
        Column("GiB used", lambda answer: words.tenths(answer.bytes.used), right=True),
        Column("usable", lambda answer: words.tenths(answer.gpu.usable if answer.gpu else 0), right=True),
        Column("free", lambda answer: words.tenths(answer.verdict.headroom or 0), right=True),
        Column(f"{answers[0].band.coverage:.0%} of runs", words.band_ends, optional=True),
    ]
    if is_one:
        yield Text(words.asked(answers[0]), "bold", indent="")
        yield Text("  " + ", ".join(settings(answers[0])), "dim")
    yield Table(columns, answers)
    yield from _moments(answers)
    yield Text(words.host(answers[0]), indent="")
    named = [*zip(assumptions_.names(answers), answers, strict=True)]
    for name, answer in named:
        if ranks and answer.ranks:
            yield Text(name, "bold")
            yield from _ranks(answer)
    for name, answer in named:
        if answer.verdict.answer == "does not fit":
            yield Heading(name)
            yield from _next_steps(answer)
    if details:
        yield from (Facts(*facts) for facts in assumptions_.assumed(answers))
        yield from _notes(answers)
    elif line is not None:
        yield Verbatim([f"  memplan {line.changed()} --details"], "sh")
    for name, answer in named if explain else ():
        yield Heading(name)
        yield from _ledger(answer)


def _moments(answers: Sequence[Estimate]) -> Iterator[Text]:
    """Yield the moments of the peaks, grouping runs and GPUs that share one."""
    sharing: dict[str, list[str]] = {}
    for name, answer in zip(assumptions_.names(answers), answers, strict=True):
        sharing.setdefault(words.moment(answer), []).append(name)
    for moment, names in sharing.items():
        of = "on" if assumptions_.is_one_question(answers) else "of"
        told = f" {of} {', '.join(dict.fromkeys(names))}" if len(sharing) > 1 else ""
        yield Text(f"The peak{told} is {moment}.", indent="")


def _categories(answer: Estimate) -> Table[words.MemoryPart]:
    """Return the parts of the used memory, with a sum above what no tensor takes, and one at the end."""
    held, parts = answer.bytes, words.parts(answer)
    counter = "ggml's buffers" if words.without_torch(answer) else "torch.cuda.max_memory_allocated"
    n_tensors = sum(part.key in words.CATEGORIES for part in parts)
    parts.insert(n_tensors, words.MemoryPart("", "allocated", held.allocated, counter))
    parts.append(words.MemoryPart("", "used", held.used, "nvidia-smi"))

    def bold(part: words.MemoryPart) -> str:
        return "" if part.key else "bold"

    columns: list[Column[words.MemoryPart]] = [
        Column("at the peak", lambda part: part.label, wraps=True, style=bold),
        Column("GiB", lambda part: words.hundredths(part.bytes), right=True, style=bold),
        Column("share", lambda part: words.share(part.bytes, held.used), right=True, style=bold),
        Column("largest", lambda p: p.largest, wraps=True, optional=True, style=lambda p: "dim" if p.key else "bold"),
    ]
    return Table(columns, parts)


def _phases(answer: Estimate) -> Table[words.PhaseRow]:
    differ = words.steps_differ(answer)

    def bold(row: words.PhaseRow) -> str:
        return "bold" if row.peak else ""

    columns: list[Column[words.PhaseRow]] = [
        Column("phase", lambda row: row.phase, style=bold),
        Column("step 1" if differ else "GiB", lambda row: words.hundredths(row.first), right=True, style=bold),
        *([Column("later", words.later_peak, right=True, style=bold)] if differ else []),
        Column("", lambda row: "← peak" if row.peak else "", style=bold),
        Column("largest at", lambda row: row.where, wraps=True, optional=True, style=bold),
    ]
    return Table(columns, words.phase_rows(answer))


def _ledger(answer: Estimate) -> Iterator[Block]:
    """Yield every tensor alive at the peak, then the sums by kind and in all, then the numbered sources."""
    yield Heading(f"Alive at the peak, {words.moment(answer)}", indent="")
    sources = list(dict.fromkeys(line.source for line in answer.ledger if line.source))
    number = {source: f"[{n}]" for n, source in enumerate(sources, 1)}

    def tensor(line: Line) -> str:
        place = f" at {line.where}" if line.where else ""
        basis = "" if line.basis == "derived" else f" ({line.basis})"
        what = f"{words.times(line)}{line.what}{place}: {words.shape(line)} {words.dtype(line)}".rstrip(": ")
        return f"{what}; {line.why}{basis} {number.get(line.source, '')}".rstrip()

    lines: list[Column[Line]] = [
        Column("", lambda line: f"{line.bytes:,}", right=True),
        Column("", tensor, wraps=True),
    ]
    yield Table(lines, list(answer.ledger))
    held = {words.CATEGORIES[kind]: n for kind, n in answer.categories.items() if n}
    sums = [*held.items(), ("bytes allocated", sum(held.values()))]
    overheads = answer.beside if len(answer.beside) > 1 else ()
    sums += [(f"{row.what} ({row.basis})", row.usual) for row in overheads]

    def bold(row: tuple[str, int]) -> str:
        return "bold" if row[0] == "bytes allocated" else ""

    columns: list[Column[tuple[str, int]]] = [
        Column("sum", lambda row: f"{row[1]:,}", right=True, style=bold),
        Column("", itemgetter(0), wraps=True, style=bold),
    ]
    yield Table(columns, sums)
    yield from (Text(f"{number[source]} {source}", indent="    ") for source in sources)
