"""Drawings of the used memory and of the step, as SVG: in an HTML page, or as a file of their own.

Positions across are shares of the width, and heights and letters are pixels, so that a drawing is as legible on a phone
as on a wide screen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, groupby
from pathlib import Path

from memplan.core.records import NamedTuple
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate, Phase
from memplan.report import assumptions as assumptions_
from memplan.report import wording as words
from memplan.report.markup import Markup, element, joined
from memplan.report.stamp import Stamp

_WIDTH = 960  # of a file
_LETTER = 7.0  # pixels, about, of a letter
_ROW, _BAR = 74, 24  # height of a run's row, and of its bar
Labelled = tuple[str, Estimate]  # a run's name in a drawing; empty for the only one


def render(answers: Sequence[Estimate], explain: bool = False, ranks: bool = False, stamp: Stamp | None = None) -> str:
    """Return the bars of the answers, and the timeline of the first, as a file."""
    del explain, ranks
    named = [*zip(assumptions_.names(answers), answers, strict=True)]
    return page("; ".join((assumptions_.title(answers), *words.left_out(answers))), named, stamp)


def page(title: str, runs: Sequence[Labelled], stamp: Stamp | None = None) -> str:
    """Return the bars of runs, and the timeline of the first, as a file."""
    (label, first), *_ = runs
    through = element("text", f"{label}, through the step" if label else "Through the step", x=0, y=12, class_="strong")
    drawn, y = [element("text", title, x=0, y=18, class_="strong")], 34
    for part, tall in ((bars(runs), height(runs)), *_legend(runs), (through, 20), (timeline(first), HEIGHT)):
        drawn.append(element("svg", part, y=y, width="100%", height=tall))
        y += tall
    drawn.append(element("text", (stamp or Stamp()).line, x=0, y=y + 12, class_="soft"))
    style = (Path(__file__).parent / "style" / "palette.css").read_text("utf-8")
    size = {"width": _WIDTH + 40, "height": y + 40, "viewBox": f"-20 -16 {_WIDTH + 40} {y + 40}"}
    ground = element("rect", x=-20, y=-16, width=_WIDTH + 40, height=y + 40, class_="backdrop")
    inner = element("svg", *drawn, width=_WIDTH, height=y + 20, overflow="visible")
    parts = (element("title", title), element("style", Markup(style)), ground, inner)
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", **size) + "\n"


def _legend(runs: Sequence[Labelled]) -> Iterator[tuple[Markup, int]]:
    """Yield the names of the parts with their colours, in lines of a file's width, and the height."""
    out: list[Markup] = []
    x, y = 0.0, 12
    for key, label in parts_of([answer for _, answer in runs]).items():
        width = 30 + _LETTER * len(label)
        if x + width > _WIDTH:
            x, y = 0.0, y + 20
        out.append(element("rect", x=x, y=y - 10, width=11, height=11, rx=2, class_=f"piece {key}"))
        out.append(element("text", label, x=x + 16, y=y))
        x += width
    yield joined(*out), y + 24


def parts_of(answers: Sequence[Estimate]) -> dict[str, str]:
    """Return the label of every part that the bars of the answers have, by its key."""
    present = {part.key: part.label for answer in answers for part in words.parts(answer)}
    return {key: present[key] for key in (*words.CATEGORIES, "allocator", "context") if key in present}


def bars(runs: Sequence[Labelled]) -> Markup:
    """Return a bar per run, to one scale: the parts of its used memory, where the card ends, and the band below."""
    answers = [answer for _, answer in runs]
    full = max(max(a.band.high, a.bytes.used, a.gpu.usable if a.gpu else 0) for a in answers)
    return joined(*(part for n, run in enumerate(runs) for part in _bar(*run, n * _ROW, full)))


def height(runs: Sequence[Labelled]) -> int:
    """Return the height of the bars of runs, in pixels."""
    return _ROW * len(runs)


def verdict_class(verdict: str | None) -> str:
    """Return the class of a verdict, which gives it its colour."""
    return {"fits": "fits", "tight": "tight", None: ""}.get(verdict, "nofit")


