"""A training step for real on the local GPU: the side that runs in a process of its own, and speaks of every phase.

It reads one request as JSON from standard input, and writes one event a line to standard output: `card`, then `begin`
and `reading` around every phase, and at the end `done`, `out of memory`, `refused` or `failed`. What a killed process
had written until then stays with the process that started it (`memplan.probe.run.process`).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, NamedTuple, Protocol

from memplan.core.errors import MemplanError, SpecError, printable
from memplan.probe.libraries import library, versions
from memplan.probe.run.driver import in_use
from memplan.spec.run import RunSpec

_LONGEST = 300  # letters of another library's error that are passed on


class Card(NamedTuple):
    """The GPU as torch sees it: `total` bytes a program can have, `uuid` as nvidia-smi names it (empty if unknown)."""

    name: str
    capability: tuple[int, int]
    total: int
    uuid: str


class Reading(NamedTuple):
    """One phase's bytes.

    `allocated` and `reserved` are torch's peaks within the phase, `held` what is reserved at its end, and `used` what
    the driver has given out on the whole card by then (cudaMemGetInfo's total less free: other programs' too).
    """

    phase: str
    step: int | None
    allocated: int
    reserved: int
    held: int
    used: int


class Cuda(Protocol):
    """The part of torch.cuda that a probe talks to. Tests put a fake in its place."""

    def card(self) -> Card:
        """The GPU. Raises MemplanError where there is none."""
        ...

    def first_tensor(self) -> None:
        """Make a tensor, and with it the CUDA context."""
        ...

    def reset(self) -> None:
        """Peaks start again from what is held now."""
        ...

    def peaks(self) -> tuple[int, int]:
        """max_memory_allocated and max_memory_reserved since `reset`."""
        ...

    def held(self) -> int:
        """memory_reserved now."""
        ...

    def used(self) -> int:
        """What the driver has given out on the card, by cudaMemGetInfo."""
        ...

    def shown(self) -> int | None:
        """The same as nvidia-smi shows it; None where it does not answer."""
        ...

    def wait(self) -> None:
        """Until the card has done all it was asked, so that its errors come up where they belong."""
        ...

    def ran_out(self, error: BaseException) -> bool:
        """Whether the error says that the card's memory is used up."""
        ...


class Stepping(Protocol):
    """A model with its optimizer, on the device."""

    def step(self) -> None: ...


Phase = Callable[[str], AbstractContextManager[None]]
Build = Callable[[RunSpec, Phase], Stepping]
Emit = Callable[[dict[str, Any]], None]


def watch(run: RunSpec, steps: int, cuda: Cuda, build: Build, emit: Emit) -> None:
    """Build the run's model, take `steps` training steps, and emit an event at every phase.

    Never raises an Exception: what goes wrong is the last event.
    """
    now: dict[str, Any] = {"phase": "context", "step": None}

    def read(name: str, step: int | None) -> None:
        allocated, reserved = cuda.peaks()
        reading = Reading(name, step, allocated, reserved, cuda.held(), cuda.used())
        emit({"event": "reading", **reading._asdict()})

    @contextmanager
    def phase(name: str) -> Generator[None]:
        now.update(phase=name)
        emit({"event": "begin", **now})
        cuda.reset()
        try:
            yield
            cuda.wait()
        except BaseException:
            with suppress(Exception):  # the first error says more than one of a device that no longer answers
                read(name, now["step"])
            raise
        read(name, now["step"])

    try:
        emit({"event": "card", **cuda.card()._asdict()})
        cuda.first_tensor()
        read("context", None)
        script = build(run, phase)
        for step in range(1, steps + 1):
            now.update(step=step)
            script.step()
        emit({"event": "done", "shown": cuda.shown()})
    except MemplanError as error:
        emit({"event": "refused", **now, "message": str(error), "field": error.field})
    except Exception as error:
        said = printable(" ".join(str(error).split()), _LONGEST)
        if cuda.ran_out(error):
            emit({"event": "out of memory", **now, "message": ". ".join(said.split(". ")[:2])})
        else:
            emit({"event": "failed", **now, "message": f"{type(error).__name__}: {said}"})


class TorchCuda:
    """torch.cuda, of the first GPU it is allowed to see.

    Source: torch 2.13 torch/cuda/__init__.py and memory.py.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def card(self) -> Card:
        torch = self._torch
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            why = "finds no GPU" if built else "is built without CUDA"
            raise MemplanError(f"cuda: no GPU is here: torch {torch.__version__} {why}", "cuda")
        properties = torch.cuda.get_device_properties(0)
        uuid = str(getattr(properties, "uuid", ""))
        _, total = torch.cuda.mem_get_info(0)
        return Card(properties.name, (properties.major, properties.minor), total, f"GPU-{uuid}" if uuid else "")

    def first_tensor(self) -> None:
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
        """By nvidia-smi, or else by NVML through torch, which counts the driver's own reserve in on recent drivers."""
        shown = in_use(self.card().uuid)
        if shown is not None:
            return shown
        try:
            return self._torch.cuda.device_memory_used(0)
        except Exception:  # ModuleNotFoundError without nvidia-ml-py, and whatever NVML raises where it may not look
            return None

    def wait(self) -> None:
        self._torch.cuda.synchronize(0)

    def ran_out(self, error: BaseException) -> bool:
        """The allocator's own error, or CUDA's and cuBLAS's where their own memory cannot be had."""
        if isinstance(error, self._torch.OutOfMemoryError):
            return True
        said = str(error)
        return isinstance(error, RuntimeError) and any(words in said for words in OUT_OF_MEMORY)


# How CUDA, cuBLAS and bitsandbytes say so where torch's allocator was not asked.
OUT_OF_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Error out of memory at line")


def look(cuda: Cuda, emit: Emit) -> None:
    """Emit which card is here and which versions of the libraries, or why none can be used."""
    try:
        emit({"event": "card", **cuda.card()._asdict()})
        emit({"event": "versions", **versions()})
        emit({"event": "done"})
    except MemplanError as error:
        emit({"event": "refused", "message": str(error), "field": error.field})
    except Exception as error:
        said = printable(" ".join(str(error).split()), _LONGEST)
        emit({"event": "failed", "message": f"{type(error).__name__}: {said}"})


def main() -> None:
    """Answer one request. What libraries print goes to standard error: standard output is for events."""
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
        look(cuda, emit)
        return

    def build(run: RunSpec, phase: Phase) -> Stepping:
        from memplan.probe.script.script import build as built

        if run.parallelism.world > 1:
            raise SpecError("parallelism: one GPU is measured; --trace follows one rank of several", "parallelism")
        return built(run, "cuda", phase)

    watch(RunSpec.model_validate(request["run"]), request["steps"], cuda, build, emit)
