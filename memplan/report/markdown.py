"""Markdown reports, for pull requests and issues: the verdict, then tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.estimate.answer import Estimate
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False) -> str:
    return "\n".join(_lines(answers, explain, ranks)) + "\n"


def _lines(answers: Sequence[Estimate], explain: bool, ranks: bool) -> Iterator[str]:
    first = answers[0]
    if len(answers) == 1:
        yield f"**{plain(words.verdict(first))}**"
        yield ""
        yield f"The peak is {plain(words.moment(first))}. {words.headroom(first)} {words.host(first)}".rstrip()
    else:
        yield from table(
            ("GPU", "answer", "used, GiB", "usable, GiB", "free, GiB", f"{first.band.coverage:.0%} of runs, GiB"),
            [
                (
                    str(answer.run.gpu),
                    f"**{answer.verdict.answer}**",
                    words.tenths(answer.bytes.used),
                    words.tenths(answer.gpu.usable if answer.gpu else 0),
                    words.tenths(answer.verdict.headroom or 0),
                    f"{words.tenths(answer.band.low)} to {words.tenths(answer.band.high)}",
                )
                for answer in answers
            ],
            "ll rrrr",
        )
        if first.host_bytes:
            yield ""
            yield words.host(first)
    for answer in answers if explain else answers[:1]:
        if len(answers) > 1:
            yield ""
            yield f"On {answer.run.gpu}:"
        yield ""
        yield from _categories(answer)
        yield ""
        yield from _phases(answer)
        if answer.serving is not None:
            from memplan.report.serving import pool

            yield ""
            yield from table(("keys and values", ""), pool(answer), "ll")
        if explain:
            yield ""
            yield from _ledger(answer)
    for answer in answers if ranks else ():
        if answer.ranks:
            yield ""
            yield plain(f"{f'{answer.run.gpu}: ' if len(answers) > 1 else ''}{words.ranks_title(answer)}")
            yield ""
            yield from table(words.RANKS, words.rank_rows(answer), "rrrrrll")
    yield from _advice(answers)
    yield ""
    yield from table(("assumed", ""), assumptions_.assumptions(first), "ll")
    notes = words.notes(answers)
    if notes:
        yield ""
        yield from (f"- {plain(note)}" for note in notes)


def _advice(answers: Sequence[Estimate]) -> Iterator[str]:
    from memplan.report.advice import cards, help_line

    for answer in answers:
        line = help_line(answer)
        if line:
            yield ""
            yield plain(f"{answer.run.gpu}: {line}" if len(answers) > 1 else line)
        for title, by_size in cards(answer):
            yield ""
            yield plain(f"{title}:" if by_size else title)
            yield ""
            yield from (f"- {size}: {plain(', '.join(names))}" for size, names in by_size.items())


def _categories(answer: Estimate) -> Iterator[str]:
    used = answer.bytes.used
    rows = [(p.label, words.hundredths(p.bytes), words.share(p.bytes, used), p.largest) for p in words.parts(answer)]
    rows.append(("**used**", f"**{words.hundredths(used)}**", "**100.0%**", "as nvidia-smi shows it"))
    return table(("at the peak", "GiB", "share", "largest"), rows, "lrrl")


def _phases(answer: Estimate) -> Iterator[str]:
    return table(("phase", "step 1, GiB", "later, GiB", "largest at"), words.phase_cells(answer), "lrrl")


def _ledger(answer: Estimate) -> Iterator[str]:
    rows = [
        (
            *(f"{x.bytes:,}", str(x.count), x.what, x.kind, x.where),
            *(words.shape(x), words.dtype(x), x.why, x.source, x.basis),
        )
        for x in answer.ledger
    ]
    total = f"**{sum(x.bytes for x in answer.ledger):,}**"
    rows.append((total, "", "**allocated**", "", "", "", "", "", "", ""))
    titles = ("bytes", "n", "tensor", "kind", "where", "shape", "dtype", "why", "source", "basis")
    return table(titles, rows, "rrllllllll")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> Iterator[str]:
    yield f"| {' | '.join(titles)} |"
    yield "|" + "|".join("---:" if side == "r" else "---" for side in align.replace(" ", "")) + "|"
    for row in rows:
        yield f"| {' | '.join(map(plain, row))} |"


def plain(text: str) -> str:
    """Escape characters that would end a table cell or start emphasis."""
    for sign in "\\`[|_":
        text = text.replace(sign, f"\\{sign}")
    return text.replace("<", "&lt;")
