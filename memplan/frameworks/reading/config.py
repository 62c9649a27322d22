"""A framework's config as its rules read it: what the file says, or else the framework's default, and why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, cast

from memplan.core.errors import SpecError, printable
from memplan.core.records import NamedTuple
from memplan.frameworks.change_table import Framework
from memplan.frameworks.reading.document import Document, document_of, named_document, parsed, paths
from memplan.spec.fields import field_of

_FOLDER = Path(__file__).parent / "defaults"
# `auto` turns on what the machine has.
_WORDS = {word: on for on, words in ((True, "true auto yes on 1"), (False, "false no off 0")) for word in words.split()}
_MAX_SHOWN = 40
TYPED = "the command line"


class FieldOrigin(NamedTuple):
    """A field of a run, and where its value is from.

    field  dotted path
    value  its value, as JSON
    why    file, line and key, a framework's default, a rule, or an assumption
    """

    field: str
    value: Any
    why: str


class Typed(NamedTuple):
    """A key's value that was typed rather than read in the file, and where."""

    value: Any
    why: str


class Unread(NamedTuple):
    """A key whose value may take memory and is not understood, and what to know about it."""

    where: str
    key: str
    note: str


class Defaults(NamedTuple):
    """A framework's keys and its defaults.

    read      version -> the package that was read
    defaults  version -> key -> default; a key without a literal default is missing
    keys      all keys of these versions
    """

    read: Mapping[str, str]
    defaults: Mapping[str, Mapping[str, Any]]
    keys: frozenset[str]

    def newest_until(self, version: str | None) -> str:
        """Return the newest version that was read and is not newer than `version`; else the oldest."""
        known = sorted(self.defaults, key=version_number)
        older = [each for each in known if version is None or version_number(each) <= version_number(version)]
        return older[-1] if older else known[0]


def version_number(version: str) -> tuple[int, ...]:
    """Return a version's numbers, to compare by."""
    return tuple(int(part) for part in version.split(".") if part.isdecimal())


@cache
def defaults_of(framework: str) -> Defaults:
    """Return the keys and defaults of a framework."""
    data = json.loads((_FOLDER / f"{framework}.json").read_text("utf-8"))
    return Defaults(data["read"], data["defaults"], frozenset(data["keys"]))


