"""Problems as RFC 9457 has them: a status, a code and the field, and no trace."""

from __future__ import annotations

import json
from collections.abc import Iterable
from http import HTTPStatus
from traceback import extract_tb

from memplan.core.errors import InternalError, MemplanError, SpecError, printable
from memplan.serve.messages import Reply

MEDIA_TYPE = "application/problem+json"
_MOST_SHOWN = 400  # characters of a detail


class RequestError(MemplanError):
    """A request that is wrong before it is a run: no JSON, too deep, unknown fields of the answer."""

    def __init__(self, status: int, code: str, message: str, field: str = "") -> None:
        super().__init__(message, field)
        self.status, self.code = status, code


def problem(status: int, code: str, detail: str, field: str = "", suggestions: Iterable[str] = ()) -> Reply:
    """Return the reply that says a problem."""
    facts: dict[str, object] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    facts |= {"code": code, "detail": printable(detail, _MOST_SHOWN)}
    facts |= {"field": field, "suggestions": [*suggestions]} if field or suggestions else {}
    return Reply(status, code, json.dumps(facts).encode())


def problem_of(error: Exception) -> Reply:
    """Return the problem that an error is to the one who asked."""
    match error:
        case RequestError():
            return problem(error.status, error.code, str(error), error.field)
        case InternalError():
            return problem(500, error.code, str(error))
        case MemplanError():
            return problem(422, error.code, str(error), error.field, error.suggestions)
        case RecursionError():
            return problem(422, "too_deep", "it is nested too deeply")
        case MemoryError():
            return problem(422, "too_large", "answering takes more memory than this server allows")
        case OSError():
            return problem(422, SpecError.code, f"{error.strerror or error}")
        case _:
            return problem(500, InternalError.code, "memplan failed at this run; please report it")


def reason_of(error: Exception) -> str:
    """Return where an error that nobody expected is from, for the log."""
    frame = extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {frame.filename.rpartition('memplan/')[2]}:{frame.lineno} ({frame.name})"
