"""What went wrong, in one line: the field, what is wrong with it, and the nearest valid choice."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from memplan.errors import MemplanError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError


def line_of(error: BaseException, given: Iterable[str] = ()) -> str:
    """One line for an error of memplan or of pydantic; `given` are the options that were typed."""
    from memplan.cli.request import option_of

    field, text = error.field if isinstance(error, MemplanError) else "", str(error)
    if not isinstance(error, MemplanError):
        field, text = _invalid(error)  # pyright: ignore[reportArgumentType]
    option = option_of(field, given) if field else ""
    if option and text.startswith(f"{field}:"):
        text = f"{field} ({option}){text.removeprefix(field)}"
    return " ".join(text.split())


def _invalid(error: ValidationError) -> tuple[str, str]:
    """The field of the first thing pydantic found wrong, and the line about it."""
    from memplan.spec import RunSpec

    errors = error.errors(include_url=False)
    model: Any = RunSpec
    first = errors[0]
    names: list[str] = []
    for part in first["loc"]:
        fields = getattr(model, "model_fields", {})
        if isinstance(part, int) or (part not in fields and first["type"] != "extra_forbidden"):
            break  # an index, or which member of a union was tried
        names.append(str(part))
        if part in fields:
            model = _model_of(fields[part].annotation)
    field = ".".join(names) or "run"
    tried = [e for e in errors if e["loc"][: len(names)] == first["loc"][: len(names)]]
    others = len(errors) - len(tried)
    more = f" (and {others} more)" if others else ""
    return field, f"{field}: {_what(first, tried, names)}{more}"


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


def _what(error: Any, tried: list[Any], names: list[str]) -> str:
    """`error` in plain words; `tried` are the errors of every member where the field is a union."""
    value, context = _shown(error["input"]), error.get("ctx", {})
    bounds = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, words in bounds.items():
        if name in context:
            return f"must be {words} {context[name]:,}, not {value}"
    if any(e["type"] == "literal_error" for e in tried):
        expected = ", ".join(e["ctx"]["expected"] for e in tried if e["type"] == "literal_error")
        words = [text or word for text, word in re.findall(r"'([^']*)'|(\w+)", expected.replace(" or ", ", "))]
        return _nearest(error["input"], words, f"unknown {value}")
    match error["type"]:
        case "extra_forbidden":
            return _nearest(names[-1], getattr(_parent(names), "model_fields", {}), "no such key")
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
            return f"must be a mapping, not {value}"
        case _:
            message = str(error["msg"])
            return f"{message[:1].lower()}{message[1:]}, not {value}"


def _parent(names: list[str]) -> Any:
    from memplan.spec import RunSpec

    model: Any = RunSpec
    for name in names[:-1]:
        model = _model_of(model.model_fields[name].annotation)
    return model


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python prints
        return "that"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _nearest(value: object, choices: Iterable[str], what: str) -> str:
    """`what` is wrong, and the choice nearest to `value`: by letters, of numbers by size."""
    from difflib import get_close_matches

    words = [{"True": "true", "False": "false"}.get(word, word) for word in dict.fromkeys(choices)]
    numbers = [int(word) for word in words if word.isdigit()]
    if numbers and type(value) is int:
        near = [str(min(numbers, key=lambda n: abs(n - value)))]
    else:
        near = get_close_matches(str(value).lower(), words, n=1, cutoff=0.5)
    return f"{what}; " + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(words)}")
