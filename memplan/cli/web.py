"""`memplan web`: the page on this machine, with this installation as its engine."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from memplan.cli.commands import Subcommand, own
from memplan.cli.outcome import show
from memplan.cli.page import answer, form
from memplan.core.errors import SpecError
from memplan.serve.page import HEADERS, QUESTIONS, Page, page_files

_LARGEST = 2**24  # bytes of a question


def command(name: str) -> Subcommand:
    port = own("Port of the page; 0 for a free one. Default 8800.", int)
    return Subcommand(name, web, {"Options": {"port": port}}, serves=True)


def web(given: Mapping[str, Any]) -> int:
    """Show the page at http://127.0.0.1:8800, answered by this installation. Only this machine reaches it.

    Ends at Ctrl-C.
    """
    port: int = given.get("port", 8800)
    if not 0 <= port < 2**16:
        raise SpecError(f"port: must be at least 0 and at most 65,535, not {port:,}", "port")
    page = Page(page_files(), form, answer)
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), handler(page))
    except OSError as error:
        raise SpecError(f"port: {port} cannot be used ({error.strerror}); choose another, or 0", "port") from None
    with server:
        show(f"http://127.0.0.1:{server.server_port}\n")
        server.serve_forever()
    return 0


def handler(page: Page) -> type[BaseHTTPRequestHandler]:
    """Return the class that answers requests: for the page's files, for its form, and for answers to questions."""
    one_at_a_time = Lock()  # a question's command has this process's output for itself

    class PageHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            content = page.content(self.path.partition("?")[0])
            if not self._is_own():
                self._send(HTTPStatus.FORBIDDEN, b"only for this machine\n")
            elif content is None:
                self._send(HTTPStatus.NOT_FOUND, b"no such file\n")
            else:
                self._send(HTTPStatus.OK, *content)

        def do_POST(self) -> None:
            size = self.headers.get("Content-Length", "")
            self.close_connection = True
            if not self._is_own() or self.headers.get_content_type() != "application/json":
                self._send(HTTPStatus.FORBIDDEN, b"only for the page\n")
            elif self.path != QUESTIONS:
                self._send(HTTPStatus.NOT_FOUND, b"no such question\n")
            elif not size.isdecimal() or int(size) > _LARGEST:
                self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, b"a question has at most 16 MiB\n")
            else:
                question = self.rfile.read(int(size)).decode("utf-8", "replace")
                with one_at_a_time:
                    text = page.answer(question)
                self._send(HTTPStatus.OK, text.encode(), "application/json")

        def _is_own(self) -> bool:
            """Whether the request is from this page, and not from a site that has its name lead here."""
            assert isinstance(self.server, ThreadingHTTPServer)
            hosts = {f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")}
            origins = {None, *(f"http://{host}" for host in hosts)}
            return self.headers.get("Host") in hosts and self.headers.get("Origin") in origins

        def _send(self, status: HTTPStatus, body: bytes, type: str = "text/plain") -> None:
            self.send_response(status)
            for name, value in (*HEADERS.items(), ("Content-Type", type), ("Content-Length", str(len(body)))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    return PageHandler
