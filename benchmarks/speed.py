"""Steps other people timed, beside the range that memplan gives: how many lie inside.

    python -m benchmarks.speed

Each line of `tests/golden/speeds.jsonl` is a run on one card, or on so many `cards` that each updates a part of the
weights: where it was published, the tokens a second of one card, and the run as a RunSpec, or the id of one in
`published.jsonl`. `gives` says which rates of `memplan.catalogue.hardware.rates` were read from it, a card's or the
host's (launch): those runs say how wide the rows are, the others whether they hold. `cause` says why a run is missed.
"""

from __future__ import annotations

import json
from functools import cache
from typing import Any, NamedTuple

from benchmarks.golden import GOLDEN, rows
from memplan import RunSpec, find_gpu
from memplan.catalogue.hardware.gpu import GPU
from memplan.planning.step_time import Pace, Shares, Work, busy, limits, pace, shares, work


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
        """The share of the peak that products of matrices had, if all else was at its usual rate."""
        return self.share_at(shares(self.gpu)[1])

    def share_at(self, choice: Shares) -> float:
        """The same where all else had those rates."""
        card = limits(self.gpu, frozenset(p.dtype for p in self.work.products))
        assert card is not None
        low, high = 0.001, 100.0
        while high / low > 1.0001:  # a product is bound by its bytes or not, according to the share
            middle = (low * high) ** 0.5
            longer = sum(busy(self.work, card, choice._replace(products=middle))) > self.seconds
            low, high = (middle, high) if longer else (low, middle)
        return low


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
