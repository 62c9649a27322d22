"""A model's facts from the Hugging Face Hub: its config and the headers of its safetensors, without its weights.

Everything is asked through huggingface_hub, which has its own cache, token and settings (HF_TOKEN, HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE and the timeouts). Nothing that a repository holds is ever run. It is imported only here,
and only when the Hub, or what was downloaded from it, is asked for.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

from memplan.core.errors import ConfigError, FactsMissingError, printable
from memplan.models.headers import Checkpoint, StoredTensor, tensors_of

_PATIENCE = 20.0  # seconds that the Hub has to say what a repository holds
_MOST_CONFIG = 2**24  # bytes of a config.json
_MOST_INDEX = 2**25  # bytes of an index of shards
_MOST_FILES = 1000  # of safetensors whose headers are fetched, one request or two each
_LONGEST = 120  # letters of an id or a reason that an error repeats
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Repository(NamedTuple):
    """What the Hub says of a model: where its config was put, its weights' headers, the commit, and the licence."""

    config: Path
    checkpoint: Checkpoint
    commit: str
    licence: str


def split(name: str) -> tuple[str, str | None]:
    """An id and its revision, as `owner/name@revision` has them: a branch, a tag or a commit."""
    hf_id, _, revision = name.partition("@")
    return hf_id, revision or None


def cached(name: str) -> Path | None:
    """The config.json of an id in the local cache. The network is not asked."""
    import huggingface_hub

    hf_id, revision = split(name)
    try:
        found: object = huggingface_hub.try_to_load_from_cache(hf_id, "config.json", revision=revision)  # pyright: ignore[reportUnknownMemberType]
    except ValueError:  # no valid id
        return None
    return Path(found) if isinstance(found, str) else None


def fetch(name: str) -> Repository:
    """What the Hub has of `owner/name` or `owner/name@revision`; config.json goes into its cache.

    With HF_HUB_OFFLINE, or where the Hub does not answer, it is what the cache has, without the weights' headers.
    Raises FactsMissingError where the model, its revision or its config.json is not there, gated, or out of reach,
    ConfigError where a header is not what it must be.
    """
    import huggingface_hub
    from huggingface_hub.utils import OfflineModeIsEnabled

    hf_id, revision = split(name)
    with _quiet():
        try:
            api: Any = huggingface_hub.HfApi()
            with _in_one_line(name):
                info: Any = api.model_info(hf_id, revision=revision, timeout=_PATIENCE, files_metadata=True)
        except OfflineModeIsEnabled:
            return _offline(name, "HF_HUB_OFFLINE is set")
        sizes = {str(one.rfilename): one.size for one in info.siblings or ()}
        commit = str(info.sha or "")
        _check_config(name, sizes)
        with _in_one_line(name):
            config = Path(api.hf_hub_download(hf_id, "config.json", revision=revision))
        where = f"{hf_id}@{commit[:12]}"
        checkpoint = _headers(api, hf_id, commit or revision, sizes, where)
    licence: object = getattr(info.card_data, "license", None)
    named: object = getattr(info.card_data, "license_name", None)
    said = named if licence == "other" and isinstance(named, str) else licence
    return Repository(config, checkpoint, commit, said if isinstance(said, str) else "")


def _check_config(name: str, sizes: Mapping[str, Any]) -> None:
    if "config.json" not in sizes:
        gguf = [file for file in sizes if file.endswith(".gguf")]
        adapter = "it is an adapter; ask for its base model" if "adapter_config.json" in sizes else ""
        hint = f"it has GGUF files; download one ({printable(gguf[0], _LONGEST)}) and give its path" if gguf else ""
        why = adapter or hint or "give the path of a config.json"
        raise FactsMissingError(f"model: '{_shown(name)}' has no config.json on the Hub: {why}", "model")
    size = sizes["config.json"]
    if isinstance(size, int) and size > _MOST_CONFIG:
        raise ConfigError(f"model: config.json of '{_shown(name)}' has {size:,} bytes, so it is none", "model")


def _headers(api: Any, hf_id: str, revision: str | None, sizes: Mapping[str, Any], where: str) -> Checkpoint:
    """The headers of the repository's safetensors, or why there are none."""
    shards = [file for file in sizes if file.endswith(".safetensors")]
    if _SINGLE not in sizes and _INDEX not in sizes:
        return Checkpoint(where, why_not="there are no safetensors", remote=True)
    index = sizes.get(_INDEX)
    if isinstance(index, int) and index > _MOST_INDEX:
        return Checkpoint(where, why_not=f"its {_INDEX} has {index:,} bytes", remote=True)
    if len(shards) > _MOST_FILES:
        return Checkpoint(where, why_not=f"there are {len(shards):,} files of weights", remote=True)
    try:
        with _in_one_line(hf_id):
            seen: Any = api.get_safetensors_metadata(hf_id, revision=revision)
    except FactsMissingError as error:
        return Checkpoint(where, why_not=str(error).removeprefix("model: "), remote=True)
    found: list[StoredTensor] = []
    for file, header in cast(Mapping[str, Any], seen.files_metadata).items():
        entries = {
            str(key): {"dtype": one.dtype, "shape": one.shape, "data_offsets": list(one.data_offsets)}
            for key, one in header.tensors.items()
        }
        found += tensors_of(entries, Path(where) / file)
    return Checkpoint(where, tuple(found), remote=True)


def _offline(name: str, why: str) -> Repository:
    config = cached(name)
    if config is None:
        raise FactsMissingError(f"model: no config.json of '{_shown(name)}' in the local cache, and {why}", "model")
    return Repository(config, Checkpoint(name, why_not=why), "", "")


@contextmanager
def _in_one_line(name: str) -> Generator[None]:
    """What huggingface_hub raises, as a FactsMissingError of one line; that it is offline is left as it is."""
    import huggingface_hub.utils as raised

    shown = _shown(name)
    # What was not reached is the HTTP library's own error or an OSError: this one is both.
    unreached = tuple(base for base in raised.HfHubHTTPError.__bases__ if issubclass(base, Exception))
    hf_id, revision = split(name)
    try:
        yield
    except raised.OfflineModeIsEnabled:
        raise
    except raised.GatedRepoError:
        what = "is gated on the Hub: accept its terms there, then `hf auth login` or set HF_TOKEN"
    except raised.RevisionNotFoundError:
        shown, what = _shown(hf_id), f"has no revision {printable(str(revision), _LONGEST)!r} on the Hub"
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
    """In words, what kept the Hub from being asked or from answering."""
    response: Any = getattr(error, "response", None)
    status: object = getattr(response, "status_code", None)
    if status is not None:
        return f"could not be asked for: the Hub answered with status {status}"
    if "Timeout" in type(error).__name__ or isinstance(error, TimeoutError):
        return "could not be asked for: the Hub did not answer in time"
    if isinstance(error, PermissionError):  # huggingface_hub's own files, in a home folder of another user
        file = printable(str(error.filename), _LONGEST)
        return f"could not be asked for: {file!r} cannot be used (permission denied); set HF_HOME to a folder of yours"
    reason = " ".join(str(error).split())
    return f"could not be asked for: no connection to the Hub ({printable(reason or type(error).__name__, _LONGEST)})"


@contextmanager
def _quiet() -> Generator[None]:
    """Without huggingface_hub's progress bars and warnings: what they say is in the answer, or in the error's line."""
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
    return printable(name, _LONGEST)
