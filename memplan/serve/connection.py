"""uvicorn's server and HTTP protocol, with limits that it has not: on the time and size of a request's head, on
connections, and on the time that a client takes to read.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from uvicorn import Server
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from memplan.serve.log import log

MOST_HEAD = 2**16  # bytes of a request's line and headers
HEAD_SECONDS = 10.0  # within which they come
_LINGER_SECONDS = 5.0
_TICKS = 600  # of the server's tenth of a second, between looks at the certificate


class RenewingServer(Server):
    """uvicorn's server, which takes a renewed certificate from its files within a minute."""

    _changed: tuple[float, ...] = ()

    async def on_tick(self, counter: int) -> bool:
        if self.config.is_ssl and counter % _TICKS == 0:
            self._renew()
        return await super().on_tick(counter)

    def _renew(self) -> None:
        certificate, key = self.config.ssl_certfile, self.config.ssl_keyfile
        try:
            changed = tuple(Path(str(name)).stat().st_mtime for name in (certificate, key))
            if self._changed and changed != self._changed and self.config.ssl is not None:
                self.config.ssl.load_cert_chain(str(certificate), key)  # the connections to come have it
                log("certificate", renewed=True)
            self._changed = changed
        except OSError as error:  # half-written: the next minute sees it again
            log("certificate", renewed=False, reason=error.strerror or str(error))


class LimitedProtocol(HttpToolsProtocol):
    """One client's connection. `most` is the largest number of them."""

    def __init__(self, most: int, **more: Any) -> None:
        super().__init__(**more)
        self._most = most
        self._timer: asyncio.TimerHandle | None = None
        self._head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        super().connection_made(transport)
        if len(self.connections) > self._most:
            self._refuse(b"429 Too Many Requests")
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.parser is None or self.transport.is_closing():  # pyright: ignore[reportUnnecessaryComparison] (once lost)
            return
        if self._timer is None and self._is_idle:
            self._await_head()
        super().data_received(data)
        if self._timer is not None:
            self._head += len(data)
            if self._head > MOST_HEAD:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_headers_complete(self) -> None:
        self._disarm()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._linger()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            super().timeout_keep_alive_handler()

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Keep the connection of a client that has sent its request and waits for the answer."""
        return not self._is_idle and not self.cycle.more_body and self.scheme == "http"

    @property
    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete  # pyright: ignore[reportUnnecessaryComparison] (at first)

    def _await_head(self) -> None:
        self._head = 0
        self._timer = self.loop.call_later(HEAD_SECONDS, self._late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        self._refuse(b"408 Request Timeout")

    def _refuse(self, status: bytes) -> None:
        self._disarm()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
            self.transport.close()
            self._linger()

    def _linger(self) -> None:
        """Give a client some seconds to read what was written, and not for ever."""
        self._disarm()
        self._timer = self.loop.call_later(_LINGER_SECONDS, self.transport.abort)
