"""How fast `memplan serve` answers, and how it stands hostile requests.

python -m benchmarks.serve                  answers a second, milliseconds and CPU, next to an empty endpoint
python -m benchmarks.serve hostile 10000    requests that no client should send; exit 1 if one is answered with 5xx
"""

from __future__ import annotations

import json
import os
import random
import re
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

_READY_SECONDS = 120
_MODELS = ("qwen2-7b", "llama-3.1-8b", "qwen3-8b", "mistral-7b-v0.3", "gemma-2-9b", "qwen3-32b", "mixtral-8x7b")
_TICK = os.sysconf("SC_CLK_TCK")


class Served(NamedTuple):
    """A server that runs: its port, the id of its process, and the file of its log."""

    port: int
    pid: int
    log: Path

    @property
    def processes(self) -> list[int]:
        """The server's process and its workers'."""
        stats = [_stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")]
        return [self.pid, *(each[0] for each in stats if each and each[1] == self.pid)]

    @property
    def cpu(self) -> float:
        """CPU seconds of the server and its workers so far."""
        return sum(stat[2] for pid in self.processes if (stat := _stat(pid)))

    @property
    def memory(self) -> list[int]:
        """MiB that the server, and then each of its workers, have in memory and share with nobody."""
        found: list[int] = []
        for pid in self.processes:
            with suppress(OSError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                found.append(sum(map(int, re.findall(r"^Private_\w+:\s+(\d+) kB", text, re.MULTILINE))) // 1024)
        return found


def _stat(pid: int) -> tuple[int, int, float] | None:
    """Return a process's id, its parent's, and its CPU seconds; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return pid, int(fields[1]), (int(fields[11]) + int(fields[12])) / _TICK


@contextmanager
def server(*options: str, command: str = "serve") -> Iterator[Served]:
    """Start a server on a free port of the loopback address, and stop it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with path.open("w") as log:
            words = [sys.executable, "-m", "memplan", command, "--port", "0", *options]
            process = subprocess.Popen(words, stdout=log, stderr=log)
        try:
            until = time.monotonic() + _READY_SECONDS
            while '"ready"' not in (text := path.read_text()):
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(text)
                time.sleep(0.05)
            port = int(re.findall(r':(\d+)", "pid"', text)[0])
            yield Served(port, process.pid, path)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def post(path: str, body: bytes, kind: bytes = b"application/json") -> bytes:
    """Return a request as it is sent."""
    head = b"POST %b HTTP/1.1\r\nHost: memplan\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (path.encode(), kind, len(body)) + body


class Load(NamedTuple):
    """The cost of a load of requests: their number, seconds, CPU seconds, and the milliseconds of each, sorted."""

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    seconds: float
    cpu: float
    client: float
    times: list[float]

    def share(self, of: float) -> float:
        return self.times[min(len(self.times) - 1, int(of * len(self.times)))]


def load(served: Served, requests: list[bytes], rate: float | None = None, connections: int = 16) -> Load:
    """Send the requests on kept connections: as fast as they are answered, or at a rate a second whatever happens."""
    with selectors.DefaultSelector() as selector:
        free = [_Connection(served.port) for _ in range(connections)]
        for each in free:
            selector.register(each.socket, selectors.EVENT_READ, each)
        waiting = iter(requests)
        start, cpu, own = time.perf_counter(), served.cpu, time.process_time()
        times: list[float] = []
        sent = 0
        while len(times) < len(requests):
            now = time.perf_counter()
            while free and sent < len(requests) and (rate is None or now >= start + sent / rate):
                free.pop().send(next(waiting), now if rate is None else start + sent / rate)
                sent += 1
            pause = 0.0 if free and sent < len(requests) and rate is not None else None
            for key, _ in selector.select(pause):
                if key.data.receive():
                    times.append((time.perf_counter() - key.data.due) * 1000)
                    free.append(key.data)
            if pause is not None and rate is not None:
                time.sleep(max(0.0, min(0.0005, start + sent / rate - time.perf_counter())))
        seconds = time.perf_counter() - start
        found = Load(len(times), seconds, served.cpu - cpu, time.process_time() - own, sorted(times))
        for key in [*selector.get_map().values()]:
            key.data.socket.close()
    return found


class _Connection:
    """A kept connection with one request at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.due = 0.0
        self._missing = -1
        self._head = b""

    def send(self, request: bytes, due: float) -> None:
        self.due, self._missing, self._head = due, -1, b""
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Take what has come, and return whether the answer is complete."""
        data = self.socket.recv(2**18)
        if not data:
            raise RuntimeError("the server closed a connection")
        if self._missing < 0:
            head, end, body = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                self._head = head
                return False
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError((head + body).decode("utf-8", "replace")[:500])
            length = re.search(rb"(?i)content-length: (\d+)", head)
            assert length is not None
            self._missing = int(length[1]) - len(body)
        else:
            self._missing -= len(data)
        return self._missing == 0


def runs(count: int, start: int = 0) -> Iterator[bytes]:
    """Yield distinct runs of a few models: methods and batches change, and every length is new."""
    for n in range(start, start + count):
        fields = {"model": _MODELS[n % len(_MODELS)], "method": ("qlora", "lora", "full")[n // 7 % 3], "gpu": "h100"}
        yield json.dumps({**fields, "batch": {"micro": 1 + n // 21 % 4, "sequence": 512 + n}}).encode()


def measure(count: int) -> None:
    verdicts = "/v1/estimate?fields=verdict.answer,bytes.allocated"
    again = [post("/v1/estimate", body) for body in runs(500)]
    kinds: dict[str, Callable[[int], list[bytes]]] = {
        "an empty endpoint (/healthz)": lambda _: [b"GET /healthz HTTP/1.1\r\nHost: memplan\r\n\r\n"] * count,
        "runs asked again, full answers": lambda n: [again[i % len(again)] for i in range(count)],
        "new runs, verdict and allocated": lambda n: [post(verdicts, body) for body in runs(count, n)],
        "new runs, full answers": lambda n: [post("/v1/estimate", body) for body in runs(count // 4, n)],
    }
    with server("--warm", ",".join(_MODELS), "--workers", "2") as served:
        load(served, again * 2)
        empty = 0.0
        print(f"{'':34}{'a second':>9}{'CPU us':>8}{'x empty':>9}{'client us':>10}   half of that: p50, p99 ms")
        for number, (name, requests) in enumerate(kinds.items(), 1):
            fast = load(served, requests(number * 10_000))
            rate = fast.count / fast.seconds
            half = load(served, requests(number * 10_000 + 5_000)[: int(rate * 2)], rate / 2)
            cpu = fast.cpu / fast.count * 1e6
            empty = empty or cpu
            own = fast.client / fast.count * 1e6
            shares = f"{half.share(0.5):6.1f}{half.share(0.99):6.1f}"
            print(f"{name:34}{rate:9,.0f}{cpu:8.0f}{cpu / empty:9.1f}{own:10.0f}   {shares}", flush=True)
        print(f"CPU a second of both processors: 2e6 us; load average {os.getloadavg()[0]:.1f}")


# Requests that no client should send. Each kind returns the bytes, in parts, and how the connection goes on.


class Hostile(NamedTuple):
    """A request in parts, with a pause between them; `ends` is `wait`, `half` for half-closed, or `leave`."""

    kind: str
    parts: tuple[bytes, ...]
    ends: str = "wait"
    pause: float = 0.0


def hostile(count: int, seed: int = 0) -> Iterator[Hostile]:
    """Yield hostile requests, of every kind in turn."""
    chance = random.Random(seed)
    kinds = (
        _huge,
        _deep,
        _wrong_types,
        _no_json,
        _slow,
        _half_closed,
        _no_http,
        _long_head,
        _places,
        _costly,
        _elsewhere,
    )
    for n in range(count):
        yield kinds[n % len(kinds)](chance)


def _huge(chance: random.Random) -> Hostile:
    size = chance.choice((2**21, 2**24, 2**40, 10**30))
    head = b"POST /v1/estimate HTTP/1.1\r\nHost: m\r\nContent-Type: application/json\r\n"
    if chance.random() < 0.5:
        body = b"%x\r\n%b\r\n" % (2**16, b"[" * 2**16) * 20
        return Hostile("huge", (head + b"Transfer-Encoding: chunked\r\n\r\n", body))
    return Hostile("huge", (head + b"Content-Length: %d\r\n\r\n" % size, b" " * 2**16), "half")


def _deep(chance: random.Random) -> Hostile:
    depth = chance.choice((65, 500, 5_000, 100_000))
    start, end = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    inner = start * depth + b"1" + end * depth
    body = chance.choice((inner, b'{"model":{"config":%b}}' % inner, b'{"runs":[%b]}' % inner))
    return Hostile("deep", (post(chance.choice(("/v1/estimate", "/v1/estimates", "/v1/plan")), body),))


def _value(chance: random.Random, depth: int = 0) -> Any:
    plain = (None, True, -1, 0, 2**63, 1e308, "", "nf4", "\x00", "\ud800", "x" * 1000, "../..", "qwen2-7b", 10**400)
    if depth > 2 or chance.random() < 0.6:
        return chance.choice(plain)
    if chance.random() < 0.5:
        return [_value(chance, depth + 1) for _ in range(chance.randrange(4))]
    return {
        chance.choice(("micro", "kind", "world", "config", "", "\u202e")): _value(chance, depth + 1) for _ in range(3)
    }


def _wrong_types(chance: random.Random) -> Hostile:
    fields = ("model", "method", "batch", "kernels", "parallelism", "gpu", "profile", "task", "serving", "loop", "also")
    run = {"model": "qwen2-7b", **{chance.choice(fields): _value(chance) for _ in range(chance.randrange(1, 4))}}
    path, body = chance.choice(
        (
            ("/v1/estimate", run),
            ("/v1/estimates", {"runs": [run, _value(chance)]}),
            ("/v1/plan", {"run": run, "mode": _value(chance)}),
            ("/v1/fits", {"run": run, "pool": _value(chance)}),
            ("/v1/place", {"jobs": [run, _value(chance)], "pool": [chance.choice(("2x 3090", _value(chance)))]}),
            ("/v1/check", {"files": {"a.yaml": json.dumps(run)}, "gpu": ["3090"], "gpus": _value(chance)}),
        )
    )
    return Hostile("wrong types", (post(path, json.dumps(body).encode()),))


def _no_json(chance: random.Random) -> Hostile:
    bodies = (
        b"",
        b"\xff\xfe",
        b"{",
        b"[1]",
        b"null",
        b'{"model": NaN}',
        b'{"a":1,"a":2}',
        b'{"model": 1%b}' % (b"0" * 9999),
    )
    return Hostile("no JSON", (post("/v1/estimate", chance.choice(bodies)),))


def _slow(chance: random.Random) -> Hostile:
    request = post("/v1/estimate", b'{"model":"qwen2-7b"}')
    cut = chance.randrange(1, len(request))
    return Hostile("slow", (request[:cut], request[cut : cut + 1]), "leave", chance.uniform(0, 0.05))


def _half_closed(chance: random.Random) -> Hostile:
    request = post("/v1/estimate", b'{"model":"qwen2-7b"}')
    return Hostile("half-closed", (request[: chance.choice((len(request), len(request) - 3, 20))],), "half")


def _no_http(chance: random.Random) -> Hostile:
    lines = (
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
        bytes(chance.randrange(256) for _ in range(200)),
        b"GET /\xff HTTP/1.1\r\nHost: m\r\n\r\n",
        b"POST /v1/estimate HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/estimate HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: m\r\n\r\n" * 500,
    )
    return Hostile("no HTTP", (chance.choice(lines),), "half")


def _long_head(chance: random.Random) -> Hostile:
    heads = (
        b"GET /%b HTTP/1.1\r\nHost: m\r\n\r\n" % (b"a" * 10**6),
        b"GET / HTTP/1.1\r\n%b\r\n" % b"".join(b"x-%d: %b\r\n" % (n, b"y" * 1000) for n in range(1000)),
        b"GET /v1/gpus?%b HTTP/1.1\r\nHost: m\r\n\r\n" % (b"a=b&" * 1000),
        b"GET /v1/gpus?text=%b HTTP/1.1\r\nHost: m\r\n\r\n" % chance.choice((b"%00", b"%ff", b"x" * 9999)),
    )
    return Hostile("long head", (chance.choice(heads),))


def _places(chance: random.Random) -> Hostile:
    names = (
        "/etc/passwd",
        "~/.ssh/id_rsa",
        "../../x.json",
        "file:///etc/passwd",
        "http://169.254.169.254/a/b",
        "a/b@c",
    )
    name = chance.choice((*names, "/proc/self/environ", "\x00.gguf", "C:\\x.json", "/dev/zero"))
    text = f"base_model: {json.dumps(name)}\ndeepspeed: {json.dumps(name)}\n"
    files = {"a.yaml": text, "b.sh": f"trl sft --config {name}\n", "Modelfile": f"FROM {name}\n"}
    body = chance.choice(
        (
            ("/v1/estimate", {"model": name}),
            ("/v1/check", {"files": files, "gpu": ["t4"]}),
            ("/v1/check", {"files": {name: "x"}, "gpu": ["t4"]}),
        )
    )
    return Hostile("places", (post(body[0], json.dumps(body[1]).encode()),))


def _costly(chance: random.Random) -> Hostile:
    config = {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": chance.choice((2**20, 2**40))}
    config |= {"num_attention_heads": 32, "intermediate_size": 11008, "vocab_size": 2 ** chance.randrange(10, 30)}
    config["junk"] = chance.randbytes(50_000).hex()
    bodies: tuple[tuple[str, Any], ...] = (
        ("/v1/estimate", {"model": {"config": config}, "batch": {"sequence": 2**40, "micro": 2**40}}),
        ("/v1/estimate", {"model": "qwen2-7b", "parallelism": {"world": 2**20, "dp": 2**20, "strategy": "zero3"}}),
        ("/v1/estimate", {"model": "qwen2-7b", "task": "generate", "batch": {"new_tokens": 2**40}}),
        (
            "/v1/estimates",
            {"runs": [{"model": "qwen2-7b", "batch": {"sequence": n}} for n in range(chance.choice((9, 1001)))]},
        ),
        (
            "/v1/check",
            {"files": {"a.yaml": "a: &a [1,1,1,1]\nb: &b [*a,*a,*a,*a]\nc: [*b,*b,*b]\n" * 9}, "gpu": ["t4"]},
        ),
        (
            "/v1/place",
            {"jobs": [{"model": "qwen2-7b"}] * 99, "pool": [{"gpu": "t4", "count": chance.choice((9, 2**40))}]},
        ),
        ("/v1/check", {"files": {"a.yaml": "[" * 10_000, "b.py": "(" * 50_000}, "gpu": ["t4"]}),
    )
    path, body = chance.choice(bodies)
    return Hostile("costly", (post(path, json.dumps(body).encode()),))


def _elsewhere(chance: random.Random) -> Hostile:
    requests = (
        b"DELETE /v1/estimate HTTP/1.1\r\nHost: m\r\n\r\n",
        b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: m\r\n\r\n",
        b"GET /docs HTTP/1.1\r\nHost: m\r\n\r\n",
        post("/v1/estimate", b"model=qwen2-7b", b"application/x-www-form-urlencoded"),
        post("/review", b"{}"),
        b"GET /v1/gpus HTTP/1.1\r\nHost: m\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
        b"HEAD /v1/models HTTP/1.0\r\n\r\n",
    )
    return Hostile("elsewhere", (chance.choice(requests),))


def attack(port: int, request: Hostile, seconds: float = 60.0) -> int:
    """Send a hostile request, and return the status of its first answer; 0 if the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        try:
            for part in request.parts:
                connection.sendall(part)
                if request.pause:
                    time.sleep(request.pause)
            if request.ends == "leave":
                return 0
            if request.ends == "half":
                connection.shutdown(socket.SHUT_WR)
            data = connection.recv(4096)
        except (ConnectionError, OSError) as error:  # the server closes what it refuses
            if isinstance(error, TimeoutError):
                raise
            return 0
    return int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/1.1 ") else 0


def withstand(count: int) -> int:
    """Send hostile requests from 16 clients at once; print their statuses and the server's memory. Return 1 if one is
    answered with 5xx, or the log has a trace."""
    with server("--workers", "2", "--seconds", "20") as served, ThreadPoolExecutor(16) as clients:
        statuses: dict[str, Counter[int]] = {}
        start = time.monotonic()
        requests = list(hostile(count))
        for end in range(0, count, max(1, count // 5)):
            part = requests[end : end + max(1, count // 5)]
            for request, status in zip(part, clients.map(lambda each: attack(served.port, each), part), strict=True):
                statuses.setdefault(request.kind, Counter())[status] += 1
            done = end + len(part)
            print(
                f"{done:7,} requests, {time.monotonic() - start:5.0f} s, MiB of each process {served.memory}",
                flush=True,
            )
        stalled = [Hostile("stalled", (part,)) for part in (b"", b"POST /v1/est", post("/v1/plan", b"{}")[:-1])] * 5
        statuses["stalled"] = Counter(clients.map(lambda each: attack(served.port, each), stalled))
        for kind, counted in statuses.items():
            print(f"{kind:12} {dict(sorted(counted.items()))}")
        log = served.log.read_text()
        failed = sum(n for counted in statuses.values() for status, n in counted.items() if status >= 500)
        errors = [line for line in log.splitlines() if '"event": "error"' in line]
        print(f"{failed} answered with 5xx; {log.count('Traceback')} traces; errors logged: {Counter(errors)}")
        still = load(served, [post("/v1/estimate", body) for body in runs(50)])
        print(f"then {still.count} estimates in {still.seconds:.1f} s")
    return int(failed > 0 or "Traceback" in log)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["hostile"]:
        sys.exit(withstand(int(words[1]) if words[1:] else 10_000))
    measure(int(words[0]) if words else 4_000)
