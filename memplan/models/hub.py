"""A model's facts from the Hugging Face Hub: its config and the headers of its safetensors, without the weights.

All requests go through huggingface_hub, with its cache, token and settings (HF_TOKEN, HF_HOME, HF_ENDPOINT,
HF_HUB_OFFLINE, timeouts). It is imported only here, and only when needed. No code of a repository is ever run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import ConfigError, FactsMissingError, printable
from memplan.core.records import NamedTuple
from memplan.models.headers import Checkpoint, StoredTensor, tensors_of
from memplan.models.hub_limits import limited, within

_TIMEOUT = 20.0  # seconds for the Hub to list a repository's files, or send its config
_HEADERS_TIMEOUT = 60.0  # seconds for the headers of all files of weights
_MAX_CONFIG = 2**24  # bytes of a config.json
_MAX_INDEX = 2**25  # bytes of an index of shards
_MAX_FILES = 1000  # safetensors files whose headers are fetched, with one or two requests each
_MAX_SHOWN = 120  # characters of an id or a reason that an error message repeats
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Repository(NamedTuple):
    """A model on the Hub: the local path of its config, its weights' headers, the commit, and the licence."""

    config: Path
    checkpoint: Checkpoint
    commit: str
    licence: str


def split(name: str) -> tuple[str, str | None]:
    """Split `owner/name@revision` into the id and its revision: a branch, a tag, a commit, or None."""
    hf_id, _, revision = name.partition("@")
    return hf_id, revision or None


def cache_folder() -> Path:
    """The folder of the local cache, without the import of huggingface_hub, which takes 0.1 s.

    Source: huggingface_hub 1.x constants.py.
    """
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        return Path(constants.HF_HUB_CACHE)
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or str(home / "hub")
    return Path(os.path.expandvars(hub)).expanduser()


def cached(name: str) -> Path | None:
    """Return the path of an id's config.json in the local cache, or None, without using the network."""
    hf_id, revision = split(name)
    try:
        if not (cache_folder() / f"models--{hf_id.replace('/', '--')}").exists():
            return None
        import huggingface_hub
    except (ModuleNotFoundError, OSError, ValueError):  # in a browser, which has no cache; no folder's name
        return None
    try:
        path: object = huggingface_hub.try_to_load_from_cache(hf_id, "config.json", revision=revision)  # pyright: ignore[reportUnknownMemberType]
    except ValueError:  # no valid id
        return None
    return Path(path) if isinstance(path, str) else None


def fetch(name: str) -> Repository:
    """Fetch the config and the weights' headers of `owner/name` or `owner/name@revision`.

    With HF_HUB_OFFLINE, the config comes from the local cache, without the weights' headers.
    Raises FactsMissingError if the model, its revision or its config.json is missing, gated or unreachable, ConfigError
    for an invalid header.
    """
    import huggingface_hub
    from huggingface_hub.utils import OfflineModeIsEnabled

    hf_id, revision = split(name)
    with _quiet():
        try:
            api: Any = huggingface_hub.HfApi()
            with _in_one_line(name):
                info: Any = _asked(
                    hf_id, lambda: api.model_info(hf_id, revision=revision, timeout=_TIMEOUT, files_metadata=True)
                )
        except OfflineModeIsEnabled:
            return _offline(name, "HF_HUB_OFFLINE is set")
        sizes = {str(file.rfilename): file.size for file in info.siblings or ()}
        commit = str(info.sha or "")
        _check_config(name, sizes)
        with _in_one_line(name):
            config = Path(_asked(hf_id, lambda: api.hf_hub_download(hf_id, "config.json", revision=revision)))
        where = f"{hf_id}@{commit[:12]}"
        checkpoint = _headers(api, hf_id, commit or revision, sizes, where)
    licence: object = getattr(info.card_data, "license", None)
    license_name: object = getattr(info.card_data, "license_name", None)
    shown = license_name if licence == "other" and isinstance(license_name, str) else licence
    return Repository(config, checkpoint, commit, shown if isinstance(shown, str) else "")


def _asked(hf_id: str, ask: Callable[[], Any], seconds: float | None = None) -> Any:
    """Return the answer of `ask`, limited in bytes and in seconds. Raises TimeoutError or FactsMissingError."""
    import huggingface_hub

    with limited(huggingface_hub.get_session(), hf_id, _MAX_INDEX):
        return within(_TIMEOUT if seconds is None else seconds, ask)


def _check_config(name: str, sizes: Mapping[str, Any]) -> None:
    if "config.json" not in sizes:
        gguf = [file for file in sizes if file.endswith(".gguf")]
        adapter = "it is an adapter; ask for its base model" if "adapter_config.json" in sizes else ""
        hint = f"it has GGUF files; download one ({printable(gguf[0], _MAX_SHOWN)}) and give its path" if gguf else ""
        why = adapter or hint or "give the path of a config.json"
        raise FactsMissingError(f"model: '{_shown(name)}' has no config.json on the Hub: {why}", "model")
    size = sizes["config.json"]
    if isinstance(size, int) and size > _MAX_CONFIG:
        raise ConfigError(f"model: config.json of '{_shown(name)}' has {size:,} bytes, too many for a config", "model")


