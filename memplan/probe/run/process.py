"""Measure each run in a fresh process: start it, collect its events, and kill it if it does not answer.

The parent process never imports torch, so it holds no GPU memory itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from time import monotonic
from typing import IO, Any, cast

from memplan.core.errors import MemplanError, printable
from memplan.core.records import NamedTuple
from memplan.probe.run.cuda import OUT_OF_MEMORY, LocalGPU, Reading
from memplan.probe.run.driver import Ask, in_use, nvidia_smi
from memplan.spec.run import RunSpec

TIMEOUT = 1800  # default seconds for one run
_LOOK_TIMEOUT = 180  # seconds to import torch and query the card
_DRAIN_TIMEOUT = 10  # seconds to read the rest of a finished process's output
_LONGEST = 300

# The child imports this same memplan, and no module from the current folder (-P).
_CODE = (
    "import sys; home = sys.argv[1]; home in sys.path or sys.path.insert(0, home); "
    "from memplan.probe.run.cuda import main; main()"
)
COMMAND = (sys.executable, "-P", "-c", _CODE, str(Path(__file__).resolve().parents[3]))


class Machine(NamedTuple):
    """This machine: the card, the driver's version, the libraries' versions, and torch's allocator settings."""

    card: LocalGPU
    driver: str
    versions: dict[str, str]
    allocator: str


class MeasuredRun(NamedTuple):
    """The result of measuring one run.

    outcome     one of `OUTCOMES`
    before      bytes other programs held on the card when the process started; None if nvidia-smi did not tell
    shown       bytes in use on the card at the end, as nvidia-smi shows them
    phase, step where the run ended
    said        the error message, if the run was not measured
    """

    run: RunSpec
    outcome: str
    readings: tuple[Reading, ...]
    before: int | None
    shown: int | None
    seconds: float
    phase: str = ""
    step: int | None = None
    said: str = ""

    def context_bytes(self, reading: Reading) -> int:
        """Return the process's bytes outside torch's segments, as the driver counts them: the context and kernels."""
        return max(0, reading.used - (self.before or 0) - reading.held)

    @property
    def allocated(self) -> int:
        """torch.cuda.max_memory_allocated over the run."""
        return max((r.allocated for r in self.readings), default=0)

    @property
    def reserved(self) -> int:
        """torch.cuda.max_memory_reserved over the run."""
        return max((r.reserved for r in self.readings), default=0)

    @property
    def process(self) -> int:
        """The most bytes the driver counted for the process: torch's segments, the context and loaded kernels."""
        return max((r.reserved + self.context_bytes(r) for r in self.readings), default=0)


OUTCOMES = ("measured", "out of memory", "killed", "no answer", "refused", "failed")
RESULTS = OUTCOMES[:2]  # the outcomes that tell something about memory

Events = list[dict[str, Any]]


class ProcessResult(NamedTuple):
    """A finished process: its events, exit code (None: killed after the timeout) and last line on stderr."""

    events: Events
    code: int | None
    error: str


Start = Callable[[dict[str, Any], float], ProcessResult]


