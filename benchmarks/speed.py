"""Compare published step times with memplan's ranges: how many are inside.

    python -m benchmarks.speed

Each line of `tests/golden/speeds.jsonl` is a run on one card, or on several `cards` that each update a part of the
weights: its source, the tokens per second of one card, and the run as a RunSpec, or the id of one in `published.jsonl`.
`gives` names the rates of `memplan.catalogue.hardware.rates` fitted to the run, a card's or the host's (launch): those
runs determine the ranges, the others test them. `cause` says why a run is missed.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

from benchmarks.golden import GOLDEN, rows
from memplan import RunSpec, find_gpu
from memplan.catalogue.hardware.gpu import GPU
from memplan.planning.step_time import Pace, Shares, Work, busy, limits, shares, step_pace, work


class Timed(NamedTuple):
    """A published run and memplan's pace; `seconds` is the measured time of a step."""

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
        """The usual time's error relative to the measured time."""
        return self.pace.seconds.usual / self.seconds - 1

    @property
    def share(self) -> float:
        """The share of peak that matrix products reached, if everything else ran at its usual rate."""
        return self.share_at(shares(self.gpu)[1])

    def share_at(self, choice: Shares) -> float:
        """Return the share of peak of matrix products, if everything else ran at these rates."""
        card = limits(self.gpu, frozenset(p.dtype for p in self.work.products))
        assert card is not None
        low, high = 0.001, 100.0
        while high / low > 1.0001:  # the share decides whether a product is bound by its bytes
            middle = (low * high) ** 0.5
            longer = sum(busy(self.work, card, choice._replace(products=middle))) > self.seconds
            low, high = (middle, high) if longer else (low, middle)
        return low


@cache
def published() -> dict[str, dict[str, Any]]:
    """Return every published speed with its run, by id."""
    runs = {row["id"]: row["run"] for row in rows("published.jsonl")}
    found = map(json.loads, (GOLDEN / "speeds.jsonl").read_text("utf-8").splitlines())
    return {row.get("id") or row["golden"]: {**row, "run": row.get("run") or runs[row["golden"]]} for row in found}


@cache
def timed(id: str) -> Timed:
    """Return a published speed with memplan's pace."""
    row = published()[id]
    run = RunSpec(**row["run"])
    gpu, counted = find_gpu(str(run.gpu)), work(run)
    counted = counted._replace(update=counted.update // row.get("cards", 1))
    found = step_pace(counted, gpu)
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
