"""Time `memplan.grid` on a thousand batches by a thousand sequences, against single estimates, per core.

    python -m benchmarks.grid

Seconds are the process's CPU time, over all threads. The reference is `estimate` on runs of the same grid in the same
process, with RunSpecs created before; both compute bytes, phase, and the verdict as far as bounds decide it. `unclear`
is the share of runs whose verdict needs a replay of their allocations, and the time of each replay.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from memplan import RunSpec, estimate, find_gpu, grid

RUNS: dict[str, dict[str, Any]] = {
    "qwen2-7b, qlora, 3090": {"model": "qwen2-7b", "gpu": "rtx-3090", "method": "qlora"},
    "llama-3.1-8b, full, h100": {"model": "llama-3.1-8b", "gpu": "h100-sxm", "optimizer": "adamw_8bit"},
    "llama-3.2-1b, lora, nothing checkpointed, a100": {
        "model": "llama-3.2-1b",
        "gpu": "a100-sxm-80gb",
        "method": "lora",
        "kernels": {"checkpointing": "none"},
    },
}
BATCHES = range(1, 1001)
SEQUENCES = range(8, 8001, 8)
EVERY = 10  # one value in this many per axis, for timing replays
SOME = 2000  # runs estimated one by one


class Taken(NamedTuple):
    seconds: float
    result: Any


def taken(function: Callable[[], Any]) -> Taken:
    start = time.process_time()
    result = function()
    return Taken(time.process_time() - start, result)


def one_by_one(runs: list[RunSpec], usable: int) -> None:
    for run in runs:
        answer = estimate(run)
        _ = answer.bytes.allocated, answer.peak.phase, answer.fits_card_of(usable)


def main() -> None:
    pick = random.Random(0)
    for name, fields in RUNS.items():
        run = RunSpec(**fields)
        whole = taken(lambda run=run: grid(run, batch=BATCHES, sequence=SEQUENCES))
        again = taken(lambda run=run: grid(run, batch=BATCHES, sequence=SEQUENCES))
        cells = again.result.allocated.size
        places = [(pick.randrange(len(BATCHES)), pick.randrange(len(SEQUENCES))) for _ in range(SOME)]
        runs = [again.result.at(*place) for place in places]
        single = taken(lambda runs=runs, gpu=fields["gpu"]: one_by_one(runs, find_gpu(gpu).usable))
        coarse = grid(run, batch=BATCHES[::EVERY], sequence=SEQUENCES[::EVERY])
        replays = taken(lambda coarse=coarse: coarse.answers)
        rate, reference = cells / again.seconds, SOME / single.seconds
        print(
            f"{name:48s} {rate / 1e6:5.2f} million/s (first {cells / whole.seconds / 1e6:.2f})   "
            f"{rate / reference:6.0f} of one by one ({reference:,.0f}/s)   "
            f"unclear {100 * again.result.unclear / cells:.3f} %, "
            f"{1e3 * replays.seconds / max(1, coarse.unclear):.2f} ms each ({coarse.unclear} replayed)"
        )


if __name__ == "__main__":
    main()
