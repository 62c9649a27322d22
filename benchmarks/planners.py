"""Compare memplan's planner with two other tools that propose changes: their times and their proposals.

python -m benchmarks.planners                                 # from the recorded answers; memplan's own times
OTHER_TOOLS=/path/to/venvs python -m benchmarks.planners      # runs the tools again, records and times them

Each tool has its own virtual environment, as for `benchmarks/other_tools.py`:

    python -m venv $OTHER_TOOLS/fitcheck-llm && $OTHER_TOOLS/fitcheck-llm/bin/pip install fitcheck-llm==0.3.1
    python -m venv $OTHER_TOOLS/canifinetune && $OTHER_TOOLS/canifinetune/bin/pip install canifinetune==0.4.1

Their answers, and how they are read:

- fitcheck-llm: `fitcheck MODEL` says whether a run fits, and the largest micro-batch that does; `fitcheck advise`
  sweeps batch and adapter rank with everything else fixed, and refuses full training; `optimize`, in its prompt, pulls
  one lever after another if no batch fits. Its proposal is advise's recommendation, or else the largest batch, or else
  the result of `optimize`.
- canifinetune: `canifinetune recommend` gets only a model and a card's memory, and searches a grid of LoRA and QLoRA,
  512 to 4,096 tokens, one or two sequences; its first answer is recorded, and its first with the given tokens and
  method. The degradations that `canifinetune estimate` suggests start from the given run, and are its proposal.

Each proposal is estimated by memplan. That is memplan's word against theirs: who is right is only known for measured
runs, so each tool is also asked about the published runs. A published run fits the card that it ran on, and no card
with fewer bytes than its tensors took. fitcheck-llm took its constants from the runs of the family `fitcheck`.

Not expressible: fitcheck-llm counts fp32 masters in every full training in 16 bits, has no setting for the loss, and
paged states only in 8 bits; canifinetune knows only a card's memory, and its search takes neither method nor tokens.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
RECORD = HERE / "planners.jsonl"
GIB = 2**30
MIB = 2**20
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ON_T4 = {"kind": "qlora", "targets": ATTENTION, "quantization": {"double_quant": False}}

# The fields of each run, as RunSpec fields; defaults: bf16, one sequence of 2,048 tokens, checkpointed.
# fitcheck-llm was measured on the run qlora-t4.
QUESTIONS: dict[str, dict[str, Any]] = {
    "full-8b-4090": {"model": "llama-3.1-8b", "gpu": "rtx-4090"},
    "full-8b-4090-4k": {"model": "llama-3.1-8b", "gpu": "rtx-4090", "batch": {"sequence": 4096}},
    "full-7b-3090": {"model": "qwen2-7b", "gpu": "rtx-3090"},
    "full-1b-t4": {"model": "llama-3.2-1b", "gpu": "t4", "precision": "fp16"},
    "full-3b-a100": {"model": "llama-3.2-3b", "gpu": "a100-sxm-40gb"},
    "full-72b-t4": {"model": "qwen2-72b", "gpu": "t4", "precision": "fp16"},
    "lora-7b-16gb": {"model": "mistral-7b-v0.1", "gpu": "rtx-4060-ti-16gb", "method": "lora", "batch": {"micro": 8}},
    "lora-7b-3090": {
        "model": "qwen2.5-7b",
        "gpu": "rtx-3090",
        "method": "lora",
        "batch": {"micro": 8, "sequence": 1024},
        "kernels": {"checkpointing": "none"},
    },
    "lora-7b-a100": {"model": "mistral-7b-v0.1", "gpu": "a100-sxm-80gb", "method": "lora", "batch": {"micro": 8}},
    "lora-70b-h100": {"model": "llama-3.1-70b", "gpu": "h100-sxm", "method": "lora", "batch": {"sequence": 4096}},
    "qlora-8b-4090": {"model": "llama-3.1-8b", "gpu": "rtx-4090", "method": "qlora", "batch": {"micro": 8}},
    "qlora-t4": {
        "model": "qwen2.5-1.5b",
        "gpu": "t4",
        "method": ON_T4,
        "precision": "fp16",
        "batch": {"micro": 16, "sequence": 1024},
        "kernels": {"attention": "eager"},
    },
}
TIMED = ("full-8b-4090", "qlora-8b-4090", "full-72b-t4")  # runs for which full commands are timed
SMALLER = ("t4", "rtx-4090", "a100-sxm-40gb")  # cards that published runs may be too large for


# --- inputs and answers of a tool ----------------------------------------------------------------------------------


class Told(NamedTuple):
    """A tool's inputs for a run: `config` as on the Hub, method `full`, `lora` or `qlora`, the card's bytes."""

    config: dict[str, Any]
    parameters: int
    method: str
    rank: int
    targets: list[str]
    double_quant: bool
    dtype: str
    optimizer: str
    micro: int
    sequence: int
    checkpointed: bool
    flash: bool
    gpu: str
    total: int


class Said(NamedTuple):
    """A tool's resulting run as RunSpec fields, its bytes, and whether the tool says that it fits."""

    run: dict[str, Any]
    bytes: int
    fits: bool


