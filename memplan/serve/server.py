"""Start the service: warm this process, fork the workers from it, and serve until a signal ends it."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
from functools import partial

from memplan.core.errors import MemplanError, SpecError
from memplan.serve.log import JSONHandler, log
from memplan.serve.settings import ServerSettings

_KEEP_ALIVE_SECONDS = 30
_BACKLOG = 1024


def serve(settings: ServerSettings) -> int:
    """Serve until SIGTERM or SIGINT, then answer what was asked and return 0. Raises MemplanError."""
    if not hasattr(os, "fork"):
        raise MemplanError("serve: needs a system with fork, such as Linux or macOS")
    try:
        import uvicorn

        from memplan.serve.app import Service
        from memplan.serve.connection import LimitedProtocol, RenewingServer
    except ImportError as error:
        raise MemplanError(f"serve: {error.name} is not installed: pip install 'memplan[serve]'") from None
    from memplan.serve.operations import answer, make_ready
    from memplan.serve.workers import Workers

    with _listening(settings) as listening:
        make_ready(settings.warm)
        gc.collect()
        gc.freeze()  # what is warm is not looked through again, and stays shared with the processes
        gc.enable()  # which a command does not need, and a server does
        is_confined = not (settings.files or settings.online or settings.trace)
        workers = Workers(lambda question: answer(question, settings), settings.workers, settings.waiting, is_confined)
        logging.basicConfig(handlers=[JSONHandler()], level=logging.ERROR, force=True)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # processes that end leave nothing to collect
        for each in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again once it has stopped
            signal.signal(each, _nothing)
        config = uvicorn.Config(
            Service(settings, workers).app(),
            http=partial(LimitedProtocol, settings.connections),  # pyright: ignore[reportArgumentType] (it is only called)
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=int(settings.seconds) + 1,
            ssl_certfile=settings.certificate,
            ssl_keyfile=settings.key,
        )
        try:
            config.load()
        except OSError as error:  # also ssl.SSLError
            text = f"certificate: {settings.certificate} and {settings.key} cannot be used ({error.strerror or error})"
            raise SpecError(text, "certificate") from None
        host, port = listening.getsockname()[:2]
        scheme = "http" if settings.certificate is None else "https"
        log("listening", address=f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}", pid=os.getpid())
        RenewingServer(config).run(sockets=[listening])
        return 0


def _nothing(*_: object) -> None:
    pass


def _listening(settings: ServerSettings) -> socket.socket:
    """Return the socket that is listened on. Raises SpecError for an address that cannot be taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = str(getattr(error, "strerror", None) or error).partition(" (")[0]
        raise SpecError(f"host: {settings.host}:{settings.port} cannot be listened on ({reason})", "host") from None
