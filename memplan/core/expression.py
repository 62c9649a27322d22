"""`Expression`: a size that a run decides, written down as Python instead of computed.

What is written for ints and arrays (`memplan.core.arithmetic`) also takes expressions. `compiled` makes a function of
the results, without all that they do not need.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from memplan.core.arithmetic import Arithmetic


class Expression:
    """The source of a number. Each `{}` in it stands for one of its `parts`, which are expressions or ints."""

    __slots__ = ("parts", "source")

    def __init__(self, source: str, *parts: Any) -> None:
        self.source, self.parts = source, parts

    def __bool__(self) -> bool:
        raise TypeError("what depends on an expression is chosen by `WRITTEN`")

    def __neg__(self) -> Any:
        return self.parts[0] if self.source == "-{}" else Expression("-{}", self)


def _operator(sign: str, neutral: int | None = None, reverse: bool = False) -> Callable[[Any, Any], Any]:
    """Return a method that writes an operation; one with the `neutral` number on the right changes nothing."""
    source = f"{{}} {sign} {{}}"
    if reverse:
        return lambda b, a: Expression(source, a, b)
    return lambda a, b: a if type(b) is int and b == neutral else Expression(source, a, b)


for _name, _sign, _neutral in (("add", "+", 0), ("sub", "-", 0), ("mul", "*", 1), ("floordiv", "//", 1)):
    setattr(Expression, f"__{_name}__", _operator(_sign, _neutral))
    setattr(Expression, f"__r{_name}__", _operator(_sign, _neutral, _name in ("sub", "floordiv")))
for _name, _sign in (("mod", "%"), ("and", "&"), ("eq", "=="), ("gt", ">"), ("ge", ">="), ("lt", "<"), ("le", "<=")):
    setattr(Expression, f"__{_name}__", _operator(_sign))

_write: Callable[..., Any] = Expression
WRITTEN: Arithmetic[Any] = Arithmetic(
    lambda a, b: _write("{} if {} <= {} else {}", a, a, b, b),
    lambda a, b: _write("{} if {} >= {} else {}", a, a, b, b),
    lambda true, this, that: _write("{} if {} else {}", this, true, that),
    lambda a: _write("1 << ({} - 1).bit_length()", a),
)


def compiled(function: Callable[..., Iterable[Any]], *arguments: str) -> Callable[..., list[int]]:
    """Return a function with these arguments that returns a list of what `function` returns of expressions of them."""
    numbers: dict[tuple[Any, ...], int] = {}  # source and numbers of the parts -> number: equal ones are computed once
    known: dict[int, int] = {}  # the same by the id of an expression

    def number(part: Any) -> int:
        if not isinstance(part, Expression):
            return numbers.setdefault((repr(part),), len(numbers))
        if id(part) not in known:
            key = (part.source, *map(number, part.parts))
            known[id(part)] = numbers.setdefault(key, len(numbers))
        return known[id(part)]

    results = [*function(*map(Expression, arguments))]  # kept, and with them the ids of their parts
    returned = [*map(number, results)]
    uses = Counter(part for _, *parts in numbers for part in parts) + Counter(returned)
    lines: list[str] = []
    texts: list[str] = []
    for (source, *parts), n in numbers.items():
        text = source.format(*(texts[part] for part in parts))
        if parts and uses[n] > 1:
            lines.append(f"x{n} = {text}")
            text = f"x{n}"
        texts.append(f"({text})" if parts and uses[n] == 1 else text)
    lines.append(f"return [{', '.join(texts[n] for n in returned)}]")
    space: dict[str, Any] = {}
    source = f"def function({', '.join(arguments)}):\n " + "\n ".join(lines)
    exec(source, space)  # of operators, whole numbers and the arguments alone
    return space["function"]