class Answer(NamedTuple):
    """A tool's answer to a question: the given run, its proposal, and the largest micro-batch, if it has one."""

    asked: Said
    proposal: Said | None
    largest: int | None = None
    searched: Said | None = None  # canifinetune's search from only the model and the card
    nearest: Said | None = None  # its first result with the given method and tokens


def imported(module: str) -> Any:
    """Return a tool's module as Any: the tools are not installed where this file is type-checked."""
    return import_module(module)


def told_of(run: Any) -> Told:
    """Return the tools' inputs for a RunSpec."""
    from memplan import estimate, find_gpu, find_model

    bare = estimate(run.model_copy(update={"gpu": None}))
    decided = bare.run
    model, gpu = find_model(run.model), find_gpu(run.gpu)
    q = decided.method.quantization
    targets = decided.method.targets
    every = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
    return Told(
        config=json.loads(json.dumps(model.config)) | {"model_type": model.model_type},
        parameters=bare.parameters.total,
        method=decided.method.kind,
        rank=decided.method.rank,
        targets=list(every if targets == "all-linear" else targets),
        double_quant=q is not None and q.double_quant,
        dtype=decided.precision.weights,
        optimizer=str(decided.optimizer.name),
        micro=decided.batch.micro,
        sequence=decided.batch.sequence,
        checkpointed=decided.kernels.checkpointing == "full",
        flash=decided.kernels.attention != "eager",
        gpu=gpu.name,
        total=gpu.driver_total or round(gpu.memory_gb * GIB),
    )


def said_run(told: Told, **changes: Any) -> dict[str, Any]:
    """Return a run as RunSpec fields."""
    t = told._replace(**changes)
    method: dict[str, Any] = {"kind": t.method}
    if t.method != "full":
        method |= {"rank": t.rank, "targets": t.targets}
    if t.method == "qlora":
        method["quantization"] = {"double_quant": t.double_quant}
    return {
        "method": method,
        "precision": t.dtype,
        "optimizer": t.optimizer,
        "batch": {"micro": t.micro, "sequence": t.sequence},
        "kernels": {
            "checkpointing": "full" if t.checkpointed else "none",
            "attention": "sdpa" if t.flash else "eager",
        },
    }


# --- fitcheck-llm --------------------------------------------------------------------------------------------------

FITCHECK_GPUS = {
    "rtx-4090": "4090",
    "rtx-3090": "3090",
    "a100-sxm-80gb": "a100-80",
    "a100-80gb": "a100-80",
    "a100-sxm-40gb": "a100-40",
    "h100-sxm": "h100",
    "a10g": "a10",
    "t4": "t4",
}


class Fitcheck(NamedTuple):
    model: Any
    training: Any
    gpu: Any


