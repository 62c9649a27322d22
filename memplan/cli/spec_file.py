"""`--spec`: a whole run from a JSON or YAML file, read as if a stranger had written it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

from memplan.cards import parse_config
from memplan.errors import SpecError

_MOST_BYTES = 2**20
_MOST_VALUES = 10_000  # with every alias written out
_DEEPEST = 64


def read_spec(name: str) -> dict[str, Any]:
    """The mapping in the file `name` (`-` is standard input). Raises SpecError or ConfigError, in one line."""
    text = _text(name)
    if name.endswith(".json"):
        return dict(parse_config(text, name))
    return _yaml(text, name)


def _text(name: str) -> str:
    try:
        if name == "-":
            raw = sys.stdin.buffer.read(_MOST_BYTES + 1)
        else:
            with Path(name).expanduser().open("rb") as file:
                raw = file.read(_MOST_BYTES + 1)
        if len(raw) > _MOST_BYTES:
            raise SpecError(f"spec: {name} is larger than {_MOST_BYTES // 2**20} MiB, so no run", "spec")
        return raw.decode("utf-8-sig")
    except (OSError, RuntimeError) as error:  # RuntimeError: a ~user there is none of
        raise SpecError(f"spec: {name:.200} cannot be read ({getattr(error, 'strerror', error)})", "spec") from None
    except UnicodeDecodeError:
        raise SpecError(f"spec: {name} is not text in UTF-8", "spec") from None


def _yaml(text: str, name: str) -> dict[str, Any]:
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_bombs(yaml.parse(text, Loader=loader), name)  # pyright: ignore[reportUnknownMemberType]
        loaded: object = yaml.load(text, Loader=loader)
        spec: object = json.loads(json.dumps(loaded, allow_nan=False))  # no dates, no sets, no numbers without end
    except yaml.YAMLError as error:
        raise SpecError(f"spec: {name} is not YAML ({error})", "spec") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"spec: {name} holds what JSON cannot ({error})", "spec") from None
    if not isinstance(spec, dict):
        raise SpecError(f"spec: {name} holds no mapping of a run's fields", "spec")
    return cast(dict[str, Any], spec)


def _refuse_bombs(events: Any, name: str) -> None:
    """Count values as if every alias were written out, and depth, before anything is built from them."""
    import yaml

    sizes: dict[str, int] = {}
    open_: list[tuple[str | None, int]] = []  # anchor, and the values before it
    values = 0
    for event in events:
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in {anchor for anchor, _ in open_}:
                raise SpecError(f"spec: {name}: *{event.anchor} contains itself", "spec")
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
