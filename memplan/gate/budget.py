"""Budgets: which runs have to fit which GPUs, read from memplan.toml or `[tool.memplan]` in pyproject.toml."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from glob import iglob
from pathlib import Path
from typing import Any, cast

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.core.errors import MemplanError, SpecError, nearest, printable
from memplan.core.records import NamedTuple
from memplan.core.units import size_of
from memplan.frameworks.reading.run_format import FORMATS

NAMES = ("memplan.toml", "pyproject.toml")
KEYS = ("runs", "gpu", "any", "gpus", "fail", "warn", "band", "framework")
BANDS = ("usual", "high")
_HEADER = re.compile(r"\s*\[\[\s*(?:tool\s*\.\s*memplan\s*\.\s*)?budget\s*\]\]")
_TABLE = re.compile(r"\s*\[")
_KEY = re.compile(r"\s*([\w-]+)\s*=")
_SHARE = re.compile(r"(\d{1,4}(?:\.\d{1,6})?)\s*%", re.ASCII)


class MemoryLimit(NamedTuple):
    """A share of a card's usable bytes, or a number of bytes; `text` is how it was written."""

    text: str
    share: Fraction | None
    bytes: int = 0

    def of(self, usable: int) -> int:
        """Return the limit on a card with `usable` bytes."""
        return self.bytes if self.share is None else int(self.share * usable)


def limit_of(text: str, field: str) -> MemoryLimit:
    """Return the limit that a text says: `90%` of a card's usable bytes, or `22 GiB`. Raises SpecError."""
    match = _SHARE.fullmatch(text.strip())
    if match is not None:
        return MemoryLimit(text, Fraction(match[1]) / 100)
    try:
        return MemoryLimit(text, None, size_of(text, field))
    except SpecError:
        raise SpecError(f"{field}: {printable(text, 40)!r} is no limit; write 90% or 22 GiB", field) from None


ALL = MemoryLimit("100%", Fraction(1))


class RunBudget(NamedTuple):
    """Limits of some runs on some GPUs.

    runs       files, or patterns of files, relative to the folder of the budgets
    gpus       names of the GPUs: each has to hold the runs, or one of them if `is_any`
    number     how many GPUs a run is on; None if its file says so
    fail       a run that takes more is over its budget
    warn       a run that takes more is near it; None for one that may run out of memory, or run, by the expected range
    band       `usual` compares what is used in most cases, `high` the upper end of the expected range
    framework  the framework of the runs, as NAME or NAME-VERSION; None to tell it by their keys
    where      file and line of the budget; empty if it was typed
    lines      line of each key
    """

    runs: tuple[str, ...]
    gpus: tuple[str, ...]
    is_any: bool = False
    number: int | None = None
    fail: MemoryLimit = ALL
    warn: MemoryLimit | None = None
    band: str = "usual"
    framework: str | None = None
    where: str = ""
    lines: Mapping[str, int] = {}

    @property
    def terms(self) -> tuple[object, ...]:
        """The limits of a run on a GPU; two budgets with different ones contradict each other."""
        return self.number, self.fail.of(10**12), self.warn and self.warn.of(10**12), self.band, self.framework

    def place(self, key: str) -> str:
        """Return where a key is, as `memplan.toml:4`."""
        name = self.where.partition(":")[0]
        return f"{name}:{self.lines[key]}" if key in self.lines else self.where


class Problem(NamedTuple):
    """Something wrong in the budgets: one line, and the file and line it is about."""

    text: str
    file: str = ""
    line: int | None = None


class Budgets(NamedTuple):
    """The budgets of a folder, the file that has them, and what is wrong in it."""

    name: str
    budgets: tuple[RunBudget, ...]
    problems: tuple[Problem, ...]


def find_budgets(root: Path) -> Budgets | None:
    """Return the budgets of a folder; None if it has none. Raises SpecError for a file that is no TOML."""
    for name in NAMES:
        path = root / name
        if path.is_file():
            found = _read(path, name)
            if found is not None:
                return found
    return None


def folder_of_budgets(start: Path) -> Path | None:
    """Return the nearest folder, from `start` up to its repository's, that has budgets."""
    for folder in (start, *start.parents):
        if any((folder / name).is_file() for name in NAMES) and find_budgets(folder) is not None:
            return folder
        if (folder / ".git").exists():
            return None
    return None


def _read(path: Path, name: str) -> Budgets | None:
    try:
        text = path.read_text("utf-8")
        values: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SpecError(f"{name}: is not TOML ({printable(str(error), 100)})") from None
    except OSError as error:
        raise SpecError(f"{name}: cannot be read ({error.strerror or error})") from None
    section: Any = values if name == NAMES[0] else values.get("tool", {}).get("memplan")
    if not isinstance(section, dict) or (name != NAMES[0] and "budget" not in section):
        return None
    tables: Any = cast(dict[str, Any], section).get("budget")
    if not isinstance(tables, list) or not tables:
        unknown = [key for key in cast(dict[str, Any], section) if key != "budget"]
        hint = f"{unknown[0]} is not a key of it; " if unknown else ""
        return Budgets(name, (), (Problem(f"{name}: {hint}write a [[budget]] with runs and gpu", name),))
    lines = list(_lines(text))
    lines += [(None, {})] * (len(cast(list[Any], tables)) - len(lines))
    budgets: list[RunBudget] = []
    problems: list[Problem] = []
    for table, (line, keys) in zip(cast(list[Any], tables), lines, strict=False):
        try:
            budgets.append(_budget(table, name, line, keys))
        except MemplanError as error:
            at = keys.get(error.field, line)
            problems.append(Problem(f"{name}:{at}: {error}" if at else f"{name}: {error}", name, at))
    return Budgets(name, tuple(budgets), tuple(problems))


