"""Values of options: what people type, in the option's own words, and text parsed into a field's value."""

from __future__ import annotations

import json
from typing import Any

from memplan.core.errors import SpecError


def tokens(text: str) -> str:
    """Return a number of tokens in digits; k and m are 1,024 and 1,048,576, as in the names of context lengths.

    >>> tokens("4k"), tokens("2,048"), tokens("many")
    ('4096', '2048', 'many')
    """
    number, unit = text.replace(",", ""), 1
    if number[-1:].lower() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].lower()]
    return str(int(number) * unit) if number.isdecimal() and len(number) < 10 else text


_UNITS = {"k": 2**10, "m": 2**20}


def method_word(text: str) -> str:
    """Return a method in memplan's words, in any case.

    >>> method_word("QLoRA"), method_word("inference"), method_word("full-finetuning")
    ('qlora', 'generate', 'full')
    """
    word = text.lower().replace("-", "_")
    return next((method for method, words in _METHOD_WORDS.items() if word in words), word)


_METHOD_WORDS = {
    "full": ("fft", "full_finetune", "full_finetuning", "full_fine_tuning", "full_ft"),
    "generate": ("generation", "infer", "inference", "serve", "serving"),
}


def listed(text: str) -> list[str]:
    """Parse words separated by commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def names(text: str) -> str | list[str]:
    """Parse `all-linear`, `default`, names separated by commas, or a regular expression."""
    return text if text in ("all-linear", "default") or not _NAMES.isdisjoint(text) else listed(text)


_NAMES = frozenset("*+?|()[]{}^$\\")  # characters of regular expressions that no module's name has


def settings(text: str) -> dict[str, Any]:
    """Parse settings `name=value` separated by commas; values are numbers, true, false, or words."""
    parsed: dict[str, Any] = {}
    for setting in _outer_parts(text):
        name, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise SpecError(
                f"method.options: {setting!r:.40} is not a setting; write name=value, as in oft_block_size=64",
                "method.options",
            )
        try:
            parsed[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except ValueError:
            parsed[name] = value
    return parsed


def _outer_parts(text: str) -> list[str]:
    """Return the parts between commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def pixels(text: str) -> int | list[int]:
    """Parse the side of an image, or its height and width."""
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() for side in sides):
        raise SpecError(
            f"batch.image_size: {text!r:.40} is not a size in pixels; write 1024, or height x width as 768x1024",
            "batch.image_size",
        )
    height, *width = map(int, sides)
    return [height, *width] if width else height


def proportions(text: str) -> list[float]:
    """Parse numbers separated by commas or slashes, as llama.cpp does."""
    try:
        return [float(part) for part in text.replace("/", ",").split(",")]
    except ValueError:
        raise SpecError(
            f"serving.tensor_split: {text!r:.40} is not a list of proportions; write 3,1 for two cards",
            "serving.tensor_split",
        ) from None


def kbit_preparation(text: str) -> bool | str:
    """Parse `true` or `false`; any other word is left to the field."""
    word = text.lower()
    return {"true": True, "false": False}.get(word, word)


def saving(wanted: bool) -> dict[str, Any] | None:
    """Return the default `Saving`, or None."""
    return {} if wanted else None
