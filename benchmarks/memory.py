"""Measure the memory of a process that answers for ever other models, on one thread or several.

    python -m benchmarks.memory --models 3000 --runs 167
    python -m benchmarks.memory --models 50 --runs 3200 --threads 8

Prints resident MB and seconds of CPU after every hundredth of the models. Each is a bundled model, from the second
round on with a wider vocabulary and MLP, in three methods and with several batches, and its verdict is read.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import memplan
from memplan import MemplanError, RunSpec, estimate
from memplan.models.cards import load_card

METHODS = ("full", "lora", "qlora")
PAGE = 4096


def config_of(number: int) -> dict[str, Any]:
    """Return the config of a model; different numbers have different models."""
    names = memplan.card_names()
    config, wider = dict(load_card(names[number % len(names)]).config), 64 * (number // len(names))
    return config | {
        k: config[k] + wider for k in ("intermediate_size", "vocab_size") if isinstance(config.get(k), int)
    }


def answer(number: int, runs: int) -> int:
    """Estimate a number of runs of a model, and return how many were answered."""
    model, answered = {"config": config_of(number)}, 0
    for i in range(runs):
        batch = {"micro": 1 + i % 4, "sequence": 512 + 64 * (i // len(METHODS))}
        try:
            estimate(RunSpec(model=model, method=METHODS[i % len(METHODS)], gpu="a100-80gb", batch=batch)).verdict  # noqa: B018
        except MemplanError:  # a longer sequence than the model has positions, an encoder
            continue
        answered += 1
    return answered


def resident() -> float:
    """Return the resident memory of this process in MB, on Linux."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * PAGE / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=300)
    parser.add_argument("--runs", type=int, default=12, help="runs of each model")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    print(f"imported: {resident():.0f} MB", flush=True)
    answered, every = 0, max(1, args.models // 100)
    with ThreadPoolExecutor(args.threads) as threads:
        done = as_completed([threads.submit(answer, number, args.runs) for number in range(args.models)])
        for n, future in enumerate(done, 1):
            answered += future.result()
            if n % every == 0 or n == args.models:
                print(f"{n:5d} models {answered:7d} runs {resident():6.0f} MB {time.process_time():7.0f} s", flush=True)


if __name__ == "__main__":
    main()
