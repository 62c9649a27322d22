"""Next steps for an answer: what would make the run fit, and which cards hold it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate, Holding
from memplan.planning.reach import cards_that_hold, largest_batch, largest_sequence
from memplan.report.wording import tenths


def help_line(answer: Estimate) -> str:
    """Return a line about what would make the run fit; empty unless the verdict is that it does not fit."""
    if answer.verdict.answer != "does not fit":
        return ""
    if answer.via == "trace":
        return _larger_card(answer)
    if answer.run.task == "generate":
        return _inference_line(answer)
    from memplan.frameworks.command import options
    from memplan.planning.search import answer_with_one_lever

    run = answer.asked
    calibration = answer.calibration
    batch, sequence = largest_batch(run, calibration=calibration), largest_sequence(run, calibration=calibration)
    lever = answer_with_one_lever(run, ("batch", "sequence", "gpus"), calibration)
    ways: list[str] = []
    if batch:
        ways.append(f"batch {batch:,} at {run.batch.sequence:,} tokens")
    if sequence:
        ways.append(f"{sequence:,} tokens at batch {run.batch.micro:,}")
    if lever:
        ways.append(f"{options(run, lever.asked)} (uses {tenths(lever.bytes.used)} GiB)")
    larger = next((gpu for gpu, verdict in cards_that_hold(run, "NVIDIA", calibration) if verdict == "fits"), None)
    if larger:
        ways.append(f"{larger.title} ({tenths(larger.usable)} GiB usable), the smallest NVIDIA card that holds it")
    return (
        f"Would fit: {'; or '.join(ways)}." if ways else "No batch, sequence, single change or NVIDIA card would fit."
    )


def _inference_line(answer: Estimate) -> str:
    """Return what would make inference fit: fewer or shorter requests, another weight format, or a larger card."""
    from memplan.planning.inference import mildest_format

    run, calibration = answer.asked, answer.calibration
    ways: list[str] = []
    if answer.serving is None:
        batch, sequence = largest_batch(run, calibration=calibration), largest_sequence(run, calibration=calibration)
        ways += [f"batch {batch:,} at {run.batch.sequence:,} tokens"] if batch else []
        ways += [f"{sequence:,} tokens at batch {run.batch.micro:,}"] if sequence else []
    smaller = mildest_format(answer, calibration=calibration)
    if smaller is not None:
        name, other = smaller
        option = "--quant-format" if answer.serving is None else "--stored"
        ways.append(f"{option} {name} (uses {tenths(other.bytes.used)} GiB)")
    larger = next((gpu for gpu, verdict in cards_that_hold(run, "NVIDIA", calibration) if verdict == "fits"), None)
    if larger:
        ways.append(f"{larger.title} ({tenths(larger.usable)} GiB usable), the smallest NVIDIA card that holds it")
    return f"Would fit: {'; or '.join(ways)}." if ways else "No weight format and no NVIDIA card would fit."


def _larger_card(answer: Estimate) -> str:
    """Return the smallest card that holds a traced run; other changes would need further traces."""
    from memplan.probe.answer import gpus_that_hold

    larger = next((gpu for gpu, verdict in gpus_that_hold(answer, "NVIDIA") if verdict == "fits"), None)
    return _smallest(larger) if larger else ""


def _smallest(card: GPU) -> str:
    return f"Would fit: {card.title} ({tenths(card.usable)} GiB usable), the smallest NVIDIA card that holds it."


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


def _holding(answer: Estimate) -> Iterable[Holding]:
    if answer.via != "trace":
        return cards_that_hold(answer.asked)
    from memplan.probe.answer import gpus_that_hold as traced_holding

    return traced_holding(answer)