def _bar(label: str, answer: Estimate, top: int, full: int) -> Iterator[Markup]:
    def at(n: int) -> str:
        return f"{100 * n / full:.2f}%"

    usable, used = answer.gpu.usable if answer.gpu else None, answer.bytes.used
    verdict, of = answer.verdict.answer, f" of {words.tenths(usable)}" if usable else ""
    state = f"{words.tenths(used)}{of} GiB"
    told = (f"{verdict}: {state}" if verdict else state) if label else verdict or ""
    yield element("text", label or state, x=0, y=top + 12, class_="strong")
    at_end = {"x": "100%", "y": top + 12, "text_anchor": "end", "class_": verdict_class(verdict) or "strong"}
    yield element("text", told, **at_end)
    y, reached = top + 18, 0
    if usable:
        yield element("rect", x=0, y=y, width=at(usable), height=_BAR, class_="free")
    for part in words.parts(answer):
        tip = element("title", f"{part.label}: {words.hundredths(part.bytes)} GiB ({words.share(part.bytes, used)})")
        text = f"{part.label} {words.tenths(part.bytes)}"
        box = {"x": at(reached), "y": y, "width": at(part.bytes), "height": _BAR}
        yield element("g", tip, element("rect", **box, class_=f"piece {part.key}"))
        if part.bytes / full * _WIDTH > _LETTER * (len(text) + 1):
            yield element("svg", element("text", text, x=6, y=16, class_="on"), **box)
        reached += part.bytes
    low, high = at(answer.band.low), at(answer.band.high)
    for x1, x2, y1, y2 in ((low, high, 4, 4), (low, low, 1, 7), (high, high, 1, 7)):
        yield element("line", x1=x1, x2=x2, y1=y + _BAR + y1, y2=y + _BAR + y2, class_="mark")
    if usable:
        yield element("line", x1=at(usable), x2=at(usable), y1=y - 3, y2=y + _BAR + 3, class_="end")
    to_left = answer.band.high > full / 2
    anchor = {"x": high if to_left else low, "text_anchor": "end" if to_left else None}
    yield element("text", words.band(answer), y=y + _BAR + 19, class_="soft", **anchor)


# --- the timeline ------------------------------------------------------------------------------------------

_TOP, _PLOT, HEIGHT = 18, 190, 236  # the plot's y and height, and the height of the drawing
_SKIP = 4.0  # share of the width that layers without moments of their own take, in percent
_NARROWEST = 11.0  # share of the width of a phase, in percent, so that its name has room
MOST_DRAWN = 500  # moments drawn


class Drawn(NamedTuple):
    """A moment of the timeline, and from where to where it is drawn, in percent of the width."""

    phase: str
    where: str
    kinds: Mapping[str, int]
    start: float = 0.0
    end: float = 0.0

    @property
    def bytes(self) -> int:
        return sum(self.kinds.values())


