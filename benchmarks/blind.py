"""Trace runs drawn at random with the installed libraries, and compare them with the estimates.

    python -m benchmarks.blind 100 --seed 1
    python -m benchmarks.blind 100 --seed 1 --rows tests/golden/blind.jsonl    # also appends the runs and their peaks
    python -m benchmarks.blind 1 --seed 1 --start 17                           # one run again

Draws a family or a card, a task, and some of what a run may say, until that many runs were traced. Prints each miss
above 0.1 % and each refusal of a run that can be traced, with the command that shows it, then how the errors are
distributed. Runs that the installed libraries cannot run do not count. Words of the model alone (its objectives, names
of layers) are drawn from the model's own. Needs the extra memplan[probe].
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from benchmarks.accuracy import MISS, peak_error, percent
from benchmarks.sweep import FAMILIES
from memplan import MemplanError, ModelSpec, RunSpec, card_names, estimate, find_model
from memplan.models.cards import load_card
from memplan.models.peft_methods import PEFT_METHODS
from memplan.probe.refusals import OPTIMIZER_NAMES
from memplan.probe.run.trace import TracedRun, Tracer
from memplan.program.stored.checkpoint import built_tensors
from tests.golden.trace_inference import row as inference_row
from tests.golden.trace_runs import line as training_row

SHOWN = 0.001
LARGEST = 4_000_000_000  # parameters of a card that is drawn
COMMON, RARE = 0.25, 0.12  # the share of runs that a field is drawn for
Run = dict[str, Any]


@cache
def cards() -> tuple[str, ...]:
    """Return the cards of models that are quickly traced."""
    return tuple(name for name in card_names() if int(load_card(name).card["parameters"]) <= LARGEST)


# Field -> values.
SHARED: Mapping[str, Sequence[Any]] = {
    "kernels.attention": ("sdpa", "eager", "sdpa_math", "sdpa_efficient", "flash_attention_2"),
    "loop.padded": (True,),
    "batch.images": (1, 2),
}
TRAINING: Mapping[str, Sequence[Any]] = {
    "precision": ("amp", "mixed", "fp32", "fp16", {"weights": "bf16", "autocast": True}),
    "optimizer": tuple(name for name in OPTIMIZER_NAMES if name != "none"),
    "batch.accumulation": (2, 3),
    "kernels.checkpointing": ("none", "none", "full"),
    "kernels.reentrant": (True,),
    "kernels.loss": ("chunked", "fused", "chunked_lm_head", "chunked_nll"),
    "loop.hold_outputs": (True, "step"),
    "loop.trainer": (True,),
    "loop.clip_grad_norm": (0.0, 0.5),
    "optimizer.in_backward": (True,),
    "optimizer.foreach": (False,),
}
ADAPTERS: Mapping[str, Sequence[Any]] = {
    "method.rank": (1, 8, 16),
    "method.dropout": (0.1,),
    "method.targets": (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"], "attention"),
    "method.adapter_dtype": ("fp32", "bf16"),
}
RUNNING: Mapping[str, Sequence[Any]] = {
    "precision": ("fp32", "fp16", {"weights": "fp32", "autocast": True}),
    "generation.num_beams": (2, 4),
    "generation.do_sample": (True,),
    "generation.cache_implementation": ("static", "offloaded", "quantized"),
    "generation.prompt_lookup_num_tokens": (3,),
    "generation.prefill_chunk_size": (16,),
    "method.quantization.format": ("nf4", "int8"),
}
METHODS = (*("full",) * 4, *("lora",) * 4, "qlora", "qlora", "dora", "qdora", "freeze")


def drawn_run(random: Random) -> Run:
    """Return a random run, which may be one that cannot be."""
    is_small = random.random() < 0.5
    family = random.choice(list(FAMILIES))
    small = {"config": {"model_type": family, **FAMILIES[family]}}
    run: Run = {"model": small if is_small else random.choice(cards()), "gpu": "a100-sxm-80gb"}
    model = ModelSpec(small["config"]) if is_small else find_model(run["model"])
    run["batch"] = {"micro": random.randint(1, 4)}
    if not model.only_sequence:
        longest = (model.longest_target or model.longest_sequence or 4096) - 12  # leaves room for new tokens
        run["batch"]["sequence"] = min(longest, int(2 ** random.uniform(4, 6.9 if is_small else 11)))
    fields = {**SHARED}
    if random.random() < 0.75:
        kind = random.choice(METHODS) if random.random() < 0.93 else random.choice(list(PEFT_METHODS))
        run["method"] = {"kind": kind}
        fields |= {**TRAINING, "objective": model.objectives}
        if kind in ("lora", "qlora", "dora", "qdora"):
            fields |= {**ADAPTERS, "method.modules_to_save": saved_modules(model)}
    else:
        run["task"] = random.choice(("forward", "generate", "generate"))
        fields |= {**RUNNING, **({"loop.use_cache": (False,)} if run["task"] == "forward" else {})}
    if run.get("task") == "generate":
        run["batch"]["new_tokens"] = random.randint(2, 12)
    for path, values in fields.items():
        share = RARE if path in ("objective", "batch.images", "generation.cache_implementation") else COMMON
        if random.random() < share and not (run.get("task") == "forward" and path.startswith("generation")):
            put(run, path, random.choice(values))
    if run.get("objective", model.objectives[0]) != "causal_lm":
        run.get("kernels", {}).pop("loss", None)  # the other losses are of causal language models
    if model.is_encoder_decoder and run.get("kernels", {}).get("attention") == "flash_attention_2":
        del run["kernels"]["attention"]  # transformers refuses it for biases of positions
    return run


def saved_modules(model: ModelSpec) -> list[list[str]]:
    """Return lists of modules that a run with adapters may also train: the model's embeddings and head."""
    names = {name.split(".")[-2] for name in built_tensors(model) if "." in name}
    embeddings = [name for name in ("embed_tokens", "wte", "word_embeddings") if name in names]
    heads = ["lm_head"] if "causal_lm" in model.objectives else []
    return [each for each in (embeddings, heads, [*embeddings, *heads]) if each] or [[]]


