"""Trace a step: record what the real libraries allocate and free, on fake CUDA tensors in a separate process.

    traced = trace(RunSpec(model="llama-3.1-8b", method="lora"))
    traced.peak, traced.peak_phase, traced.categories

Nothing is imported into the caller's process: a child process runs the script, whose torch sees a CUDA device that does
not exist (`memplan.probe.fake.fake_device`).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from threading import TIMEOUT_MAX, Timer
from typing import IO, Any, Literal

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core import errors
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, ProbeError
from memplan.core.frozen import FrozenDict
from memplan.core.records import NamedTuple
from memplan.engine.allocator import Block
from memplan.engine.native import new_allocator
from memplan.estimate.answer import KINDS
from memplan.probe.libraries import QUIET, require
from memplan.probe.limits import Limits
from memplan.probe.refusals import checked_run
from memplan.spec.run import RunSpec

Device = Literal["cuda", "cpu"]


class TracedStorage(NamedTuple):
    """One storage on the device, from the event that created it to the event that freed it.

    bytes           size rounded up to 512, as the caching allocator does
    asked           size as requested
    shape, dtype    of the first tensor in the storage
    op              the operation that created it
    module          the module whose forward ran, or whose gradient was computed
    kind            one of `memplan.estimate.answer.KINDS`
    born, died      its events; `died` is the number of events if it is never freed
    name            of a parameter, buffer, gradient or optimizer state, as in its module
    """

    bytes: int
    asked: int
    shape: tuple[int, ...]
    dtype: str
    op: str
    module: str
    kind: str
    born: int
    died: int
    name: str = ""


class TracedPhase(NamedTuple):
    """One phase of one step (0: outside the steps).

    start, end  its events
    peak        largest allocated bytes
    peak_at     the event of the peak
    left        bytes allocated at its end

    The phase `loss` is the part of a forward pass after the head, if the two can be told apart.
    """

    phase: str
    step: int
    start: int
    end: int
    peak: int
    peak_at: int
    left: int


@dataclass(frozen=True)
class TracedRun:
    """A traced run. An event is n when storage n is created and ~n when it is freed.

    parameters, trainable   number of parameters of the model without adapters, and number that are trained
    active                  parameters used per token; None if the config does not tell
    built                   the transformers class that was built
    seconds                 duration of the trace, without imports
    notes                   the trace's assumptions
    """

    run: RunSpec
    storages: tuple[TracedStorage, ...]
    events: tuple[int, ...]
    phases: tuple[TracedPhase, ...]
    parameters: int
    trainable: int
    versions: Mapping[str, str]
    seconds: float
    notes: tuple[str, ...] = field(default=())
    active: int | None = None
    built: str = ""

    @cached_property
    def allocated(self) -> tuple[int, ...]:
        """Bytes allocated after every event."""
        changes = (self.storages[e].bytes if e >= 0 else -self.storages[~e].bytes for e in self.events)
        return tuple(accumulate(changes))

    @cached_property
    def _top(self) -> TracedPhase:
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def peak(self) -> int:
        """The largest number of bytes allocated at once, without cuBLAS's workspaces."""
        return self._top.peak

    @property
    def peak_phase(self) -> str:
        """The phase and step of the peak, such as `backward 2`."""
        return f"{self._top.phase} {self._top.step}".removesuffix(" 0")

    @cached_property
    def alive(self) -> tuple[TracedStorage, ...]:
        """The storages allocated at the peak, largest first."""
        return self.alive_at(self._top.peak_at)

    def alive_at(self, event: int) -> tuple[TracedStorage, ...]:
        """Return the storages allocated right after an event, largest first."""
        alive = [s for s in self.storages if s.born <= event < s.died]
        return tuple(sorted(alive, key=lambda s: (-s.bytes, s.born)))

    @cached_property
    def categories(self) -> Mapping[str, int]:
        """Bytes at the peak by kind; they sum to `peak`."""
        return self.categories_at(self._top.peak_at)

    def categories_at(self, event: int) -> Mapping[str, int]:
        """Return the bytes right after an event by kind."""
        out: dict[str, int] = dict.fromkeys(KINDS, 0)
        for storage in self.alive_at(event):
            out[storage.kind] += storage.bytes
        return FrozenDict(out)

    @cached_property
    def reserved(self) -> int:
        """The most bytes torch's caching allocator would reserve: see `replayed`."""
        capability = find_gpu(self.run.gpu).compute_capability if self.run.gpu else None
        return replayed(self, cublas_workspace(capability).usual, self.run.loop.expandable_segments)

    def first(self, phase: str) -> int | None:
        """Return the first event of the first phase of that name; None if there is none."""
        return next((p.start for p in self.phases if p.phase == phase), None)

    def peak_of(self, phase: str, step: int) -> int | None:
        """Return the peak of a phase in a step, over all its micro-batches; None if there is no such phase."""
        return max((p.peak for p in self.phases if (p.phase, p.step) == (phase, step)), default=None)


