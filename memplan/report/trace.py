"""Report of a traced run: bytes over time, each phase next to the estimate, and differences at the peak."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from memplan.core.errors import MemplanError
from memplan.core.units import gib
from memplan.core.version import __version__
from memplan.estimate.answer import Estimate, Line
from memplan.report.blocks import Block, Column, Drawing, Facts, Notes, Styled, Table, Text
from memplan.report.display import display
from memplan.report.measurement import difference
from memplan.report.text import Screen
from memplan.report.wording import CATEGORIES, hundredths, tenths

if TYPE_CHECKING:
    from memplan.probe.difference import Mismatch, PhaseLine
    from memplan.probe.run.trace import TracedPhase, TracedRun
    from memplan.spec.run import RunSpec

_HEIGHT = 8  # lines of the plot
_MAX_ROWS = 20  # of the table of differences
_LABEL_WIDTH = 7  # columns left of the plot
_SHORT = {"forward": "fwd", "loss": "fwd", "backward": "bwd", "clip": "clip", "step": "opt"}


def run(traced: TracedRun, answer: Estimate | None, notes: Iterable[str], to: Screen) -> str:
    """Report one traced run: bytes over time, phases and categories next to the estimate, and every difference."""
    if answer is not None:
        notes = ["cuBLAS's workspaces are left out on both sides: a trace does not see them", *notes]
    versions = "  ".join(f"{name} {version}" for name, version in traced.versions.items())
    blocks: list[Block] = [
        Text(
            f"traced: {hundredths(traced.peak)} GiB at the peak, in {traced.peak_phase}; "
            f"{hundredths(traced.reserved)} GiB in torch's segments, by a model of its allocator; "
            f"{len(traced.events):,} allocations and frees, in {traced.seconds:.1f} seconds after imports",
            indent="",
        ),
        Drawing(partial(plot, traced.allocated, [(p.phase, p.start) for p in traced.phases])),
        Table(_TRACED_PHASES, traced.phases) if answer is None else _phases(traced, answer),
        _categories(traced, answer),
        *(_differences(traced, answer) if answer is not None else ()),
        Facts("", [("versions ", versions)]),
        Notes(list(notes), ""),
    ]
    return display(blocks, to)


def plot(allocated: Sequence[int], phases: Sequence[tuple[str, int]], to: Screen) -> Iterator[list[Styled]]:
    """Plot the bytes allocated after every event, the maximum per column; below it, where each phase begins."""
    columns = min(to.width - _LABEL_WIDTH - 1, len(allocated))
    if columns < 1:
        return
    edges = [len(allocated) * n // columns for n in range(columns + 1)]
    tops = [max(allocated[a:b]) for a, b in pairwise(edges)]
    most = max(1, *tops)
    for row in range(_HEIGHT, 0, -1):
        label = tenths(most * row // _HEIGHT) if row in (_HEIGHT, _HEIGHT // 2) else ""
        bar = "".join("█" if top * _HEIGHT > most * (row - 1) else " " for top in tops)
        yield [(f"{label:>{_LABEL_WIDTH}} ", ""), (bar, "blue")]
    marks = [" "] * columns
    free = 0
    for name, start in phases:
        at = start * columns // len(allocated)
        if at >= free and at + len(name) <= columns:
            marks[at : at + len(name)] = name
            free = at + len(name) + 1
    yield [(f"{'GiB':>{_LABEL_WIDTH}} {''.join(marks)}", "")]


_TRACED_PHASES: tuple[Column[TracedPhase], ...] = (
    Column("phase", lambda p: p.phase),
    Column("step", lambda p: str(p.step or ""), right=True),
    Column("GiB traced", lambda p: hundredths(p.peak), right=True),
)


def _phases(traced: TracedRun, answer: Estimate) -> Table[PhaseLine]:
    from memplan.probe.difference import phases

    columns: list[Column[PhaseLine]] = [
        Column("phase", lambda p: p.phase),
        Column("step", lambda p: str(p.step or ""), right=True),
        Column("GiB traced", lambda p: hundredths(p.traced), right=True),
        Column("estimated", lambda p: hundredths(p.estimated), right=True),
        Column("difference", lambda p: difference(p.traced, p.estimated), right=True),
        Column("largest at", lambda p: p.traced_at, optional=True, wraps=True),
    ]
    return Table(columns, phases(traced, answer))


_DIFFERENCES: tuple[Column[Mismatch], ...] = (
    Column("the estimate", lambda line: line.verdict),
    Column("bytes", lambda line: f"{'+' if line.bytes > 0 else ''}{gib(line.bytes)}", right=True),
    Column("tensors", lambda line: str(line.count), right=True),
    Column("what", lambda line: f"{line.what} {'·'.join(map(str, line.shape))} {line.dtype}".rstrip(), wraps=True),
    Column("where", lambda line: line.where, wraps=True, optional=True),
)


def _differences(traced: TracedRun, answer: Estimate) -> Iterator[Block]:
    """Yield the lines in which trace and estimate differ at the trace's peak, and how many there are elsewhere."""
    from memplan.probe.difference import difference as lines_of

    lines = lines_of(traced, answer)
    phase, _, step = traced.peak_phase.partition(" ")
    at_peak = [line for line in lines if (line.phase, str(line.step or "")) == (phase, step)][:_MAX_ROWS]
    if not lines:
        yield Text("Trace and estimate have the same tensors alive at every phase's peak.")
    elif not at_peak:
        yield Text("Trace and estimate have the same tensors alive at the peak.")
    else:
        yield Table(_DIFFERENCES, at_peak)
    rest = len(lines) - len(at_peak)
    if rest:
        yield Text(f"{rest} further lines, most of them at the peaks of other phases; --json has all.", indent="")


