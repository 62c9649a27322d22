"""The process that measures a real training step on the local GPU and reports every phase.

It reads one request as JSON from standard input and writes one event per line to standard output: `card`, then `begin`
and `reading` around every phase, and at the end `done`, `out of memory`, `refused` or `failed`. If it is killed, its
parent (`memplan.probe.run.process`) still has the events written so far.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from memplan.core.errors import MemplanError, printable, refused
from memplan.core.records import NamedTuple
from memplan.probe.libraries import library, versions
from memplan.probe.run.driver import in_use
from memplan.spec.run import RunSpec

_LONGEST = 300  # characters of a library's error that are passed on


class LocalGPU(NamedTuple):
    """The GPU as torch sees it: `total` bytes available to a program, `uuid` as in nvidia-smi (empty if unknown)."""

    name: str
    capability: tuple[int, int]
    total: int
    uuid: str


class Reading(NamedTuple):
    """The bytes of one phase.

    allocated, reserved     torch's peaks within the phase
    held                    bytes reserved at its end
    used                    bytes in use on the card at its end, including other programs (cudaMemGetInfo: total - free)
    """

    phase: str
    step: int | None
    allocated: int
    reserved: int
    held: int
    used: int


class Cuda(Protocol):
    """The part of torch.cuda that a probe uses. Tests replace it with a fake."""

    def card(self) -> LocalGPU:
        """Return the GPU. Raises MemplanError if there is none."""
        ...

    def create_context(self) -> None:
        """Create a tensor, and with it the CUDA context."""
        ...

    def reset(self) -> None:
        """Reset the peaks to the current values."""
        ...

    def peaks(self) -> tuple[int, int]:
        """Return max_memory_allocated and max_memory_reserved since `reset`."""
        ...

    def held(self) -> int:
        """Return the current memory_reserved."""
        ...

    def used(self) -> int:
        """Return the bytes in use on the card, by cudaMemGetInfo."""
        ...

    def shown(self) -> int | None:
        """Return the bytes in use as nvidia-smi shows them; None if it does not answer."""
        ...

    def wait(self) -> None:
        """Synchronise with the card, so that its errors are raised in the phase that caused them."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether the error means that the card is out of memory."""
        ...

    def record_history(self) -> None:
        """Record every allocation from here on, with its stack."""
        ...

    def write_snapshot(self, path: str) -> None:
        """Write what was recorded to a file. Raises OSError."""
        ...


class Stepping(Protocol):
    """A model with its optimizer, on the device."""

    def step(self) -> None: ...


Phase = Callable[[str], AbstractContextManager[None]]
Build = Callable[[RunSpec, Phase], Stepping]
Emit = Callable[[dict[str, Any]], None]


def watch(run: RunSpec, steps: int, cuda: Cuda, build: Build, emit: Emit, snapshot: str = "") -> None:
    """Build the run's model, take `steps` training steps, and emit events around every phase.

    `snapshot` is a file that gets the history of all allocations, also of a run that runs out of memory.

    Never raises an Exception: errors are reported as the last event.
    """
    place: dict[str, Any] = {"phase": "context", "step": None}

    def read(name: str, step: int | None) -> None:
        allocated, reserved = cuda.peaks()
        reading = Reading(name, step, allocated, reserved, cuda.held(), cuda.used())
        emit({"event": "reading", **reading._asdict()})

    @contextmanager
    def phase(name: str) -> Generator[None]:
        place.update(phase=name)
        emit({"event": "begin", **place})
        cuda.reset()
        try:
            yield
            cuda.wait()
        except BaseException:
            with suppress(Exception):  # the first error is more useful than a second one from a broken device
                read(name, place["step"])
            raise
        read(name, place["step"])

    try:
        emit({"event": "card", **cuda.card()._asdict()})
        cuda.create_context()
        read("context", None)
        if snapshot:
            cuda.record_history()
        try:
            script = build(run, phase)
            for step in range(1, steps + 1):
                place.update(step=step)
                script.step()
        finally:
            if snapshot:
                cuda.write_snapshot(snapshot)
        emit({"event": "done", "shown": cuda.shown()})
    except MemplanError as error:
        emit({"event": "refused", **place, "message": str(error), "field": error.field})
    except Exception as error:
        message = printable(" ".join(str(error).split()), _LONGEST)
        if cuda.is_out_of_memory(error):
            emit({"event": "out of memory", **place, "message": ". ".join(message.split(". ")[:2])})
        else:
            emit({"event": "failed", **place, "message": f"{type(error).__name__}: {message}"})


