"""Finding a model by card name, Hugging Face id or path. Only this module knows where the model cards are stored."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Protocol, cast

from memplan.core.errors import ConfigError, FactsMissingError, MemplanError, UnknownNameError, nearest, printable
from memplan.core.files import are_given, is_file, open_file
from memplan.core.frozen import FrozenDict
from memplan.core.package_data import data_path
from memplan.core.records import NamedTuple
from memplan.core.toml import parsed
from memplan.models.gguf import config_of
from memplan.models.headers import WEIGHTS, Checkpoint, read_checkpoint, read_gguf, refuse_pickle
from memplan.models.model import ModelSpec

_MAX_CONFIG_BYTES = 2**24  # a config.json has a few kilobytes; anything far larger is another kind of file
_MAX_SHOWN = 200  # characters of a path that an error message repeats


class InlineConfig(Protocol):
    """A model given by its config instead of by name, such as `memplan.spec.generation.InlineModel`."""

    @property
    def config(self) -> Mapping[str, Any]: ...


def card_folder() -> Path:
    """Return the folder of the bundled cards."""
    return data_path("model_cards")


@cache
def card_names() -> tuple[str, ...]:
    """Return the names of the bundled cards, sorted."""
    names = os.listdir(card_folder())  # noqa: PTH208 (a Path for each card takes longer than the rest)
    return tuple(sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml")))


def find_model(model: str | InlineConfig, online: bool = False) -> ModelSpec:
    """Return the model of a bundled card, an inline config, a path, or an id in the local Hugging Face cache.

    An id may have a revision: `owner/name@revision`. With `online`, the config and the weights' headers of a model that
    has no card and is no path are fetched from the Hugging Face Hub; otherwise the network is never used.

    Raises UnknownNameError for an unknown name, FactsMissingError for an id without a local config, ConfigError for an
    invalid config, UnsupportedModelError for an unsupported model.
    """
    if not isinstance(model, str):
        return _inline(cast(FrozenDict, model.config))
    located = _locate(model, online)
    if isinstance(located, str):
        return _of_alias(located, model)
    return ModelSpec(located.config, model, checkpoint=located.checkpoint)


def find_config(model: str | InlineConfig, online: bool = False) -> Mapping[str, Any]:
    """Return a model's config as published, supported by memplan or not.

    Raises the errors of `find_model`, except UnsupportedModelError.
    """
    if not isinstance(model, str):
        return _thinker(model.config)
    located = _locate(model, online)
    if not isinstance(located, str):
        return located.config
    card = _read_card(located)
    return {**_card_config(card), **_own_config(card, model)}


class PublishedModel(NamedTuple):
    """A model's config, the headers of its weights, where both are from, and its id and licence if known."""

    config: Mapping[str, Any]
    checkpoint: Checkpoint | None = None
    source: str = ""
    hf_id: str = ""
    licence: str = ""


def facts_of(model: str, online: bool = False) -> PublishedModel:
    """Return the facts of a config, a folder, a Hub id or a bundled card. Raises the errors of `find_config`."""
    located = _locate(model, online)
    if not isinstance(located, str):
        return located
    card = _read_card(located)
    config = {**_card_config(card), **_own_config(card, model)}
    return PublishedModel(config, None, card["source"], card["hf_id"], card.get("licence", ""))


def is_bundled(model: str) -> bool:
    """Whether a name or an id is that of a bundled card."""
    return isinstance(_locate(model, online=False), str)


def _locate(model: str, online: bool) -> str | PublishedModel:
    """Return the name of the card that `model` means, or the facts it leads to."""
    model = re.sub(_ADDRESS, r"\2", model) if "/" in model else model
    file = _file(model) if "/" in model or os.sep in model or model.endswith(_FILES) else None
    card = None if file is not None else _card_name(model)
    if card is not None:
        return card
    file = file or _file(model)
    if file is not None:
        return _in_file(file)
    if online:
        return _from_hub(model)
    if "/" not in model:
        _refuse_other_format(model)
        raise UnknownNameError("model", model, _similar(model), ranked=True)
    found = (None if are_given() else _from_hub_cache(model)) or _of_same_name(model, _MIRRORS)
    if found is None:
        _refuse_other_format(model)
        raise _missing(model)
    return found


