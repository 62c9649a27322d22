"""Limits of a trace: its time and memory, and the configs it accepts. A hostile config ends in one line, and soon.

A model class may do anything with a config: build as many layers as it names, or read other files. So the tracing
process is limited in time and memory, has no network access, and may start no programs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, cast

from memplan.core.errors import ConfigError, printable
from memplan.core.records import NamedTuple
from memplan.core.units import GIB


class Limits(NamedTuple):
    """The limits of a trace.

    seconds     wall-clock time of one trace
    memory      bytes of the tracing process
    parameters  of the model
    """

    seconds: int
    memory: int
    parameters: int


# Far above any existing model: 70B parameters are traced in seconds and half a GiB.
DEFAULT_LIMITS = Limits(300, 8 * GIB, 10**13)

_DEEPEST, _VALUES, _LARGEST = 64, 100_000, 2**63 - 1
# Config keys that say how many copies of a module a class builds, and the most that a trace accepts.
_COUNTS = (
    (re.compile(r"(^|_)(n?_?layers?|depths?|num_blocks|n_blocks)$"), 1000, "layers"),
    (re.compile(r"(^|_)experts$"), 10_000, "experts"),
)


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a config that no real model has: too deep, too large, or with too many layers."""
    seen = 0
    for depth, key, value in _values(config):
        seen += 1
        shown = printable(key, 60)
        if depth > _DEEPEST:
            raise ConfigError(f"config: {shown} is nested more than {_DEEPEST} deep", "model")
        if seen > _VALUES:
            raise ConfigError(f"config: holds more than {_VALUES:,} values, which no model's does", "model")
        if type(value) is not int:
            continue
        if abs(value) > _LARGEST:
            raise ConfigError(f"config: {shown} has more digits than a size can have", "model")
        for pattern, most, what in _COUNTS:
            if value > most and pattern.search(key):
                raise ConfigError(f"config: {shown} {value:,}: a trace takes at most {most:,} {what}", "model")


def _values(config: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Yield the depth, key and value of every entry of the config, without recursion."""
    pending: list[tuple[int, str, Any]] = [(0, "", config)]
    while pending:
        depth, key, value = pending.pop()
        yield depth, key, value
        if isinstance(value, Mapping):
            pairs = cast(Mapping[str, Any], value).items()
            pending += [(depth + 1, str(name), inner) for name, inner in pairs]
        elif isinstance(value, (list, tuple)):
            pending += [(depth + 1, key, inner) for inner in cast(list[Any], value)]


def restrict(memory: int, seconds: int) -> None:
    """Limit this process to `memory` bytes and `seconds` of processor time, without network access or core dumps.

    On systems without such limits only the caller's timeout applies.
    """
    sys.addaudithook(_hook)
    try:
        import resource
    except ImportError:
        return
    for resource_kind, limit in (
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(resource_kind)
        resource.setrlimit(resource_kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


_NETWORK = frozenset(("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"))
_PROGRAMS = frozenset(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"))
_sealed: list[bool] = []


def seal() -> None:
    """Forbid a restricted process to start programs from here on, once its libraries are imported."""
    _sealed.append(True)


def _hook(event: str, _: object) -> None:
    if event in _NETWORK:
        raise PermissionError("a trace has no network")
    if _sealed and event in _PROGRAMS:
        raise PermissionError("a trace starts no programs")