class TorchCuda:
    """torch.cuda for the first visible GPU.

    Source: torch 2.13 torch/cuda/__init__.py and memory.py.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def card(self) -> LocalGPU:
        torch = self._torch
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            why = "finds no GPU" if built else "is built without CUDA"
            raise MemplanError(f"cuda: no GPU is here: torch {torch.__version__} {why}", "cuda")
        properties = torch.cuda.get_device_properties(0)
        uuid = str(getattr(properties, "uuid", ""))
        _, total = torch.cuda.mem_get_info(0)
        return LocalGPU(properties.name, (properties.major, properties.minor), total, f"GPU-{uuid}" if uuid else "")

    def create_context(self) -> None:
        self._torch.empty(1, device="cuda:0")

    def reset(self) -> None:
        self._torch.cuda.reset_peak_memory_stats(0)

    def peaks(self) -> tuple[int, int]:
        return self._torch.cuda.max_memory_allocated(0), self._torch.cuda.max_memory_reserved(0)

    def held(self) -> int:
        return self._torch.cuda.memory_reserved(0)

    def used(self) -> int:
        free, total = self._torch.cuda.mem_get_info(0)
        return total - free

    def shown(self) -> int | None:
        """By nvidia-smi, or else NVML through torch, which includes the driver's own reserve on recent drivers."""
        shown = in_use(self.card().uuid)
        if shown is not None:
            return shown
        try:
            return self._torch.cuda.device_memory_used(0)
        except Exception:  # ModuleNotFoundError without nvidia-ml-py, or whatever NVML raises without permission
            return None

    def wait(self) -> None:
        self._torch.cuda.synchronize(0)

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Recognise the allocator's error, and those of CUDA and cuBLAS for their own memory."""
        if isinstance(error, self._torch.OutOfMemoryError):
            return True
        message = str(error)
        return isinstance(error, RuntimeError) and any(words in message for words in OUT_OF_MEMORY)

    def record_history(self) -> None:
        self._torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")

    def write_snapshot(self, path: str) -> None:
        self._torch.cuda.memory._dump_snapshot(path)


MOST_EVENTS = 2_000_000  # that a snapshot keeps: some hundred steps of a dense model

# Out-of-memory errors of CUDA, cuBLAS and bitsandbytes, which bypass torch's allocator.
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Error out of memory at line")


def report_card(cuda: Cuda, emit: Emit) -> None:
    """Emit this machine's card and the libraries' versions, or why the card cannot be used."""
    try:
        emit({"event": "card", **cuda.card()._asdict()})
        emit({"event": "versions", **versions()})
        emit({"event": "done"})
    except MemplanError as error:
        emit({"event": "refused", "message": str(error), "field": error.field})
    except Exception as error:
        message = printable(" ".join(str(error).split()), _LONGEST)
        emit({"event": "failed", "message": f"{type(error).__name__}: {message}"})


def main() -> None:
    """Answer one request. The libraries' output goes to standard error: standard output is for events."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    request = json.load(sys.stdin)
    try:
        cuda = TorchCuda(library("torch"))
    except MemplanError as error:
        emit({"event": "refused", "message": str(error), "field": error.field})
        return
    if "run" not in request:
        report_card(cuda, emit)
        return

    def build(run: RunSpec, phase: Phase) -> Stepping:
        from memplan.probe.script.script import build as build_script

        if run.parallelism.world > 1:
            raise refused("parallelism", "one GPU is measured; --trace follows one rank of several")
        return build_script(run, "cuda", phase)

    watch(RunSpec.model_validate(request["run"]), request["steps"], cuda, build, emit, request.get("snapshot", ""))
