"""A fresh process per run: started, listened to, and ended where it does not answer.

The process that starts them never imports torch, so it holds no GPU memory itself.
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
from typing import IO, Any, NamedTuple, cast

from memplan.core.errors import MemplanError, printable
from memplan.probe.run.cuda import OUT_OF_MEMORY, Card, Reading
from memplan.probe.run.driver import Ask, in_use, nvidia_smi
from memplan.spec.run import RunSpec

TIMEOUT = 1800  # seconds for one run, where nothing else is said
_LOOK = 180  # seconds to import torch and ask the driver for the card
_LAST_WORDS = 10  # seconds between the end of a process and of what it wrote
_LONGEST = 300

# The child finds the same memplan, wherever this one lies, and takes no folder of the current one for a library (-P).
_CODE = (
    "import sys; home = sys.argv[1]; home in sys.path or sys.path.insert(0, home); "
    "from memplan.probe.run.cuda import main; main()"
)
COMMAND = (sys.executable, "-P", "-c", _CODE, str(Path(__file__).resolve().parents[3]))


class Here(NamedTuple):
    """This machine: the card, the driver's version, the libraries' versions, and torch's allocator settings."""

    card: Card
    driver: str
    versions: dict[str, str]
    allocator: str


class Measured(NamedTuple):
    """What came of one run. `outcome` is one of `OUTCOMES`, `said` what was said where it was not measured.

    `before` is what others held on the card when the process started; None where nvidia-smi did not tell. `shown` is
    what nvidia-smi showed at the end, for the whole card. `phase` and `step` are where the run ended.
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

    def beside(self, reading: Reading) -> int:
        """Bytes the driver counts for this process beside torch's segments: the context and the loaded kernels."""
        return max(0, reading.used - (self.before or 0) - reading.held)

    @property
    def allocated(self) -> int:
        """torch.cuda.max_memory_allocated over the whole run."""
        return max((r.allocated for r in self.readings), default=0)

    @property
    def reserved(self) -> int:
        """torch.cuda.max_memory_reserved over the whole run."""
        return max((r.reserved for r in self.readings), default=0)

    @property
    def process(self) -> int:
        """The most the driver counted for the process: torch's segments and what was beside them by then."""
        return max((r.reserved + self.beside(r) for r in self.readings), default=0)


OUTCOMES = ("measured", "out of memory", "killed", "no answer", "refused", "failed")
RESULTS = OUTCOMES[:2]  # those that say something about memory

Events = list[dict[str, Any]]


class Ended(NamedTuple):
    """A process that is over: its events, its exit code (None: it was ended for not answering), its last words."""

    events: Events
    code: int | None
    error: str


Start = Callable[[dict[str, Any], float], Ended]


def start(request: dict[str, Any], timeout: float, command: Sequence[str] = COMMAND) -> Ended:
    """Run the command on one request, for at most `timeout` seconds, and keep every event it wrote until its end."""
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
            reader.join(_LAST_WORDS)
        return Ended(events, code, _last_line(errors))


def _collect(lines: IO[bytes], events: Events) -> None:
    with lines:
        for line in lines:
            try:
                event: object = json.loads(line)
            except ValueError:  # the last one, cut where the process was killed
                continue
            if isinstance(event, dict):
                events.append(cast(dict[str, Any], event))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and what it started. One that waits for a driver may not end even so: it is left behind."""
    if process.poll() is None:
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_WORDS)


def _last_line(file: IO[bytes]) -> str:
    """The last line that says something, of what libraries wrote to standard error."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 2**16))
    lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    return printable(lines[-1], _LONGEST) if lines else ""


def here(start: Start = start, ask: Ask = nvidia_smi) -> Here:
    """The card and the libraries of this machine. Raises MemplanError where there is no card, or it does not answer."""
    ended = start({}, _LOOK)
    found = {str(event.pop("event", "")): event for event in ended.events}
    for event in ("refused", "failed"):
        if event in found:
            raise MemplanError(_with_field(found[event]), str(found[event].get("field", "cuda")))
    if "card" not in found or "versions" not in found:
        if ended.code is None:
            raise MemplanError(f"cuda: the driver did not answer in {_LOOK} seconds", "cuda")
        raise MemplanError(f"cuda: the process that asks for the GPU {_how_it_ended(ended)}", "cuda")
    card = _card(found["card"])
    driver = ask("driver_version", card.uuid) or "unknown"
    settings = os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""
    return Here(card, driver, {name: str(version) for name, version in found["versions"].items()}, settings)


def _with_field(event: dict[str, Any]) -> str:
    said, field = str(event.get("message", "")), str(event.get("field", ""))
    return said if field and said.startswith(field) else f"cuda: {said}"


def _card(event: dict[str, Any]) -> Card:
    major, minor = event["capability"]
    return Card(str(event["name"]), (int(major), int(minor)), int(event["total"]), str(event["uuid"]))


def _how_it_ended(ended: Ended) -> str:
    if ended.code is not None and ended.code < 0:
        with suppress(ValueError):
            name = signal.Signals(-ended.code).name
            why = ", as the system does where the host's memory runs out" if name == "SIGKILL" else ""
            return f"was killed by {name}{why}"
    return f"ended with code {ended.code}" + (f": {ended.error}" if ended.error else "")


def measure(
    run: RunSpec,
    machine: Here,
    steps: int = 2,
    timeout: float = TIMEOUT,
    start: Start = start,
    ask: Ask = nvidia_smi,
) -> Measured:
    """Take `steps` training steps of the run in a process of its own. What goes wrong is an outcome, never raised."""
    before = in_use(machine.card.uuid, ask)
    began = monotonic()
    ended = start({"run": run.model_dump(mode="json"), "steps": steps}, timeout)
    seconds = monotonic() - began
    readings = tuple(_readings(ended.events))
    phase, step = _where(ended.events)
    measured = Measured(run, "failed", readings, before, None, seconds, phase, step)
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
    if any(words in ended.error for words in OUT_OF_MEMORY):  # bitsandbytes ends the process itself
        return measured._replace(outcome="out of memory", said=ended.error)
    killed = ended.code < 0
    return measured._replace(outcome="killed" if killed else "failed", said=f"the process {_how_it_ended(ended)}")


def _where(events: Events) -> tuple[str, int | None]:
    """The phase and the step that the last event about one is in."""
    for event in reversed(events):
        if "phase" in event:
            return str(event["phase"]), event["step"]
    return "", None


def _readings(events: Events) -> Iterator[Reading]:
    for event in events:
        if event.get("event") == "reading":
            yield Reading(**{name: event[name] for name in Reading._fields})
