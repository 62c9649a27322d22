"""What a probe found, in words: one measured run phase by phase, the plan of a suite, gradients compared."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from memplan.core.errors import printable
from memplan.core.units import MIB, gib
from memplan.estimate.answer import Estimate
from memplan.report.text import Column, Screen, hanging, paragraph, table
from memplan.report.wording import hundredths, tenths

if TYPE_CHECKING:
    from memplan.probe.gradients import Compared
    from memplan.probe.run.process import Here, Measured
    from memplan.probe.run.suite import Planned

_MERGED = {"clip": "step", "loss": "forward"}  # what one side tells apart and the other does not


class Peaks(NamedTuple):
    """A phase's peaks in bytes, all micro-batches together; estimated: None where there is no estimate."""

    phase: str
    step: int | None
    allocated: int
    reserved: int
    used: int
    estimated: int | None


def peaks(measured: Measured, answer: Estimate | None) -> list[Peaks]:
    """The phases in the order they ran."""
    found: dict[tuple[str, int | None], Peaks] = {}
    for r in measured.readings:
        if r.phase == "context":
            continue
        key = (_MERGED.get(r.phase, r.phase), r.step)
        old = found.get(key, Peaks(*key, 0, 0, 0, None))
        used = max(old.used, r.reserved + measured.beside(r))
        most = (max(old.allocated, r.allocated), max(old.reserved, r.reserved))
        found[key] = Peaks(*key, *most, used, estimated_peak(answer, *key))
    return list(found.values())


def estimated_peak(answer: Estimate | None, phase: str, step: int | None) -> int | None:
    """The estimate's peak of a phase: of the step if it tells steps apart, of a later one if it is none of its own."""
    if answer is None:
        return None
    alike = [p for p in answer.phases if _MERGED.get(p.phase, p.phase) == phase]
    wanted = None if step is None else min(step, 2)
    steps = [p.peak for p in alike if p.step in (None, wanted)]
    return max(steps, default=None)


def difference(measured: int, estimated: int | None) -> str:
    """The estimate's error, of what was measured.

    >>> difference(1000, 1010), difference(1000, 1000), difference(1000, None)
    ('+1.00 %', '0.00 %', '')
    """
    if estimated is None or not measured:
        return ""
    error = 100 * (estimated / measured - 1)
    return f"{error:+.2f} %" if f"{abs(error):.2f}" != "0.00" else "0.00 %"


def run(measured: Measured, machine: Here, answer: Estimate | None, notes: Iterable[str], to: Screen) -> str:
    """One measured run: the outcome, every phase beside the estimate, and what is worth knowing."""
    columns = (
        Column("phase"),
        Column("step", right=True),
        Column("GiB allocated", right=True),
        Column("estimated", right=True),
        Column("difference", right=True),
        Column("reserved", right=True, optional=True),
        Column("used", right=True, optional=True),
    )
    rows = [
        (
            p.phase,
            str(p.step or ""),
            hundredths(p.allocated),
            hundredths(p.estimated) if p.estimated is not None else "",
            difference(p.allocated, p.estimated),
            hundredths(p.reserved),
            hundredths(p.used),
        )
        for p in peaks(measured, answer)
    ]
    lines = [*paragraph(outcome(measured, machine), to), ""]
    if rows:
        lines += [*table(columns, rows, to), "", *_taken(measured, to), ""]
    lines += hanging("driver", [machine.driver], to, 9)
    lines += hanging("versions", [f"{name} {version}" for name, version in machine.versions.items()], to, 9)
    lines += [line for note in notes for line in paragraph(f"- {note}", to, "  ")]
    return "\n".join(lines) + "\n"


def outcome(measured: Measured, machine: Here) -> str:
    """What came of a run, in one line."""
    card = printable(machine.card.name, 80)
    if measured.outcome == "measured":
        return (
            f"measured on {card}: {tenths(measured.process)} GiB used, "
            f"{tenths(measured.allocated)} GiB of them in torch's tensors"
        )
    where = f" in {measured.phase}" if measured.phase else ""
    when = f" of step {measured.step}" if measured.step else ""
    return f"{measured.outcome}{where}{when} on {card}: {measured.said}"


def _taken(measured: Measured, to: Screen) -> Iterator[str]:
    """What the whole run took, by each count."""
    first, last = measured.readings[0], measured.readings[-1]
    yield from hanging("allocated", [f"{gib(measured.allocated)}  torch.cuda.max_memory_allocated"], to, 9)
    yield from hanging("reserved", [f"{gib(measured.reserved)}  torch.cuda.max_memory_reserved"], to, 9)
    beside = gib(measured.beside(last))
    begun = f" ({gib(measured.beside(first))} after the first tensor)" if first.phase == "context" else ""
    yield from hanging("context", [f"{beside}{begun}  CUDA context and loaded kernels"], to, 9)
    yield from hanging("used", [f"{gib(measured.process)}  by the driver"], to, 9)


