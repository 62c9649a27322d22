"""Reading a run, or part of one, from a JSON or YAML file (`--spec`). The file is treated as untrusted input."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import printable, refused
from memplan.core.files import open_file
from memplan.models.cards import parse_config

_MAX_BYTES = 2**20
_MAX_VALUES = 10_000  # with every alias expanded
_MAX_DEPTH = 64
_MAX_SHOWN = 200  # characters of a path that an error message repeats


def read_spec(name: str) -> dict[str, Any]:
    """Return the mapping in the file `name` (`-` for standard input). Raises SpecError or ConfigError."""
    return read_spec_with_lines(name)[0]


def read_text(name: str, most: int = _MAX_BYTES) -> str:
    """Return the text in the file `name` (`-` for standard input), of at most `most` bytes. Raises SpecError."""
    return _read_text(name, "standard input" if name == "-" else printable(name, _MAX_SHOWN), most)


def read_spec_with_lines(name: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Return the mapping in the file `name`, and the line of each key by its path, for as many keys as are found."""
    return spec_with_lines(read_text(name), name)


def spec_with_lines(text: str, name: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Return the mapping in the text of the file `name`, and the line of each key, as `read_spec_with_lines` does."""
    shown = "standard input" if name == "-" else printable(name, _MAX_SHOWN)
    if name.lower().endswith(".json"):
        values = dict(parse_config(text, shown))
        return values, dict(_json_lines(text, values))
    return _parse_yaml(text, shown)


def documents_of(text: str, name: str) -> list[tuple[dict[str, Any], dict[tuple[str, ...], int]]]:
    """Return the mappings in a YAML text of one or several documents, each with the lines of its keys."""
    return _parse_documents(text, printable(name, _MAX_SHOWN))


def _json_lines(text: str, values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the path and line of each key of a JSON text, in whose order `values` are."""
    position, line = 0, 1

    def walk(inner: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
        nonlocal position, line
        if isinstance(inner, list):
            for index, item in enumerate(cast(list[Any], inner)):
                yield from walk(item, (*path, str(index)))
            return
        for key, value in cast(dict[str, Any], inner).items() if isinstance(inner, dict) else ():
            found = text.find(json.dumps(key), position)
            if found >= 0:
                line += text.count("\n", position, found)
                position = found + len(key) + 2
            yield (*path, key), line
            yield from walk(value, (*path, key))

    yield from walk(values, ())


def _read_text(name: str, shown: str, most: int = _MAX_BYTES) -> str:
    try:
        if name == "-":
            if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] (None if it is closed)
                raise refused("spec", "standard input is closed")
            raw = sys.stdin.buffer.read(most + 1)
        else:
            with open_file(Path(name).expanduser()) as file:
                raw = file.read(most + 1)
        if len(raw) > most:
            raise refused("spec", f"{shown} is larger than {most // 2**20} MiB, too large for a run")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise refused("spec", f"{shown} is not text in UTF-8") from None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: unknown ~user; ValueError: NUL in the path
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise refused("spec", f"'{shown}' cannot be read ({reason})") from None


def _parse_yaml(text: str, name: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    documents = _parse_documents(text, name, is_one=True)
    if not documents:
        is_empty = not re.sub(r"#.*", "", text).strip()
        raise refused("spec", f"{name} is empty" if is_empty else f"{name} must be a mapping of a run's fields")
    return documents[0]


def _parse_documents(
    text: str, name: str, is_one: bool = False
) -> list[tuple[dict[str, Any], dict[tuple[str, ...], int]]]:
    import yaml

    loader = _yaml_loader(yaml, name)
    try:
        _refuse_bombs(yaml.parse(text, Loader=loader), name)  # pyright: ignore[reportUnknownMemberType]
        loaded = _load(loader(text), is_one)
        specs: list[object] = [json.loads(json.dumps(values, allow_nan=False)) for _, values in loaded]  # no dates, nan
    except yaml.YAMLError as error:
        hint = "; it is a template: render it first" if re.search(r"\{[{%]", text) else ""
        raise refused("spec", f"{name} is not YAML ({_problem(error)}){hint}") from None
    except (LookupError, AttributeError):  # yaml reads a tagged value without checking it
        raise refused("spec", f"{name} holds a value that its tag does not allow, as in !!int abc") from None
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error).partition(";")[0]  # what follows is advice on Python
        raise refused("spec", f"{name} holds a value that JSON cannot represent ({reason})") from None
    return [
        (cast(dict[str, Any], spec), dict(_yaml_lines(node, ())))
        for (node, _), spec in zip(loaded, specs, strict=True)
        if isinstance(spec, dict)
    ]


def _load(loader: Any, is_one: bool) -> list[tuple[Any, object]]:
    """Return a text's documents as nodes, and as values."""
    try:
        if is_one:
            node = loader.get_single_node()
            return [] if node is None else [(node, loader.construct_document(node))]
        nodes: list[Any] = []
        while loader.check_node():
            nodes.append(loader.get_node())
        return [(node, loader.construct_document(node)) for node in nodes]
    finally:
        loader.dispose()


def _yaml_lines(node: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield the path and line of each key of a mapping's node."""
    items = cast(list[Any], node.value) if isinstance(node.value, list) else []  # pyright: ignore[reportUnknownMemberType]
    for index, item in enumerate(items):
        if isinstance(item, tuple):
            key, value = cast(tuple[Any, Any], item)
            yield (*path, str(key.value)), key.start_mark.line + 1
            yield from _yaml_lines(value, (*path, str(key.value)))
        else:
            yield from _yaml_lines(item, (*path, str(index)))


def _yaml_loader(yaml: Any, name: str) -> Any:
    """Return PyYAML's safe loader, except that a duplicate key is an error and 1e-5 is a float, not a string."""

    def mapping(loader: Any, node: Any) -> Any:
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys:
                line = key.start_mark.line + 1
                raise refused("spec", f"{name}: the key {key.value!r:.80} appears twice, again in line {line}")
            keys.add(str(key.value))
        yield from loader.construct_yaml_map(node)

    loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return loader


def _problem(error: Any) -> str:
    """Return the YAML error and its position as one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return printable(str(error).partition("\n")[0], _MAX_SHOWN)
    problem = printable(str(error.problem).removeprefix("but "), _MAX_SHOWN)
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _refuse_bombs(events: Any, name: str) -> None:
    """Raise SpecError for too many values, every alias expanded, or too deep a nesting, before anything is built."""
    import yaml

    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and number of values before it
    values = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_}:
                raise refused("spec", f"{name}: *{event.anchor:.80} contains itself")
            values += sizes.get(event.anchor, 0)
        elif isinstance(event, yaml.ScalarEvent):
            values += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_.append((event.anchor, values))
            values += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_.pop()
            if anchor:
                sizes[anchor] = values - before
        if values > _MAX_VALUES or len(open_) > _MAX_DEPTH:
            limits = f"{_MAX_VALUES:,} values (aliases expanded) or {_MAX_DEPTH} levels"
            raise refused("spec", f"{name} holds more than {limits}")
