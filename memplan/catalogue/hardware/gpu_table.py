"""The GPU table, `gpus.toml`: a card is found by its header, and read and checked when it is asked for.

tomllib takes 25 ms for the file, ten times as long as a run that needs one card may. Here every line is a header, a
comment or `key = value`, with a value that TOML and JSON write alike; a test compares all of them with what tomllib
reads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NoReturn, cast, get_args

from memplan.catalogue.hardware.gpu import GPU, Grade, Market, Price, Source
from memplan.core.errors import ConfigError, nearest
from memplan.core.package_data import data_path
from memplan.core.records import NamedTuple
from memplan.core.units import MIB

_FILE = "gpus.toml"
_decode = json.JSONDecoder().raw_decode


class _WrongValueError(ValueError):
    """A value that a key cannot have; the message says what is expected."""


# Kinds of values: each function returns a value of the file as `GPU` holds it.
_Kind = Callable[[object], Any]


def _text(value: object) -> str:
    if type(value) is str and value:
        return value
    raise _WrongValueError("text")


def _number(value: object) -> float:
    if isinstance(value, int | float) and value > 0 and value is not True:
        return value
    raise _WrongValueError("a number above 0")


def _count(value: object) -> int:
    if type(value) is int and value > 0:
        return value
    raise _WrongValueError("an integer above 0")


def _mib(value: object) -> int:
    return _count(value) * MIB


def _flag(value: object) -> bool:
    if value is True:
        return value
    raise _WrongValueError("true, or left out")


def _texts(value: object) -> tuple[str, ...]:
    if isinstance(value, list):
        return tuple(map(_text, cast(list[object], value)))
    raise _WrongValueError("a list of texts")


def _numbers(value: object) -> tuple[float, ...]:
    if isinstance(value, list):
        return tuple(map(_number, cast(list[object], value)))
    raise _WrongValueError("a list of numbers")


def _market(value: object) -> Market:
    if value in get_args(Market):
        return cast(Market, value)
    raise _WrongValueError(f"one of {', '.join(get_args(Market))}")


def _capability(value: object) -> tuple[int, int]:
    major, dot, minor = _text(value).partition(".")
    if dot and major.isdecimal() and minor.isdecimal():
        return int(major), int(minor)
    raise _WrongValueError('text such as "8.6"')


_KEYS: dict[str, _Kind] = {  # of a card; the keys of facts and prices begin with a source or with `prices`
    **dict.fromkeys(("title", "vendor", "architecture", "native_dtypes", "note"), _text),
    **dict.fromkeys(("unified", "ecc"), _flag),
    "aliases": _texts,
    "market": _market,
    "devices": _count,
}
_FACTS: dict[str, _Kind] = {
    **dict.fromkeys(("memory_gb", "bandwidth_gbps", "nvlink_gbps", "infinity_fabric_gbps", "int8_tops"), _number),
    **dict.fromkeys(("bf16_tflops", "fp16_tflops", "fp16_fp16acc_tflops", "fp8_tflops", "fp4_tflops"), _number),
    **dict.fromkeys(("driver_total_mib", "torch_total_mib"), _mib),
    "memory_options_gb": _numbers,
    "compute_capability": _capability,
    "pcie": _text,
    **dict.fromkeys(("tdp_watts", "slots"), _count),
    "launch_usd": _number,
    "launch_date": _text,
}
_FACTS_ON_PAGES = {**_FACTS, "page": _text}
_REQUIRED = ("title", "vendor", "architecture", "market", "native_dtypes")
_REQUIRED_FACTS = ("memory_gb", "driver_total_mib")
_PRICE_LIST: dict[str, _Kind] = dict.fromkeys(("source", "date"), _text)
_OFFER: dict[str, _Kind] = dict.fromkeys(("provider", "terms", "list"), _text)


class CardNames(NamedTuple):
    """A card's id, title and aliases."""

    name: str
    title: str
    aliases: tuple[str, ...]


