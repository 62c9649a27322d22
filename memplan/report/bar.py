"""The bar of used memory: its parts one after the other, a line where the card ends, and the band below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from memplan.estimate.answer import Estimate
from memplan.report.blocks import Styled
from memplan.report.text import Screen
from memplan.report.wording import tenths

# Each part's letter, which is shown without colour, and its colour.
MARKS = {
    "weights": ("W", "blue"),
    "gradients": ("G", "magenta"),
    "optimizer": ("O", "cyan"),
    "loss": ("L", "yellow"),
    "logits": ("L", "yellow"),
    "kv": ("K", "magenta"),
    "activations": ("A", "green"),
    "context": ("c", "bright_black"),
}
_REST = {"": (" ", ""), "free": ("·", "dim"), "card": ("│", "bold")}


def mark(key: str, to: Screen) -> Styled:
    """Return a part's sign in the bar, and its colour."""
    letter, colour = MARKS[key]
    return "█" if to.colour else letter, colour


def bar(answer: Estimate, parts: Sequence[tuple[str, int]], to: Screen) -> Iterator[list[Styled]]:
    """Yield two lines: the parts, keys of `MARKS` and bytes, with free space up to the card's end, and the band."""
    usable = answer.gpu.usable if answer.gpu else None
    width = to.width - 1
    full = max(answer.band.high, answer.bytes.used, usable or 0)

    def at(n: int) -> int:
        return (n * width + full // 2) // full

    cells: list[str] = []
    reached = 0
    for key, size in parts:
        reached += size
        cells += [key] * (at(reached) - len(cells))
    cells += ["free" if n < at(usable or 0) else "" for n in range(len(cells), width + 1)]
    if usable is not None:
        cells[at(usable)] = "card"
    runs = [(_REST.get(key) or mark(key, to), len(list(group))) for key, group in groupby(cells)]
    yield [(sign * n, style) for (sign, style), n in runs]
    low, high = at(answer.band.low), max(at(answer.band.high), at(answer.band.low) + 1)
    line = " " * low + "├" + "─" * (high - low - 1) + "┤"
    label = f"{tenths(answer.band.low)} to {tenths(answer.band.high)} GiB in {answer.band.coverage:.0%} of runs"
    if high + 2 + len(label) <= to.width:
        line = f"{line} {label}"
    elif len(label) < low:
        line = f"{label} ".rjust(low) + line[low:]
    yield [(line, "dim")]
