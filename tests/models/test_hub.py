"""The Hub, played by a small local server: its models are answered, and failures are one line."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from memplan import RunSpec, estimate, find_model
from memplan.cli.app import app
from memplan.core.errors import ConfigError, FactsMissingError, MemplanError
from memplan.models import hub
from memplan.models.cards import find_config
from memplan.models.hub import fetch
from tests.checkpoints import TINY, folder_of, of_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Served(NamedTuple):
    """Serves repositories, each a folder; ids in `failing` get a status and the Hub's error code."""

    folders: dict[str, Path]
    failing: dict[str, tuple[int, str]]
    asked: list[str]
    sends: dict[str, dict[str, Any]]  # file -> how it is sent: `more` bytes than said, `slowly`, with other headers
    licence: str = "apache-2.0"


def _handler(served: Served) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        _more, _slowly = 0, False

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(False)

        def do_GET(self) -> None:
            self._answer(True)

        def _answer(self, body: bool) -> None:
            path = self.path.partition("?")[0].removeprefix("/api/models").strip("/")
            served.asked.append(path)
            hf_id = "/".join(path.split("/")[:2])
            folder = served.folders.get(hf_id)
            if folder is None or hf_id in served.failing:
                return self._fail(*served.failing.get(hf_id, (404, "RepoNotFound")))
            rest = path.removeprefix(hf_id).strip("/").split("/")
            if len(rest) > 1 and rest[1] not in ("main", COMMIT, "v1"):
                return self._fail(404, "RevisionNotFound")
            if rest[0] != "resolve":
                files = [{"rfilename": p.name, "size": p.stat().st_size} for p in sorted(folder.iterdir())]
                said = {"id": hf_id, "sha": COMMIT, "siblings": files, "cardData": {"license": served.licence}}
                return self._send(json.dumps(said).encode(), body, {"Content-Type": "application/json"})
            file = folder / rest[2]
            if not file.is_file():
                return self._fail(404, "EntryNotFound")
            headers = {"ETag": f'"{file.name}-{file.stat().st_size}"', "X-Repo-Commit": COMMIT}
            sends = served.sends.get(file.name, {})
            self._more, self._slowly = sends.get("more", 0), sends.get("slowly", False)
            return self._send(file.read_bytes(), body, {**headers, **sends.get("headers", {})})

        def _send(self, content: bytes, body: bool, headers: dict[str, str]) -> None:
            asked, status = self.headers.get("Range"), 200
            if body and self._more:
                content += b" " * self._more
            if asked and body and not self._more:
                start, end = (int(n) if n else len(content) - 1 for n in asked.removeprefix("bytes=").split("-"))
                headers = {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"}
                content, status = content[start : end + 1], 206
            self.send_response(status)
            for name, it in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, it)
            self.end_headers()
            with suppress(OSError):  # the reader has gone
                for i in range(len(content)) if body and self._slowly else ():
                    self.wfile.write(content[i : i + 1])
                    time.sleep(0.05)
                if body and not self._slowly:
                    self.wfile.write(content)

        def _fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Served]:
    """Return the fake Hub, with an empty cache."""
    hub = Served({}, {}, [], {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    at = f"http://127.0.0.1:{server.server_port}"
    template = f"{at}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", at)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()
    getattr(huggingface_hub, "close_session", lambda: None)()


@pytest.fixture
def tiny(served: Served, tmp_path: Path) -> str:
    served.folders["some/tiny"] = folder_of(tmp_path / "repo", TINY, of_model(TINY), shards=2)
    return "some/tiny"


def line(error: pytest.ExceptionInfo[MemplanError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_hub_model_is_answered_from_its_config_and_headers(tiny: str) -> None:
    model = find_model(tiny, online=True)
    answer = estimate(RunSpec(model=tiny, method="lora"), model=model)
    assert answer.bytes.allocated == estimate(RunSpec(model={"config": TINY}, method="lora")).bytes.allocated
    assert model.checkpoint is not None
    assert model.checkpoint.where == f"{tiny}@{COMMIT[:12]}"
    assert sum(tensor.elements for tensor in model.checkpoint.tensors) == answer.parameters.total
    assert fetch(tiny)[2:] == (COMMIT, "apache-2.0")


def test_afterwards_the_cache_answers_without_the_hub(tiny: str, served: Served) -> None:
    with pytest.raises(FactsMissingError) as error:
        find_model(tiny)
    assert "--online" in line(error)
    find_model(tiny, online=True)
    served.folders.clear()
    served.asked.clear()
    assert estimate(RunSpec(model=tiny)).parameters.total == estimate(RunSpec(model={"config": TINY})).parameters.total
    assert served.asked == []


def test_no_weights_are_downloaded(tiny: str, tmp_path: Path) -> None:
    find_model(tiny, online=True)
    kept = sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert kept < 20_000


def test_a_shape_that_contradicts_the_config_is_seen_before_anything_is_downloaded(tiny: str, served: Served) -> None:
    tensors = {**of_model(TINY), "lm_head.weight": ("BF16", (500, 64))}
    folder_of(served.folders[tiny], TINY, tensors, shards=2)
    with pytest.raises(ConfigError) as error:
        estimate(RunSpec(model=tiny), model=find_model(tiny, online=True))
    assert line(error) == "model: lm_head.weight is 500 x 64 in the checkpoint, and 512 x 64 by its config"


def test_a_revision_is_requested_and_cached_separately(tiny: str, served: Served) -> None:
    find_model(f"{tiny}@v1", online=True)
    assert any("/revision/v1" in path for path in served.asked)
    assert find_model(f"{tiny}@v1").num_hidden_layers == 3
    with pytest.raises(FactsMissingError):
        find_model(tiny)  # main was not requested


def test_missing_hub_files_are_one_error_line(tiny: str, served: Served, tmp_path: Path) -> None:
    served.failing["gated/model"] = (403, "GatedRepo")
    served.folders["no/config"] = tmp_path / "empty"
    served.failing["broken/hub"] = (500, "")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for name, words in (
        ("nobody/nothing", "is not on the Hub, or private"),
        (f"{tiny}@nowhere", "has no revision 'nowhere'"),
        ("gated/model", "is gated on the Hub: accept its terms"),
        ("no/config", "it has GGUF files; download one (model-Q4_K_M.gguf)"),
        ("broken/hub", "answered with status 500"),
        ("not an id", "is no Hugging Face id"),
        ("a/b/c", "is no Hugging Face id"),
    ):
        with pytest.raises(FactsMissingError) as error:
            find_model(name, online=True)
        assert words in line(error), name


def test_without_a_connection_it_is_one_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FactsMissingError) as error:
        find_model(tiny, online=True)
    assert "no connection to the Hub" in line(error)


def test_a_hub_that_is_silent_is_one_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReadTimeout(*huggingface_hub.errors.HfHubHTTPError.__bases__):  # type: ignore[misc]
        pass

    def silent(*_: object, **__: object) -> None:
        raise ReadTimeout("timed out")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", silent)
    with pytest.raises(FactsMissingError) as error:
        find_model(tiny, online=True)
    assert "did not answer in time" in line(error)


def test_an_answer_that_drips_ends_in_time(tiny: str, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_TIMEOUT", 0.3)
    served.sends["config.json"] = {"slowly": True}
    with pytest.raises(FactsMissingError) as error:
        find_model(tiny, online=True)
    assert "did not answer in time" in line(error)


def test_a_config_longer_than_the_hub_says_is_not_stored(tiny: str, served: Served, tmp_path: Path) -> None:
    served.sends["config.json"] = {"more": 2**26}
    with pytest.raises(FactsMissingError) as error:
        find_model(tiny, online=True)
    assert "is longer than 33,554,432 bytes" in line(error)
    assert sum(path.stat().st_size for path in (tmp_path / "cache").rglob("*") if path.is_file()) < 2**26


def test_a_server_that_ignores_ranges_is_a_note(tiny: str, served: Served) -> None:
    for file in served.folders[tiny].glob("*.safetensors"):
        served.sends[file.name] = {"more": 2**22}
    checkpoint = find_model(tiny, online=True).checkpoint
    assert checkpoint is not None
    assert "is longer than 100,001 bytes" in checkpoint.why_not


def test_a_tag_that_is_a_path_writes_nothing(tiny: str, served: Served, tmp_path: Path) -> None:
    served.sends["config.json"] = {"headers": {"ETag": '"../../../outside"'}}
    with pytest.raises(FactsMissingError) as error:
        find_model(tiny, online=True)
    assert "which is a path" in line(error)
    assert not [*tmp_path.rglob("outside*")]


def test_offline_the_cache_answers_or_it_is_one_line(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_model(tiny, online=True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    getattr(huggingface_hub, "close_session", lambda: None)()
    run = RunSpec(model=tiny)
    assert estimate(run, model=find_model(tiny, online=True)).notes == (
        "the checkpoint was not looked at: HF_HUB_OFFLINE is set",
    )
    with pytest.raises(FactsMissingError) as error:
        find_model("some/other", online=True)
    assert "HF_HUB_OFFLINE is set" in line(error)


def test_headers_that_cannot_be_read_are_a_note(tiny: str, served: Served) -> None:
    (served.folders[tiny] / "model-00001-of-00002.safetensors").write_bytes(b"\x05" + bytes(7) + b"\x80\x04abc")
    _, note = estimate(RunSpec(model=tiny), model=find_model(tiny, online=True)).notes
    assert note.startswith("the checkpoint was not looked at: ")
    (served.folders[tiny] / "model.safetensors.index.json").unlink()
    assert estimate(RunSpec(model=tiny), model=find_model(tiny, online=True)).notes == (
        f"facts from the Hugging Face Hub: {tiny}@{COMMIT[:12]}",
        "the checkpoint was not looked at: there are no safetensors",
    )


@pytest.mark.parametrize("entry", [{"dtype": "BF16", "shape": [-1], "data_offsets": [0, 8]}, {"dtype": 3}, [], 7])
def test_hostile_headers_are_one_line(tiny: str, served: Served, entry: Any) -> None:
    body = json.dumps({"x": entry}).encode()
    served.folders[tiny].joinpath("model.safetensors").write_bytes(len(body).to_bytes(8, "little") + body)
    try:
        model = find_model(tiny, online=True)
    except ConfigError as error:
        said = str(error)
    else:
        assert model.checkpoint is not None
        said = model.checkpoint.why_not
    assert said
    assert "\n" not in said


def test_a_config_that_is_too_large_is_not_downloaded(tiny: str, served: Served) -> None:
    with (served.folders[tiny] / "config.json").open("wb") as file:
        file.truncate(2**24 + 1)
    with pytest.raises(ConfigError) as error:
        find_model(tiny, online=True)
    assert "16,777,217 bytes" in line(error)
    assert not any("resolve" in path for path in served.asked)


def test_an_index_that_is_too_large_is_not_downloaded(tiny: str, served: Served) -> None:
    with (served.folders[tiny] / "model.safetensors.index.json").open("wb") as file:
        file.truncate(2**25 + 1)
    checkpoint = find_model(tiny, online=True).checkpoint
    assert checkpoint is not None
    assert "33,554,433 bytes" in checkpoint.why_not
    assert not any("index.json" in path for path in served.asked)


def test_headers_are_of_the_commit_that_the_config_is_of(tiny: str, served: Served) -> None:
    find_model(tiny, online=True)
    assert [path for path in served.asked if "safetensors" in path and "resolve" in path]
    assert all(COMMIT in path for path in served.asked if "safetensors" in path and "resolve" in path)


def test_thousands_of_weight_files_are_not_requested(tiny: str, served: Served) -> None:
    for i in range(hub._MAX_FILES + 1):
        (served.folders[tiny] / f"extra-{i}.safetensors").touch()
    checkpoint = find_model(tiny, online=True).checkpoint
    assert checkpoint is not None
    assert f"there are {hub._MAX_FILES + 3:,} files of weights" in checkpoint.why_not
    assert not any("safetensors" in path for path in served.asked)


def test_an_adapter_with_gguf_files_is_still_an_adapter(served: Served, tmp_path: Path) -> None:
    served.folders["an/adapter"] = tmp_path / "adapter"
    (tmp_path / "adapter").mkdir()
    for name in ("adapter_config.json", "adapter.gguf"):
        (tmp_path / "adapter" / name).touch()
    with pytest.raises(FactsMissingError) as error:
        find_model("an/adapter", online=True)
    assert "it is an adapter; ask for its base model" in line(error)


def test_a_custom_licence_is_shown_by_name(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = huggingface_hub.HfApi.model_info

    def other(*args: Any, **more: Any) -> Any:
        info = asked(*args, **more)
        info.card_data.license, info.card_data.license_name = "other", "tiny-licence"
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", other)
    assert fetch(tiny).licence == "tiny-licence"


def test_huggingface_hub_prints_nothing(
    tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import logging

    asked = huggingface_hub.HfApi.model_info

    levels: list[int] = []

    def listens(*args: Any, **more: Any) -> Any:
        levels.append(logging.get_verbosity())
        return asked(*args, **more)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", listens)
    before = logging.get_verbosity()
    find_model(tiny, online=True)
    assert capsys.readouterr() == ("", "")
    assert levels == [logging.ERROR]
    assert logging.get_verbosity() == before


def test_cards_come_before_the_hub(served: Served) -> None:
    assert find_model("Qwen/Qwen2-7B", online=True).name == "qwen2-7b"
    assert find_config("qwen2-7b", online=True)["hidden_size"] == 3584
    assert served.asked == []


def memplan(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        app(args=list(args))
    out, err = capsys.readouterr()
    assert isinstance(end.value.code, int)
    return end.value.code, out, err


def test_the_command_asks_the_hub(tiny: str, served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = memplan(capsys, tiny, "--online", "--revision", "v1", "--method", "lora", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["run"]["model"] == f"{tiny}@v1"
    asked = len(served.asked)
    code, out, err = memplan(capsys, tiny, "--online", "--gpu", "4090", "--gpu", "3090", "--gpu", "a100-80gb", "--json")
    assert (code, len(json.loads(out)), err) == (0, 3, "")
    assert len(served.asked) - asked <= asked  # once for all cards
    code, out, err = memplan(capsys, "nobody/nothing", "--online")
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    code, out, err = memplan(capsys, f"{tiny}@v1", "--online", "--revision", "v1")
    assert (code, err) == (
        2,
        "memplan: revision (--revision): only applies to a Hugging Face id that has no @revision itself\n",
    )


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({}, Path.home() / ".cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, Path("/x/huggingface/hub")),
        ({"HF_HOME": "$XDG_CACHE_HOME/h", "XDG_CACHE_HOME": "/x"}, Path("/x/h/hub")),
        ({"HF_HUB_CACHE": "~/c"}, Path.home() / "c"),
    ],
)
def test_the_caches_folder_is_known_without_huggingface_hub(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: Path
) -> None:
    assert hub.cache_folder() == Path(huggingface_hub.constants.HF_HUB_CACHE)
    monkeypatch.delitem(sys.modules, "huggingface_hub.constants")
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub.cache_folder() == folder
