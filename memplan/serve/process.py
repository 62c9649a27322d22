"""A worker process: forked from the server with everything imported and warm, it answers one question at a time.

It ends when the server closes its socket, and is replaced when it has grown. Unless the operator allows more, it reads
no file but Python's and memplan's own, opens no connection and starts no program.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from memplan.core.package_data import data_path
from memplan.serve.log import log
from memplan.serve.messages import HEAD, Question, Reply, question_of, question_size
from memplan.serve.problems import problem_of, reason_of

Answering = Callable[[Question], Reply]
MOST_GROWTH = 2**29  # bytes of memory that a process may add before it is replaced
_HARD_LIMIT = 2**31  # bytes of address space that one answer may add
_KIB = 1024 if sys.platform != "darwin" else 1  # unit of ru_maxrss
_FORBIDDEN = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.")
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def start(answering: Answering, is_confined: bool) -> tuple[int, socket.socket]:
    """Start a worker process and return its id, and the socket to it."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    status = 1
    try:
        _leave_the_server(theirs)
        if is_confined:
            _confine()
        _work(theirs, answering)
        status = 0
    finally:
        os._exit(status)


def _leave_the_server(own: socket.socket) -> None:
    """Give back what a fork shares with the server: its connections, its signals, and objects to collect."""
    gc.freeze()
    os.setsid()
    signal.set_wakeup_fd(-1)
    for each in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(each, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.closerange(3, own.fileno())
    os.closerange(own.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + _HARD_LIMIT
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _confine() -> None:
    """Refuse, in this process and for ever, everything that an answer for a bundled model does not need."""
    sys.dont_write_bytecode = True
    data = (Path(__file__).parents[1], *(data_path(name) for name in ("model_cards", "gpus.toml", "profiles.toml")))
    own = tuple(os.path.realpath(place) for place in (sys.prefix, sys.base_prefix, *data))
    modules = tuple(os.path.realpath(folder) for folder in sys.path)

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):  # opened already
                return
            real = os.path.realpath(os.fsdecode(path))  # pyright: ignore[reportArgumentType]
            is_module = real.startswith(modules) and real.endswith((".py", ".pyc", ".so"))
            allowed = (is_module or real.startswith(own)) and not (isinstance(flags, int) and flags & _CHANGING)
            if not allowed:
                raise PermissionError(1, "this server reads no files")
        elif event.startswith(_FORBIDDEN):
            raise PermissionError(1, "this server opens no connections and starts no programs")

    sys.addaudithook(refuse)


def _work(connection: socket.socket, answering: Answering) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    with connection.makefile("rb") as reader:
        while len(head := reader.read(HEAD)) == HEAD:
            question = question_of(head, reader.read(question_size(head)))
            reply = answered(question, answering)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB - before
            reply = reply._replace(retires=grown > MOST_GROWTH)
            connection.sendall(reply.packed())
            if reply.retires:
                return


def answered(question: Question, answering: Answering) -> Reply:
    """Return the reply to a question: an error becomes a problem, and one that nobody expected is logged."""
    try:
        return answering(question)
    except Exception as error:
        reply = problem_of(error)
        if reply.status >= 500:
            log("error", operation=question.operation, reason=reason_of(error))
        return reply
