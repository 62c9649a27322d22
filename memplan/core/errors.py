"""The errors that memplan raises on purpose, each with a one-line message, a code and the command's exit code.

MemplanError               error                2
  UnknownNameError         unknown_name         2   an unknown name, with the nearest known ones
  SpecError                invalid_run          2   a run that contradicts itself
                           not_supported        2   a field or value that is not supported yet
    FieldError             invalid_value        2   a value of the wrong type, or out of range
                           unknown_field        2   a key that no part of a run has
                           missing_field        2   a field without a default that was not given
  ConfigError              unreadable           2   a config.json, model card or GPU table that cannot be read
    UnsupportedModelError  unsupported_model    2   a model family that is not supported yet
  ProbeError               probe_unavailable    2   a library, a class or a GPU that the probe needs is missing
  FactsMissingError        model_not_available  3   the model's config is not available (offline, gated)
  InternalError            internal             2   a bug in memplan, reported instead of a wrong answer
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

ISSUES = "https://github.com/memplan/memplan/issues"
_ALIKE = 0.72  # of the letters of a misspelt name are in the one that is meant
_MAX_SHOWN = 80  # characters of a wrong name that an error message repeats


def printable(text: str, longest: int | None = None) -> str:
    """Return `text` with unprintable characters escaped, cut off after `longest` characters.

    >>> printable("a\\x1b[31mb\\n"), printable("x" * 9, 3)
    ('a\\\\x1b[31mb\\\\n', 'xxx...')
    """
    cut = text if longest is None or len(text) <= longest else f"{text[:longest]}..."
    return cut if cut.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in cut)


def nearest(value: str, choices: Iterable[str], most: int = 3) -> list[str]:
    """Return the `choices` most similar to `value` in any case, those that begin with it first.

    >>> nearest("adamw", ["sgd", "grokadamw", "adamw_torch"], 2), nearest("q8", ["nf4", "fp8", "Q8_0"], 1)
    (['adamw_torch', 'grokadamw'], ['Q8_0'])
    """
    value, known = value.lower()[:_MAX_SHOWN], {choice.lower(): choice for choice in choices}
    longer = [word for word in known if value and word.startswith(value)]
    near = [*most_similar(value, longer, most), *most_similar(value, known, most)]
    return [known[word] for word in dict.fromkeys(near)][:most]


def most_similar(value: str, words: Iterable[str], most: int) -> list[str]:
    """Return what `difflib.get_close_matches` returns without a cutoff, for 2,000 words in a fifth of its time.

    The words with the highest upper bounds are compared first, until no bound reaches the best ratios found.
    """
    from difflib import SequenceMatcher

    compared, best = SequenceMatcher(b=value), list[tuple[float, str]]()

    def bound(word: str) -> float:
        compared.set_seq1(word)
        return compared.quick_ratio()

    for upper, word in sorted([(bound(word), word) for word in words], reverse=True):
        if len(best) == most and upper < best[-1][0]:
            break
        compared.set_seq1(word)
        best = sorted([*best, (compared.ratio(), word)], reverse=True)[:most]
    return [word for _, word in best]


def misspelt(value: str, choices: Iterable[str]) -> str:
    """Return the choice that `value` may be a misspelling of; empty if none is like it.

    >>> misspelt("lora_dropuot", ["lora_r", "lora_dropout"]), misspelt("seed", ["lora_r"])
    ('lora_dropout', '')
    """
    from difflib import get_close_matches

    return next(iter(get_close_matches(value[:_MAX_SHOWN], [*choices], 1, _ALIKE)), "")


class MemplanError(Exception):
    """Base class of every error that memplan raises on purpose.

    code         a word for the kind of error, which stays the same from version to version
    field        dotted path of the input field that is wrong
    suggestions  values, or names of fields, that may have been meant, the nearest first
    """

    exit_code = 2
    code = "error"

    def __init__(self, message: str, field: str = "", suggestions: Iterable[str] = ()) -> None:
        super().__init__(message if message.isprintable() else printable(" ".join(message.split())))
        self.field = field
        self.suggestions = tuple(suggestions)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and unpickle from `args` and the attributes: a subclass's constructor may take other arguments."""
        return _restore, (type(self), self.args), vars(self)


def _restore(kind: type[MemplanError], args: tuple[Any, ...]) -> MemplanError:
    """Return the error with these `args` and no attributes, which unpickling sets next."""
    return kind.__new__(kind, *args)


class UnknownNameError(MemplanError):
    """An unknown `value`; the message names the nearest of `choices`, the first three if they are already `ranked`."""

    code = "unknown_name"

    def __init__(self, field: str, value: str, choices: Iterable[str], *, ranked: bool = False) -> None:
        near = list(choices)[:3] if ranked else nearest(value, choices)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        shown = value if len(value) <= _MAX_SHOWN else f"{value[:_MAX_SHOWN]}..."
        super().__init__(f"{field}: unknown name {shown!r}{hint}", field, near)
        self.value = value


class errors_about:  # noqa: N801 (a context manager, quicker than a generator)
    """Re-raise errors about the field `own` as errors about `field`, for what is named elsewhere than in a run.

    Without `own`, errors about any field are about a field of `field`, as in `jobs.3.run`.
    """

    def __init__(self, field: str, own: str = "model") -> None:
        self._field, self._own = field, own

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, MemplanError) and self._own in ("", error.field):
            line, inside = str(error).removeprefix(f"{error.field}: "), "" if self._own else error.field
            error.field = ".".join(filter(None, (self._field, inside)))
            error.args = (f"{error.field}: {line}",)


class SpecError(MemplanError):
    """A run that contradicts itself or is not supported yet."""

    code = "invalid_run"


class FieldError(SpecError):
    """A value that a field cannot have, an unknown key or a missing one: pydantic's error, in a line.

    kind  the code
    """

    def __init__(self, kind: str, message: str, field: str, suggestions: Iterable[str] = ()) -> None:
        super().__init__(message, field, suggestions)
        self.code = kind


def refused(field: str, message: str) -> SpecError:
    """Return the error that `field` cannot be what it is; the message says what is wrong and what to use instead."""
    error = SpecError(f"{field}: {message}", field)
    if "supported yet" in message:
        error.code = "not_supported"
    return error


class ConfigError(MemplanError):
    """A config.json, model card or GPU table that cannot be read: invalid JSON, a missing key, a value out of range."""

    code = "unreadable"


class UnsupportedModelError(ConfigError):
    """A model family that is not supported: refused, never guessed."""

    code = "unsupported_model"


class ProbeError(MemplanError):
    """A run or a machine that the probe cannot use: a library, a model class, a compiler or a GPU is missing."""

    code = "probe_unavailable"


class FactsMissingError(MemplanError):
    """The model's config is not available: neither bundled nor cached, and not fetched from the network."""

    exit_code = 3
    code = "model_not_available"


class InternalError(MemplanError):
    """A bug in memplan: a tensor is freed twice, or bytes are negative. `what` names the tensor and where it is."""

    code = "internal"

    def __init__(self, what: str) -> None:
        super().__init__(f"memplan contradicts itself: {what}; please report this run at {ISSUES}")