def notes(measured: Measured, machine: Here, row_usable: int | None) -> Iterator[str]:
    """What may make the figures differ from those of another machine; `row_usable`: the card's bytes in the table."""
    if measured.before is None:
        yield "nvidia-smi did not tell what others had on the card before: all the driver counts is taken as the run's"
    elif measured.before > 64 * MIB:
        yield f"{gib(measured.before)} on the card were in use before, by others; they are left out of what is used"
    if measured.shown is not None:
        yield f"nvidia-smi showed {gib(measured.shown)} in use on the whole card at the end"
    total = machine.card.total
    if row_usable is None:
        yield f"memplan has no row of {machine.card.name!r}: estimated as on no particular card"
    elif abs(total - row_usable) * 20 > row_usable:
        yield f"torch shows {gib(total)} on this card, and memplan's row of it has {gib(row_usable)}"
    if machine.allocator:
        yield f"torch's allocator is set by {printable(machine.allocator, 80)}"


def too_small(answer: Estimate) -> str:
    """What is said before a run that the card is not expected to hold; empty where it is."""
    if answer.verdict.answer != "does not fit" or answer.gpu is None:
        return ""
    return (
        f"this run is expected to run out of memory: it needs {tenths(answer.bytes.used)} GiB and {answer.gpu.name} "
        f"has {tenths(answer.gpu.usable)}; it is run anyway"
    )


# --- a suite -----------------------------------------------------------------------------------------------


def plan(planned: Sequence[Planned], have: Sequence[bool], to: Screen) -> str:
    """A suite before it is started; `have` says which runs the output has a result of already."""
    from memplan.probe.run.rows import described
    from memplan.probe.run.suite import minutes

    columns = (
        Column("run", wraps=True),
        Column("expected"),
        Column("GiB allocated", right=True),
        Column("used", right=True),
        Column("minutes", right=True, optional=True),
    )
    rows = [
        (
            described(p.run),
            "there already" if there else expected(p),
            tenths(p.answer.bytes.allocated) if p.answer else "",
            tenths(p.answer.bytes.used) if p.answer else "",
            f"{p.seconds / 60:.1f}",
        )
        for p, there in zip(planned, have, strict=True)
    ]
    left = [p for p, there in zip(planned, have, strict=True) if not there]
    counts: dict[str, int] = {}
    for p in left:
        counts[expected(p)] = counts.get(expected(p), 0) + 1
    words = ", ".join(f"{n} {word}" for word, n in counts.items())
    to_do = f"{len(left)} {'run' if len(left) == 1 else 'runs'} to do" + (f" ({words})" if words else "")
    lines = [
        *table(columns, rows, to),
        "",
        *paragraph(
            f"{to_do}, about {_minutes(minutes(left))}. "
            "The minutes are assumed: a start of 40 seconds, half a billion parameters made a second, and a fifth of "
            "the card's 16-bit rate.",
            to,
        ),
        *(line for p in left if p.refused for line in paragraph(f"- {described(p.run)}: {p.refused}", to, "  ")),
    ]
    return "\n".join(lines) + "\n"


def _minutes(minutes: float) -> str:
    whole = max(1, round(minutes))
    return "a minute" if whole == 1 else f"{whole} minutes"


def expected(planned: Planned) -> str:
    """What a run is expected to do: the verdict, or that it will be refused."""
    if planned.refused:
        return "refused"
    return (planned.answer.verdict.answer if planned.answer else None) or "no card named"


def progress(number: int, of: int, measured: Measured, answer: Estimate | None) -> str:
    """One line about a run of a suite that has ended."""
    from memplan.probe.run.rows import identity

    start = f"[{number}/{of}] {identity(measured.run)}: "
    if measured.outcome != "measured":
        where = f" in {measured.phase}" if measured.phase else ""
        return f"{start}{measured.outcome}{where}; {measured.said}"
    error = difference(measured.allocated, answer.bytes.allocated if answer else None)
    beside = f" (estimate {error})" if error else ""
    return f"{start}{tenths(measured.allocated)} GiB allocated{beside}, {tenths(measured.process)} used"


# --- gradients ---------------------------------------------------------------------------------------------


def gradients(compared: Sequence[Compared], dtype: str, rank: int, to: Screen) -> str:
    """LoRA's gradients by autograd and by peft against those by hand, a row a shape."""
    columns = (
        Column("W"),
        Column("layers", wraps=True, optional=True),
        Column("autograd", right=True),
        Column("peft", right=True),
        Column("tolerance", right=True),
        Column(""),
    )
    rows = [
        (
            f"{c.shape.out} × {c.shape.into}",
            ", ".join(c.shape.layers),
            f"{max(c.autograd.values()):.1e}",
            f"{max(c.peft.values()):.1e}",
            f"{c.tolerance:.1e}",
            "agree" if c.agree else "differ",
        )
        for c in compared
    ]
    same = all(c.agree for c in compared)
    lines = [
        *paragraph(
            f"The gradients of A, B and x by torch.autograd and by peft {'agree' if same else 'do not agree'} with "
            f"those by hand: rank {rank}, in {dtype}, against fp64. Differences are over the largest gradient.",
            to,
        ),
        "",
        *table(columns, rows, to),
    ]
    return "\n".join(lines) + "\n"
