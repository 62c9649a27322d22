"""`memplan probe`: traces or measures a run next to its estimate, runs a suite, or compares LoRA's gradients."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import Subcommand, Switch, own, without
from memplan.cli.estimate import EMIT_OPTIONS, ESTIMATE_OPTIONS
from memplan.cli.outcome import show
from memplan.cli.run_files import run_file
from memplan.cli.runs import check_count, runs_of, screen_of
from memplan.core.errors import (
    FactsMissingError,
    MemplanError,
    SpecError,
    UnknownNameError,
    UnsupportedModelError,
    printable,
)
from memplan.core.records import NamedTuple
from memplan.spec.options import flag

if TYPE_CHECKING:
    from memplan.catalogue.hardware.gpu import GPU
    from memplan.estimate.answer import Estimate
    from memplan.probe.run.process import Machine
    from memplan.spec.run import RunSpec

MODES = ("trace", "cuda", "gradients")
# Options of `estimate` that a probe does not take, or has its own version of.
_EXCLUDED = (
    *("details", "plain", "online", "revision", "format", "json", "output", "date", "explain", "strict", "via"),
    "cache",
)
PROBE_OPTIONS = {
    "trace": own("Trace the step on tensors without data, on any machine. Default off.", Switch),
    "cuda": own("Run the step on the local GPU, in a separate process. Default off.", Switch),
    "gradients": own(
        "Compare LoRA's gradients computed by hand, by torch and by peft, for every shape of layer; in fp32 unless "
        "--dtype is given. Default off.",
        Switch,
    ),
    "suite": own(
        "Measure the runs in a file: lines of JSON, or YAML with a list under runs. Without a file, memplan chooses "
        "runs for the card. Default one run.",
        metavar="[FILE]",
    ),
    "dry_run": own("Only list the runs, what to expect, and how long they take. Default off.", Switch),
    "steps": own("Training steps of each run. Default 2.", int),
    "snapshot": own(
        "Write every allocation and its stack to this file, for memplan explain; only with --cuda. Without a name "
        "snapshot.pickle. Default none.",
        metavar="[FILE]",
    ),
    "timeout": own("Seconds after which a run is killed. Default 1800.", float),
    "json": own("As JSON. Default off.", Switch),
    "output": own(
        "Write to this file; a suite appends a line after each run, and resumes where it stopped. Default standard "
        "output.",
    ),
}


_UNNAMED = {"--suite": "default", "--snapshot": "snapshot.pickle"}  # what an option without a value means


def _named(words: list[str]) -> list[str]:
    """Return the words with memplan's default suite where --suite has no file, and a file where --snapshot has none."""
    typed: list[str] = []
    for n, word in enumerate(words):
        typed.append(word)
        if word in _UNNAMED and (n + 1 == len(words) or words[n + 1].startswith("-")):
            typed.append(_UNNAMED[word])
    return typed


def command(name: str) -> Subcommand:
    options = {**without(ESTIMATE_OPTIONS, *_EXCLUDED, *EMIT_OPTIONS), "Probe": PROBE_OPTIONS}
    return Subcommand(name, probe, options, rewrite=_named)


def probe(given: Mapping[str, Any]) -> int:
    """Find what a run really takes, traced without a GPU or measured on this machine's, next to the estimate.

    Exit codes: 0 there is a result, which may be running out of memory; 1 a run was killed, failed or timed out, or
    gradients differ; 2 wrong input, or no GPU or library to probe with; 3 the model's config is not available.
    """
    given = {"steps": 2, "timeout": 1800.0, **given}
    modes = [mode for mode in MODES if mode in given]
    if len(modes) > 1:
        raise SpecError(f"probe: --{modes[0]} and --{modes[1]} exclude each other", "probe")
    check_count("steps", given["steps"])
    if not given["timeout"] > 0:
        raise SpecError(f"timeout: must be more than 0, not {given['timeout']:g}", "timeout")
    mode = modes[0] if modes else ""
    if "snapshot" in given and (mode != "cuda" or "suite" in given):
        raise SpecError("snapshot: only applies to a run with --cuda", "snapshot")
    if "suite" in given:
        return _suite(given, mode)
    if "dry_run" in given:
        return _print_plan([_run(given)], given)
    match mode:
        case "trace":
            return _traced(given)
        case "cuda":
            return _measured(given)
        case "gradients":
            return _gradients(given)
        case _:
            raise SpecError("probe: choose one of --trace, --cuda, --gradients, or --suite for many runs", "probe")


