"""A traced step: what the real libraries allocate and free, recorded on fake CUDA tensors in a process of its own.

    traced = trace(RunSpec(model="llama-3.1-8b", method="lora"))
    traced.peak, traced.peak_phase, traced.categories

Nothing is imported into the caller's process: a child runs the script, as its torch is made to see a card that is not
there (`memplan.probe.fake.fake_device`).
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
from typing import IO, Any, Literal, NamedTuple

from memplan.catalogue.hardware.gpus import find_gpu
from memplan.catalogue.hardware.overhead import cublas_workspace
from memplan.core import errors
from memplan.core.cached_property import cached_property
from memplan.core.errors import MemplanError, ProbeError
from memplan.core.frozen import FrozenDict
from memplan.engine.allocator import Allocator, Block
from memplan.estimate.answer import KINDS
from memplan.probe.libraries import QUIET, require
from memplan.probe.limits import Limits
from memplan.probe.refusals import settled
from memplan.spec.run import RunSpec

Device = Literal["cuda", "cpu"]


class Storage(NamedTuple):
    """One storage on the device, from the event it was made in to the one that freed it.

    `bytes` are rounded up to 512 as the caching allocator does, `asked` as they were asked for; `shape` and `dtype`
    are of the first tensor in it. `op` and `module` say which call made it, in whose forward or for whose gradient;
    `kind` is one of `memplan.estimate.answer.KINDS`, `name` what a parameter, buffer, gradient or state is called, as
    its module has it. `died` is the number of all events where it outlives them.
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
    """One phase of one step (0 is before the first): its events, peak and what is left at its end, in bytes.

    `peak_at` is the event of the peak. `loss` is what follows the head in a forward pass, where the two can be told
    apart; else it is in `forward`.
    """

    phase: str
    step: int
    start: int
    end: int
    peak: int
    peak_at: int
    left: int


@dataclass(frozen=True)
class Traced:
    """A traced run. `events` hold n where storage n is made and ~n where it is freed.

    parameters, trainable   numbers of parameters of the model without adapters, and of those that train
    active                  of the former those that a token meets; None where the config does not tell
    built                   transformers' class that was built
    seconds                 of the trace itself, after imports
    notes                   what the trace had to assume
    """

    run: RunSpec
    storages: tuple[Storage, ...]
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
        """The most bytes allocated at any time, without cuBLAS's workspaces."""
        return self._top.peak

    @property
    def peak_phase(self) -> str:
        """The phase of the peak, and its step: `backward 2`."""
        return f"{self._top.phase} {self._top.step}".removesuffix(" 0")

    @cached_property
    def alive(self) -> tuple[Storage, ...]:
        """What is allocated at the peak, largest first."""
        return self.alive_at(self._top.peak_at)

    def alive_at(self, event: int) -> tuple[Storage, ...]:
        """What is allocated right after an event, largest first."""
        found = [s for s in self.storages if s.born <= event < s.died]
        return tuple(sorted(found, key=lambda s: (-s.bytes, s.born)))

    @cached_property
    def categories(self) -> Mapping[str, int]:
        """Bytes at the peak by kind. Sums to `peak`."""
        return self.categories_at(self._top.peak_at)

    def categories_at(self, event: int) -> Mapping[str, int]:
        """Bytes right after an event by kind."""
        out: dict[str, int] = dict.fromkeys(KINDS, 0)
        for storage in self.alive_at(event):
            out[storage.kind] += storage.bytes
        return FrozenDict(out)

    @cached_property
    def reserved(self) -> int:
        """The most bytes torch's caching allocator would hold in segments: see `replayed`."""
        capability = find_gpu(self.run.gpu).compute_capability if self.run.gpu else None
        return replayed(self, cublas_workspace(capability).usual, self.run.loop.expandable_segments)

    def first(self, phase: str) -> int | None:
        """The event with which a phase first begins; None where there is none of that name."""
        return next((p.start for p in self.phases if p.phase == phase), None)

    def peak_of(self, phase: str, step: int) -> int | None:
        """The peak of a phase in a step, over all its micro-batches; None where there was none."""
        return max((p.peak for p in self.phases if (p.phase, p.step) == (phase, step)), default=None)


