"""`memplan explain FILE [RUN]`: why a run ran out of memory, or each value of a run's file and why it is so."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.cli.commands import Subcommand, Switch, own, without
from memplan.cli.estimate import EMIT_OPTIONS, ESTIMATE_OPTIONS
from memplan.cli.outcome import show
from memplan.cli.own_profile import own_profile
from memplan.cli.run_files import explained, headline, run_file
from memplan.cli.runs import format_of, runs_of, screen_of, stamp_of
from memplan.core.errors import SpecError, printable
from memplan.core.files import is_file, open_file
from memplan.resolve.request import errors_of
from memplan.spec.options import MODEL

if TYPE_CHECKING:
    from mmap import mmap

    from memplan.frameworks.reading.run_file import RunFile
    from memplan.spec.run import RunSpec

_FILES = MODEL._replace(
    help="A log with an out-of-memory message (- is standard input, or the message itself), perhaps followed by its "
    "run: a file or a model. Or a run's file alone, whose values are listed.",
    type=list[str],
    metavar="FILE [RUN]",
    completes="",
)
_OF_ANSWERS = (
    *("details", "explain_run", "online", "via", "cache", "format", "json", "date", "explain", "ranks", "strict"),
)
_LONGEST = 64 * 2**20  # bytes of a log's end that are read
_LOOKED_AT = 256  # bytes of a file's beginning that tell a snapshot
_LOGS = (".log", ".out", ".err", ".txt")
_FORMATS = "table, json, csv (of a run's file), markdown or html (of a log or snapshot). Default table."


def command(name: str) -> Subcommand:
    formats = own(_FORMATS, choices=("table", "json", "csv", "markdown", "html"))
    options = {"Output": {"format": formats, "json": own("Short for --format json.", Switch)}}
    others = without(ESTIMATE_OPTIONS, "model", *_OF_ANSWERS, *EMIT_OPTIONS)
    return Subcommand(name, explain, {"File": {"files": _FILES}, **options, **others})


def explain(given: Mapping[str, Any]) -> int:
    """Say why a run ran out of memory: what asked, what stood there, whose it was, and what would have made it fit.

    The log may be one line or a job's entire output. With its run, the allocations are replayed to name the tensor.
    Given a run's file alone, list each of its values, where it is from, and by how much it changes the memory used.

    Exit codes: 0 explained or listed; 2 wrong input; 3 the model's config is not available.
    """
    first, *run = given.get("files") or [""]
    given = {name: value for name, value in given.items() if name != "files"}
    data = _snapshot_of(first)
    if data is not None:
        return _snapshot(data, {**given, **({"model": " ".join(run)} if run else {})})
    text = _log_of(first)
    if text is not None:
        return _log(text, {**given, **({"model": " ".join(run)} if run else {})})
    if run:
        raise SpecError(
            f"file: {printable(first, 80)!r} has no out-of-memory message; a run's file comes alone", "file"
        )
    return _values({**given, **({"model": first} if first else {})})


def _snapshot_of(name: str) -> bytes | mmap | None:
    """Return a memory snapshot's bytes; None for another file."""
    from mmap import ACCESS_READ, mmap

    from memplan.explain.snapshot import MOST_KEPT, is_snapshot

    path = Path(name)
    try:
        with open_file(path) as file:
            start = file.read(_LOOKED_AT)
            if not is_snapshot(start):
                return None
            return mmap(file.fileno(), 0, access=ACCESS_READ) if path.is_file() else start + file.read(MOST_KEPT)
    except (OSError, ValueError):
        return None


def _snapshot(data: bytes | mmap, given: Mapping[str, Any]) -> int:
    from memplan.estimate.estimate import estimate
    from memplan.explain.explanation import explain_request
    from memplan.explain.history import History
    from memplan.explain.snapshot import read_snapshot
    from memplan.report.snapshot import FORMATS, render

    format = format_of(given)
    if format not in FORMATS:
        raise SpecError(f"format: a snapshot cannot be {format}; choose {', '.join(FORMATS)}", "format")
    run, _ = _run_of(given)
    history = History(read_snapshot(data))
    answer = estimate(run, own_profile(run.gpu, given)) if run is not None else None
    failure = explain_request(history.failed[-1].size, history.failed[-1].place, run) if history.failed else ""
    stamp = stamp_of(given, format)
    show(render(format, history, answer, screen_of(given), failure, stamp), format, given.get("output"))
    return 0


