"""The HTTP side of the service: it reads requests, asks the workers, and counts and logs what it answers."""

from __future__ import annotations

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import count

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from memplan.serve.endpoints import Endpoint, endpoints_of
from memplan.serve.log import log
from memplan.serve.messages import Question, Reply
from memplan.serve.operations import body_of, option
from memplan.serve.page import HEADERS
from memplan.serve.problems import MEDIA_TYPE, RequestError, problem, problem_of
from memplan.serve.settings import ServerSettings
from memplan.serve.webhook import request_of, unanswered
from memplan.serve.workers import Workers

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_BODY_SECONDS = 10.0  # within which a request's body comes
_GONE = 499  # as nginx logs a client that has left
_NETWORK_SECONDS = 0.5  # of a review's time, kept for the way back
_LAST = {"connection": "close"}  # of an answer to a request that was not read to its end


class Metrics:
    """Counts of the service, in Prometheus' form."""

    def __init__(self, workers: Workers) -> None:
        self.registry = CollectorRegistry()
        labels = ("endpoint", "status")
        self.requests = Counter("memplan_requests", "Requests by endpoint and status.", labels, registry=self.registry)
        self.seconds = Histogram(
            "memplan_request_seconds", "Time to answer.", ("endpoint",), registry=self.registry, buckets=_BUCKETS
        )
        self._counters: dict[tuple[str, int], tuple[Counter, Histogram]] = {}
        self.cached = Counter("memplan_cached_answers", "Answers from the cache.", registry=self.registry)
        self.problems = Counter("memplan_problems", "Problems by code.", ("code",), registry=self.registry)
        waiting = Gauge("memplan_waiting_requests", "Requests that wait for a worker.", registry=self.registry)
        waiting.set_function(lambda: workers.waiting)
        restarts = Gauge("memplan_worker_restarts", "Processes replaced.", ("reason",), registry=self.registry)
        for reason in workers.restarts:
            restarts.labels(reason).set_function(lambda reason=reason: workers.restarts[reason])

    def count(self, path: str, reply: Reply, seconds: float) -> None:
        """Count an answered request. The counters of an endpoint and status are looked up once: that takes longest."""
        counters = self._counters.get((path, reply.status))
        if counters is None:
            counters = self.requests.labels(path, reply.status), self.seconds.labels(path)
            self._counters[path, reply.status] = counters
        counters[0].inc()
        counters[1].observe(seconds)
        if reply.code:
            self.problems.labels(reply.code).inc()


class Answered:
    """Contents of answers by their requests, the last used ones, of at most `most` bytes together."""

    def __init__(self, most: int) -> None:
        self._most, self._bytes = most, 0
        self._contents: OrderedDict[Question, bytes] = OrderedDict()

    def get(self, question: Question) -> bytes | None:
        content = self._contents.get(question)
        if content is not None:
            self._contents.move_to_end(question)
        return content

    def put(self, question: Question, content: bytes) -> None:
        size = len(content) + len(question.body)
        if size > self._most // 8 or question in self._contents:
            return
        self._contents[question] = content
        self._bytes += size
        while self._bytes > self._most:
            old, dropped = self._contents.popitem(last=False)
            self._bytes -= len(dropped) + len(old.body)


