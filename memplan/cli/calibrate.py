"""`memplan calibrate`: turns measured runs into a profile of this machine's overhead, which later answers use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from memplan.cli.outcome import run_and_report, show
from memplan.cli.typer_commands import typer_command
from memplan.core.errors import MemplanError, SpecError
from memplan.core.records import NamedTuple

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration, Measurement
    from memplan.spec.run import RunSpec


def command(name: str) -> Any:
    return typer_command(calibrate, name)


def calibrate(
    lines: Annotated[
        list[str],
        typer.Argument(metavar="LINES", help="Files of measured runs, as memplan probe --suite --output writes them."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            help="Write the profile of one card to this file. Default one file per card in the user's configuration.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Turn measured runs into a profile of this machine's overhead.

    A card's profile holds the size of the CUDA context, and how far used memory is from its estimate.
    """
    return run_and_report(lambda: _calibrate(lines, output), () if output is None else ("output",))


_MAX_BYTES = 2**50  # more than any card has


class MeasuredLine(NamedTuple):
    """One measured run: where and when it ran, and its bytes with those of the estimate."""

    gpu: str
    driver: str
    allocator: str
    stack: str
    date: str
    measurement: Measurement


def _calibrate(files: Sequence[str], output: str | None) -> int:
    from memplan.estimate.calibration import calibrate_card, file_of, write
    from memplan.probe.run.rows import read

    by_card: dict[str, list[MeasuredLine]] = {}
    left_out: dict[str, int] = {}
    for name in files:
        for run, row in read(Path(name), "lines"):
            line = _line(run, row)
            if isinstance(line, str):
                left_out[line] = left_out.get(line, 0) + 1
            else:
                by_card.setdefault(line.gpu, []).append(line)
    if not by_card:
        reasons = "; ".join(f"{n} {why}" for why, n in left_out.items()) or "there are none"
        raise SpecError(f"lines: no run to calibrate with ({reasons})", "lines")
    if output is not None and len(by_card) > 1:
        raise SpecError(
            f"output: a file holds the profile of one card, and the runs are of {', '.join(by_card)}", "output"
        )
    profiles: list[tuple[Calibration, int]] = []
    for lines in by_card.values():
        latest = _latest_machine(lines)
        profiles.append(
            (calibrate_card([line.measurement for line in latest], _origin(latest)), len(lines) - len(latest))
        )
    text: list[str] = []
    for profile, older in profiles:
        path = Path(output) if output is not None else file_of(profile.gpu)
        write(profile, path)
        text += _summary(profile, older, path)
    text += [f"left out: {n} {why}" for why, n in left_out.items()]
    show("\n".join(text) + "\n")
    return 0


def _line(run: RunSpec, line: Mapping[str, Any]) -> MeasuredLine | str:
    """Return the measurement of a line, or the reason why it cannot be used."""
    from memplan.estimate.calibration import Measurement
    from memplan.estimate.estimate import estimate

    context: object = line.get("context")
    last = cast(Mapping[str, object], context).get("last") if isinstance(context, Mapping) else None
    if line.get("outcome") != "measured":
        return "that memplan probe --cuda did not finish measuring"
    counts = [n for n in (line.get("reserved"), line.get("process"), last) if type(n) is int and 0 <= n < _MAX_BYTES]
    if len(counts) < 3:
        return "without bytes of segments, process and context"
    if run.gpu is None:
        return "on a card that memplan does not know"
    try:
        answer = estimate(run)
    except MemplanError:
        return "that memplan cannot estimate"
    driver, allocator, stack, date = (str(line.get(name, "")) for name in ("driver", "allocator", "stack", "date"))
    gpu = answer.gpu.name if answer.gpu else run.gpu
    return MeasuredLine(gpu, driver, allocator, stack, date, Measurement(*counts, estimated=answer.bytes.reserved))


def _latest_machine(lines: Sequence[MeasuredLine]) -> list[MeasuredLine]:
    """Return the lines with the newest line's driver, allocator setting and libraries, which decide the overhead."""
    newest = max(lines, key=lambda line: line.date)
    return [line for line in lines if line[:4] == newest[:4]]


def _origin(lines: Sequence[MeasuredLine]) -> Any:
    from memplan.core.version import __version__
    from memplan.estimate.calibration import Origin

    first = lines[0]
    return Origin(first.gpu, first.driver, first.allocator, first.stack, __version__, max(line.date for line in lines))


def _summary(profile: Calibration, older: int, path: Path) -> list[str]:
    from memplan.core.units import gib

    context, reserved, used = profile.context, profile.reserved_error, profile.used_error
    lines = [
        f"{profile.gpu}: {profile.runs} runs, driver {profile.driver}, {profile.stack}",
        f"  context   {gib(context.usual)} (from {gib(context.low)} to {gib(context.high)})",
        f"  reserved  {_percent(reserved.low)} to {_percent(reserved.high)} of the estimate, "
        f"half of the runs above {_percent(reserved.usual)}",
        f"  used      {_percent(used.low)} to {_percent(used.high)} in {profile.coverage:.0%} of runs",
        f"  written to {path}",
    ]
    return [*lines, f"  left out: {older} runs with another driver, allocator setting or library"] if older else lines


def _percent(error: float) -> str:
    return f"{100 * error:+.1f} %"
