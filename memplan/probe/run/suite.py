"""Suites: lists of runs to measure, from a file or chosen for a card, and the plan shown before one is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from memplan.catalogue.hardware.gpu import GPU
from memplan.core.errors import MemplanError, SpecError, printable, refused
from memplan.core.records import NamedTuple
from memplan.estimate.answer import Estimate
from memplan.estimate.demand import FITS, MAY_FIT, Demand
from memplan.estimate.estimate import estimate
from memplan.probe.refusals import checked_run
from memplan.probe.run.rows import lines_of, run_id, run_of
from memplan.spec.run import RunSpec

LargestBatch = Callable[[RunSpec, Demand], int]

_LONGEST = 200


def read_suite(name: str) -> list[RunSpec]:
    """Return the runs in a file: JSON lines (runs, or measured rows with a run), or the list `runs:` in YAML.

    Raises SpecError naming the line if an entry is not a run.
    """
    path, shown = Path(name), printable(name, _LONGEST)
    if name.lower().endswith(".jsonl"):
        runs = [
            run_of(line.get("run", line), f"suite: {shown}, line {number}", "suite")
            for number, line in lines_of(path, "suite")
            if "about" not in line  # the header line of a golden file
        ]
    else:
        from memplan.spec.file import read_spec

        listed: object = read_spec(name).get("runs")
        if not isinstance(listed, list):
            raise refused("suite", f"{shown} has no list of runs under the key runs")
        runs = [
            run_of(fields, f"suite: {shown}, run {number}", "suite")
            for number, fields in enumerate(cast(list[object], listed), 1)
        ]
    if not runs:
        raise refused("suite", f"{shown} holds no runs")
    return list(dict.fromkeys(runs))


# --- the built-in suite -------------------------------------------------------------------

# Small to large, from several families; every card gets the models that it holds.
MODELS = (
    *("qwen2.5-0.5b", "qwen3-0.6b", "llama-3.2-1b", "qwen2.5-1.5b", "gemma-2-2b", "llama-3.2-3b", "qwen3-4b"),
    *("mistral-7b-v0.3", "llama-3.1-8b", "gemma-2-9b", "qwen3-14b", "mistral-small-24b-2501", "qwen2.5-32b"),
    *("llama-3.1-70b", "qwen2.5-72b"),
)


class SuiteRecipe(NamedTuple):
    """How a model is trained: a method with its precision, optimizer, kernels and batch.

    `attention`: None for the default of the model's class.
    """

    method: str
    precision: str
    optimizer: str
    attention: str | None
    loss: str
    checkpointing: str
    micro: int
    sequence: int


RECIPES = (
    SuiteRecipe("full", "pure", "adamw_torch_fused", None, "hf", "full", 1, 1024),
    SuiteRecipe("lora", "pure", "adamw_torch_fused", None, "hf", "full", 4, 1024),
    SuiteRecipe("qlora", "pure", "paged_adamw_8bit", None, "hf", "full", 1, 2048),
    SuiteRecipe("dora", "pure", "adamw_torch_fused", None, "hf", "full", 1, 1024),
    SuiteRecipe("freeze", "pure", "sgd", None, "chunked", "none", 1, 2048),
    SuiteRecipe("qdora", "pure", "adamw_torch_fused", None, "fused", "full", 1, 1024),
    SuiteRecipe("lora", "pure", "adamw_torch", "eager", "chunked", "none", 1, 1024),
    SuiteRecipe("full", "amp", "adamw_torch", None, "chunked", "full", 1, 1024),
    SuiteRecipe("qlora", "pure", "adamw_torch_fused", None, "chunked", "none", 1, 1024),
    SuiteRecipe("full", "pure", "adamw_8bit", None, "hf", "none", 2, 512),
    SuiteRecipe("lora", "amp", "adafactor", "sdpa_efficient", "hf", "full", 1, 1024),
    SuiteRecipe("full", "pure", "adamw_torch", None, "fused", "full", 1, 2048),
    SuiteRecipe("dora", "pure", "adamw_8bit", "sdpa_efficient", "chunked", "none", 1, 512),
    SuiteRecipe("lora", "pure", "adamw_torch_fused", "sdpa_math", "hf", "full", 1, 2048),
    SuiteRecipe("freeze", "amp", "adamw_torch_fused", None, "hf", "full", 2, 1024),
    SuiteRecipe("full", "pure", "adafactor", None, "hf", "full", 4, 1024),
    SuiteRecipe("qdora", "pure", "paged_adamw_8bit", None, "hf", "full", 2, 1024),
    SuiteRecipe("qlora", "pure", "adamw_torch", "eager", "hf", "full", 4, 512),
)
SHORTER = (1, 2, 4)  # small cards hold few models, so they also get each recipe with shorter sequences
ROOMY = 64  # runs that fit, at most
# Methods that are also run at the largest batch that fits, and at the smallest that does not.
AT_THE_LIMIT = ("full", "lora", "qlora", "dora")


def default_suite(gpu: GPU, largest_batch: LargestBatch) -> list[RunSpec]:
    """Return runs from 0.5 billion parameters up to what the card holds.

    For four methods also the largest batch that fits and the smallest that does not. The models take turns adding the
    next recipe that the card holds, each starting at a different recipe, until there are enough. `largest_batch` finds
    the largest batch of a run that meets a demand.
    """
    turns = [_runs_that_fit(model, n, gpu) for n, model in enumerate(MODELS)]
    runs: list[RunSpec] = []
    while turns and len(runs) < ROOMY:
        next_runs = [(turn, next(turn, None)) for turn in turns]
        turns = [turn for turn, run in next_runs if run is not None]
        runs += [run for _, run in next_runs if run is not None]
    runs = list(dict.fromkeys(runs[:ROOMY]))
    return list(dict.fromkeys([*runs, *_at_the_limit(runs, largest_batch)]))


def _runs_that_fit(model: str, start: int, gpu: GPU) -> Iterator[RunSpec]:
    """Yield the runs of a model that the card holds, from recipe `start` on; then again with shorter sequences.

    Recipes whose attention the model's class does not have are left out.
    """
    for shorter in SHORTER:
        for n in range(len(RECIPES)):
            recipe = RECIPES[(start + n) % len(RECIPES)]
            run = run_with(model, recipe._replace(sequence=recipe.sequence // shorter), gpu)
            try:
                fits = estimate(run).verdict.answer == "fits"
            except SpecError as refusal:
                if refusal.field != "kernels.attention":
                    raise
                continue
            if fits:
                yield run


def run_with(model: str, recipe: SuiteRecipe, gpu: GPU) -> RunSpec:
    """Return the run of a model by a recipe, in the 16-bit dtype that the card supports."""
    from memplan.spec.training import precision_of

    half = "bf16" if "bf16" in gpu.native_dtypes else "fp16"
    return RunSpec(
        model=model,
        method=recipe.method,
        precision=precision_of(recipe.precision, half),
        optimizer=recipe.optimizer,
        batch={"micro": recipe.micro, "sequence": recipe.sequence},
        kernels={"attention": recipe.attention, "loss": recipe.loss, "checkpointing": recipe.checkpointing},
        gpu=gpu.name,
    )


def _at_the_limit(runs: Sequence[RunSpec], largest_batch: LargestBatch) -> Iterator[RunSpec]:
    """Yield, for the largest model of each method, the largest batch that fits and the smallest that does not."""
    for kind in AT_THE_LIMIT:
        run = next((run for run in reversed(_by_size(runs)) if run.method.kind == kind), None)
        if run is not None:
            yield _with_batch(run, largest_batch(run, FITS))
            yield _with_batch(run, largest_batch(run, MAY_FIT) + 1)


def _by_size(runs: Sequence[RunSpec]) -> list[RunSpec]:
    return sorted(runs, key=lambda run: MODELS.index(str(run.model)))


def _with_batch(run: RunSpec, micro: int) -> RunSpec:
    return run.model_copy(update={"batch": run.batch.model_copy(update={"micro": micro})})


# --- the plan ----------------------------------------------------------------------------------------------

# Assumptions about a run's time, not measured: a plan only has to tell minutes from hours.
START_SECONDS = 40  # importing torch and transformers, and making a CUDA context
PARAMETERS_A_SECOND = 500_000_000  # random weights created, including quantisation
PASSES = 8  # operations per parameter and token: 2 forward, 4 backward, 2 for recomputation by checkpointing
SHARE_OF_PEAK = 0.2  # of the card's 16-bit rate that a small batch reaches
TFLOPS = 50.0  # if the card's rate is unknown


class PlannedRun(NamedTuple):
    """One run of a plan: its estimate and expected seconds, or why it cannot be estimated."""

    run: RunSpec
    answer: Estimate | None
    seconds: float
    refused: str = ""


def plan(runs: Sequence[RunSpec], gpu: GPU | None, steps: int) -> list[PlannedRun]:
    """Return each run with its estimate and expected time on the card, or with the reason why memplan refuses it."""
    planned: list[PlannedRun] = []
    for run in runs:
        try:
            checked_run(run)
            answer = estimate(run)
        except MemplanError as error:
            planned.append(PlannedRun(run, None, START_SECONDS, str(error)))
            continue
        planned.append(PlannedRun(run, answer, _seconds(run, answer, gpu, steps)))
    return planned


def _seconds(run: RunSpec, answer: Estimate, gpu: GPU | None, steps: int) -> float:
    parameters, tokens = answer.parameters.total, run.batch.micro * run.batch.sequence * run.batch.accumulation
    rate = (gpu.bf16_tflops or gpu.fp16_tflops or TFLOPS) if gpu else TFLOPS
    computing = steps * PASSES * parameters * tokens / (SHARE_OF_PEAK * rate * 1e12)
    return START_SECONDS + parameters / PARAMETERS_A_SECOND + computing


def minutes(planned: Sequence[PlannedRun]) -> float:
    """Return the expected minutes of all runs. An assumption, not measured."""
    return sum(p.seconds for p in planned) / 60


def as_json(planned: PlannedRun) -> dict[str, Any]:
    """Return one run of the plan as JSON types."""
    answer = planned.answer
    out: dict[str, Any] = {"id": run_id(planned.run), "minutes": round(planned.seconds / 60, 2), "basis": "assumed"}
    if answer is None:
        return {**out, "refused": planned.refused, "run": planned.run.model_dump(mode="json", exclude_defaults=True)}
    return {
        **out,
        "verdict": answer.verdict.answer,
        "allocated": answer.bytes.allocated,
        "used": answer.bytes.used,
        "run": planned.run.model_dump(mode="json", exclude_defaults=True),
    }
