"""Measured runs as lines of JSON, written as each run ends, and read to resume, to calibrate, or as golden runs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import MemplanError, SpecError, printable, refused
from memplan.core.version import __version__
from memplan.probe.run.process import Machine, MeasuredRun
from memplan.resolve.decide import fill_from_profile
from memplan.spec.run import RunSpec

SOURCE = "memplan probe --cuda"
_MOST_BYTES = 2**26
_LONGEST = 200


def run_label(run: RunSpec) -> str:
    """Return a short label of a run with its defaults filled in; not unique."""
    run = fill_from_profile(run)
    model = run.model if isinstance(run.model, str) else str(run.model.config.get("model_type", "config"))
    words = [
        printable(Path(model).name or model, 40),
        run.method.kind,
        "amp" if run.precision.autocast else run.precision.weights,
        str(run.optimizer.name),
        run.kernels.attention or "sdpa",
        str(run.kernels.loss),
        {"none": "", "full": "ckpt"}.get(str(run.kernels.checkpointing), f"ckpt-{run.kernels.checkpointing}"),
        f"b{run.batch.micro}-s{run.batch.sequence}",
    ]
    return "-".join(word for word in words if word)


def run_id(run: RunSpec) -> str:
    """Return a unique, readable name of a run."""
    return f"{run_label(run)}-{sha256(run.model_dump_json().encode()).hexdigest()[:6]}"


def row(measured: MeasuredRun, machine: Machine) -> dict[str, Any]:
    """Return a measured run as a line in the format of tests/golden: bytes of the run, its phases and its readings."""
    readings = [r for r in measured.readings if r.phase != "context"]
    phases: dict[str, int] = {}
    for reading in readings:
        name = "step" if reading.phase == "clip" else reading.phase
        phases[name] = max(phases.get(name, 0), reading.allocated)
    first = next((r for r in measured.readings if r.phase == "context"), None)
    out: dict[str, Any] = {
        "id": run_id(measured.run),
        "source": SOURCE,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "memplan": __version__,
        "stack": stack(machine.versions),
        "measured": machine.card.name,
        "driver": machine.driver,
        "allocator": machine.allocator,
        "outcome": measured.outcome,
    }
    if measured.outcome == "measured":
        out |= {"allocated": measured.allocated, "reserved": measured.reserved, "process": measured.process}
    else:
        out |= {"phase": measured.phase, "step": measured.step, "said": measured.said}
    if first is not None:
        last = measured.readings[-1]
        out["context"] = {"first": measured.context_bytes(first), "last": measured.context_bytes(last)}
    out |= {"before": measured.before, "shown": measured.shown, "seconds": round(measured.seconds, 1)}
    out |= {"phases": phases, "readings": [r._asdict() for r in readings]}
    return {**out, "run": measured.run.model_dump(mode="json", exclude_defaults=True)}


def stack(versions: Mapping[str, str]) -> str:
    """Return the libraries and their versions as text."""
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Append one line to a file. Raises MemplanError if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise MemplanError(f"output: {str(path)!r:.200} cannot be written ({error.strerror})", "output") from None


def finished_runs(path: Path, outcomes: Sequence[str], mends: bool = True) -> set[RunSpec]:
    """Return the runs that a file already has a line for with one of the `outcomes`.

    An incomplete last line is ignored and, if `mends`, removed from the file. Raises SpecError if a line is not a
    measured run.
    """
    if not path.exists():
        return set()
    if mends:
        mend(path)
    return {run for run, line in read(path, "output", cut=True) if line.get("outcome") in outcomes}


def mend(path: Path) -> None:
    """Remove an incomplete last line, left by an interrupted write, from the file."""
    try:
        raw = path.read_bytes()
        if raw and not raw.endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(raw.rfind(b"\n") + 1)
    except OSError as error:
        raise MemplanError(f"output: {str(path)!r:.200} cannot be written ({error.strerror})", "output") from None


def read(path: Path, field: str, cut: bool = False) -> Iterator[tuple[RunSpec, Mapping[str, Any]]]:
    """Yield the runs of a file with their lines. With `cut`, an incomplete last line is skipped.

    Raises SpecError naming `field` and the line.
    """
    for number, line in lines_of(path, field, cut):
        if "run" in line:  # a golden file may start with a header line
            yield run_of(line["run"], f"{field}: {printable(path.name, _LONGEST)}, line {number}", field), line


def lines_of(path: Path, field: str, cut: bool = False) -> list[tuple[int, Mapping[str, Any]]]:
    """Return a file's lines as JSON objects with their numbers. With `cut`, an incomplete last line is skipped.

    Raises SpecError naming `field` and the line.
    """
    shown = printable(str(path), _LONGEST)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise refused(field, f"{shown} is larger than {_MOST_BYTES // 2**20} MiB")
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError:
        raise refused(field, f"{shown} is not text in UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise refused(field, f"{shown!r} cannot be read ({getattr(error, 'strerror', error)})") from None
    if cut:
        text = text[: text.rfind("\n") + 1]
    parsed: list[tuple[int, Mapping[str, Any]]] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value: object = json.loads(line)
        except (ValueError, RecursionError):
            raise refused(field, f"{shown}, line {number} is not JSON") from None
        if not isinstance(value, dict):
            raise refused(field, f"{shown}, line {number} is not a JSON object")
        parsed.append((number, cast(dict[str, Any], value)))
    return parsed


def run_of(fields: object, where: str, field: str) -> RunSpec:
    """Return a run from its fields. Raises SpecError with `where` and what is wrong."""
    from memplan.spec.failures import line_of

    try:
        return RunSpec.model_validate(fields)
    except MemplanError as error:
        raise SpecError(f"{where}: {line_of(error)}", field) from None
