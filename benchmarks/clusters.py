"""Time the search for a cluster's layout: CPU milliseconds in a fresh process.

    python -m benchmarks.clusters

Also prints the number of layouts, and how many were estimated before enough fit; `every` estimates all that weights,
gradients and states do not rule out.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Any

from memplan import RunSpec
from memplan.catalogue.hardware.gpus import find_gpu
from memplan.planning.cluster import ClusterSearch, cluster_of, search

LONG = {"sequence": 8192}
CASES: dict[str, tuple[dict[str, Any], int, int, str]] = {
    "llama-3.1-405b, 512 H100": ({"model": "llama-3.1-405b", "batch": LONG}, 64, 8, "h100"),
    "llama-3.1-405b, amp": ({"model": "llama-3.1-405b", "batch": LONG, "precision": "amp"}, 64, 8, "h100"),
    "llama-3.1-70b, 16 A100": ({"model": "llama-3.1-70b", "batch": LONG}, 2, 8, "a100-80gb"),
    "qwen3-235b-a22b, 256 H200": ({"model": "qwen3-235b-a22b", "batch": LONG}, 32, 8, "h200"),
    "llama-3.1-8b lora, 2 RTX 4090": ({"model": "llama-3.1-8b", "method": "lora"}, 1, 2, "rtx-4090"),
}


def timed(name: str, most: int | None) -> tuple[float, ClusterSearch]:
    fields, nodes, each, gpu = CASES[name]
    run, cluster = RunSpec.model_validate(fields), cluster_of(find_gpu(gpu), nodes, each)
    start = time.process_time()
    found = search(run, cluster, most=most)
    return (time.process_time() - start) * 1e3, found


def line(name: str) -> str:
    """Return the row of one case, run in its own process."""
    first, found = timed(name, 5)
    estimated = found.grids - found.too_large - found.slower
    every, _ = timed(name, None)
    return f"{name:32s} {found.grids:>6,} {estimated:>10,} {len(found.placed):>5} {first:>9,.0f} {every:>9,.0f}"


def main() -> None:
    if len(sys.argv) > 1:
        print(line(sys.argv[1]))
        return
    print(f"{'run':32s} {'grids':>6s} {'estimated':>10s} {'shown':>5s} {'ms':>9s} {'every, ms':>9s}")
    for name in CASES:
        done = subprocess.run([sys.executable, "-m", "benchmarks.clusters", name], check=True, text=True, stdout=-1)
        print(done.stdout, end="")


if __name__ == "__main__":
    main()
