"""From a name, a Hugging Face id or a path to a `ModelSpec`. The one place that knows where the model cards lie."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from memplan.core.errors import ConfigError, FactsMissingError, MemplanError, UnknownNameError, printable
from memplan.core.frozen import FrozenDict
from memplan.models.gguf import config_of
from memplan.models.headers import WEIGHTS, Checkpoint, read_checkpoint, read_gguf, refuse_pickle
from memplan.models.model import ModelSpec

_HERE = Path(__file__).resolve().parents[1]
_MAX_CONFIG_BYTES = 2**24  # a config.json is a few kilobytes; anything far larger is not one
_LONGEST = 200  # letters of a path that are repeated in the error about it


class InlineConfig(Protocol):
    """A model that is given by its config instead of by name, as `memplan.spec.generation.InlineModel` is."""

    @property
    def config(self) -> Mapping[str, Any]: ...


def card_folder() -> Path:
    """`model_cards/`: inside the installed package, or beside it in a checkout."""
    installed = _HERE / "model_cards"
    return installed if installed.is_dir() else _HERE.parent / "model_cards"


@cache
def card_names() -> tuple[str, ...]:
    """The names of the bundled cards, sorted."""
    return tuple(sorted(path.stem for path in card_folder().glob("*.toml")))


def find_model(model: str | InlineConfig, online: bool = False) -> ModelSpec:
    """The model a run names: a bundled card, a config given inline, a path, or a config in the local Hub cache.

    An id may name a revision, `owner/name@revision`. `online`: what has no card and is no path is asked of the Hugging
    Face Hub, its config and the headers of its weights; without it the network is never asked.

    Raises UnknownNameError for a name near a card's, FactsMissingError for an id whose config is not here,
    ConfigError and UnsupportedModelError for a config that is no dense decoder's.
    """
    if not isinstance(model, str):
        return _inline(cast(FrozenDict, model.config))
    found = _found(model, online)
    return load_card(found) if isinstance(found, str) else ModelSpec(found.config, model, checkpoint=found.checkpoint)


def find_config(model: str | InlineConfig, online: bool = False) -> Mapping[str, Any]:
    """The config of the model a run names, in Hugging Face's keys as it was published, of any family.

    Raises as `find_model` does, but for UnsupportedModelError: whether memplan has a stack is not asked.
    """
    if not isinstance(model, str):
        return model.config
    found = _found(model, online)
    return _card_config(_read_card(found)) if isinstance(found, str) else found.config


class Facts(NamedTuple):
    """A config, what was seen of the weights it is of, and where it is from; id and licence where they are known."""

    config: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    source: str = ""
    hf_id: str = ""
    licence: str = ""


def facts_of(model: str, online: bool = False) -> Facts:
    """What a config, a folder or the Hub says of a model; of a bundled card, its config. Raises as `find_config`."""
    found = _found(model, online)
    if not isinstance(found, str):
        return found
    card = _read_card(found)
    return Facts(_card_config(card), None, card["source"], card["hf_id"], card.get("licence", ""))


def _found(model: str, online: bool) -> str | Facts:
    """The card's name that a name means, or the config it leads to."""
    file = _file(model) if "/" in model or os.sep in model or model.endswith(_FILES) else None
    card = None if file is not None else _card_name(model)
    if card is not None:
        return card
    file = file or _file(model)
    if file is not None:
        return _in_file(file)
    if online:
        return _from_hub(model)
    if "/" in model:
        return _from_hub_cache(model)
    raise UnknownNameError("model", model, (*card_names(), *_aliases()))


_FILES = (".json", *WEIGHTS)


def _in_file(file: Path) -> Facts:
    """What a config.json says, a folder of a model, or a file of its weights with the config beside it."""
    if file.name.endswith(WEIGHTS) and not file.is_dir():
        refuse_pickle(file)
        if file.suffix == ".gguf":
            return _in_gguf(file)
        file = file.parent
    if not file.is_dir():
        return Facts(_read_json(file), source=printable(str(file), _LONGEST))
    config = file / "config.json"
    if not config.exists():
        parts = sorted(path for path in file.glob("*.gguf") if not _LATER_PART.search(path.name))
        if len(parts) == 1:
            return _in_gguf(parts[0])
        _refuse_folder(file, parts)
    return Facts(_read_json(config), read_checkpoint(file), printable(str(config), _LONGEST))


_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def _in_gguf(file: Path) -> Facts:
    where = printable(str(file), _LONGEST)
    header = read_gguf(file)
    return Facts(config_of(header, where), Checkpoint(where, header.tensors, "gguf"), where)


