"""`memplan probe`: a run traced or measured beside its estimate, a suite of runs, or LoRA's gradients compared."""

from __future__ import annotations

import json as json_
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.main import get_command

from memplan.cli.answering import answered, show
from memplan.cli.options import Grouped, option
from memplan.cli.runs import left_out, runs_of

if TYPE_CHECKING:
    from memplan.catalogue.hardware.gpu import GPU
    from memplan.estimate.answer import Estimate
    from memplan.probe.run.process import Here
    from memplan.report.text import Screen
    from memplan.spec.run import RunSpec

PROBE = "Probe"
MODES = ("trace", "cuda", "gradients")
# Of `estimate` alone.
_OWN = ("online", "revision", "format", "json", "output", "explain", "strict", "via", "cache")
_SWITCHES = (*MODES, "dry_run", "json")


class Probe(Grouped):
    """The options of a run, which `estimate` has, and the probe's own; what was typed is read off the context."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """--suite without a file is the suite that memplan brings along."""
        typed = list[str]()
        for n, word in enumerate(args):
            typed.append(word)
            if word == "--suite" and (n + 1 == len(args) or args[n + 1].startswith("-")):
                typed.append("default")
        return super().parse_args(ctx, typed)

    def invoke(self, ctx: Any) -> int:
        params: Mapping[str, Any] = ctx.params
        given = {k: v for k, v in params.items() if not left_out(k, v) and not (v is False and k in _SWITCHES)}
        return answered(lambda: _probe(given), given)


def command(estimate: Sequence[Any]) -> Any:
    """The command, with the options in `estimate` that say what a run is."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("probe", cls=Probe)(probe)
    made: Any = get_command(app)
    made.params = [*(param for param in estimate if param.name not in _OWN), *made.params]
    return made


