"""Reports of `memplan probe`: one measured run phase by phase, the plan of a suite, a comparison of gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from memplan.core.errors import printable
from memplan.core.records import NamedTuple
from memplan.core.units import MIB, gib
from memplan.estimate.answer import Estimate
from memplan.report.blocks import Block, Column, Facts, Notes, Table, Text
from memplan.report.display import display
from memplan.report.text import Screen
from memplan.report.wording import hundredths, tenths

if TYPE_CHECKING:
    from memplan.probe.gradients import GradientCheck
    from memplan.probe.run.process import Machine, MeasuredRun
    from memplan.probe.run.suite import PlannedRun

_MERGED = {"clip": "step", "loss": "forward"}  # phases that only one of measurement and estimate distinguishes


class Peaks(NamedTuple):
    """A phase's peaks in bytes over all micro-batches; `estimated` is None without an estimate."""

    phase: str
    step: int | None
    allocated: int
    reserved: int
    used: int
    estimated: int | None


def peaks(measured: MeasuredRun, answer: Estimate | None) -> list[Peaks]:
    """Return the phases in the order they ran."""
    by_phase: dict[tuple[str, int | None], Peaks] = {}
    for r in measured.readings:
        if r.phase == "context":
            continue
        key = (_MERGED.get(r.phase, r.phase), r.step)
        old = by_phase.get(key, Peaks(*key, 0, 0, 0, None))
        used = max(old.used, r.reserved + measured.context_bytes(r))
        most = (max(old.allocated, r.allocated), max(old.reserved, r.reserved))
        by_phase[key] = Peaks(*key, *most, used, estimated_peak(answer, *key))
    return list(by_phase.values())


def estimated_peak(answer: Estimate | None, phase: str, step: int | None) -> int | None:
    """Return the estimate's peak of a phase in a step; an estimate only distinguishes the first step and later ones."""
    if answer is None:
        return None
    matching = [p for p in answer.phases if _MERGED.get(p.phase, p.phase) == phase]
    estimated_step = None if step is None else min(step, 2)
    steps = [p.peak for p in matching if p.step in (None, estimated_step)]
    return max(steps, default=None)


def difference(measured: int, estimated: int | None) -> str:
    """Return the estimate's error relative to the measurement.

    >>> difference(1000, 1010), difference(1000, 1000), difference(1000, None)
    ('+1.00 %', '0.00 %', '')
    """
    if estimated is None or not measured:
        return ""
    error = 100 * (estimated / measured - 1)
    return f"{error:+.2f} %" if f"{abs(error):.2f}" != "0.00" else "0.00 %"


def run(measured: MeasuredRun, machine: Machine, answer: Estimate | None, notes: Iterable[str], to: Screen) -> str:
    """Report one measured run: the outcome, every phase next to the estimate, and notes."""
    rows = peaks(measured, answer)
    blocks: list[Block] = [Text(outcome(measured, machine), indent="")]
    if rows:
        blocks += [Table(_PEAKS, rows), Facts("", [(f"{name:9}", text) for name, text in _totals(measured)])]
    versions = "  ".join(f"{name} {version}" for name, version in machine.versions.items())
    blocks += [Facts("", [("driver   ", machine.driver), ("versions ", versions)]), Notes(list(notes), "")]
    return display(blocks, to)


_PEAKS: tuple[Column[Peaks], ...] = (
    Column("phase", lambda p: p.phase),
    Column("step", lambda p: str(p.step or ""), right=True),
    Column("GiB allocated", lambda p: hundredths(p.allocated), right=True),
    Column("estimated", lambda p: hundredths(p.estimated) if p.estimated is not None else "", right=True),
    Column("difference", lambda p: difference(p.allocated, p.estimated), right=True),
    Column("reserved", lambda p: hundredths(p.reserved), right=True, optional=True),
    Column("used", lambda p: hundredths(p.used), right=True, optional=True),
)


def outcome(measured: MeasuredRun, machine: Machine) -> str:
    """Return the outcome of a run in one line."""
    card = printable(machine.card.name, 80)
    if measured.outcome == "measured":
        return (
            f"measured on {card}: {tenths(measured.process)} GiB used, "
            f"{tenths(measured.allocated)} GiB of them in torch's tensors"
        )
    where = f" in {measured.phase}" if measured.phase else ""
    when = f" of step {measured.step}" if measured.step else ""
    return f"{measured.outcome}{where}{when} on {card}: {measured.said}"


def _totals(measured: MeasuredRun) -> Iterator[tuple[str, str]]:
    """Yield the memory that the run took, by each counter."""
    first, last = measured.readings[0], measured.readings[-1]
    yield "allocated", f"{gib(measured.allocated)}  torch.cuda.max_memory_allocated"
    yield "reserved", f"{gib(measured.reserved)}  torch.cuda.max_memory_reserved"
    initial = f" ({gib(measured.context_bytes(first))} after the first tensor)" if first.phase == "context" else ""
    yield "context", f"{gib(measured.context_bytes(last))}{initial}  CUDA context and loaded kernels"
    yield "used", f"{gib(measured.process)}  by the driver"


