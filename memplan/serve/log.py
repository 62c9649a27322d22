"""The log: a JSON object per line on standard error, without bodies, and without traces."""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress


def log(event: str, **facts: object) -> None:
    line = json.dumps({"time": round(time.time(), 3), "event": event, **facts})
    with suppress(OSError, ValueError):  # nobody reads it any more
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()


class JSONHandler(logging.Handler):
    """Writes the records of the server's libraries as lines of the log."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        log("server", level=record.levelname.lower(), message=record.getMessage(), error=error)