_ADDRESS = r"(?i)^(https?://)?(?:huggingface\.co|hf\.co)/([^/\s]+/[^/\s?#]+).*$"
# Owners of unchanged copies of others' checkpoints, under the same names; on ModelScope, as ms-swift 4.6.0
# model/models lists them.
_MIRRORS = (
    *("unsloth", "nousresearch", "mistral-community", "01ai", "ai-modelscope", "llm-research", "openai-mirror"),
    *("zhipuai", "shanghai_ai_laboratory", "tencent-hunyuan", "swift", "modelscope"),
)
# Owners who publish others' checkpoints in other formats, under the same names with the format at the end.
_CONVERTERS = (
    *("bartowski", "casperhansen", "ggml-org", "hugging-quants", "lmstudio-community", "neuralmagic", "nvidia"),
    *("redhatai", "thebloke"),
)
# Ends of names of checkpoints in another format, and the options that say it; {} is a type that the name has.
_OTHER_FORMATS = {
    r"(?:-unsloth)?-bnb-4bit": "--method qlora",
    r"-awq(?:-int4)?": "--method generate --quant-format awq-int4",
    r"-gptq(?:-int4)?": "--method generate --quant-format gptq-int4",
    r"-gptq-int8": "--method generate --quant-format gptq-int8",
    r"-fp8(?:-dynamic)?": "--method generate --quant-format fp8",
    r"-quantized\.w4a16": "--method generate --profile vllm --stored w4a16",
    r"(?:-qat)?-(i?q\d_\w+)-gguf": "--method generate --profile llama.cpp --stored {}",
    r"-gguf": "--method generate --profile llama.cpp --stored Q4_K_M",
}


@lru_cache(maxsize=1024)
def _of_same_name(hf_id: str, owners: tuple[str, ...] = ()) -> str | None:
    """Return the card with the name that a checkpoint has behind its owner, who is one of `owners` if there are some.

    A converter's name may begin with the model's own owner: bartowski/Qwen_Qwen3-8B-GGUF.
    """
    owner, _, name = hf_id.lower().partition("/")
    if not name or (owners and owner not in owners):
        return None
    names = {name, name.partition("_")[2] or name}
    found = {card for alias, card in _aliases().items() if alias.rpartition("/")[2] in names}
    found |= {card for name in names if (card := _card_name(name)) is not None}
    return found.pop() if len(found) == 1 else None


def other_format(model: str, owners: tuple[str, ...] = _MIRRORS + _CONVERTERS) -> tuple[str, str] | None:
    """Return the card that a name or address of a checkpoint in another format means, and the options that say it.

    owners  those whose checkpoints are others' under the same names; anyone if empty
    """
    model = re.sub(_ADDRESS, r"\2", model)
    for end, options in _OTHER_FORMATS.items():
        match = re.fullmatch(f"(?i)(.+?){end}", model)
        card = match and (_card_name(match[1]) or _of_same_name(match[1], owners))
        if match and card:
            typed = options.format(*(name.upper() for name in match.groups()[1:]))
            return card, typed.removesuffix(" --stored Q4_K_M" if "stored" in _read_card(card) else "")
    return None


def _refuse_other_format(model: str) -> None:
    """Raise FactsMissingError if the name is that of a known model in another format."""
    for owners, known_by in ((_MIRRORS + _CONVERTERS, ""), ((), "by its name ")):
        found = other_format(model, owners)
        if found is not None:
            card, options = found
            raise FactsMissingError(
                f"model: no config.json of '{printable(model, _MAX_SHOWN)}', which {known_by}is {card} in another "
                f"format; write memplan {card} {options}, or ask the Hub with --online",
                "model",
            )


