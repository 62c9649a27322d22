"""Trace training runs of every dense family at real sizes, and print the rows for tests/estimate/test_traced_steps.py.

python tests/golden/trace_runs.py > tests/golden/traced_runs.jsonl

Runs are drawn once, with a fixed seed: every family that the installed transformers has x full, LoRA, QLoRA, DoRA x
checkpointing on and off; attention, loss, optimizer, precision, batch and loop options vary in turn. Takes about an
hour on one core. Lines are written as they come; runs in a file given as an argument are not traced again.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from memplan.core.errors import MemplanError
from memplan.estimate.estimate import estimate
from memplan.models.cards import card_names, load_card
from memplan.probe.libraries import versions
from memplan.probe.run.trace import TracedRun, traces
from memplan.resolve.decide import fill_from_profile
from memplan.spec.run import RunSpec

METHODS = ("full", "lora", "qlora", "dora")
ATTENTION = ("sdpa", "flash_attention_2", "sdpa", "eager", "sdpa_efficient", "sdpa", "sdpa_math")
LOSSES = ("hf", "fused", "hf", "chunked", "hf", "hf", "chunked_lm_head")
OPTIMIZERS = (
    *("adamw_torch_fused", "adamw_torch", "paged_adamw_8bit", "sgd", "adafactor", "adamw_bnb_8bit"),
    *("paged_adamw_32bit", "lion_8bit", "rmsprop", "adagrad"),
)
PRECISIONS: tuple[dict[str, Any], ...] = (
    {"weights": "bf16"},
    {"weights": "bf16", "autocast": True},
    {"weights": "fp32", "compute": "bf16", "autocast": True},
    {"weights": "fp16"},
    {"weights": "bf16"},
)
TARGETS = ("all-linear", "all-linear", "attention")
NO_CLASS = ("baichuan", "chatglm", "internlm2", "mimo", "minicpm", "nemotron-nas", "qwen")  # in transformers 5
LARGEST = 16_000_000_000  # parameters; for families without a smaller model, the smallest
LARGE = ("llama-3.1-70b", "qwen2.5-72b")


def sizes() -> dict[str, list[str]]:
    """Return cards by family, smallest first."""
    found: dict[str, list[tuple[int, str]]] = {}
    for name in card_names():
        card = load_card(name)
        if card.model_type not in NO_CLASS:
            found.setdefault(card.model_type, []).append((int(card.card["parameters"]), name))
    out: dict[str, list[str]] = {}
    for family, cards in sorted(found.items()):
        cards.sort()
        out[family] = [name for n, name in cards if n <= LARGEST] or [cards[0][1]]
    return out


def draw() -> Iterator[RunSpec]:
    rng = random.Random(20261125)
    turn = {name: cycle(values) for name, values in (("a", ATTENTION), ("l", LOSSES), ("o", OPTIMIZERS))}
    precision, targets = cycle(PRECISIONS), cycle(TARGETS)
    for method in METHODS:
        for checkpointing in ("full", "none"):
            for cards in sizes().values():
                yield one(rng, rng.choice(cards), method, checkpointing, turn, next(precision), next(targets))
            for name in LARGE:
                if checkpointing == "full" or method == "full":
                    yield one(rng, name, method, checkpointing, turn, next(precision), next(targets))
    for _ in range(60):
        family = rng.choice(["llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "granite", "olmo2"])
        checkpointing = rng.choice(["full", "none"])
        method = rng.choice(METHODS)
        yield one(rng, rng.choice(sizes()[family]), method, checkpointing, turn, next(precision), next(targets))


def one(
    rng: random.Random,
    name: str,
    kind: str,
    checkpointing: str,
    turn: dict[str, Any],
    precision: dict[str, Any],
    targets: str,
) -> RunSpec:
    method: dict[str, Any] = {"kind": kind}
    if kind != "full":
        method |= {"rank": rng.choice([8, 16, 64]), "dropout": rng.choice([0.0, 0.0, 0.05])}
        method["adapter_dtype"] = rng.choice(["fp32", "fp32", "bf16"])
        if targets == "attention" and kind != "dora":
            method["targets"] = ["q_proj", "v_proj"]
    if kind == "qlora":
        method["quantization"] = {
            "kbit_preparation": rng.choice([True, False, "trl"]),
            "double_quant": rng.choice([True, False]),
        }
        precision = {**precision, "weights": "bf16" if precision["weights"] == "fp32" else precision["weights"]}
        precision["compute"] = precision["weights"]
    loss, attention = next(turn["l"]), next(turn["a"])
    if loss == "chunked_lm_head" and precision.get("autocast"):
        loss = "chunked"
    positions = load_card(name).max_position_embeddings or 4096
    return RunSpec.model_validate(
        {
            "model": name,
            "method": method,
            "precision": precision,
            "optimizer": {"name": next(turn["o"])},
            "batch": {
                "micro": rng.choice([1, 2, 2, 4]),
                "sequence": min(positions, rng.choice([512, 1024, 2048, 4096])),
                "accumulation": rng.choice([1, 1, 1, 2]),
            },
            "kernels": {"attention": attention, "checkpointing": checkpointing, "loss": loss},
            "loop": {"padded": rng.random() < 0.15, "clip_grad_norm": rng.choice([1.0, 1.0, None])},
            "gpu": rng.choice(["a100-sxm-80gb", "h100-sxm-80gb", "rtx-4090", "rtx-3090"]),
        }
    )


def line(name: str, run: RunSpec, traced: TracedRun) -> dict[str, Any]:
    steps = {
        str(step): {
            short: max((p.peak for p in traced.phases if p.step == step and p.phase in phases), default=0)
            for short, phases in (
                ("fwd", ("forward", "loss")),
                ("bwd", ("backward",)),
                ("clip", ("clip",)),
                ("opt", ("step",)),
            )
        }
        for step in (1, 2)
    }
    for phase, word in (("generate", "gen"), ("rollout", "rollout"), ("reward", "reward")):
        for step, peaks in steps.items() if any(p.phase == phase for p in traced.phases) else ():
            peaks[word] = traced.peak_of(phase, int(step)) or 0
    if any(p.phase == "eval" for p in traced.phases):
        steps["2"]["eval"] = max(p.peak for p in traced.phases if p.phase == "eval")
    top = max((p for p in traced.phases if p.step or p.phase == "eval"), key=lambda p: p.peak)
    event = traced.events[top.peak_at]
    storage = traced.storages[event if event >= 0 else ~event]
    return {
        "name": name,
        "run": run.model_dump(mode="json", exclude_defaults=True),
        "parameters": traced.parameters,
        "trainable": traced.trainable,
        "peak": top.peak,
        "phase": "step" if top.phase == "clip" else top.phase,
        "at": f"{storage.module} {storage.op}".strip(),
        "steps": steps,
    }


def write(wanted: Sequence[tuple[str, RunSpec]]) -> None:
    """Trace the runs, and print a named line for each; runs that cannot be traced are listed on standard error."""
    for (name, run), traced in zip(wanted, traces([run for _, run in wanted]), strict=True):
        if isinstance(traced, MemplanError):
            print(f"{name}: {traced}", file=sys.stderr, flush=True)
        else:
            print(json.dumps(line(name, run, traced)), flush=True)


def same(run: RunSpec) -> str:
    """Return the run with its defaults filled in, as text."""
    return fill_from_profile(run).model_dump_json()


def main() -> None:
    done: set[str] = set()
    if len(sys.argv) > 1 and Path(sys.argv[1]).exists():
        lines = map(json.loads, Path(sys.argv[1]).read_text("utf-8").splitlines())
        done = {same(RunSpec(**row["run"])) for row in lines if "run" in row}
    wanted: list[RunSpec] = []
    for run in draw():
        try:
            estimate(run)
        except MemplanError as error:
            print(f"{run.model}: {error}", file=sys.stderr)
            continue
        if same(run) not in done:
            wanted.append(run)
    if not done:
        about = "Training steps of every dense family at real sizes, traced: see tests/golden/trace_runs.py."
        print(json.dumps({"about": about, "date": "2026-11-25", "versions": dict(versions())}), flush=True)
    write([(f"{run.model}-{run.method.kind}", run) for run in wanted])


if __name__ == "__main__":
    main()
