"""What a trace may take, and what a config may say that is traced: a hostile one ends in one line, and soon.

A model class does with a config what it likes: it makes as many layers as it says, or asks for other files. So the
process that traces has an end on the clock and of memory, no network, and starts no programs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, cast

from memplan.core.errors import ConfigError, printable
from memplan.core.units import GIB


class Limits(NamedTuple):
    """`seconds` on the clock for one trace, `memory` in bytes of its process, `parameters` of a model."""

    seconds: int
    memory: int
    parameters: int


# Far above any model there is: one of 70B is traced in seconds and half a GiB.
USUAL = Limits(300, 8 * GIB, 10**13)

_DEEPEST, _VALUES, _LARGEST = 64, 100_000, 2**63 - 1
# Numbers that say how often a class makes a module, and the most that a trace takes.
_COUNTS = (
    (re.compile(r"(^|_)(n?_?layers?|depths?|num_blocks|n_blocks)$"), 1000, "layers"),
    (re.compile(r"(^|_)experts$"), 10_000, "experts"),
)


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a config that no model has: too deep, too large, or with too many layers."""
    seen = 0
    for depth, key, value in _values(config):
        seen += 1
        shown = printable(key, 60)
        if depth > _DEEPEST:
            raise ConfigError(f"config: {shown} is nested more than {_DEEPEST} deep", "model")
        if seen > _VALUES:
            raise ConfigError(f"config: holds more than {_VALUES:,} values, so no model's", "model")
        if type(value) is not int:
            continue
        if abs(value) > _LARGEST:
            raise ConfigError(f"config: {shown} has more digits than a size can have", "model")
        for pattern, most, what in _COUNTS:
            if value > most and pattern.search(key):
                raise ConfigError(f"config: {shown} {value:,}: a trace takes at most {most:,} {what}", "model")


def _values(config: Mapping[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """Every value of the config with its depth and the key it lies under, without recursion."""
    waiting: list[tuple[int, str, Any]] = [(0, "", config)]
    while waiting:
        depth, key, value = waiting.pop()
        yield depth, key, value
        if isinstance(value, Mapping):
            pairs = cast(Mapping[str, Any], value).items()
            waiting += [(depth + 1, str(name), inner) for name, inner in pairs]
        elif isinstance(value, (list, tuple)):
            waiting += [(depth + 1, key, inner) for inner in cast(list[Any], value)]


def restrict(memory: int, seconds: int) -> None:
    """Limit this process: bytes of its own memory, seconds of processor time; it has no network, and leaves no core.

    Where the system has no such limits the caller's clock is all there is.
    """
    sys.addaudithook(_hook)
    try:
        import resource
    except ImportError:
        return
    for what, most in ((resource.RLIMIT_DATA, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_CORE, 0)):
        _, hard = resource.getrlimit(what)
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


_NETWORK = frozenset(("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"))
_PROGRAMS = frozenset(("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork"))
_sealed: list[bool] = []


def seal() -> None:
    """From here on a restricted process starts no other programs: its libraries are there."""
    _sealed.append(True)


def _hook(event: str, _: object) -> None:
    if event in _NETWORK:
        raise PermissionError("a trace has no network")
    if _sealed and event in _PROGRAMS:
        raise PermissionError("a trace starts no programs")
