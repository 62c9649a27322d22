"""Worker processes: each answers one question at a time, and one that is late, has grown or died is replaced."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from memplan.serve.app import Answered
from memplan.serve.messages import HEAD, Question, Reply, question_of, question_size, reply_of
from memplan.serve.problems import RequestError
from memplan.serve.process import Answering, answered
from memplan.serve.workers import Workers

GROWN: list[bytes] = []


def answer(question: Question) -> Reply:
    """Do what the operation says, and return the id of the process."""
    match question.operation:
        case "sleep":
            time.sleep(float(question.query))
        case "die":
            os._exit(3)
        case "grow":
            GROWN.append(b"x" * 2**30)
        case "read":
            Path(question.query).read_bytes()
        case "connect":
            socket.create_connection(("127.0.0.1", 9))
        case "run":
            subprocess.run(["true"], check=True)
        case "write":
            Path(question.query).write_text("")
        case "fail":
            raise ZeroDivisionError
        case _:
            pass
    return Reply(200, "", str(os.getpid()).encode() + question.body)


def with_workers(
    asked: Callable[[Workers], Awaitable[None]], count: int = 1, waiting: int = 8, is_confined: bool = False
) -> Workers:
    workers = Workers(answer, count, waiting, is_confined)

    async def run() -> None:
        await workers.start()
        try:
            await asked(workers)
        finally:
            workers.stop()
            await asyncio.sleep(0)

    asyncio.run(run())
    return workers


def ask(
    workers: Workers, operation: str, query: str = "", seconds: float = 60.0, is_long: bool = False
) -> Awaitable[Reply]:
    return workers.ask(Question(operation, query, b"!"), seconds, is_long)


def test_questions_and_replies_are_read_as_they_were_written() -> None:
    for body in (b"", b"\x00\xff" * 5000):
        question, reply = Question("estimate", "fields=a?b", body), Reply(422, "unknown_name", body, retires=True)
        packed = question.packed()
        assert question_of(packed[:HEAD], packed[HEAD:]) == question
        assert question_size(packed[:HEAD]) == len(packed) - HEAD
        assert reply_of(bytearray(reply.packed())) == reply
        assert [reply_of(bytearray(reply.packed()[:n])) for n in (0, 5, len(reply.packed()) - 1)] == [None] * 3


def test_questions_wait_for_a_process_and_each_has_its_own_reply() -> None:
    async def asked(workers: Workers) -> None:
        replies = await asyncio.gather(*(ask(workers, "id") for _ in range(8)))
        assert len({reply.content for reply in replies}) <= 2
        assert all(reply.content.endswith(b"!") for reply in replies)

    assert with_workers(asked, count=2).restarts == {"grown": 0, "late": 0, "ended": 0}


def test_too_many_questions_are_refused() -> None:
    async def asked(workers: Workers) -> None:
        first = asyncio.ensure_future(ask(workers, "sleep", "0.2"))
        found = await asyncio.gather(*(ask(workers, "id") for _ in range(9)), return_exceptions=True)
        refused = [each for each in found if isinstance(each, RequestError)]
        assert [(each.status, each.code) for each in refused] == [(429, "too_many_requests")]
        assert (await first).status == 200

    with_workers(asked)


def test_a_late_process_is_replaced() -> None:
    async def asked(workers: Workers) -> None:
        before = (await ask(workers, "id")).content
        with pytest.raises(RequestError) as late:
            await ask(workers, "sleep", "60", seconds=0.1)
        assert (late.value.status, late.value.code) == (422, "time_limit")
        assert (await ask(workers, "id")).content != before

    assert with_workers(asked).restarts["late"] == 1


def test_a_process_that_dies_is_replaced() -> None:
    async def asked(workers: Workers) -> None:
        with pytest.raises(RequestError) as died:
            await ask(workers, "die")
        assert (died.value.status, died.value.code) == (500, "internal")
        assert (await ask(workers, "id")).status == 200

    with_workers(asked)


def test_a_process_that_has_grown_is_replaced_after_its_reply() -> None:
    async def asked(workers: Workers) -> None:
        grown = (await ask(workers, "grow")).content
        assert (await ask(workers, "id")).content != grown

    assert with_workers(asked).restarts["grown"] == 1


def test_long_questions_never_have_all_processes() -> None:
    async def asked(workers: Workers) -> None:
        long = [asyncio.ensure_future(ask(workers, "sleep", "0.3", is_long=True)) for _ in range(3)]
        await asyncio.sleep(0)
        assert (await ask(workers, "id")).status == 200
        assert not any(each.done() for each in long[1:])
        await asyncio.gather(*long)

    with_workers(asked, count=2)


def test_one_who_leaves_while_waiting_takes_no_process_along() -> None:
    async def asked(workers: Workers) -> None:
        first = asyncio.ensure_future(ask(workers, "sleep", "0.2"))
        await asyncio.sleep(0)
        left = asyncio.ensure_future(ask(workers, "id"))
        await asyncio.sleep(0)
        left.cancel()
        await first
        assert workers.waiting == 0
        assert (await ask(workers, "id")).status == 200

    with_workers(asked)


@pytest.mark.parametrize(
    ("operation", "query"),
    [("read", "/etc/hostname"), ("read", __file__ + "x"), ("write", __file__), ("connect", ""), ("run", "")],
)
def test_a_confined_process_reads_and_starts_nothing(operation: str, query: str) -> None:
    async def asked(workers: Workers) -> None:
        reply = await ask(workers, operation, query)
        assert (reply.status, reply.code) == (422, "invalid_run")
        assert b"this server" in reply.content

    with_workers(asked, is_confined=True)


def test_an_unexpected_error_is_a_problem_without_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    answering: Answering = answer
    reply = answered(Question("fail", "", b""), answering)
    assert (reply.status, reply.code) == (500, "internal")
    assert b"ZeroDivision" not in reply.content
    logged = capsys.readouterr().err
    assert ("ZeroDivisionError in " in logged, "Traceback" in logged) == (True, False)


def test_kept_answers_are_the_last_used_and_bounded() -> None:
    kept = Answered(8_000)
    questions = [Question("estimate", "", b"%d" % n) for n in range(20)]
    for question in questions:
        kept.put(question, question.body * 400)
        kept.get(questions[0])
    found = [question for question in questions if kept.get(question) is not None]
    assert found[0] == questions[0]
    assert found[1:] == questions[-len(found) + 1 :]
    assert 0 < sum(len(kept.get(question) or b"") for question in found) <= 8_000
    large = Question("estimate", "", b"large")
    kept.put(large, b"x" * 2_000)
    assert kept.get(large) is None
