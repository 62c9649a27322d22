"""The server's worker processes: each question goes to a free one, waits for one, or is refused."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import cast

from memplan.serve.log import log
from memplan.serve.messages import Question, Reply, reply_of
from memplan.serve.problems import RequestError
from memplan.serve.process import Answering, start

_BUSY = "{} requests are waiting already; ask again in a second"
_LATE = "no answer within {:g} s, which is the most that this server allows"


class Worker(asyncio.Protocol):
    """The server's end of a worker process, which answers one question at a time."""

    def __init__(self, pid: int, ends: Callable[[Worker], None]) -> None:
        self.pid = pid
        self.is_long = False
        self._ends = ends
        self._received = bytearray()
        self._pending: asyncio.Future[Reply] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def ask(self, question: Question) -> asyncio.Future[Reply]:
        assert self._transport is not None
        self._pending = asyncio.get_running_loop().create_future()
        self._transport.write(question.packed())
        return self._pending

    def data_received(self, data: bytes) -> None:
        self._received += data
        reply = reply_of(self._received)
        if reply is not None:
            self._received = bytearray()
            self._settle(reply)

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle(None)
        self._ends(self)

    def _settle(self, reply: Reply | None) -> None:
        pending, self._pending = self._pending, None
        if pending is None or pending.done():
            return
        if reply is None:
            pending.set_exception(RequestError(500, "internal", "the process that was answering ended"))
        else:
            pending.set_result(reply)

    def stop(self) -> None:
        """End the process once it has no question, by closing its socket."""
        if self._transport is not None:
            self._transport.close()

    def kill(self) -> None:
        """End the process and all that it started, now."""
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)


class Workers:
    """A fixed number of worker processes. Questions that take long never have all of them, if there are several.

    restarts  how many processes were replaced, by reason
    """

    def __init__(self, answering: Answering, count: int, most_waiting: int, is_confined: bool) -> None:
        self._answering, self._count, self._most_waiting = answering, count, most_waiting
        self._is_confined = is_confined
        self._free: list[Worker] = []
        self._all: set[Worker] = set()
        self._waiting: dict[bool, deque[asyncio.Future[Worker]]] = {False: deque(), True: deque()}
        self._long = 0
        self._stopping = False
        self._replacing: set[asyncio.Task[None]] = set()
        self.restarts = {"grown": 0, "late": 0, "ended": 0}

    @property
    def waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def is_ready(self) -> bool:
        return bool(self._all) and not self._stopping

    async def start(self) -> None:
        for _ in range(self._count):
            await self._add()

    def stop(self) -> None:
        self._stopping = True
        for worker in [*self._all]:
            worker.stop()

    async def _add(self) -> None:
        """Fork a process: between two steps of the loop, and without threads, so that nothing is half-done in it."""
        pid, connection = start(self._answering, self._is_confined)
        await self._connect(pid, connection)

    async def _connect(self, pid: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        loop = asyncio.get_running_loop()
        _, worker = await loop.create_connection(lambda: Worker(pid, self._ended), sock=connection)
        self._all.add(worker)
        self._release(worker)

    def _ended(self, worker: Worker) -> None:
        """Replace a process that has ended."""
        self._all.discard(worker)
        if worker in self._free:
            self._free.remove(worker)
        if not self._stopping:
            task = asyncio.ensure_future(self._replace())
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)

    async def _replace(self) -> None:
        """Add a process; if the machine has no room for one, try again in a second."""
        while not self._stopping:
            try:
                await self._add()
                return
            except OSError as error:
                log("worker", reason=f"cannot be started ({error.strerror or error})")
                await asyncio.sleep(1)

    async def ask(self, question: Question, seconds: float, is_long: bool = False) -> Reply:
        """Return a worker's reply.

        Raises RequestError if too many questions wait, or if there is no reply within the seconds; then the process is
        replaced.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        worker = self._take(is_long) or await self._wait(is_long, seconds)
        reply = worker.ask(question)
        timer = loop.call_at(until, self._expire, worker, reply, seconds)
        try:
            found = await reply
        finally:
            timer.cancel()
            if reply.cancelled():  # the one who asked has gone
                self._retire(worker, "ended")
            is_usable = not reply.cancelled() and reply.exception() is None and not reply.result().retires
            self._give_back(worker, is_usable)
        if found.retires:
            self.restarts["grown"] += 1
        return found

    def _give_back(self, worker: Worker, is_usable: bool = True) -> None:
        self._long -= worker.is_long
        worker.is_long = False
        if is_usable:
            self._release(worker)

    def _expire(self, worker: Worker, reply: asyncio.Future[Reply], seconds: float) -> None:
        if not reply.done():
            reply.set_exception(RequestError(422, "time_limit", _LATE.format(seconds)))
            self._retire(worker, "late")

    def _retire(self, worker: Worker, reason: str) -> None:
        self.restarts[reason] += 1
        log("worker", reason=reason, pid=worker.pid)
        worker.kill()

    def _take(self, is_long: bool) -> Worker | None:
        if not self._free or (is_long and self._long >= max(1, self._count - 1)):
            return None
        worker = self._free.pop()
        worker.is_long = is_long
        self._long += is_long
        return worker

    async def _wait(self, is_long: bool, seconds: float) -> Worker:
        if self.waiting >= self._most_waiting:
            raise RequestError(429, "too_many_requests", _BUSY.format(self.waiting))
        turn: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        queue = self._waiting[is_long]
        queue.append(turn)
        try:
            async with asyncio.timeout(seconds):
                return await turn
        except BaseException as error:
            if turn in queue:
                queue.remove(turn)
            elif turn.done() and not turn.cancelled():  # it came too late
                self._give_back(turn.result())
            if isinstance(error, TimeoutError):
                raise RequestError(429, "too_many_requests", _LATE.format(seconds)) from None
            raise

    def _release(self, worker: Worker) -> None:
        """Give a worker to the next question that waits, or keep it."""
        self._free.append(worker)
        for is_long, queue in self._waiting.items():
            while queue and queue[0].done():
                queue.popleft()
            if queue:
                taken = self._take(is_long)
                if taken is not None:
                    queue.popleft().set_result(taken)
                    return
