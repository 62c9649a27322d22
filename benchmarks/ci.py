"""Measure what `.ci/run` takes at a commit, against another commit on the same machine.

    python -m benchmarks.ci 9edb2387         # the newest commit against this one
    python -m benchmarks.ci 9edb2387 v0.2.0

Runs both in clones, one after the other, and prints seconds by the clock and of CPU, and the ratio of the second to the
first. A run that fails is timed, too: the end of what it printed is shown.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

CHECKOUT = Path(__file__).parent.parent


class Run(NamedTuple):
    """Seconds by the clock, and of CPU in all processes of a run that have ended."""

    clock: float
    cpu: float


def cpu_of_children() -> float:
    """Return the seconds of CPU of all processes that this one has waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(commit: str, into: Path) -> Run:
    """Run `.ci/run` of a commit in a clone of the checkout."""
    subprocess.run(["git", "clone", "--quiet", CHECKOUT, into], check=True)
    subprocess.run(["git", "-c", "advice.detachedHead=false", "checkout", "--quiet", commit], cwd=into, check=True)
    clock, cpu = time.monotonic(), cpu_of_children()
    ended = subprocess.run([".ci/run"], cwd=into, capture_output=True, text=True, check=False)
    took = Run(time.monotonic() - clock, cpu_of_children() - cpu)
    print(f"{commit}: {took.clock:.0f} s, {took.cpu:.0f} s of CPU", flush=True)
    if ended.returncode:
        print(f"and failed with exit status {ended.returncode}:", *ended.stdout.splitlines()[-20:], sep="\n")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old")
    parser.add_argument("new", nargs="?", default="HEAD")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # some tests run as another user
        old, new = (run(commit, Path(folder, name)) for name, commit in (("old", args.old), ("new", args.new)))
    print(f"ratio: {new.clock / old.clock:.2f} by the clock, {new.cpu / old.cpu:.2f} of CPU")


if __name__ == "__main__":
    main()