def _similar(model: str) -> list[str]:
    """Return names like a wrong one, one for each card: first the cards that begin it, or that it begins."""
    names = nearest(model, (*card_names(), *_aliases()), _MOST_SIMILAR)
    letters = _letters(model.lower())
    within = [name for name in card_names() if letters.startswith(_letters(name)) and len(name) > _MIN_NAME]
    begun = [name for name in card_names() if _letters(name).startswith(letters)]
    by_card: dict[str | None, str] = {}
    for name in (*sorted(within, key=len, reverse=True), *sorted(begun, key=len), *names):
        by_card.setdefault(_card_name(name), name)
    return [*by_card.values()]


_MOST_SIMILAR = 9  # names, several of which may be of one card
_MIN_NAME = 5  # letters of a card's name that a longer name is of


_FILES = (".json", *WEIGHTS)


def _in_file(file: Path) -> PublishedModel:
    """Return the facts of a config.json, a model folder, or a weights file with a config.json next to it."""
    if file.name.endswith(WEIGHTS) and not file.is_dir():
        refuse_pickle(file)
        if file.suffix == ".gguf":
            return _in_gguf(file)
        file = file.parent
    if not file.is_dir():
        return PublishedModel(_read_json(file), source=printable(str(file), _MAX_SHOWN))
    config = file / "config.json"
    if not config.exists():
        parts = sorted(path for path in file.glob("*.gguf") if not _LATER_PART.search(path.name))
        if len(parts) == 1:
            return _in_gguf(parts[0])
        _refuse_folder(file, parts)
    return PublishedModel(_read_json(config), read_checkpoint(file), printable(str(config), _MAX_SHOWN))


_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


def _in_gguf(file: Path) -> PublishedModel:
    where = printable(str(file), _MAX_SHOWN)
    header = read_gguf(file)
    return PublishedModel(config_of(header, where), Checkpoint(where, header.tensors, "gguf"), where)


def _refuse_folder(folder: Path, parts: Sequence[Path]) -> None:
    """Raise ConfigError if a folder without config.json holds several models or an adapter."""
    where = printable(str(folder), _MAX_SHOWN)
    if parts:
        names = printable(", ".join(path.name for path in parts), _MAX_SHOWN)
        raise ConfigError(f"model: {where} has no config.json and several GGUF files; give one: {names}", "model")
    if (folder / "adapter_config.json").is_file():
        base = _read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ConfigError(f"model: {where} is an adapter; give its base model, {base!r:.200}, and its rank", "model")


def _file(model: str) -> Path | None:
    """Return `model` as a path if it exists or can only be a path; None if it may be a name."""
    if not model.strip():
        return None
    named = model.endswith(_FILES) or model.startswith((".", "~", os.sep))
    if are_given():
        if named and is_file(Path(model)):
            return Path(model)
        if named:
            text = "a path, and files of this machine are not read; give the config itself"
            raise ConfigError(f"model: {printable(model, _MAX_SHOWN)} is {text}", "model")
        return None
    try:
        path = Path(model).expanduser()
        if path.is_dir():
            known = named or "/" not in model or any((path / name).exists() for name in _KNOWN_BY)
            return path if known or any(path.glob("*.gguf")) else None  # a folder may be named like an id
        return path if named or path.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # symlink loop, too long, unknown ~user, NUL
        if not named:
            return None
        raise ConfigError(f"model: {printable(model, _MAX_SHOWN)} cannot be read ({_reason(error)})", "model") from None


_KNOWN_BY = ("config.json", "adapter_config.json")  # a model folder has one of these, or GGUF files


