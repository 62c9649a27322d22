"""Fake CUDA streams and events, by which FSDP and DDP order their copies and reductions.

A block of memory counts as free as soon as its tensor is gone, whichever stream used it, so a trace is the same without
real streams.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Event:
    """An event that has always completed."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> Event:
        return self

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream:
    """A stream on which all work completes immediately."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device_index = 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event or Event()

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def apply(cuda: Any, accelerator: Any) -> None:
    """Patch torch's modules `cuda` and `accelerator` with these streams and a single device."""
    current = Stream()

    def stream(_: Any) -> AbstractContextManager[None]:
        return nullcontext()

    def current_stream(*_: Any, **__: Any) -> Stream:
        return current

    cuda.Stream, cuda.Event, cuda.stream = Stream, Event, stream
    cuda.current_stream = cuda.default_stream = accelerator.current_stream = current_stream
    cuda.set_device = cuda.set_stream = lambda *_, **__: None  # pyright: ignore[reportUnknownLambdaType]
    cuda.device_count = lambda: 1
    cuda.is_initialized = lambda: True
