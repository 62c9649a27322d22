"""A run on a GPU, compared with its budget: what it takes, whether that is within the limit, and what decides."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import (
    FactsMissingError,
    InternalError,
    MemplanError,
    ProbeError,
    SpecError,
    UnsupportedModelError,
    printable,
)
from memplan.core.files import exists, open_file
from memplan.core.records import NamedTuple
from memplan.core.version import __version__
from memplan.estimate.answer import Estimate
from memplan.estimate.estimate import estimate
from memplan.frameworks.reading.config import FieldOrigin
from memplan.frameworks.reading.run_file import RunFile, read_command, read_run
from memplan.gate.budget import (
    Problem,
    RunBudget,
)
from memplan.gate.origin import KeyValue, Place, keys_of, line_in, places
from memplan.models.model import ModelSpec
from memplan.resolve.request import errors_of, spec_of
from memplan.spec.failures import line_of
from memplan.spec.run import RunSpec

SCHEMA_VERSION = 1
COMMAND = "-- "  # begins a command where the name of a run's file would be
STATUSES = ("over", "wrong", "unknown", "near", "fits")  # worst first
# Fields that say what kind of run it is, rather than how large.
_KIND = ("model", "profile", "precision.", "parallelism.", "method.kind", "method.quantization", "method.alpha")
_SIZES = ("batch.micro", "batch.sequence", "batch.new_tokens", "serving.")  # which change no operation
_IS_COMPANION = "without a model; add it to a run with"


class Deciding(NamedTuple):
    """The value of a run's file that takes most, compared with the field's plain default."""

    place: Place
    value: Any
    bytes: int


class CheckedRun(NamedTuple):
    """A run on a GPU, compared with its budget. Bytes are of one GPU; 0 if the run cannot be answered.

    run        its file, relative to the folder of the budgets, or `-- ` and a command
    gpu        the GPU; of several of which one has to hold the run, the one that holds it best
    gpus       how many of them the run is on
    any_of     the GPUs of which one has to hold the run; empty if it has to fit each
    status     one of STATUSES: `near` is over the warning, `unknown` cannot be answered, `wrong` is an error in a file
    peak       what is compared with the limits: used bytes, or the upper end of the expected range
    low, high  the expected range
    limit      bytes over which it fails, and `limit_text` as the budget has it
    warn       bytes over which it warns; 0 without such a limit
    verdict    memplan's own answer, with the `reason` if it does not start
    title      the framework and version that its file was read as
    left_out   keys and settings that the answer does not count
    deciding   the value that takes most; None for runs that fit
    error      one line, of a run that is unknown or wrong, and the exit code of the error
    line       the line of the run's file that the error is about
    fields     the run's fields as asked for, without the GPU
    origins    where each is from, and the keys that they name
    digest     sha256 of the file
    """

    run: str
    gpu: str = ""
    gpus: int = 1
    any_of: tuple[str, ...] = ()
    status: str = "fits"
    peak: int = 0
    low: int = 0
    high: int = 0
    usable: int = 0
    limit: int = 0
    limit_text: str = ""
    warn: int = 0
    band: str = "usual"
    verdict: str | None = None
    reason: str = ""
    title: str = ""
    left_out: tuple[str, ...] = ()
    deciding: Deciding | None = None
    error: str = ""
    error_code: int = 0
    line: int | None = None
    fields: Mapping[str, Any] = {}
    origins: tuple[FieldOrigin, ...] = ()
    keys: tuple[KeyValue, ...] = ()
    digest: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """The run and its GPUs, by which it is found in another check."""
        return self.run, " ".join(self.any_of) or self.gpu

    @property
    def worst(self) -> tuple[object, ...]:
        """The key that sorts runs, the worst first."""
        share = self.peak / self.limit if self.limit else 0.0
        return STATUSES.index(self.status), -share, self.run, self.gpu

    def as_dict(self) -> dict[str, Any]:
        deciding = None
        if self.deciding is not None:
            deciding = {**self.deciding.place._asdict(), "value": self.deciding.value, "bytes": self.deciding.bytes}
        lists = {"any_of": list(self.any_of), "left_out": list(self.left_out), "fields": dict(self.fields)}
        origins = [origin._asdict() for origin in self.origins]
        keys = [each._asdict() for each in self.keys]
        return {**self._asdict(), **lists, "deciding": deciding, "origins": origins, "keys": keys}


class Check(NamedTuple):
    """All runs of all budgets, worst first; what is wrong in the budgets; and notes.

    moved  facts that are not those of memplan.lock, if they have to be
    """

    rows: tuple[CheckedRun, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    moved: tuple[str, ...] = ()
    version: str = __version__

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong, and every run that can be answered is within its budget."""
        return not self.problems and not any(row.status in ("over", "wrong") for row in self.rows)

    def exit_code(self, unknown: str = "warn", strict: bool = False) -> int:
        """Return 2 for wrong input, 1 for a run over its budget, 3 for facts that moved, 3 or 2 for a run that cannot
        be answered, 4 for one whose file is only partly read, else 0.

        unknown  `fail` counts runs that cannot be answered
        strict   counts runs whose file is only partly read
        """
        if self.problems or any(row.status == "wrong" for row in self.rows):
            return 2
        if not self.fits:
            return 1
        codes = [row.error_code for row in self.rows if row.status == "unknown" and unknown == "fail"]
        codes += [FactsMissingError.exit_code] if self.moved else []
        partly = strict and any(row.left_out for row in self.rows)
        return max(codes) if codes else 4 if partly else 0

    def without_unknown(self) -> Check:
        """Return the check without runs that cannot be answered."""
        return self._replace(rows=tuple(row for row in self.rows if row.status != "unknown"))

    def model_dump(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "memplan_version": self.version,
            "fits": self.fits,
            "runs": [row.as_dict() for row in self.rows],
            "problems": [problem._asdict() for problem in self.problems],
            "notes": list(self.notes),
            "moved": list(self.moved),
        }


