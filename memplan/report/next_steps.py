"""Next steps for an answer: what would make the run fit, and which cards hold it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB
from memplan.estimate.answer import Estimate, Holding
from memplan.planning.reach import ROOM_STEPS, cards_that_hold, largest_batch, largest_sequence, room
from memplan.report.wording import also_meant, on_host, tenths


class Way(NamedTuple):
    """A change that makes a run fit: in words, and as typed after the run's command."""

    text: str
    options: str


def help_line(answer: Estimate) -> str:
    """Return a line about what would make the run fit; empty unless the verdict is that it does not fit."""
    if answer.verdict.answer != "does not fit":
        return ""
    found = ways(answer)
    if found:
        return f"Would fit: {'; or '.join(way.text for way in found)}."
    return without_a_way(answer)


def without_a_way(answer: Estimate) -> str:
    """Return a line that says that nothing would make the run fit; empty if nothing was tried."""
    if answer.via == "trace":
        return ""
    if answer.run.task == "generate":
        return "No weight format and no NVIDIA card would fit."
    return "No batch, sequence, single change or NVIDIA card would fit."


def ways(answer: Estimate) -> list[Way]:
    """Return what would make a run fit that does not."""
    out = [] if answer.via == "trace" else list(_ways(answer))  # other changes than the card would need further traces
    holding = (gpu for gpu, verdict in _holding(answer, "NVIDIA") if verdict == "fits")
    others, n = also_meant(answer), answer.run.parallelism.world
    cards = [*holding] if others else [*islice(holding, 1)]
    card = next((gpu for gpu in cards if gpu in others), next(iter(cards), None))
    if card:
        of_size = "the smallest that hold it" if n > 1 else "the smallest NVIDIA card that holds it"
        why = f"which {printable(answer.asked.gpu or '')} may mean" if card in others else of_size
        count, times = (f"{n:,} x ", f"{n}x") if n > 1 else ("", "")
        text = f"{count}{card.title} ({tenths(card.usable)} GiB usable), {why}"
        out.append(Way(text, f"--gpu {times}{card.name}"))
    return out


def _ways(answer: Estimate) -> Iterator[Way]:
    """Yield what would make the run fit on its card: fewer or shorter sequences, another format, or another change."""
    run, calibration = answer.asked, answer.calibration
    if answer.serving is None:
        batch, sequence = largest_batch(run, calibration=calibration), largest_sequence(run, calibration=calibration)
        if batch:
            yield Way(f"batch {batch:,} at {run.batch.sequence:,} tokens", f"--batch-size {batch}")
        if sequence:
            yield Way(f"{sequence:,} tokens at batch {run.batch.micro:,}", f"--seq-len {sequence}")
    if answer.run.task == "generate":
        from memplan.planning.inference import divided, mildest_format

        parts = divided(answer, calibration)
        if parts is not None:
            option = f"--tp {parts.run.parallelism.tp}"
            yield _used(option, parts)
        smaller = mildest_format(answer, calibration=calibration)
        if smaller is not None:
            name, other = smaller
            option = f"{'--quant-format' if answer.serving is None else '--stored'} {name}"
            yield _used(option, other)
        return
    from memplan.frameworks.command import options
    from memplan.planning.search import answer_with_one_lever

    lever = answer_with_one_lever(run, ("batch", "sequence", "gpus"), calibration)
    if lever:
        with suppress(SpecError):  # only a file can say it
            yield _used(options(run, lever.asked), lever)


def _used(option: str, answer: Estimate) -> Way:
    host = f", and {tenths(on_host(answer))} on the host" if on_host(answer) else ""
    return Way(f"{option} (uses {tenths(answer.bytes.used)} GiB{host})", option)


def room_left(answer: Estimate) -> Iterator[str]:
    """Yield how far batch and sequence can grow on the card, and what the next tokens take if it is a large step."""
    run, used = answer.asked, answer.bytes.used
    batch, tokens = (room(run, axis, answer.calibration) for axis in ("batch", "sequence"))
    if batch.value != run.batch.micro:
        yield f"batch {batch.value:,} at {run.batch.sequence:,} tokens"
    if tokens.value != run.batch.sequence:
        yield f"{tokens.value:,} tokens at batch {run.batch.micro:,}"
    elif tokens.beyond is not None:
        more = tenths(tokens.beyond.bytes.used - used)
        yield f"fewer than {ROOM_STEPS['sequence']} tokens more: they take {more} GiB"


def stacks(answer: Estimate) -> Iterator[tuple[str, str]]:
    """Yield a line of the GiB that the same run takes under other training stacks, if there are such."""
    from memplan.planning.stacks import other_stacks

    found: list[str] = []
    with suppress(KeyboardInterrupt):  # what was found so far is shown
        for name, other in other_stacks(answer):
            found += [f"{name} {tenths(other.bytes.used)}"] if other is not None else []
    if found:
        yield "same run in", ", ".join(found)


def mends(answer: Estimate) -> Iterator[str]:
    """Yield the option that makes an engine start, from the reason why it does not."""
    found = re.search(r"\((--[\w-]+)\) ([\d.]+)", answer.verdict.reason or "")
    if found is not None:
        yield f"{found[1]} {found[2]}"


def smallest_cards(answer: Estimate) -> list[str]:
    """Return the cards of least memory that hold the run, one of each size."""
    sizes: dict[int, str] = {}
    for gpu, verdict in _holding(answer, "NVIDIA"):
        if verdict == "fits" and gpu.market != "laptop":
            sizes.setdefault(round(gpu.usable / GIB), gpu.name)
    return list(sizes.values())[:_MOST_SIZES]


_MOST_SIZES = 4


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