def replayed(traced: TracedRun, workspace: int, expandable: bool = False, capacity: int | None = None) -> int:
    """Return the most bytes that torch reserves for a trace's events.

    workspace   bytes of cuBLAS's workspace, allocated when forward and when backward first need one
    capacity    bytes available to torch; None for unlimited

    Raises OutOfMemoryError if the capacity is too small.
    """
    allocator, blocks = new_allocator(expandable, capacity), dict[int, Block]()
    sizes = [storage.bytes for storage in traced.storages]
    first_phase = "encode" if traced.first("encode") is not None else "prefill"
    workspace_events = {traced.first(phase) for phase in ("forward", first_phase, "backward")}
    alloc, free = allocator.alloc, allocator.free
    for index, event in enumerate(traced.events):
        if index in workspace_events:
            alloc(workspace)
        if event >= 0:
            blocks[event] = alloc(sizes[event])
        else:
            free(blocks.pop(~event))
    return allocator.peak_reserved


def trace(run: RunSpec, steps: int = 2, *, device: Device = "cuda", data: bool = False) -> TracedRun:
    """Trace `steps` steps of a run: 2 show both the first, which creates the optimizer's states, and later ones.

    `device` and `data` are for testing the trace itself: a small step on the CPU allocates the same with and without
    data. Takes 2 to 30 seconds after importing torch, transformers and peft. Raises ProbeError if a library, a compiler
    or a model class is missing or the script fails, SpecError for a run that the script cannot run.
    """
    with Tracer() as tracer:
        return tracer.trace(run, steps, device=device, data=data)


def traces(
    runs: Iterable[RunSpec], steps: int = 2, *, device: Device = "cuda", data: bool = False
) -> Iterator[TracedRun | MemplanError]:
    """Trace many runs in turn, importing the libraries once.

    An error is yielded in place of its trace; the other runs continue.
    """
    with Tracer() as tracer:
        for run in runs:
            try:
                yield tracer.trace(run, steps, device=device, data=data)
            except MemplanError as error:
                yield error


_CLOCK_FACTOR = 4  # a process may use this many times the limit of one trace in processor time


class Tracer:
    """A tracing process, started on first use and restarted if it dies.

    Use it in a `with` statement, which ends the process. `limits` restrict it: see `memplan.probe.limits`.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def trace(self, run: RunSpec, steps: int = 2, *, device: Device = "cuda", data: bool = False) -> TracedRun:
        """Like the function `trace`, without starting a process each time."""
        return read(run, self.answer(run, steps, device=device, data=data))

    def answer(self, run: RunSpec, steps: int = 2, *, device: Device = "cuda", data: bool = False) -> dict[str, Any]:
        """Return the trace as JSON types, which `read` turns into a `TracedRun`."""
        require()
        if data and device != "cpu":
            raise ProbeError("probe: a trace with data runs on the CPU only; --cuda measures the local GPU")
        checked_run(run)
        question = {"run": run.model_dump(mode="json"), "steps": steps, "device": device, "data": data}
        return self._ask({**question, "parameters": self._limits.parameters if self._limits else None})

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Return the process's answer to one question. Raises the error it reports, or ProbeError if it died."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        timed_out: list[bool] = []

        def end() -> None:
            timed_out.append(True)
            process.kill()

        seconds = self._limits.seconds if self._limits else TIMEOUT_MAX
        clock = Timer(seconds, end)
        clock.daemon = True
        clock.start()
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            clock.cancel()
        is_cut = not line.endswith("\n")  # a process that is stopped may have written a part of its answer
        if is_cut and timed_out:
            process.wait()
            raise ProbeError(f"probe: the trace was stopped: it took more than {seconds:g} seconds")
        if is_cut:
            raise self._died(process)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind: type[MemplanError] = getattr(errors, answer["error"], ProbeError)
            error = ProbeError.__new__(kind)
            MemplanError.__init__(error, answer["message"], answer["field"])
            raise error
        return answer

    def _start(self) -> subprocess.Popen[str]:
        self._end()
        here = str(Path(errors.__file__).parents[2])
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH", ""))))
        environment = {**os.environ, **QUIET, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed with it)
        limits = self._limits
        restrictions = [str(limits.memory), str(_CLOCK_FACTOR * limits.seconds)] if limits else []
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-m", "memplan.probe.run.child", *restrictions],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        return self._process

    def _died(self, process: subprocess.Popen[str]) -> ProbeError:
        code = process.wait()
        assert self._log is not None
        self._log.seek(0)
        last = next((line for line in reversed(self._log.read().splitlines()) if line.strip()), "no output")
        ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return ProbeError(f"probe: the tracing process {ending}: {' '.join(last.split()):.300}")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # unread input is lost
                        stream.close()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def read(run: RunSpec, answer: Mapping[str, Any]) -> TracedRun:
    return TracedRun(
        run=run,
        storages=tuple(TracedStorage(s[0], s[1], tuple(s[2]), *s[3:]) for s in answer["storages"]),
        events=tuple(answer["events"]),
        phases=tuple(TracedPhase(*p) for p in answer["phases"]),
        parameters=answer["parameters"],
        trainable=answer["trainable"],
        versions=FrozenDict(answer["versions"]),
        seconds=answer["seconds"],
        notes=tuple(answer["notes"]),
        active=answer["active"],
        built=answer["built"],
    )
