"""A YAML, JSON or TOML file with the line of each key. It is untrusted: nothing in it is run, imported or fetched."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path, PurePath
from typing import Any, cast

from memplan.core.errors import SpecError, misspelt, printable
from memplan.core.files import exists, expanded, is_file, is_folder, open_file
from memplan.core.records import NamedTuple
from memplan.spec.file import read_spec_with_lines, read_text, spec_with_lines

_PICKLES = (b"\x80", b"PK\x03\x04")  # the first bytes of a pickle, and of torch.save's archive
_MAX_SHOWN = 60
_REFERENCE = re.compile(r"\$\{(?:oc\.(?:select|env):)?\s{0,9}([\w.]+)\s{0,9}(?:,\s{0,9}([^${},]*))?\}")
_SECTION = re.compile(r"\s*\[([\w.]+)\]")  # of TOML
_KEY = re.compile(r"\s*([\w.]+)\s*=")
_MOST_REFERENCES = 8  # from one key to the next


class Document(NamedTuple):
    """A file's values.

    name    its name as shown
    path    its path; None for standard input
    values  its mapping
    lines   line of each key, by its path; of a notebook its cell and line
    names   key -> its name in the file, if that is another
    written   path -> text of a file that the script around it writes
    """

    name: str
    path: Path | None
    values: Mapping[str, Any]
    lines: Mapping[tuple[str, ...], int | str]
    names: Mapping[str, str] = {}
    written: Mapping[str, str] = {}

    def where(self, key: str) -> str:
        """Return where a key is, as `run.yaml:14`: of a key in a section, or else of the section."""
        path = tuple(key.split("."))
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.name}:{self.lines[path]}" if path else self.name

    def error(self, key: str, message: str, named: str = "") -> SpecError:
        """Return the error that a key's value is wrong; `named` is the key's name in the file, if not the same."""
        return SpecError(f"{self.where(key)}: {named or key}: {message}")


def read_document(name: str, text: str | None = None) -> Document:
    """Return the file `name` (`-` for standard input). Raises SpecError or ConfigError with the line.

    text  what to read instead of the file's text, as if the file had it
    """
    path = None if name == "-" else expanded(name)
    shown = "standard input" if path is None else printable(path.name, _MAX_SHOWN)
    if path is not None and text is None:
        _refuse_pickle(path, shown)
    if name.lower().endswith(".toml"):
        return _toml(read_text(name) if text is None else text, shown, path)
    values, lines = read_spec_with_lines(name) if text is None else spec_with_lines(text, name)
    return Document(shown, path, values, lines)


def _toml(text: str, shown: str, path: Path | None) -> Document:
    import tomllib

    try:
        values = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SpecError(f"{shown} is not TOML ({printable(str(error), 100)})") from None
    lines: dict[tuple[str, ...], int | str] = {}
    section: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        if (match := _SECTION.match(line)) is not None:
            section = tuple(match[1].split("."))
            lines[section] = number
        elif (match := _KEY.match(line)) is not None:
            lines[*section, *match[1].split(".")] = number
    return Document(shown, path, values, lines)


def with_references(document: Document, defaults: Mapping[str, Any]) -> Document:
    """Return the document with the values of keys in place of OmegaConf's references to them, `${a.b}`, or their
    default, `${oc.select:a.b,1}`, also of variables, `${oc.env:NAME,1}`. A reference without either, or within a text,
    stays."""
    said = dict(paths(document.values))
    if not any(isinstance(value, str) and "${" in value for value in said.values()):
        return document

    def value_of(value: Any, depth: int = 0) -> Any:
        match = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
        if match is None or depth > _MOST_REFERENCES:
            return value
        found = next((each[match[1]] for each in (said, defaults) if each.get(match[1]) is not None), match[2])
        return value if found is None else value_of(found, depth + 1)

    def resolved(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: resolved(cast(Mapping[str, Any], value)) if isinstance(value, Mapping) else value_of(value)
            for key, value in section.items()
        }

    return document._replace(values=resolved(document.values))


def document_of(values: Mapping[str, Any], within: Document, key: str) -> Document:
    """Return a mapping inside a document as a document of its own, whose lines are those of the outer one."""
    start = tuple(key.split("."))
    lines = {path[len(start) :]: line for path, line in within.lines.items() if path[: len(start)] == start != path}
    return Document(within.name, within.path, values, lines)


def named_document(name: str, within: Document, key: str) -> Document:
    """Return the file that a key names: one that its script writes; relative to the document, else to the working
    directory, or to a folder around the document if the name has a folder, too; one next to the document whose path
    ends so, if the name is a container's, /workspace/run.yaml; one that a framework publishes by its path.

    Raises SpecError if it is none of these.
    """
    written = within.written.get(str(PurePath(name)))
    if written is not None:
        return read_document(name, written)._replace(path=within.path, written=within.written)
    folder = within.path.parent if within.path is not None else Path()
    around = folder.absolute().parents if "/" in name else ()
    own = PurePath(name)
    ends = [PurePath(*own.parts[n:]) for n in range(1, len(own.parts))] if own.is_absolute() else ()
    for path in (*(place / expanded(name) for place in (folder, Path(), *around)), *(folder / end for end in ends)):
        if is_there(path) and not is_folder(path):
            return read_document(str(path))
    for end, values in _published().items():
        if f"/{name}".endswith(f"/{end}"):
            kept = {key: value for key, value in values.items() if key != "title"}
            return Document(f"{values['title']}'s {Path(end).name}", None, kept, {})
    near = misspelt(name, _published())
    hint = f"; did you mean {near}?" if near else ""
    raise within.error(key, f"there is no file {printable(name, _MAX_SHOWN)!r} next to {within.name} or here{hint}")


@cache
def _published() -> Mapping[str, Any]:
    """Return the configs that frameworks publish, by the end of their path: torchtune's recipes by their name."""
    configs = json.loads(Path(__file__).with_name("published.json").read_text("utf-8"))["configs"]
    recipes = Path(__file__).with_name("defaults") / "torchtune-recipes.json"
    return {**configs, **json.loads(recipes.read_text("utf-8"))}


def is_there(path: Path) -> bool:
    """Whether there is a file, or a folder, with a name that a file may say: too long, or with NUL, it is not there."""
    try:
        return exists(path)
    except (OSError, ValueError):
        return False


def _refuse_pickle(path: Path, shown: str) -> None:
    try:
        if not is_file(path):  # a shell's pipe can be read only once
            return
        with open_file(path) as file:
            start = file.read(4)
    except (OSError, ValueError):  # ValueError: NUL in the path
        return  # reading says why
    if start.startswith(_PICKLES):
        text = f"spec: {shown} is a pickle, which would run code when read; write its arguments as JSON or YAML"
        raise SpecError(text, "spec")


def parsed(text: str) -> object:
    """Return a mapping that is written as JSON in a string, as command-line parsers take it; else the text."""
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def paths(values: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key that does not hold a mapping, with dots between sections, and its value."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from paths(cast(Mapping[str, Any], value), f"{start}{key}.")
        else:
            yield f"{start}{key}", value
