"""What went wrong, in one line: the field, what is wrong with it, and the nearest valid choice."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from memplan.core.errors import MemplanError, nearest, printable
from memplan.spec.options import FIELDS, WORDS, option_of
from memplan.spec.run import RunSpec

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

_MOST_CHOICES = 20  # that are all named where none is near
_LONGEST = 60  # letters of a value or key that are repeated in the error about it


def line_of(error: BaseException, given: Iterable[str] = ()) -> str:
    """One line for an error of memplan or of pydantic; `given` are the options that were typed."""
    field, text = error.field if isinstance(error, MemplanError) else "", str(error)
    if not isinstance(error, MemplanError):
        field, text = _invalid(error)  # pyright: ignore[reportArgumentType]
    option = option_of(field, given) if field else ""
    if option and text.startswith(f"{field}:"):
        text = f"{field} ({option}){text.removeprefix(field)}"
    return " ".join(text.split())


def _invalid(error: ValidationError) -> tuple[str, str]:
    """The field of the first thing pydantic found wrong, and the line about it."""
    errors = _meant(error.errors(include_url=False))
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    model = _model_of(RunSpec)
    names: list[str] = []
    for part in first["loc"]:
        fields = getattr(model, "model_fields", {})
        if part == "InlineModel":  # which member of a union was tried
            continue
        if isinstance(part, int) or (part not in fields and first["type"] != "extra_forbidden"):
            break  # an index, or a member again
        names.append(str(part))
        if part in fields:
            model = _model_of(fields[part].annotation)
    field = ".".join(printable(name, _LONGEST) or "''" for name in names) or "run"
    tried = [e for e in errors if e["loc"][: len(names)] == first["loc"][: len(names)]]
    others = len(errors) - len(tried)
    more = f" (and {others} more)" if others else ""
    return field, f"{field}: {_what(first, tried, names)}{more}"


def _meant(errors: Sequence[Any]) -> Sequence[Any]:
    """The errors without those of what a value was not meant as: of a name, where it is a mapping, or of a word."""

    def meant(error: Any) -> bool:
        value, member = error["input"], error["loc"][1:2]
        if error["loc"][:1] == ("model",):
            return not (member == ("str",) and isinstance(value, Mapping)) and error["loc"] != ("model", "InlineModel")
        return not (error["type"] == "literal_error" and isinstance(value, (list, tuple)))

    return [error for error in errors if meant(error)] or errors


def _model_of(annotation: Any) -> type[BaseModel] | None:
    from pydantic import BaseModel

    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def what(error: Any) -> str:
    """What pydantic found wrong with a value by itself; another error's own words."""
    errors: list[Any] = error.errors(include_url=False) if hasattr(error, "errors") else []
    return _what(errors[0], errors, []) if errors else str(error)


def _what(error: Any, tried: Sequence[Any], names: list[str]) -> str:
    """`error` in plain words; `tried` are the errors of every member where the field is a union."""
    value, context = _shown(error["input"]), error.get("ctx", {})
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, words in bounds.items():
        if name in context:
            bound = context[name]
            return f"must be {words} {int(bound) if bound == int(bound) else bound:,}, not {value}"
    choices = list(_choices(tried))
    if any(e["type"] == "tuple_type" for e in tried):
        return f"must be {' or '.join([*choices, 'a list of names'])}, not {value}"
    if choices:
        return _nearest(error["input"], choices, f"unknown {value}")
    match error["type"]:
        case "extra_forbidden":
            return _no_such_key(names)
        case "missing":
            return "is missing"
        case "int_type" | "int_from_float" | "int_parsing":
            return f"must be a whole number, not {value}"
        case "float_type" | "float_parsing" | "finite_number":
            return f"must be a number, not {value}"
        case "bool_type" | "bool_parsing":
            return f"must be true or false, not {value}"
        case "string_type":
            return f"must be a text, not {value}"
        case "model_type" | "dict_type" | "model_attributes_type":
            named = "a name or " if names in (["method"], ["precision"], ["optimizer"]) else ""
            return f"must be {named}a mapping, not {value}"
        case "value_error":
            return str(error["msg"]).removeprefix("Value error, ")
        case _:
            message = str(error["msg"])
            return f"{message[:1].lower()}{message[1:]}, not {value}"


def _choices(tried: Sequence[Any]) -> Iterator[str]:
    """The words a field takes, where it takes some only."""
    expected = ", ".join(e["ctx"]["expected"] for e in tried if e["type"] == "literal_error").replace(" or ", ", ")
    for text, word in re.findall(r"'([^']*)'|(\w+)", expected):
        yield {"True": "true", "False": "false"}.get(word, word) or text


def _no_such_key(names: list[str]) -> str:
    """An unknown key: where in a run there is one of that name, or which of those beside it is the nearest."""
    from difflib import get_close_matches

    key, beside = names[-1], list(getattr(_parent(names), "model_fields", {}))
    near = [path for path in _paths(RunSpec) if path.rpartition(".")[2] == key]
    near += [path for name, path in {**FIELDS, **WORDS}.items() if name == key]
    near = near or get_close_matches(key.lower()[:_LONGEST], beside, n=1, cutoff=0.6)
    return "no such key; " + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(beside)}")


def _paths(model: Any, start: str = "") -> Iterator[str]:
    """Every field of a run by its path."""
    for name, field in model.model_fields.items():
        yield f"{start}{name}"
        inner = _model_of(field.annotation)
        if inner is not None:
            yield from _paths(inner, f"{start}{name}.")


def _parent(names: list[str]) -> Any:
    model: Any = RunSpec
    for name in names[:-1]:
        model = _model_of(model.model_fields[name].annotation)
    return model


def _shown(value: object) -> str:
    """A value as JSON and YAML have it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        return "that"
    return printable(text, _LONGEST - 3)


def _nearest(value: object, words: list[str], what: str) -> str:
    """`what` is wrong, and the choice nearest to `value`: by letters, of numbers by size."""
    from difflib import get_close_matches

    words = list(dict.fromkeys(words))
    numbers = [int(word) for word in words if word.isdigit()]
    if numbers and type(value) is int:
        near = [str(min(numbers, key=lambda n: abs(n - value)))]
    else:
        near = get_close_matches(str(value).lower()[:_LONGEST], words, n=1, cutoff=0.5)
    if not near and len(words) > _MOST_CHOICES:
        near = [" or ".join(nearest(str(value), words))]
    return f"{what}; " + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(words)}")
