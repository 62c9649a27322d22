"""What to do about the answer: what would make a run fit, and which cards hold it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate, Holding
from memplan.planning.reach import holding, largest_batch, largest_sequence
from memplan.report.wording import tenths


def help_line(answer: Estimate) -> str:
    """One line on what would make the run fit; empty where it fits, or nearly, or no GPU is asked."""
    if answer.verdict.answer != "does not fit":
        return ""
    if answer.via == "trace":
        return _larger_card(answer)
    if answer.run.task == "generate":
        return _to_run(answer)
    from memplan.frameworks.command import options
    from memplan.planning.search import alone

    run = answer.asked
    own = answer.calibration
    batch, sequence = largest_batch(run, calibration=own), largest_sequence(run, calibration=own)
    lever = alone(run, ("batch", "sequence", "gpus"), own)
    ways: list[str] = []
    if batch:
        ways.append(f"batch {batch:,} at {run.batch.sequence:,} tokens")
    if sequence:
        ways.append(f"{sequence:,} tokens at batch {run.batch.micro:,}")
    if lever:
        ways.append(f"{options(run, lever.asked)} (uses {tenths(lever.bytes.used)} GiB)")
    larger = next((gpu for gpu, held in holding(run, "NVIDIA", own) if held == "fits"), None)
    if larger:
        ways.append(f"{larger.title} ({tenths(larger.usable)} GiB usable), the smallest NVIDIA card that holds it")
    return f"Would fit: {'; or '.join(ways)}." if ways else "No batch, sequence, single change or NVIDIA card would do."


def _to_run(answer: Estimate) -> str:
    """Fewer or shorter requests where there is no pool for them, a milder format of the weights, a larger card."""
    from memplan.planning.inference import mildest_format

    run, own = answer.asked, answer.calibration
    ways: list[str] = []
    if answer.serving is None:
        batch, sequence = largest_batch(run, calibration=own), largest_sequence(run, calibration=own)
        ways += [f"batch {batch:,} at {run.batch.sequence:,} tokens"] if batch else []
        ways += [f"{sequence:,} tokens at batch {run.batch.micro:,}"] if sequence else []
    milder = mildest_format(answer, calibration=own)
    if milder is not None:
        name, other = milder
        option = "--quant-format" if answer.serving is None else "--stored"
        ways.append(f"{option} {name} (uses {tenths(other.bytes.used)} GiB)")
    larger = next((gpu for gpu, held in holding(run, "NVIDIA", own) if held == "fits"), None)
    if larger:
        ways.append(f"{larger.title} ({tenths(larger.usable)} GiB usable), the smallest NVIDIA card that holds it")
    return f"Would fit: {'; or '.join(ways)}." if ways else "No format of its weights and no NVIDIA card would do."


def _larger_card(answer: Estimate) -> str:
    """The smallest card that holds a traced run: what else would do takes further traces."""
    from memplan.probe.answer import holding

    larger = next((gpu for gpu, held in holding(answer, "NVIDIA") if held == "fits"), None)
    return _smallest(larger) if larger else ""


def _smallest(card: GPU) -> str:
    return f"Would fit: {card.title} ({tenths(card.usable)} GiB usable), the smallest NVIDIA card that holds it."


class Cards(NamedTuple):
    """Cards that hold a run: their names by usable GiB, least first; a tight one's ends with a question mark."""

    title: str
    by_size: dict[int, list[str]]


def cards(answer: Estimate) -> list[Cards]:
    """Every catalogued card that holds the run, NVIDIA's first. None for a run with a GPU."""
    if answer.gpu is not None:
        return []
    which = ", of compute capability 8 and later" if answer.via == "trace" else ""
    out = [
        Cards(f"Cards that hold it{which}, by usable GiB (? is tight)", {}),
        Cards("Others, if their kernels take what NVIDIA's do", {}),
    ]
    for gpu, held in _holding(answer):
        names = out[gpu.vendor != "NVIDIA"].by_size.setdefault(round(gpu.usable / GIB), [])
        names.append(gpu.name + ("?" if held == "tight" else ""))
    return [group for group in out if group.by_size] or [Cards("No catalogued card holds it.", {})]


def _holding(answer: Estimate) -> Iterable[Holding]:
    if answer.via != "trace":
        return holding(answer.asked)
    from memplan.probe.answer import holding as as_traced

    return as_traced(answer)