def _categories(traced: TracedRun, answer: Estimate | None) -> Table[tuple[str, int, int]]:
    estimated = {kind: _estimated_kind(answer, kind) if answer else 0 for kind in CATEGORIES}
    columns: list[Column[tuple[str, int, int]]] = [
        Column("at the peak", itemgetter(0)),
        Column("GiB traced", lambda row: hundredths(row[1]), right=True),
        *([Column("estimated", lambda row: hundredths(row[2]), right=True)] if answer else []),
    ]
    rows = [(label, traced.categories[kind], estimated[kind]) for kind, label in CATEGORIES.items()]
    return Table(columns, [row for row in rows if row[1] or row[2]])


def _estimated_kind(answer: Estimate, kind: str) -> int:
    """Return the bytes of a category at the estimate's peak, without cuBLAS's workspaces."""
    return sum(line.bytes for line in answer.ledger if line.kind == kind and not _is_workspace(line))


def compared(traced: TracedRun, answer: Estimate | None) -> dict[str, Any]:
    """Return one traced run for programs: bytes over time, and all differences from the estimate."""
    from memplan.probe.difference import difference as lines_of
    from memplan.probe.difference import phases

    out: dict[str, Any] = {
        **line(traced.run, traced),
        "phases": [p._asdict() for p in traced.phases],
        "categories": dict(traced.categories),
        "timeline": list(traced.allocated),
        "seconds": round(traced.seconds, 2),
        "compared": None,
        "differences": None,
    }
    if answer is not None:
        out["compared"] = [p._asdict() for p in phases(traced, answer)]
        out["differences"] = [{**entry._asdict(), "shape": list(entry.shape)} for entry in lines_of(traced, answer)]
    return out


def line(run: RunSpec, traced: TracedRun | MemplanError) -> dict[str, Any]:
    """Return a traced run in the format of tests/golden, or why it was not traced."""
    from datetime import UTC, datetime

    from memplan.probe.run.rows import run_id, stack

    out: dict[str, Any] = {
        "id": run_id(run),
        "source": "memplan probe --trace",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "memplan": __version__,
    }
    spec = {"run": run.model_dump(mode="json", exclude_defaults=True)}
    if isinstance(traced, MemplanError):
        return {**out, "outcome": "failed", "said": str(traced), **spec}
    steps: dict[str, dict[str, int]] = {}
    for p in traced.phases:
        if p.step:
            peaks = steps.setdefault(str(p.step), {})
            short = _SHORT.get(p.phase, p.phase)
            peaks[short] = max(peaks.get(short, 0), p.peak)
    return {
        **out,
        "stack": stack(traced.versions),
        "outcome": "traced",
        "parameters": traced.parameters,
        "trainable": traced.trainable,
        "loaded": max((p.left for p in traced.phases if p.phase == "load"), default=0),
        "peak": traced.peak,
        "reserved": traced.reserved,
        "phase": traced.peak_phase.partition(" ")[0],
        "steps": steps,
        "notes": list(traced.notes),
        **spec,
    }


def progress(number: int, of: int, line: Mapping[str, Any], answer: Estimate | None) -> str:
    """Return one line about a run of a suite that has been traced."""
    start = f"[{number}/{of}] {line['id']}: "
    if line["outcome"] != "traced":
        return f"{start}{line['outcome']}; {line['said']}"
    estimated = _without_workspaces(answer) if answer else None
    error = difference(line["peak"], estimated)
    return f"{start}{hundredths(line['peak'])} GiB in {line['phase']}" + (f" (estimate {error})" if error else "")


def _without_workspaces(answer: Estimate) -> int:
    """Return the estimate's peak without cuBLAS's workspaces, which a trace does not see."""
    return answer.bytes.allocated - sum(line.bytes for line in answer.ledger if _is_workspace(line))


def _is_workspace(line: Line) -> bool:
    return line.what.startswith("cuBLAS")
