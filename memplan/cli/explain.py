"""`memplan explain FILE`: each value of a run's file, and why it is so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memplan.cli.commands import Subcommand, Switch, own, without
from memplan.cli.estimate import ESTIMATE_OPTIONS
from memplan.cli.outcome import show
from memplan.cli.own_profile import own_profile
from memplan.cli.run_files import explained, headline, run_file
from memplan.cli.runs import format_of, runs_of
from memplan.core.errors import SpecError
from memplan.resolve.request import errors_of
from memplan.spec.options import MODEL

_FILE = MODEL._replace(
    help="A run's file: of a training framework, or of a run's own fields.", metavar="FILE", completes=""
)
_OF_ANSWERS = (
    *("details", "explain_run", "online", "via", "cache", "format", "json", "date", "explain", "ranks", "strict"),
)


def command(name: str) -> Subcommand:
    formats = own("table, json or csv. Default table.", choices=("table", "json", "csv"))
    options = {"Output": {"format": formats, "json": own("Short for --format json.", Switch)}}
    others = without(ESTIMATE_OPTIONS, "model", *_OF_ANSWERS)
    return Subcommand(name, explain, {"File": {"model": _FILE}, **options, **others})


def explain(given: Mapping[str, Any]) -> int:
    """List each value of a run's file, where it is from, and by how much it changes the memory used.

    A value is compared with the field's plain default; the one that changes most comes first. Exit codes: 0 listed; 2
    wrong input; 3 the model's config is not available.
    """
    from memplan.estimate.estimate import estimate

    format = format_of(given)
    if format not in ("table", "json", "csv"):
        raise SpecError(f"format: explain cannot write {format}; choose table, json or csv", "format")
    file = run_file(given)
    if file is None:
        raise SpecError("model: explain only applies to a run's file; --explain lists the tensors of any run", "model")
    with errors_of(file):
        runs = runs_of(given, file)
        if len(runs) > 1:
            raise SpecError("gpu: explain is for one card", "gpu")
        answer = estimate(runs[0], own_profile(runs[0].gpu, given))
    start = headline(file, format, with_notes=True)
    show(start + explained(answer, file, format, "output" in given), format, given.get("output"))
    return 0