class Service:
    """The application of a server's settings."""

    def __init__(self, settings: ServerSettings, workers: Workers) -> None:
        self._settings, self._workers = settings, workers
        self._answered = Answered(settings.cache)
        self._metrics = Metrics(workers)
        self._ids = count(1)

    def app(self) -> Starlette:
        served: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "/healthz": self._health,
            "/readyz": self._readiness,
            "/metrics": self._measured,
        }
        routes = [
            Route(each.path, served.get(each.path) or self._handler(each), methods=[each.method])
            for each in endpoints_of(self._settings)
        ]
        if self._settings.page is not None:
            routes += [Route(path, self._page) for path in self._settings.page.addresses]
        return Starlette(routes=routes, exception_handlers={HTTPException: self._no_route}, lifespan=self._lifespan)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        await self._workers.start()
        log("ready", workers=self._settings.workers)
        yield
        self._workers.stop()
        log("stopped")

    async def _health(self, _: Request) -> Response:
        return Response(b"ok\n", media_type="text/plain")

    async def _readiness(self, _: Request) -> Response:
        return Response(b"", 200 if self._workers.is_ready else 503)

    async def _measured(self, _: Request) -> Response:
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _page(self, request: Request) -> Response:
        assert self._settings.page is not None
        found = self._settings.page.content(request.url.path)
        assert found is not None
        content, type = found
        return Response(content, headers=HEADERS, media_type=type)

    async def _no_route(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        paths = [each.path for each in endpoints_of(self._settings)]
        code = {404: "no_such_address", 405: "wrong_method"}.get(error.status_code, "invalid_request")
        reply = problem(error.status_code, code, f"{error.detail}; addresses are {', '.join(paths)}")
        return self._said(request, "other", reply, time.perf_counter(), 0, dict(error.headers or {}))

    def _handler(self, endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
        """Return what answers an endpoint's requests."""

        async def handle(request: Request) -> Response:
            start = time.perf_counter()
            headers: dict[str, str] = {}
            body = b""
            try:
                if endpoint.method == "POST":
                    body = await self._body(request)
                query = request.scope["query_string"].decode("latin-1")
                reply = await self._reply(endpoint, Question(endpoint.operation, query, body))
            except ClientDisconnect:
                reply = Reply(_GONE, "gone", b"")
            except RequestError as error:
                reply = problem_of(error)
                headers = _LAST if error.status in (408, 413, 415) else {}
                headers |= {"retry-after": "1"} if error.status == 429 else {}
            except Exception as error:
                log("error", operation=endpoint.operation, reason=type(error).__name__)
                reply = problem_of(error)
            return self._said(request, endpoint.path, reply, start, len(body), headers)

        return handle

    def _said(
        self, request: Request, path: str, reply: Reply, start: float, received: int, headers: dict[str, str]
    ) -> Response:
        """Return the response, counted and logged."""
        seconds, number = time.perf_counter() - start, next(self._ids)
        headers = {**headers, "x-request-id": str(number)}
        self._metrics.count(path, reply, seconds)
        if not self._settings.quiet or reply.status >= 500:
            log(
                "request",
                id=number,
                method=request.method,
                path=path,
                status=reply.status,
                **({"code": reply.code} if reply.code else {}),
                ms=round(seconds * 1000, 2),
                received=received,
                sent=len(reply.content),
                client=request.client.host if request.client else "",
            )
        if reply.status == _GONE:
            return Response(status_code=408, headers={**headers, **_LAST})
        return Response(reply.content, reply.status, headers, MEDIA_TYPE if reply.code else "application/json")

    async def _body(self, request: Request) -> bytes:
        """Return the body. Raises RequestError if it is no JSON by its type, too large or too slow."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise RequestError(415, "not_json", "content-type: must be application/json", "content-type")
        most = self._settings.body
        size = request.headers.get("content-length", "0")
        received = bytearray()
        try:
            if int(size) <= most:
                async with asyncio.timeout(_BODY_SECONDS):
                    async for chunk in request.stream():
                        received += chunk
                        if len(received) > most:
                            break
                    else:
                        return bytes(received)
        except TimeoutError:
            text = f"the body did not come within {_BODY_SECONDS:g} s"
            raise RequestError(408, "too_slow", text) from None
        raise RequestError(413, "too_large", f"the body: must be at most {most:,} bytes")

    async def _reply(self, endpoint: Endpoint, question: Question) -> Reply:
        if endpoint.operation == "review":
            return await self._review(question)
        content = self._answered.get(question)
        if content is not None:
            self._metrics.cached.inc()
            return Reply(200, "", content)
        reply = await self._workers.ask(question, self._settings.seconds, endpoint.is_long)
        if reply.status == 200:
            self._answered.put(question, reply.content)
        return reply

    async def _review(self, question: Question) -> Reply:
        """Return a review, in the time that the policy and the API server leave: if need be, without an answer."""
        policy = self._settings.review
        assert policy is not None
        said = option(question, "timeout").removesuffix("s")
        allowed = float(said) - _NETWORK_SECONDS if said.replace(".", "", 1).isdecimal() else policy.seconds
        try:
            reply = await self._workers.ask(question, max(0.05, min(policy.seconds, allowed)))
        except RequestError as error:
            reply = problem_of(error)
        if reply.status in (422, 429, 500):
            reason = json.loads(reply.content)["detail"]
            found = unanswered(request_of(body_of(question)), policy, reason)
            reply = Reply(200, "", json.dumps(found).encode())
        return reply
