"""A memory snapshot as text, markdown, JSON or a page: its timeline, what was live at the peak, fragmentation."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence

from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.units import gib
from memplan.estimate.answer import Estimate
from memplan.explain.history import History, LineMatch, LiveGroup
from memplan.explain.snapshot import SnapshotSegment
from memplan.report.blocks import Block, Column, Drawing, Facts, Heading, Notes, Styled, Table, Text
from memplan.report.display import display
from memplan.report.markdown import page
from memplan.report.markup import Markup, element
from memplan.report.stamp import Stamp
from memplan.report.text import Screen

FORMATS = ("table", "json", "markdown", "html")
_MOST = 12  # rows of a table
_BARS = "▁▂▃▄▅▆▇█"
_HEIGHT = 200  # pixels of a page's drawing
_DRAWN = 1000  # points of it


def render(
    format: str, history: History, answer: Estimate | None, to: Screen, failure: str = "", stamp: Stamp | None = None
) -> str:
    """Return what a snapshot tells in one of `FORMATS`, next to the run's estimate if there is one.

    failure  what asked, as text, if the history ends in an out-of-memory event
    """
    match format:
        case "json":
            return json.dumps(as_dict(history, answer), indent=2, ensure_ascii=False) + "\n"
        case "markdown":
            return page(_blocks(history, answer, failure))
        case "html":
            from memplan.report import html

            title = f"Memory of device {history.snapshot.device}: peak {gib(history.peak)}"
            first, _, *rest = _blocks(history, answer, failure)
            return html.page(title, (first, _figure(history, answer), *rest), stamp)
        case _:
            return display(_blocks(history, answer, failure), to)


def _blocks(history: History, answer: Estimate | None, failure: str) -> Iterator[Block]:
    events = f"{len(history.snapshot):,} events"
    predicted = f", predicted {gib(answer.bytes.allocated)}" if answer else ""
    head = f"Device {history.snapshot.device}: peak {gib(history.peak)} allocated{predicted}"
    yield Text(f"{head}; {gib(history.end)} at the end, {gib(history.reserved)} reserved; {events}", "bold", "")

    def draw(to: Screen) -> Iterator[list[Styled]]:
        return _sparkline(history, to)

    yield Drawing(draw)
    if failure:
        yield Heading("What asked", "")
        yield Text(failure, indent="")
    yield Heading("Live at the peak, by place", "")
    yield Table(_GROUPS, _cut(history.groups))
    if answer is not None:
        matches, rest = history.matches(answer)
        found = sum(match.found * match.unit for match in matches)
        yield Heading("The estimate's tensors", "")
        yield Text(f"{gib(found)} of the peak are tensors that the estimate has", indent="")
        yield Table(_MATCHES, matches[:_MOST])
        if rest:
            yield Heading("Not predicted", "")
            yield Table(_GROUPS, _cut(rest))
    fragmented = history.fragmented()
    free = sum(segment.size - segment.live for segment in fragmented)
    yield Heading("Fragmentation at the end", "")
    yield Facts("", [("in use  ", gib(history.end)), ("reserved", gib(history.reserved)), ("in pieces", gib(free))])
    if fragmented:
        shapes = Counter(_shape(segment) for segment in fragmented)
        yield Table(_SEGMENTS, [*shapes.items()][:_MOST])
    notes = (
        [f"PYTORCH_CUDA_ALLOC_CONF={printable(history.snapshot.settings, 200)}"] if history.snapshot.settings else []
    )
    if history.start:
        kept = "torch keeps a limited number of events"
        notes.append(f"{gib(history.start)} were allocated before the history begins: {kept}.")
    if notes:
        yield Notes(notes)


def _cut(groups: Sequence[LiveGroup]) -> list[LiveGroup]:
    """Return the largest groups, and all others as one."""
    first, rest = list(groups[:_MOST]), groups[_MOST:]
    if rest:
        sizes = sum(group.bytes for group in rest)
        first.append(LiveGroup(f"{len(rest):,} other places", "", sizes, sum(group.count for group in rest), ()))
    return first


def _sparkline(history: History, to: Screen) -> Iterator[list[Styled]]:
    levels = history.buckets(min(to.width - 2, 96))
    top = max(history.peak, 1)
    if to.plain:
        yield [(f"from {gib(history.start)} to {gib(history.peak)} at event {history.peak_at:,}", "")]
        return
    yield [("".join(_BARS[min(7, level * 8 // (top + 1))] for level in levels), "green")]


_GROUPS: list[Column[LiveGroup]] = [
    Column("bytes", lambda group: gib(group.bytes), right=True),
    Column("tensors", lambda group: f"{group.count:,}", right=True),
    Column("place", lambda group: group.place, wraps=True),
    Column("operation", lambda group: group.words, optional=True, style="dim"),
]
_MATCHES: list[Column[LineMatch]] = [
    Column("predicted", lambda match: gib(match.line.bytes), right=True),
    Column("found", lambda match: gib(match.found * match.unit), right=True),
    Column("tensors", lambda match: f"{match.found:,} of {match.line.count:,}", right=True),
    Column("tensor", lambda match: f"{match.line.where} {match.line.what}".strip(), wraps=True),
]


class _Shape(NamedTuple):
    """The facts of a segment that a row shows; equal ones are one row."""

    size: int
    live: int
    blocks: int
    largest: int
    kind: str


def _shape(segment: SnapshotSegment) -> _Shape:
    free = [block.size for block in segment.blocks if not block.is_live]
    kind = "small" if segment.is_small else "expandable" if segment.is_expandable else ""
    return _Shape(segment.size, segment.live, len(free), max(free, default=0), kind)


_SEGMENTS: list[Column[tuple[_Shape, int]]] = [
    Column("segments", lambda row: f"{row[1]:,}", right=True),
    Column("of", lambda row: gib(row[0].size), right=True),
    Column("in use", lambda row: gib(row[0].live), right=True),
    Column("free blocks", lambda row: f"{row[0].blocks:,}", right=True),
    Column("largest free", lambda row: gib(row[0].largest), right=True),
    Column("", lambda row: row[0].kind),
]


def _figure(history: History, answer: Estimate | None) -> Markup:
    """Return a drawing of the timeline, with the predicted one over it."""
    top = max(history.peak, answer.bytes.allocated if answer else 0, 1)

    def line(levels: Sequence[int]) -> str:
        last = max(len(levels) - 1, 1)
        return " ".join(
            f"{1000 * n / last:.1f},{_HEIGHT - _HEIGHT * level / top:.1f}" for n, level in enumerate(levels)
        )

    measured = line(history.buckets(_DRAWN))
    lines = [element("polyline", points=measured, fill="none", stroke="currentColor", stroke_width=1)]
    told = f"Measured: {len(history.levels):,} allocations and frees; peak {gib(history.peak)}."
    if answer is not None:
        predicted = [moment.peak for moment in answer.timeline]
        step = max(1, len(predicted) // _DRAWN)
        points = line([max(predicted[i : i + step]) for i in range(0, len(predicted), step)])
        lines.append(element("polyline", points=points, fill="none", stroke="#d33", stroke_width=1.5))
        told += f" Red: the predicted step, stretched over the width; peak {gib(answer.bytes.allocated)}."
    size = {"viewBox": f"0 0 1000 {_HEIGHT}", "height": _HEIGHT, "width": "100%"}
    drawn = element("svg", *lines, preserveAspectRatio="none", role="img", aria_label=told, **size)
    return element("figure", drawn, element("figcaption", told))


def as_dict(history: History, answer: Estimate | None) -> dict[str, object]:
    """Return what a snapshot tells as JSON has it."""
    matches, rest = history.matches(answer) if answer else ([], [])
    groups = [{"place": g.place, "operation": g.words, "bytes": g.bytes, "tensors": g.count} for g in history.groups]
    unpredicted = [{"place": g.place, "bytes": g.bytes, "tensors": g.count} for g in rest]
    return {
        "device": history.snapshot.device,
        "events": len(history.snapshot),
        "peak": history.peak,
        "peak_at": history.peak_at,
        "start": history.start,
        "end": history.end,
        "reserved": history.reserved,
        "timeline": history.buckets(200),
        "live": groups,
        "predicted": answer.bytes.allocated if answer else None,
        "matched": [
            {"what": m.line.what, "where": m.line.where, "bytes": m.line.bytes, "count": m.line.count, "found": m.found}
            for m in matches
        ],
        "unpredicted": unpredicted,
        "out_of_memory": [failed._asdict() for failed in history.failed],
        "segments": [
            {"bytes": segment.size, "in_use": segment.live, "blocks": len(segment.blocks)}
            for segment in history.fragmented()
        ],
    }
