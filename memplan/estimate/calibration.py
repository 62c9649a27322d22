"""A machine's own overhead on one card: what measured runs took beyond their estimates.

The profile is a file that the command reads and writes. The library takes one as an argument and never looks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from memplan.core.errors import MemplanError, printable, refused
from memplan.core.records import NamedTuple
from memplan.core.user_folders import calibrations

COVERAGE = 0.95  # share of further runs that the band should hold
MIN_RUNS = 19  # runs: their full range holds 90 % of further runs
_MOST_BYTES = 2**16
_LONGEST = 200

Bytes = Annotated[int, Field(ge=0, le=2**50, strict=True)]
Error = Annotated[float, Field(gt=-1, le=100)]  # relative: measured / estimated - 1


class _Record(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Base class of what is in the file."""


class MeasuredRange(_Record, frozen=True):
    """The least, the median and the most bytes of the measured runs."""

    low: Bytes
    usual: Bytes
    high: Bytes

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self.low, self.usual, self.high)
        return self


class Errors(_Record, frozen=True):
    """Relative errors of an estimate, as measured / estimated - 1: the band's low end, the median, its high end."""

    low: Error
    usual: Error
    high: Error

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        _check_order(self.low, self.usual, self.high)
        return self


def _check_order(low: float, usual: float, high: float) -> None:
    if not low <= usual <= high:
        raise ValueError(f"must ascend from low to high, not {low}, {usual}, {high}")


class CalibratedRange(NamedTuple):
    """The bytes a process takes on the card: the band's low end, the median, its high end."""

    low: int
    usual: int
    high: int


class Calibration(_Record, frozen=True):
    """The overhead of one card on one machine, from `runs` measured runs.

    context         bytes the driver counts outside torch's segments at the end of a run
    reserved_error  errors of the estimate of torch's segments (`bytes.reserved`)
    used_error      errors of that estimate plus the usual context, against what the process took
    coverage        share of further runs like these that the band between the ends of `used_error` holds
    """

    gpu: Annotated[str, Field(min_length=1, max_length=_LONGEST)]
    driver: Annotated[str, Field(max_length=_LONGEST)]
    allocator: Annotated[str, Field(max_length=_LONGEST)] = ""
    stack: Annotated[str, Field(max_length=1000)]
    memplan: Annotated[str, Field(max_length=_LONGEST)]
    date: Annotated[str, Field(max_length=_LONGEST)]
    runs: Annotated[int, Field(ge=MIN_RUNS, strict=True)]
    coverage: Annotated[float, Field(gt=0, lt=1)]
    context: MeasuredRange
    reserved_error: Errors
    used_error: Errors

    def around(self, reserved: int) -> CalibratedRange:
        """Return what a process takes if its segments are estimated at `reserved` bytes."""
        base, error = reserved + self.context.usual, self.used_error
        low, usual, high = (base + round(base * e) for e in (error.low, error.usual, error.high))
        return CalibratedRange(low, usual, high)

    def named(self) -> str:
        """Return the note that names the profile in an answer."""
        allocator = f", allocator {self.allocator}" if self.allocator else ""
        return (
            f"used and its band follow this machine's own profile: {self.runs} runs measured on {self.gpu} until "
            f"{self.date[:10]}, driver {self.driver}{allocator}, {self.stack}"
        )


class Measurement(NamedTuple):
    """One measured run and its estimate, in bytes.

    reserved   torch.cuda.max_memory_reserved
    process    the most the driver counted
    context    the part of it outside torch's segments at the end
    estimated  the estimate's `bytes.reserved`
    """

    reserved: int
    process: int
    context: int
    estimated: int


class Origin(NamedTuple):
    """Where and when the runs were measured."""

    gpu: str
    driver: str
    allocator: str
    stack: str
    memplan: str
    date: str


def calibrate_card(measurements: Sequence[Measurement], origin: Origin) -> Calibration:
    """Return the profile of measured runs on one card. Raises SpecError for fewer than `FEWEST` runs."""
    n = len(measurements)
    if n < MIN_RUNS:
        raise refused("lines", f"a band needs at least {MIN_RUNS} measured runs, and there are {n} on {origin.gpu}")
    contexts = sorted(m.context for m in measurements)
    context = MeasuredRange(low=contexts[0], usual=_median(contexts), high=contexts[-1])
    return Calibration(
        **origin._asdict(),
        runs=n,
        coverage=1 - 2 * _cut(n) / (n + 1),
        context=context,
        reserved_error=_errors([m.reserved / m.estimated - 1 for m in measurements]),
        used_error=_errors([m.process / (m.estimated + context.usual) - 1 for m in measurements]),
    )


def _median(ascending: Sequence[int]) -> int:
    n = len(ascending)
    return (ascending[(n - 1) // 2] + ascending[n // 2]) // 2


def _cut(n: int) -> int:
    """Return k, so that the band's ends are the k-th smallest and k-th largest of n errors.

    If a further run is exchangeable with these, each of its n + 1 possible ranks is equally likely, so the band holds
    it with probability 1 - 2 k / (n + 1): split conformal prediction (Vovk et al., Algorithmic Learning in a Random
    World, 2005), which assumes nothing about the distribution of the errors.
    """
    return max(1, floor((n + 1) * (1 - COVERAGE) / 2))


def _errors(errors: Sequence[float]) -> Errors:
    ascending, k = sorted(errors), _cut(len(errors))
    n = len(ascending)
    usual = (ascending[(n - 1) // 2] + ascending[n // 2]) / 2
    low, usual, high = (round(e, 6) for e in (ascending[k - 1], usual, ascending[n - k]))
    return Errors(low=low, usual=usual, high=high)


# --- the file ----------------------------------------------------------------------------------------------


def file_of(gpu: str) -> Path:
    """Return the path of a card's profile, by the card's name in memplan's table."""
    return calibrations() / f"{gpu}.json"


def write(calibration: Calibration, path: Path) -> None:
    """Write a profile atomically. Raises MemplanError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(calibration.model_dump_json(indent=2) + "\n", "utf-8")
        temporary.replace(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise MemplanError(f"output: {str(path)!r:.200} cannot be written ({reason})", "output") from None


def read(path: Path) -> Calibration:
    """Return the profile in a file.

    Raises SpecError, which names the file and the field, if it cannot be read or is not a profile.
    """
    try:
        return _parsed(_bytes_of(path), path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise refused("calibration", f"{_shown(path)!r} cannot be read ({reason})") from None


def local(gpu: str) -> Calibration | None:
    """Return this machine's profile of a card, or None if there is none or its folder is inaccessible.

    Raises OSError if its file cannot be read, SpecError if it is not a profile.
    """
    path = file_of(gpu)
    try:
        is_there = path.is_file()
    except OSError:
        is_there = False
    return _parsed(_bytes_of(path), path) if is_there else None


def _bytes_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_MOST_BYTES + 1)


def _parsed(raw: bytes, path: Path) -> Calibration:
    if len(raw) > _MOST_BYTES:
        raise refused("calibration", f"{_shown(path)} is larger than {_MOST_BYTES // 2**10} KiB")
    try:
        return Calibration.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        message = str(first["msg"]).removeprefix("Value error, ")
        raise refused(
            "calibration",
            f"{_shown(path)}: {printable(where, 60)}: {message[:1].lower()}{message[1:]}; memplan "
            "calibrate writes a new one",
        ) from None


def _shown(path: Path) -> str:
    return printable(str(path), _LONGEST)
