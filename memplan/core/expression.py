"""`Expression`: a size that a run decides, written down as Python instead of computed.

What is written for ints and arrays (`memplan.core.arithmetic`) also takes expressions. `compiled` makes a function of
the results, without all that they do not need. What an expression decides meanwhile is decided as in the one run that
gave its arguments their values, and the function tells when another run decides otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from memplan.core.arithmetic import ONE_RUN, Arithmetic


class Expression:
    """The source of a number. Each `{}` in it stands for one of its `parts`, which are expressions or ints."""

    __slots__ = ("parts", "source")
    __hash__ = None  # pyright: ignore[reportAssignmentType] (no key of a cache may depend on one)

    def __init__(self, source: str, *parts: Any) -> None:
        self.source, self.parts = source, parts

    def __bool__(self) -> bool:
        """Return what the one run decides. Raises TypeError if there is none."""
        arguments: dict[int, Argument] = {}
        outcome = bool(_value(self, {}, arguments))
        next(iter(arguments.values())).decided.append((self, outcome))
        return outcome

    def __neg__(self) -> Any:
        return self.parts[0] if self.source == "-{}" else Expression("-{}", self)


class Argument(Expression):
    """An argument of a function, its value in one run, and what expressions of it decided there."""

    __slots__ = ("decided", "value")

    def __init__(self, name: str, value: int | None = None) -> None:
        super().__init__(name)
        self.value, self.decided = value, list[tuple[Expression, bool]]()


def _value(part: Any, known: dict[int, int], arguments: dict[int, Argument]) -> int:
    """Return the value of a part in the one run; adds to the values `known` by the id of an expression, and to the
    `arguments` found."""
    if not isinstance(part, Expression):
        return part
    if isinstance(part, Argument):
        if part.value is None:
            raise TypeError("what depends on an expression is chosen by `WRITTEN`")
        arguments[id(part)] = part
        return part.value
    if id(part) not in known:
        values = (_value(each, known, arguments) for each in part.parts)
        known[id(part)] = eval(part.source.format(*(f"({value})" for value in values)))  # of operators and numbers
    return known[id(part)]


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


def arithmetic_of(*sizes: Any) -> Arithmetic[Any]:
    """Return the arithmetic of the sizes of one run, or of expressions if one of them is."""
    return WRITTEN if any(isinstance(size, Expression) for size in sizes) else ONE_RUN


def compiled(results: Iterable[Any], *arguments: Argument) -> Callable[..., list[int] | None]:
    """Return a function of the arguments that returns a list of the results, which are expressions of them.

    It returns None for a run in which something is decided otherwise than in the one that the arguments are of.
    """
    numbers: dict[tuple[Any, ...], int] = {}  # source and numbers of the parts -> number: equal ones are computed once
    known: dict[int, int] = {}  # the same by the id of an expression

    def number(part: Any) -> int:
        if not isinstance(part, Expression):
            return numbers.setdefault((repr(part),), len(numbers))
        if id(part) not in known:
            key = (part.source, *map(number, part.parts))
            known[id(part)] = numbers.setdefault(key, len(numbers))
        return known[id(part)]

    results = [*results]  # kept, and with them the ids of their parts
    decided = {(number(part), outcome) for argument in arguments for part, outcome in argument.decided}
    returned = [*map(number, results)]
    uses = Counter(part for _, *parts in numbers for part in parts) + Counter(returned)
    uses.update(part for part, _ in decided)
    lines: list[str] = []
    texts: list[str] = []
    for (source, *parts), n in numbers.items():
        text = source.format(*(texts[part] for part in parts))
        if parts and uses[n] > 1:
            lines.append(f"x{n} = {text}")
            text = f"x{n}"
        texts.append(f"({text})" if parts and uses[n] == 1 else text)
    same = (texts[n] if outcome else f"not {texts[n]}" for n, outcome in sorted(decided))
    lines.append(f"return [{', '.join(texts[n] for n in returned)}]")
    if decided:
        lines[-1] += f" if {' and '.join(same)} else None"
    space: dict[str, Any] = {}
    source = f"def function({', '.join(each.source for each in arguments)}):\n " + "\n ".join(lines)
    exec(source, space)  # of operators, whole numbers and the arguments alone
    return space["function"]
