"""A command and the rows of its options, from which its plain command lines are parsed without typer.

A line is plain if every option exists and has a value of its type. Any other is left to typer, which makes parameters
of the same rows, for help, completion and errors too. Importing typer takes longer than most answers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from memplan.cli.outcome import run_and_report
from memplan.cli.waiting import shown_while
from memplan.core.records import NamedTuple
from memplan.spec.option_values import FLAGS, retold
from memplan.spec.options import Option, flag

Options = Mapping[str, Mapping[str, Option]]  # heading in help -> name -> option
Switch = Literal[True]  # the type of a flag without a --no- form
COMMAND = "-- "  # begins a run's command where the name of its file would be


class Subcommand(NamedTuple):
    """A command whose work gets the options that are on the command line.

    name     as it is typed
    work     returns the exit code
    options  its rows
    help     the docstring of `work`, if not another text
    rewrite  changes the words before they are parsed
    serves   whether it runs until it is stopped, so that no line says how long it takes
    """

    name: str
    work: Callable[[dict[str, Any]], int]
    options: Options
    help: str = ""
    rewrite: Callable[[list[str]], list[str]] = list
    serves: bool = False

    def run(self, given: dict[str, Any]) -> int:
        """Run the command and return its exit code; errors become one line."""
        if self.serves:
            return run_and_report(lambda: self.work(given), given)
        return run_and_report(lambda: shown_while(lambda: self.work(given)), given)

    def rewritten(self, words: Sequence[str]) -> list[str]:
        """Return the words in memplan's own names, with a command after `--` as the run's file: `memplan -- trl sft
        --config trl.yaml`."""
        words = self.rewrite([*words])
        index = words.index("--") if "--" in words else len(words)
        own = [*self._respelled(words[:index])]
        if len(words) < index + 3 or not any("spec" in group for group in self.options.values()):
            return [*own, *words[index:]]
        import shlex

        return [*own, f"--spec={COMMAND}{shlex.join(words[index + 1 :])}"]

    def _respelled(self, words: Iterable[str]) -> Iterator[str]:
        """Yield the words with other tools' names for options, and people's for values, replaced by the options'."""
        rows = [(name, option) for group in self.options.values() for name, option in group.items()]
        named = {flag(alias): row for row in rows for alias in (*row[1].aliases, row[0])}
        named |= {f"--no-{name[2:]}": row for name, row in named.items() if row[1].alone}
        rest, has_argument = deque(words), False
        while rest:
            word = rest.popleft()
            typed, equals, value = word.partition("=")
            if typed[2:] in FLAGS and flag("method") in named:
                yield from (flag("method"), typed[2:])
                continue
            if typed in _RETOLD and flag("gpu") in named:
                name, text = retold(typed[2:], value if equals else rest.popleft() if rest else "")
                if f"--{name}" != typed:
                    yield from (flag(name), text)
                    continue
                yield from (f"{typed}={text}",) if equals else (typed, text)
                continue
            name, option = named.get(typed.replace("_", "-"), ("", None)) if typed.startswith("--") else ("", None)
            if option is None:
                has_argument |= not word.startswith("-")
                yield word
                continue
            is_value = bool(rest) and (is_meant(rest[0], option.choices) or (has_argument and rest[0][:1] != "-"))
            if option.alone and not equals and not is_value:
                yield f"{flag(name)}={option.alone[typed.startswith('--no-')]}"
                continue
            if type_of(option) in (bool, Switch):
                yield flag(name) + equals + value
                continue
            if not equals and not rest:
                yield flag(name)
                return
            text = value if equals else rest.popleft()
            text = option.spelling(text) if option.spelling is not None else text
            name, text = retold(name, text)
            if option.is_argument:
                yield text
            else:
                yield from (f"{flag(name)}={text}",) if equals else (flag(name), text)

    def given(self, words: Sequence[str]) -> dict[str, Any] | None:
        """Return the options' values in the order they are typed, then the argument; None if the line is not plain."""
        options = {flag(name): (name, option) for group in self.options.values() for name, option in group.items()}
        arguments: list[str] = []
        given: dict[str, Any] = {}
        rest = iter(self.rewritten(words))
        for word in rest:
            if not word.isascii() or not word:
                return None
            if not word.startswith("-"):
                arguments.append(word)
                continue
            typed, has_value, text = word.partition("=")
            is_on = typed in options or not typed.startswith("--no-")
            name, option = options.get(typed if is_on else f"--{typed[5:]}", ("", None))
            if option is None or option.is_argument:
                return None
            type_ = type_of(option)
            if type_ in (bool, Switch):
                if has_value or (type_ is Switch and not is_on):
                    return None
                given[name] = is_on
                continue
            value = _value(text if has_value else next(rest, ""), type_)
            if value is None or not is_on:
                return None
            given[name] = [*given.get(name, ()), value] if get_origin(type_) is list else value
        return self._with_arguments(given, arguments)

    @staticmethod
    def _joined(name: str, arguments: list[str]) -> list[str] | None:
        """Return words that are the name of one bundled model together, as in qwen3 8b; None if they are not."""
        from memplan.core.errors import MemplanError
        from memplan.models.cards import find_model

        try:
            find_model(" ".join(arguments) if name == "model" else "")
        except (MemplanError, OSError):
            return None
        return [" ".join(arguments)]

    def _with_arguments(self, given: dict[str, Any], arguments: list[str]) -> dict[str, Any] | None:
        rows = ((name, option) for group in self.options.values() for name, option in group.items())
        name, argument = next(((name, option) for name, option in rows if option.is_argument), ("", None))
        if argument is None:
            return None if arguments else given
        if get_origin(argument.type) is list:
            return {**given, name: arguments} if arguments else None if argument.is_required else given
        if len(arguments) > 1:
            joined = self._joined(name, arguments)
            if joined is None:
                return None
            arguments = joined
        return {**given, **dict.fromkeys([name][: len(arguments)], *arguments)}


def is_meant(word: str, choices: tuple[str, ...]) -> bool:
    """Return whether a word is one of the choices, or one of them mistyped."""
    if word in choices or word.startswith("-"):
        return word in choices
    from difflib import get_close_matches

    return bool(get_close_matches(word, choices))


_RETOLD = ("--gpus", "--deepspeed", "--vram")


def type_of(option: Option) -> Any:
    """Return the type of an option's value."""
    if option.type or not option.field or option.is_argument or option.parse:
        return option.type or str
    from memplan.spec.fields import field_of

    return field_of(option.field).type


def _value(text: str, type_: Any) -> Any:
    """Return the value of an option; None if the text is not plainly one."""
    if not text or not text.isascii() or text.startswith("-"):
        return None
    single = get_args(type_)[0] if get_origin(type_) is list else type_
    if single is str:
        return text
    whole, point, fraction = text.partition(".")
    is_number = whole.isdecimal() and len(text) < _LONGEST_NUMBER and (fraction.isdecimal() or not point)
    return single(text) if is_number and (single is float or not point) else None


_LONGEST_NUMBER = 18  # characters, so that any parser makes the same number of it


def own(help: str, type: Any = str, **more: Any) -> Option:
    """Return an option of one command, which sets no field of a run."""
    return Option("", help, type, **more)


def without(options: Options, *names: str) -> Options:
    """Return the options without some, and without headings that have no others."""
    return {
        heading: {name: option for name, option in group.items() if name not in names}
        for heading, group in options.items()
        if not group.keys() <= set(names)
    }
