"""`memplan compare`: runs side by side. Each run is one shell word: a model with its options, or a file."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import COMMAND, Subcommand, own, without
from memplan.cli.estimate import EMIT_OPTIONS, ESTIMATE_OPTIONS
from memplan.cli.outcome import show
from memplan.cli.own_profile import own_profile
from memplan.cli.plain import COMMANDS, RESERVED_COMMANDS
from memplan.cli.run_files import explained, is_command, run_file
from memplan.cli.runs import exit_code, format_of, runs_of, screen_of, stamp_of
from memplan.core.errors import FactsMissingError, MemplanError, SpecError, printable
from memplan.spec.option_values import listed
from memplan.spec.options import flag

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.estimate.calibration import Calibration
    from memplan.frameworks.reading.run_file import RunFile
    from memplan.spec.run import RunSpec

# Options of the comparison rather than of one run.
_OF_COMPARISON = ("format", "json", "output", "date", "strict", "explain_run")
_SEVERAL = ("method", "profile", "optimizer", "checkpointing", "attention", "loss")  # that may name several choices
_OF_ESTIMATE = ("details", "explain", "online", "revision", "spec")  # options of `estimate` only
_FILES = (".json", ".yaml", ".yml")
RUNS = own(
    "A model with its own options in quotes, as in 'qwen2-7b --method lora', or a run's file (.json, .yaml). Its "
    "options override those outside the quotes, which apply to all runs; --method lora,qlora is a run with each.",
    list[str],
    metavar="RUN",
    is_argument=True,
    is_required=True,
)


def command(name: str) -> Subcommand:
    options = {"Runs": {"runs": RUNS}, **without(ESTIMATE_OPTIONS, "model", *_OF_ESTIMATE, *EMIT_OPTIONS)}
    return Subcommand(name, compare, options, rewrite=_with_last_command)


def _with_last_command(words: list[str]) -> list[str]:
    """Return the words with the command after `--` as one of the runs."""
    index = words.index("--") if "--" in words else len(words)
    if len(words) < index + 3:
        return words
    return [*words[:index], f" -- {shlex.join(words[index + 1 :])}"]  # with a space, so that it is no option


def command_of_run() -> Subcommand:
    """Return the command that parses the options of one run."""
    return Subcommand("run", compare, without(ESTIMATE_OPTIONS, *EMIT_OPTIONS))


def compare(given: Mapping[str, Any]) -> int:
    """Compare runs side by side: which settings differ, which categories of memory, and which tensors.

    Every run is estimated on every --gpu. Exit codes: 0 all fit, or no GPU given; 1 one does not fit; 2 wrong input; 3
    a model's config is not available; 4 with --strict, something unsupported was left out.
    """
    from memplan.planning.comparison import compare_answers
    from memplan.report.comparison import FORMATS, render

    format = format_of(given)
    if format not in FORMATS:
        *others, last = FORMATS
        raise SpecError(f"format: compare cannot write {format}; choose {', '.join(others)} or {last}", "format")
    shared = {name: value for name, value in given.items() if name not in ("runs", *_OF_COMPARISON)}

    @cache  # warns only once per card
    def profile(gpu: str | None, wanted: bool) -> Calibration | None:
        return own_profile(gpu, {"calibration": wanted})

    words = command_of_run()
    said = [(text, each) for text in given["runs"] for each in _each(shared)]
    runs = [_answers(f"run {n}", text, each, words, profile) for n, (text, each) in enumerate(said, 1)]
    answers = [answer for _, of_run in runs for answer in of_run]
    if "explain_run" in given and not any(file for file, _ in runs):
        raise SpecError("--explain-run only applies to a run's file")
    if len(answers) < 2:
        raise SpecError("runs: only one is given; add another, or several choices, as in --method lora,qlora")
    text = render(format, compare_answers(answers), screen_of(given), stamp_of(given, format))
    if "explain_run" in given and format == "table":
        for n, (file, of_run) in enumerate(runs, 1):
            if file is not None:
                table = explained(of_run[0], file, is_wide="output" in given)
                text += f"\nRun {n}: {file.headline}\n\n{table}"
    show(text, format, given.get("output"))
    return exit_code(answers, "strict" in given)


def _each(shared: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the shared options once for every choice of those with several: `--method lora,qlora`."""
    several = {name: listed(shared[name]) for name in _SEVERAL if "," in shared.get(name, "")}
    for chosen in product(*several.values()):
        yield {**shared, **dict(zip(several, chosen, strict=True))}


def _answers(
    which: str,
    text: str,
    shared: Mapping[str, Any],
    words: Subcommand,
    profile: Callable[[str | None, bool], Calibration | None],
) -> tuple[RunFile | None, list[Estimate]]:
    """Return the file of one run, and its answers, one per card. Errors are one line that says which run it is."""
    from memplan.estimate.estimate import estimate
    from memplan.probe.route import estimates
    from memplan.resolve.request import override
    from memplan.spec.failures import line_of

    given = dict(shared)
    try:
        given = override(shared, _given(text, words))
        file = run_file(given)
        runs: list[RunSpec] = runs_of(given, file)
        wanted: bool = given.get("calibration", True)
        calibrated = [(run, profile(run.gpu, wanted)) for run in runs]
        answers = estimates(calibrated, given.get("via", "auto"), cache=given.get("cache", True), engine=estimate)
        return file, answers if file is None else [answer.read_from((), file.notes) for answer in answers]
    except FactsMissingError as error:
        raise FactsMissingError(f"{which}: {line_of(error, given)}") from None
    except MemplanError as error:
        options = given.keys() - {"spec"}  # here a file is not given by --spec
        raise SpecError(f"{which}: {line_of(error, sorted(options))}") from None


def _given(text: str, words: Subcommand) -> dict[str, Any]:
    """Parse one run: a model or a file, and its options. Raises SpecError."""
    typed = _typed(text)
    if not typed:
        raise SpecError("is empty; write a model and its options, as in 'qwen2-7b --method lora', or a run's file")
    if typed[0] in ("memplan", *COMMANDS, *RESERVED_COMMANDS):
        raise SpecError(f"{typed[0]} is not a model; a run is a model and its options, as in 'qwen2-7b --method lora'")
    typed = ["--", *typed] if is_command(typed) else typed
    given = words.given(typed)
    if given is None:
        from memplan.cli.typer_commands import given_by_typer

        given = given_by_typer(words, typed)
    for name, value in given.items():
        if name in _OF_COMPARISON:
            raise SpecError(f"{flag(name)} applies to the whole comparison; put it outside the quotes")
        if name == "spec" and not value[0].startswith(COMMAND):
            raise SpecError(f"--spec: name the file in place of the model, as in {printable(value[0], 80)!r}")
        if name in _OF_ESTIMATE and name != "spec":
            raise SpecError(f"--{name} only applies to memplan estimate")
    if _is_file_of_run(given.get("model", "")):
        given["spec"] = [given.pop("model")]
    return given


def _typed(text: str) -> list[str]:
    """Split one run into words. A file's name may contain spaces and backslashes, so it is not split."""
    if text.lower().endswith(_FILES) and Path(text).is_file():
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise SpecError("a quote inside it is not closed") from None


def _is_file_of_run(name: str) -> bool:
    """Whether the name is a run's file rather than a model's config.json. Raises if the file cannot be read."""
    from memplan.spec.file import read_spec

    if not name.lower().endswith(_FILES):
        return False
    return not name.lower().endswith(".json") or "model_type" not in read_spec(name)