@lru_cache(maxsize=4096)
def load_card(name: str) -> ModelSpec:
    """Return the model of the bundled card `name`. Raises UnknownNameError."""
    if name not in card_names():
        raise UnknownNameError("model", name, card_names())
    card = _read_card(name)
    return ModelSpec(_card_config(card), name, {k: v for k, v in card.items() if k != "config"})


@lru_cache(maxsize=4096)
def _of_alias(name: str, model: str) -> ModelSpec:
    """Return a card's model by one of its names."""
    card = load_card(name)
    own = _own_config(card.card, model)
    return ModelSpec({**card.config, **own}, name, card.card) if own else card


def _own_config(card: Mapping[str, Any], model: str) -> Mapping[str, Any]:
    """Return what the config of the alias `model` has other than the card's."""
    letters = _letters(model.lower().rpartition("/")[2])
    configs: Mapping[str, Mapping[str, Any]] = card.get("own", {})
    own = (config for alias, config in configs.items() if _letters(alias.lower().rpartition("/")[2]) == letters)
    return next(own, dict[str, Any]())


def _card_config(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return the card's config with its nulls, which TOML cannot hold: it lists their keys, nested ones with a dot."""
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
    return ModelSpec(_thinker(config), str(config.get("_name_or_path", "")))


def _thinker(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of an Omni's thinker, the part that is trained and has a class of its own; else the config."""
    part: object = config.get("thinker_config")
    return cast(Mapping[str, Any], part) if isinstance(part, Mapping) else config


def _card_text(name: str) -> str:
    return (card_folder() / f"{name}.toml").read_text("utf-8")


def _read_card(name: str) -> dict[str, Any]:
    return parsed(_card_text(name))


@lru_cache(maxsize=4096)
def _card_name(model: str) -> str | None:
    """Return the card with this name, hf_id or alias, ignoring case and, in names without an owner, separators."""
    lowered = model.lower()
    if lowered in card_names():
        return lowered
    return _aliases().get(lowered) or (None if "/" in lowered else _names_by_letters().get(_letters(lowered)))


@cache
def _aliases() -> dict[str, str]:
    """Return every hf_id and alias in lower case, with its card's name."""
    names: dict[str, str] = {}
    folder = os.fspath(card_folder())
    for name in card_names():
        with open(f"{folder}{os.sep}{name}.toml", encoding="utf-8") as file:  # noqa: PTH123 (a Path takes longer)
            text = file.read()
        for said in _NAMED.findall(text):  # parsing all cards takes longer than most answers
            for alias in json.loads(f"[{said}]"):
                names.setdefault(alias.lower(), name)
    return names


_NAMED = re.compile(r'^(?:hf_id = |aliases = \[\s*)("[^\]]*?")(?:,?\s*\])?$', re.MULTILINE)


def _original_case(alias: str) -> str:
    """Return an alias as its card spells it."""
    card = _read_card(_aliases()[alias])
    return next(name for name in (card["hf_id"], *card.get("aliases", ())) if name.lower() == alias)


@cache
def _names_by_letters() -> dict[str, str]:
    """Return every name without separators, with its card; also ids without owner, where those are of one card."""
    names = {_letters(name): card for name, card in [*((n, n) for n in card_names()), *_aliases().items()]}
    owned: dict[str, set[str]] = {}
    for name, card in _aliases().items():
        owned.setdefault(_letters(name.rpartition("/")[2]), set()).add(card)
    return {name: next(iter(cards)) for name, cards in owned.items() if len(cards) == 1} | names


def _letters(name: str) -> str:
    """Return the name without separators: "llama 3.1 8b", "llama3.1:8b" and "llama-3.1-8b" become the same."""
    return name.translate({ord(mark): None for mark in " -_:"})


def _read_json(path: Path) -> Mapping[str, Any]:
    where = printable(str(path), _MAX_SHOWN)
    try:
        with open_file(path) as file:
            raw = file.read(_MAX_CONFIG_BYTES + 1)  # a limit, because a device may be endless
        text = raw.decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"model: no file {where}", "model") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the path
        raise ConfigError(f"model: {where} cannot be read ({_reason(error)})", "model") from None
    if len(raw) > _MAX_CONFIG_BYTES:
        limit = f"{_MAX_CONFIG_BYTES // 2**20} MiB"
        raise ConfigError(f"model: {where} is larger than {limit}, too large for a config.json", "model")
    return _parse(text, where, "" if path.suffix == ".json" else _OTHERS, parse_constant=_CONSTANTS.__getitem__)


_OTHERS = "; a run's file ends in .yaml, .json, .sh, .py or .ipynb, and a command stands behind --"


# Published configs contain them, as Python's json writes them. NaN is always the same object: two NaN are unequal
# unless identical, and a config must equal itself to be found in caches.
_CONSTANTS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8 text"
    return getattr(error, "strerror", None) or str(error).rstrip(".")


def parse_config(text: str, where: str) -> Mapping[str, Any]:
    """Return the JSON object in `text`. Raises ConfigError for anything else, NaN, Infinity, or a duplicate key."""

    def refuse(constant: str) -> None:
        raise ConfigError(f"{where}: {constant} is not a JSON number", "model")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key, value in pairs:
            if key in entries:
                raise ConfigError(f"{where}: the key {key!r:.80} appears twice", "model")
            entries[key] = value
        return entries

    return _parse(text, where, parse_constant=refuse, object_pairs_hook=unique)


def _parse(text: str, where: str, hint: str = "", **hooks: Any) -> Mapping[str, Any]:
    try:
        config: object = json.loads(text, **hooks)
    except MemplanError:
        raise
    except json.JSONDecodeError as error:
        reason = f"{error.msg}, line {error.lineno}, column {error.colno}" if text.strip() else "it is empty"
        raise ConfigError(f"{where}: not JSON ({reason}){hint}", "model") from None
    except RecursionError:
        raise ConfigError(f"{where}: not JSON that can be read (it is nested too deeply)", "model") from None
    except ValueError:
        raise ConfigError(f"{where}: not JSON that can be read (a number has too many digits)", "model") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{where}: not a JSON object", "model")
    return _thinker(cast(Mapping[str, Any], config))


def _from_hub(hf_id: str) -> PublishedModel:
    """Return an id's facts from the Hub. No remote code is run, and no weights are downloaded."""
    from memplan.models.hub import fetch, split

    repository, name = fetch(hf_id), split(hf_id)[0]
    source = f"huggingface.co/{name}:config.json@{repository.commit or 'cache'}"
    return PublishedModel(_read_json(repository.config), repository.checkpoint, source, name, repository.licence)


def _from_hub_cache(hf_id: str) -> PublishedModel | None:
    """Return an id's facts from the local Hugging Face cache, without using the network; None if they are not there."""
    from memplan.models.hub import cached, split

    path = cached(hf_id)
    if path is None:
        return None
    name = split(hf_id)[0]
    return PublishedModel(_read_json(path), None, f"huggingface.co/{name}:config.json@{path.parent.name}", name)


def _missing(hf_id: str) -> FactsMissingError:
    import difflib

    near = difflib.get_close_matches(hf_id.lower()[:_MAX_SHOWN], _aliases(), n=1, cutoff=0.8)
    similar = _of_same_name(hf_id) or (_original_case(near[0]) if near else None)
    hint = f"did you mean {similar}? Otherwise " if similar else ""
    if are_given():
        text = f"no card for '{printable(hf_id, _MAX_SHOWN)}'; {hint}give its config"
        return FactsMissingError(f"model: {text}", "model")
    return FactsMissingError(
        f"model: no card for '{printable(hf_id, _MAX_SHOWN)}' and no config.json of it in the local Hugging Face "
        f"cache; {hint}ask the Hub with --online, or give the path of a config.json",
        "model",
    )