def _run_of(given: Mapping[str, Any]) -> tuple[RunSpec | None, RunFile | None]:
    """Return the run that a log or a snapshot comes with, and its file."""
    if not given.keys() & {"model", "spec"}:
        return None, None
    file = run_file(given)
    with errors_of(file):
        runs = runs_of(given, file)
    if len(runs) > 1:
        raise SpecError("gpu: explain is for one card", "gpu")
    return runs[0], file


def _log_of(name: str) -> str | None:
    """Return a log's text; None for a run's file, which has no out-of-memory message."""
    from memplan.explain.message import read_log

    path = Path(name)
    try:
        has_file = name not in ("", "-") and is_file(path)
    except (OSError, ValueError):  # too long for a name, as a message is
        has_file = False
    if has_file:
        with open_file(path) as file:
            file.seek(max(0, file.seek(0, SEEK_END) - _LONGEST))
            text = _decoded(file.read(_LONGEST))
    else:
        text = sys.stdin.read(_LONGEST) if name == "-" else name
    is_log = name == "-" or path.suffix.lower() in _LOGS if has_file or name == "-" else False
    return text if is_log or any(True for _ in read_log(text).messages) else None


def _decoded(data: bytes) -> str:
    """Return a log's text: UTF-8 with anything else replaced, or UTF-16 as PowerShell writes it."""
    is_wide = data[:2] in (b"\xff\xfe", b"\xfe\xff")
    return data.decode("utf-16" if is_wide else "utf-8", "replace")


def _log(text: str, given: Mapping[str, Any]) -> int:
    from memplan.explain.explanation import explain, named_model
    from memplan.report.explanation import FORMATS, render

    format = format_of(given)
    if format not in FORMATS:
        raise SpecError(f"format: an explained log cannot be {format}; choose {', '.join(FORMATS)}", "format")
    if given.keys() - {"format", "json", "output", "plain", "calibration"} and not given.keys() & {"model", "spec"}:
        model = named_model(text)
        given = {**given, **({"model": model} if model else {})}
    run, file = _run_of(given)
    found = explain(text, run)
    patch = _patch(given, file, run)
    text = render(format, found, screen_of(given), patch, stamp_of(given, format))
    show(headline(file, format) + text, format, given.get("output"))
    return 0


def _patch(given: Mapping[str, Any], file: RunFile | None, run: RunSpec | None) -> str:
    """Return what would make a run fit, as a diff of its file; empty if it fits, or has no file."""
    from memplan.cli.file_patches import file_levers

    if file is None or run is None or run.gpu is None or run.task != "train":
        return ""
    levers = file_levers(given, file, run)
    if levers is None:
        return ""
    from memplan.planning.file_levers import file_patch
    from memplan.planning.plan import plan

    profile = own_profile(run.gpu, given)
    return file_patch(plan(run, levers=levers, calibration=profile), levers, profile).diff


def _values(given: Mapping[str, Any]) -> int:
    """List each value of a run's file: the one that changes most first, compared with the field's plain default."""
    from memplan.estimate.estimate import estimate

    format = format_of(given)
    if format not in ("table", "json", "csv"):
        raise SpecError(f"format: explain cannot write {format}; choose table, json or csv", "format")
    file = run_file(given)
    if file is None:
        text = "explain takes a log with an out-of-memory message, or a run's file"
        raise SpecError(f"model: {text}; --explain lists the tensors of any run", "model")
    with errors_of(file):
        runs = runs_of(given, file)
        if len(runs) > 1:
            raise SpecError("gpu: explain is for one card", "gpu")
        answer = estimate(runs[0], own_profile(runs[0].gpu, given))
    start = headline(file, format, with_notes=True)
    show(start + explained(answer, file, format, "output" in given), format, given.get("output"))
    return 0