def _headers(api: Any, hf_id: str, revision: str | None, sizes: Mapping[str, Any], where: str) -> Checkpoint:
    """Return a checkpoint with the headers of the repository's safetensors, or with the reason why it has none."""
    shards = [file for file in sizes if file.endswith(".safetensors")]
    if _SINGLE not in sizes and _INDEX not in sizes:
        return Checkpoint(where, why_not="there are no safetensors", remote=True)
    index = sizes.get(_INDEX)
    if isinstance(index, int) and index > _MAX_INDEX:
        return Checkpoint(where, why_not=f"its {_INDEX} has {index:,} bytes", remote=True)
    if len(shards) > _MAX_FILES:
        return Checkpoint(where, why_not=f"there are {len(shards):,} files of weights", remote=True)
    try:
        with _in_one_line(hf_id):
            ask = partial(api.get_safetensors_metadata, hf_id, revision=revision)
            metadata: Any = _asked(hf_id, ask, _HEADERS_TIMEOUT)
    except FactsMissingError as error:
        return Checkpoint(where, why_not=str(error).removeprefix("model: "), remote=True)
    tensors: list[StoredTensor] = []
    for file, header in cast(Mapping[str, Any], metadata.files_metadata).items():
        entries = {
            str(key): {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            for key, info in header.tensors.items()
        }
        tensors += tensors_of(entries, Path(where) / file)
    return Checkpoint(where, tuple(tensors), remote=True)


def _offline(name: str, why: str) -> Repository:
    config = cached(name)
    if config is None:
        raise FactsMissingError(f"model: no config.json of '{_shown(name)}' in the local cache, and {why}", "model")
    return Repository(config, Checkpoint(name, why_not=why), "", "")


@contextmanager
def _in_one_line(name: str) -> Generator[None]:
    """Turn huggingface_hub's errors into a one-line FactsMissingError, except OfflineModeIsEnabled."""
    import huggingface_hub.utils as raised

    shown = _shown(name)
    # A failed connection raises an error of the HTTP library or an OSError, the two bases of HfHubHTTPError.
    unreached = tuple(base for base in raised.HfHubHTTPError.__bases__ if issubclass(base, Exception))
    hf_id, revision = split(name)
    try:
        yield
    except raised.OfflineModeIsEnabled:
        raise
    except raised.GatedRepoError:
        what = "is gated on the Hub: accept its terms there, then `hf auth login` or set HF_TOKEN"
    except raised.RevisionNotFoundError:
        shown, what = _shown(hf_id), f"has no revision {printable(str(revision), _MAX_SHOWN)!r} on the Hub"
    except raised.RepositoryNotFoundError:
        what = "is not on the Hub, or private: then `hf auth login` or set HF_TOKEN"
    except raised.LocalEntryNotFoundError:
        what = "is not in the local cache, and the Hub could not be asked"
    except raised.EntryNotFoundError:
        what = "has no such file on the Hub"
    except raised.HFValidationError:
        what = "is no Hugging Face id (owner/name)"
    except (raised.SafetensorsParsingError, raised.NotASafetensorsRepoError, KeyError, TypeError, AttributeError):
        what = "has files on the Hub that cannot be read as safetensors"
    except unreached as error:
        what = _why(error)
    except ValueError:
        what = "got an answer that cannot be read"
    else:
        return
    raise FactsMissingError(f"model: '{shown}' {what}", "model") from None


def _why(error: BaseException) -> str:
    """Return in words why the Hub could not be reached or did not answer."""
    response: Any = getattr(error, "response", None)
    status: object = getattr(response, "status_code", None)
    if status is not None:
        return f"could not be fetched: the Hub answered with status {status}"
    if "Timeout" in type(error).__name__ or isinstance(error, TimeoutError):
        return "could not be fetched: the Hub did not answer in time"
    if isinstance(error, PermissionError):  # huggingface_hub's own files in another user's home folder
        file = printable(str(error.filename), _MAX_SHOWN)
        return f"could not be fetched: {file!r} cannot be used (permission denied); set HF_HOME to a folder of yours"
    reason = " ".join(str(error).split())
    return f"could not be fetched: no connection to the Hub ({printable(reason or type(error).__name__, _MAX_SHOWN)})"


@contextmanager
def _quiet() -> Generator[None]:
    """Silence huggingface_hub's progress bars and warnings; errors are reported in one line instead."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    shown, level = not are_progress_bars_disabled(), logging.get_verbosity()
    if shown:
        disable_progress_bars()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if shown:
            enable_progress_bars()


def _shown(name: str) -> str:
    return printable(name, _MAX_SHOWN)