def start(request: dict[str, Any], timeout: float, command: Sequence[str] = COMMAND) -> ProcessResult:
    """Run the command on one request for at most `timeout` seconds, and return every event it wrote."""
    events: Events = []
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as errors:
        asked.write(json.dumps(request).encode())
        asked.seek(0)
        process = subprocess.Popen(command, stdin=asked, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        assert process.stdout is not None
        reader = Thread(target=_collect, args=(process.stdout, events), daemon=True)
        reader.start()
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
            reader.join(_DRAIN_TIMEOUT)
        return ProcessResult(events, code, _last_line(errors))


def _collect(lines: IO[bytes], events: Events) -> None:
    with lines:
        for line in lines:
            try:
                event: object = json.loads(line)
            except ValueError:  # the last line, incomplete because the process was killed
                continue
            if isinstance(event, dict):
                events.append(cast(dict[str, Any], event))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group. A process that is stuck in the driver may survive; it is left behind."""
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_DRAIN_TIMEOUT)


def _last_line(file: IO[bytes]) -> str:
    """Return the last non-empty line of standard error."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16))
    lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return printable(lines[-1], _LONGEST) if lines else ""


def local_machine(start: Start = start, ask: Ask = nvidia_smi) -> Machine:
    """Return this machine's card and libraries. Raises MemplanError if there is no card or it does not answer."""
    ended = start({}, _LOOK_TIMEOUT)
    events = {str(event.pop("event", "")): event for event in ended.events}
    for event in ("refused", "failed"):
        if event in events:
            raise MemplanError(_error_message(events[event]), str(events[event].get("field", "cuda")))
    if "card" not in events or "versions" not in events:
        if ended.code is None:
            raise MemplanError(f"cuda: the driver did not answer in {_LOOK_TIMEOUT} seconds", "cuda")
        raise MemplanError(f"cuda: the process that asks for the GPU {_how_it_ended(ended)}", "cuda")
    card = _card(events["card"])
    driver = ask("driver_version", card.uuid) or "unknown"
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return Machine(card, driver, {name: str(version) for name, version in events["versions"].items()}, settings)


def _error_message(event: dict[str, Any]) -> str:
    message, field = str(event.get("message", "")), str(event.get("field", ""))
    return message if field and message.startswith(field) else f"cuda: {message}"


def _card(event: dict[str, Any]) -> LocalGPU:
    major, minor = event["capability"]
    return LocalGPU(str(event["name"]), (int(major), int(minor)), int(event["total"]), str(event["uuid"]))


def _how_it_ended(ended: ProcessResult) -> str:
    if ended.code is not None and ended.code < 0:
        with suppress(ValueError):
            name = signal.Signals(-ended.code).name
            cause = ", as the system does when the host's memory runs out" if name == "SIGKILL" else ""
            return f"was killed by {name}{cause}"
    return f"ended with code {ended.code}" + (f": {ended.error}" if ended.error else "")


def measure(
    run: RunSpec,
    machine: Machine,
    steps: int = 2,
    timeout: float = TIMEOUT,
    start: Start = start,
    ask: Ask = nvidia_smi,
    snapshot: str = "",
) -> MeasuredRun:
    """Measure `steps` training steps of the run in a new process. Failures are outcomes; nothing is raised.

    `snapshot` is a file that the process writes its allocations to.
    """
    before = in_use(machine.card.uuid, ask)
    started = monotonic()
    request = {"run": run.model_dump(mode="json"), "steps": steps, **({"snapshot": snapshot} if snapshot else {})}
    ended = start(request, timeout)
    seconds = monotonic() - started
    readings = tuple(_readings(ended.events))
    phase, step = _last_place(ended.events)
    measured = MeasuredRun(run, "failed", readings, before, None, seconds, phase, step)
    last = ended.events[-1] if ended.events else {}
    match last.get("event"):
        case "done":
            shown = last.get("shown")
            return measured._replace(outcome="measured", shown=shown if isinstance(shown, int) else None)
        case "out of memory" | "refused" | "failed" as outcome:
            return measured._replace(outcome=outcome, said=str(last.get("message", "")))
        case _:
            pass
    if ended.code is None:
        return measured._replace(outcome="no answer", said=f"no answer in {timeout:g} seconds")
    if any(words in ended.error for words in OUT_OF_MEMORY):  # bitsandbytes exits the process itself
        return measured._replace(outcome="out of memory", said=ended.error)
    killed = ended.code < 0
    return measured._replace(outcome="killed" if killed else "failed", said=f"the process {_how_it_ended(ended)}")


def _last_place(events: Events) -> tuple[str, int | None]:
    """Return the phase and step of the last event that has them."""
    for event in reversed(events):
        if "phase" in event:
            return str(event["phase"]), event["step"]
    return "", None


def _readings(events: Events) -> Iterator[Reading]:
    for event in events:
        if event.get("event") == "reading":
            yield Reading(**{name: event[name] for name in Reading._fields})
