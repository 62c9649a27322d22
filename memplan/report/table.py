"""The terminal report: the verdict first, then what takes the memory, when, and the assumptions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.estimate.answer import Estimate
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.bar import MARKS, bar, mark
from memplan.report.text import Column, Screen, hanging, paragraph, screen, table

COLOURS = {"fits": "green", "tight": "yellow", "does not fit": "red"}


def render(answers: Sequence[Estimate], explain: bool = False, to: Screen | None = None, ranks: bool = False) -> str:
    to = to or screen()
    if len(answers) == 1:
        return "\n".join(_answer(answers[0], explain, to, ranks)) + "\n"
    return "\n".join(_comparison(answers, explain, to, ranks)) + "\n"


def _answer(answer: Estimate, explain: bool, to: Screen, ranks: bool) -> Iterator[str]:
    style = f"bold {COLOURS.get(answer.verdict.answer or '', '')}".strip()
    yield from (to.paint(line, style) for line in paragraph(words.verdict(answer), to, "  "))
    yield ""
    yield from bar(answer, to)
    yield ""
    yield from _categories(answer, to)
    yield ""
    yield from _phases(answer, to)
    yield from _pool(answer, to)
    yield ""
    yield from paragraph(f"The peak is {words.moment(answer)}.", to)
    yield from paragraph(words.headroom(answer), to)
    yield from paragraph(words.host(answer), to)
    if ranks:
        yield from _ranks(answer, to)
    yield from _help(answer, to)
    yield from _rest(answer, explain, to)


def _pool(answer: Estimate, to: Screen) -> Iterator[str]:
    """Yield what a serving engine's pool holds."""
    if answer.serving is None:
        return
    from memplan.report.serving import pool

    yield ""
    yield to.paint("Keys and values", "bold")
    yield from table([Column(""), Column("", wraps=True)], pool(answer), to, ["dim|"] * 9)


def _ranks(answer: Estimate, to: Screen) -> Iterator[str]:
    """Yield a table of the ranks that differ."""
    if not answer.ranks:
        return
    number = ("stage", "layers", "in flight", "GiB allocated", "used")
    columns = [Column(title, right=title in number, wraps=title == "peak") for title in words.RANKS]
    rows = words.rank_rows(answer)
    yield ""
    yield from (to.paint(line, "bold") for line in paragraph(words.ranks_title(answer), to))
    yield from table(columns, rows, to, [f"|||||{COLOURS.get(row[5], '')}|" for row in rows])
    yield ""


def _help(answer: Estimate, to: Screen) -> Iterator[str]:
    """Yield what would make a run fit that does not, and which cards hold a run without a GPU."""
    if answer.verdict.answer == "does not fit":
        from memplan.report.advice import help_line

        yield from paragraph(help_line(answer), to, "  ")
    if answer.gpu is None:
        from memplan.report.advice import cards

        for title, by_size in cards(answer):
            yield ""
            yield from (to.paint(line, "bold") for line in paragraph(title, to))
            for size, names in by_size.items():
                yield from hanging(f"{size:4}", names, to, 4)


def _rest(answer: Estimate, explain: bool, to: Screen) -> Iterator[str]:
    yield ""
    yield from _assumptions(answer, to)
    yield from _notes([answer], to)
    if explain:
        yield ""
        yield from _ledger(answer, to)


def _notes(answers: Sequence[Estimate], to: Screen) -> Iterator[str]:
    notes = words.notes(answers)
    if notes:
        yield ""
        yield to.paint("Notes", "bold")
        for note in notes:
            yield from paragraph(f"- {note}", to, "  ")


def _comparison(answers: Sequence[Estimate], explain: bool, to: Screen, ranks: bool) -> Iterator[str]:
    columns = (
        Column("GPU", wraps=True),
        Column("answer"),
        Column("GiB used", right=True),
        Column("usable", right=True),
        Column("free", right=True),
        Column(f"{answers[0].band.coverage:.0%} of runs", optional=True),
    )
    rows = [
        (
            str(answer.run.gpu),
            str(answer.verdict.answer),
            words.tenths(answer.bytes.used),
            words.tenths(answer.gpu.usable if answer.gpu else 0),
            words.tenths(answer.verdict.headroom or 0),
            f"{words.tenths(answer.band.low)} to {words.tenths(answer.band.high)}",
        )
        for answer in answers
    ]
    yield from table(columns, rows, to, [f"|{COLOURS[row[1]]}||||" for row in rows])
    yield ""
    yield from _moments(answers, to)
    yield from paragraph(words.host(answers[0]), to)
    for answer in answers if ranks else ():
        if answer.ranks:
            yield ""
            yield to.paint(str(answer.run.gpu), "bold")
            yield from _ranks(answer, to)
    for answer in answers:
        if answer.verdict.answer == "does not fit":
            yield ""
            yield to.paint(str(answer.run.gpu), "bold")
            yield from _help(answer, to)
    yield ""
    yield from _assumptions(answers[0], to)
    yield from _notes(answers, to)
    if explain:
        for answer in answers:
            yield ""
            yield to.paint(str(answer.run.gpu), "bold")
            yield from _ledger(answer, to)


