"""Steps other people timed, beside the range that memplan gives: how many lie inside.

    python -m benchmarks.speed

Each line of `tests/golden/speeds.jsonl` is a run on one card, or on so many `cards` that each updates a part of the
weights: where it was published, the tokens a second of one card, and the run as a RunSpec, or the id of one in
`published.jsonl`. `gives` names the row of `memplan.catalogue.rates` that was read from it: those runs say how wide the
row is, the others whether it holds. `cause` says why a run is missed, if that is known.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

from benchmarks.golden import GOLDEN, rows
from memplan import RunSpec, find_gpu
from memplan.catalogue import rates
from memplan.gpus import GPU
from memplan.speed import Pace, Work, pace, work


class Timed(NamedTuple):
    """A published run beside memplan's pace; `seconds` of a step were measured."""

    id: str
    gives: str
    cause: str
    gpu: GPU
    work: Work
    pace: Pace
    seconds: float

    @property
    def inside(self) -> bool:
        return self.pace.seconds.low <= self.seconds <= self.pace.seconds.high

    @property
    def error(self) -> float:
        """How much longer the usual time is than the measured one."""
        return self.pace.seconds.usual / self.seconds - 1

    @property
    def share(self) -> float:
        """The share of the peak that products had, if all other bytes moved at the usual share of the bandwidth."""
        return self.share_at(rates.BANDWIDTH.usual)

    def share_at(self, bandwidth: int) -> float:
        per_byte = 1 / (self.gpu.bandwidth_gbps * 1e9 * bandwidth / 100)
        peak = {"bf16": self.gpu.bf16_tflops, "fp16": self.gpu.fp16_tflops}
        peak["fp32"] = peak["bf16"] / rates.fp32_units(self.gpu.compute_capability).per
        left, busy = self.seconds - (self.work.moved + self.work.update) * per_byte, 0.0
        for p in self.work.products:
            computing, reading = p.operations / peak[p.dtype] / 1e12, p.bytes * per_byte
            if computing >= reading:
                busy += p.times * computing
            else:
                left -= p.times * reading
        return busy / left


@cache
def published() -> dict[str, dict[str, Any]]:
    """Every published speed by its id, with its run."""
    runs = {row["id"]: row["run"] for row in rows("published.jsonl")}
    found = map(json.loads, (GOLDEN / "speeds.jsonl").read_text("utf-8").splitlines())
    return {row.get("id") or row["golden"]: {**row, "run": row.get("run") or runs[row["golden"]]} for row in found}


@cache
def timed(id: str) -> Timed:
    """One of them beside memplan's pace."""
    row = published()[id]
    run = RunSpec(**row["run"])
    gpu, counted = find_gpu(str(run.gpu)), work(run)
    counted = counted._replace(update=counted.update // row.get("cards", 1))
    found = pace(counted, gpu)
    assert found is not None
    seconds = counted.tokens / row["tokens_per_second"]
    return Timed(id, row.get("gives", ""), row.get("cause", ""), gpu, counted, found, seconds)


def main() -> None:
    print(f"{'run':78} {'card':10} {'seconds':>8} {'low':>8} {'usual':>8} {'high':>8} inside  share  gives")
    every = [timed(id) for id in published()]
    for t in every:
        s, inside = t.pace.seconds, "yes" if t.inside else "no"
        print(
            f"{t.id:78} {t.gpu.name[:10]:10} {t.seconds:8.2f} {s.low:8.2f} {s.usual:8.2f} {s.high:8.2f} {inside:6} "
            f"{t.share:6.2f}  {t.gives}"
        )
    for title, those in (
        ("runs a rate was read from", [t for t in every if t.gives]),
        ("other runs", [t for t in every if not t.gives]),
    ):
        off = sorted(abs(t.error) for t in those)
        print(
            f"{title}: {sum(t.inside for t in those)} of {len(those)} inside; "
            f"the usual time is off by {100 * off[len(off) // 2]:.0f} % in the middle, {100 * off[-1]:.0f} % at most"
        )


if __name__ == "__main__":
    main()
