"""Changes between two checks: which runs no longer fit, are new, fixed, changed or gone, and why."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import MemplanError, SpecError, printable
from memplan.core.records import NamedTuple
from memplan.core.version import __version__
from memplan.core.workers import mapped, processes_for
from memplan.frameworks.reading.config import FieldOrigin
from memplan.gate.budget import Budgets, Problem, RunBudget, find_budgets
from memplan.gate.cause import Cause, RowOfSide, causes, similarity
from memplan.gate.check import tasks_of
from memplan.gate.lock import NAME as LOCK
from memplan.gate.lock import read_lock
from memplan.gate.origin import KeyValue, Place
from memplan.gate.revision import write_revision
from memplan.gate.rows import (
    SCHEMA_VERSION,
    STATUSES,
    Answers,
    Check,
    CheckedRun,
    Deciding,
    Task,
    checked,
    read_for,
)
from memplan.spec.run import RunSpec

# Of a run on a GPU, in the order they are shown; the first three fail.
KINDS = ("broken", "new, over", "wrong", "unknown", "over", "fixed", "changed", "new", "removed", "unchanged")
FAILS = ("broken", "new, over")
_ALIKE = 0.6  # of the fields of a renamed file that has changed too
_MOST_BYTES = 2**26


class RunChange(NamedTuple):
    """A run on a GPU in both checks. `kind` is one of KINDS: `broken` fitted before, `over` did not fit before either.

    renamed  the file's name in the base, if it had another
    """

    kind: str
    base: CheckedRun | None
    head: CheckedRun | None
    causes: tuple[Cause, ...] = ()
    renamed: str = ""

    @property
    def row(self) -> CheckedRun:
        row = self.head or self.base
        assert row is not None
        return row

    @property
    def bytes(self) -> int:
        """Bytes of the head's peak minus the base's; 0 unless both can be answered."""
        both = self.base is not None and self.head is not None and self.base.limit and self.head.limit
        return self.head.peak - self.base.peak if both and self.head and self.base else 0

    def as_dict(self) -> dict[str, Any]:
        rows = {name: row.as_dict() if row else None for name, row in (("base", self.base), ("head", self.head))}
        return {**self._asdict(), **rows, "bytes": self.bytes, "causes": [each.as_dict() for each in self.causes]}


class Changes(NamedTuple):
    """The changes of all runs, the worst first, what is wrong in the head's budgets, and notes."""

    changes: tuple[RunChange, ...]
    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong, and no run is over its budget that was not over it before."""
        return not self.problems and not any(each.kind in (*FAILS, "wrong") for each in self.changes)

    def exit_code(self, unknown: str = "warn", strict: bool = False) -> int:
        """Return 2 for wrong input, 1 for a run that no longer fits, else as `Check.exit_code`."""
        if self.problems or any(each.kind == "wrong" for each in self.changes):
            return 2
        if not self.fits:
            return 1
        rows = [each.head for each in self.changes if each.head is not None]
        codes = [row.error_code for row in rows if row.status == "unknown" and unknown == "fail"]
        return max(codes) if codes else 4 if strict and any(row.left_out for row in rows) else 0

    def without_unknown(self) -> Changes:
        """Return the changes without runs that cannot be answered."""
        return self._replace(changes=tuple(each for each in self.changes if each.kind != "unknown"))

    def model_dump(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "memplan_version": __version__,
            "fits": self.fits,
            "changes": [each.as_dict() for each in self.changes],
            "problems": [problem._asdict() for problem in self.problems],
            "notes": list(self.notes),
        }


class Side(NamedTuple):
    """One of the two checks: with the budget of each run, and the folder of the files, if they are here."""

    check: Check
    budgets: Mapping[tuple[str, str], RunBudget] = {}
    folder: Path | None = None

    def of(self, row: CheckedRun) -> RowOfSide:
        """Return a row with its file read again, which only changed runs need."""
        budget = self.budgets.get(row.key)
        if budget is None or self.folder is None:
            return RowOfSide(row, None, self.check.version)
        with chdir(self.folder):
            return RowOfSide(row, read_for(row.run, budget), self.check.version, budget.number)


def difference(
    base: str,
    head: str = ".",
    typed: Budgets | None = None,
    processes: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Return what changed from `base` to `head`: each a git revision, a folder, or the JSON of a check.

    typed  budgets to use instead of those in the folders; a base without budgets is checked by the head's

    Raises SpecError for a side that is none of these.
    """
    with ExitStack() as stack:
        folders = [_opened(name, stack) for name in (base, head)]
        locks = [read_lock(each / LOCK) for each in folders if isinstance(each, Path)]
        answers = Answers({name: model for lock in locks if lock is not None for name, model in lock.specs().items()})
        before, after = _sides((base, head), folders, typed, answers, processes, progress)
        with chdir(after.folder or Path()):
            found = sorted(_changes(before, after, answers), key=_order)
    names = {row.run for row in before.check.rows}
    problems = [_with_deletion(problem, names) for problem in after.check.problems]
    return Changes(tuple(found), tuple(problems), after.check.notes)