def drawn_moments(answer: Estimate, most: int = MOST_DRAWN) -> list[Drawn]:
    """Return the moments of the step from left to right, at most about `most`: of neighbours those that take most."""
    both = zip(answer.timeline, answer.timeline_kinds, strict=True)
    every = [Drawn(phase.phase, phase.where, kinds) for phase, kinds in both]
    by_phase = [list(group) for _, group in groupby(every, key=lambda moment: moment.phase)]
    bins = max(1, -(-len(every) // most))
    phases = [[max(g[i : i + bins], key=lambda m: m.bytes) for i in range(0, len(g), bins)] for g in by_phase]
    kept = [(m, i > 0 and _skips(group[i - 1], m)) for group in phases for i, m in enumerate(group)]
    count = sum(len(group) for group in phases)
    weights = {id(m): max(1.0, count * _NARROWEST / 100 / len(group)) for group in phases for m in group}
    room = 100 - _SKIP * sum(skips for _, skips in kept)
    scale, x = room / sum(weights.values()), 0.0
    out: list[Drawn] = []
    for moment, skips in kept:
        start = x + _SKIP * skips
        x = start + scale * weights[id(moment)]
        out.append(moment._replace(start=start, end=x))
    return out


def _skips(before: Drawn, moment: Drawn) -> bool:
    """Whether there are layers between two moments, equal to those before, of which no moment is listed."""
    layers = [re.search(r"\.(\d+)\.", place.where) for place in (before, moment)]
    numbers = [int(match[1]) for match in layers if match]
    return len(numbers) == 2 and abs(numbers[1] - numbers[0]) > 1


def extent(answer: Estimate) -> int:
    """Return the bytes at the top of the timeline: its peak, or the card's end if that is not far above."""
    peak = max(moment.peak for moment in answer.timeline)
    usable = answer.gpu.usable if answer.gpu else 0
    return max(peak, usable if usable < 2 * peak else 0) * 21 // 20


def timeline(answer: Estimate, full: int = 0, moments: Sequence[Drawn] = ()) -> Markup:
    """Return the bytes allocated through the step, stacked by category, with the peak and where the card ends.

    full     the bytes at the top, for drawings to one scale
    moments  those of `drawn_moments`, if made already
    """
    moments = moments or drawn_moments(answer)
    top = max(moments, key=lambda moment: moment.bytes)
    usable = answer.gpu.usable if answer.gpu else 0
    full = full or extent(answer)
    shows_card = 0 < usable < full

    def y(n: int) -> float:
        return _TOP + _PLOT * (1 - n / full)

    def across(n: int, name: str) -> Markup:
        return element("line", x1=0, x2="100%", y1=y(n), y2=y(n), class_=name)

    ticks = [n for n in _ticks(full) if not shows_card or abs(y(n) - y(usable)) > _LETTER * 2]
    out = [across(n, "rule") for n in ticks]
    areas = (element("path", d=d, class_=f"area {key}") for key, d in _areas(moments, full))
    out.append(
        element("svg", *areas, y=_TOP, width="100%", height=_PLOT, viewBox="0 0 1000 1000", preserveAspectRatio="none")
    )
    out += [element("text", f"{n / GIB:g} GiB", x=2, y=y(n) - 4, class_="soft halo") for n in ticks[1:]]
    out += _phase_names(moments)
    if shows_card:
        out.append(across(usable, "limit"))
        text = f"usable {words.tenths(usable)} GiB"
        out.append(element("text", text, x="100%", y=y(usable) - 4, text_anchor="end", class_="nofit halo"))
    out.append(element("line", x1=0, x2=0, y1=_TOP, y2=_TOP + _PLOT, class_="cursor", style="visibility:hidden"))
    x = (top.start + top.end) / 2
    anchor = "start" if x < 20 else "end" if x > 80 else "middle"
    above = y(top.bytes) - 9 if y(top.bytes) > _TOP + 4 else y(top.bytes) + 20
    out.append(element("circle", cx=f"{x:.2f}%", cy=y(top.bytes), r=4, class_="top"))
    text = f"peak {words.hundredths(top.bytes)} GiB"
    out.append(element("text", text, x=f"{x:.2f}%", y=above, text_anchor=anchor, class_="strong halo"))
    return joined(*out)


def _areas(moments: Sequence[Drawn], full: int) -> Iterator[tuple[str, str]]:
    """Yield each category and its path, the highest of the stack first: each covers what is below it, too."""
    kinds = [kind for kind in words.CATEGORIES if any(moment.kinds.get(kind) for moment in moments)]
    stacked = [[*accumulate(moment.kinds.get(kind, 0) for kind in kinds)] for moment in moments]
    across = [(f"L{10 * moment.start:.1f} ", f"H{10 * moment.end:.1f}") for moment in moments]
    for n in reversed(range(len(kinds))):
        steps = (
            f"{start}{1000 * (1 - below[n] / full):.1f}{end}"
            for (start, end), below in zip(across, stacked, strict=True)
        )
        yield kinds[n], f"M0 1000{''.join(steps)}V1000Z"


def _phase_names(moments: Sequence[Drawn]) -> Iterator[Markup]:
    for phase, group in groupby(moments, key=lambda moment: moment.phase):
        each = list(group)
        start, end = each[0].start, each[-1].end
        if start:
            x = f"{start:.2f}%"
            yield element("line", x1=x, x2=x, y1=_TOP, y2=_TOP + _PLOT + 6, class_="mark")
        text = {"x": f"{(start + end) / 2:.2f}%", "y": _TOP + _PLOT + 18, "text_anchor": "middle"}
        yield element("text", phase, class_="soft", **text)


def _ticks(full: int) -> list[int]:
    """Return about five round numbers of GiB below `full`."""
    step = GIB // 8
    while full // step > 6:
        step *= 2
    return list(range(0, full, step))


def moment_name(phase: Phase | Drawn) -> str:
    """Return a moment's name: "backward, loss.log_softmax"."""
    return f"{phase.phase}, {phase.where}" if phase.where else phase.phase