def probe(
    trace: Annotated[
        bool, option("Run the step on tensors without data, on any machine. Default off.", "--trace", of=PROBE)
    ] = False,
    cuda: Annotated[
        bool, option("Run the step on the local GPU, in a process of its own. Default off.", "--cuda", of=PROBE)
    ] = False,
    gradients: Annotated[
        bool,
        option(
            "Compare LoRA's gradients by hand, by torch and by peft, for every shape of layer; in fp32 where no "
            "--dtype is given. Default off.",
            "--gradients",
            of=PROBE,
        ),
    ] = False,
    suite: Annotated[
        str | None,
        option(
            "Measure the runs in a file: lines of JSON, or YAML with a list under runs. Without a file, those that "
            "memplan chooses for the card. Default one run.",
            of=PROBE,
            metavar="[FILE]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, option("Only say which runs, what is expected of them, and how long. Default off.", "--dry-run", of=PROBE)
    ] = False,
    steps: Annotated[int, option("Training steps of each run. Default 2.", of=PROBE)] = 2,
    timeout: Annotated[
        float, option("Seconds after which a run that has not ended is given up. Default 1800.", of=PROBE)
    ] = 1800,
    json: Annotated[bool, option("As JSON. Default off.", "--json", of=PROBE)] = False,
    output: Annotated[
        str | None,
        option(
            "Write to this file; a suite adds a line as each run ends, and goes on where it left off. "
            "Default standard output.",
            of=PROBE,
        ),
    ] = None,
) -> None:
    """What a run really takes: traced without a GPU or measured on this one, beside the estimate.

    Exit codes: 0 there is a result, and running out of memory is one; 1 a run was killed, failed or did not answer, or
    gradients differ; 2 wrong input, or no GPU or library to probe with; 3 the model's facts are not here.
    """


def _probe(given: Mapping[str, Any]) -> int:
    from memplan.core.errors import SpecError

    modes = [mode for mode in MODES if mode in given]
    if len(modes) > 1:
        raise SpecError(f"probe: --{modes[0]} and --{modes[1]} exclude each other", "probe")
    if given["steps"] < 1:
        raise SpecError(f"steps: must be at least 1, not {given['steps']}", "steps")
    if not given["timeout"] > 0:
        raise SpecError(f"timeout: must be more than 0, not {given['timeout']:g}", "timeout")
    mode = modes[0] if modes else ""
    if "suite" in given:
        return _suite(given, mode)
    if "dry_run" in given:
        return _planned([_one(given)], given)
    match mode:
        case "trace":
            return _traced(given)
        case "cuda":
            return _measured(given)
        case "gradients":
            return _gradients(given)
        case _:
            raise SpecError("probe: say how: --trace, --cuda, --gradients, or --suite for many runs", "probe")


def _one(given: Mapping[str, Any]) -> RunSpec:
    from memplan.core.errors import SpecError

    runs = runs_of(given)
    if len(runs) > 1:
        raise SpecError("gpu: a probe is of one card; name one", "gpu")
    return runs[0]


def _to(given: Mapping[str, Any]) -> Screen:
    from memplan.report.text import Screen, screen

    return Screen() if "output" in given else screen()


def _json(value: object) -> str:
    return json_.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _estimated(run: RunSpec) -> tuple[Estimate | None, str]:
    """The estimate, or why there is none: a probe also runs what memplan has no stack for."""
    from memplan.core.errors import FactsMissingError, MemplanError, UnknownNameError
    from memplan.estimate.estimate import estimate

    try:
        return estimate(run), ""
    except (FactsMissingError, UnknownNameError):
        raise
    except MemplanError as error:
        return None, f"there is no estimate to compare with: {error}"


# --- one run on the GPU ------------------------------------------------------------------------------------


def _machine(asked: str | None) -> tuple[Here, GPU | None]:
    """This machine and its card's row. Raises MemplanError where there is no GPU, or another than was asked for."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.core.errors import SpecError, UnknownNameError
    from memplan.probe.libraries import require
    from memplan.probe.run.process import here

    require()
    machine = here()
    try:
        row = find_gpu(machine.card.name)
    except UnknownNameError:
        row = None
    if asked is not None and (row is None or find_gpu(asked).name != row.name):
        raise SpecError(f"gpu: {find_gpu(asked).title} is not here, but {machine.card.name}", "gpu")
    return machine, row


def _measured(given: Mapping[str, Any]) -> int:
    from memplan.core.errors import MemplanError
    from memplan.probe.run.process import RESULTS, measure
    from memplan.probe.run.rows import row as line_of
    from memplan.report import measurement as probed

    run = _one(given)
    machine, row = _machine(run.gpu)
    run = _on(run, row)
    answer, why = _estimated(run)
    if answer is not None and probed.too_small(answer):
        _tell(probed.too_small(answer))
    measured = measure(run, machine, given["steps"], given["timeout"])
    if measured.outcome == "refused":
        raise MemplanError(measured.said, measured.said.partition(":")[0])
    if "json" in given:
        text = _json({**line_of(measured, machine), "estimate": _short(answer)})
    else:
        notes = [*probed.notes(measured, machine, row.usable if row else None), *([why] if why else [])]
        text = probed.run(measured, machine, answer, notes, _to(given))
    show(text, "json" if "json" in given else "table", given.get("output"))
    return int(measured.outcome not in RESULTS)


def _on(run: RunSpec, row: GPU | None) -> RunSpec:
    """The run on a card; one of a config.json on this machine says the config itself, so that its line stands alone."""
    from memplan.core.errors import UnsupportedModelError
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
    """What of an estimate stands beside a measurement."""
    if answer is None:
        return None
    return {
        "bytes": answer.bytes.as_dict(),
        "band": answer.band._asdict(),
        "verdict": answer.verdict.as_dict(),
        "phases": [phase._asdict() for phase in answer.phases],
    }


def _tell(line: str) -> None:
    """One line to the user while the work goes on."""
    from memplan.core.errors import printable

    if sys.stderr is not None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
        sys.stderr.write(f"memplan: {printable(line)}\n")
        sys.stderr.flush()


# --- a suite -----------------------------------------------------------------------------------------------


def _suite(given: Mapping[str, Any], mode: str) -> int:
    from memplan.core.errors import SpecError

    if mode == "gradients":
        raise SpecError("suite: --gradients is of one model; leave out --suite", "suite")
    allowed = ("suite", "dry_run", "steps", "timeout", "json", "output", "gpu", *MODES)
    extra = next((name for name in given if name not in allowed), None)
    if extra is not None:
        what = "the model" if extra == "model" else "--" + extra.replace("_", "-")
        raise SpecError(f"suite: its runs say all of themselves; leave out {what}", "suite")
    asked: Sequence[str] = given.get("gpu", ())
    if len(asked) > 1:
        raise SpecError("gpu: a suite runs on one card; name one", "gpu")
    if "dry_run" in given:
        return _planned(_runs(given["suite"], _row(asked, given["suite"] == "default")), given)
    if mode == "trace":
        return _traced_suite(_runs(given["suite"], _row(asked, given["suite"] == "default")), given)
    machine, row = _machine(asked[0] if asked else None)
    if row is None and given["suite"] == "default":
        raise SpecError(f"gpu: memplan has no row of {machine.card.name!r:.80} to choose runs for; name a file", "gpu")
    runs = [_on(run, row) for run in _runs(given["suite"], row)]
    return _measured_suite(list(dict.fromkeys(runs)), machine, given)


def _row(asked: Sequence[str], needed: bool) -> GPU | None:
    """The card asked for, or where a suite is to be chosen for one, the card that is here."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.core.errors import MemplanError, SpecError

    if asked:
        return find_gpu(asked[0])
    if not needed:
        return None
    try:
        row = _machine(None)[1]
    except MemplanError as error:
        raise SpecError(f"gpu: name the card that the suite is for, as in --gpu 3090 ({error})", "gpu") from None
    if row is None:
        raise SpecError("gpu: memplan has no row of the card that is here; name one with --gpu", "gpu")
    return row


def _runs(suite: str, row: GPU | None) -> list[RunSpec]:
    """The suite's runs, on the card where there is one."""
    from memplan.planning.reach import largest_batch
    from memplan.probe.run.suite import default_suite, read_suite

    if suite == "default" and row is not None:
        return default_suite(row, largest_batch)
    runs = read_suite(suite)
    return runs if row is None else list(dict.fromkeys(_on(run, row) for run in runs))


def _planned(runs: Sequence[RunSpec], given: Mapping[str, Any]) -> int:
    """Print what would be run. The output that it would go to is only read."""
    from memplan.catalogue.hardware.gpus import find_gpu
    from memplan.probe.run.process import RESULTS
    from memplan.probe.run.rows import done
    from memplan.probe.run.suite import as_json, plan
    from memplan.report import measurement as probed
    from memplan.report.text import screen

    gpu = find_gpu(runs[0].gpu) if runs[0].gpu else None
    planned = plan(runs, gpu, given["steps"])
    there = (
        done(Path(given["output"]), ("traced",) if "trace" in given else RESULTS, mends=False)
        if "output" in given
        else set[Any]()
    )
    have = [p.run in there for p in planned]
    if "json" in given:
        show(_json([{**as_json(p), "there": had} for p, had in zip(planned, have, strict=True)]), "json")
    else:
        show(probed.plan(planned, have, screen()))
    return 0


def _measured_suite(runs: Sequence[RunSpec], machine: Here, given: Mapping[str, Any]) -> int:
    from memplan.probe.run.process import RESULTS, here, measure
    from memplan.probe.run.rows import row as line_of
    from memplan.report import measurement as probed

    def results(left: Sequence[RunSpec]) -> Iterator[Result]:
        for number, run in enumerate(left, 1):
            answer, _ = _estimated(run)
            measured = measure(run, machine, given["steps"], given["timeout"])
            good = measured.outcome in RESULTS
            yield Result(line_of(measured, machine), probed.progress(number, len(left), measured, answer), good)
            if not good:
                here()  # raises where no other run would do better

    return _each(runs, given, RESULTS, results)


class Result(NamedTuple):
    """A run of a suite that has ended: its line, what is said of it, and whether it says something about memory."""

    line: dict[str, Any]
    said: str
    good: bool


def _each(
    runs: Sequence[RunSpec],
    given: Mapping[str, Any],
    outcomes: Sequence[str],
    results: Callable[[Sequence[RunSpec]], Iterator[Result]],
) -> int:
    """Run those that the output has none of the `outcomes` of, and write each line as the run ends. 1 if one failed."""
    from memplan.probe.run.rows import append, done

    output = Path(given["output"]) if "output" in given else None
    there = done(output, outcomes) if output is not None else set[Any]()
    left = [run for run in runs if run not in there]
    if len(left) < len(runs):
        show(f"{len(runs) - len(left)} of {len(runs)} runs are in {given['output']} already\n")
    failed = 0
    for result in results(left):
        failed += not result.good
        if output is None:
            show(json_.dumps(result.line, ensure_ascii=False) + "\n", "json")
            _tell(result.said)
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
    run = _one(given)
    answer, why = _estimated(run)
    traced = trace(run, given["steps"])
    if "json" in given:
        text = _json(report.compared(traced, answer))
    else:
        text = report.run(traced, answer, [*traced.notes, *([why] if why else [])], _to(given))
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

    return _each(runs, given, ("traced",), results)


# --- gradients ---------------------------------------------------------------------------------------------


def _gradients(given: Mapping[str, Any]) -> int:
    from memplan.core.errors import SpecError
    from memplan.probe.gradients import as_json, compare
    from memplan.report import measurement as probed

    asked = given if "method" in given or "spec" in given else {**given, "method": "lora"}
    if not {"dtype", "precision", "spec"} & set(given):
        asked = {**asked, "dtype": "fp32"}  # rounding hides least there
    run = _one(asked)
    if run.method.kind != "lora":
        raise SpecError(f"method.kind: gradients are compared for lora, not {run.method.kind}", "method.kind")
    compared = list(compare(run))
    if "json" in given:
        text = _json([as_json(c) for c in compared])
    else:
        text = probed.gradients(compared, run.precision.weights, run.method.rank, _to(given))
    show(text, "json" if "json" in given else "table", given.get("output"))
    return int(not all(c.agree for c in compared))
