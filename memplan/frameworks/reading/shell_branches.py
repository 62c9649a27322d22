"""The branches that a shell script takes, where its conditions compare texts or numbers that it sets."""

from __future__ import annotations

import operator
from fnmatch import fnmatchcase

_TEXTS = {"=": operator.eq, "==": operator.eq, "!=": operator.ne}
_NUMBERS = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")}
_TESTS = ("[", "[[", "test")
_MOST_DIGITS = 20
_LONGEST_PATTERN = 200


class Branches:
    """The `if`s and `case`s that are open: of each, whether a branch around or before it rules it out, and its
    condition; of a `case`, also the word that it compares."""

    def __init__(self) -> None:
        self._open: list[tuple[bool, bool | None]] = []
        self._compared: list[str] = []
        self._in_condition = self._at_pattern = False

    @property
    def is_skipping(self) -> bool:
        """Whether the commands here do not run. A branch whose condition is not known may run."""
        is_out, holds = self._open[-1] if self._open else (False, None)
        return is_out or holds is False

    def followed(self, command: list[str]) -> list[str]:
        """Return the command without the words of an `if`; empty if it does not run, or is a condition."""
        while self._open and command[:1] == ["else"]:
            self._otherwise(True)
            command = command[1:]
        if self._at_pattern and command[:1] and command[0].endswith(")"):
            self._at_pattern, patterns = False, command[0].strip("()").split("|")
            is_known = "$" not in self._compared[-1] and len(command[0]) < _LONGEST_PATTERN
            self._otherwise(any(fnmatchcase(self._compared[-1], each) for each in patterns) if is_known else None)
            command = command[1:]
        first, rest, was_condition = command[:1], command[1:], self._in_condition
        self._in_condition = first == ["if"] or (bool(self._open) and first == ["elif"])
        if first == ["if"]:
            self._open.append((self.is_skipping, _holds(rest)))
        elif self._in_condition:
            self._otherwise(_holds(rest))
        elif self._open and was_condition and first and first[0] in _TESTS:  # of several
            self._open[-1] = (self._open[-1][0], None)
            self._in_condition = True
        elif self._open and first == ["fi"]:
            self._open.pop()
        elif first == ["case"] and rest[1:2] == ["in"]:
            self._open.append((self.is_skipping, False))
            self._compared.append(rest[0])
            self._at_pattern = True
            return self.followed(rest[2:])
        elif self._compared and first in ([";;"], ["esac"]):
            self._at_pattern = first == [";;"]
            if first == ["esac"]:
                self._open.pop()
                self._compared.pop()
        else:
            return [] if self.is_skipping else command
        return []

    def _otherwise(self, holds: bool | None) -> None:
        is_out, before = self._open[-1]
        self._open[-1] = (is_out or before is True, holds)


def _holds(words: list[str]) -> bool | None:
    """Return whether a condition holds, its variables resolved; None if it is not known."""
    if words[:1] == ["!"]:
        inverse = _holds(words[1:])
        return None if inverse is None else not inverse
    if words[:1] == [] or words[0] not in _TESTS or any(mark in word for word in words for mark in "$`*"):
        return None
    words = [word for word in words[1:] if word not in ("]", "]]")]
    words = ["", *words] if words[:1] and words[0] in _TEXTS else words  # a variable that is empty
    words = [*words, ""] if words[1:] and words[-1] in _TEXTS else words
    if len(words) == 3 and words[1] in _TEXTS:
        return bool(_TEXTS[words[1]](words[0], words[2]))
    if (
        len(words) == 3
        and words[1] in _NUMBERS
        and all(word.isdecimal() and len(word) < _MOST_DIGITS for word in words[::2])
    ):
        return bool(_NUMBERS[words[1]](int(words[0]), int(words[2])))
    if words[:1] and words[0] in ("-z", "-n"):
        return (words[0] == "-n") == any(words[1:])
    return None
