"""A question to a worker process and its reply, and how they are written on the socket between them."""

from __future__ import annotations

import struct

from memplan.core.records import NamedTuple


class Question(NamedTuple):
    """A request without its transport: the operation, the query's text and the body."""

    operation: str
    query: str
    body: bytes

    def packed(self) -> bytes:
        words = f"{self.operation}?{self.query}".encode()
        return _QUESTION.pack(len(words), len(self.body)) + words + self.body


class Reply(NamedTuple):
    """An HTTP status, the code of a problem, and the JSON; `retires` if the process that sends it ends."""

    status: int
    code: str
    content: bytes
    retires: bool = False

    def packed(self) -> bytes:
        code = self.code.encode()
        return _REPLY.pack(self.status, self.retires, len(code), len(self.content)) + code + self.content


_QUESTION = struct.Struct("!II")  # bytes of the words and of the body
_REPLY = struct.Struct("!H?HI")  # status, whether it retires, bytes of the code and of the content


def question_size(head: bytes) -> int:
    """Return the bytes that follow a question's head."""
    return sum(_QUESTION.unpack(head))


def question_of(head: bytes, rest: bytes) -> Question:
    words, _ = _QUESTION.unpack(head)
    operation, _, query = rest[:words].decode().partition("?")
    return Question(operation, query, rest[words:])


def reply_of(received: bytearray) -> Reply | None:
    """Return the reply that was received; None if some of it is still to come."""
    if len(received) < _REPLY.size:
        return None
    status, retires, code, content = _REPLY.unpack_from(received)
    start = _REPLY.size + code
    if len(received) < start + content:
        return None
    return Reply(status, received[_REPLY.size : start].decode(), bytes(received[start : start + content]), retires)


HEAD = _QUESTION.size
