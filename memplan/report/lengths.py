"""Facts about a run with sequences of different lengths, for the reports that have them."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.estimate.answer import Estimate
from memplan.planning.lengths import LengthsAnswer, lengths_answer
from memplan.report.blocks import Facts
from memplan.report.wording import tenths

_WORDS = {
    "random": "random batches, padded to their longest sequence",
    "grouped": "batches grouped by length, padded to their longest sequence",
    "packed": "packed into full rows",
    "padded": "padded to the maximum",
}


def facts(answer: Estimate, title: str) -> Iterator[Facts]:
    """Yield the facts of a run, if it has lengths."""
    found = lengths_answer(answer)
    if found is not None:
        yield Facts(title, [(f"{fact:12}", text) for fact, text in _lines(found)])


def _lines(found: LengthsAnswer) -> Iterator[tuple[str, str]]:
    lengths = found.lengths
    count = "percentiles" if lengths.is_sample else f"{len(lengths.sorted):,} sequences"
    spread = f"{lengths.sorted[0]:,} to {lengths.sorted[-1]:,} tokens, half up to {lengths.quantile(0.5):,}"
    yield "Lengths", f"{count} of {lengths.source}: {spread}; {_WORDS[found.batching]}"
    yield "Longest", f"{found.batch} x {found.longest:,} tokens, for which the answer holds: {_when(found)}"
    yield "Typical", f"{found.batch} x {found.typical:,} tokens, {tenths(found.used)} GiB used"
    if found.fits_up_to is not None and found.fits_up_to < found.longest:
        much = f"{found.batch} x {found.fits_up_to:,} tokens fit" if found.fits_up_to else "no length fits"
        yield "Fits up to", f"{much}; a longer batch comes in {share(found.fatal)} of the steps"


def _when(found: LengthsAnswer) -> str:
    if found.batching in ("packed", "padded"):
        return "in every step"
    if found.batching == "grouped":
        return "in the first step, where the sampler puts it"
    epoch = f", and in every epoch of {found.epoch:,}" if found.epoch else ""
    return f"in {share(found.odds)} of the steps, met within {found.even_odds:,} with even odds{epoch}"


def share(part: float) -> str:
    """Return a share as a percentage, or as one in n if it is small.

    >>> share(0.5), share(0.0004)
    ('50.0 %', '1 in 2,500')
    """
    return f"{100 * part:.1f} %" if part >= 0.01 else f"1 in {round(1 / part):,}" if part else "none"
