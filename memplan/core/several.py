"""A number of equal things as people type them: `2x4090`, or as the type of a cloud's machine: `p4d.24xlarge`."""

from __future__ import annotations

import re

from memplan.core.machines import find_machine

# Kept as strings: `re` compiles and caches them when one is named. 7900xt and 7900xtx are cards, not 7,900 of them.
_COUNT_FIRST = r"(\d{1,6})\s*[x*×]\s*(?!(?i:tx?)\b)(\d{3}.*|[^\d\s].*)"
_COUNT_LAST = r"(\S.*?)(?:\s+[x*×]\s*|(?<=\d)[x*×])(\d{1,6})"


def several(text: str) -> tuple[int | None, str]:
    """Return how many of what the text names; None if it gives no number.

    >>> several("2x4090"), several("8 x h100"), several("h100 x8"), several("7900xtx"), several("g5.12xlarge")
    ((2, '4090'), (8, 'h100'), (8, 'h100'), (None, '7900xtx'), (4, 'a10g'))
    """
    text = text.strip()
    if machine := find_machine(text):
        return machine.cards, machine.gpu
    if first := re.fullmatch(_COUNT_FIRST, text):
        return int(first[1]), first[2]
    if last := re.fullmatch(_COUNT_LAST, text):
        return int(last[2]), last[1]
    return None, text
