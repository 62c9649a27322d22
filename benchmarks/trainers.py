"""Time an estimate of every trainer against one of sft, for the same model: CPU time as ratios.

    python -m benchmarks.trainers

`first` is the first answer of a process that has imported memplan, the median of several processes. `warm` asks for
other batches in a process that has answered the run before. Trainers that generate have a prompt's pass, the first
token's and the last one's in addition to the step; PPO has those of three other models, too.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import Any

from memplan import RunSpec, estimate

MODELS = ("llama-3.2-1b", "qwen3-8b")
TRAINERS: dict[str, dict[str, Any]] = {
    "sft": {"trainer": "sft"},
    **{name: {"trainer": name} for name in ("dpo", "kto", "orpo", "cpo", "simpo", "reward", "grpo", "rloo")},
    "grpo, vLLM": {"trainer": "grpo", "rollout": "colocate", "gpu": "h100", "serving": {"max_model_len": 2048}},
    **{name: {"trainer": name, "roles": {"teacher": {"model": ""}}} for name in ("gkd", "distill")},
    "ppo": {"trainer": "ppo", "roles": {"reward": {"model": ""}}},
}
LIMIT = 3  # times sft's
ROUNDS = 5
ONE = "import json, sys, time; from benchmarks.trainers import first; first(json.loads(sys.argv[1]))"


def run_of(model: str, name: str, micro: int = 8, sequence: int = 512) -> dict[str, Any]:
    """Return the run of a trainer: LoRA under autocast, with the other models like the policy."""
    fields = dict(TRAINERS[name])
    fields["roles"] = {role: {"model": model} for role in fields.get("roles", ())}
    profile = "trl-1.10" if name == "ppo" else "trl-1.15"
    batch = {"micro": micro, "sequence": sequence}
    batch |= {"new_tokens": 128} if fields["trainer"] in ("grpo", "rloo", "ppo", "distill") else {}
    return {"model": model, "profile": profile, "method": "lora", "precision": "autocast", "batch": batch, **fields}


def first(run: dict[str, Any]) -> None:
    """Print the seconds of CPU time of the first answer of this process."""
    start = time.process_time()
    _ = estimate(RunSpec(**run)).bytes.allocated
    print(time.process_time() - start)


def firsts(model: str) -> dict[str, float]:
    """Return the median of first answers by trainer. Rounds are interleaved, and one warms the files up."""
    found: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for _ in range(ROUNDS + 1):
        for name, seconds in found.items():
            command = [sys.executable, "-c", ONE, json.dumps(run_of(model, name))]
            seconds.append(float(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def warm(model: str) -> dict[str, float]:
    """Return the median of answers to other batches, by trainer."""
    found: dict[str, list[float]] = {name: [] for name in TRAINERS}
    for round in range(ROUNDS + 1):
        for name, seconds in found.items():
            runs = [RunSpec(**run_of(model, name, 8, 256 + 64 * i + round)) for i in range(20)]
            start = time.process_time()
            for run in runs:
                _ = estimate(run).bytes.allocated
            seconds.append((time.process_time() - start) / len(runs))
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def table(model: str) -> Iterable[str]:
    """Yield a line for each trainer."""
    yield f"{model:20s} {'first':>9s} {'of sft':>7s} {'warm':>9s} {'of sft':>7s}"
    cold, again = firsts(model), warm(model)
    for name in TRAINERS:
        ratios = cold[name] / cold["sft"], again[name] / again["sft"]
        above = f"   above {LIMIT}" if max(ratios) > LIMIT else ""
        left, right = f"{1000 * cold[name]:6.1f} ms {ratios[0]:7.1f}", f"{1000 * again[name]:6.2f} ms {ratios[1]:7.1f}"
        yield f"{name:20s} {left} {right}{above}"


def main() -> None:
    for model in sys.argv[1:] or MODELS:
        for line in table(model):
            print(line, flush=True)


if __name__ == "__main__":
    main()
