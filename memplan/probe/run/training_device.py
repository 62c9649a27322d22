"""The GPU of a training script that is already running, as torch sees it from inside: what a guard reads."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Protocol

from memplan.probe.libraries import require
from memplan.probe.run.cuda import MOST_EVENTS, OUT_OF_MEMORY


class TrainingDevice(Protocol):
    """The part of torch that a guard uses. Tests replace it with a fake."""

    def peaks(self) -> tuple[int, int]:
        """Return max_memory_allocated and max_memory_reserved of the process so far."""
        ...

    def room(self) -> int:
        """Return the bytes that torch can reserve: what it has, and what is free."""
        ...

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether the error means that the card is out of memory."""
        ...

    def on_step(self, after: Callable[[], None]) -> Callable[[], None]:
        """Call a function after every optimizer step, and return one that ends this."""
        ...

    def record_history(self) -> None:
        """Record every allocation from here on, with its stack."""
        ...

    def write_snapshot(self, path: str) -> None:
        """Write what was recorded to a file. Raises OSError."""
        ...


class CurrentDevice:
    """The current CUDA device of this process.

    Source: torch 2.13 torch/optim/optimizer.py register_optimizer_step_post_hook, torch/cuda/memory.py.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    def peaks(self) -> tuple[int, int]:
        return self._torch.cuda.max_memory_allocated(), self._torch.cuda.max_memory_reserved()

    def room(self) -> int:
        free, _ = self._torch.cuda.mem_get_info()
        return self._torch.cuda.memory_reserved() + free

    def is_out_of_memory(self, error: BaseException) -> bool:
        if isinstance(error, self._torch.OutOfMemoryError):
            return True
        return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)

    def on_step(self, after: Callable[[], None]) -> Callable[[], None]:
        def hook(*_: object) -> None:
            after()

        return self._torch.optim.optimizer.register_optimizer_step_post_hook(hook).remove

    def record_history(self) -> None:
        self._torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS, stacks="python")

    def write_snapshot(self, path: str) -> None:
        self._torch.cuda.memory._dump_snapshot(path)


def current_device() -> TrainingDevice | None:
    """Return this process's device; None without a GPU. Raises ProbeError if torch is not installed."""
    require("torch")
    torch: Any = sys.modules.get("torch") or import_module("torch")
    return CurrentDevice(torch) if torch.cuda.is_available() else None
