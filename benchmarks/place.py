"""Time the library's calls for schedulers: place, estimate_many, fits.

    python -m benchmarks.place [--jobs 1000]

Prints CPU seconds, warm (the second of two calls with the same models, other batches and sequences) and cold; how many
GPUs `place` uses next to the best of 20 random orders; milliseconds of `fits` over every catalogued GPU; and the ratio
of one process to two for `estimate_many`, by the clock and by CPU: that of this process and, on average, of the two,
for a machine with other work.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import memplan
from memplan import Job, NodeShape, RunSpec
from memplan.planning.placement import JobDemand, packed, pool_gpus

MODELS = (
    *("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"),
    *("qwen2.5-14b", "qwen2.5-32b", "qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b", "qwen3-14b", "qwen3-32b"),
    *("llama-2-7b", "llama-2-13b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "llama-3.2-3b", "tinyllama-1.1b"),
    *("mistral-7b", "mistral-nemo", "mixtral-8x7b", "gemma-2b", "gemma-7b", "gemma-2-2b", "gemma-2-9b", "gemma-2-27b"),
    *("gemma-3-1b", "gemma-3-4b", "gemma-3-12b", "phi-2", "phi-3-mini", "phi-3-medium", "phi-4", "phi-4-mini"),
    *("smollm2-135m", "smollm2-360m", "smollm2-1.7b", "falcon-7b", "opt-125m", "opt-1.3b", "opt-6.7b", "gpt2"),
    *("gpt2-xl", "pythia-1b", "pythia-6.9b", "olmo-2-7b", "yi-6b", "yi-34b", "bloom-560m", "codellama-7b"),
)
METHODS = ("full", "lora", "qlora")
POOL = (  # 500 GPUs of 12 kinds
    *(
        NodeShape(gpu="t4", cards=4, count=15),
        NodeShape(gpu="rtx-3090", cards=4, count=15),
        NodeShape(gpu="rtx-4090", cards=8, count=5),
    ),
    *(
        NodeShape(gpu="a10", cards=4, count=10),
        NodeShape(gpu="l4", cards=8, count=5),
        NodeShape(gpu="l40s", cards=8, count=5),
    ),
    *(
        NodeShape(gpu="a100-40gb", cards=8, count=5),
        NodeShape(gpu="a100-80gb", cards=8, count=8),
        NodeShape(gpu="h100", cards=8, count=8),
    ),
    *(
        NodeShape(gpu="h200", cards=8, count=3),
        NodeShape(gpu="b200", cards=8, count=1),
        NodeShape(gpu="rtx-a6000", cards=4, count=5),
    ),
)


def runs(count: int, models: tuple[str, ...], random: Random, method: str | None = None) -> Iterator[RunSpec]:
    """Yield runs of the models in turn, each with a batch and a sequence of its own."""
    for i in range(count):
        batch = {"micro": random.randint(1, 4), "sequence": random.choice((256, 384, 512, 768, 1024))}
        yield RunSpec(model=models[i % len(models)], method=method or METHODS[i % len(METHODS)], batch=batch)


def mixed(count: int, models: tuple[str, ...], random: Random) -> Iterator[Job]:
    """Yield jobs that adapt a model on one GPU, or train all of it on one to eight."""
    for run in runs(count, models, random):
        yield Job(run=run, gpus=(1, 2, 4, 8) if run.method.kind == "full" else ())


def known_models(most: int = 50) -> tuple[str, ...]:
    known = set(memplan.card_names())
    return tuple(name for name in MODELS if name in known)[:most]


def cpu(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--many", type=int, help=argparse.SUPPRESS)
    given, random, models = parser.parse_args(), Random(1), known_models()
    if given.many:
        many(given.many, models)
        return
    count = given.jobs
    cards = sum(node.cards * node.count for node in POOL)
    print(f"{count} jobs of {len(models)} models on {cards} GPUs of {len(POOL)} kinds")
    for name in ("cold", "warm"):
        jobs = list(mixed(count, models, random))
        seconds, placement = cpu(lambda jobs=jobs: memplan.place(jobs, POOL))
        print(
            f"place, {name}: {seconds:.2f} s of CPU; {len(placement.placed)} placed on {placement.cards_used} GPUs, "
            f"{len(placement.pending)} pending"
        )
    ratio_to_random(models)
    one_run(models)
    module = [sys.executable, "-m", "benchmarks.place", "--many"]
    found = {n: json.loads(subprocess.check_output([*module, str(n)])) for n in (1, 2)}
    for name in ("wall", "CPU of a process"):
        print(
            f"estimate_many, {name}: {found[1][name]:.2f} s in one process, {found[2][name]:.2f} in two, ratio "
            f"{found[1][name] / found[2][name]:.2f}"
        )


def many(processes: int, models: tuple[str, ...]) -> None:
    """Print the seconds that 1,000 runs take that were not asked for before, as JSON."""
    asked = [run.model_copy(update={"gpu": "a100"}) for run in runs(1000, models, Random(3))]
    for run in asked[:3]:
        _ = memplan.estimate(run).bytes.used  # imports what the others need
    wall, own = time.perf_counter(), time.process_time()
    memplan.estimate_many(asked, processes)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() - own + (children.ru_utime + children.ru_stime) / processes
    print(json.dumps({"wall": time.perf_counter() - wall, "CPU of a process": cpu}))


def ratio_to_random(models: tuple[str, ...]) -> None:
    """Print how many GPUs `place` uses next to the best of 20 random orders, on shared GPUs with room for all."""
    pool = [
        NodeShape(gpu="a100-80gb", cards=8, count=20, shared=True),
        NodeShape(gpu="rtx-3090", cards=4, count=20, shared=True),
    ]
    jobs = [Job(run=run) for run in runs(150, models, Random(2), "qlora")]
    demands = [JobDemand(job, index) for index, job in enumerate(jobs)]
    orders = [Random(seed).sample(demands, len(demands)) for seed in range(20)]
    for demand in demands:
        demand.weigh(pool_gpus(pool))
    tried = [packed(pool, "tightest", order) for order in orders]
    best = min(one.cards_used for one in tried if len(one.placed) == max(len(one.placed) for one in tried))
    used = memplan.place(jobs, pool).cards_used
    print(f"place: {used} GPUs, the best of 20 random orders {best}, ratio {used / best:.3f}")


def one_run(models: tuple[str, ...]) -> None:
    """Print milliseconds of CPU for all GPUs: of a run that was asked for before, and of another sequence of it, also
    with what only tells tight from does not fit."""
    again, other, answers = [], [], []
    for model in models[:20]:
        run = RunSpec(model=model, method="lora")
        memplan.warm([run])
        memplan.fits(run)
        again.append(cpu(lambda run=run: memplan.fits(run))[0])
        longer = RunSpec(model=model, method="lora", batch={"sequence": 1792})
        holds = cpu(lambda run=longer: [fit.fits for fit in memplan.fits(run)])[0]
        other.append(holds)
        answers.append(holds + cpu(lambda run=longer: [fit.answer for fit in memplan.fits(run)])[0])
    number = len(memplan.all_gpus())
    named = ("asked before", again), ("another sequence", other), ("another sequence, every answer", answers)
    for name, found in named:
        print(f"fits, {number} GPUs, {name}: {sorted(found)[len(found) // 2] * 1e3:.2f} ms of CPU, median of 20 models")


if __name__ == "__main__":
    main()