def replayed(traced: Traced, workspace: int, expandable: bool = False, capacity: int | None = None) -> int:
    """The most bytes torch reserves for a trace's events, on a card with `capacity` for it, with a `workspace` of
    cuBLAS's where forward and backward first need one. Raises OutOfMemoryError where the capacity does not suffice."""
    allocator, blocks = Allocator(expandable, capacity), dict[int, Block]()
    sizes = [storage.bytes for storage in traced.storages]
    begins = "encode" if traced.first("encode") is not None else "prefill"
    needs = {traced.first(phase) for phase in ("forward", begins, "backward")}
    alloc, free = allocator.alloc, allocator.free
    for at, event in enumerate(traced.events):
        if at in needs:
            alloc(workspace)
        if event >= 0:
            blocks[event] = alloc(sizes[event])
        else:
            free(blocks.pop(~event))
    return allocator.peak_reserved


def trace(run: RunSpec, steps: int = 2, *, device: Device = "cuda", data: bool = False) -> Traced:
    """Trace `steps` steps of a run: 2 show both the first, which makes the optimizer's states, and the later ones.

    `device` and `data` are for checks of the trace itself: a small step on the CPU, without data or with, allocates the
    same. It takes the seconds of importing torch, transformers and peft, and 2 to 30 more. Raises ProbeError where a
    library, a compiler or a model class is missing or the script fails, SpecError for what the script does not run.
    """
    with Tracer() as tracer:
        return tracer.trace(run, steps, device=device, data=data)


def traces(
    runs: Iterable[RunSpec], steps: int = 2, *, device: Device = "cuda", data: bool = False
) -> Iterator[Traced | MemplanError]:
    """Trace many runs one after another: the libraries are imported once.

    An error is yielded in its place; the others go on.
    """
    with Tracer() as tracer:
        for run in runs:
            try:
                yield tracer.trace(run, steps, device=device, data=data)
            except MemplanError as error:
                yield error


_CLOCKS = 4  # a process's traces together may take so many times one's seconds, of the processor


class Tracer:
    """The process that traces: started when the first run is asked for, and again where one ended it.

    To be used in a `with` statement, at whose end it ends. With `limits` it is restricted: see `memplan.probe.limits`.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] | None = None

    def __enter__(self) -> Tracer:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def trace(self, run: RunSpec, steps: int = 2, *, device: Device = "cuda", data: bool = False) -> Traced:
        """As the function `trace`, without starting a process each time."""
        return read(run, self.answer(run, steps, device=device, data=data))

    def answer(self, run: RunSpec, steps: int = 2, *, device: Device = "cuda", data: bool = False) -> dict[str, Any]:
        """The same as the process says it, in JSON's types: `read` makes a `Traced` of it."""
        require()
        if data and device != "cpu":
            raise ProbeError("probe: a trace with data is of the CPU; --cuda measures the GPU that is here")
        settled(run)
        asked = {"run": run.model_dump(mode="json"), "steps": steps, "device": device, "data": data}
        return self._ask({**asked, "parameters": self._limits.parameters if self._limits else None})

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The process's answer to one question. Raises the error it met, or ProbeError where it died."""
        process = self._process if self._process is not None and self._process.poll() is None else self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        late: list[bool] = []

        def end() -> None:
            late.append(True)
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
        if not line and late:
            process.wait()
            raise ProbeError(f"probe: the trace was ended: it took more than {seconds:g} seconds")
        if not line:
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
        restrictions = [str(limits.memory), str(_CLOCKS * limits.seconds)] if limits else []
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
        last = next((line for line in reversed(self._log.read().splitlines()) if line.strip()), "it said nothing")
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return ProbeError(f"probe: the process that traces {how}: {' '.join(last.split()):.300}")

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # what it has not read is lost
                        stream.close()
            self._process.wait()
            self._process = None
        if self._log is not None:
            self._log.close()
            self._log = None


def read(run: RunSpec, answer: Mapping[str, Any]) -> Traced:
    return Traced(
        run=run,
        storages=tuple(Storage(s[0], s[1], tuple(s[2]), *s[3:]) for s in answer["storages"]),
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
