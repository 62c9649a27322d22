"""A map over batch and sequence: how much of the card each run takes, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from memplan.estimate.answer import BY_MEMORY, Estimate
from memplan.planning.reach import Frontier
from memplan.report.blocks import Drawing, Styled, Table, styled
from memplan.report.display import paragraph
from memplan.report.text import Screen
from memplan.report.wording import COLOURS

_SHADES = "░▒▓█"  # by quarter of the card
_SIGNS = {"tight": "?", "does not fit": "x"}  # replace the shade if there is no colour
_CELL_WIDTH = 5  # including the gap before it
_CANNOT = "-"


def heat(found: Frontier, to: Screen) -> Iterator[list[Styled]]:
    """Yield a row per batch and a column per sequence, wrapped to the width of the screen."""
    batches, sequences = [batch for batch, _ in found.longest], found.sequences
    label = max(len("batch"), *(len(short(b)) for b in batches))
    per_line = max(1, (to.width - label) // _CELL_WIDTH)
    for start in range(0, len(sequences), per_line):
        if start:
            yield []
        columns = slice(start, start + per_line)
        heads = "".join(short(n).rjust(_CELL_WIDTH) for n in sequences[columns])
        yield [(f"{'batch':>{label}}{heads}", "bold")]
        for batch, answers in zip(batches, found.around, strict=True):
            yield [(f"{short(batch):>{label}}", ""), *(_cell(answer, to) for answer in answers[columns])]
    yield []
    yield from _legend(to)


_CAPTION = (
    "Share of the card's usable memory that is allocated, by sequences per batch (rows) and tokens (columns). "
    "x: does not fit; ?: tight; -: cannot run."
)


def drawing(found: Frontier) -> Drawing:
    """Return the map: shades on a screen, a table on a page."""
    return Drawing(partial(heat, found), partial(_table, found), _CAPTION)


def _table(found: Frontier) -> Table[Sequence[Styled]]:
    rows = [
        [(short(batch), ""), *map(_share, answers)]
        for (batch, _), answers in zip(found.longest, found.around, strict=True)
    ]
    return Table([styled(n, head, right=True) for n, head in enumerate(("batch", *map(short, found.sequences)))], rows)


def _allocated(answer: Estimate) -> float:
    """The share of the card that is allocated."""
    assert answer.gpu is not None
    return answer.bytes.allocated / answer.gpu.usable


def _share(answer: Estimate | None) -> Styled:
    if answer is None:
        return _CANNOT, ""
    share, verdict = _allocated(answer), str(answer.verdict.answer)
    return f"{share:.0%} {_SIGNS.get(verdict, '')}".rstrip(), f"{COLOURS[verdict]} quarter{min(int(share * 4), 3)}"


def _cell(answer: Estimate | None, to: Screen) -> Styled:
    if answer is None:
        return _CANNOT.rjust(_CELL_WIDTH), ""
    verdict = str(answer.verdict.answer)
    shade = _SHADES[min(int(_allocated(answer) * len(_SHADES)), len(_SHADES) - 1)]
    sign = shade if to.colour else _SIGNS.get(verdict, shade)
    return f" {sign * (_CELL_WIDTH - 1)}", COLOURS[verdict]


def _legend(to: Screen) -> Iterator[list[Styled]]:
    shades = ", ".join(
        f"{sign} {'below ' if n < 3 else 'from '}{25 * (n + 1) if n < 3 else 75} %" for n, sign in enumerate(_SHADES)
    )
    rest = f"{_CANNOT} cannot run; sequences in tokens"
    if to.colour:
        yield [part for answer in BY_MEMORY for part in (("█", COLOURS[answer]), (f" {answer}  ", ""))]
        text = f"of the card allocated: {shades}; {rest}"
    else:
        signs = ", ".join(f"{sign} {answer}" for answer, sign in _SIGNS.items())
        text = f"fits with {shades} of the card allocated; {signs}; {rest}"
    yield from ([(line, "")] for line in paragraph(text, to.width))


def short(n: int) -> str:
    """Shorten a multiple of a power of two.

    >>> short(512), short(2048), short(131072), short(2**20), short(1000)
    ('512', '2k', '128k', '1M', '1000')
    """
    for size, letter in ((2**30, "G"), (2**20, "M"), (2**10, "k")):
        if n >= size and n % size == 0:
            return f"{n // size}{letter}"
    return str(n)