class GPUTable:
    """The cards in the text of a GPU table.

    names   names of every card, in table order
    owners  id of the card with an id or alias

    Raises ConfigError, which names the file and the card, for a table or a card that cannot be read.
    """

    def __init__(self, text: str) -> None:
        self.owners: dict[str, str] = {}
        self._lines: dict[str, str] = {}
        self._cards: dict[str, GPU] = {}
        self._sources: dict[str, tuple[str, Grade]] = {}
        self._dtypes: dict[str, tuple[str, ...]] = {}
        self._price_lists: dict[str, dict[str, str]] = {}
        self._offers: dict[str, dict[str, str]] = {}
        self._mig: dict[str, dict[str, Any]] = {}  # keys of MIG profiles, by card
        names: list[CardNames] = []
        for table in text.split("\n[")[1:]:
            header, _, lines = table.partition("]")
            kind, _, name = header.partition(".")
            if kind == "gpu":
                names.append(self._add_card(name, lines))
            else:
                self._add_shared(header, kind, name, lines)
        self.names = tuple(names)

    def _add_card(self, name: str, lines: str) -> CardNames:
        entries = _checked(name, _entries(name, _line(lines, "title") + _line(lines, "aliases")), _KEYS)
        names = CardNames(name, entries.get("title", ""), entries.get("aliases", ()))
        for other in (name, *names.aliases):
            if other in self.owners:
                _refuse(name, f"the name {other!r} is already that of {self.owners[other]}")
            self.owners[other] = name
        self._lines[name] = lines
        return names

    def _add_shared(self, header: str, kind: str, name: str, lines: str) -> None:
        entries = _entries(header, lines)
        if kind == "sources" and name in get_args(Grade):
            texts = _checked(header, entries, dict.fromkeys(entries, _text))
            self._sources |= {key: (text, cast(Grade, name)) for key, text in texts.items()}
        elif header == "dtypes":
            self._dtypes = _checked(header, entries, dict.fromkeys(entries, _texts))
        elif kind == "price_lists":
            self._price_lists[name] = _checked(header, entries, _PRICE_LIST, _PRICE_LIST)
        elif kind == "offers":
            self._offers[name] = _checked(header, entries, _OFFER, _OFFER)
        elif kind == "mig":
            for card in _texts(entries.pop("cards", [])):
                self._mig[card] = entries
        else:
            _refuse(header, "unknown table; that of a card is [gpu.NAME]")

    def gpu(self, name: str) -> GPU:
        """Return the card with an id."""
        if name not in self._cards:
            self._cards[name] = self._read(name)
        return self._cards[name]

    def mig_profiles(self, card: str) -> tuple[str, ...]:
        """Return the MIG profiles of a card, smallest first."""
        return tuple(key.partition(".")[2].strip('"') for key in self._mig.get(card, ()))

    def mig_instance(self, card: str, profile: str) -> GPU:
        """Return the MIG instance of a card with one of its profiles. Its rates are unknown, and it has no price."""
        name = f"{card}:{profile}"
        if name not in self._cards:
            key, mib = next((k, v) for k, v in self._mig[card].items() if k.partition(".")[2].strip('"') == profile)
            text, grade = _row(name, "source", key.partition(".")[0], self._sources)
            self._cards[name] = _instance(self.gpu(card), name, profile, _mib(mib), Source(_OF_INSTANCE, text, grade))
        return self._cards[name]

    def _read(self, name: str) -> GPU:
        plain: dict[str, Any] = {}
        prefixed: dict[str, dict[str, Any]] = {}
        for key, value in _entries(name, self._lines[name]).items():
            prefix, dot, rest = key.rpartition(".")
            (prefixed.setdefault(prefix, {}) if dot else plain)[rest] = value
        prices = prefixed.pop("prices", {})
        fields = _checked(name, plain, _KEYS, _REQUIRED)
        fields["native_dtypes"] = _row(name, "set of dtypes", fields["native_dtypes"], self._dtypes)
        sources: list[Source] = []
        for key, entries in prefixed.items():
            text, grade = _row(name, "source", key, self._sources)
            kinds = _FACTS_ON_PAGES if "{page}" in text else _FACTS
            facts = _checked(f"{name}, {key}", entries, kinds)
            facts.pop("page", None)
            if not facts.keys().isdisjoint(fields):
                _refuse(name, f"{min(facts.keys() & fields)} has two sources")
            if "driver_total_mib" in facts:
                fields["driver_basis"] = "driver" if grade == "repo" else "rule"  # only such sources quote a driver
            fields |= facts
            sources.append(Source(tuple(map(_field, facts)), _filled(f"{name}, {key}", text, entries), grade))
        _require(name, fields, _REQUIRED_FACTS)
        return GPU(
            name=name,
            sources=tuple(sources),
            prices=tuple(self._prices(f"{name}, prices", prices)) if prices else (),
            **{_field(key): value for key, value in fields.items()},
        )

    def _prices(self, where: str, prices: Mapping[str, Any]) -> Iterator[Price]:
        for offer, usd in _checked(where, prices, dict.fromkeys(self._offers, _number)).items():
            row = self._offers[offer]
            published = _row(where, "price list", row["list"], self._price_lists)
            yield Price(row["provider"], usd, published["date"], row["terms"], published["source"])


