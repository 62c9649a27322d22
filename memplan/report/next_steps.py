"""Next steps for an answer: what would make the run fit, and which cards hold it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from memplan.core.records import NamedTuple
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate, Holding
from memplan.planning.reach import cards_that_hold, largest_batch, largest_sequence
from memplan.report.wording import tenths


def help_line(answer: Estimate) -> str:
    """Return a line about what would make the run fit; empty unless the verdict is that it does not fit."""
    if answer.verdict.answer != "does not fit":
        return ""
    traced = answer.via == "trace"  # other changes than the card would need further traces
    ways = [] if traced else list(_ways(answer))
    larger = next((gpu for gpu, verdict in _holding(answer, "NVIDIA") if verdict == "fits"), None)
    if larger:
        ways.append(f"{larger.title} ({tenths(larger.usable)} GiB usable), the smallest NVIDIA card that holds it")
    if ways:
        return f"Would fit: {'; or '.join(ways)}."
    if answer.run.task == "generate" and not traced:
        return "No weight format and no NVIDIA card would fit."
    return "" if traced else "No batch, sequence, single change or NVIDIA card would fit."


def _ways(answer: Estimate) -> Iterator[str]:
    """Yield what would make the run fit on its card: fewer or shorter sequences, another format, or another change."""
    run, calibration = answer.asked, answer.calibration
    if answer.serving is None:
        batch, sequence = largest_batch(run, calibration=calibration), largest_sequence(run, calibration=calibration)
        if batch:
            yield f"batch {batch:,} at {run.batch.sequence:,} tokens"
        if sequence:
            yield f"{sequence:,} tokens at batch {run.batch.micro:,}"
    if answer.run.task == "generate":
        from memplan.planning.inference import mildest_format

        smaller = mildest_format(answer, calibration=calibration)
        if smaller is not None:
            name, other = smaller
            option = "--quant-format" if answer.serving is None else "--stored"
            yield f"{option} {name} (uses {tenths(other.bytes.used)} GiB)"
        return
    from memplan.frameworks.command import options
    from memplan.planning.search import answer_with_one_lever

    lever = answer_with_one_lever(run, ("batch", "sequence", "gpus"), calibration)
    if lever:
        yield f"{options(run, lever.asked)} (uses {tenths(lever.bytes.used)} GiB)"


class Cards(NamedTuple):
    """Cards that hold a run, by usable GiB, smallest first; names of tight ones end with a question mark."""

    title: str
    by_size: dict[int, list[str]]


def cards(answer: Estimate) -> list[Cards]:
    """Return every catalogued card that holds the run, NVIDIA's first; empty for a run with a GPU."""
    if answer.gpu is not None:
        return []
    which = ", of compute capability 8 and later" if answer.via == "trace" else ""
    out = [
        Cards(f"Cards that hold it{which}, by usable GiB (? means tight)", {}),
        Cards("Cards of other vendors, if their kernels need as much memory as NVIDIA's", {}),
    ]
    for gpu, verdict in _holding(answer):
        names = out[gpu.vendor != "NVIDIA"].by_size.setdefault(round(gpu.usable / GIB), [])
        names.append(gpu.name + ("?" if verdict == "tight" else ""))
    return [group for group in out if group.by_size] or [Cards("No catalogued card holds it.", {})]


def _holding(answer: Estimate, vendor: str = "") -> Iterable[Holding]:
    if answer.via != "trace":
        return cards_that_hold(answer.asked, vendor, answer.calibration)
    from memplan.probe.answer import gpus_that_hold

    return gpus_that_hold(answer, vendor)