class Config:
    """A config file with its framework's defaults. It notes which keys were read, and what was not understood.

    document    the file
    title       the framework and version, as shown
    defaults    key -> default
    companions  the files given along with it, by kind: `accelerate`, `deepspeed`
    renamed     key -> its old name, which the file has
    gpus        how many GPUs were typed
    command     the program and subcommand that start the run; empty for a file
    options     field -> the value that an option sets
    typed       key -> a value that was typed, which replaces the file's
    launched    the dtype that accelerate's file casts to, which holds if the run's file does not cast
    found       the fields found so far, by path
    """

    def __init__(
        self, document: Document, title: str, defaults: Mapping[str, Any], companions: Mapping[str, Document]
    ) -> None:
        self.document = document
        self.title = title
        self.defaults = defaults
        self.companions = companions
        self.renamed: dict[str, str] = {}
        self.launched: FieldOrigin | None = None
        self.typed: Mapping[str, Typed] = {}
        self.gpus: int | None = None
        self.command = ""
        self.options: Mapping[str, Any] = {}
        self.found: dict[str, FieldOrigin] = {}
        self.unread: list[Unread] = []
        self.read: set[str] = set()

    def get(self, key: str) -> Any:
        """Return a key's value, by its path with dots; None if neither the file nor the framework has one."""
        said = self.said(key)
        return self.defaults.get(key) if said is None else said

    def said(self, key: str) -> Any:
        """Return the file's value, or what was typed instead; None if it has none, or an empty one."""
        self.read.add(key)
        if key in self.typed:
            return self.typed[key].value
        value: Any = self.document.values
        for part in key.split("."):
            value = parsed(value) if isinstance(value, str) else value
            value = cast(Mapping[str, Any], value).get(part) if isinstance(value, Mapping) else None
        return None if value in ("", "null", "None") else value

    def why(self, *keys: str) -> str:
        """Return where the values of keys are from."""
        said = [key for key in keys if self.said(key) is not None]
        sources = [
            self.typed[k].why if k in self.typed else f"{self.document.where(k)} {self.written(k)}" for k in said
        ]
        return ", ".join(sources) or f"default of {self.title}"

    def where(self, key: str) -> str:
        """Return where a key is: in the file, or in a command that names the file."""
        return self.typed[key].why.partition(" --")[0] if key in self.typed else self.document.where(key)

    def written(self, key: str) -> str:
        """Return a key's name in the file, which may be an old one."""
        name = self.document.names.get(key) or self.renamed.get(key)
        if name is not None:
            return name
        top, dot, rest = key.partition(".")
        return f"{self.renamed.get(top, top)}{dot}{rest}"

    def text(self, key: str) -> str | None:
        value = self.get(key)
        if value is None or isinstance(value, str):
            return value
        raise self.error(key, f"must be text, not {shown(value)}")

    def word(self, key: str, *choices: str) -> str | None:
        """Return one of the words. Raises SpecError with all of them."""
        value = self.get(key)
        word = str(value).lower() if isinstance(value, bool) else value
        if word is None or word in choices:
            return cast("str | None", word)
        raise self.error(key, f"{shown(value)} is not supported; supported: {', '.join(choices)}")

    def whole(self, key: str) -> int | None:
        """Return a whole number, which may be written as text or with an exponent."""
        number = self.number(key)
        if number is None or number.is_integer():
            return None if number is None else int(number)
        raise self.error(key, f"must be a whole number, not {shown(self.get(key))}")

    def number(self, key: str) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = float("nan")
            if abs(number) <= 2.0**53:
                return number
        raise self.error(key, f"must be a number, not {shown(value)}")

    def flag(self, key: str) -> bool:
        """Return whether a key is on."""
        value = self.get(key)
        if value is None or isinstance(value, bool):
            return bool(value)
        if str(value).lower() in _WORDS:
            return _WORDS[str(value).lower()]
        raise self.error(key, f"must be true or false, not {shown(value)}")

    def names(self, key: str) -> list[str] | None:
        """Return names, which may be written as one text, separated by commas or spaces."""
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if isinstance(value, Sequence) and all(isinstance(each, str) for each in cast(Sequence[object], value)):
            return list(cast(Sequence[str], value)) or None
        raise self.error(key, f"must be a list of names, not {shown(cast(object, value))}")

    def section(self, key: str) -> Document | None:
        """Return a section of the file, or the file that the key names, with its lines; None if there is neither."""
        value = self.said(key)
        if isinstance(value, str):
            inner = parsed(value)
            if not isinstance(inner, Mapping):
                return named_document(value, self.document, key)
            value = cast(Mapping[str, Any], inner)
        if value is None or isinstance(value, Mapping):
            return document_of(cast(Mapping[str, Any], value), self.document, key) if value else None
        raise self.error(key, f"must be a mapping, or the name of a file, not {shown(value)}")

    def set(self, field: str, value: Any, *keys: str, why: str = "") -> None:
        """Set a field of the run. The reason is `why`, and where the values of the keys are from."""
        sources = self.why(*keys) if keys else ""
        self.found[field] = FieldOrigin(field, value, ": ".join(filter(None, (why, sources))))

    def value(self, field: str) -> Any:
        """Return the value found for a field; None if it is open."""
        return self.found[field].value if field in self.found else None

    def leave(self, key: str, note: str, document: Document | None = None) -> None:
        """Note a key that is not understood."""
        self.read.add(key)
        self.unread.append(Unread(document.where(key) if document else self.where(key), key, note))

    def error(self, key: str, message: str) -> SpecError:
        if key in self.typed:
            return SpecError(f"{self.typed[key].why}: {message}")
        return self.document.error(key, message, named=self.written(key))

    def refuse(self, key: str, supported: str = "") -> SpecError:
        """Return the error that a key's value is not supported yet."""
        more = f"; supported: {supported}" if supported else "; leave it out"
        return self.error(key, f"{shown(self.get(key))} is not supported yet{more}")

    def read_same(self, table: Framework) -> None:
        """Set the fields whose value is that of one key, by the rows of the table that also writes the keys."""
        for key in table.keys:
            if (
                not key.is_same
                or self.get(key.key) is None
                or (self.said(key.key) is None and self.get(key.key) is False)
            ):
                continue
            kind = field_of(key.fields[0]).type
            read: Mapping[type, Callable[[str], Any]] = {int: self.whole, float: self.number, bool: self.flag}
            self.set(key.fields[0], read.get(kind, self.text)(key.key), key.key)

    def left(self) -> Iterator[str]:
        """Yield the keys of the file that have a value and were not read: of a section, if only parts of it were."""
        flags = {key: each.value for key, each in self.typed.items() if each.why != TYPED}
        for path, value in {**dict(paths(self.document.values)), **flags}.items():
            top = path.partition(".")[0]
            if value in (None, "", [], {}) or path in self.read:
                continue
            if top not in self.read or any(read.startswith(f"{top}.") for read in self.read):
                yield path


Rule: TypeAlias = "Callable[[Config], None]"


def shown(value: object) -> str:
    """Return a value as JSON and YAML write it, cut off."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return printable(repr(value), _MAX_SHOWN)