def _lines(text: str) -> Iterator[tuple[int | None, dict[str, int]]]:
    """Yield the line of each `[[budget]]`, and those of its keys."""
    keys: dict[str, int] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        if _HEADER.match(line):
            keys = {}
            yield number, keys
        elif _TABLE.match(line) and not line.rstrip().endswith((",", '"')):
            keys = None
        elif keys is not None and (match := _KEY.match(line)):
            keys.setdefault(match[1], number)


def _budget(table: Any, name: str, line: int | None, lines: Mapping[str, int]) -> RunBudget:
    if not isinstance(table, dict):
        raise SpecError("budget: must be a table with runs and gpu", "budget")
    values = cast(dict[str, Any], table)
    for key in values:
        if key not in KEYS:
            raise SpecError(f"{printable(key, 40)}: unknown key; did you mean {nearest(key, KEYS, 1)[0]}?", key)
    runs = _texts(values, "runs")
    if ("gpu" in values) == ("any" in values):
        raise SpecError("gpu: name the GPUs that must each hold the runs, or with any those of which one must", "gpu")
    key = "gpu" if "gpu" in values else "any"
    number: Any = values.get("gpus")
    if number is not None and (type(number) is not int or number < 1):
        raise SpecError(f"gpus: must be a number from 1, not {printable(repr(number), 40)}", "gpus")
    return budget(
        runs,
        _texts(values, key),
        is_any=key == "any",
        number=number,
        fail=_text(values, "fail"),
        warn=_text(values, "warn"),
        band=_text(values, "band"),
        framework=_text(values, "framework"),
        where=f"{name}:{line}" if line else name,
        lines=lines,
    )


def budget(
    runs: Iterable[str],
    gpus: Iterable[str],
    *,
    is_any: bool = False,
    number: int | None = None,
    fail: str | None = None,
    warn: str | None = None,
    band: str | None = None,
    framework: str | None = None,
    where: str = "",
    lines: Mapping[str, int] | None = None,
) -> RunBudget:
    """Return a budget from its words. Raises SpecError or UnknownNameError about the wrong one."""
    key = "any" if is_any else "gpu"
    names: list[str] = []
    for text in gpus:
        try:
            names.append(find_gpu(text).name)
        except MemplanError as error:
            raise SpecError(f"{key}: {str(error).removeprefix('gpu: ')}", key) from None
    if band is not None and band not in BANDS:
        raise SpecError(f"band: {printable(band, 40)!r} is neither usual nor high", "band")
    if framework is not None:
        known = framework.lower()
        if not any(f"{known}-".startswith(f"{each}-") for each in FORMATS):
            near = " or ".join(nearest(framework, FORMATS))
            raise SpecError(f"framework: unknown name {printable(framework, 40)!r}; did you mean {near}?", "framework")
    limits = limit_of(fail, "fail") if fail is not None else ALL, limit_of(warn, "warn") if warn is not None else None
    unique = tuple(dict.fromkeys(names))
    found = RunBudget(tuple(runs), unique, is_any, number, *limits, band or "usual", framework, where, lines or {})
    if found.warn is not None and any(found.warn.of(usable) > found.fail.of(usable) for usable in _usable(unique)):
        raise SpecError(f"warn: {found.warn.text} is above {found.fail.text}, at which it fails", "warn")
    return found


def _usable(gpus: Iterable[str]) -> list[int]:
    return [find_gpu(name).usable for name in gpus]


def _texts(values: Mapping[str, Any], key: str) -> list[str]:
    found: Any = values.get(key, [])
    texts: Any = [found] if isinstance(found, (str, int)) else found
    if not isinstance(texts, Sequence) or not texts or not all(isinstance(each, (str, int)) for each in texts):  # pyright: ignore[reportUnknownVariableType]
        raise SpecError(f"{key}: must be a list of names, which is not empty", key)
    return [str(each) for each in cast(Sequence[Any], texts)]


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value: Any = values.get(key)
    if value is None or isinstance(value, str):
        return value
    raise SpecError(f"{key}: must be text in quotes, not {printable(repr(value), 40)}", key)


def is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


def files_of(pattern: str, root: Path | None) -> list[str]:
    """Return the files of a name or a pattern, sorted: relative to `root`, or anywhere if it is None.

    Raises SpecError for one outside of `root`.
    """
    if root is not None and (Path(pattern).is_absolute() or ".." in Path(pattern).parts):
        raise SpecError(f"runs: {printable(pattern, 80)} is outside of the folder of the budgets", "runs")
    folder = root or Path()
    try:
        if not is_pattern(pattern):
            return [Path(pattern).as_posix()] if (folder / pattern).exists() else []
        found = iglob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207 (Path.glob has no absolute patterns)
        return sorted(Path(name).as_posix() for name in found if (folder / name).is_file())
    except (OSError, ValueError):  # too long, or NUL in it
        return []