def _run(given: Mapping[str, Any]) -> RunSpec:
    file = run_file(given)
    if file is not None and not file.is_own:
        _print_progress(file.headline)
    runs = runs_of(given, file)
    if len(runs) > 1:
        raise SpecError("gpu: a probe runs on one card; name one", "gpu")
    return runs[0]


def _json(value: object) -> str:
    return json_.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _estimated(run: RunSpec) -> tuple[Estimate | None, str]:
    """Return the estimate, or why there is none: a probe also runs models that memplan cannot estimate."""
    from memplan.estimate.estimate import estimate

    try:
        return estimate(run), ""
    except (FactsMissingError, UnknownNameError):
        raise
    except MemplanError as error:
        return None, f"there is no estimate to compare with: {error}"


# --- one run on the GPU ------------------------------------------------------------------------------------


def _machine(asked: str | None) -> tuple[Machine, GPU | None]:
    """Return this machine and its card's catalogue row. Raises MemplanError if there is no GPU, or another one."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.probe.libraries import require
    from memplan.probe.run.process import local_machine

    require()
    machine = local_machine()
    try:
        row = find_gpu(machine.card.name)
    except UnknownNameError:
        row = None
    if asked is not None and (row is None or find_gpu(asked).name != row.name):
        raise SpecError(f"gpu: {find_gpu(asked).title} is not in this machine, which has {machine.card.name}", "gpu")
    return machine, row


def _measured(given: Mapping[str, Any]) -> int:
    from memplan.probe.run.process import RESULTS, measure
    from memplan.probe.run.rows import row as line_of
    from memplan.report import measurement as probed

    run = _run(given)
    machine, row = _machine(run.gpu)
    run = _on(run, row)
    answer, why = _estimated(run)
    if answer is not None and probed.too_small(answer):
        _print_progress(probed.too_small(answer))
    written = {"snapshot": given["snapshot"]} if "snapshot" in given else {}
    measured = measure(run, machine, given["steps"], given["timeout"], **written)
    if measured.outcome == "refused":
        raise MemplanError(measured.said, measured.said.partition(":")[0])
    if "json" in given:
        text = _json({**line_of(measured, machine), "estimate": _short(answer)})
    else:
        notes = [*probed.notes(measured, machine, row.usable if row else None), *([why] if why else [])]
        text = probed.run(measured, machine, answer, notes, screen_of(given))
    show(text, "json" if "json" in given else "table", given.get("output"))
    return int(measured.outcome not in RESULTS)


def _on(run: RunSpec, row: GPU | None) -> RunSpec:
    """Return the run on a card. A local config.json is inlined, so that the result's line is self-contained."""
    from memplan.models.cards import find_config, find_model
    from memplan.spec.generation import InlineModel

    update: dict[str, Any] = {"gpu": row.name if row else None}
    if isinstance(run.model, str):
        try:
            bundled = bool(find_model(run.model).card)
        except UnsupportedModelError:
            bundled = False
        if not bundled:
            update["model"] = InlineModel(config=dict(find_config(run.model)))
    return run.model_copy(update=update)