class Answers:
    """Answers of runs, each made once. `models` are those of a lock, by name, which replace what is found here."""

    def __init__(self, models: Mapping[str, ModelSpec] | None = None) -> None:
        self._models = models or {}
        self._known: dict[RunSpec, Estimate] = {}

    def __call__(self, run: RunSpec) -> Estimate:
        answer = self._known.get(run)
        if answer is None:
            answer = estimate(run, None, self._models.get(run.model) if isinstance(run.model, str) else None)
            if not (isinstance(run.model, str) and exists(Path(run.model))):  # a folder may change with the revision
                self._known[run] = answer
        return answer


class ReadRun(NamedTuple):
    """A run as read of its file for a budget, and its fields."""

    name: str
    file: RunFile
    fields: Mapping[str, Any]

    def on(self, gpu: str) -> RunSpec:
        """Return the run on a GPU. Raises MemplanError."""
        return RunSpec.model_validate({**self.fields, "gpu": gpu})


def read_for(name: str, each: RunBudget) -> ReadRun:
    """Return the run of a file, or of a command, as its budget asks for it. Raises MemplanError."""
    world = {} if each.number is None else {"parallelism.world": each.number}
    if name.startswith(COMMAND):
        file = read_command(name.removeprefix(COMMAND), each.framework, None, world)
    else:
        file = read_run(name, each.framework, None, world)
    return ReadRun(name, file, fields_of(file, each.number))


def fields_of(file: RunFile, number: int | None) -> dict[str, Any]:
    """Return the fields of a run's file on a number of GPUs. Raises MemplanError."""
    with errors_of(file):
        fields = spec_of({} if number is None else {"gpus": number}, file.fields, keeps_strategy=not file.is_own)
    if "model" not in fields:
        raise SpecError(f"model: {file.name} names none", "model")
    return fields


class Task(NamedTuple):
    """A file and the budget that it is checked against; `is_named` by its own name rather than a pattern."""

    name: str
    budget: RunBudget
    is_named: bool


def checked(task: Task, answers: Callable[[RunSpec], Estimate]) -> list[CheckedRun]:
    """Return the rows of a file: one per GPU, or one if it cannot be read."""
    try:
        read = read_for(task.name, task.budget)
    except Exception as error:  # one run that memplan fails at does not hide the others
        row = _unanswered(task, CheckedRun(task.name, digest=digest_of(task.name)), error)
        return [] if _IS_COMPANION in row.error and not task.is_named else [row]
    return list(rows_of(task, read, answers))