def _refuse_folder(folder: Path, parts: Sequence[Path]) -> None:
    """Raise ConfigError for a folder without config.json that has several models, or an adapter."""
    where = printable(str(folder), _LONGEST)
    if parts:
        names = printable(", ".join(path.name for path in parts), _LONGEST)
        raise ConfigError(f"model: {where} has no config.json and several GGUF files; give one: {names}", "model")
    if (folder / "adapter_config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ConfigError(f"model: {where} is an adapter; give its base model, {base!r:.200}, and its rank", "model")


def _file(model: str) -> Path | None:
    """The file or folder that a name means as a path: there, or what is no name of a model. None for other names."""
    if not model.strip():
        return None
    named = model.endswith(_FILES) or model.startswith((".", "~", os.sep))
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            known = named or "/" not in model or any((path / name).exists() for name in _KNOWN_BY)
            return path if known or any(path.glob("*.gguf")) else None  # an id is a folder's name, too
        return path if named or path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a loop, too long, no such home, a NUL
        if not named:
            return None
        raise ConfigError(f"model: {printable(model, _LONGEST)} cannot be read ({_reason(error)})", "model") from None


_KNOWN_BY = ("config.json", "adapter_config.json")  # a folder of a model has one of them, or GGUF files


@lru_cache(maxsize=4096)
def load_card(name: str) -> ModelSpec:
    """The bundled card `name`. Raises UnknownNameError."""
    if name not in card_names():
        raise UnknownNameError("model", name, card_names())
    card = _read_card(name)
    return ModelSpec(_card_config(card), name, {k: v for k, v in card.items() if k != "config"})


def _card_config(card: Mapping[str, Any]) -> dict[str, Any]:
    """The card's config with its nulls, of which `text_config.sliding_window` is one in a nested config."""
    config = dict(card["config"])
    for name in card.get("nulls", ()):
        part, _, key = name.rpartition(".")
        if part:
            config[part] = {**config[part], key: None}
        else:
            config[key] = None
    return config


@lru_cache(maxsize=1024)
def _inline(config: FrozenDict) -> ModelSpec:
    return ModelSpec(config, str(config.get("_name_or_path", "")))


def _read_card(name: str) -> dict[str, Any]:
    import tomllib

    with (card_folder() / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


@lru_cache(maxsize=4096)
def _card_name(model: str) -> str | None:
    """The card a name means: its own, its hf_id or an alias of it, in any case; without an owner however joined."""
    lowered = model.lower()
    if lowered in card_names():
        return lowered
    return _aliases().get(lowered) or (None if "/" in lowered else _joined_names().get(_joined(lowered)))


@cache
def _aliases() -> dict[str, str]:
    """Every other name of every card, lower-cased. Reads all cards, so only where the plain name did not do."""
    found: dict[str, str] = {}
    for name in card_names():
        card = _read_card(name)
        for alias in (card["hf_id"], *card.get("aliases", ())):
            found.setdefault(alias.lower(), name)
    return found


def _spelled(alias: str) -> str:
    """A name of a card as the card spells it."""
    card = _read_card(_aliases()[alias])
    return next(name for name in (card["hf_id"], *card.get("aliases", ())) if name.lower() == alias)


@cache
def _joined_names() -> dict[str, str]:
    return {_joined(name): card for name, card in [*((n, n) for n in card_names()), *_aliases().items()]}


def _joined(name: str) -> str:
    """The name without what people join its parts by: "Llama 3.1 8B", "llama3.1:8b" and "llama-3.1-8b" are one."""
    return name.translate({ord(mark): None for mark in " -_:"})


def _read_json(path: Path) -> Mapping[str, Any]:
    where = printable(str(path), _LONGEST)
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_CONFIG_BYTES + 1)  # and no more: a device has no end
        text = raw.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"model: no file {where}", "model") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise ConfigError(f"model: {where} cannot be read ({_reason(error)})", "model") from None
    if len(raw) > _MAX_CONFIG_BYTES:
        raise ConfigError(f"model: {where} is larger than {_MAX_CONFIG_BYTES // 2**20} MiB, so no config.json", "model")
    return _parse(text, where, parse_constant=_CONSTANTS.__getitem__)


# They stand in published configs, as Python writes them. NaN is one object here: as itself a config is equal to itself,
# so that what has been worked out of it once is found again.
_CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not text in UTF-8"
    return getattr(error, "strerror", None) or str(error).rstrip(".")


def parse_config(text: str, where: str) -> Mapping[str, Any]:
    """The JSON object in `text`. Raises ConfigError where it is none, or has NaN or Infinity or a key twice."""

    def refuse(constant: str) -> None:
        raise ConfigError(f"{where}: {constant} is not a number JSON knows", "model")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{where}: the key {key!r:.80} is there twice", "model")
            found[key] = value
        return found

    return _parse(text, where, parse_constant=refuse, object_pairs_hook=once)


def _parse(text: str, where: str, **hooks: Any) -> Mapping[str, Any]:
    try:
        config: object = json.loads(text, **hooks)
    except MemplanError:
        raise
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno}, column {error.colno}" if text.strip() else "it is empty"
        raise ConfigError(f"{where}: not JSON ({reason})", "model") from None
    except RecursionError:
        raise ConfigError(f"{where}: not JSON that can be read (it is nested too deeply)", "model") from None
    except ValueError:
        raise ConfigError(f"{where}: not JSON that can be read (a number has too many digits)", "model") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: not a JSON object", "model")
    return config  # pyright: ignore[reportUnknownVariableType]


def _from_hub(hf_id: str) -> Facts:
    """What the Hub says of an id: nothing remote is run, and no weights are downloaded."""
    from memplan.models.hub import fetch, split

    found, name = fetch(hf_id), split(hf_id)[0]
    source = f"huggingface.co/{name}:config.json@{found.commit or 'cache'}"
    return Facts(_read_json(found.config), found.checkpoint, source, name, found.licence)


def _from_hub_cache(hf_id: str) -> Facts:
    """`config.json` of an id from the local Hugging Face cache: no network, nothing remote is run."""
    from memplan.models.hub import cached, split

    found = cached(hf_id)
    if found is None:
        import difflib

        near = difflib.get_close_matches(hf_id.lower()[:_LONGEST], _aliases(), n=1, cutoff=0.8)
        hint = f"did you mean {_spelled(near[0])}? Otherwise " if near else ""
        raise FactsMissingError(
            f"model: no card for '{printable(hf_id, _LONGEST)}' and no config.json of it in the local Hugging Face "
            f"cache; {hint}ask the Hub with --online, or give the path of a config.json",
            "model",
        )
    name = split(hf_id)[0]
    return Facts(_read_json(found), None, f"huggingface.co/{name}:config.json@{found.parent.name}", name)