def notes(measured: MeasuredRun, machine: Machine, row_usable: int | None) -> Iterator[str]:
    """Yield what may make the figures differ from another machine's.

    `row_usable` is the card's usable bytes in memplan's catalogue, if it is there.
    """
    if measured.before is None:
        yield "nvidia-smi did not show what other processes used before: all memory counts as used by this run"
    elif measured.before > 64 * MIB:
        yield f"{gib(measured.before)} on the card were in use before, by others; they are left out of what is used"
    if measured.shown is not None:
        yield f"nvidia-smi showed {gib(measured.shown)} in use on the whole card at the end"
    total = machine.card.total
    if row_usable is None:
        yield f"memplan's catalogue does not have {machine.card.name!r}: estimated without a GPU"
    elif abs(total - row_usable) * 20 > row_usable:
        yield f"torch shows {gib(total)} on this card, but memplan's catalogue has {gib(row_usable)}"
    if machine.allocator:
        yield f"torch's allocator is configured by {printable(machine.allocator, 80)}"


def too_small(answer: Estimate) -> str:
    """Return a warning if the card is not expected to hold the run, else an empty string."""
    if answer.verdict.answer != "does not fit" or answer.gpu is None:
        return ""
    return (
        f"this run is expected to run out of memory: it needs {tenths(answer.bytes.used)} GiB and {answer.gpu.name} "
        f"has {tenths(answer.gpu.usable)}; it is run anyway"
    )


# --- a suite -----------------------------------------------------------------------------------------------


def plan(planned: Sequence[PlannedRun], have: Sequence[bool], to: Screen) -> str:
    """Report a suite before it starts; `have` says which runs the output already has a result for."""
    from memplan.probe.run.rows import run_label
    from memplan.probe.run.suite import minutes

    done = [p for p, is_done in zip(planned, have, strict=True) if is_done]
    columns: list[Column[PlannedRun]] = [
        Column("run", lambda p: run_label(p.run), wraps=True),
        Column("expected", lambda p: "already done" if p in done else expected(p)),
        Column("GiB allocated", lambda p: tenths(p.answer.bytes.allocated) if p.answer else "", right=True),
        Column("used", lambda p: tenths(p.answer.bytes.used) if p.answer else "", right=True),
        Column("minutes", lambda p: f"{p.seconds / 60:.1f}", right=True, optional=True),
    ]
    pending = [p for p in planned if p not in done]
    counts: dict[str, int] = {}
    for p in pending:
        counts[expected(p)] = counts.get(expected(p), 0) + 1
    words = ", ".join(f"{n} {word}" for word, n in counts.items())
    to_do = f"{len(pending)} {'run' if len(pending) == 1 else 'runs'} to do" + (f" ({words})" if words else "")
    assumed = (
        "The minutes are assumed: 40 seconds to start, half a billion parameters created per second, and a fifth of "
        "the card's 16-bit rate."
    )
    refused = [Text(f"- {run_label(p.run)}: {p.refused}") for p in pending if p.refused]
    text = Text(f"{to_do}, about {_minutes(minutes(pending))}. {assumed}", indent="")
    return display([Table(columns, planned), text, *refused], to)


def _minutes(minutes: float) -> str:
    rounded = max(1, round(minutes))
    return "a minute" if rounded == 1 else f"{rounded} minutes"


def expected(planned: PlannedRun) -> str:
    """Return the expected outcome of a run: the verdict, or that it is refused."""
    if planned.refused:
        return "refused"
    return (planned.answer.verdict.answer if planned.answer else None) or "no card named"


def progress(number: int, of: int, measured: MeasuredRun, answer: Estimate | None) -> str:
    """Return one line about a finished run of a suite."""
    from memplan.probe.run.rows import run_id

    start = f"[{number}/{of}] {run_id(measured.run)}: "
    if measured.outcome != "measured":
        where = f" in {measured.phase}" if measured.phase else ""
        return f"{start}{measured.outcome}{where}; {measured.said}"
    error = difference(measured.allocated, answer.bytes.allocated if answer else None)
    estimate = f" (estimate {error})" if error else ""
    return f"{start}{tenths(measured.allocated)} GiB allocated{estimate}, {tenths(measured.process)} used"


# --- gradients ---------------------------------------------------------------------------------------------


def gradients(compared: Sequence[GradientCheck], dtype: str, rank: int, to: Screen) -> str:
    """Report LoRA's gradients by autograd and by peft against those computed by hand, a row per shape."""
    columns: list[Column[GradientCheck]] = [
        Column("W", lambda c: f"{c.shape.out} × {c.shape.into}"),
        Column("layers", lambda c: ", ".join(c.shape.layers), wraps=True, optional=True),
        Column("autograd", lambda c: f"{max(c.autograd.values()):.1e}", right=True),
        Column("peft", lambda c: f"{max(c.peft.values()):.1e}", right=True),
        Column("tolerance", lambda c: f"{c.tolerance:.1e}", right=True),
        Column("", lambda c: "agree" if c.agree else "differ", style=lambda c: "green" if c.agree else "red"),
    ]
    same = "agree" if all(c.agree for c in compared) else "do not agree"
    text = (
        f"The gradients of A, B and x by torch.autograd and by peft {same} with those by hand: rank {rank}, in "
        f"{dtype}, against fp64. Differences are over the largest gradient."
    )
    return display([Text(text, indent=""), Table(columns, compared)], to)