def rows_of(task: Task, read: ReadRun, answers: Callable[[RunSpec], Estimate]) -> Iterator[CheckedRun]:
    """Yield a run's rows: one per GPU, or that of the GPU that holds it best if one is enough."""
    fields = {name: value for name, value in read.fields.items() if name != "gpu"}
    same = CheckedRun(read.name, title=read.file.title, fields=fields, digest=digest_of(task.name))
    rows: list[CheckedRun] = []
    answered: dict[str, Estimate] = {}
    for gpu in task.budget.gpus:
        start = same._replace(gpu=gpu, gpus=task.budget.number or 1)
        try:
            with errors_of(read.file):
                run = read.on(gpu)
                answer = answers(run)
            origins = read.file.origins_of(run)
            answered[gpu] = answer.read_from(origins, read.file.notes)
            row = _compared(start, task.budget, answered[gpu])
        except Exception as error:  # one run that memplan fails at does not hide the others
            rows.append(_unanswered(task, start, error))
            continue
        rows.append(row._replace(origins=origins, keys=keys_of(read.file, origins, read.name)))
    if len({(row.error, row.status) for row in rows}) == 1 and rows[0].error:  # of the run rather than of a GPU
        rows = [rows[0]._replace(gpu="", gpus=1)]
    elif task.budget.is_any:
        best = min(rows, key=lambda row: (-STATUSES.index(row.status), row.worst[1]))
        rows = [best._replace(any_of=task.budget.gpus)]
    decided: list[Deciding | None] = []
    for row in rows:
        if row.status in ("over", "near"):
            decided = decided or [deciding(answered[row.gpu], read, answers)]
        yield row._replace(deciding=decided[0]) if row.status in ("over", "near") else row


def _compared(start: CheckedRun, budget: RunBudget, answer: Estimate) -> CheckedRun:
    """Return the row of an answer."""
    assert answer.gpu is not None
    usable = answer.gpu.usable
    band = answer.band
    peak = band.high if budget.band == "high" else answer.bytes.used
    limit = budget.fail.of(usable)
    warn = budget.warn.of(usable) if budget.warn is not None else 0
    verdict = answer.verdict.answer
    if verdict in ("does not fit", "does not start") or peak > limit:
        status = "over"
    elif peak > warn if budget.warn is not None else verdict == "tight":
        status = "near"
    else:
        status = "fits"
    return start._replace(
        gpus=answer.gpu.count,
        status=status,
        peak=peak,
        low=band.low,
        high=band.high,
        usable=usable,
        limit=limit,
        limit_text=budget.fail.text,
        warn=warn,
        band=budget.band,
        verdict=verdict,
        reason=answer.verdict.reason or "",
        left_out=answer.unsupported,
    )


def deciding(answer: Estimate, read: ReadRun, answers: Callable[[RunSpec], Estimate]) -> Deciding | None:
    """Return the value of a run's file that takes most, compared with the field's plain default; None if none does.

    Sizes are tried first: they decide nearly always, and share the operations of the run.
    """
    said = [(origin, places(origin.why, read.name)) for origin in answer.origins]
    said = [(origin, at[0]) for origin, at in said if at and not origin.field.startswith(_KIND)]
    for is_size in (True, False):
        found: list[Deciding] = []
        for origin, place in said:
            if origin.field.startswith(_SIZES) != is_size:
                continue
            try:
                without = answers(
                    RunSpec.model_validate({**_without(read.fields, origin.field), "gpu": answer.asked.gpu})
                )
            except Exception:  # a run that needs the value, or that memplan fails at
                continue
            found.append(Deciding(place, origin.value, answer.bytes.used - without.bytes.used))
        best = max(found, key=lambda each: each.bytes, default=None)
        if best is not None and best.bytes > 0:
            return best
    return None


def _without(fields: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return a run's fields without one."""
    name, _, rest = path.partition(".")
    if not rest:
        return {key: value for key, value in fields.items() if key != name}
    inner = fields.get(name)
    return {**fields, name: _without(cast(Mapping[str, Any], inner), rest) if isinstance(inner, Mapping) else inner}


def _unanswered(task: Task, start: CheckedRun, error: Exception) -> CheckedRun:
    """Return the row of a run that cannot be answered: unknown if memplan cannot, wrong if its file is."""
    if not isinstance(error, (MemplanError, OSError)):
        error = InternalError(f"{type(error).__name__} {printable(str(error), 80)}")
    text = line_of(error) if isinstance(error, MemplanError) else f"cannot be read ({error.strerror or error})"
    text = text.replace(" with --online", " with memplan lock --online")  # no option of a check, which stays offline
    is_unknown = isinstance(error, (FactsMissingError, UnsupportedModelError, ProbeError, InternalError))
    is_unknown |= "supported yet" in text or "not read yet" in text
    is_unknown |= isinstance(error, SpecError) and "is not a file of" in text and not task.is_named
    code = error.exit_code if isinstance(error, MemplanError) else 2
    status = "unknown" if is_unknown else "wrong"
    return start._replace(status=status, error=text, error_code=code, line=line_in(text, task.name))


def digest_of(name: str) -> str:
    """Return the sha256 of a run's file, or of its command."""
    if name.startswith(COMMAND):
        return hashlib.sha256(name.encode()).hexdigest()
    try:
        with open_file(Path(name)) as file:
            return hashlib.sha256(file.read()).hexdigest()
    except (OSError, ValueError):
        return ""
