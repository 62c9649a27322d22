"""From a name, a Hugging Face id or a path to a `ModelSpec`. The one place that knows where the model cards lie."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from memplan.errors import ConfigError, FactsMissingError, MemplanError, UnknownNameError
from memplan.models import ModelSpec
from memplan.spec import InlineModel

_HERE = Path(__file__).resolve().parent
_MAX_CONFIG_BYTES = 2**24  # a config.json is a few kilobytes; anything far larger is not one


def card_folder() -> Path:
    """`model_cards/`: inside the installed package, or beside it in a checkout."""
    installed = _HERE / "model_cards"
    return installed if installed.is_dir() else _HERE.parent / "model_cards"


@cache
def card_names() -> tuple[str, ...]:
    """The names of the bundled cards, sorted."""
    return tuple(sorted(path.stem for path in card_folder().glob("*.toml")))


def find_model(model: str | InlineModel) -> ModelSpec:
    """The model a run names: a bundled card, a config given inline, a path, or a config in the local Hub cache.

    Raises UnknownNameError for a name near a card's, FactsMissingError for an id whose config is not here,
    ConfigError and UnsupportedModelError for a config that is no dense decoder's.
    """
    if isinstance(model, InlineModel):
        return _inline(model)
    path = _path(model) if "/" in model or os.sep in model or model.endswith(".json") else None
    exists = path is not None and path.exists()
    card = None if exists else _card_name(model)
    if card is not None:
        return load_card(card)
    path = path or _path(model)
    if path is None or not model.strip():
        raise UnknownNameError("model", model, (*card_names(), *_aliases()))
    if path.is_dir() or model.endswith(".json") or model.startswith((".", "~", os.sep)):
        return ModelSpec(_read_json(path / "config.json" if path.is_dir() else path), model)
    if "/" in model:
        return ModelSpec(_from_hub_cache(model), model)
    raise UnknownNameError("model", model, (*card_names(), *_aliases()))


def _path(model: str) -> Path | None:
    """The path a name may be; None where no file system takes it."""
    try:
        path = Path(model).expanduser()
    except RuntimeError:  # no such home
        return None
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError):  # too long, a NUL
        return None
    return path


@lru_cache(maxsize=4096)
def load_card(name: str) -> ModelSpec:
    """The bundled card `name`. Raises UnknownNameError."""
    if name not in card_names():
        raise UnknownNameError("model", name, card_names())
    card = _read_card(name)
    config = {**card["config"], **dict.fromkeys(card.get("nulls", ()))}
    return ModelSpec(config, name, {k: v for k, v in card.items() if k != "config"})


@lru_cache(maxsize=1024)
def _inline(model: InlineModel) -> ModelSpec:
    return ModelSpec(model.config, str(model.config.get("_name_or_path", "")))


def _read_card(name: str) -> dict[str, Any]:
    import tomllib

    with (card_folder() / f"{name}.toml").open("rb") as file:
        return tomllib.load(file)


@lru_cache(maxsize=4096)
def _card_name(model: str) -> str | None:
    """The card a name means: its own, its hf_id or an alias of it, in any case."""
    lowered = model.lower()
    return lowered if lowered in card_names() else _aliases().get(lowered)


@cache
def _aliases() -> dict[str, str]:
    """Every other name of every card, lower-cased. Reads all cards, so only where the plain name did not do."""
    found: dict[str, str] = {}
    for name in card_names():
        card = _read_card(name)
        for alias in (card["hf_id"], *card.get("aliases", ())):
            found.setdefault(alias.lower(), name)
    return found


def _read_json(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: larger than {_MAX_CONFIG_BYTES // 2**20} MiB, so no config.json", "model")
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"model: no file {path}", "model") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})", "model") from None
    return _parse(text, str(path), float)  # NaN and Infinity stand in published configs, as Python writes them


def parse_config(text: str, where: str) -> Mapping[str, Any]:
    """The JSON object in `text`. Raises ConfigError where it is none; NaN and Infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise ConfigError(f"{where}: {constant} is not a number JSON knows", "model")

    return _parse(text, where, refuse)


def _parse(text: str, where: str, constant: Callable[[str], object]) -> Mapping[str, Any]:
    try:
        config = json.loads(text, parse_constant=constant)
    except MemplanError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})", "model") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: not a JSON object", "model")
    return config  # pyright: ignore[reportUnknownVariableType]


def _from_hub_cache(hf_id: str) -> Mapping[str, Any]:
    """`config.json` of an id from the local Hugging Face cache: no network, nothing remote is run."""
    import huggingface_hub

    try:
        found: object = huggingface_hub.try_to_load_from_cache(hf_id, "config.json")  # pyright: ignore[reportUnknownMemberType]
    except ValueError:  # no valid id
        found = None
    if not isinstance(found, str):
        raise FactsMissingError(
            f"model: no card for {hf_id!r} and no config.json of it in the local Hugging Face cache; "
            "give the path of a config.json",
            "model",
        )
    return _read_json(Path(found))
