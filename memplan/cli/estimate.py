"""`memplan MODEL`, short for `memplan estimate MODEL`: the command and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.cli.commands import Subcommand, Switch, own
from memplan.cli.outcome import show
from memplan.cli.own_profile import own_profile
from memplan.cli.run_files import errors_of, explained, headline, run_file
from memplan.cli.runs import exit_code, format_of, runs_of
from memplan.spec.options import OPTIONS

ESTIMATE_OPTIONS = {
    **OPTIONS,
    "Input and output": {
        "spec": own("A run's file as JSON or YAML (- is standard input), as in place of MODEL; options override it."),
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
            "table, json, markdown, csv, html. Default table.",
            choices=("table", "json", "markdown", "csv", "html"),
        ),
        "json": own("Short for --format json.", Switch),
        "output": own("Write to this file. Default standard output."),
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


def estimate(given: Mapping[str, Any]) -> int:
    """Estimate whether a run fits, what takes the memory, and when.

    Exit codes: 0 fits, or no GPU given; 1 does not fit or start; 2 wrong input; 3 the model's config is not available;
    4 with --strict, something unsupported was left out.
    """
    from memplan.estimate.estimate import estimate
    from memplan.probe.route import estimates
    from memplan.report import render

    format = format_of(given)
    file = run_file(given)
    with errors_of(file):
        runs = [(run, own_profile(run.gpu, given)) for run in runs_of(given, file)]
        answers = estimates(
            runs, given.get("via", "auto"), cache=given.get("cache", True), online="online" in given, engine=estimate
        )
    if file is not None and not file.is_own:
        answers = [answer.read_from(file.origins_of(answer.asked), file.notes) for answer in answers]
    to = None
    if "output" in given and format == "table":
        from memplan.report.text import Screen

        to = Screen()
    text = headline(file, format) + render(format, answers, "explain" in given, to, "ranks" in given)
    if "explain_run" in given and format == "table":
        assert file is not None  # checked by `run_file`
        text += "\n" + explained(answers[0], file, is_wide=to is not None)
    show(text, format, given.get("output"))
    return exit_code(answers, "strict" in given)
