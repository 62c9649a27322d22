"""One-line error messages: the field, what is wrong with it, and the nearest valid choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan.core.errors import FieldError, MemplanError, printable
from memplan.core.records import NamedTuple
from memplan.spec.checks import part_of
from memplan.spec.option_values import MEANT
from memplan.spec.options import FIELDS, option_of

if TYPE_CHECKING:
    from pydantic import ValidationError

_MAX_CHOICES = 20  # listed in full if none is near the given value
_MAX_SHOWN = 60  # characters of a value or key that an error message repeats


class _Wrong(NamedTuple):
    """The fault of a value, in plain words without its field, and the values that may have been meant."""

    text: str
    suggestions: tuple[str, ...] = ()


def line_of(error: MemplanError, given: Iterable[str] = ()) -> str:
    """Return one line for an error; `given` are the options on the command line."""
    field, text = error.field, str(error)
    option = option_of(field, given) if field else ""
    if option and text.startswith(f"{field}:"):
        text = f"{field} ({option}){text.removeprefix(field)}"
    return " ".join(text.split())


def field_error(error: ValidationError, root: Any) -> FieldError:
    """Return pydantic's error about a part of a run, `root`, as one about the first invalid field."""
    errors = _without_other_members(error.errors(include_url=False))
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    model = root
    names: list[str] = []
    for part in first["loc"]:
        fields = getattr(model, "model_fields", {})
        if part == "InlineModel":  # a member of a union, not a field
            continue
        if isinstance(part, int) and fields and model is not root:  # of a list of parts
            names.append(str(part))
            continue
        if isinstance(part, int) or (part not in fields and first["type"] != "extra_forbidden"):
            break  # an index, or another member of a union
        names.append(str(part))
        if part in fields:
            model = part_of(fields[part].annotation)
    field = ".".join(printable(name, _MAX_SHOWN) or "''" for name in names) or "run"
    tried = [e for e in errors if e["loc"][: len(names)] == first["loc"][: len(names)]]
    others = len(errors) - len(tried)
    more = f" (and {others} more)" if others else ""
    wrong = _wrong(first, tried, names, root)
    kind = {"extra_forbidden": "unknown_field", "missing": "missing_field"}.get(first["type"], "invalid_value")
    return FieldError(kind, f"{field}: {wrong.text}{more}", field, wrong.suggestions)


def _without_other_members(errors: Sequence[Any]) -> Sequence[Any]:
    """Return the errors without those of union members that the value cannot have been meant as.

    A mapping is not meant as a name, nor a list as a literal.
    """

    def is_relevant(error: Any) -> bool:
        value, member = error["input"], error["loc"][1:2]
        if error["loc"][:1] == ("model",):
            return not (member == ("str",) and isinstance(value, Mapping)) and error["loc"] != ("model", "InlineModel")
        return not (error["type"] == "literal_error" and isinstance(value, (list, tuple)))

    return [error for error in errors if is_relevant(error)] or errors


def message_of(error: Any) -> str:
    """Return pydantic's first error in plain words, without the field; any other error as text."""
    errors: list[Any] = error.errors(include_url=False) if hasattr(error, "errors") else []
    return _wrong(errors[0], errors, [], None).text if errors else str(error)


def _wrong(error: Any, tried: Sequence[Any], names: list[str], root: Any) -> _Wrong:
    """Return `error` in plain words; `tried` are the errors of all members if the field is a union."""
    value, context = _shown(error["input"]), error.get("ctx", {})
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, words in bounds.items():
        if name in context:
            bound = context[name]
            return _Wrong(f"must be {words} {int(bound) if bound == int(bound) else bound:,}, not {value}")
    choices = list(_choices(tried))
    if any(e["type"] == "tuple_type" for e in tried):
        return _Wrong(f"must be {' or '.join([*choices, 'a list of names'])}, not {value}")
    if choices:
        return _nearest(error["input"], choices, f"unknown {value}")
    if error["type"] == "extra_forbidden":
        return _no_such_key(names, root)
    return _Wrong(_wrong_type(error, value, names))