def _short(answer: Estimate | None) -> dict[str, Any] | None:
    """Return the part of an estimate that is written next to a measurement."""
    if answer is None:
        return None
    return {
        "bytes": answer.bytes.as_dict(),
        "band": answer.band._asdict(),
        "verdict": answer.verdict.as_dict(),
        "phases": [phase._asdict() for phase in answer.phases],
    }


def _print_progress(line: str) -> None:
    """Print a line on standard error and flush it."""
    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        sys.stderr.write(f"memplan: {printable(line)}\n")
        sys.stderr.flush()


# --- a suite -----------------------------------------------------------------------------------------------


def _suite(given: Mapping[str, Any], mode: str) -> int:
    if mode == "gradients":
        raise SpecError("suite: --gradients takes one model; leave out --suite", "suite")
    allowed = ("suite", "dry_run", "steps", "timeout", "json", "output", "gpu", *MODES)
    extra = next((name for name in given if name not in allowed), None)
    if extra is not None:
        what = "the model" if extra == "model" else flag(extra)
        raise SpecError(f"suite: its runs have their own options; leave out {what}", "suite")
    asked: Sequence[str] = given.get("gpu", ())
    if len(asked) > 1:
        raise SpecError("gpu: a suite runs on one card; name one", "gpu")
    if "dry_run" in given:
        return _print_plan(_runs(given["suite"], _row(asked, given["suite"] == "default")), given)
    if mode == "trace":
        return _traced_suite(_runs(given["suite"], _row(asked, given["suite"] == "default")), given)
    machine, row = _machine(asked[0] if asked else None)
    if row is None and given["suite"] == "default":
        raise SpecError(f"gpu: memplan knows no runs for {machine.card.name!r:.80}; give --suite a file", "gpu")
    runs = [_on(run, row) for run in _runs(given["suite"], row)]
    return _measured_suite(list(dict.fromkeys(runs)), machine, given)


def _row(asked: Sequence[str], needed: bool) -> GPU | None:
    """Return the given card or, if the default suite needs one, this machine's card."""
    from memplan.catalogue.hardware.gpus import find_gpu

    if asked:
        return find_gpu(asked[0])
    if not needed:
        return None
    try:
        row = _machine(None)[1]
    except MemplanError as error:
        raise SpecError(f"gpu: name the card that the suite is for, as in --gpu 3090 ({error})", "gpu") from None
    if row is None:
        raise SpecError("gpu: memplan does not know this machine's card; name one with --gpu", "gpu")
    return row


def _runs(suite: str, row: GPU | None) -> list[RunSpec]:
    """Return the suite's runs, on the card if there is one."""
    from memplan.planning.reach import largest_batch
    from memplan.probe.run.suite import default_suite, read_suite

    if suite == "default" and row is not None:
        return default_suite(row, largest_batch)
    runs = read_suite(suite)
    return runs if row is None else list(dict.fromkeys(_on(run, row) for run in runs))


