"""Time one estimate in a warm process: median microseconds, and ratios to references.

    python benchmarks/in_process.py [first [step]]

With `first` only the first estimate of each bundled model is timed, full and with LoRA, in CPU time; of every second
model with a `step` of 2.

The reference for the whole estimate is pydantic validating the same run; for the depth, the same model with one layer.
`verdict` includes reading the peak and the verdict, as a scheduler does: a clear verdict is nearly free, another takes
a replay of the run's allocations. `used` includes that replay. `walk` evaluates every phase, as an estimate only does
when they are read.

A plan and the offers of the complete catalogue are timed for new models, and again: in milliseconds, and as a multiple
of a repeated estimate of the same run. The time of imports in a fresh process is in `benchmarks/planners.py`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from compileall import compile_dir
from contextlib import suppress
from pathlib import Path
from typing import Any

import memplan
from memplan import Estimate, RunSpec, estimate
from memplan.core.arithmetic import ONE_RUN
from memplan.core.errors import MemplanError
from memplan.engine.walk import largest, values
from memplan.estimate.training import reserved
from memplan.estimate.training_peaks import training_peaks
from memplan.models.cards import card_names, load_card
from memplan.planning.offers import offers
from memplan.planning.plan import plan
from memplan.program.axes import run_axes
from memplan.program.training.passes import PHASES
from memplan.resolve.decide import decide

METHODS: dict[str, dict[str, Any]] = {
    "qlora": {"method": "qlora"},
    "full": {"method": "full"},
    "lora, nothing checkpointed": {"method": "lora", "kernels": {"checkpointing": "none"}},
}
PLANNED: dict[str, tuple[Callable[[RunSpec], object], RunSpec]] = {
    "plan, full": (plan, RunSpec(model="llama-3.1-8b", gpu="rtx-4090")),
    "plan, qlora": (plan, RunSpec(model="mistral-7b-v0.1", gpu="rtx-3090", method="qlora", batch={"micro": 16})),
    "plan, nothing fits": (plan, RunSpec(model="qwen2.5-72b", gpu="t4", precision="fp16")),
    "offers, full": (offers, RunSpec(model="qwen3-8b")),
    "offers, qlora": (offers, RunSpec(model="llama-3.1-70b", method="qlora")),
}
BATCHES = [{"micro": micro, "sequence": sequence} for micro in range(1, 9) for sequence in range(512, 4096, 64)]


def median_us(function: Callable[[Any], object], arguments: Sequence[Any], rounds: int = 5) -> float:
    times: list[float] = []
    for _ in range(rounds):
        for argument in arguments:
            start = time.perf_counter()
            function(argument)
            times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def first_estimates(step: int) -> None:
    """Print the CPU milliseconds of the first estimates of bundled models in a warm process."""
    compile_dir(Path(memplan.__file__).parent, quiet=1)  # as an install does: a family's first estimate imports it
    estimate(RunSpec(model="qwen2-7b"))
    times: list[tuple[float, str]] = []
    for name in sorted(card_names())[::step]:
        for method in ("full", "lora"):
            start = time.process_time()
            with suppress(MemplanError):  # a model that has no such training
                estimate(RunSpec(model=name, method=method))
                times.append(((time.process_time() - start) * 1e3, f"{name}, {method}"))
    times.sort()
    median, p90, (most, slowest) = times[len(times) // 2][0], times[len(times) * 9 // 10][0], times[-1]
    print(f"{len(times)} first estimates: median {median:.1f} ms, p90 {p90:.1f}, worst {most:.0f} ({slowest})")


def read_by_a_scheduler(answer: Estimate) -> tuple[object, ...]:
    """Read the bytes, the phase of the peak, and the verdict."""
    return answer.bytes.allocated, answer.peak, answer.verdict.answer


def engine_walk(run: RunSpec) -> Callable[[RunSpec], object]:
    """Run only the engine's walk: from a batch to the peak of every phase."""
    decided = decide(run)
    program = training_peaks(decided).program
    phases = [program.moments.terms.first[phase] for phase in PHASES if program.moments.terms.first[phase]]

    def walked(run: RunSpec) -> object:
        axes = run_axes(program, run.batch.micro, run.batch.sequence, decided.half, decided.large_tiles, ONE_RUN)
        numbers = values(program.moments.variables, axes)
        return [largest(terms, numbers) for terms in phases]

    return walked


def main() -> None:
    if sys.argv[1:2] == ["first"]:
        first_estimates(int(sys.argv[2]) if len(sys.argv) > 2 else 1)
        return
    print(f"{'run':30s} {'validate':>9s} {'estimate':>9s} {'both':>9s} {'walk':>9s}   both / validate")
    for name, fields in METHODS.items():
        run = RunSpec(model="qwen2-7b", gpu="3090", **fields)
        validate = median_us(lambda batch, f=fields: RunSpec(model="qwen2-7b", gpu="3090", batch=batch, **f), BATCHES)
        runs = [RunSpec(model="qwen2-7b", gpu="3090", batch=batch, **fields) for batch in BATCHES]
        estimate(runs[0])
        answered = median_us(estimate, runs)
        walked = median_us(engine_walk(run), runs)
        decided = median_us(lambda run: read_by_a_scheduler(estimate(run)), runs, 1)
        reserved.cache_clear()
        used = median_us(lambda run: estimate(run).bytes.used, runs[::16], 1)
        both = validate + answered
        print(
            f"{name:30s} {validate:6.1f} us {answered:6.1f} us {both:6.1f} us {walked:6.1f} us   {both / validate:.1f}"
            f"   verdict {decided:6.1f} us   used {used / 1000:5.1f} ms"
        )

    for name, (function, run) in PLANNED.items():
        first = median_us(function, [run], 1)
        later = median_us(function, [run], 9)
        single = median_us(estimate, [run], 99)
        print(
            f"{name:30s} first {first / 1000:7.1f} ms   later {later / 1000:7.1f} ms"
            f"   {first / single:,.0f} and {later / single:,.0f} of one estimate"
        )

    config = dict(load_card("qwen2-7b").config)
    shallow = 0.0
    for layers in (1, 4, 28, 1000):
        model = {"config": {**config, "num_hidden_layers": layers, "max_window_layers": layers}}
        runs = [RunSpec(model=model, batch=batch) for batch in BATCHES]
        estimate(runs[0])
        median_us(estimate, runs, 1)
        taken = median_us(estimate, runs)
        shallow = shallow or taken
        print(f"{layers:5d} layers {taken:6.1f} us   {taken / shallow:.2f} of one layer's")


if __name__ == "__main__":
    main()
