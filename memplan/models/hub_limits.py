"""Limits on what is read of the Hub, in time and bytes, whatever a server says or sends."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

from memplan.core.errors import FactsMissingError, printable

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
Answer = TypeVar("Answer")


def within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """Return the answer of `ask`. Raises its error, or TimeoutError after `seconds`, however slowly it drips."""
    answer: Future[Answer] = Future()

    def work() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # raised again by `result`
            answer.set_exception(error)

    Thread(target=work, daemon=True).start()
    return answer.result(seconds)


@contextmanager
def limited(client: Any, hf_id: str, most: int) -> Generator[None]:
    """Limit each answer about `hf_id` to `most` bytes, and each to a request for a range to that range.

    client  huggingface_hub's session, whose other requests are left alone
    """
    hooks = client.event_hooks

    def ask_uncompressed(request: Any) -> None:
        if hf_id in request.url.path:
            request.headers["Accept-Encoding"] = "identity"

    def limit(response: Any) -> None:
        asked = _RANGE.fullmatch(response.request.headers.get("Range", ""))
        if asked is None and hf_id not in response.request.url.path:
            return
        for name in ("ETag", "X-Linked-ETag"):  # becomes the name of a file in the cache
            if re.search(r"[/\\]", response.headers.get(name, "").removeprefix("W/")):
                raise _refused(hf_id, f"has the {name} {printable(response.headers[name], 60)}, which is a path")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise _refused(hf_id, "is compressed, and its size not known")
        bytes_ = int(asked[2]) - int(asked[1]) + 1 if asked else most
        response.stream = _limited(response.stream, bytes_, _refused(hf_id, f"is longer than {bytes_:,} bytes"))

    client.event_hooks = {
        "request": [*hooks["request"], ask_uncompressed],
        "response": [*hooks["response"], limit],
    }
    try:
        yield
    finally:
        client.event_hooks = hooks


def _limited(stream: Any, most: int, error: FactsMissingError) -> Any:
    """Return a stream of the HTTP library that raises `error` after `most` bytes."""

    def read(_: object) -> Iterator[bytes]:
        left = most
        for part in stream:
            left -= len(part)
            if left < 0:
                raise error
            yield part

    def close(_: object) -> None:
        stream.close()

    base = next(kind for kind in type(stream).__mro__ if kind.__name__ == "SyncByteStream")
    return type("Limited", (base,), {"__iter__": read, "close": close})()


def _refused(hf_id: str, what: str) -> FactsMissingError:
    return FactsMissingError(f"model: the Hub's answer about '{printable(hf_id, 120)}' {what}", "model")