def _print_plan(runs: Sequence[RunSpec], given: Mapping[str, Any]) -> int:
    """Print what would run. The output file is only read."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.probe.run.process import RESULTS
    from memplan.probe.run.rows import finished_runs
    from memplan.probe.run.suite import as_json, plan
    from memplan.report import measurement as probed
    from memplan.report.text import screen

    gpu = find_gpu(runs[0].gpu) if runs[0].gpu else None
    planned = plan(runs, gpu, given["steps"])
    finished = (
        finished_runs(Path(given["output"]), ("traced",) if "trace" in given else RESULTS, mends=False)
        if "output" in given
        else set[Any]()
    )
    is_done = [p.run in finished for p in planned]
    if "json" in given:
        show(_json([{**as_json(p), "there": there} for p, there in zip(planned, is_done, strict=True)]), "json")
    else:
        show(probed.plan(planned, is_done, screen()))
    return 0


def _measured_suite(runs: Sequence[RunSpec], machine: Machine, given: Mapping[str, Any]) -> int:
    from memplan.probe.run.process import RESULTS, local_machine, measure
    from memplan.probe.run.rows import row as line_of
    from memplan.report import measurement as probed

    def results(left: Sequence[RunSpec]) -> Iterator[Result]:
        for number, run in enumerate(left, 1):
            answer, _ = _estimated(run)
            measured = measure(run, machine, given["steps"], given["timeout"])
            succeeded = measured.outcome in RESULTS
            yield Result(line_of(measured, machine), probed.progress(number, len(left), measured, answer), succeeded)
            if not succeeded:
                local_machine()  # raises if the GPU is unusable, which would fail every other run too

    return _run_pending(runs, given, RESULTS, results)


class Result(NamedTuple):
    """A finished run of a suite.

    line   its line in the output file
    said   its progress message
    good   whether it says something about memory
    """

    line: dict[str, Any]
    said: str
    good: bool


def _run_pending(
    runs: Sequence[RunSpec],
    given: Mapping[str, Any],
    outcomes: Sequence[str],
    results: Callable[[Sequence[RunSpec]], Iterator[Result]],
) -> int:
    """Run what the output file has no result for, and write each line as the run ends. Return 1 if one failed.

    `outcomes` are those that count as a result.
    """
    from memplan.probe.run.rows import append, finished_runs

    output = Path(given["output"]) if "output" in given else None
    finished = finished_runs(output, outcomes) if output is not None else set[Any]()
    pending = [run for run in runs if run not in finished]
    if len(pending) < len(runs):
        show(f"{len(runs) - len(pending)} of {len(runs)} runs are already in {given['output']}\n")
    failed = 0
    for result in results(pending):
        failed += not result.good
        if output is None:
            show(json_.dumps(result.line, ensure_ascii=False) + "\n", "json")
            _print_progress(result.said)
        else:
            append(output, result.line)
            show(result.said + "\n")
    return int(failed > 0)


# --- on tensors without data -------------------------------------------------------------------------------


def _traced(given: Mapping[str, Any]) -> int:
    from memplan.probe.libraries import require
    from memplan.probe.run.trace import trace
    from memplan.report import trace as report

    require()
    run = _run(given)
    answer, why = _estimated(run)
    traced = trace(run, given["steps"])
    if "json" in given:
        text = _json(report.compared(traced, answer))
    else:
        text = report.run(traced, answer, [*traced.notes, *([why] if why else [])], screen_of(given))
    show(text, "json" if "json" in given else "table", given.get("output"))
    return 0


def _traced_suite(runs: Sequence[RunSpec], given: Mapping[str, Any]) -> int:
    from memplan.probe.run.trace import traces
    from memplan.report import trace as report

    def results(left: Sequence[RunSpec]) -> Iterator[Result]:
        for number, (run, traced) in enumerate(zip(left, traces(left, given["steps"]), strict=True), 1):
            answer, _ = _estimated(run)
            line = report.line(run, traced)
            yield Result(line, report.progress(number, len(left), line, answer), line["outcome"] == "traced")

    return _run_pending(runs, given, ("traced",), results)


# --- gradients ---------------------------------------------------------------------------------------------


def _gradients(given: Mapping[str, Any]) -> int:
    from memplan.probe.gradients import as_json, compare
    from memplan.report import measurement as probed

    options = given if "method" in given or "spec" in given else {**given, "method": "lora"}
    if not {"dtype", "precision", "spec"} & set(given):
        options = {**options, "dtype": "fp32"}  # has the least rounding error
    run = _run(options)
    if run.method.kind != "lora":
        raise SpecError(f"method.kind: gradients are compared for lora, not {run.method.kind}", "method.kind")
    compared = list(compare(run))
    if "json" in given:
        text = _json([as_json(c) for c in compared])
    else:
        text = probed.gradients(compared, run.precision.weights, run.method.rank, screen_of(given))
    show(text, "json" if "json" in given else "table", given.get("output"))
    return int(not all(c.agree for c in compared))
