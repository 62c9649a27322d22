"""The server's certificate: a renewed one is used for new connections, a broken one is not."""

from __future__ import annotations

import os
import shutil
import ssl
from pathlib import Path

import pytest
import uvicorn

from memplan.serve.connection import RenewingServer

HERE = Path(__file__).parent


def test_a_renewed_certificate_is_taken_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(shutil.copy(HERE / name, tmp_path)) for name in ("certificate.pem", "key.pem")]
    config = uvicorn.Config("memplan:app", ssl_certfile=paths[0], ssl_keyfile=paths[1])
    config.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server = RenewingServer(config)
    for seconds, text, said in (
        (0, None, ""),
        (0, None, ""),
        (5, None, '"renewed": true'),
        (9, "x", '"renewed": false'),
    ):
        if text is not None:
            Path(paths[1]).write_text(text)
        os.utime(paths[1], (1e9 + seconds, 1e9 + seconds))
        server._renew()  # pyright: ignore[reportPrivateUsage]
        logged = capsys.readouterr().err
        assert said in logged if said else not logged
