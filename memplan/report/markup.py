"""Elements of HTML and SVG. Every text and attribute is escaped as it becomes part of an element."""

from __future__ import annotations

from html import escape

from memplan.core.errors import printable


class Markup(str):
    """Text that is markup already, and so is not escaped again."""

    __slots__ = ()


_WITHOUT_CONTENT = ("circle", "input", "line", "meta", "path", "rect")


def element(name: str, /, *content: str, **attributes: str | float | None) -> Markup:
    """Return an element. An attribute that is None is left out; `class_` is `class`, `aria_label` is `aria-label`.

    >>> element("p", "a < b", element("b", "c"), class_="x", id=None)
    '<p class="x">a &lt; b<b>c</b></p>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            text = f"{value:g}" if isinstance(value, float) else escape(printable(str(value)))
            words.append(f'{key.removesuffix("_").replace("_", "-")}="{text}"')
    if name in _WITHOUT_CONTENT and not content:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{joined(*content)}</{name}>")


def joined(*content: str) -> Markup:
    """Return texts and markup, one after the other."""
    return Markup("".join(part if isinstance(part, Markup) else _escaped(part) for part in content))


def _escaped(text: str) -> str:
    return escape("\n".join(map(printable, text.split("\n"))), quote=False)
