"""The chart of docs/accuracy.md: what other people measured, against memplan's answer for the same run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import log10
from pathlib import Path

from memplan.core.units import GIB
from memplan.report import svg
from memplan.report.markup import Markup, element

Pair = tuple[str, int, int]  # a run's name, the bytes measured, and memplan's
_SIZE, _LEFT, _TOP, _RIGHT = 420, 64, 46, 250  # of the square, and the room left, above and right of it
_MARKS = ("1", "2", "5")


def chart(groups: Mapping[str, Sequence[Pair]]) -> str:
    """Return the chart. The kinds of groups are those of the palette of reports."""
    pairs = [pair for group in groups.values() for pair in group]
    low, high = min(min(p[1:]) for p in pairs) * 0.8, max(max(p[1:]) for p in pairs) * 1.25

    def at(n: float) -> float:
        return _SIZE * (log10(n) - log10(low)) / (log10(high) - log10(low))

    def x(n: float) -> float:
        return round(_LEFT + at(n), 1)

    def y(n: float) -> float:
        return round(_TOP + _SIZE - at(n), 1)

    title = f"Memory of {len(pairs)} runs: what people measured, and what memplan says"
    drawn = [element("text", title, x=16, y=24, class_="strong")]
    corners = [(low, low * 0.9), (low, low * 1.1), (high, high * 1.1), (high, high * 0.9)]
    clip = element("rect", x=_LEFT, y=_TOP, width=_SIZE, height=_SIZE)
    drawn.append(element("clipPath", clip, id="square"))
    inside = [element("polygon", points=" ".join(f"{x(a)},{y(b)}" for a, b in corners), class_="free")]
    inside.append(element("line", x1=x(low), x2=x(high), y1=y(low), y2=y(high), class_="mark"))
    for kind, group in reversed([*zip(_KINDS, groups.values(), strict=True)]):  # the largest group is below the others
        for name, measured, answered in group:
            text = f"{name}: measured {measured / GIB:.2f} GiB, memplan {answered / GIB:.2f} GiB"
            at_run = {"cx": x(measured), "cy": y(answered), "r": 4, "class_": f"dot {kind}"}
            inside.append(element("circle", element("title", text), **at_run))
    drawn += _axes(low, high, x, y)
    drawn.append(element("g", *inside, clip_path="url(#square)"))
    for n, (kind, (name, group)) in enumerate(zip(_KINDS, groups.items(), strict=True)):
        top = _TOP + 14 + 40 * n
        drawn.append(element("circle", cx=_LEFT + _SIZE + 24, cy=top - 4, r=5, class_=f"dot {kind}"))
        drawn.append(element("text", name, x=_LEFT + _SIZE + 38, y=top, class_="strong"))
        drawn.append(element("text", f"{len(group)} runs", x=_LEFT + _SIZE + 38, y=top + 16, class_="soft"))
    for n, text in enumerate(("On the line: exactly right.", "In the band: within 10 %.")):
        drawn.append(element("text", text, x=_LEFT + _SIZE + 24, y=_TOP + _SIZE - 20 + 18 * n, class_="soft"))
    width, height = _LEFT + _SIZE + _RIGHT, _TOP + _SIZE + 56
    style = (Path(svg.__file__).parent / "style" / "palette.css").read_text("utf-8") + _STYLE
    ground = element("rect", width=width, height=height, class_="backdrop")
    parts = (element("title", title), element("style", Markup(style)), ground, *drawn)
    size = {"width": width, "height": height, "viewBox": f"0 0 {width} {height}"}
    return element("svg", *parts, xmlns="http://www.w3.org/2000/svg", role="img", **size) + "\n"


_KINDS = ("parameter", "activation", "temp")
_STYLE = "svg .dot { fill: var(--kind); fill-opacity: .55; stroke: var(--kind) }\n"


def _axes(low: float, high: float, x: Callable[[float], float], y: Callable[[float], float]) -> Iterator[Markup]:
    numbers = [int(mark) * 10**power for power in range(4) for mark in _MARKS]
    for n in (n for n in numbers if low <= n * GIB <= high):
        yield element("line", x1=x(n * GIB), x2=x(n * GIB), y1=_TOP, y2=_TOP + _SIZE, class_="rule")
        yield element("line", x1=_LEFT, x2=_LEFT + _SIZE, y1=y(n * GIB), y2=y(n * GIB), class_="rule")
        yield element("text", str(n), x=x(n * GIB), y=_TOP + _SIZE + 18, text_anchor="middle", class_="soft")
        yield element("text", str(n), x=_LEFT - 8, y=y(n * GIB) + 4, text_anchor="end", class_="soft")
    yield element("text", "GiB measured", x=_LEFT + _SIZE / 2, y=_TOP + _SIZE + 38, text_anchor="middle")
    middle = _TOP + _SIZE / 2
    turned = f"rotate(-90 22 {middle})"
    yield element("text", "GiB by memplan", x=22, y=middle, text_anchor="middle", transform=turned)