_OF_INSTANCE = ("driver_total", "torch_total")
_OF_CARD = ("compute_capability",)  # facts that an instance shares with its card


def _instance(card: GPU, name: str, profile: str, usable: int, source: Source) -> GPU:
    """Return a MIG instance of a card with at most as many `usable` bytes as the card."""
    capability = card.source(_OF_CARD[0])
    return GPU(
        name=name,
        title=f"{card.title} MIG {profile}",
        vendor=card.vendor,
        architecture=card.architecture,
        market=card.market,
        memory_gb=int(profile.partition(".")[2].removesuffix("gb")),
        driver_total=min(usable, card.usable),
        torch_total=min(usable, card.usable),
        driver_basis="driver" if source.grade == "repo" else "rule",
        sources=(source, *((capability._replace(facts=_OF_CARD),) if capability else ())),
        compute_capability=card.compute_capability,
        native_dtypes=card.native_dtypes,
        mig=profile,
    )


def _filled(where: str, text: str, entries: Mapping[str, Any]) -> str:
    """Return a source's text with the page, or a fact, that stands in it."""
    try:
        return text.format_map(entries)
    except KeyError as error:
        _refuse(where, f"{error.args[0]} is missing")


def _field(key: str) -> str:
    """Return the field of `GPU` that a key of the file sets."""
    return key.removesuffix("_mib")


def _line(lines: str, key: str) -> str:
    """Return the line that sets a key; empty if there is none."""
    _, start, rest = lines.partition(f"\n{key} = ")
    return start + rest.partition("\n")[0]


def _entries(where: str, lines: str) -> dict[str, Any]:
    """Return the values of a table by key, dots and all."""
    entries: dict[str, Any] = {}
    for line in lines.split("\n"):
        if not line or line.startswith("#"):
            continue
        key, _, text = line.partition(" = ")
        try:
            value, end = _decode(text)
        except ValueError:
            value, end = None, 0
        if not 0 < end == len(text):
            _refuse(where, f"cannot read {line!r:.80}; write `key = value` on one line, the value as in JSON")
        if key in entries:
            _refuse(where, f"{key} stands there twice")
        entries[key] = value
    return entries


def _checked(
    where: str, entries: Mapping[str, Any], kinds: Mapping[str, _Kind], required: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the values of known keys as `GPU` holds them."""
    values: dict[str, Any] = {}
    for key, value in entries.items():
        kind = kinds.get(key)
        if kind is None:
            _refuse(where, f"unknown key {key!r}{_hint(key, kinds)}")
        try:
            values[key] = kind(value)
        except _WrongValueError as error:
            _refuse(where, f"{key} must be {error}, not {json.dumps(value):.40}")
    _require(where, values, required)
    return values


def _require(where: str, values: Collection[str], required: Iterable[str]) -> None:
    for key in required:
        if key not in values:
            _refuse(where, f"{key} is missing")


def _row(where: str, what: str, key: str, rows: Mapping[str, Any]) -> Any:
    """Return the row that a card names by its key."""
    if key not in rows:
        _refuse(where, f"unknown {what} {key!r}{_hint(key, rows)}")
    return rows[key]


def _hint(key: str, known: Iterable[str]) -> str:
    near = nearest(key, known, 1)
    return f"; did you mean {near[0]}?" if near else ""


def _refuse(where: str, problem: str) -> NoReturn:
    raise ConfigError(f"{_FILE}, {where}: {problem}", "gpu")


@cache
def gpu_table() -> GPUTable:
    """Return the bundled table."""
    return GPUTable(data_path(_FILE).read_text("utf-8"))
