"""The web page as a server sends it: its files, its form, and the answers to its questions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from mimetypes import guess_type
from pathlib import Path
from typing import Any

from memplan.core.errors import MemplanError
from memplan.core.package_data import data_path
from memplan.core.records import NamedTuple
from memplan.core.version import __version__

QUESTIONS = "/engine/answer"
_ENGINE, _FORM = "/engine/engine.json", "/engine/form.json"
HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self' https://huggingface.co; manifest-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}


class Page(NamedTuple):
    """The page.

    files   address -> file
    form    returns the rows of its form
    answer  returns the answer to a question; both are JSON
    """

    files: Mapping[str, Path]
    form: Callable[[], Mapping[str, Any]]
    answer: Callable[[str], str]

    @property
    def addresses(self) -> tuple[str, ...]:
        return ("/", _ENGINE, _FORM, *self.files)

    def content(self, path: str) -> tuple[bytes, str] | None:
        """Return what is at an address, and its media type; None if there is nothing."""
        path = "/index.html" if path == "/" else path
        if path in (_ENGINE, _FORM):
            facts = self.form() if path == _FORM else {"engine": "native", "version": __version__}
            return json.dumps(facts).encode(), "application/json"
        file = self.files.get(path)
        return None if file is None else (file.read_bytes(), guess_type(path)[0] or "application/octet-stream")


def page_files() -> Mapping[str, Path]:
    """Return the files of the built page by their addresses. Raises MemplanError if this installation has none."""
    folder = data_path("web/dist")
    files = {f"/{path.relative_to(folder).as_posix()}": path for path in folder.rglob("*") if path.is_file()}
    if "/index.html" not in files:
        raise MemplanError(
            "web: this installation has no page; run `npm ci && npm run build` in a checkout's web/, and install again"
        )
    return files
