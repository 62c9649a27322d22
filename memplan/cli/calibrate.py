"""`memplan calibrate`: measured runs become this machine's own overhead, a profile that later answers use and name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, cast

import typer
from typer.main import get_command

from memplan.cli.answering import answered, show

if TYPE_CHECKING:
    from memplan.estimate.calibration import Calibration, Measurement
    from memplan.spec.run import RunSpec


def command(_: Sequence[Any]) -> Any:
    """The command; it takes none of the options of a run."""
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command("calibrate")(calibrate)
    return get_command(app)


def calibrate(
    lines: Annotated[
        list[str],
        typer.Argument(metavar="LINES", help="Files of measured runs, as memplan probe --suite --output writes them."),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            help="Write the profile of one card to this file. Default the user's configuration, a file a card.",
            show_default=False,
        ),
    ] = None,
) -> int:
    """Turn measured runs into this machine's own overhead.

    The profile of a card says what the CUDA context takes there, and how far memory in use is from its estimate.
    """
    return answered(lambda: _calibrate(lines, output), () if output is None else ("output",))


_MOST = 2**50  # bytes: what is more is no card's


class Line(NamedTuple):
    """One measured run: where and when, and its bytes beside the estimate's."""

    gpu: str
    driver: str
    allocator: str
    stack: str
    date: str
    measurement: Measurement


def _calibrate(files: Sequence[str], output: str | None) -> int:
    from memplan.core.errors import SpecError
    from memplan.estimate.calibration import calibrated, file_of, write
    from memplan.probe.run.rows import read

    found: list[Line] = []
    left_out: dict[str, int] = {}
    for name in files:
        for run, line in read(Path(name), "lines"):
            one = _line(run, line)
            if isinstance(one, str):
                left_out[one] = left_out.get(one, 0) + 1
            else:
                found.append(one)
    by_card: dict[str, list[Line]] = {}
    for one in found:
        by_card.setdefault(one.gpu, []).append(one)
    if not by_card:
        reasons = "; ".join(f"{n} {why}" for why, n in left_out.items()) or "there are none"
        raise SpecError(f"lines: no run to calibrate by ({reasons})", "lines")
    if output is not None and len(by_card) > 1:
        raise SpecError(f"output: one file is of one card, and the runs are of {', '.join(by_card)}", "output")
    profiles: list[tuple[Calibration, int]] = []
    for lines in by_card.values():
        same = _latest_machine(lines)
        profiles.append((calibrated([line.measurement for line in same], _origin(same)), len(lines) - len(same)))
    text: list[str] = []
    for profile, older in profiles:
        path = Path(output) if output is not None else file_of(profile.gpu)
        write(profile, path)
        text += _said(profile, older, path)
    text += [f"left out: {n} {why}" for why, n in left_out.items()]
    show("\n".join(text) + "\n")
    return 0


def _line(run: RunSpec, line: Mapping[str, Any]) -> Line | str:
    """What of a line a profile is made of, or why it is of no use for one."""
    from memplan.core.errors import MemplanError
    from memplan.estimate.calibration import Measurement
    from memplan.estimate.estimate import estimate

    context: object = line.get("context")
    last = cast(Mapping[str, object], context).get("last") if isinstance(context, Mapping) else None
    if line.get("outcome") != "measured":
        return "that memplan probe --cuda did not measure to the end"
    counts = [n for n in (line.get("reserved"), line.get("process"), last) if type(n) is int and 0 <= n < _MOST]
    if len(counts) < 3:
        return "without bytes of segments, process and context"
    if run.gpu is None:
        return "on a card that memplan has no row of"
    try:
        answer = estimate(run)
    except MemplanError:
        return "that memplan does not estimate"
    driver, allocator, stack, date = (str(line.get(name, "")) for name in ("driver", "allocator", "stack", "date"))
    gpu = answer.gpu.name if answer.gpu else run.gpu
    return Line(gpu, driver, allocator, stack, date, Measurement(*counts, estimated=answer.bytes.reserved))


def _latest_machine(lines: Sequence[Line]) -> list[Line]:
    """The lines of the driver, allocator setting and libraries of the newest one: others take other overhead."""
    newest = max(lines, key=lambda line: line.date)
    return [line for line in lines if line[:4] == newest[:4]]


def _origin(lines: Sequence[Line]) -> Any:
    from memplan.core.version import __version__
    from memplan.estimate.calibration import Origin

    one = lines[0]
    return Origin(one.gpu, one.driver, one.allocator, one.stack, __version__, max(line.date for line in lines))


def _said(profile: Calibration, older: int, path: Path) -> list[str]:
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
