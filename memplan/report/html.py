"""HTML reports: one self-contained file, light or dark, with the bar and the timeline as inline SVG, and tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby, pairwise
from typing import Any

from memplan.core.records import NamedTuple
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate, Phase
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.blocks import Column, Table

_STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --soft: #667085; --line: #d5d9e2; --page: #ffffff;
  --parameter: #3b6fd4; --gradient: #b0489f; --optstate: #1f97a6; --activation: #3f9b4f; --temp: #d79b1b;
  --buffer: #7d8aa5; --other: #c4533e; --allocator: #a7aebd; --context: #7b8190;
  --fits: #2c8a43; --tight: #a8740c; --nofit: #bf3a2b }
@media (prefers-color-scheme: dark) { :root { --text: #e4e8f1; --soft: #98a2b8; --line: #394152; --page: #151a23;
  --parameter: #6f9bf0; --gradient: #d07cc2; --optstate: #4cc0cf; --activation: #6cc47c; --temp: #e6b548;
  --buffer: #9aa6bf; --other: #e07d69; --allocator: #6b7385; --context: #525a6b;
  --fits: #62c57a; --tight: #e0ae4a; --nofit: #ef7f70 } }
body { margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: var(--text); background: var(--page);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.4rem } h2 { font-size: 1.05rem; margin-top: 2rem }
.fits { color: var(--fits) } .tight { color: var(--tight) } .nofit { color: var(--nofit) } .soft { color: var(--soft) }
table { border-collapse: collapse; margin: .6rem 0; display: block; overflow-x: auto }
th, td { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
tr.sum td { font-weight: 600 } svg { width: 100%; height: auto; display: block } svg text { fill: var(--soft);
  font: 12px system-ui, sans-serif } i { display: inline-block; width: .8rem; height: .8rem; margin-right: .4rem }
"""
_PAGE_WIDTH = 960


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False) -> str:
    title = escape(f"memplan: {assumptions_.question(answers[0])}")
    body = "\n".join(_page(answers, explain, ranks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n{body}\n</body>\n</html>\n"
    )


def _page(answers: Sequence[Estimate], explain: bool, ranks: bool) -> Iterator[str]:
    for answer in answers:
        yield "<section>"
        yield f'<p class="{_class(answer)}"><strong>{escape(words.verdict(answer))}</strong></p>'
        yield bar(answer)
        yield f"<p>{escape(words.summary(answer))}</p>"
        yield from _advice(answer)
        yield "<h2>At the peak</h2>"
        yield _table(_parts(answer), sum_last=True)
        yield "<h2>By phase</h2>"
        yield _table(words.phase_table(answer))
        if answer.serving is not None:
            from memplan.report.serving import pool

            yield "<h2>Keys and values</h2>"
            yield _pairs(pool(answer))
        yield "<h2>The step</h2>"
        yield timeline(answer)
        yield (
            '<p class="soft">Every moment just before memory falls, in later steps if they differ from the first. Only '
            "the first and the last of consecutive equal layers are drawn.</p>"
        )
        if ranks and answer.ranks:
            yield f"<h2>{escape(words.ranks_title(answer))}</h2>"
            yield _table(words.ranks_table(answer), aligned=False)
        if explain:
            yield "<h2>Alive at the peak</h2>"
            yield _table(words.ledger_table(answer), sum_last=True)
        yield "</section>"
    yield "<h2>Assumed</h2>"
    yield _pairs(assumptions_.assumptions(answers[0]))
    notes = words.notes(answers)
    if notes:
        yield "<h2>Notes</h2><ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _advice(answer: Estimate) -> Iterator[str]:
    from memplan.report.next_steps import cards, help_line

    line = help_line(answer)
    if line:
        yield f"<p>{escape(line)}</p>"
    for title, by_size in cards(answer):
        yield f"<p>{escape(title)}</p>"
        yield _pairs([(str(size), ", ".join(names)) for size, names in by_size.items()], numbers=True)


def _class(answer: Estimate) -> str:
    verdict = answer.verdict.answer or ""
    return "nofit" if verdict.startswith("does not") else verdict


def bar(answer: Estimate) -> str:
    """Return the bar: the parts of the used memory, a line where the card ends, and the band below."""
    usable = answer.gpu.usable if answer.gpu else None
    full = max(answer.band.high, answer.bytes.used, usable or 0)

    def x(n: int) -> float:
        return round(n * (_PAGE_WIDTH - 2) / full, 1) + 1

    out = [f'<svg viewBox="0 0 {_PAGE_WIDTH} 74" role="img" aria-label="{escape(words.verdict(answer))}">']
    out.append(f'<rect x="1" y="6" width="{_PAGE_WIDTH - 2}" height="30" fill="none" stroke="var(--line)"/>')
    reached = 0
    for part in words.parts(answer):
        tooltip = escape(f"{part.label} {words.hundredths(part.bytes)} GiB")
        out.append(
            f'<rect x="{x(reached)}" y="6" width="{x(reached + part.bytes) - x(reached):.1f}" height="30" '
            f'fill="var(--{part.key})"><title>{tooltip}</title></rect>'
        )
        reached += part.bytes
    low, high = x(answer.band.low), x(answer.band.high)
    out.append(f'<path d="M{low} 42v8M{low} 46H{high}M{high} 42v8" stroke="var(--soft)" fill="none"/>')
    anchor, at = ("end", high) if high > _PAGE_WIDTH / 2 else ("start", low)
    out.append(f'<text x="{at}" y="66" text-anchor="{anchor}">{escape(words.band(answer))}</text>')
    if usable is not None:
        out.append(f'<path d="M{x(usable)} 0V42" stroke="var(--text)" stroke-width="2"/>')
    return "\n".join([*out, "</svg>"])


class _Span(NamedTuple):
    """Consecutive moments of one phase without skipped layers, and where on the page they start and end."""

    phase: str
    moments: list[Phase]
    start: float = 0.0
    end: float = 0.0


def _spans(moments: Iterable[Phase]) -> list[_Span]:
    """Split the moments at changes of phase and skipped layers, and lay them out from left to right."""
    spans: list[_Span] = []
    previous = None
    for moment in moments:
        match = re.search(r"\.(\d+)\.", moment.where)
        layer = int(match[1]) if match else None
        is_skip = previous is not None and layer is not None and abs(layer - previous) > 1
        if not spans or spans[-1].phase != moment.phase or is_skip:
            spans.append(_Span(moment.phase, []))
        spans[-1].moments.append(moment)
        previous = layer
    skips = [before.phase == span.phase for before, span in pairwise(spans)]
    least = sum(len(span.moments) for span in spans) / 18  # leaves room for the name of a phase with one moment
    shares = [max(least, len(span.moments)) for span in spans]
    room = _PAGE_WIDTH - _LEFT - _SKIP * sum(skips)
    out: list[_Span] = []
    x = float(_LEFT)
    for span, share, skipped in zip(spans, shares, [False, *skips], strict=True):
        x += _SKIP * skipped
        end = x + room * share / sum(shares)
        out.append(span._replace(start=x, end=end))
        x = end
    return out


_LEFT, _SKIP, _BASE = 40, 16, 200  # timeline: x of the axis, gap for skipped layers, y of the base line


def timeline(answer: Estimate) -> str:
    """Return the timeline of allocated bytes; the card is a dashed line, and skipped layers are slopes."""
    spans = _spans(answer.timeline)
    most = max(moment.peak for moment in answer.timeline)
    usable = answer.gpu.usable if answer.gpu else 0
    full = max(most, usable if usable < 2 * most else 0) * 21 // 20

    def y(n: int) -> float:
        return round(_BASE - n * (_BASE - 8) / full, 1)

    out = [f'<svg viewBox="0 0 {_PAGE_WIDTH} {_BASE + 24}" role="img" aria-label="memory through the step">']
    for n in _ticks(full):
        out.append(f'<path d="M{_LEFT} {y(n)}H{_PAGE_WIDTH}" stroke="var(--line)" fill="none"/>')
        out.append(f'<text x="{_LEFT - 6}" y="{y(n) + 4}" text-anchor="end">{n / GIB:g}</text>')
    line = ""
    for span in spans:
        width = (span.end - span.start) / len(span.moments)
        for i, moment in enumerate(span.moments):
            left = span.start + i * width
            line += f"{'L' if line else 'M'}{left:.1f} {y(moment.peak)}H{left + width:.1f}"
    out.append(f'<path d="{line}V{_BASE}H{_LEFT}Z" fill="var(--parameter)" opacity=".25"/>')
    out.append(f'<path d="{line}" stroke="var(--parameter)" stroke-width="1.5" fill="none"/>')
    for phase, group in groupby(spans, key=lambda span: span.phase):
        ends = list(group)
        middle = (ends[0].start + ends[-1].end) / 2
        if ends[0] is not spans[0]:
            out.append(f'<path d="M{ends[0].start:.1f} 0V{_BASE + 20}" stroke="var(--soft)" opacity=".5"/>')
        out.append(f'<text x="{middle:.1f}" y="{_BASE + 16}" text-anchor="middle">{escape(phase)}</text>')
    if usable and usable <= full:
        dashes = 'stroke="var(--nofit)" stroke-dasharray="5 4" fill="none"'
        out.append(f'<path d="M{_LEFT} {y(usable)}H{_PAGE_WIDTH}" {dashes}><title>usable memory</title></path>')
    return "\n".join([*out, "</svg>"])


def _ticks(full: int) -> list[int]:
    """Return about five round numbers of GiB below `full`."""
    step = GIB // 8
    while full // step > 6:
        step *= 2
    return list(range(0, full, step))


def _parts(answer: Estimate) -> Table[words.MemoryPart]:
    """Return the parts of the used memory, each behind its colour in the bar."""
    table = words.part_table(answer)
    marked: Column[words.MemoryPart] = Column("", lambda part: f"\0{part.key}\0{part.label}")
    return Table([marked, *table.columns[1:]], table.rows)


def _table(table: Table[Any], sum_last: bool = False, aligned: bool = True) -> str:
    """Return a table; numbers may be aligned to the right, and the last row may be a sum."""
    columns = [column for column in table.columns if column.title != "kind"]  # the bar and its table show the kinds
    rows = [[text for text, _ in row] for row in Table(columns, table.rows).cells()]
    right = [aligned and column.right for column in columns]
    return _rows([column.title for column in columns], rows, right, len(rows) - 1 if sum_last else -1)


def _pairs(rows: Sequence[tuple[str, str]], numbers: bool = False) -> str:
    return _rows(("", ""), rows, (numbers, False))


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool], last: int = -1) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        both = zip(cells, right, strict=True)
        return "".join(f"<{tag}{' class=n' if is_right else ''}>{_cell(cell)}</{tag}>" for cell, is_right in both)

    head = [f"<tr>{row(titles, 'th')}</tr>"] if any(titles) else []
    body = [f"<tr{' class=sum' if i == last else ''}>{row(r, 'td')}</tr>" for i, r in enumerate(rows)]
    return "\n".join(["<table>", *head, *body, "</table>"])


def _cell(text: str) -> str:
    """Escape text; a category between two leading NULs becomes a colour mark in front of it."""
    _, key, rest = text.split("\0") if text.startswith("\0") else ("", "", text)
    return (f'<i style="background:var(--{key})"></i>' if key else "") + escape(rest)
