"""`--spec`: a run, or part of one, from a JSON or YAML file, read as if a stranger had written it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, cast

from memplan.core.errors import SpecError, printable
from memplan.models.cards import parse_config

_MOST_BYTES = 2**20
_MOST_VALUES = 10_000  # with every alias written out
_DEEPEST = 64
_LONGEST = 200  # letters of a path that are repeated in the error about it


def read_spec(name: str) -> dict[str, Any]:
    """The mapping in the file `name` (`-` is standard input). Raises SpecError or ConfigError, in one line."""
    shown = "standard input" if name == "-" else printable(name, _LONGEST)
    text = _text(name, shown)
    if name.lower().endswith(".json"):
        return dict(parse_config(text, shown))
    return _yaml(text, shown)


def _text(name: str, shown: str) -> str:
    try:
        if name == "-":
            if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] (where it was closed)
                raise SpecError("spec: standard input is closed", "spec")
            raw = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(name).expanduser().open("rb") as file:
                raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise SpecError(f"spec: {shown} is larger than {_MOST_BYTES // 2**20} MiB, so no run", "spec")
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpecError(f"spec: {shown} is not text in UTF-8", "spec") from None
    except (OSError, RuntimeError, ValueError) as error:  # a ~user there is none of; a NUL
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise SpecError(f"spec: '{shown}' cannot be read ({reason})", "spec") from None


def _yaml(text: str, name: str) -> dict[str, Any]:
    import yaml

    loader = _loader(yaml, name)
    try:
        _refuse_bombs(yaml.parse(text, Loader=loader), name)  # pyright: ignore[reportUnknownMemberType]
        loaded: object = yaml.load(text, Loader=loader)
        spec: object = json.loads(json.dumps(loaded, allow_nan=False))  # no dates, no sets, no numbers without end
    except yaml.YAMLError as error:
        raise SpecError(f"spec: {name} is not YAML ({_problem(error)})", "spec") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"spec: {name} holds what JSON cannot ({error})", "spec") from None
    if not isinstance(spec, dict):
        raise SpecError(f"spec: {name} holds no mapping of a run's fields", "spec")
    return cast(dict[str, Any], spec)


def _loader(yaml: Any, name: str) -> Any:
    """PyYAML's safe loader, but two equal keys are an error, not the last one, and 1e-5 is a number, not a text."""

    def mapping(loader: Any, node: Any) -> Any:
        found: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in found:
                line = key.start_mark.line + 1
                raise SpecError(f"spec: {name}: the key {key.value!r:.80} is there twice, again in line {line}", "spec")
            found.add(str(key.value))
        yield from loader.construct_yaml_map(node)

    loader: Any = type("Loader", (getattr(yaml, "CSafeLoader", yaml.SafeLoader),), {})
    loader.add_constructor("tag:yaml.org,2002:map", mapping)
    loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
    return loader


def _problem(error: Any) -> str:
    """What YAML found wrong, and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error).partition(' in "<')[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {str(error.problem).removeprefix('but ')}"


def _refuse_bombs(events: Any, name: str) -> None:
    """Count values as if every alias were written out, and depth, before anything is built from them."""
    import yaml

    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and the values before it
    values = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_}:
                raise SpecError(f"spec: {name}: *{event.anchor:.80} contains itself", "spec")
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
        if values > _MOST_VALUES or len(open_) > _DEEPEST:
            limits = f"{_MOST_VALUES:,} values, aliases written out, or {_DEEPEST} levels"
            raise SpecError(f"spec: {name} holds more than {limits}", "spec")
