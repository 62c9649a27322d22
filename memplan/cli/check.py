"""`memplan check` and `memplan diff`: runs against their budgets, and what changed between two checks."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import COMMAND, Options, Subcommand, Switch, own
from memplan.cli.gpu_names import with_names_of_cards
from memplan.cli.outcome import show, warn
from memplan.cli.runs import check_count, screen_of
from memplan.core.errors import SpecError, UnknownNameError

if TYPE_CHECKING:
    from memplan.gate.difference import Changes
    from memplan.gate.rows import Check

_FORMATS = ("table", "markdown", "json", "github", "gitlab", "junit", "sarif", "openmetrics")
_OF_CHANGES = ("table", "markdown", "json", "github")
_SUFFIXES = {"md": "markdown", "json": "json", "xml": "junit", "sarif": "sarif", "txt": "table"}
FILES = own(
    "The runs' files. Default all that memplan.toml, or [tool.memplan] in pyproject.toml, names.",
    list[str],
    metavar="FILES",
    is_argument=True,
    completes="files",
)
BUDGET = {
    "gpu": own("A GPU that must hold the runs, instead of the budgets of memplan.toml; repeatable.", list[str]),
    "gpus": own("How many GPUs a run is on. Default as its file says.", int),
    "fail_above": own("Share of the usable memory, or bytes, over which it fails: 95% or 22GiB. Default 100%."),
    "warn_above": own("The same for a warning. Default if memory may run out by the expected range."),
    "band": own("Compare what is used usually, or the high end of the expected range.", choices=("usual", "high")),
    "framework": own("The framework that the files are of, as in axolotl or axolotl-0.12. Default told by their keys."),
}
_EXIT = {
    "unknown": own(
        "What a run that cannot be answered does: warn, fail or ignore. Default warn.",
        choices=("warn", "fail", "ignore"),
    ),
    "strict": own("Exit 4 if a file is only partly read. Default off.", Switch),
}


def _output(formats: tuple[str, ...]) -> Mapping[str, Any]:
    return {
        "format": own(f"{', '.join(formats)}. Default table.", choices=formats),
        "json": own("Short for --format json.", Switch),
        "output": own("Write to this file. Default standard output."),
        "report": own("Write a further report to this file (.md, .json, .xml, .sarif, .txt); repeatable.", list[str]),
    }


def command(name: str) -> Subcommand:
    if name == "check":
        locked = own("Fail if a model's config or a profile is not that of memplan.lock. Default off.", Switch)
        options: Options = {
            "Files": {"files": FILES},
            "Budget": BUDGET,
            "Exit code": {**_EXIT, "locked": locked},
            "Output": _output(_FORMATS),
        }
        return Subcommand(name, check, options, rewrite=_with_last_command)
    sides = own(
        "Two of: a git revision, a folder, the JSON of a check. The second is by default the working directory.",
        list[str],
        metavar="REVISION",
        is_argument=True,
        is_required=True,
        completes="files",
    )
    runs = own("A file or pattern of files to check with --gpu; repeatable.", list[str])
    options = {
        "Revisions": {"revisions": sides},
        "Budget": {"runs": runs, **BUDGET},
        "Exit code": _EXIT,
        "Output": _output(_OF_CHANGES),
    }
    return Subcommand(name, diff, options)


def _with_last_command(words: list[str]) -> list[str]:
    """Return the words with the command after `--` as one of the files."""
    index = words.index("--") if "--" in words else len(words)
    if len(words) < index + 3:
        return words
    return [*words[:index], f" {COMMAND}{shlex.join(words[index + 1 :])}"]  # with a space, so that it is no option


def check(given: Mapping[str, Any]) -> int:
    """Check runs against their budgets: each on every GPU of its budget, the worst first.

    Exit codes: 0 all fit; 1 a run is over its budget; 2 wrong input; 3 with --unknown fail, the facts of a model are
    not available, or with --locked they are not those of memplan.lock; 4 with --strict, a file is only partly read.
    """
    from memplan.gate.check import check

    given, output = with_names_of_cards(given), _outputs(given, _FORMATS)
    names = [name.strip() for name in given.get("files", ())]
    typed = _typed(given)
    if "gpu" not in given:
        if typed:
            option = next(iter(typed)).replace("_", "-")
            raise SpecError(f"{option}: only applies with --gpu; memplan.toml has the budgets of other runs", option)
        names = in_folder_of_budgets(names)
    with Progress() as progress:
        keys: dict[str, Any] = {**_as_keys(typed), "locked": "locked" in given}
        found = check(names, gpu=given.get("gpu", ()), processes=None, progress=progress, **keys)
    _write(found, given, output)
    return found.exit_code(given.get("unknown", "warn"), "strict" in given)


def diff(given: Mapping[str, Any]) -> int:
    """Show which runs take more or less than before, why, and which no longer fit.

    A run that did not fit before either does not fail. Exit codes: 0 no run is newly over its budget; 1 one is; 2 wrong
    input; 3 with --unknown fail, the facts of a model are not available; 4 with --strict, a file is only partly read.
    """
    from memplan.gate.budget import Budgets, budget
    from memplan.gate.difference import difference

    given, output = with_names_of_cards(given), _outputs(given, _OF_CHANGES)
    sides = given["revisions"]
    if len(sides) > 2:
        raise SpecError(f"revisions: name two, not {len(sides)}")
    typed = None
    if "gpu" in given:
        if "runs" not in given:
            raise SpecError("runs: name the files to check on these GPUs, as in --runs 'configs/*.yaml'", "runs")
        keys = _as_keys({**_typed(given), "number": given.get("gpus")}, "gpus")
        typed = Budgets("", (budget(given["runs"], given["gpu"], **keys),), ())
    elif _typed(given) or "runs" in given:
        raise SpecError("gpu: name the GPUs of the runs that are given", "gpu")
    else:
        sides = [str(Path(name).absolute()) if Path(name).exists() else name for name in sides]
        in_folder_of_budgets(())
    with Progress() as progress:
        found = difference(sides[0], *sides[1:], typed=typed, processes=None, progress=progress)
    _write(found, given, output)
    return found.exit_code(given.get("unknown", "warn"), "strict" in given)


def _typed(given: Mapping[str, Any]) -> dict[str, Any]:
    check_count("gpus", given.get("gpus"))
    return {name: given[name] for name in BUDGET if name in given and name != "gpu"}


def _as_keys(typed: Mapping[str, Any], *left_out: str) -> dict[str, Any]:
    """Return the options as the keys of memplan.toml."""
    return {name.removesuffix("_above"): value for name, value in typed.items() if name not in left_out}


def in_folder_of_budgets(names: Any) -> list[str]:
    """Change to the folder that has the budgets, and return the files as they are named there."""
    from memplan.gate.budget import folder_of_budgets

    here = Path.cwd()
    folder = folder_of_budgets(here)
    if folder is None or folder == here:
        return [*names]
    os.chdir(folder)
    return [name if name.startswith(COMMAND) else os.path.relpath(here / name, folder) for name in names]


def _outputs(given: Mapping[str, Any], formats: tuple[str, ...]) -> list[tuple[str, str | None]]:
    """Return the formats to write, and where to, by paths that hold in any folder. Raises SpecError."""
    if "json" in given and given.get("format", "json") != "json":
        raise SpecError(f"format: --json and --format {given['format']} exclude each other", "format")
    path = given.get("output")
    guessed = _SUFFIXES.get(str(path).rpartition(".")[2].lower(), "table") if path else "table"
    format = "json" if "json" in given else given.get("format", guessed)
    reports = [(_SUFFIXES.get(name.rpartition(".")[2].lower(), ""), name) for name in given.get("report", ())]
    for each, name in ((format, None), *reports):
        if each not in formats:
            if name is None:
                raise UnknownNameError("format", each, formats)
            raise SpecError(f"report: {name!r:.80} does not end in .md, .json, .xml, .sarif or .txt", "report")
    return [(each, str(Path(name).absolute()) if name else None) for each, name in ((format, path), *reports)]


def _write(found: Check | Changes, given: Mapping[str, Any], outputs: list[tuple[str, str | None]]) -> None:
    from memplan.report.gate import render
    from memplan.report.text import Screen

    if given.get("unknown") == "ignore":
        found = found.without_unknown()
    for format, path in outputs:
        screen = Screen() if path else screen_of(given)
        show(render(format, found, screen), "json" if format in ("json", "gitlab", "sarif") else format, path)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary and outputs[0][0] == "github":
        from memplan.report.gate.markdown import render as page

        try:
            with Path(summary).open("a", encoding="utf-8") as file:
                file.write(page(found))
        except OSError as error:
            warn(f"GITHUB_STEP_SUMMARY cannot be written ({error.strerror})")


class Progress:
    """Says on a terminal how many runs are checked, after the first second."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = False

    def __enter__(self) -> Callable[[int, int], None] | None:
        is_terminal = sys.stderr is not None and sys.stderr.isatty()  # pyright: ignore[reportUnnecessaryComparison] (if closed)
        return self._say if is_terminal else None

    def _say(self, done: int, of: int) -> None:
        if time.monotonic() - self._start > 1:
            self._shown = True
            sys.stderr.write(f"\r\033[Kmemplan: {done} of {of} runs")
            sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")
