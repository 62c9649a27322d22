"""`memplan MODEL`, short for `memplan estimate MODEL`: the command and its options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.cli.answering import show
from memplan.cli.options import OptionsCommand, Switch, own
from memplan.cli.own_profile import own_profile
from memplan.cli.runs import exit_code, format_of, runs_of
from memplan.spec.options import OPTIONS

ESTIMATE_OPTIONS = {
    **OPTIONS,
    "Input and output": {
        "spec": own("A run as JSON or YAML (- is standard input); options override it."),
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


def command(name: str) -> OptionsCommand:
    return OptionsCommand(name, estimate, ESTIMATE_OPTIONS)


def estimate(given: Mapping[str, Any]) -> int:
    """Estimate whether a run fits, what takes the memory, and when.

    Exit codes: 0 fits, or no GPU given; 1 does not fit; 2 wrong input; 3 the model's config is not available; 4 with
    --strict, something unsupported was left out.
    """
    from memplan.estimate.estimate import estimate
    from memplan.probe.route import estimates
    from memplan.report import render

    format = format_of(given)
    runs = [(run, own_profile(run.gpu, given)) for run in runs_of(given)]
    answers = estimates(
        runs, given.get("via", "auto"), cache=given.get("cache", True), online="online" in given, engine=estimate
    )
    to = None
    if "output" in given and format == "table":
        from memplan.report.text import Screen

        to = Screen()
    show(render(format, answers, "explain" in given, to, "ranks" in given), format, given.get("output"))
    return exit_code(answers, "strict" in given)
