"""Check all runs of all budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from memplan.core.errors import SpecError, printable
from memplan.core.workers import mapped, processes_for
from memplan.gate.budget import Budgets, Problem, RunBudget, budget, files_of, find_budgets, is_pattern
from memplan.gate.lock import read_lock, with_lock
from memplan.gate.rows import COMMAND, Answers, Check, Task, checked


def check(
    files: Iterable[str] = (),
    *,
    gpu: str | Sequence[str] = (),
    gpus: int | None = None,
    fail: str | None = None,
    warn: str | None = None,
    band: str | None = None,
    framework: str | None = None,
    locked: bool = False,
    processes: int | None = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Check:
    """Return how runs compare with their budgets, in the working directory.

    files      the runs' files; all that memplan.toml or pyproject.toml name by default. A command begins with `-- `
    gpu, ...   a budget for these files, instead of those of memplan.toml; as the keys there
    locked     whether facts that are not those of memplan.lock are told as moved, rather than noted
    processes  how many processes check them; None for one per core. A program with threads needs one
    progress   is called with how many files are checked, and of how many

    Raises SpecError if there are no budgets, or the file that has them is no TOML; everything else that is wrong is in
    the rows and problems that it returns.
    """
    names = [name if name.startswith(COMMAND) else Path(name).as_posix() for name in files]
    named = [gpu] if isinstance(gpu, str) else [*gpu]
    if named:
        if not names:
            raise SpecError("files: name the runs' files to check on the GPUs that are given", "files")
        typed = budget(names, named, number=gpus, fail=fail, warn=warn, band=band, framework=framework)
        budgets = Budgets("", (typed,), ())
    else:
        found = find_budgets(Path())
        if found is None:
            text = "no memplan.toml here: memplan init writes it; or name files and a GPU, as in run.yaml --gpu 3090"
            raise SpecError(text, "files")
        budgets = found
    wanted: set[str] = set() if named or budgets.name in names else {*names}
    tasks, problems = tasks_of(budgets, wanted, None if named else Path())
    missed = sorted(wanted - {task.name for task in tasks})
    for name in [name for name in missed if name.startswith(COMMAND) or not Path(name).exists()]:
        missed.remove(name)
        text = "a command is in no budget; name its GPU with --gpu" if name.startswith(COMMAND) else "there is no file"
        problems.append(Problem(f"{text}: {printable(name, 80)}"))
    notes = [f"{printable(', '.join(missed), 200)}: in no budget of {budgets.name}"] if missed else []
    lock = read_lock()
    if lock is None and locked:
        raise SpecError("locked: there is no memplan.lock; memplan lock writes it", "locked")
    known, number = Answers(lock.specs() if lock else {}), processes or processes_for(len(tasks))
    found = mapped(lambda task: checked(task, known), tasks, number, progress)
    rows = [row for of_task in found for row in of_task]
    rows.sort(key=lambda row: row.worst)
    check = Check(tuple(rows), (*budgets.problems, *problems), tuple(notes))
    return check if lock is None else with_lock(check, lock, locked)


def tasks_of(
    budgets: Budgets, wanted: Iterable[str] = (), root: Path | None = Path()
) -> tuple[list[Task], list[Problem]]:
    """Return what is to check, of the `wanted` files if there are some, and what is wrong with the budgets' files.

    root  the folder that the files are in; None if they may be anywhere
    """
    tasks: list[Task] = []
    problems: list[Problem] = []
    only = set(wanted)
    seen: dict[tuple[str, str], RunBudget] = {}
    for each in budgets.budgets:
        named: dict[str, bool] = {}
        for pattern in each.runs:
            place = each.place("runs")
            at = int(place.rpartition(":")[2]) if ":" in place else None
            start = f"{place}: runs: " if place else ""
            try:
                files = [pattern] if pattern.startswith(COMMAND) else files_of(pattern, root)
            except SpecError as error:
                problems.append(Problem(f"{place}: {error}" if place else str(error), budgets.name, at))
                continue
            if not files:
                text = f"{start}there is no file {printable(pattern, 80)}"
                problems.append(Problem(text, budgets.name if place else pattern, at))
            named |= {name: named.get(name, False) or not is_pattern(pattern) for name in files}
        for name, is_named in named.items():
            gpus = [" ".join(each.gpus)] if each.is_any else each.gpus
            kept: list[str] = []
            for gpu in gpus:
                other = seen.setdefault((name, gpu), each)
                if other is each:
                    kept += gpu.split()
                elif other.terms != each.terms:
                    text = f"{each.where}: runs: {name} on {gpu} has other limits than in {other.where}"
                    problems.append(Problem(text, budgets.name, each.lines.get("runs")))
            if kept and (not only or name in only):
                tasks.append(Task(name, each._replace(gpus=tuple(kept)), is_named))
    return tasks, problems
