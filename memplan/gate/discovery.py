"""The budgets that `memplan init` writes: the run files in a folder, each with the smallest GPU that holds it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from memplan.core.errors import FactsMissingError, MemplanError, SpecError, UnsupportedModelError, printable
from memplan.core.records import NamedTuple
from memplan.estimate.estimate import estimate
from memplan.frameworks.reading.makefile import is_makefile
from memplan.frameworks.reading.run_file import is_known, is_modelfile
from memplan.gate.budget import RunBudget, budget
from memplan.gate.rows import ReadRun, read_for

# Cards that people have, one of each size.
_CARDS = (
    *("rtx-4060", "rtx-3060", "rtx-4080", "rtx-3090", "rtx-5090", "a100-sxm-40gb", "l40s"),
    *("a100-sxm-80gb", "h100-sxm", "h200-sxm", "b200"),
)
_ENDINGS = (".yaml", ".yml", ".json", ".toml", ".sh", ".sbatch", ".slurm", ".py", ".ipynb")
_SKIPPED = ("node_modules", "site-packages", "venv", "__pycache__", "build", "dist")
_MOST_FILES = 20_000
_MOST_BYTES = 2**20


class Discovery(NamedTuple):
    """The text of memplan.toml, how many runs it has, and files left out, each with why."""

    text: str
    runs: int
    left_out: tuple[str, ...]


def discover(folders: Sequence[Path], gpus: Sequence[str] = (), number: int | None = None) -> Discovery:
    """Return budgets of the run files in folders, or of files themselves. Raises SpecError if there are none.

    gpus    the GPUs that each has to hold; by default the smallest that holds it
    number  how many of them a run is on; by default as its file says
    """
    typed = budget(["*"], gpus).gpus
    found: dict[str, str] = {}
    left_out: list[str] = []
    for name in sorted({name for folder in folders for name in _candidates(folder)}):
        read = _read(name, left_out)
        if read is not None:
            found[name] = "" if typed else _smallest(read, left_out)
    if not found:
        where = ", ".join(printable(str(folder), 60) for folder in folders)
        raise SpecError(f"folders: no run file in {where}; memplan reads those of frameworks, scripts and commands")
    parts = ["# Runs that have to fit. memplan check compares each with its budget; memplan diff says what changed.\n"]
    for card in sorted({*found.values()}, key=lambda card: _CARDS.index(card) if card in _CARDS else -1):
        names = _patterns([name for name in found if found[name] == card], found)
        named = json.dumps(list(typed) or [card])
        more = "" if typed else "  # the smallest that holds them"
        more += f"\ngpus = {number}" if number else ""
        parts.append(f'[[budget]]\nruns = {_list(names)}\ngpu = {named}{more}\nfail = "100%"\nwarn = "95%"\n')
    return Discovery("\n".join(parts), len(found), tuple(left_out))


def _list(names: Sequence[str]) -> str:
    texts = [json.dumps(name, ensure_ascii=False) for name in names]
    line = f"[{', '.join(texts)}]"
    return line if len(line) < 100 else "[\n" + "".join(f"    {text},\n" for text in texts) + "]"


def _candidates(folder: Path) -> Iterator[str]:
    """Yield the files in a folder that may be runs', or the file that it is."""
    if folder.is_file():
        yield folder.as_posix()
    seen = 0
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED)
        for name in names:
            path = Path(parent, name)
            seen += 1
            if seen > _MOST_FILES:
                return
            if (
                name.lower().endswith(_ENDINGS) or is_modelfile(name) or is_makefile(name)
            ) and path.stat().st_size <= _MOST_BYTES:
                yield path.as_posix()


def _read(name: str, left_out: list[str]) -> ReadRun | None:
    """Return the run of a file; None for one that is no run's, or that cannot be read, which is noted."""
    if name.endswith(".json") and not is_known(name):
        return None
    try:
        read = read_for(name, RunBudget((), ()))
        read.on(_CARDS[-1])
    except (MemplanError, ValueError, OSError) as error:
        text = str(error)
        if f"{Path(name).name}:" in text or "may be " in text:  # about a key of a framework's file
            left_out.append(f"{name}: {printable(text.splitlines()[0], 200)}")
        return None
    return None if read.file.is_own and not read.file.origins else read


def _smallest(read: ReadRun, left_out: list[str]) -> str:
    """Return the smallest card that holds a run; the largest if none does or memplan cannot say."""
    for card in _CARDS:
        try:
            if estimate(read.on(card)).verdict.answer == "fits":
                return card
        except (FactsMissingError, UnsupportedModelError) as error:
            left_out.append(f"{read.name}: its GPU is a guess: {printable(str(error), 200)}")
            return _CARDS[-1]
        except (MemplanError, ValueError):
            continue  # this card does not run it
    return _CARDS[-1]


def _patterns(names: Sequence[str], known: Iterable[str]) -> list[str]:
    """Return names, or a pattern for all files of a folder with one ending if all of them are among the names."""
    out: dict[str, None] = {}
    every = {*known}
    for name in names:
        path = Path(name)
        alike = {each.as_posix() for each in path.parent.glob(f"*{path.suffix}")}
        is_whole = len(alike) > 1 and alike <= {*names} and alike <= every and path.suffix != ""
        out[(path.parent / f"*{path.suffix}").as_posix() if is_whole else name] = None
    return [*out]