def put(run: Run, path: str, value: Any) -> None:
    """Set the field at a dotted path, making sections of words."""
    *parts, name = path.split(".")
    for part in parts:
        word = run.get(part)
        if not isinstance(word, dict):
            run[part] = {"name": word} if isinstance(word, str) else {}
        run = run[part]
    run[name] = value


def runs(seed: int, start: int = 0) -> Iterator[tuple[str, RunSpec]]:
    """Yield the runs of a seed, each with its name `seed:index`."""
    index = start
    while True:
        with suppress(MemplanError, ValueError):  # no run at all
            yield f"{seed}:{index}", RunSpec(**drawn_run(Random(f"{seed}:{index}")))
        index += 1


def traced_row(name: str, run: RunSpec, tracer: Tracer) -> dict[str, Any] | None:
    """Return a run's golden row, with the reason if the engine refuses it; None for a run that cannot be traced."""
    is_training = run.task == "train"
    try:
        traced: TracedRun = tracer.trace(run, 2 if is_training else 1)
    except MemplanError:
        return None
    row = training_row(name, run, traced) if is_training else inference_row(name, run, traced)
    try:
        estimate(run)
    except MemplanError as error:
        row["refused"] = str(error)
    return row


def command(row: Mapping[str, Any]) -> str:
    return f"memplan probe --trace --spec - <<< {shlex.quote(json.dumps(row['run']))}"


def distribution(errors: Sequence[float], refusals: int) -> str:
    """Return the figures of all runs in one line."""
    ordered, count = sorted(errors), len(errors) + refusals
    return (
        f"{count} runs: {len(errors)} answered, {refusals} refused ({refusals / count:.1%}); error of the peak: mean "
        f"{percent(mean(errors))}, median {percent(median(errors))}, nine in ten at most "
        f"{percent(ordered[int(0.9 * (len(ordered) - 1))])}, worst {percent(ordered[-1])}; "
        f"{sum(error > MISS for error in errors)} above {MISS:.0%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Trace random runs and compare them with the estimates.")
    parser.add_argument("count", type=int, help="runs that can be traced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--rows", type=Path, help="file that golden rows are appended to")
    given = parser.parse_args(argv)
    found: list[dict[str, Any]] = []
    with Tracer() as tracer:
        for name, run in runs(given.seed, given.start):
            row = traced_row(name, run, tracer)
            if row is None:
                continue
            found.append(row)
            report(row)
            if given.rows is not None:
                with given.rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            if len(found) == given.count:
                break
    errors = [peak_error(row) for row in found if "refused" not in row]
    print(distribution(errors, len(found) - len(errors)))
    return int(max(errors, default=0.0) > MISS)


def report(row: dict[str, Any]) -> None:
    """Print a run that is missed or refused, with the command that shows it."""
    if "refused" in row:
        print(f"{row['name']} refused: {row['refused']}\n    {command(row)}", flush=True)
    elif (error := peak_error(row)) > SHOWN:
        print(f"{row['name']} {percent(error)}\n    {command(row)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
