"""`memplan compare`: runs side by side. Each is one word of the shell, a model with options of its own, or a file."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.main import get_command

from memplan.cli import APART, LATER
from memplan.cli.answering import UsageError, answered, show, usage
from memplan.cli.options import Grouped, complete_model
from memplan.cli.own_profile import own_profile
from memplan.cli.runs import exit_code, format_of, left_out, runs_of

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate
    from memplan.estimate.calibration import Calibration
    from memplan.spec.run import RunSpec

_WHOLE = ("format", "json", "output", "strict")  # of the comparison, not of one of its runs
_NONE = ("explain", "online", "revision", "spec")  # of `estimate` alone
_FILES = (".json", ".yaml", ".yml")
_COMMANDS = ("memplan", "estimate", "models", "gpus", "profiles", "schema", *APART, *LATER)


class Compare(Grouped):
    """The runs, and options that hold for all of them; what was typed is read off the context."""

    words: Any = None  # reads the options inside a run

    def invoke(self, ctx: Any) -> int:
        params: Mapping[str, Any] = ctx.params
        given = {name: value for name, value in params.items() if not left_out(name, value)}
        return answered(lambda: _compare(given, self.words), given)


def command(estimate: Sequence[Any]) -> Any:
    """The command, with the options in `estimate` that say what a run is, and how the answer is shown."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("compare", cls=Compare)(compare)
    made: Any = get_command(app)
    made.params = [*made.params, *(p for p in estimate if p.name not in ("model", *_NONE))]
    one = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    one.command("run", add_help_option=False)(compare)
    made.words = get_command(one)
    made.words.params = list(estimate)
    return made


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN",
            help="A model with options of its own in quotes, as in 'qwen2-7b --method lora', or a run's file (.json, "
            ".yaml). Its options go over those beside the runs, which hold for all.",
            autocompletion=complete_model,
            rich_help_panel="Runs",
        ),
    ],
) -> None:
    """Runs side by side: what differs, in what category of memory, and which tensors make the difference.

    Every run is asked on every --gpu. Exit codes: 0 all fit, or no GPU asked; 1 one does not fit; 2 wrong input; 3 a
    model's facts are not here; 4 with --strict, something unsupported was left out.
    """


def _compare(given: Mapping[str, Any], words: Any) -> int:
    from memplan.core.errors import SpecError
    from memplan.planning.comparison import compared
    from memplan.report.comparison import FORMATS, render
    from memplan.report.text import Screen, screen

    format = format_of(given)
    if format not in FORMATS:
        raise SpecError(f"format: {format!r} is not there for a comparison; there are {', '.join(FORMATS)}", "format")
    shared = {name: value for name, value in given.items() if name not in ("runs", *_WHOLE)}

    @cache  # so that it warns once of a card
    def profile(gpu: str | None, wanted: bool) -> Calibration | None:
        return own_profile(gpu, {"calibration": wanted})

    answers = [a for n, text in enumerate(given["runs"], 1) for a in _answers(f"run {n}", text, shared, words, profile)]
    if len(answers) < 2:
        raise SpecError("runs: there is one; name another to compare it with, or several cards with --gpu")
    to = Screen() if "output" in given else screen()
    show(render(format, compared(answers), to), format, given.get("output"))
    return exit_code(answers, "strict" in given)


def _answers(
    which: str,
    text: str,
    shared: Mapping[str, Any],
    words: Any,
    profile: Callable[[str | None, bool], Calibration | None],
) -> list[Estimate]:
    """The answers of one run, one for each card. What is wrong with it is one line that says which run it is."""
    from pydantic import ValidationError

    from memplan.cli.request import over
    from memplan.core.errors import FactsMissingError, MemplanError, SpecError
    from memplan.estimate.estimate import estimate
    from memplan.probe.route import estimates
    from memplan.spec.failures import line_of

    given = dict(shared)
    try:
        given = over(shared, _given(text, words))
        runs: list[RunSpec] = runs_of(given)
        wanted: bool = given.get("calibration", True)
        asked = [(run, profile(run.gpu, wanted)) for run in runs]
        return estimates(asked, given.get("via", "auto"), cache=given.get("cache", True), engine=estimate)
    except UsageError as error:
        raise SpecError(f"{which}: {usage(error)}") from None
    except FactsMissingError as error:
        raise FactsMissingError(f"{which}: {line_of(error, given)}") from None
    except (MemplanError, ValidationError) as error:
        options = given.keys() - {"spec"}  # a file is not typed as one here
        raise SpecError(f"{which}: {line_of(error, sorted(options))}") from None


def _given(text: str, words: Any) -> dict[str, Any]:
    """What one run says of itself: a model or a file, and options. Raises SpecError or typer's error about usage."""
    from memplan.core.errors import SpecError, printable

    typed = _typed(text)
    if not typed:
        raise SpecError("is empty; it takes a model, as in 'qwen2-7b --method lora', or a run's file")
    if typed[0] in _COMMANDS:
        raise SpecError(f"{typed[0]} is no model; a run is a model and its options, as in 'qwen2-7b --method lora'")
    params: Mapping[str, Any] = words.make_context("run", typed).params
    given = {name: value for name, value in params.items() if not left_out(name, value)}
    for name, value in given.items():
        if name in _WHOLE:
            raise SpecError(f"--{name} is of the whole comparison; give it beside the runs, outside their quotes")
        if name == "spec":
            raise SpecError(f"--spec: name the file in the model's place, as in {printable(value, 80)!r}")
        if name in _NONE:
            raise SpecError(f"--{name} is of memplan estimate alone")
    if _is_file_of_run(given.get("model", "")):
        given["spec"] = given.pop("model")
    return given


def _typed(text: str) -> list[str]:
    """The words of one run. A file's name may have spaces, and a path's backslashes are no quotes."""
    from memplan.core.errors import SpecError

    if text.lower().endswith(_FILES) and Path(text).is_file():
        return [text]
    try:
        return shlex.split(text)
    except ValueError:
        raise SpecError("quotes are opened inside it and not closed") from None


def _is_file_of_run(name: str) -> bool:
    """Whether it names a run's file, and not a model's config.json. Raises what says why a file cannot be read."""
    from memplan.spec.file import read_spec

    if not name.lower().endswith(_FILES):
        return False
    return not name.lower().endswith(".json") or "model_type" not in read_spec(name)
