"""A check in words: bytes, GPUs, and the sentence about a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import printable
from memplan.core.units import GIB, decimal
from memplan.gate.difference import Changes
from memplan.gate.rows import Check, CheckedRun
from memplan.report.blocks import Block, Notes, Text

MARKS = {"over": "❌", "wrong": "❌", "unknown": "❔", "near": "⚠️", "fits": "✅"}
LEVELS = {"over": "error", "wrong": "error", "moved": "error", **dict.fromkeys(("unknown", "near", "note"), "warning")}
TITLES = {
    "over": "a run does not fit",
    "wrong": "a run's file is wrong",
    "moved": "facts are not those of memplan.lock",
    "note": "note",
    "unknown": "memplan cannot say",
    "near": "a run nearly does not fit",
}


def gpu_title(name: str) -> str:
    """Return a GPU's product name."""
    return find_gpu(name).title.removeprefix("GeForce ")


def on_gpu(row: CheckedRun) -> str:
    """Return a row's GPU and how many there are: `2x RTX 3090`."""
    if not row.gpu:
        return ""
    name = gpu_title(row.gpu)
    return f"{row.gpus}x {name}" if row.gpus > 1 else name


def tenths(n: int) -> str:
    """Return bytes as GiB with one decimal and without the unit."""
    return decimal(n, GIB, 1)


def size(n: int) -> str:
    return f"{tenths(n)} GiB" if n else ""


def change(n: int) -> str:
    """Return a difference of bytes: `+6.9 GiB`; `0` if it rounds to nothing."""
    return f"{'+' if n > 0 else ''}{tenths(n)} GiB" if abs(n) * 20 >= GIB else "0"


def value(given: Any) -> str:
    """Return a value as it is written in a file, cut off."""
    return printable(given if isinstance(given, str) else json.dumps(given), 40)


def sentence(row: CheckedRun) -> str:
    """Return what a row says: what the run needs, of how much, and the value that takes most."""
    if row.status in ("unknown", "wrong"):
        return row.error
    needs = f"{tenths(row.peak)} of {tenths(row.limit)} GiB on {on_gpu(row)}"
    if row.verdict == "does not start":
        return f"does not start on {on_gpu(row)}: {row.reason}"
    if row.status == "fits":
        return f"takes {needs}"
    text = f"needs {needs}" if row.status == "over" else f"takes {needs}; {nearness(row)}"
    return f"{text}; {takes_most(row)} of it" if row.deciding is not None else text


def nearness(row: CheckedRun) -> str:
    """Return why a run is near its limit."""
    return f"it is over the warning of {size(row.warn)}" if row.warn else f"it may take {size(row.high)}"


def takes_most(row: CheckedRun, code: str = "") -> str:
    """Return the value that takes most: `sequence_len 4096 costs 6.9 GiB`; empty if none does. `code` is put around
    the key."""
    if row.deciding is None:
        return ""
    key = f"{code}{row.deciding.place.key}{code}"
    return f"{key} {value(row.deciding.value)} costs {tenths(row.deciding.bytes)} GiB"


def reasons(row: CheckedRun, code: str = "") -> str:
    """Return why a run that can be answered is over its limit or near it, with the line that takes most."""
    near = nearness(row) if row.status == "near" else ""
    most = f"{takes_most(row, code)} (line {row.deciding.place.line})" if row.deciding is not None else ""
    return "; ".join(filter(None, (row.reason, near, most)))


def line_of(row: CheckedRun) -> int | None:
    """Return the line of the run's file that a report points at."""
    if row.deciding is not None and row.deciding.place.file == row.run:
        return row.deciding.place.line
    first = next((each.line for each in row.keys if each.file == row.run), None)
    return row.line if row.status in ("unknown", "wrong") else first


def ending(headline: str, rows: Sequence[CheckedRun], found: Check | Changes) -> Iterator[Block]:
    """Yield what stands below a table: a sentence, errors, and what is wrong in the budgets."""
    yield Text(headline)
    for status, title in (("wrong", "Mistakes"), ("unknown", "Cannot be answered")):
        texts = [f"{row.run}: {row.error}" for row in rows if row.status == status]
        texts += [problem.text for problem in found.problems] if status == "wrong" else []
        if texts:
            yield Notes(texts, title)
    if isinstance(found, Check) and found.moved:
        yield Notes(found.moved, "Facts that are not those of memplan.lock (memplan lock writes them)")
    if found.notes:
        yield Notes(found.notes)


def share(n: int, total: int) -> str:
    """Return how many runs of all: `2 of 5 runs`."""
    return "the run" if total == 1 else f"{n} of {total} runs"


def headline(check: Check) -> str:
    """Return how many runs are over their budget, and how many cannot be answered, in a sentence."""
    runs = {row.run for row in check.rows}

    def of(*statuses: str) -> int:
        return len({row.run for row in check.rows if row.status in statuses})

    over, unknown, wrong = of("over"), of("unknown"), of("wrong") + len(check.problems)
    all_fit = "the run fits" if len(runs) == 1 else f"all {len(runs)} runs fit"
    if not runs:
        all_fit = "no runs are checked"
    elif unknown or wrong:
        all_fit = f"no run is over its budget, of {len(runs)}"
    parts = [f"{share(over, len(runs))} {'does' if over == 1 else 'do'} not fit" if over else all_fit]
    parts += [f"{unknown} cannot be answered"] if unknown else []
    parts += [f"{wrong} {'has a mistake' if wrong == 1 else 'have mistakes'}"] if wrong else []
    parts += [f"{len(check.moved)} facts moved"] if check.moved else []
    return "; ".join(parts)
