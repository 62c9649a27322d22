"""The branches that a shell script takes, where its conditions compare texts or numbers that it sets."""

from __future__ import annotations

import operator

_TEXTS = {"=": operator.eq, "==": operator.eq, "!=": operator.ne}
_NUMBERS = {f"-{name}": getattr(operator, name) for name in ("eq", "ne", "gt", "ge", "lt", "le")}
_TESTS = ("[", "[[", "test")


class Branches:
    """The `if`s that are open: of each, what the conditions up to this branch are; None if one is not known."""

    def __init__(self) -> None:
        self._open: list[list[bool | None]] = []

    @property
    def is_skipping(self) -> bool:
        """Whether the commands here do not run. All branches may run if a condition is not known."""
        return any(last is False or True in before for *before, last in self._open)

    def followed(self, command: list[str]) -> list[str]:
        """Return the command without the words of an `if`; empty if it does not run, or is a condition."""
        first, *rest = command or [""]
        if first == "if":
            self._open.append([_holds(rest)])
        elif self._open and first == "elif":
            self._open[-1].append(_holds(rest))
        elif self._open and first == "fi":
            self._open.pop()
        elif self._open and first in _TESTS:
            self._open[-1][-1] = None  # a condition of several
        elif self._open and first == "else":
            self._open[-1].append(True)
            return self.followed(rest)
        elif not self.is_skipping:
            return command
        return []


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
    if len(words) == 3 and words[1] in _NUMBERS and all(word.isdecimal() for word in words[::2]):
        return bool(_NUMBERS[words[1]](int(words[0]), int(words[2])))
    if words[:1] and words[0] in ("-z", "-n"):
        return (words[0] == "-n") == any(words[1:])
    return None
