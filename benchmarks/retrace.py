"""Trace the runs of a golden file again with the installed libraries, and compare every phase's peak.

python benchmarks/retrace.py traced.jsonl 25
python benchmarks/retrace.py traced_families.jsonl traced_losses.jsonl

Needs the extra memplan[probe]. A number takes that many runs of each file, spread evenly.
"""

from __future__ import annotations

import sys
from statistics import mean
from typing import Any

from benchmarks.accuracy import percent, rows
from memplan import RunSpec
from memplan.core.errors import MemplanError
from memplan.probe.run.trace import TracedRun, traces

PHASES = {"fwd": ("forward", "loss"), "bwd": ("backward",), "clip": ("clip",), "opt": ("step",)}


def spread(found: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Return at most `most` of the rows, spread over the file."""
    return [found[i * len(found) // most] for i in range(most)] if 0 < most < len(found) else found


def errors(row: dict[str, Any], traced: TracedRun) -> tuple[float, float]:
    """Return the relative errors of the peak, and of the worst phase of either step relative to the peak."""
    peak = max(phase.peak for phase in traced.phases if phase.step)
    worst = 0.0
    for step, peaks in row["steps"].items():
        for name, phases in PHASES.items():
            found = [traced.peak_of(phase, int(step)) or 0 for phase in phases]
            worst = max(worst, abs(max(found) - peaks[name]) / row["peak"])
    return abs(peak / row["peak"] - 1), worst


def main() -> None:
    most = next((int(word) for word in sys.argv[1:] if word.isdigit()), 0)
    for name in (word for word in sys.argv[1:] if not word.isdigit()):
        chosen = spread(rows(name), most)
        peaks: list[float] = []
        phases: list[float] = []
        for row, traced in zip(chosen, traces(RunSpec(**row["run"]) for row in chosen), strict=True):
            if isinstance(traced, MemplanError):
                print(f"{name} {row['name']}: {traced}")
                continue
            peak, phase = errors(row, traced)
            peaks.append(peak)
            phases.append(phase)
            if phase > 1e-4:
                print(f"{name} {row['name']}: peak {percent(peak)}, worst phase {percent(phase)}")
        print(
            f"{name}: {len(peaks)} runs, peak {percent(mean(peaks))} on average and {percent(max(peaks))} at worst, "
            f"any phase {percent(max(phases))} at worst"
        )


if __name__ == "__main__":
    main()
