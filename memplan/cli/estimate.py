"""`memplan MODEL`, short for `memplan estimate MODEL`: the command and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import Subcommand, Switch, own
from memplan.cli.outcome import show
from memplan.cli.own_profile import own_profile
from memplan.cli.run_files import explained, headline, run_file
from memplan.cli.runs import exit_code, format_of, runs_of, screen_of, stamp_of, typed_line
from memplan.core.errors import SpecError, printable
from memplan.resolve.request import errors_of
from memplan.spec.options import OPTIONS

if TYPE_CHECKING:
    from memplan.estimate.answer import Estimate

# Names of `memplan.report.emit.SYSTEMS`, which is imported only to write for one.
SYSTEMS = (
    *("kubernetes", "dra", "hami", "volcano", "kai", "runai", "kueue", "production-stack", "kaito", "slurm", "ray"),
    *("skypilot", "dstack", "modal"),
)
EMIT_OPTIONS = {
    "emit": own(
        f"Write what a scheduler takes instead of the report: {', '.join(SYSTEMS)}. Default none.", choices=SYSTEMS
    ),
    "patch": own("With --emit, write only the fields to change. Default off.", Switch),
    "share": own("With --emit, ask for part of a GPU, by its memory. Default off.", Switch),
    "site": own(
        'With --emit slurm, a TOML file with the site\'s names: [types] and [features], "a100-80gb" = "a100". Default '
        "none."
    ),
}
ESTIMATE_OPTIONS = {
    **OPTIONS,
    "Schedulers": EMIT_OPTIONS,
    "Input and output": {
        "spec": own(
            "A run's file as JSON or YAML (- is standard input), as in place of MODEL; options override it; repeat it "
            "for several runs.",
            list[str],
        ),
        "framework": own(
            "The framework that a run's file is of, as in axolotl or axolotl-0.12. Default told by its keys."
        ),
        "explain_run": own("List each value of a run's file, and where it is from. Default off.", Switch),
        "online": own(
            "Ask the Hugging Face Hub about a model without a card: its config and the headers of its weights. "
            "Default off.",
            Switch,
        ),
        "revision": own("Branch, tag or commit of the id, as in owner/name@revision. Default main."),
        "via": own(
            "engine (memplan's own description of the model), trace (the installed transformers' step, on tensors "
            "without data), or auto: trace only models that the engine does not know. Default auto.",
            choices=("auto", "engine", "trace"),
        ),
        "cache": own("Read and write traces in the user's cache folder. Default on.", bool),
        "format": own(
            "table, json, markdown, csv, html, svg. Default table.",
            choices=("table", "json", "markdown", "csv", "html", "svg"),
        ),
        "json": own("Short for --format json.", Switch),
        "output": own("Write to this file. Default standard output."),
        "date": own("A date that pages show (HTML, SVG, Markdown), as in 2026-11-29, or today. Default none."),
        "details": own("Show tensors by category, phases and assumptions. Default off.", Switch),
        "plain": own("Words and numbers alone, without bar, rules and colours. Default off.", Switch),
        "explain": own("List every tensor alive at the peak. Default off.", Switch),
        "ranks": own("List every GPU that differs: pipeline stages or a device map. Default off.", Switch),
        "strict": own("Exit 1 if tight, and 4 if something unsupported was left out. Default off.", Switch),
        "calibration": own(
            "Use this machine's own profile of the card, if memplan calibrate has written one. Default on.", bool
        ),
    },
}


def command(name: str) -> Subcommand:
    return Subcommand(name, estimate, ESTIMATE_OPTIONS)


def emitted(given: Mapping[str, Any], answers: Sequence[Estimate]) -> str:
    """Return what a scheduler takes for the run. Raises SpecError for what it cannot say."""
    from pathlib import Path

    from memplan.core.toml import read_tables
    from memplan.report.emit import emit

    if {"format", "json"} & given.keys():
        raise SpecError("emit: writes its own file format; leave out --format and --json", "emit")
    if "site" in given and given["emit"] != "slurm":
        raise SpecError("site: only applies to --emit slurm", "site")
    try:
        site = read_tables(Path(given["site"])) if "site" in given else None
    except (OSError, ValueError) as error:
        reason = printable(getattr(error, "strerror", None) or str(error), 80)
        raise SpecError(f"site: {printable(given['site'], 80)!r} cannot be read ({reason})", "site") from None
    return emit(given["emit"], answers, share="share" in given, patch="patch" in given, site=site)


def _single(given: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the options with one run's file each."""
    return [{**given, "spec": [name]} for name in given.get("spec", ())] or [given]


def estimate(given: Mapping[str, Any]) -> int:
    """Estimate whether a run fits, what takes the memory, and when.

    Exit codes: 0 fits, or no GPU given; 1 does not fit or start; 2 wrong input; 3 the model's config is not available;
    4 with --strict, something unsupported was left out.
    """
    from memplan.estimate.estimate import estimate
    from memplan.probe.route import estimates
    from memplan.report import render

    for name in ("patch", "share", "site"):
        if name in given and "emit" not in given:
            raise SpecError(f"{name}: only applies with --emit", name)
    format = format_of(given)
    files = [run_file(one) for one in _single(given)]
    answers: list[Estimate] = []
    for file, one in zip(files, _single(given), strict=True):
        with errors_of(file):
            runs = [(run, own_profile(run.gpu, one)) for run in runs_of(one, file)]
            found = estimates(
                runs, one.get("via", "auto"), cache=one.get("cache", True), online="online" in one, engine=estimate
            )
        if file is not None and not file.is_own:
            found = [answer.read_from(file.origins_of(answer.asked), file.notes) for answer in found]
        answers += found
    to, line = (screen_of(given), typed_line(given)) if format == "table" else (None, None)
    text = "".join(headline(file, format) for file in files)
    if "emit" in given:
        show(emitted(given, answers), "emit", given.get("output"))
        return exit_code(answers, "strict" in given) if len(answers) == 1 else 0
    explain, ranks, details = ("explain" in given), ("ranks" in given), ("details" in given)
    text += render(format, answers, explain, to, ranks, stamp_of(given, format), details, line)
    if "explain_run" in given and format == "table":
        assert files[0] is not None  # checked by `run_file`
        text += "\n" + explained(answers[0], files[0], is_wide="output" in given)
    show(text, format, given.get("output"))
    if to is not None and to.terminal and len(answers) == 1 and not {"output", "details", "explain"} & given.keys():
        from memplan.report.table import stacks

        show(stacks(answers[0], to))  # below an answer that is there already
    return exit_code(answers, "strict" in given)