def fitcheck_asked(told: Told) -> Fitcheck:
    from dataclasses import asdict

    parser, estimator, gpus = (imported(f"fitcheck.{name}") for name in ("config_parser", "estimator", "gpu_db"))
    parser._reject_unsupported(told.config, "asked")  # as its fetch_model_config does
    fields = parser._parse_fields(told.config)
    total = parser._reconcile_param_count("asked", told.parameters, parser._count_params(fields))
    name = FITCHECK_GPUS.get(told.gpu)
    training = estimator.TrainingConfig(
        precision=told.dtype,
        quantization="nf4" if told.method == "qlora" else "none",
        double_quant=told.double_quant,
        optimizer={"adamw_8bit": "adam8bit", "paged_adamw_8bit": "adam8bit", "sgd": "sgd"}.get(told.optimizer, "adamw"),
        optimizer_dtype="bf16" if told.method == "full" and told.dtype != "fp32" else "fp32",
        batch_size=told.micro,
        seq_len=told.sequence,
        lora_rank=None if told.method == "full" else told.rank,
        lora_targets=told.targets,
        grad_checkpoint=told.checkpointed,
        flash_attn=told.flash,
    )
    gpu = gpus.get_gpu(name) if name else gpus.get_gpu(vram_mib=told.total // MIB)
    return Fitcheck(parser.ModelConfig(name="asked", num_params=total, **asdict(fields)), training, gpu)


def fitcheck_plan(told: Told) -> Any:
    """Run only its planner, for timing: `advise` for adapters, `fitcheck MODEL` with its largest batch for full."""
    asked = fitcheck_asked(told)
    if told.method == "full":
        return imported("fitcheck.estimator").estimate(*asked)
    advisor = imported("fitcheck.advisor")
    batches = tuple(sorted({*advisor.DEFAULT_BATCH_SIZES, told.micro}))
    return advisor.advise(*asked, advisor.SweepSpec(batches, (told.sequence,), (told.rank,)))


def fitcheck_commands(told: Told, model: str) -> dict[str, list[str]]:
    """Return the command for `fitcheck_plan`'s question; `model` is a name in the Hub's cache."""
    card = FITCHECK_GPUS.get(told.gpu)
    shared = ["--gpu", card] if card else ["--vram-mib", str(told.total // MIB)]
    shared += ["--precision", told.dtype]
    shared += ["--grad-checkpoint"] * told.checkpointed + ["--flash-attn"] * told.flash
    if told.method == "full":
        full = ["--no-lora", "--optimizer-dtype", "bf16", "--seq-len", str(told.sequence)]
        return {"fitcheck": ["fitcheck", model, *shared, *full, "--batch-size", str(told.micro)]}
    if told.method == "qlora":
        shared += ["--quant", "nf4"] + ["--double-quant"] * told.double_quant
    adapters = ["--seq-lens", str(told.sequence), "--lora-ranks", str(told.rank)]
    adapters += ["--lora-targets", ",".join(told.targets)]
    return {"fitcheck advise": ["fitcheck", "advise", model, *shared, *adapters]}


def fitcheck_answer(told: Told) -> Answer:
    from dataclasses import replace

    asked = fitcheck_asked(told)
    estimate = imported("fitcheck.estimator").estimate

    def said(training: Any, changes: Mapping[str, Any]) -> Said:
        report = estimate(asked.model, training, asked.gpu)
        return Said(said_run(told, **changes), round(report.total_mib * MIB), bool(report.fits))

    report = estimate(*asked)
    as_asked = said(asked.training, {})
    if as_asked.fits:
        return Answer(as_asked, None, report.max_batch_size)
    best = None if told.method == "full" else fitcheck_plan(told).recommended
    largest = best.batch_size if best else report.max_batch_size
    if largest:
        smaller = said(replace(asked.training, batch_size=largest), {"micro": largest})
        return Answer(as_asked, smaller, report.max_batch_size)
    current, at = replace(asked.training, batch_size=1), said(replace(asked.training, batch_size=1), {"micro": 1})
    for applies, pulled, _ in imported("fitcheck.repl")._LEVERS:
        if applies(current) and not at.fits:
            current = pulled(current)
            changes = {
                "micro": 1,
                "sequence": current.seq_len,
                "checkpointed": current.grad_checkpoint,
                "flash": current.flash_attn,
                "method": "qlora" if current.quantization == "nf4" else told.method,
                "double_quant": current.double_quant,
                "optimizer": "adamw_8bit" if current.optimizer == "adam8bit" else told.optimizer,
            }
            at = said(current, changes)
    return Answer(as_asked, at, report.max_batch_size)


# --- canifinetune --------------------------------------------------------------------------------------------------


def canifinetune_model(told: Told) -> dict[str, Any]:
    """Return the model for its --override-json."""
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    config = told.config
    return {key: config[key] for key in keys} | {
        "family": config["model_type"],
        "num_key_value_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "total_params": told.parameters,
    }


def canifinetune_request(told: Told) -> Any:
    optimizers = {"adamw_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit", "sgd": "sgd"}
    return imported("canifinetune.estimator.memory").EstimateRequest(
        model_id="asked",
        method=told.method,
        gpu_vram_gb=told.total / GIB,
        seq_len=told.sequence,
        micro_batch_size=told.micro,
        base_dtype=told.dtype,
        quantization="nf4_double_quant" if told.double_quant else "nf4" if told.method == "qlora" else "none",
        lora_rank=told.rank,
        lora_target_scope="attention" if set(told.targets) <= set(ATTENTION) else "all_linear",
        optimizer=optimizers.get(told.optimizer, "adamw_torch"),
        gradient_checkpointing=told.checkpointed,
        attention_implementation="sdpa" if told.flash else "eager",
        override=canifinetune_model(told),
        use_network=False,
    )


def canifinetune_plan(told: Told, most: int = 5) -> Any:
    """Run `canifinetune recommend`."""
    return imported("canifinetune.estimator.recommender").recommend_configs(
        model_id="asked",
        gpu_vram_gb=told.total / GIB,
        top_k=most,
        use_network=False,
        override=canifinetune_model(told),
    )


def canifinetune_commands(told: Told, model: str) -> dict[str, list[str]]:
    """Return its two commands; `model` is the file of the model's sizes."""
    about = ["--model", "asked", "--gpu-vram-gb", f"{told.total / GIB:.4f}", "--offline", "--override-json", model]
    request = ["--method", told.method, "--seq-len", str(told.sequence), "--micro-batch-size", str(told.micro)]
    request += ["--base-dtype", told.dtype, "--optimizer", "adamw_torch", "--lora-rank", str(told.rank)]
    request += ["--target-scope", "attention" if set(told.targets) <= set(ATTENTION) else "all_linear"]
    request += ["--attn", "sdpa" if told.flash else "eager"]
    if told.method == "qlora":
        request += ["--quantization", "nf4_double_quant" if told.double_quant else "nf4"]
    if not told.checkpointed:
        request.append("--no-gradient-checkpointing")
    return {
        "canifinetune recommend": ["canifinetune", "recommend", *about],
        "canifinetune estimate, with degradations": ["canifinetune", "estimate", *about, *request],
    }


def canifinetune_said(told: Told, estimate: Any) -> Said:
    request = estimate.request
    targets = imported("canifinetune.configuration").resolve_targets(request, told.config["model_type"])
    run = said_run(
        told,
        method=request.method,
        rank=request.lora_rank,
        targets=targets,
        double_quant=request.quantization == "nf4_double_quant",
        dtype=request.base_dtype,
        optimizer=told.optimizer if request.optimizer == "adamw_torch" else request.optimizer,
        micro=request.micro_batch_size,
        sequence=request.seq_len,
        checkpointed=request.gradient_checkpointing,
        flash=request.attention_implementation != "eager",
    )
    return Said(run, round(estimate.memory.total_estimated_gb * GIB), estimate.feasible != "no")


def canifinetune_answer(told: Told) -> Answer:
    """`marginal` counts as fitting; its degradations continue until one fits better than that."""
    estimator, recommender = (imported(f"canifinetune.estimator.{name}") for name in ("memory", "recommender"))
    request = canifinetune_request(told)
    asked = canifinetune_said(told, estimator.estimate(request))
    proposal = None
    if not asked.fits:
        proposal = canifinetune_said(told, recommender.suggest_degradations(request)[-1].estimate)
    found = canifinetune_plan(told, 10_000)
    like = [
        one.estimate
        for one in found
        if one.estimate.request.seq_len == told.sequence and one.estimate.request.method == told.method
    ]
    searched = canifinetune_said(told, found[0].estimate) if found else None
    nearest = canifinetune_said(told, like[0]) if like else None
    return Answer(asked, proposal, None, searched, nearest)


class Tool(NamedTuple):
    answer: Callable[[Told], Answer]
    plan: Callable[[Told], Any]  # timed within a process
    commands: Callable[[Told, str], dict[str, list[str]]]  # timed as full commands


TOOLS = {
    "fitcheck-llm": Tool(fitcheck_answer, fitcheck_plan, fitcheck_commands),
    "canifinetune": Tool(canifinetune_answer, canifinetune_plan, canifinetune_commands),
}


# --- running a tool, in its own environment ------------------------------------------------------------------------


def answered_here(tool: str) -> None:
    """Read `Told` lines, and print for each the answer, or why there is none."""
    for line in sys.stdin:
        given = json.loads(line)
        told = Told(**given["told"])
        try:
            if given["only_verdict"]:
                out: dict[str, Any] = {"fits": _verdict(tool, told)}
            else:
                answer = TOOLS[tool].answer(told)._asdict()
                out = {key: said._asdict() if isinstance(said, Said) else said for key, said in answer.items()}
        except (ValueError, KeyError) as error:
            out = {"unsupported": " ".join(str(error).split())[:100]}
        print(json.dumps({"version": version(tool), **out}), flush=True)


def _verdict(tool: str, told: Told) -> bool:
    if tool == "fitcheck-llm":
        return bool(imported("fitcheck.estimator").estimate(*fitcheck_asked(told)).fits)
    return imported("canifinetune.estimator.memory").estimate(canifinetune_request(told)).feasible != "no"


def timed_here(start: float, plan: Callable[[Any], object], asked: Any) -> None:
    """Return milliseconds of a process's first plan, including imports, and the median of repeated ones."""
    plan(asked)
    first = time.perf_counter() - start
    later: list[float] = []
    while len(later) < 5 or (sum(later) < 0.5 and len(later) < 100):
        begin = time.perf_counter()
        plan(asked)
        later.append(time.perf_counter() - begin)
    print(json.dumps([first * 1e3, statistics.median(later) * 1e3]))


def child(python: str, arguments: list[str], given: str) -> list[Any]:
    done = subprocess.run(
        [python, __file__, *arguments],
        input=given,
        env=os.environ | {"PYTHONPATH": str(HERE.parent)},
        check=False,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def asked_of(name: str) -> Told:
    from memplan import RunSpec

    return told_of(RunSpec(**QUESTIONS[name]))


class Decided(NamedTuple):
    """Whether a card holds a published run, according to its measurement."""

    id: str
    run: Any
    fits: bool


def decided() -> Iterator[Decided]:
    """Return published runs on the card they ran on, and on cards smaller than their tensors."""
    from benchmarks.other_tools import left_out, published
    from memplan import RunSpec, find_gpu

    for row in published():
        if left_out(row["run"]) is not None:
            continue
        run = RunSpec(**row["run"])
        if run.gpu is not None:
            yield Decided(row["id"], run, True)
        for card in SMALLER:
            if find_gpu(card).usable < row["allocated"]:
                yield Decided(row["id"], run.model_copy(update={"gpu": card}), False)


def record(venvs: Path) -> None:
    """Run the tools that have an environment again, and record their answers."""
    from memplan import MemplanError

    lines = recorded()
    questions = {name: asked_of(name) for name in QUESTIONS}
    runs: list[tuple[Decided, Told]] = []
    for one in decided():
        try:
            runs.append((one, told_of(one.run)))
        except MemplanError:  # refused: no verdict to compare
            continue
    for tool, of in TOOLS.items():
        python = venvs / tool / "bin" / "python"
        if not python.exists():
            print(f"{tool}: no environment in {venvs}", file=sys.stderr)
            continue
        told = [*questions.values(), *(told for _, told in runs)]
        given = [{"told": one._asdict(), "only_verdict": i >= len(questions)} for i, one in enumerate(told)]
        said = child(str(python), ["--answer", tool], "".join(json.dumps(one) + "\n" for one in given))
        head = {"tool": tool, "version": {one.pop("version") for one in said}.pop(), "date": date.today().isoformat()}
        lines = [line for line in lines if line["tool"] != tool]
        for (name, asked), one in zip(questions.items(), said, strict=False):
            commands = [shlex.join(words) for words in of.commands(asked, f"asked/{name}").values()]
            lines.append({**head, "question": name, "commands": commands, **one})
        cards: dict[str, dict[str, bool]] = {}
        for (one, _), says in zip(runs, said[len(questions) :], strict=True):
            if "fits" in says:
                cards.setdefault(one.id, {})[one.run.gpu] = says["fits"]
        lines += [{**head, "published": id_, "fits": fits} for id_, fits in cards.items()]
    lines.sort(key=lambda line: list(TOOLS).index(line["tool"]))
    RECORD.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")


def recorded() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORD.read_text("utf-8").splitlines()] if RECORD.exists() else []


# --- the tables ----------------------------------------------------------------------------------------------------


def rebuilt(name: str, run: Mapping[str, Any]) -> Any:
    """Return a tool's result as a RunSpec with the question's model and card."""
    from memplan import RunSpec

    return RunSpec(**{**{key: QUESTIONS[name][key] for key in ("model", "gpu")}, **run})


def batches(run: Any) -> str:
    """Return a run's micro-batch, and the largest that fits by memplan with everything else unchanged."""
    from memplan.planning.reach import largest_batch

    return f"{run.batch.micro}, {largest_batch(run)}"


def free(answer: Any) -> str:
    """Return the card's free bytes, by memplan."""
    left = answer.verdict.headroom
    return "-" if left is None else f"{left / GIB:+.1f}"


def in_short(run: Mapping[str, Any]) -> str:
    """Return a recorded run as short text."""
    method, kernels = run["method"], run["kernels"]
    words = [
        method["kind"] + (f" r{method['rank']}" if "rank" in method else ""),
        f"{run['batch']['micro']} x {run['batch']['sequence']:,}",
        "" if kernels["checkpointing"] == "full" else "nothing checkpointed",
        "8-bit states" if "8bit" in run["optimizer"] else "",
    ]
    return ", ".join(word for word in words if word)


def severity(asked: Mapping[str, Any], run: Mapping[str, Any]) -> int:
    """Return how much a proposal changes the result, by memplan's rows of the costs of changes.

    A smaller micro-batch counts as compensated by accumulation; other ranks or targets count only between adapters.
    """
    from memplan.catalogue.profiles.costs import cost_of

    was, now = asked["method"], run["method"]
    keys: list[str] = []
    if was["kind"] == "full" != now["kind"]:
        keys.append("method_lora")
    if now["kind"] == "qlora" != was["kind"]:
        keys.append("method_qlora")
    if was["kind"] != "full":
        keys += [key for key, field in (("rank", "rank"), ("targets", "targets")) if was[field] != now[field]]
    if asked["batch"]["sequence"] != run["batch"]["sequence"]:
        keys.append("sequence")
    if asked["optimizer"] != run["optimizer"]:
        keys.append("optimizer_paged" if run["optimizer"].startswith("paged") else "optimizer_8bit")
    return max((cost_of(key).severity for key in keys), default=0)


def proposals() -> Iterator[str]:
    """Yield, for each question, memplan's and the others' results with memplan's estimate of each."""
    import memplan
    from memplan import RunSpec

    yield (
        "| question | by | ends at | differs | it says, GiB | memplan: GiB used | verdict | GiB free "
        "| batch of it, and memplan's largest |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    lines = [line for line in recorded() if "question" in line]
    for name, question in QUESTIONS.items():
        plan = memplan.plan(RunSpec(**question))
        used = plan.answer.bytes.used / GIB
        yield f"| {name} | as asked | | | | {used:.1f} | {plan.answer.verdict.answer} | {free(plan.answer)} | |"
        if not plan.fits:
            best = plan.best or plan.nearest
            assert best is not None
            words = ", ".join(lever.title for lever in best.levers)
            words = words if plan.best else f"nothing; nearest: {words}"
            gib = f"{best.answer.bytes.used / GIB:.1f}"
            yield (
                f"| | memplan | {words} | {best.severity} | {gib} | {gib} "
                f"| {best.answer.verdict.answer} | {free(best.answer)} | {batches(best.run)} |"
            )
        for line in (line for line in lines if line["question"] == name):
            yield from _of_tool(name, line)


def _of_tool(name: str, line: Mapping[str, Any]) -> Iterator[str]:
    from memplan import estimate

    if "unsupported" in line:
        yield f"| | {line['tool']} | not answered: {line['unsupported']} | | | | | | |"
        return
    said = line["asked"]
    found = [("", said if said["fits"] else line["proposal"])]
    found += [(" recommend", line["searched"])] if line["searched"] else []
    if line["nearest"] and line["nearest"] != line["searched"]:
        found.append((" recommend, method and tokens as asked", line["nearest"]))
    for which, one in found:
        words = in_short(one["run"])
        if one is said:
            words = "as asked: fits"
        elif not one["fits"]:
            words = f"nothing; last: {words}"
        run = rebuilt(name, one["run"])
        answer = estimate(run)
        yield (
            f"| | {line['tool']}{which} | {words} | {severity(said['run'], one['run'])} | {one['bytes'] / GIB:.1f} "
            f"| {answer.bytes.used / GIB:.1f} | {answer.verdict.answer} | {free(answer)} | {batches(run)} |"
        )


def largest() -> Iterator[str]:
    """Yield the largest micro-batch of the given run, by memplan and fitcheck-llm; the other tool has none."""
    from memplan import RunSpec, estimate
    from memplan.planning.reach import reach
    from memplan.spec.run import changed

    yield "| question | memplan's batch | its longest sequence | by | its batch | of that memplan says, GiB free |"
    yield "|---|---|---|---|---|---|"
    for line in (line for line in recorded() if line.get("largest") is not None):
        run = RunSpec(**QUESTIONS[line["question"]])
        batch, tokens = reach(run, "batch").value, reach(run, "sequence").value
        verdict = "-"
        if line["largest"]:
            answer = estimate(changed(run, "batch", micro=line["largest"]))
            verdict = f"{answer.verdict.answer}, {free(answer)}"
        yield f"| {line['question']} | {batch} | {tokens:,} | {line['tool']} | {line['largest']} | {verdict} |"


def who_is_right() -> Iterator[str]:
    """Yield verdicts on the published runs against their measurements; `tight` does not count as `does not fit`."""
    from memplan import MemplanError, estimate

    yield "| by | runs it was asked | ran, and fit by it | cannot, and do not by it | memplan on the same |"
    yield "|---|---|---|---|---|"
    mine: dict[tuple[str, str], bool] = {}
    truth: dict[tuple[str, str], bool] = {}
    for one in decided():
        try:
            verdict = estimate(one.run).verdict.answer
        except MemplanError:
            continue
        mine[one.id, one.run.gpu] = verdict != "does not fit"
        truth[one.id, one.run.gpu] = one.fits

    def right(said: Mapping[tuple[str, str], bool], keys: Iterable[tuple[str, str]], fits: bool) -> str:
        those = [key for key in keys if truth[key] == fits]
        return f"{sum(said[key] == fits for key in those)} of {len(those)}"

    yield f"| memplan | {len(mine)} | {right(mine, mine, True)} | {right(mine, mine, False)} | |"
    for tool in TOOLS:
        lines = [line for line in recorded() if line["tool"] == tool and "published" in line]
        said = {(line["published"], gpu): fits for line in lines for gpu, fits in line["fits"].items()}
        said = {key: fits for key, fits in said.items() if key in truth}
        memplans_verdicts = f"{right(mine, said, True)}, {right(mine, said, False)}"
        yield f"| {tool} | {len(said)} | {right(said, said, True)} | {right(said, said, False)} | {memplans_verdicts} |"


# --- times ---------------------------------------------------------------------------------------------------------


def plans_here(name: str, start: float) -> None:
    """Print the times of memplan's plan, of the largest batch and of the longest sequence."""
    which, _, question = name.partition(":")
    import memplan
    from memplan import RunSpec

    if which == "plan":
        timed_here(start, memplan.plan, RunSpec(**QUESTIONS[question]))
        return
    from memplan.planning.reach import reach

    timed_here(start, lambda run: reach(run, which), RunSpec(**QUESTIONS[question]))


def in_process(venvs: Path | None) -> Iterator[str]:
    """Yield milliseconds in a fresh process, including imports, and of a repeated question, and ratios to memplan."""
    tools = [tool for tool in TOOLS if venvs is not None and (venvs / tool / "bin" / "python").exists()]
    heads = ["plan", "reach batch", "reach sequence", *tools]
    yield f"| first / later, ms | {' | '.join(heads)} |"
    yield "|---" * (len(heads) + 1) + "|"
    for name in QUESTIONS:
        times = [child(sys.executable, ["--time", f"{which}:{name}"], "")[0] for which in ("plan", "batch", "sequence")]
        for tool in tools:
            assert venvs is not None
            given = json.dumps(asked_of(name)._asdict())
            times.append(child(str(venvs / tool / "bin" / "python"), ["--time-tool", tool], given)[0])
        first, later = times[0]
        cells = [f"{times[0][0]:.0f} / {times[0][1]:.1f}"]
        cells += [f"{a:.0f} / {b:.1f} ({a / first:.2f}, {b / later:.2f} of plan)" for a, b in times[1:]]
        yield f"| {name} | {' | '.join(cells)} |"


def commands(venvs: Path | None, rounds: int) -> Iterator[str]:
    """Yield wall times of full commands as multiples of the minimum: pydantic and one model."""
    from benchmarks.command import IMPORT_FLOOR, environment, run

    yield "| question | command | ms | of pydantic and one model |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        env = environment(Path(folder)) | {"HF_HUB_CACHE": f"{folder}/hub", "HF_HUB_OFFLINE": "1"}
        for name in TIMED:
            least = [sys.executable, "-c", IMPORT_FLOOR]
            cases = {"pydantic and one model": least, **_commands(name, Path(folder), venvs)}
            times: dict[str, list[float]] = {case: [] for case in cases}
            for command in cases.values():
                run(command, env)
            for _ in range(rounds):
                for case, command in cases.items():
                    times[case].append(run(command, env))
            medians = {case: statistics.median(taken) for case, taken in times.items()}
            for case, taken in medians.items():
                ratio = taken / medians["pydantic and one model"]
                yield f"| {name} | {case} | {taken * 1000:.0f} | {ratio:.2f} |"


MEMPLAN = """
import memplan
plan = memplan.plan(memplan.RunSpec(**{question!r}))
for proposal in plan.proposals or (plan.nearest,):
    if proposal is not None:
        print([lever.title for lever in proposal.levers], proposal.answer.bytes.used, proposal.time)
"""


def _commands(name: str, folder: Path, venvs: Path | None) -> dict[str, list[str]]:
    """Return the commands that answer the question: memplan's plan with printed proposals, memplan's command if this
    version has one, and the tools' commands."""
    told = asked_of(name)
    found = {"memplan.plan, printed": [sys.executable, "-c", MEMPLAN.format(question=QUESTIONS[name])]}
    if find_spec("memplan.cli.plan"):
        found["memplan plan"] = [
            *(sys.executable, "-m", "memplan", "plan", QUESTIONS[name]["model"], "--gpu", told.gpu),
            *("--method", told.method, "--precision", "pure", "--dtype", told.dtype),
            *("--batch-size", str(told.micro), "--seq-len", str(told.sequence)),
        ]
    if venvs is None:
        return found
    snapshot = folder / "hub" / f"models--asked--{name}" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0", "utf-8")
    (snapshot / "config.json").write_text(json.dumps(told.config), "utf-8")
    sizes = folder / f"{name}.json"
    sizes.write_text(json.dumps(canifinetune_model(told)), "utf-8")
    models = {"fitcheck-llm": f"asked/{name}", "canifinetune": str(sizes)}
    for tool, of in TOOLS.items():
        for title, (executable, *words) in of.commands(told, models[tool]).items():
            if (venvs / tool / "bin" / executable).exists():
                found[title] = [str(venvs / tool / "bin" / executable), *words]
    return found


def main() -> None:
    venvs = Path(os.environ["OTHER_TOOLS"]) if "OTHER_TOOLS" in os.environ else None
    if venvs is not None:
        record(venvs)
    versions = {line["tool"]: f"{line['version']}, asked {line['date']}" for line in recorded()}
    print("; ".join(f"{tool} {what}" for tool, what in versions.items()))
    print("\nWhat each proposes (`differs`: 0 the same result, 3 another one):\n")
    print("\n".join(proposals()))
    print("\nThe largest micro-batch, with everything else unchanged:\n")
    print("\n".join(largest()))
    print("\nVerdicts on published runs:\n")
    print("\n".join(who_is_right()))
    print("\nTimes in a process:\n")
    print("\n".join(in_process(venvs)))
    print("\nTimes of commands:\n")
    print("\n".join(commands(venvs, 10)))


if __name__ == "__main__":
    begun = time.perf_counter()
    match sys.argv[1:]:
        case ["--answer", tool]:
            answered_here(tool)
        case ["--time", name]:
            plans_here(name, begun)
        case ["--time-tool", tool]:
            question = Told(**json.load(sys.stdin))
            begun = time.perf_counter()
            timed_here(begun, TOOLS[tool].plan, question)
        case _:
            main()
