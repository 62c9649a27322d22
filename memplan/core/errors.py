"""The errors memplan raises on purpose. Each has one line for the user and the exit code of the command.

MemplanError                2
  UnknownNameError          2   a name that is in no table, with the nearest ones that are
  SpecError                 2   a run that contradicts itself or asks for what is not supported yet
  ConfigError               2   a config.json or card that cannot be read as a model
    UnsupportedModelError   2   a family of models that memplan has no stack for yet
  ProbeError                2   a run or a machine that the probe cannot use: a library, a class or a GPU is missing
  FactsMissingError         3   the model's facts are not available (offline, gated)
  InternalError             2   memplan contradicts itself: a bug, never an answer
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

ISSUES = "https://github.com/memplan/memplan/issues"
_LONGEST = 80  # letters of a wrong name that are repeated in the error about it


def printable(text: str, longest: int | None = None) -> str:
    """`text` with what no terminal should be sent spelled out, and cut where it is longer than `longest`.

    >>> printable("a\\x1b[31mb\\n"), printable("x" * 9, 3)
    ('a\\\\x1b[31mb\\\\n', 'xxx...')
    """
    cut = text if longest is None or len(text) <= longest else f"{text[:longest]}..."
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def nearest(value: str, choices: Iterable[str], most: int = 3) -> list[str]:
    """The `choices` most like `value`, those that begin with it before others.

    >>> nearest("adamw", ["sgd", "grokadamw", "adamw_torch"], 2)
    ['adamw_torch', 'grokadamw']
    """
    import difflib

    value, known = value.lower()[:_LONGEST], list(dict.fromkeys(choices))
    longer = [choice for choice in known if value and choice.startswith(value)]
    near = [n for pool in (longer, known) for n in difflib.get_close_matches(value, pool, n=most, cutoff=0.0)]
    return list(dict.fromkeys(near))[:most]


class MemplanError(Exception):
    """Base of every error memplan raises on purpose; `field` names what is wrong in the input."""

    exit_code = 2

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and unpickle from `args` and the attributes: a subclass's constructor may take other arguments."""
        return _restore, (type(self), self.args), vars(self)


def _restore(kind: type[MemplanError], args: tuple[Any, ...]) -> MemplanError:
    """The error with these `args` and without attributes, which unpickling sets next."""
    return kind.__new__(kind, *args)


class UnknownNameError(MemplanError):
    """`value` is in no table. The nearest of `choices` are named; `ranked` choices are in order of nearness already."""

    def __init__(self, field: str, value: str, choices: Iterable[str], *, ranked: bool = False) -> None:
        near = list(choices)[:3] if ranked else nearest(value, choices)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        shown = value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
        super().__init__(f"{field}: unknown name {shown!r}{hint}", field)
        self.value = value
        self.nearest = tuple(near)


@contextmanager
def about(field: str) -> Generator[None]:
    """Errors about `model` that are raised within are about the `field` that names the model there."""
    try:
        yield
    except MemplanError as error:
        if error.field == "model":
            error.args, error.field = (f"{field}: {str(error).removeprefix('model: ')}",), field
        raise


class SpecError(MemplanError):
    """A run that contradicts itself, or asks for what memplan does not support yet."""


class ConfigError(MemplanError):
    """A config.json or card that cannot be read as a model: not JSON, a key missing, a value out of range."""


class UnsupportedModelError(ConfigError):
    """A family of models that memplan has no stack for: refused, never guessed."""


class ProbeError(MemplanError):
    """A run or a machine that the probe cannot use: a library, a model class, a compiler or a GPU is missing."""


class FactsMissingError(MemplanError):
    """The model's facts are not here: not bundled, not cached, and the network was not asked."""

    exit_code = 3


class InternalError(MemplanError):
    """memplan contradicts itself: a tensor is freed that is not there, or bytes are negative. There is no answer then.

    `what` names the tensor, and where it is.
    """

    def __init__(self, what: str) -> None:
        super().__init__(f"memplan contradicts itself: {what}; please report this run at {ISSUES}")