def _moments(answers: Sequence[Estimate], to: Screen) -> Iterator[str]:
    """Yield the moments of the peaks, grouping GPUs that share one."""
    gpus: dict[str, list[str]] = {}
    for answer in answers:
        gpus.setdefault(words.moment(answer), []).append(str(answer.run.gpu))
    for moment, names in gpus.items():
        on = f" on {', '.join(dict.fromkeys(names))}" if len(gpus) > 1 else ""
        yield from paragraph(f"The peak{on} is {moment}.", to)


def _categories(answer: Estimate, to: Screen) -> Iterator[str]:
    held = answer.bytes
    columns = (
        Column(""),
        Column("at the peak", wraps=True),
        Column("GiB", right=True),
        Column("share", right=True),
        Column("largest", wraps=True, optional=True),
    )
    rows: list[tuple[str, ...]] = []
    styles: list[str] = []

    def add(sign: str, label: str, n: int, largest: str, style: str) -> None:
        rows.append((sign, label, words.hundredths(n), words.share(n, held.used), largest))
        styles.append(style)

    counter = "ggml's buffers" if words.without_torch(answer) else "torch.cuda.max_memory_allocated"
    for part in words.parts(answer):
        if part.key in ("allocator", "context") and not any(row[1] == "allocated" for row in rows):
            add("", "allocated", held.allocated, counter, "bold")
        add(mark(part.key, to), part.label, part.bytes, part.largest, f"{MARKS[part.key][1]}||||dim")
    add("", "used", held.used, "nvidia-smi", "bold")
    yield from table(columns, rows, to, styles)


def _phases(answer: Estimate, to: Screen) -> Iterator[str]:
    differ = words.steps_differ(answer)
    columns = [Column("phase"), Column("step 1" if differ else "GiB", right=True)]
    columns += [Column("later", right=True)] if differ else []
    columns += [Column(""), Column("largest at", wraps=True, optional=True)]
    rows: list[tuple[str, ...]] = []
    styles: list[str] = []
    for row in words.phase_rows(answer):
        runs_once = row.phase == "load"
        later = ["" if runs_once else words.hundredths(row.later)] if differ else []
        rows.append((row.phase, words.hundredths(row.first), *later, "← peak" if row.peak else "", row.where))
        styles.append("bold" if row.peak else "")
    yield from table(columns, rows, to, styles)


def _assumptions(answer: Estimate, to: Screen) -> Iterator[str]:
    yield to.paint("Assumed", "bold")
    yield from table([Column(""), Column("", wraps=True)], assumptions_.assumptions(answer), to, ["dim|"] * 20)


def _ledger(answer: Estimate, to: Screen) -> Iterator[str]:
    """Yield every tensor alive at the peak, then the sums by kind and in all, then the numbered sources."""
    yield from (to.paint(line, "bold") for line in paragraph(f"Alive at the peak, {words.moment(answer)}", to))
    sources = list(dict.fromkeys(line.source for line in answer.ledger if line.source))
    number = {source: f"[{n}]" for n, source in enumerate(sources, 1)}
    width = max((len(f"{line.bytes:,}") for line in answer.ledger), default=0)
    indent = " " * (width + 2 if to.width >= 60 else 2)
    for line in answer.ledger:
        place = f" at {line.where}" if line.where else ""
        basis = "" if line.basis == "derived" else f" ({line.basis})"
        tensor = f"{words.times(line)}{line.what}{place}: {words.shape(line)} {words.dtype(line)}".rstrip(": ")
        text = f"{line.bytes:>{width},}  {tensor}; {line.why}{basis} {number.get(line.source, '')}"
        yield from paragraph(text.rstrip() if len(indent) > 2 else text.strip(), to, indent)
    yield ""
    held = {kind: n for kind, n in answer.categories.items() if n}
    sums = [(f"{n:,}", words.CATEGORIES[kind]) for kind, n in held.items()]
    sums.append((f"{sum(held.values()):,}", "bytes allocated"))
    overheads = answer.beside if len(answer.beside) > 1 else ()
    sums += [(f"{row.usual:,}", f"{row.what} ({row.basis})") for row in overheads]
    styles = [*[""] * len(held), "bold", *[""] * len(overheads)]
    yield from table((Column("sum", right=True), Column("", wraps=True)), sums, to, styles)
    yield ""
    for source in sources:
        yield from paragraph(f"{number[source]} {source}", to, "    ")