def _wrong_type(error: Any, value: str, names: list[str]) -> str:
    """Return in plain words that a value has the wrong type, or what pydantic says."""
    match error["type"]:
        case "missing":
            return "is missing"
        case "int_type" | "int_from_float" | "int_parsing":
            return f"must be a whole number, not {value}"
        case "float_type" | "float_parsing" | "finite_number":
            return f"must be a number, not {value}"
        case "bool_type" | "bool_parsing":
            return f"must be true or false, not {value}"
        case "string_type":
            return f"must be a string, not {value}"
        case "model_type" | "dict_type" | "model_attributes_type":
            named = "a name or " if names in (["method"], ["precision"], ["optimizer"]) else ""
            return f"must be {named}a mapping, not {value}"
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            message = str(error["msg"])
            return f"{message[:1].lower()}{message[1:]}, not {value}"


def _choices(tried: Sequence[Any]) -> Iterator[str]:
    """The literals that the field accepts, if it accepts literals."""
    expected = ", ".join(e["ctx"]["expected"] for e in tried if e["type"] == "literal_error").replace(" or ", ", ")
    for text, word in re.findall(r"'([^']*)'|(\w+)", expected):
        yield {"True": "true", "False": "false"}.get(word, word) or text


def _no_such_key(names: list[str], root: Any) -> _Wrong:
    """Return the error of an unknown key: where in a run that key exists, or the nearest sibling."""
    from difflib import get_close_matches

    key, parent = names[-1], root
    for name in (name for name in names[:-1] if not name.isdecimal()):
        parent = part_of(parent.model_fields[name].annotation)
    siblings = list(getattr(parent, "model_fields", {}))
    typed = key.lower()[:_MAX_SHOWN]
    near = get_close_matches(typed, siblings, n=1, cutoff=_ALIKE)
    paths = [path for path in _paths(root) if path.rpartition(".")[2] == key]
    depth = min((path.count(".") for path in paths), default=0)
    near += [path for path in paths if path.count(".") == depth]
    near += [path for name, path in FIELDS.items() if name == key]
    near = near or get_close_matches(typed, siblings, n=1, cutoff=_SIMILAR)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(siblings)}"
    return _Wrong(f"no such key; {hint}", tuple(dict.fromkeys(near)))


def _paths(model: Any, start: str = "") -> Iterator[str]:
    """The dotted path of every field of `model`, nested ones included."""
    for name, field in model.model_fields.items():
        yield f"{start}{name}"
        inner = part_of(field.annotation)
        if inner is not None:
            yield from _paths(inner, f"{start}{name}.")


def _shown(value: object) -> str:
    """Return a value as JSON and YAML write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        return "that"
    return printable(text, _MAX_SHOWN - 3)


def _nearest(value: object, words: list[str], what: str) -> _Wrong:
    """Return `what` is wrong and the choice nearest to `value`: numbers by size, words by spelling."""
    from difflib import get_close_matches

    words = list(dict.fromkeys(words))
    numbers = [int(word) for word in words if word.isdigit()]
    if numbers and type(value) is int:
        near = [str(min(numbers, key=lambda n: abs(n - value)))]
    else:
        typed = str(value).lower()[:_MAX_SHOWN]
        longer = [word for word in words if typed and word.lower().startswith(typed)]
        near = longer[:1] or get_close_matches(typed, words, n=1, cutoff=_SIMILAR)
    meant = MEANT.get(str(value).lower()[:_MAX_SHOWN].replace("-", "_"), "")
    if (instead := meant.partition(" ")[0]) in words:
        return _Wrong(f"{what}; write {meant}", (instead,))
    if near:
        return _Wrong(f"{what}; did you mean {near[0]}?", tuple(near))
    if len(words) <= _MAX_CHOICES:
        return _Wrong(f"{what}; choose from {', '.join(words)}", tuple(words))
    return _Wrong(f"{what}; choose from {', '.join(words[:_SHOWN])} and {len(words) - _SHOWN} more: memplan --help-all")


_SHOWN = 6  # of a longer list
_ALIKE = 0.85  # of `difflib`'s ratio: a slip of the keyboard, whatever has the name elsewhere
_SIMILAR = 0.6  # below, a suggestion is another word (dora for dpo)