def _order(change: RunChange) -> tuple[object, ...]:
    is_near = change.head is not None and change.head.status == "near"
    return KINDS.index(change.kind), not is_near, -abs(change.bytes), change.row.run, change.row.gpu


def _with_deletion(problem: Problem, before: Iterable[str]) -> Problem:
    match = re.search(r"there is no file (.+)$", problem.text)
    if match is None or match[1] not in before:
        return problem
    return problem._replace(text=f"{problem.text}: it is deleted; take it out of runs")


def _opened(name: str, stack: ExitStack) -> Path | Check:
    """Return a folder's path, or the check in a JSON file; a revision is written to a folder that goes with `stack`."""
    path = Path(name)
    if path.is_dir():
        return path.resolve()
    if name.endswith(".json") and path.is_file():
        return read_check(path)
    folder = stack.enter_context(TemporaryDirectory(prefix="memplan-"))
    return write_revision(name, Path(folder))


def _sides(
    names: Sequence[str],
    folders: Sequence[Path | Check],
    typed: Budgets | None,
    answers: Answers,
    processes: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[Side]:
    """Return the checks of both sides: those of folders together, so that a run which both have is answered once."""
    own = [None if isinstance(folder, Check) else typed or find_budgets(folder) for folder in folders]
    work: list[tuple[int, Path, Task]] = []
    problems: list[tuple[Problem, ...]] = [(), ()]
    for side, folder in enumerate(folders):
        budgets = own[side] or own[1]  # a base without budgets has the head's
        if isinstance(folder, Check):
            continue
        if budgets is None:
            raise SpecError(f"no memplan.toml in {printable(names[side], 80)}: memplan init writes it", "revisions")
        with chdir(folder):
            tasks, wrong = tasks_of(budgets)
        problems[side] = (*budgets.problems, *wrong)
        work += [(side, folder, task) for task in tasks]
    work.sort(key=lambda each: each[2].name)  # a run of both sides in one process

    def rows(each: tuple[int, Path, Task]) -> list[CheckedRun]:
        with chdir(each[1]):
            return checked(each[2], answers)

    found = mapped(rows, work, processes or processes_for(len(work)), progress)
    pairs = [(side, task, row) for (side, _, task), of_task in zip(work, found, strict=True) for row in of_task]
    out: list[Side] = []
    for side, folder in enumerate(folders):
        if isinstance(folder, Check):
            out.append(Side(folder))
            continue
        check = Check(tuple(row for of, _, row in pairs if of == side), problems[side])
        out.append(Side(check, {row.key: task.budget for of, task, row in pairs if of == side and row.limit}, folder))
    return out


def _changes(base: Side, head: Side, answers: Answers) -> Iterator[RunChange]:
    names = _renamed(base.check.rows, head.check.rows)
    seen: set[tuple[str, str]] = set()
    for row in head.check.rows:
        name = names.get(row.run, row.run)
        # a row without a GPU is of a file that could not be read: it stands for all of its GPUs
        same = [
            old
            for old in base.check.rows
            if old.run == name and (not row.gpu or not old.gpu or old.key[1] == row.key[1])
        ]
        seen |= {old.key for old in same}
        renamed = name if name != row.run else ""
        yield _change(base, same[0] if same else None, head, row, renamed, answers)
    runs = {row.run for row in head.check.rows} | {*names.values()}
    for old in base.check.rows:
        if old.key not in seen and (old.run in runs or old.run not in {run for run, _ in seen}):
            seen |= {old.key, (old.run, "")}
            whole = {} if old.run in runs else {"gpu": "", "gpus": 1, "any_of": ()}  # a file that is gone has one row
            yield RunChange("removed", old._replace(**whole), None)


def _change(
    base: Side, old: CheckedRun | None, head: Side, row: CheckedRun, renamed: str, answers: Answers
) -> RunChange:
    if row.status in ("wrong", "unknown"):
        same = old is not None and old.status == row.status == "wrong"  # a mistake of the base's, which does not fail
        return RunChange("unknown" if same else row.status, old, row, renamed=renamed)
    if old is None or not old.limit:
        kind = "new, over" if row.status == "over" else "new" if old is None else "changed"
        return RunChange(kind, old, row, renamed=renamed)
    differs = row.peak != old.peak or row.limit != old.limit
    if row.status == "over":
        kind = "over" if old.status == "over" else "broken"
    elif old.status == "over":
        kind = "fixed"
    else:
        kind = "changed" if differs else "unchanged"
    if not differs:
        return RunChange(kind, old, row, (), renamed)

    def peak(fields: Mapping[str, Any]) -> int | None:
        try:
            answer = answers(RunSpec.model_validate({**fields, "gpu": row.gpu}))
            return answer.band.high if row.band == "high" else answer.bytes.used
        except (MemplanError, ValueError):
            return None

    return RunChange(kind, old, row, causes(base.of(old), head.of(row), peak), renamed)


def _renamed(before: Iterable[CheckedRun], after: Iterable[CheckedRun]) -> dict[str, str]:
    """Return the new name of each file that is only in the head -> the name of the most similar that is only in the
    base: with the same content, or with most fields alike."""
    old = {row.run: row for row in before}
    new = {row.run: row for row in after}
    gone = [old[name] for name in sorted(old.keys() - new.keys())]
    out: dict[str, str] = {}
    for name in sorted(new.keys() - old.keys()):
        row = new[name]
        alike = [(2.0 if each.digest == row.digest else similarity(each.fields, row.fields), each.run) for each in gone]
        share, found = max(alike, default=(0.0, ""))
        if share >= _ALIKE and (row.fields or share > 1):
            out[name] = found
            gone = [each for each in gone if each.run != found]
    return out


def read_check(path: Path) -> Check:
    """Return the check in a JSON file that `memplan check --json` wrote. Raises SpecError."""
    shown = printable(path.name, 80)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise SpecError(f"{shown}: is larger than {_MOST_BYTES // 2**20} MiB, too large for a check", "revisions")
        values: Any = json.loads(path.read_text("utf-8"))
        if values["schema_version"] != SCHEMA_VERSION:
            text = f"{shown}: has schema {printable(str(values['schema_version']), 20)}, not {SCHEMA_VERSION}"
            raise SpecError(f"{text}: run memplan check --json again", "revisions")
        rows = tuple(_row(each) for each in values["runs"])
        problems = tuple(Problem(**each) for each in values["problems"])
        return Check(rows, problems, tuple(values["notes"]), version=str(values["memplan_version"]))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(
            f"{shown}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})", "revisions"
        ) from None
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise SpecError(f"{shown}: is not the JSON of memplan check", "revisions") from None


def _row(values: dict[str, Any]) -> CheckedRun:
    deciding = values["deciding"]
    if deciding is not None:
        place = Place(deciding["file"], deciding["line"], deciding["key"])
        deciding = Deciding(place, deciding["value"], deciding["bytes"])
    fields: dict[str, Any] = {
        **values,
        "any_of": tuple(values["any_of"]),
        "left_out": tuple(values["left_out"]),
        "deciding": deciding,
        "origins": tuple(FieldOrigin(**each) for each in values["origins"]),
        "keys": tuple(KeyValue(**each) for each in values["keys"]),
    }
    row = CheckedRun(**fields)
    defaults = {name: CheckedRun._field_defaults.get(name, "") for name in CheckedRun._fields}
    wrong = [name for name, of in defaults.items() if of is not None and type(getattr(row, name)) is not type(of)]
    if wrong or row.status not in STATUSES or (deciding is not None and type(deciding.bytes) is not int):
        raise ValueError(wrong)
    if row.gpu:
        find_gpu(row.gpu)
    return row
